"""Directions of edits through the public call, against dense inverses in float64."""

import oracle
import pytest
import torch
from influence_cases import quiet
from models import CASES, lightning_module, loader
from reference import CLOSE, EDITED, EXACTLY, Dense, flat, flat_mask

from lightning_influence import InfluenceModule
from lightning_influence.edits.directions import Problem, find_direction
from lightning_influence.support.errors import InfluenceError

SOME = [
    "linear_mse",
    "mlp_gelu",
    "mlp_relu_inplace_weighted",
    "mlp_bce",
    "shared_linear",
    "tokens_weighted",
    "conv2d_reflect_groups",
    "conv2d_batchnorm",
]
METHODS = ["gif", "fif", "pif", "if", "second_order"]


def ask(dense, **options):
    """The predicted change and the selection of the same call."""
    module, train = dense.asked(), dense.loader()
    with quiet():
        selection = module.select_parameters(EDITED, train, **{**EXACTLY, **options})
        change = module.generalized_influence(EDITED, train, **{**EXACTLY, **options})
    return flat(change, dense.case), flat_mask(selection)


@pytest.mark.grid
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", SOME)
def test_every_method_is_its_definition(name, method):
    dense = Dense.of(name)
    change, mask = ask(dense, method=method, ratio=0.3, rule="highest_gradients", damping=0.2)
    expected = dense.scale * dense.vector(method, mask, 0.2)
    torch.testing.assert_close(change, expected, **CLOSE)
    assert change.norm() > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "method"),
    [*(("mlp_gelu", method) for method in METHODS), ("tokens_weighted", "gif"), ("conv2d", "gif")],
)
def test_exact_hessian_is_served_although_it_is_indefinite(name, method):
    dense = Dense.of(name)
    H = dense.curvature(~dense.edited, "hessian")
    assert torch.linalg.eigvalsh(H)[0] < -1e-3
    # No eigenvalue of the damped matrices is near zero, so that the solution is well determined.
    change, mask = ask(dense, method=method, ratio=0.3, rule="random", damping=0.7, curvature="hessian")
    expected = dense.scale * dense.vector(method, mask, 0.7, "hessian")
    torch.testing.assert_close(change, expected, rtol=1e-4, atol=1e-7)


@pytest.mark.grid
@pytest.mark.parametrize("solver", ["dense", "lissa"])
@pytest.mark.parametrize("name", ["mlp_gelu", "conv2d_reflect_groups"])
def test_other_solvers(name, solver):
    dense = Dense.of(name)
    options = {**EXACTLY, "tolerance": 1e-10, "max_steps": 20_000}
    change, mask = ask(dense, **{**options, "solver": solver, "ratio": 0.3, "damping": 0.3})
    torch.testing.assert_close(change, dense.scale * dense.vector("gif", mask, 0.3), rtol=1e-4, atol=1e-8)


@pytest.mark.grid
@pytest.mark.parametrize("decay", [0.0, 0.05])
@pytest.mark.parametrize("name", ["linear_mse", "deep_linear_mse"])
def test_generalized_influence_of_everything_is_influence(name, decay):
    """METHODS: exact when S is everything and H invertible; weight decay makes the deep one so."""
    if name == "deep_linear_mse" and not decay:
        decay = 0.02
    options = {"ratio": 1.0, "damping": 0.0, "weight_decay": decay}
    dense = Dense.of(name, decay)
    whole, mask = ask(dense, method="gif", **options)
    assert mask.all()
    torch.testing.assert_close(whole, ask(dense, method="if", **options)[0], rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(whole, dense.scale * dense.vector("if", mask, 0.0), rtol=1e-4, atol=1e-7)


def optimum(case, which, decay, y=None):
    """The parameters that minimise a quadratic objective, by one Newton step from the case's own."""
    dense = Dense(case, decay)
    eye = torch.eye(len(dense.theta), dtype=torch.float64)
    targets = case.y if y is None else y
    H = oracle.hessian(case.model, case.loss, case.x[which], targets[which], case.layers) + decay * eye
    gradient = dense.mean_gradient(which, targets) + decay * dense.theta
    return dense.theta - torch.linalg.solve(H, gradient)


def trained(case, decay):
    """A module at the optimum of its objective on all examples."""
    everything = torch.ones(len(case.x), dtype=torch.bool)
    module = lightning_module(case)
    rows = optimum(case, everything, decay).view(case.model[0].weight.shape[0], -1)
    with torch.no_grad():
        module.model[0].weight.copy_(rows[:, :-1])
        module.model[0].bias.copy_(rows[:, -1])
    return module


def parameters_of(module):
    layer = module.model[0]
    return torch.cat([layer.weight.detach(), layer.bias.detach()[:, None]], dim=1).reshape(-1)


@pytest.mark.grid
@pytest.mark.parametrize("method", ["gif", "if", "fif", "pif"])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_on_a_quadratic_objective_forgetting_is_retraining(method, decay):
    case = CASES["linear_mse"]
    module, kept = trained(case, decay), torch.ones(len(case.x), dtype=torch.bool)
    kept[EDITED] = False
    options = {**EXACTLY, "ratio": 1.0, "damping": 0.0, "weight_decay": decay, "step": "theory"}
    with quiet():
        edit = InfluenceModule(module).forget(EDITED, loader(case, 5), method=method, **options)
    with edit:
        torch.testing.assert_close(parameters_of(module), optimum(case, kept, decay), rtol=1e-6, atol=1e-8)
    # The predicted changes of the losses are exact too: the losses are quadratic.
    report = edit.report
    assert report.edited.observed == pytest.approx(report.edited.predicted, rel=1e-6)
    assert report.kept.observed == pytest.approx(report.kept.predicted, rel=1e-6)


@pytest.mark.grid
@pytest.mark.parametrize("linearisations", [1, 3])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_on_a_quadratic_objective_relabelling_is_retraining(decay, linearisations):
    case = CASES["linear_mse"]
    module, everything = trained(case, decay), torch.ones(len(case.x), dtype=torch.bool)
    targets = case.y.clone()
    targets[EDITED] += torch.arange(9, dtype=torch.float64).view(3, 3)
    options = {**EXACTLY, "ratio": 1.0, "damping": 0.0, "weight_decay": decay}
    order = [2, 0, 1]  # targets go with their examples, in whatever order these are named
    examples, new = [EDITED[i] for i in order], targets[[EDITED[i] for i in order]]
    # The second linearisation finds nothing left to do.
    step = "theory" if linearisations == 1 else 1.0
    with quiet():
        edit = InfluenceModule(module).relabel(
            examples, new, loader(case, 5, shuffle=True), step=step, linearisations=linearisations, **options
        )
    with edit:
        expected = optimum(case, everything, decay, targets)
        torch.testing.assert_close(parameters_of(module), expected, rtol=1e-6, atol=1e-8)
    if linearisations == 1:
        report = edit.report
        assert report.edited.observed == pytest.approx(report.edited.predicted, rel=1e-5)
        assert report.kept.observed == pytest.approx(report.kept.predicted, rel=1e-5)


def test_second_order_is_second_order_in_the_share():
    """On quadratic objectives the error of the first order is O(p^2), that of the second O(p^3)."""
    generator = torch.Generator().manual_seed(0)
    halves = [torch.randn(6, 6, generator=generator, dtype=torch.float64) for _ in range(2)]
    kept, removed = (half @ half.T / 6 + torch.eye(6, dtype=torch.float64) for half in halves)
    g = torch.randn(6, generator=generator, dtype=torch.float64)
    errors = []
    for p in (0.02, 0.01):
        # Fixed before the removal: the remaining curvature follows from it.
        before = (kept + removed) / 2
        after = (before - p * removed) / (1 - p)
        problem = Problem(
            product=lambda v, H=after: v @ H,
            edited_product=lambda v: v @ removed,
            gradient=g,
            image=after @ g,
            share=p,
            mask=torch.ones(6, dtype=torch.bool),
            squared_norms=(after @ after).diagonal(),
            damping=0.0,
            tolerance=1e-14,
            max_steps=100,
        )
        exact = p / (1 - p) * torch.linalg.solve(after, g)
        found = p / (1 - p) * find_direction("second_order").function(problem).vector
        first = p / (1 - p) * torch.linalg.solve(before, g)
        errors.append((float((first - exact).norm()), float((found - exact).norm())))
    assert errors[0][0] / errors[1][0] == pytest.approx(4, rel=0.1)
    assert errors[0][1] / errors[1][1] == pytest.approx(8, rel=0.1)


def test_second_order_refuses_to_relabel():
    case = CASES["mlp_gelu"]
    with pytest.raises(InfluenceError, match=r"second_order.*removal.*relabelling"):
        Dense.of("mlp_gelu").asked().relabel([0], (case.y[0] + 1) % 3, loader(case, 5), method="second_order")


@pytest.mark.parametrize("name", ["mlp_gelu", "conv2d_reflect_groups", "tokens_weighted"])
def test_channel_scores_are_means_of_what_hooks_see(name):
    """The rules' scores, from the layers' outputs and their gradients in a plain backward pass."""
    dense = Dense.of(name)
    case = dense.case
    seen = {}

    def hook(layer_name):
        def keep(module, args, out):
            out.retain_grad()
            seen[layer_name] = out

        return keep

    model = lightning_module(case).model.eval()
    handles = [model.get_submodule(n).register_forward_hook(hook(n)) for n in case.layers]
    outputs = model(case.x[dense.edited])
    sum(case.loss.example_loss(o, t) for o, t in zip(outputs, case.y[dense.edited], strict=True)).backward()
    for handle in handles:
        handle.remove()
    for source, values in (("outputs", lambda t: t.detach()), ("gradients", lambda t: t.grad)):
        with quiet():
            rule = f"highest_{source}"
            selection = dense.asked().select_parameters(EDITED, dense.loader(), rule=rule, ratio=0.4)
        for layer_name in case.layers:
            tensor = values(seen[layer_name])
            linear = isinstance(model.get_submodule(layer_name), torch.nn.Linear)
            rows = tensor.flatten(0, -2) if linear else tensor.movedim(1, -1).flatten(0, -2)
            scores = rows.mean(0).abs()
            mask = selection.masks[f"model.{layer_name}"].flatten(0, 1)
            count = int(mask.sum())
            whole, rest = divmod(count, mask.shape[1])
            order = scores.argsort(descending=True).tolist()
            taken = mask.sum(1).tolist()
            assert all(taken[row] == mask.shape[1] for row in order[:whole])
            assert sum(taken) == whole * mask.shape[1] + rest
            if rest:
                assert taken[order[whole]] == rest
