import oracle
import pytest
import torch
from drive import TIGHT, Setup, run
from models import CASES

from lightning_influence.curvature.factor_passes import CovariancePass, SquaresPass
from lightning_influence.model.losses.capture import LossCapture
from lightning_influence.model.losses.draws import (
    ExampleGenerator,
    balanced_signs,
    draw_generator,
    draw_signs,
)
from lightning_influence.support.errors import NonFiniteError, UnsupportedModelError

# Cases of every kind of layer and loss, where reductions differ.
SOME = [
    "mlp_softplus_weighted_smoothing",
    "mlp_bce",
    "mlp_mse",
    "tokens_weighted",
    "conv2d_replicate_depthwise",
]


def mixtures(loss, draws: int, generator: torch.Generator) -> list[torch.Tensor]:
    """Columns summed with the signs that the generator gives; sqrt(draws) undoes the oracle's average."""
    columns = torch.stack([column.reshape(loss.num_examples, -1) for column in loss.columns()], 1)
    if draws == 1:
        signs = draw_signs(columns[:, :, 0], generator)[None]
    else:
        signs = balanced_signs(columns.square().sum(2), draws, generator)
    return list(torch.einsum("sbk,bko->sbo", signs.to(columns.dtype), columns) * draws**0.5)


def drawn_seeds(
    setup: Setup, batch_size: int, seed: int, draws: int, purpose: int = 0, fisher: str = "mixed"
) -> torch.Tensor:
    """The very seeds (draws, N, *outputs) that a pass draws, by running the loss under its generators."""
    x, y, parts = setup.case.x, setup.case.y, []
    everyone = torch.arange(len(x)).split(batch_size)
    for bx, by, indices in zip(x.split(batch_size), y.split(batch_size), everyone, strict=True):
        generator = ExampleGenerator(seed, indices, purpose)
        with LossCapture() as capture:
            value = setup.module.training_step((bx, by), 0)
        loss = capture.resolve(value, len(bx))
        shape = setup.case.model(bx).shape
        if fisher == "mixed":
            seeds = mixtures(loss, draws, generator)
        else:
            seeds = [loss.sample(generator) for _ in range(draws)]
        parts.append(torch.stack([one.reshape(shape) for one in seeds]).detach())
    return torch.cat(parts, dim=1)


def check(setup: Setup, pass_, curvature: str, seeds=None, others=None) -> None:
    """Sums of a pass, with Lambda from a second draw ``others`` where labels are sampled."""
    factors = pass_.factors
    bases = {
        name.removeprefix("model."): (layer.basis.q_in, layer.basis.q_out)
        for name, layer in factors.layers.items()
    }
    expected = oracle.layer_factors(*setup.problem, curvature=curvature, seeds=seeds, bases=bases)
    second = seeds if others is None else others
    moments = oracle.layer_factors(*setup.problem, curvature=curvature, seeds=second, bases=bases)
    # A gradient is divided by wbar, so its outer product by the square; a curvature seed by the root of wbar.
    wbar = setup.wbar**2 if curvature == "empirical" else factors.mean_weight
    assert factors.mean_weight == pytest.approx(setup.wbar, rel=1e-12)
    for name, want in expected.items():
        got = factors.layers[f"model.{name}"]
        torch.testing.assert_close(got.covariance_in(), want.A, **TIGHT)
        torch.testing.assert_close(got.covariance_out() / wbar, want.S, **TIGHT)
        torch.testing.assert_close(got.second_moment() / wbar, moments[name].Lambda, **TIGHT)
        for q, covariance in ((got.basis.q_in, got.covariance_in()), (got.basis.q_out, got.covariance_out())):
            torch.testing.assert_close(q.mT @ q, torch.eye(q.shape[-1]).expand_as(q).to(q), **TIGHT)
            rotated = q.mT @ covariance @ q
            torch.testing.assert_close(rotated, torch.diag_embed(rotated.diagonal(dim1=-2, dim2=-1)), **TIGHT)


@pytest.mark.parametrize("name", sorted(CASES))
def test_exact_factors(name):
    setup = Setup.of(name)
    check(setup, setup.run(CovariancePass(setup.plan, fisher="exact")), "exact")


@pytest.mark.grid
@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("name", SOME)
def test_exact_factors_of_other_reductions(name, reduction):
    setup = Setup.of(name, reduction)
    check(setup, setup.run(CovariancePass(setup.plan, fisher="exact")), "exact")


@pytest.mark.grid
@pytest.mark.parametrize(("fisher", "draws"), [("mixed", 1), ("mixed", 3), ("sampled", 2)])
@pytest.mark.parametrize("name", sorted(CASES))
def test_random_factors_are_those_of_the_seeds_drawn(name, fisher, draws):
    setup = Setup.of(name)
    pass_ = setup.run(CovariancePass(setup.plan, fisher=fisher, seed=11, draws=draws))
    first, second = (drawn_seeds(setup, 5, 11, draws, purpose, fisher) for purpose in (0, 1))
    check(setup, pass_, "sampled", first, second)


def test_the_second_draw_is_independent_of_the_first():
    setup = Setup.of("mlp_gelu")
    first, second = (drawn_seeds(setup, 5, 11, 400, purpose, "sampled").flatten(2) for purpose in (0, 1))
    correlation = (first * second).mean() / (first.square().mean() * second.square().mean()).sqrt()
    # 12 examples x 400 draws of a few outputs: five standard deviations are below 5 / sqrt(4800).
    assert correlation.abs() < 0.08


@pytest.mark.grid
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("name", SOME)
def test_empirical_factors(name, reduction):
    setup = Setup.of(name, reduction)
    check(setup, setup.run(CovariancePass(setup.plan, fisher="empirical")), "empirical")


@pytest.mark.grid
@pytest.mark.parametrize("batch_size", [1, 7, 12])
@pytest.mark.parametrize("name", SOME)
def test_batches_do_not_matter(name, batch_size):
    setup = Setup.of(name)
    check(setup, setup.run(CovariancePass(setup.plan, fisher="exact"), batch_size), "exact")


@pytest.mark.grid
@pytest.mark.parametrize("fisher", ["mixed", "sampled", "exact", "empirical"])
@pytest.mark.parametrize("name", SOME)
def test_a_second_pass_gives_the_squares_that_the_cache_gave(name, fisher):
    setup = Setup.of(name)
    cached = setup.run(CovariancePass(setup.plan, fisher=fisher, seed=3, draws=2)).factors
    first = setup.run(CovariancePass(setup.plan, fisher=fisher, seed=3, draws=2, cache_bytes=0))
    assert first.cache is None
    assert not first.factors.has_squares
    second = setup.run(SquaresPass(setup.plan, first.factors, seed=3, draws=2)).factors
    assert second.has_squares
    assert cached.has_squares
    for layer, expected in cached.layers.items():
        got = second.layers[layer]
        assert torch.equal(got.basis.q_in, expected.basis.q_in)
        torch.testing.assert_close(got.squares, expected.squares, **TIGHT)
        assert got.squares_examples == expected.squares_examples == 12
    again = setup.run(SquaresPass(setup.plan, second, seed=3, draws=2)).factors  # replaced, not added
    torch.testing.assert_close(again.layers[layer].squares, expected.squares, **TIGHT)


def test_draws_depend_on_seed_and_batch_and_not_on_the_global_state():
    setup = Setup.of("mlp_gelu")
    outputs, batches = [], [(setup.case.x, setup.case.y)]  # a DataLoader would draw a seed of its own
    for seed in (1, 1, 2):
        before = torch.get_rng_state()
        pass_ = run(CovariancePass(setup.plan, seed=seed), setup.module, batches)
        outputs.append(pass_.factors.layers["model.0"].outputs)
        assert torch.equal(torch.get_rng_state(), before)
        torch.rand(3)
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])
    draws = {
        torch.rand(1, generator=draw_generator(seed, batch)).item() for seed in range(4) for batch in range(4)
    }
    assert len(draws) == 16


@pytest.mark.slow
@pytest.mark.parametrize("fisher", ["mixed", "sampled"])
def test_random_curvature_approaches_the_exact_one(fisher):
    setup = Setup.of("mlp_gelu")
    exact = setup.run(CovariancePass(setup.plan, fisher="exact")).factors
    sums = []
    for seed in range(150):
        factors = setup.run(CovariancePass(setup.plan, fisher=fisher, seed=seed)).factors
        sums.append({name: layer.covariance_out() for name, layer in factors.layers.items()})
    for name, layer in exact.layers.items():
        errors = torch.stack([some[name] for some in sums]) - layer.covariance_out()
        norm = layer.covariance_out().norm()
        assert errors.flatten(1).norm(dim=1).mean() > 0.01 * norm  # it is an estimate
        # Unbiased: the error of the mean of 150 is about 1 / sqrt(150) of a single one's.
        assert errors.mean(0).norm() < 2 * errors.flatten(1).norm(dim=1).square().mean().sqrt() / 150**0.5


@pytest.mark.slow
def test_a_mixture_varies_less_than_a_drawn_label_where_the_model_is_sure():
    setup = Setup.of("mlp_gelu")
    with torch.no_grad():
        for parameter in setup.module.model[-1].parameters():
            parameter.mul_(8.0)
    exact = setup.run(CovariancePass(setup.plan, fisher="exact")).factors
    spread = {}
    for fisher in ("mixed", "sampled"):
        errors = []
        for seed in range(60):
            factors = setup.run(CovariancePass(setup.plan, fisher=fisher, seed=seed)).factors
            errors += [
                float((factors.layers[name].covariance_out() - layer.covariance_out()).norm())
                for name, layer in exact.layers.items()
            ]
        spread[fisher] = sum(errors)
    assert spread["mixed"] < 0.7 * spread["sampled"]


def test_non_finite_gradients_leave_the_sums_as_they_were():
    setup = Setup.of("mlp_relu_inplace_weighted")
    pass_ = setup.run(CovariancePass(setup.plan, fisher="exact"))
    before = pass_.factors.layers["model.0"].inputs.clone()
    x = torch.full_like(setup.case.x, float("inf"))
    with pytest.raises(NonFiniteError):
        run(pass_, setup.module, [(x, setup.case.y)])
    assert torch.equal(pass_.factors.layers["model.0"].inputs, before)


def test_too_many_columns_are_refused_before_they_are_formed(monkeypatch):
    setup = Setup.of("mlp_gelu")
    monkeypatch.setattr("lightning_influence.model.captured.MAX_COLUMNS", 2)
    with pytest.raises(UnsupportedModelError, match=r"one backward pass for each of the \d+ outputs"):
        setup.run(CovariancePass(setup.plan, fisher="exact"))


def test_a_cache_that_will_not_fit_is_given_up_on_the_first_batch():
    setup = Setup.of("mlp_gelu")
    batches = [(setup.case.x[:4], setup.case.y[:4])]
    for expected, fits in ((8, True), (400, False)):
        pass_ = CovariancePass(setup.plan, cache_bytes=10_000, num_examples=expected)
        pass_.step(setup.module, batches[0], torch.arange(4), 0)
        assert (pass_.cache is not None) == fits, expected
