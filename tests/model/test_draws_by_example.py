"""Draws that follow dataset indices: the same in every batch, and as random as those of a generator."""

import pytest
import torch

from lightning_influence.model.losses.draws import (
    COVARIANCES,
    SQUARES,
    ExampleGenerator,
    draw_bits,
    draw_labels,
    draw_normal,
    draw_signs,
    draw_uniform,
)
from lightning_influence.support.random_states import hash_numbers

N = 40_000
SIGMAS = 6  # the seeds are fixed, and so is the outcome; see test_draws.py
DRAWS = {
    "labels": lambda like, source: draw_labels(like.softmax(-1), source),
    "bits": lambda like, source: draw_bits(like.sigmoid(), source),
    "normal": draw_normal,
    "signs": draw_signs,
    "uniform": draw_uniform,
}


def splitmix(state):
    """The published generator's next number, in Python's integers without end."""
    full = 2**64 - 1
    z = state & full
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & full
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & full
    return z ^ (z >> 31)


def test_numbers_are_those_of_splitmix64():
    keys = [0, 1, 1234567, -5, 2**62]
    found = hash_numbers(torch.tensor(keys), 4)
    for key, row in zip(keys, found.tolist(), strict=True):
        expected = [splitmix(key + place * 0x9E3779B97F4A7C15) for place in (1, 2, 3, 4)]
        assert [number % 2**64 for number in row] == expected
    # The first number of the reference implementation at seed 1234567.
    assert int(found[2, 0]) % 2**64 == 6457827717110365317


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(3,), (5, 3), (2, 70)])
@pytest.mark.parametrize("name", DRAWS)
def test_a_draw_follows_its_example_through_batches(name, shape, dtype):
    like = torch.randn(12, *shape, dtype=dtype, generator=torch.Generator().manual_seed(0))
    indices = torch.randperm(1000, generator=torch.Generator().manual_seed(1))[:12]

    def twice(rows):
        source = ExampleGenerator(3, indices[rows])
        return [DRAWS[name](like[rows], source) for _ in range(2)]

    whole = twice(torch.arange(12))
    for rows in (*torch.arange(12).split(5), torch.tensor([7]), torch.arange(11, -1, -1)):
        for draw, expected in zip(twice(rows), whole, strict=True):
            assert torch.equal(draw, expected[rows])
    assert not torch.equal(*whole)


def test_positions_in_a_run_are_their_examples():
    like = torch.zeros(6 * 4, 3)
    rows = draw_uniform(like, ExampleGenerator(0, torch.arange(6)))
    later = draw_uniform(like[8:], ExampleGenerator(0, torch.arange(2, 6)))
    assert torch.equal(rows[8:], later)


def test_seeds_purposes_and_numbers_of_draws_are_independent():
    like = torch.empty(N, dtype=torch.float64)
    sources = [ExampleGenerator(s, torch.arange(N), p) for s in (0, 1, 2) for p in (COVARIANCES, SQUARES)]
    draws = torch.stack([draw_normal(like, source) for source in sources for _ in range(2)])
    covariance = draws @ draws.T / N
    bound = SIGMAS * torch.ones(len(draws), len(draws)).double().fill_diagonal_(2**0.5) / N**0.5
    assert ((covariance - torch.eye(len(draws))).abs() < bound).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_distributions(dtype):
    def source(seed):
        return ExampleGenerator(seed, torch.arange(N))

    uniform = draw_uniform(torch.empty(N, 2, dtype=dtype), source(0)).double()
    assert uniform.dtype == torch.float64
    assert 0 <= uniform.min() < 1e-3
    assert 1 - 1e-3 < uniform.max() < 1
    assert ((uniform.mean(0) - 0.5).abs() < SIGMAS / (12 * N) ** 0.5).all()
    assert ((uniform.var(0) - 1 / 12).abs() < SIGMAS / (180 * N) ** 0.5).all()
    signs = draw_signs(torch.empty(N, 130, dtype=dtype), source(1))
    assert signs.dtype == dtype
    assert set(signs.unique().tolist()) == {-1.0, 1.0}
    gram = signs.T @ signs / N  # every sign is even with every other, those of one number too
    assert (gram - torch.eye(130)).abs().max() < SIGMAS / N**0.5
    assert signs.mean(0).abs().max() < SIGMAS / N**0.5
    normal = draw_normal(torch.empty(N, 2, dtype=dtype), source(2)).double()
    assert normal.isfinite().all()
    assert (normal.mean(0).abs() < SIGMAS / N**0.5).all()
    assert ((normal.square().mean(0) - 1).abs() < SIGMAS * (2 / N) ** 0.5).all()
    assert ((normal.pow(4).mean(0) - 3).abs() < SIGMAS * (96 / N) ** 0.5).all()
    p = torch.tensor([0.0, 0.5, 0.3, 0.15, 0.05], dtype=dtype)
    frequency = torch.bincount(draw_labels(p.expand(N, 5), source(3)), minlength=5) / N
    assert frequency[0] == 0
    assert ((frequency - p).abs() <= SIGMAS * (p * (1 - p) / N).sqrt()).all()


def test_neighbouring_examples_are_independent():
    signs = draw_signs(torch.empty(N, 4, dtype=torch.float64), ExampleGenerator(0, torch.arange(N)))
    for step in (1, 2, 64):
        products = (signs[step:] * signs[:-step]).mean(0)
        assert products.abs().max() < SIGMAS / (N - step) ** 0.5


def test_it_is_a_generator_to_everything_else():
    source = ExampleGenerator(0, torch.tensor([4, 5]))
    before = torch.get_rng_state()
    drawn = torch.rand(3, generator=source)
    assert torch.equal(drawn, torch.rand(3, generator=ExampleGenerator(0, torch.tensor([4, 5]))))
    assert not torch.equal(drawn, torch.rand(3, generator=ExampleGenerator(0, torch.tensor([5, 4]))))
    odd = draw_normal(torch.empty(5), source), draw_uniform(torch.empty(5), source)  # of 2 examples
    assert all(part.shape == (5,) for part in odd)
    assert torch.equal(torch.get_rng_state(), before)
    assert draw_signs(torch.empty(0, 3), ExampleGenerator(0, torch.zeros(0, dtype=torch.int64))).shape == (
        0,
        3,
    )
