"""Complex parameters, and real ones seen as complex: gradients and curvature by their real coordinates."""

from __future__ import annotations

import math

import lightning
import pytest
import torch
from torch import nn
from torch.func import functional_call, jacrev, vmap
from torch.nn import functional

from lightning_influence import InfluenceCallback, InfluenceModule, InfluenceTrainer
from lightning_influence.support.errors import UnsupportedModelError

CLASSES, DAMPING = 3, 0.1


class Net(lightning.LightningModule):
    """Cross-entropy on the outputs of a body, whose parameters are what is tested."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x):
        return self.body(x)

    def training_step(self, batch, batch_idx):
        return functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 1e-2)


class Spectral(nn.Module):
    """A layer of a Fourier neural operator: products with complex weights at the lowest frequencies."""

    def __init__(self, channels: int = 2, modes: int = 2) -> None:
        super().__init__()
        self.lift = nn.Linear(1, channels)
        self.weight = nn.Parameter(draw(channels, channels, modes, modes))
        self.skip = nn.Conv2d(channels, channels, 1)
        self.head = nn.Linear(channels, CLASSES)
        self.modes = modes

    def forward(self, x):
        x = self.lift(x[..., None]).permute(0, 3, 1, 2)
        seen = torch.fft.rfft2(x)
        out = torch.zeros_like(seen)
        m = self.modes
        out[:, :, :m, :m] = torch.einsum("bixy,ioxy->boxy", seen[:, :, :m, :m], self.weight)
        x = torch.tanh(torch.fft.irfft2(out, s=x.shape[-2:]) + self.skip(x))
        return self.head(x.mean((2, 3)))


class Filter(nn.Module):
    """A filter of frequencies."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.head = nn.Linear(6, CLASSES)

    def forward(self, x):
        x = x.flatten(1)[:, :6]
        return self.head(torch.tanh(torch.fft.irfft(torch.fft.rfft(x) * self.read(), n=6)))

    def read(self):
        return self.weight


class Viewed(Filter):
    """A real parameter seen as a complex one."""

    def read(self):
        return torch.view_as_complex(self.weight)


class Parts(Filter):
    """A complex parameter whose parts are used apart."""

    def read(self):
        return torch.complex(self.weight.real.tanh(), self.weight.imag) + self.weight.conj()


class ComplexLinear(nn.Module):
    """A linear layer on complex numbers, with a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 4, dtype=torch.complex128)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x):
        z = self.first(x.flatten(1)[:, :6].to(torch.complex128))
        return self.head(z.abs())


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.complex128, generator=torch.Generator().manual_seed(5))


BODIES = {
    "spectral": Spectral,
    "complex filter": lambda: Filter(draw(4)),
    "real filter": lambda: Filter(draw(4).real.clone()),
    "real numbers seen as complex": lambda: Viewed(torch.view_as_real(draw(4)).clone()),
    "parts of complex numbers": lambda: Parts(draw(4)),
    "complex linear layer": ComplexLinear,
}


def make(name: str) -> Net:
    torch.manual_seed(0)
    kept = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        return Net(BODIES[name]())
    finally:
        torch.set_default_dtype(kept)


def data() -> list:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(9, 4, 6, generator=generator, dtype=torch.float64)
    return [(x[:5], torch.arange(5) % CLASSES), (x[5:], torch.arange(4) % CLASSES)]


def reference(net: Net) -> tuple[torch.Tensor, torch.Tensor]:
    """Return gradients of the examples ``(N, P)`` and the Gauss-Newton matrix, in real coordinates."""
    parameters = dict(net.named_parameters())
    real = {
        n: torch.view_as_real(p.detach()) if p.is_complex() else p.detach() for n, p in parameters.items()
    }
    x, y = (torch.cat(parts) for parts in zip(*data(), strict=True))

    def outputs(values, one):
        own = {n: torch.view_as_complex(v) if parameters[n].is_complex() else v for n, v in values.items()}
        return functional_call(net, own, (one[None],))[0]

    found = [jacrev(outputs)(real, one) for one in x]
    jacobians = torch.stack([torch.cat([v.flatten(1) for v in each.values()], 1) for each in found])
    with torch.no_grad():
        p = torch.stack([outputs(real, one) for one in x]).softmax(1)
    gradients = torch.einsum("nc,ncp->np", p - functional.one_hot(y, CLASSES), jacobians)
    bent = vmap(torch.diag)(p) - p[:, :, None] * p[:, None]
    return gradients, torch.einsum("ncp,ncd,ndq->pq", jacobians, bent, jacobians) / len(x)


@pytest.mark.parametrize("name", BODIES)
def test_every_coordinate_is_covered(name):
    net = make(name)
    gradients, _ = reference(net)
    found = InfluenceModule(net).scores(data(), data(), method="identity")
    assert found.diagnostics.parameters_covered == 1
    assert not found.diagnostics.warnings
    assert sum(found.diagnostics.layers.values()) == gradients.shape[1]
    torch.testing.assert_close(found.scores, gradients @ gradients.T / len(gradients), rtol=1e-9, atol=1e-12)


@pytest.mark.grid
@pytest.mark.parametrize("name", BODIES)
@pytest.mark.parametrize("method", ["exact", "cg"])
def test_scores_are_those_of_the_matrix_over_real_coordinates(name, method):
    net = make(name)
    gradients, matrix = reference(net)
    options = {"damping": DAMPING} | ({"tolerance": 1e-12} if method == "cg" else {})
    found = InfluenceModule(net).scores(data(), data(), method=method, **options)
    expected = gradients @ torch.linalg.solve(matrix + DAMPING * torch.eye(len(matrix)).double(), gradients.T)
    torch.testing.assert_close(found.scores, expected / len(gradients), rtol=1e-6, atol=1e-9)


@pytest.mark.grid
@pytest.mark.parametrize("name", BODIES)
@pytest.mark.parametrize("method", ["ekfac", "kfac", "block_ggn", "auto", "diagonal"])
def test_a_complex_parameter_has_the_exact_block_by_itself(name, method):
    net = make(name)
    gradients, matrix = reference(net)
    chosen = "body.first.weight" if name == "complex linear layer" else "body.weight"
    sizes = {n: p.numel() * (1 + p.is_complex()) for n, p in net.named_parameters()}
    mine = torch.cat([torch.full((size,), n == chosen) for n, size in sizes.items()])
    gradients, matrix = gradients[:, mine], matrix[mine][:, mine]
    matrix = matrix.diag().diag() if method == "diagonal" else matrix
    options = {"layers": [chosen], "damping": DAMPING, "fisher": "exact"}
    asked = InfluenceModule(net)
    found = asked.scores(data(), data(), method=method, **options)
    solved = torch.linalg.solve(matrix + DAMPING * torch.eye(len(matrix)).double(), gradients.T)
    torch.testing.assert_close(found.scores, gradients @ solved / len(gradients), rtol=1e-6, atol=1e-9)
    own = asked.self_influence(data(), method=method, **options)
    expected = (gradients.T * solved).sum(0) / len(gradients)
    torch.testing.assert_close(own.scores, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("method", ["ekfac", "auto", "hessian", "lissa"])
def test_methods_run(method):
    options = {"damping": 1.0} if method == "lissa" else {}
    found = InfluenceModule(make("spectral")).scores(data(), data(), method=method, **options)
    assert found.scores.isfinite().all()
    assert found.diagnostics.parameters_covered == 1


def multiply(z: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return (z.real @ weight.real).tanh() + (z.imag @ weight.imag).sin()


LARGE = {
    "a matrix": ((40, 30), multiply),
    "a vector with as many entries as a table has rows": ((5000,), lambda z, weight: (z * weight).abs()),
    "a tensor": ((2, 2500, 2), lambda z, weight: torch.einsum("bi,cij->bcj", z, weight).flatten(1).abs()),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", LARGE)
def test_large_parameters(kind):
    shape, function = LARGE[kind]

    class Large(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(6, shape[1] if len(shape) > 2 else shape[0])
            self.weight = nn.Parameter(draw(*shape) / 50)
            self.head = nn.LazyLinear(CLASSES)

        def forward(self, x):
            z = self.first(x.flatten(1)[:, :6])
            return self.head(function(torch.complex(z, z.cos()), self.weight))

    torch.manual_seed(0)
    body = Large()
    body.first, body.head = body.first.double(), body.head.double()
    net = Net(body)
    net(data()[0][0])
    x, y = (torch.cat(parts) for parts in zip(*data(), strict=True))
    rows = []
    for n in range(len(x)):
        loss = net.training_step((x[n : n + 1], y[n : n + 1]), 0)
        grads = torch.autograd.grad(loss, list(net.parameters()))
        rows.append(torch.cat([(torch.view_as_real(g) if g.is_complex() else g).flatten() for g in grads]))
    gradients = torch.stack(rows)
    expected = gradients @ gradients.T / len(x)
    found = InfluenceModule(net).scores(data(), data(), method="identity")
    assert found.diagnostics.layers["body.weight"] == 2 * math.prod(shape)
    torch.testing.assert_close(found.scores, expected, rtol=1e-9, atol=1e-12)
    scale = float(expected.abs().max())
    for method in ("diagonal", "ekfac"):  # with much damping they tend to the same
        found = InfluenceModule(net).scores(data(), data(), method=method, damping=1e6)
        torch.testing.assert_close(1e6 * found.scores, expected, rtol=0, atol=1e-4 * scale)


def loader() -> torch.utils.data.DataLoader:
    rows = (torch.cat(parts) for parts in zip(*data(), strict=True))
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*rows), 3)


@pytest.mark.parametrize("method", ["ekfac", "auto"])
def test_a_fit_is_told_the_damping_of_the_coordinates(method, tmp_path):
    """Adam treats a complex parameter as its real coordinates, and so do its answers."""
    found = []
    for name in ("complex filter", "real numbers seen as complex"):
        net = make(name)
        trainer = InfluenceTrainer(
            max_epochs=3, accelerator="cpu", callbacks=[InfluenceCallback(every_n_steps=1)], logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
            default_root_dir=tmp_path,
        )  # fmt: skip
        trainer.fit(net, loader())
        found.append(trainer.influence(net, loader(), loader(), method=method))
    one, other = found
    assert one.diagnostics.damping == pytest.approx(other.diagnostics.damping)
    torch.testing.assert_close(one.scores, other.scores, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("kind", ["forget", "relabel"])
def test_edits(kind, tmp_path):
    """They change entries of complex parameters, and are written, read and taken back to the bit."""
    net = make("complex linear layer")
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    for batch in data() * 30:
        optimizer.zero_grad()
        net.training_step(batch, 0).backward()
        optimizer.step()
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    asked = InfluenceModule(net)
    options = {"layers": ["body.first.*"], "ratio": 1.0}
    if kind == "forget":
        edit = asked.forget([0, 1], loader(), **options)
    else:
        edit = asked.relabel([0, 1], torch.tensor([2, 2]), loader(), **options)
    x, y = data()[0][0][:2], data()[0][1][:2] if kind == "forget" else torch.tensor([2, 2])
    old = functional.cross_entropy(net(x), y)
    edit.apply()
    new = functional.cross_entropy(net(x), y)
    assert new > old if kind == "forget" else new < old
    moved = net.body.first.weight.detach() - before["body.first.weight"]
    assert moved.real.any()
    assert moved.imag.any()
    after = {name: p.detach().clone() for name, p in net.named_parameters()}
    edit.revert()
    assert all(torch.equal(p, before[name]) for name, p in net.named_parameters())
    edit.save(tmp_path / "edit.safetensors")
    type(edit).load(tmp_path / "edit.safetensors", net).apply()
    assert all(torch.equal(p, after[name]) for name, p in net.named_parameters())


def test_complex_outputs_of_the_last_module():
    """A squared error of complex numbers: the Hessian in their coordinates is twice the identity."""

    class Regression(Net):
        def training_step(self, batch, batch_idx):
            z = self(batch[0].flatten(1)[:, :6].to(torch.complex128))
            return (
                (z - torch.polar(torch.ones(z.shape).double(), batch[1][:, None].double()))
                .abs()
                .square()
                .sum(1)
                .mean()
            )

    net = Regression(nn.Linear(6, 2, dtype=torch.complex128))
    x, y = (torch.cat(parts) for parts in zip(*data(), strict=True))
    rows, slopes = [], []
    for n in range(len(x)):
        z = net.body(x[n].flatten()[:6].to(torch.complex128))
        parts = [part for number in z for part in (number.real, number.imag)]
        grads = [torch.autograd.grad(part, list(net.parameters()), retain_graph=True) for part in parts]
        rows.append(torch.stack([torch.cat([torch.view_as_real(g).flatten() for g in own]) for own in grads]))
        slopes.append(
            2 * torch.view_as_real(z.detach() - torch.polar(torch.ones(2).double(), y[n].double())).flatten()
        )
    jacobians = torch.stack(rows)
    gradients = torch.einsum("nc,ncp->np", torch.stack(slopes), jacobians)
    matrix = 2 * torch.einsum("ncp,ncq->pq", jacobians, jacobians) / len(x)
    solved = torch.linalg.solve(matrix + DAMPING * torch.eye(len(matrix)).double(), gradients.T)
    found = InfluenceModule(net).scores(data(), data(), method="exact", damping=DAMPING)
    torch.testing.assert_close(found.scores, gradients @ solved / len(x), rtol=1e-6, atol=1e-9)


def test_a_complex_parameter_of_the_loss_is_refused_by_name():
    class Scaled(Net):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * self.scale.abs() + self.scale.abs().square()

    net = Scaled(make("real filter").body)
    net.scale = nn.Parameter(draw(1)[0])
    with pytest.raises(UnsupportedModelError, match="complex parameter 'scale' beside the outputs"):
        InfluenceModule(net).scores(data(), data(), method="identity")
    assert (
        InfluenceModule(net)
        .scores(data(), data(), method="identity", layers=["!scale"])
        .scores.isfinite()
        .all()
    )
