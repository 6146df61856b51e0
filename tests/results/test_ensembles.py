import copy
import pathlib

import pytest
import torch
from influence_cases import quiet
from influence_models import Net, fitted, queries, train, trainer

from lightning_influence import Attributions, Diagnostics, InfluenceCallback, average_attributions

pytestmark = pytest.mark.filterwarnings("ignore:.*logging interval")


def made(scores, **changes):
    queries, examples = scores.shape
    options = {
        "train_indices": torch.arange(examples),
        "query_indices": torch.arange(queries),
        "diagnostics": Diagnostics(
            method="ekfac", damping={"a": float(queries)}, residuals=scores[:, 0].abs(), seconds=1.0
        ),
    }
    return Attributions(scores=scores, **{**options, **changes})


def test_scores_are_averaged_and_agreement_is_the_mean_correlation():
    torch.manual_seed(0)
    scores = torch.randn(3, 4, 20, dtype=torch.float64)
    found = average_attributions([made(part) for part in scores])
    torch.testing.assert_close(found.scores, scores.mean(dim=0), rtol=1e-12, atol=0)
    correlations = [torch.corrcoef(scores[:, q])[i, j] for q in range(4) for i, j in ((0, 1), (0, 2), (1, 2))]
    assert found.diagnostics.extra["agreement"] == pytest.approx(float(sum(correlations)) / 12, rel=1e-9)
    assert found.diagnostics.extra["models"] == 3
    assert found.diagnostics.seconds == 3.0
    torch.testing.assert_close(found.diagnostics.residuals, scores[:, :, 0].abs().amax(dim=0))


def test_one_model_is_its_own_average():
    part = made(torch.randn(2, 5))
    found = average_attributions([part])
    torch.testing.assert_close(found.scores, part.scores)
    assert found.diagnostics.extra["agreement"] is None


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([], "Got no attributions"),
        ([made(torch.ones(2, 3)), made(torch.ones(2, 4))], "0 and 1 differ in train_indices"),
        (
            [made(torch.ones(2, 3)), made(torch.ones(2, 3), query_dataloaders=torch.zeros(2).long())],
            "differ in query_dataloaders",
        ),
        (
            [
                made(torch.ones(1, 3)),
                made(torch.ones(1, 3), diagnostics=Diagnostics(method="ekfac", measurement="margin")),
            ],
            "differ in the measurement",
        ),
    ],
)
def test_answers_to_other_questions_are_refused(parts, message):
    with pytest.raises(ValueError, match=message):
        average_attributions(parts)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs from other initial weights, and the file of each."""
    folder = tmp_path_factory.mktemp("runs")
    paths, answers = [], []
    for seed in (0, 1):
        torch.manual_seed(seed)
        host, module = fitted(module=Net())
        answers.append(host.influence(module, train(), queries()))
        paths.append(str(folder / f"{seed}.ckpt"))
        host.save_checkpoint(paths[-1])
    return paths, answers


def test_several_checkpoints_give_the_mean_and_leave_the_weights(runs):
    paths, answers = runs
    module, callback = Net(), InfluenceCallback()
    before, state = copy.deepcopy(module.state_dict()), callback.influence_state
    found = trainer(callback).influence(module, train(), queries(), ckpt_path=paths)
    expected = torch.stack([answer.scores for answer in answers]).mean(dim=0)
    torch.testing.assert_close(found.scores, expected)
    torch.testing.assert_close(dict(module.state_dict()), dict(before))
    assert callback.influence_state is state
    assert found.diagnostics.checkpoint == ", ".join(paths)


def test_a_path_object_is_one_checkpoint(runs):
    paths, answers = runs
    found = trainer().influence(Net(), train(), queries(), ckpt_path=pathlib.Path(paths[0]))
    torch.testing.assert_close(found.scores, answers[0].scores)


def test_the_weights_return_after_an_error(runs, tmp_path):
    module = Net()
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(FileNotFoundError):
        trainer().influence(module, train(), queries(), ckpt_path=[runs[0][0], str(tmp_path / "none.ckpt")])
    torch.testing.assert_close(dict(module.state_dict()), dict(before))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ckpt_path": []}, "Got an empty ckpt_path"),
        ({"ckpt_path": ["a"], "top_k": 3}, "Got top_k=3 with several checkpoints"),
    ],
)
def test_settings_without_meaning_are_refused(options, message):
    with quiet(), pytest.raises(ValueError, match=message):
        trainer().influence(Net(), train(), queries(), **options)
