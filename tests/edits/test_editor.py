"""Every step of a relabelling, against dense matrices from ``torch.func`` in float64 and the definitions."""

import pytest
import torch
from influence_cases import quiet
from models import CASES, loader
from reference import EDITED, Dense, flat
from torch.func import functional_call, grad, jacrev

from lightning_influence import InfluenceModule

DAMPING, DECAY, RATIO = 0.1, 0.01, 0.4
NEW = [2, 0, 1]
EXACT = {
    "tolerance": 1e-13,
    "max_steps": 3000,
    "curvature_examples": None,
    "weight_decay": DECAY,
    "damping": DAMPING,
    "ratio": RATIO,
    "rule": "random",
}


class Reference:
    """The relabelled objective of the case "mlp_gelu" as a function of the flat parameters."""

    def __init__(self):
        self.case = case = CASES["mlp_gelu"]
        self.targets = case.y.clone()
        self.targets[EDITED] = torch.tensor(NEW)
        self.theta = Dense.of("mlp_gelu").theta
        self.edited = torch.zeros(len(case.x), dtype=torch.bool)
        self.edited[EDITED] = True
        self.share = len(EDITED) / len(case.x)

    def outputs(self, theta, x):
        named, start = {}, 0
        for name in self.case.layers:
            rows, columns = self.case.model.get_submodule(name).weight.shape
            matrix = theta[start : start + rows * (columns + 1)].view(rows, columns + 1)
            named |= {f"{name}.weight": matrix[:, :-1], f"{name}.bias": matrix[:, -1]}
            start += matrix.numel()
        return functional_call(self.case.model.eval(), named, (x,))

    def loss(self, theta, which, y):
        return torch.nn.functional.cross_entropy(self.outputs(theta, self.case.x[which]), y[which])

    def objective(self, theta):
        everything = torch.ones_like(self.edited)
        return self.loss(theta, everything, self.targets) + DECAY / 2 * theta @ theta

    def gradient(self, theta):
        return grad(self.objective)(theta)

    def curvature(self, theta, temperature, share):
        """The mean over all examples of ``J^T B J``, from the leading part of a softened ``B``."""
        J = jacrev(lambda t: self.outputs(t, self.case.x))(theta)  # (N, C, P)
        p = (self.outputs(theta, self.case.x) / temperature).softmax(1)
        H = DECAY * torch.eye(len(theta), dtype=theta.dtype)
        for J_n, p_n in zip(J, p, strict=True):
            values, vectors = torch.linalg.eigh(torch.diag(p_n) - torch.outer(p_n, p_n))
            values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
            rank = int((values.cumsum(0) - values < share * values.sum()).sum())
            B = vectors[:, :rank] @ torch.diag(values[:rank]) @ vectors[:, :rank].T
            H += J_n.T @ (B * values.sum() / values[:rank].sum()) @ J_n / len(p)
        return H


def generalized(H, g, mask):
    full = torch.zeros_like(g)
    normal = (H @ H + DAMPING**2 * torch.eye(len(g), dtype=g.dtype))[mask][:, mask]
    full[mask] = torch.linalg.solve(normal, (H @ g)[mask])
    return full


def within(H, g, mask):
    full = torch.zeros_like(g)
    damped = H + DAMPING * torch.eye(len(g), dtype=g.dtype)
    full[mask] = torch.linalg.solve(damped[mask][:, mask], g[mask])
    return full


def bfgs(diagonal, pairs):
    step, change = pairs[-1]
    H = torch.diag(diagonal) * (step @ change) / (change @ (diagonal * change))
    for s, y in pairs:
        left = torch.eye(len(s), dtype=s.dtype) - torch.outer(s, y) / (s @ y)
        H = left @ H @ left.T + torch.outer(s, s) / (s @ y)
    return H


def asked(reference, **options):
    dense = Dense.of("mlp_gelu")
    with quiet():
        edit = dense.asked().relabel(EDITED, NEW, loader(reference.case, 5), **{**EXACT, **options})
    return edit, *changed(edit, reference.case)


def changed(edit, case):
    """The change of an edit and the parameters that it may change, as flat vectors."""
    deltas, masks = ({n: torch.zeros_like(p) for n, p in edit.model.named_parameters()} for _ in range(2))
    for name, change in edit.changes.items():
        deltas[name].view(-1)[change.index] = change.after - change.before
        masks[name].view(-1)[change.index] = 1.0
    return flat(deltas, case), flat(masks, case) > 0


@pytest.mark.parametrize(
    ("rule", "count"), [("gain", 2), ("gain", 3), ("gain", 4), ("gain", 6), ("random", 2), ("random", 4)]
)
def test_every_quasi_newton_step_is_that_of_the_dense_matrix(rule, count):
    """With the random rule the first direction leads uphill, and the descent starts where the model is."""
    reference = Reference()
    theta = reference.theta
    edit, found, mask = asked(reference, linearisations=count, rule=rule)
    assert (edit.report.step[0] == 0) == (rule == "random")
    assert len(edit.report.step) == count
    assert edit.report.descended
    # Generalized influence first, from the curvature of softened outputs.
    H = reference.curvature(theta, 3.0, 0.9)
    point = theta + edit.report.step[0] * generalized(H, -reference.gradient(theta), mask)
    signs = torch.randint(0, 2, (16, len(theta)), generator=torch.Generator().manual_seed(0)).double() * 2 - 1
    diagonal = 1 / ((signs @ H).square().mean(0).sqrt() + DAMPING)
    points = [theta, point]
    for length in edit.report.step[1:]:
        gradients = [reference.gradient(p)[mask] for p in points]
        pairs = [
            ((points[k + 1] - points[k])[mask], gradients[k + 1] - gradients[k])
            for k in range(len(points) - 1)
        ]
        pairs = [pair for pair in pairs if pair[0] @ pair[1] > 0]
        inverse = bfgs(diagonal[mask], pairs) if pairs else torch.diag(diagonal[mask])
        direction = -inverse @ gradients[-1]
        step = torch.zeros_like(theta)
        step[mask] = length * direction
        before, after = reference.objective(points[-1]), reference.objective(points[-1] + step)
        assert after <= before + 1e-4 * length * gradients[-1] @ direction
        points.append(points[-1] + step)
    torch.testing.assert_close(found, points[-1] - theta, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("forgets", [False, True])
def test_the_gain_counts_the_ridge_of_a_relabelling(forgets):
    """The parameters that lower ``||H x - g||^2 + r ||x||^2`` most one by one, with r = 0 to forget."""
    reference, dense = Reference(), Dense.of("mlp_gelu", DECAY)
    theta = reference.theta
    if forgets:
        options = {**EXACT, "rule": "gain"}
        with quiet():
            edit = dense.asked().forget(EDITED, loader(reference.case, 5), **options)
        H, g = dense.curvature(~dense.edited), dense.gradient
        _, mask = changed(edit, reference.case)
    else:
        _, _, mask = asked(reference, rule="gain", linearisations=2)
        H, g = reference.curvature(theta, 3.0, 0.9), -reference.gradient(theta)
    signs = torch.randint(0, 2, (16, len(theta)), generator=torch.Generator().manual_seed(0)).double() * 2 - 1
    gain = (H @ g).square() / ((signs @ H).square().mean(0) + (0.0 if forgets else DAMPING**2))
    sizes = [reference.case.model.get_submodule(name).weight.shape for name in reference.case.layers]
    expected = []
    for part in torch.split(gain, [rows * (columns + 1) for rows, columns in sizes]):
        chosen = torch.zeros(len(part), dtype=torch.bool)
        chosen[part.argsort(descending=True)[: round(RATIO * len(part))]] = True
        expected.append(chosen)
    assert torch.equal(mask, torch.cat(expected))


def test_one_shot_is_a_multiple_of_generalized_influence():
    reference = Reference()
    edit, found, mask = asked(reference, linearisations=1, rule="gain")
    H = reference.curvature(reference.theta, 1.0, 1.0)
    unit = generalized(H, -reference.gradient(reference.theta), mask)
    torch.testing.assert_close(found, edit.report.step[0] * unit, rtol=1e-5, atol=1e-8)
    lower = reference.objective(reference.theta + found)
    assert lower < reference.objective(reference.theta)
    for factor in (0.5, 2.0):
        assert lower < reference.objective(reference.theta + factor * found)


@pytest.mark.grid
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("method", ["gif", "fif"])
def test_given_steps_are_linearised_anew_each_time(method, count):
    """GIF for a model at its optimum; then Gauss-Newton within the selection at the measured gradient."""
    reference = Reference()
    theta, case = reference.theta, reference.case
    edit, found, mask = asked(reference, linearisations=count, step=0.5, method=method)
    assert edit.report.step == [0.5] * count
    assert not edit.report.descended
    old, new = (grad(reference.loss)(theta, reference.edited, y) for y in (case.y, reference.targets))
    solve = generalized if method == "gif" else within
    point = theta + 0.5 * reference.share * solve(reference.curvature(theta, 1.0, 1.0), old - new, mask)
    for _ in range(count - 1):
        point = point - 0.5 * within(reference.curvature(point, 1.0, 1.0), reference.gradient(point), mask)
    torch.testing.assert_close(found, point - theta, rtol=1e-5, atol=1e-8)


@pytest.mark.slow
def test_the_sample_of_kept_examples_stands_for_all(monkeypatch):
    """With no limit nothing is estimated; with 16 of 40 kept examples the edit does the same on average."""
    from edit_models import accuracy, blobs, fitted, of_class, train

    from lightning_influence.edits import start

    source = fitted()
    with quiet():
        whole = InfluenceModule(source).relabel(of_class(2), 0, train(), ratio=0.3, curvature_examples=None)
        monkeypatch.setattr(start, "OBJECTIVE_EXAMPLES", 16)
        parts = [
            InfluenceModule(source).relabel(
                of_class(2), 0, train(), ratio=0.3, curvature_examples=16, seed=seed
            )
            for seed in range(6)
        ]
    fresh = blobs(300, seed=5)
    lowest = []
    for edit in (whole, *parts):
        with edit:
            assert accuracy(source, 2, fresh) < 0.05
            lowest.append(min(accuracy(source, label, fresh) for label in (0, 1)))
    assert lowest[0] > 0.9
    assert sum(lowest[1:]) / len(parts) > 0.9
