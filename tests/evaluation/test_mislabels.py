import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from lightning_influence.evaluation.mislabels import mislabel_auroc


@settings(deadline=None, max_examples=25)
@given(st.lists(st.tuples(st.integers(-4, 4), st.booleans()), min_size=2, max_size=30))
def test_equals_scikit_learn_with_ties(pairs):
    values, flipped = zip(*pairs, strict=True)
    if len(set(flipped)) < 2:
        return
    ours = mislabel_auroc(torch.tensor(values, dtype=torch.float64), torch.tensor(flipped))
    # torchmetrics computes the curve in float32.
    assert ours.item() == pytest.approx(roc_auc_score(flipped, values), abs=1e-6)


def test_large_values_keep_their_order():
    # A sigmoid would make all of these 1.
    values = torch.tensor([100.0, 200.0, 300.0, 400.0])
    assert mislabel_auroc(values, torch.tensor([False, False, True, True])) == 1
    assert mislabel_auroc(values, torch.tensor([True, True, False, False])) == 0


def test_arguments_that_do_not_fit_are_refused():
    values = torch.tensor([1.0, 2.0])
    with pytest.raises(ValueError, match=r"got \(2,\) and \(3,\)"):
        mislabel_auroc(values, torch.tensor([True, False, True]))
    with pytest.raises(ValueError, match="must be finite"):
        mislabel_auroc(torch.tensor([1.0, float("inf")]), torch.tensor([True, False]))
    with pytest.raises(ValueError, match="got 0 flipped"):
        mislabel_auroc(values, torch.tensor([False, False]))
