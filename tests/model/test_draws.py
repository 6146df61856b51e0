import pytest
import torch

from lightning_influence.model.losses.draws import draw_bits, draw_labels, draw_normal, draw_signs

N = 40_000
# With a correct sampler a frequency over N draws is off by more than 6 standard deviations once in 5e8
# (normal tail); the fixed seeds make the outcome the same on every run of one torch version.
SIGMAS = 6


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_labels_follow_their_distribution():
    p = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64)
    labels = draw_labels(p.expand(N, 4), seeded())
    frequency = torch.bincount(labels, minlength=4) / N
    assert ((frequency - p).abs() < SIGMAS * (p * (1 - p) / N).sqrt()).all()


def test_draws_of_rows_are_independent():
    p = torch.full((N, 2, 2), 0.5)
    first, second = draw_labels(p, seeded()).float().T
    covariance = ((first - 0.5) * (second - 0.5)).mean()
    assert covariance.abs() < SIGMAS * 0.25 / N**0.5


def test_impossible_labels_are_never_drawn():
    p = torch.tensor([0.0, 0.7, 0.0, 0.3, 0.0]).expand(N, 5)
    assert set(draw_labels(p, seeded()).tolist()) == {1, 3}


@pytest.mark.parametrize(("uniform", "label"), [(0.0, 1), (1 - 2**-24, 3)])
def test_impossible_labels_are_not_drawn_at_the_ends(monkeypatch, uniform, label):
    monkeypatch.setattr(torch, "rand", lambda size, **options: torch.full(size, uniform))
    p = torch.tensor([0.0, 0.7, 0.0, 0.3, 0.0]).expand(2, 5)
    assert draw_labels(p).tolist() == [label, label]


def test_bits_follow_their_probability():
    p = torch.tensor([0.0, 0.2, 0.9, 1.0], dtype=torch.float64)
    frequency = draw_bits(p.expand(N, 4), seeded()).mean(0)
    assert frequency[0] == 0
    assert frequency[3] == 1
    assert ((frequency - p).abs() <= SIGMAS * (p * (1 - p) / N).sqrt()).all()


def test_normal_has_unit_covariance():
    x = draw_normal(torch.empty(N, 2, dtype=torch.float64), seeded())
    covariance = x.T @ x / N
    # Standard deviations: sqrt(2/N) on the diagonal, sqrt(1/N) beside it.
    bound = SIGMAS * torch.tensor([[2.0, 1.0], [1.0, 2.0]], dtype=torch.float64).div(N).sqrt()
    assert ((covariance - torch.eye(2, dtype=torch.float64)).abs() < bound).all()


def test_generator_decides():
    p = torch.rand(50, 3, generator=seeded()).softmax(-1)
    for draw in (draw_labels, draw_bits, draw_normal):
        assert torch.equal(draw(p, seeded(1)), draw(p, seeded(1)))
        assert not torch.equal(draw(p, seeded(1)), draw(p, seeded(2)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_signs_are_even_independent_and_reproducible(dtype):
    like = torch.empty(N, 2, dtype=dtype)
    before = torch.get_rng_state()
    signs = draw_signs(like, seeded(3))
    assert torch.equal(torch.get_rng_state(), before)
    assert signs.dtype == dtype
    assert set(signs.unique().tolist()) == {-1.0, 1.0}
    assert signs.mean(0).abs().max() < SIGMAS / N**0.5
    assert signs.prod(1).mean().abs() < SIGMAS / N**0.5
    assert torch.equal(draw_signs(like, seeded(3)), signs)
    assert not torch.equal(draw_signs(like, seeded(4)), signs)
