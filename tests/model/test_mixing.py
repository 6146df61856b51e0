import pytest
import torch
from torch.nn import functional as F

from lightning_influence.model.losses.bce import parse_bce_with_logits
from lightning_influence.model.losses.combined import ScaledLoss
from lightning_influence.model.losses.cross_entropy import parse_cross_entropy
from lightning_influence.model.losses.draws import balanced_signs
from lightning_influence.model.losses.loss import OutputLoss
from lightning_influence.model.losses.mse import parse_mse_loss


def losses():
    x = torch.randn(4, 5, 3, dtype=torch.float64)  # 4 examples, 5 classes, 3 positions
    y = torch.randint(5, (4, 3))
    y[0, 1] = -100
    weight = torch.rand(5, dtype=torch.float64) + 0.5
    bits = torch.rand(4, 5, 3, dtype=torch.float64)
    entropy = parse_cross_entropy(x, y, weight=weight, label_smoothing=0.1)
    rows = parse_cross_entropy(torch.randn(12, 5, dtype=torch.float64), torch.randint(5, (12,)))
    return {
        "cross-entropy": entropy,
        "rows": type(rows)(rows.outputs, rows.targets, 4, rows.reduction),
        "bce": parse_bce_with_logits(x, bits),
        "mse": parse_mse_loss(x, bits),
        "scaled": ScaledLoss.of(entropy, 0.3),
    }


@pytest.mark.parametrize("name", sorted(losses()))
def test_closed_forms_are_sums_over_the_columns(name):
    loss = losses()[name]
    weights = torch.randn(4, loss.num_columns, dtype=torch.float64)
    torch.testing.assert_close(loss.mix_columns(weights), OutputLoss.mix_columns(loss, weights))
    torch.testing.assert_close(loss.column_energies(), OutputLoss.column_energies(loss))
    columns = torch.stack([c.reshape(4, -1) for c in loss.columns()], 1)
    expected = torch.einsum("bk,bko->bo", weights, columns).view(loss.outputs.shape)
    torch.testing.assert_close(loss.mix_columns(weights), expected)


@pytest.mark.parametrize("count", [1, 3, 7, 20, 30])
def test_every_column_is_in_one_group(count):
    energies = torch.rand(6, 20, dtype=torch.float64) ** 4
    weights = balanced_signs(energies, count, torch.Generator().manual_seed(0))
    assert weights.shape == (count, 6, 20)
    torch.testing.assert_close(weights.abs().sum(0), torch.ones(6, 20, dtype=torch.float64))
    assert set(weights.unique().tolist()) <= {-1.0, 0.0, 1.0}
    sizes = weights.abs().sum(2)
    assert sizes.max() - sizes.min() <= 2
    if count >= 20:
        assert sizes.max() == 1


def test_large_columns_are_spread_over_the_groups():
    energies = torch.cat([torch.full((3, 4), 10.0), torch.rand(3, 60)], 1)[:, torch.randperm(64)]
    shares = (balanced_signs(energies, 4).abs() * energies).sum(2)
    assert shares.max() < 1.2 * shares.min()


def test_signs_are_balanced_and_independent():
    weights = balanced_signs(torch.ones(4000, 3), 1, torch.Generator().manual_seed(3))[0]
    assert weights.mean(0).abs().max() < 0.08  # five standard errors
    assert ((weights.T @ weights) / 4000 - torch.eye(3)).abs().max() < 0.08


@pytest.mark.parametrize("count", [0, -2])
def test_no_group_is_refused(count):
    with pytest.raises(ValueError, match=f"Got count={count}; accepted are positive"):
        balanced_signs(torch.ones(1, 2), count)


def test_ignored_positions_have_no_energy():
    loss = losses()["cross-entropy"]
    assert not loss.column_energies().view(4, 3, 5)[0, 1].any()
    assert F.relu(loss.column_energies()).equal(loss.column_energies())
