"""The oracle checked against independent identities, PyTorch's own kernels and finite differences.

Tolerances: 1e-10 where two float64 computations of the same number are compared (sums of some thousand
terms of size about 1); finite differences state their own.
"""

from __future__ import annotations

import copy

import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning import Trainer
from models import CASES, Case, lightning_module, loader
from torch import Tensor, nn
from torch.nn import functional as F

torch.set_num_threads(1)
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
every_curvature = pytest.mark.parametrize("curvature", ["exact", "sampled", "empirical"])
quickly = settings(deadline=None, max_examples=25)


def close(actual: Tensor, expected: Tensor, atol: float = 1e-10) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=atol)


def arguments(case: Case) -> tuple:
    return case.model, case.loss, case.x, case.y, case.layers


def draws(case: Case, count: int = 2) -> Tensor:
    """Seeds of no particular distribution: what holds for given gradients holds for any."""
    shape = (count, *case.model(case.x).shape)
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def factors(case: Case, curvature: oracle.Curvature) -> dict[str, oracle.LayerFactors]:
    seeds = draws(case) if curvature == "sampled" else None
    return oracle.layer_factors(*arguments(case), curvature, seeds)


def objective_gradient(case: Case, theta: Tensor) -> Tensor:
    """Gradient of the user's own mean loss by backward, in the flat order, at the parameters `theta`."""
    model = copy.deepcopy(case.model)
    with torch.no_grad():
        for name, matrix in oracle.unflatten(theta, model, case.layers).items():
            if name in dict(model.named_parameters()):
                model.get_parameter(name).copy_(matrix.reshape(model.get_parameter(name).shape))
                continue
            layer, rows = model.get_submodule(name), matrix.flatten(0, 1)
            layer.weight.copy_(rows[:, : layer.weight[0].numel()].reshape(layer.weight.shape))
            if layer.bias is not None:
                layer.bias.copy_(rows[:, -1])
    case.torch_loss(model(case.x), case.y).backward()
    parts = []
    for name in case.layers:
        if name in dict(model.named_parameters()):
            parts.append(model.get_parameter(name).grad.reshape(-1))
            continue
        layer = model.get_submodule(name)
        bias = [] if layer.bias is None else [layer.bias.grad[:, None]]
        parts.append(torch.cat([layer.weight.grad.flatten(1), *bias], dim=1).reshape(-1))
    return torch.cat(parts)


# ------------------------------------------------------------------------------------------------- losses


@every_case
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_average_of_example_losses_is_torchs_loss(case: Case, reduction: oracle.Reduction) -> None:
    loss, outputs = case.with_reduction(reduction).loss, case.model(case.x)
    values = [loss.example_loss(o, t) for o, t in zip(outputs, case.y, strict=True)]
    average = torch.stack(values).mean() / loss.normaliser(case.y)
    expected = case.torch_loss(outputs, case.y, reduction=reduction)
    close(average, expected / len(case.x) if reduction == "sum" else expected.mean())


@quickly
@given(
    classes=st.integers(2, 5),
    smoothing=st.sampled_from([0.0, 0.3]),
    weighted=st.booleans(),
    ignore=st.sampled_from([-100, 0, 1]),
    spatial=st.sampled_from([(), (3,), (2, 2)]),
    seed=st.integers(0, 10**6),
)
def test_cross_entropy_of_one_example_is_torchs(classes, smoothing, weighted, ignore, spatial, seed) -> None:
    generator = torch.Generator().manual_seed(seed)
    outputs = torch.randn(classes, *spatial, dtype=torch.float64, generator=generator) * 3
    labels = torch.randint(classes, spatial, generator=generator)
    soft = torch.rand(classes, *spatial, dtype=torch.float64, generator=generator)
    weight = torch.rand(classes, dtype=torch.float64, generator=generator) + 0.1 if weighted else None
    loss = oracle.CrossEntropy(weight, smoothing, ignore)
    for target in (labels, soft):
        options = {"weight": weight, "label_smoothing": smoothing, "ignore_index": ignore}
        options |= {} if target is labels else {"ignore_index": -100}
        expected = F.cross_entropy(outputs[None], target[None], reduction="sum", **options)
        close(loss.example_loss(outputs, target), expected)
        last = oracle.CrossEntropy(weight, smoothing, ignore, class_dim=-1)
        moved = target if target is labels else target.movedim(0, -1)
        close(last.example_loss(outputs.movedim(0, -1), moved), expected)


@quickly
@given(seed=st.integers(0, 10**6), classes=st.integers(2, 6))
def test_margin_is_the_log_odds_of_the_true_label(seed, classes) -> None:
    generator = torch.Generator().manual_seed(seed)
    outputs = torch.randn(classes, 3, dtype=torch.float64, generator=generator)
    labels = torch.tensor([0, -100, classes - 1])
    p = outputs.softmax(0)[labels.clamp(min=0), torch.arange(3)][[0, 2]]
    loss = oracle.CrossEntropy()
    close(loss.margin(outputs, labels), torch.logit(p).sum())
    close(loss.logit(outputs, labels), outputs[0, 0] + outputs[-1, 2])


def test_binary_margin_is_the_log_odds_of_the_true_labels() -> None:
    outputs, labels = torch.tensor([1.5, -0.3]).double(), torch.tensor([1.0, 0.0]).double()
    p = torch.sigmoid(outputs)
    loss = oracle.BinaryCrossEntropy()
    close(loss.margin(outputs, labels), torch.logit(p[0]) + torch.logit(1 - p[1]))


@every_case
def test_output_hessian_is_positive_and_its_root_reproduces_it(case: Case) -> None:
    H = oracle.output_hessians(*arguments(case)[:4])
    B = oracle.output_seeds(*arguments(case)[:4], "exact")
    close(B.mT @ B, H)


def test_closed_forms_of_the_output_hessian() -> None:
    ce, mse, bce = CASES["mlp_relu_inplace_weighted"], CASES["mlp_mse"], CASES["mlp_bce"]
    p = ce.model(ce.x).softmax(1)
    w = ce.loss.weight[ce.y]
    expected = w[:, None, None] * (torch.diag_embed(p) - p[:, :, None] * p[:, None]) / w.mean()
    close(oracle.output_hessians(*arguments(ce)[:4]), expected)
    close(oracle.output_hessians(*arguments(mse)[:4]), (2 / 3 * torch.eye(3).double()).expand(12, 3, 3))
    p = torch.sigmoid(bce.model(bce.x))
    scale = bce.loss.weight * (bce.loss.pos_weight * bce.y + 1 - bce.y) / 3
    close(oracle.output_hessians(*arguments(bce)[:4]), torch.diag_embed(scale * p * (1 - p)))


def test_normaliser_is_the_datasets_mean_weight() -> None:
    assert CASES["mlp_gelu"].loss.normaliser(CASES["mlp_gelu"].y) == 1.0
    tokens = CASES["tokens"]
    # Example i of 12 has its last i mod 3 of 5 positions padded: 4 kept on average.
    assert tokens.loss.normaliser(tokens.y) == 4.0
    assert tokens.with_reduction("none").loss.normaliser(tokens.y) == 5.0
    assert tokens.with_reduction("sum").loss.normaliser(tokens.y) == 1.0


# -------------------------------------------------------------------------------- gradients and matrices


@every_case
def test_mean_of_per_example_gradients_is_the_gradient_of_torchs_loss(case: Case) -> None:
    g = oracle.flatten(oracle.per_example_gradients(*arguments(case)))
    theta = oracle.flat_parameters(case.model, case.layers)
    close(g.mean(0), objective_gradient(case, theta))


@every_case
def test_gradients_factorise_over_positions(case: Case) -> None:
    """Unfolded inputs and shifted outputs give what differentiating in the parameters gives."""
    direct = oracle.per_example_gradients(*arguments(case))
    for name, layer in factors(case, "empirical").items():
        close(layer.gradients[:, 0], direct[name])


@every_case
def test_flat_vector_round_trip(case: Case) -> None:
    theta = oracle.flat_parameters(case.model, case.layers)
    parts = oracle.unflatten(theta, case.model, case.layers)
    close(oracle.flatten({name: part[None] for name, part in parts.items()})[0], theta)


@every_case
def test_hessian_is_the_derivative_of_the_gradient(case: Case) -> None:
    theta = oracle.flat_parameters(case.model, case.layers)
    direction = torch.randn(len(theta), generator=torch.Generator().manual_seed(0)).double()
    direction /= direction.norm()
    h = 1e-5  # error of the central difference: h^2 plus rounding / h, both about 1e-10
    ahead, behind = (objective_gradient(case, theta + s * h * direction) for s in (1, -1))
    close(oracle.hessian(*arguments(case)) @ direction, (ahead - behind) / (2 * h), atol=2e-8)


@pytest.mark.parametrize("name", ["linear", "linear_mse", "linear_conv_groups_mse"])
def test_ggn_is_the_hessian_of_a_linear_model(name: str) -> None:
    close(oracle.ggn(*arguments(CASES[name])), oracle.hessian(*arguments(CASES[name])))


@every_case
def test_ggn_is_the_hessian_after_linearising_the_outputs(case: Case) -> None:
    """The loss of f(theta_0) + J (theta - theta_0) has the Gauss-Newton matrix as its Hessian."""
    outputs, J = case.model(case.x).detach(), oracle.output_jacobians(case.model, case.x, case.layers)

    def objective(shift: Tensor) -> Tensor:
        moved = outputs + (J @ shift).reshape(outputs.shape)
        if case.name == "mlp_nll":  # straight lines leave the log-probabilities: they are read as logits
            moved = moved.log_softmax(1)
        return case.torch_loss(moved, case.y)

    zero = torch.zeros(J.shape[-1], dtype=torch.float64)
    close(oracle.ggn(*arguments(case)), torch.func.hessian(objective)(zero))


def test_log_probabilities_have_the_curvature_of_their_logits() -> None:
    case = CASES["mlp_nll"]
    logits = case.model[:-1]
    close(
        oracle.ggn(*arguments(case)), oracle.ggn(logits, case.loss, case.x, case.y, case.layers), atol=1e-12
    )


@every_case
def test_position_gradients_of_the_exact_curvature_give_the_ggns_blocks(case: Case) -> None:
    blocks = oracle.block_diagonal([f.fisher() for f in factors(case, "exact").values()])
    close(blocks, oracle.keep_blocks(oracle.ggn(*arguments(case)), case.model, case.layers))


@every_case
def test_position_gradients_of_the_training_labels_give_the_empirical_fisher(case: Case) -> None:
    blocks = oracle.block_diagonal([f.fisher() for f in factors(case, "empirical").values()])
    expected = oracle.keep_blocks(oracle.fisher_empirical(*arguments(case)), case.model, case.layers)
    close(blocks, expected)


@pytest.mark.parametrize("name", ["mlp_gelu", "mlp_relu_inplace_weighted", "mlp_softplus_weighted_smoothing"])
def test_sampled_curvature_enumerated_over_labels_is_the_exact_one(name: str) -> None:
    """E over y' ~ p of s s^T with s = sqrt(total weight) (p - onehot(y')), by summing over y'."""
    case = CASES[name]
    p = case.model(case.x).softmax(1).detach()
    classes = p.shape[1]
    total = torch.stack([case.loss._target_rows(t, classes).sum() for t in case.y])
    # One draw for each label, each scaled so that the plain average over draws is the expectation under p.
    residual = p[None] - torch.eye(classes, dtype=torch.float64)[:, None]
    seeds = (classes * p.T * total).sqrt()[..., None] * residual
    sampled = oracle.layer_factors(*arguments(case), "sampled", seeds)
    for layer, exact in factors(case, "exact").items():
        close(sampled[layer].S, exact.S)
        close(sampled[layer].fisher(), exact.fisher())


# ----------------------------------------------------------------------------------------------- positions


@quickly
@given(st.integers(2, 6), st.integers(0, 5), st.integers(0, 5))
def test_padding_reads_what_torch_reads(length, before, after) -> None:
    line = torch.arange(1.0, length + 1)
    for mode in ("constant", "reflect", "replicate", "circular"):
        limit = {"reflect": length - 1, "circular": length}.get(mode, 5)
        b, a = min(before, limit), min(after, limit)
        padded = F.pad(line[None, None], (b, a), mode=mode)[0, 0]
        sources = [oracle.source_index(i, length, mode) for i in range(-b, length + a)]
        assert [0.0 if i is None else line[i].item() for i in sources] == padded.tolist()


@quickly
@given(
    kind=st.sampled_from([nn.Conv1d, nn.Conv2d, nn.Conv3d]),
    data=st.data(),
    mode=st.sampled_from(["zeros", "reflect", "replicate", "circular"]),
    groups=st.sampled_from([1, 2, 4]),
    bias=st.booleans(),
    same=st.booleans(),
)
def test_unfolded_input_times_weights_is_the_convolution(kind, data, mode, groups, bias, same) -> None:
    dims = {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}[kind]
    sizes = st.tuples(*[st.integers(1, 3)] * dims)
    kernel, dilation, stride = data.draw(sizes), data.draw(sizes), data.draw(sizes)
    padding = "same" if same else data.draw(st.tuples(*[st.integers(0, 2)] * dims))
    stride = (1,) * dims if same else stride
    options = {"dilation": dilation, "padding": padding, "padding_mode": mode, "groups": groups, "bias": bias}
    layer = kind(4, 8, kernel, stride=stride, **options).double()
    # A kernel reaches at most 2 * 3 = 6 further: every side of the input holds it without padding.
    a = torch.randn(1, 4, *[9 - d for d in range(dims)], dtype=torch.float64)
    abar = oracle.input_positions(layer, a)
    columns = [layer.weight.flatten(1)] + ([layer.bias[:, None]] if bias else [])
    weights = torch.cat(columns, dim=1).unflatten(0, (groups, 8 // groups))
    expected = oracle.output_positions(layer, layer(a)[None])[0]
    close(torch.einsum("rgi,goi->rgo", abar, weights), expected)
    close(expected.flatten(1).T.reshape(layer(a).shape), layer(a))


def test_calls_of_a_shared_layer_are_all_positions() -> None:
    for name, count in {"shared_linear": 2, "shared_conv": 2 * 6, "tokens": 5, "mlp_gelu": 1}.items():
        case = CASES[name]
        layer = (
            "shared" if name == "shared_linear" else "0.shared" if name == "shared_conv" else case.layers[0]
        )
        abar, ds = oracle.positions(case.model, case.x[0], case.layers)
        assert abar[layer].shape[0] == ds[layer].shape[1] == count


# ------------------------------------------------------------------------------------------ K-FAC and EK-FAC


@pytest.mark.grid
@every_case
@every_curvature
def test_factor_identities(case: Case, curvature: oracle.Curvature) -> None:
    """For the same gradients: diag(Q^T F Q) == Lambda, its sum is the trace, no diagonal is closer."""
    for layer in factors(case, curvature).values():
        F_, Q, Lambda = layer.fisher(), layer.basis(), layer.Lambda.reshape(-1)
        owner = torch.arange(len(layer.Lambda)).repeat_interleave(layer.Lambda[0].numel())
        F_ = torch.where(owner[:, None] == owner, F_, 0)  # groups are approximated one by one
        close(Q.T @ Q, torch.eye(len(Q), dtype=torch.float64))
        close(torch.diagonal(Q.T @ F_ @ Q), Lambda)
        close(layer.Lambda.sum(), F_.trace())
        best = (F_ - layer.ekfac()).norm()
        assert best <= (F_ - layer.kfac()).norm() + 1e-10
        for sign in (0.9, 1.1):
            other = Q @ torch.diag(sign * Lambda) @ Q.T
            # Pythagoras: the distance to another diagonal is the best one's and the change of the diagonal.
            close((F_ - other).norm() ** 2, best**2 + ((1 - sign) * Lambda).norm() ** 2)


@every_case
def test_factors_are_averages_of_their_gradients_and_inputs(case: Case) -> None:
    for layer in factors(case, "exact").values():
        groups, d_out, d_in = layer.Lambda.shape
        close(layer.Q_A @ torch.diag_embed(layer.d_A) @ layer.Q_A.mT, layer.A)
        close(layer.Q_S @ torch.diag_embed(layer.d_S) @ layer.Q_S.mT, layer.S)
        assert layer.A.shape == (groups, d_in, d_in)
        assert layer.S.shape == (groups, d_out, d_out)
        assert layer.gradients.shape[2:] == (groups, d_out, d_in)


@every_case
def test_bias_coordinate_is_one_everywhere(case: Case) -> None:
    for name, layer in factors(case, "exact").items():
        if oracle.find_block(case.model, name).bias is not None:
            close(layer.A[:, -1, -1], torch.ones(len(layer.A), dtype=torch.float64))


@pytest.mark.parametrize("case", [c for c in CASES.values() if c.single_position], ids=repr)
@every_curvature
def test_one_example_with_one_position_is_exact(case: Case, curvature: oracle.Curvature) -> None:
    for layer in factors(case.head(1), curvature).values():
        close(layer.kfac(), layer.fisher())
        close(layer.ekfac(), layer.fisher())


@every_curvature
def test_one_example_with_shared_weights_is_not_exact(curvature: oracle.Curvature) -> None:
    layer = factors(CASES["tokens"].head(1), curvature)["0"]
    assert (layer.kfac() - layer.fisher()).norm() > 1e-3 * layer.fisher().norm()


@pytest.mark.parametrize("name", ["deep_linear_mse", "deep_linear_tokens_mse", "linear_conv_groups_mse"])
def test_kfac_is_the_ggn_block_of_a_linear_network_under_squared_error(name: str) -> None:
    case = CASES[name]
    G = oracle.ggn(*arguments(case))
    kfac = [oracle.kfac_block(*arguments(case)[:4], name) for name in case.layers]
    close(oracle.block_diagonal(kfac), oracle.keep_blocks(G, case.model, case.layers))
    ekfac = [oracle.ekfac_block(*arguments(case)[:4], name) for name in case.layers]
    close(oracle.block_diagonal(ekfac), oracle.keep_blocks(G, case.model, case.layers))


def test_given_bases_are_used() -> None:
    case = CASES["mlp_gelu"]
    own = factors(case, "exact")
    flipped = {name: (f.Q_A.flip(-1), f.Q_S.flip(-1)) for name, f in own.items()}
    other = oracle.layer_factors(*arguments(case), bases=flipped)
    for name, f in own.items():
        close(other[name].Lambda, f.Lambda.flip(-1, -2))
        close(other[name].d_A, f.d_A.flip(-1))
        close(other[name].ekfac(), f.ekfac())


def test_sampled_curvature_needs_seeds() -> None:
    case = CASES["linear"]
    with pytest.raises(ValueError, match="needs seeds of shape"):
        oracle.layer_factors(*arguments(case), "sampled")


# ----------------------------------------------------------------------------------------------- influence


def test_influence_is_the_effect_of_removal_on_a_ridge_regression() -> None:
    """Minimising (1/N) sum_n w_n l_n + (lambda/2) ||theta||^2, scores are minus dm(q)/dw_n at w = 1.

    The minimiser is written in closed form: neither Hessian nor gradients there come from the oracle.
    """
    case, damping = CASES["linear_mse"], 0.3
    x = torch.cat([case.x, torch.ones(12, 1).double()], dim=1)
    query = torch.cat([case.query_x, torch.ones(3, 1).double()], dim=1)

    def fit(w: Tensor) -> Tensor:  # (D_in, D_out); the loss is the mean over 3 outputs
        normal = 2 / 3 * x.T @ (w[:, None] * x) / 12 + damping * torch.eye(5).double()
        return torch.linalg.solve(normal, 2 / 3 * x.T @ (w[:, None] * case.y) / 12)

    def measured(w: Tensor) -> Tensor:
        return (query @ fit(w) - case.query_y).square().mean(1)

    ones = torch.ones(12, dtype=torch.float64)
    model = copy.deepcopy(case.model)
    with torch.no_grad():
        solution = fit(ones).T
        model[0].weight.copy_(solution[:, :-1])
        model[0].bias.copy_(solution[:, -1])
    train = oracle.per_example_gradients(model, case.loss, case.x, case.y, case.layers)
    queries = oracle.measurement_gradients(
        model, case.loss, case.query_x, case.query_y, case.layers, "loss", case.loss.normaliser(case.y)
    )
    G = oracle.ggn(model, case.loss, case.x, case.y, case.layers)
    scores = oracle.influence(G, damping, oracle.flatten(queries), oracle.flatten(train))
    close(scores, -torch.func.jacrev(measured)(ones))


def test_influence_takes_a_damping_for_each_layer() -> None:
    case = CASES["mlp_gelu"]
    g = oracle.flatten(oracle.per_example_gradients(*arguments(case)))
    each = oracle.damping_vector({"0": 0.1, "2": 0.2, "4": 0.7}, case.model, case.layers)
    H = oracle.keep_blocks(oracle.ggn(*arguments(case)), case.model, case.layers)
    expected = torch.zeros(3, 12, dtype=torch.float64)
    for i, value in enumerate((0.1, 0.2, 0.7)):
        own = oracle.layer_of_parameter(case.model, case.layers) == i
        expected += oracle.influence(H[own][:, own], value, g[:3, own], g[:, own])
    close(oracle.influence(H, each, g[:3], g), expected)


@pytest.mark.parametrize("measurement", ["logit", "margin", "loss"])
@pytest.mark.parametrize("name", ["mlp_gelu", "tokens", "mlp_bce", "mlp_nll"])
def test_measurement_gradients_are_those_of_the_measured_value(name: str, measurement: str) -> None:
    case, wbar = CASES[name], 1.7
    function = {"loss": "example_loss"}.get(measurement, measurement)
    scale = wbar if measurement == "loss" else 1.0
    found = oracle.measurement_gradients(
        case.model, case.loss, case.query_x, case.query_y, case.layers, measurement, wbar
    )
    model = copy.deepcopy(case.model)
    for q in range(3):
        model.zero_grad()
        value = getattr(case.loss, function)(model(case.query_x[q : q + 1])[0], case.query_y[q])
        (value / scale).backward()
        for layer in case.layers:
            weight = model.get_submodule(layer).weight.grad
            close(found[layer][q, 0, :, : weight.shape[1]], weight)


# ----------------------------------------------------------------------------------------------- the zoo


@every_case
def test_cases_are_small_float64_and_untouched(case: Case) -> None:
    assert case.num_parameters <= 250
    assert len(case.x) <= 12
    assert len(case.query_x) == len(case.query_y) == 3
    assert all(p.dtype is torch.float64 for p in case.model.parameters())
    before = {k: v.clone() for k, v in case.model.state_dict().items()}
    oracle.layer_factors(*arguments(case.head(2)))
    oracle.hessian(*arguments(case.head(2)))
    assert not any(m.training or m._forward_hooks for m in case.model.modules())
    assert all(p.requires_grad and p.grad is None for p in case.model.parameters())
    for key, value in case.model.state_dict().items():
        assert torch.equal(value, before[key])


# Lightning 2.6 walks its loaders with a torch.utils._pytree idiom that torch 2.13 deprecates.
@pytest.mark.filterwarnings("ignore:.*treespec, LeafSpec.*:FutureWarning")
@pytest.mark.parametrize("reduction", [None, "sum", "none"])
@pytest.mark.parametrize("name", ["tokens_weighted", "mlp_bce", "shared_conv"])
def test_lightning_module_trains_a_copy_on_the_cases_loss(
    name: str, reduction: oracle.Reduction | None
) -> None:
    case = CASES[name]
    module = lightning_module(case, reduction, lr=0.05)
    expected = case.torch_loss(case.model(case.x), case.y, reduction=reduction or "mean").mean()
    before = case.model.get_submodule(case.layers[0]).weight.clone()
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(max_epochs=1, accelerator="cpu", enable_model_summary=False, **quiet)
    trainer.fit(module, loader(case, batch_size=12, shuffle=True))
    torch.testing.assert_close(
        trainer.callback_metrics["train_loss"].double(), expected.detach(), rtol=1e-5, atol=0
    )  # Lightning keeps its metrics in float32
    assert torch.equal(case.model.get_submodule(case.layers[0]).weight, before)
    assert not torch.equal(module.model.get_submodule(case.layers[0]).weight, before)


def test_loader_serves_examples_and_queries_in_order() -> None:
    case = CASES["tokens"]
    for queries, x, y in ((False, case.x, case.y), (True, case.query_x, case.query_y)):
        batches = list(loader(case, 5, queries=queries))
        assert torch.equal(torch.cat([b[0] for b in batches]), x)
        assert torch.equal(torch.cat([b[1] for b in batches]), y)
