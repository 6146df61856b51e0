"""Answers of a coarse space that is made of few examples hold on others, or are not given."""

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.nn import functional as F

from lightning_influence import InfluenceModule
from lightning_influence.curvature.row_passes import RowsPass
from lightning_influence.methods.compact_building import CompactBuilder
from lightning_influence.methods.verifying import verify_answers

pytestmark = pytest.mark.filterwarnings("ignore")
EXAMPLES = 240


class Net(LightningModule):
    """Trained on what can be learned, so that few examples leave much of its curvature out."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.net = nn.Sequential(nn.Linear(10, 24), nn.Tanh(), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 3))
        self.double()

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])


def draw(seed: int):
    """A trained module, training batches, and one batch of queries."""
    module, generator = Net(seed), torch.Generator().manual_seed(seed)
    x = torch.randn(EXAMPLES + 20, 10, generator=generator, dtype=torch.float64)
    rule = torch.randn(10, 3, generator=generator, dtype=torch.float64)
    y = (x @ rule + torch.randn(len(x), 3, generator=generator, dtype=torch.float64)).argmax(1)
    optimizer = torch.optim.Adam(module.parameters(), 1e-2)
    for _ in range(80):
        optimizer.zero_grad()
        module.training_step((x[:EXAMPLES], y[:EXAMPLES]), 0).backward()
        optimizer.step()
    module.zero_grad()
    train = list(zip(x[:EXAMPLES].split(8), y[:EXAMPLES].split(8), strict=True))
    return module, train, (x[EXAMPLES:], y[EXAMPLES:])


def differentiate(module, train, query):
    """Training gradients (N, P), Gauss-Newton matrices (N, P, P), and the gradient of the mean query."""
    named = {n: p.detach() for n, p in module.named_parameters()}

    def outputs(parameters, x):
        return torch.func.functional_call(module, {n: p for n, p in parameters.items()}, (x,))

    module.forward = module.net.forward
    x, y = (torch.cat(parts) for parts in zip(*train, strict=True))

    def loss(parameters, one, label):
        return F.cross_entropy(outputs(parameters, one[None])[0][None], label[None])

    def flatten(tree):  # each layer's weight with its bias as the last column, as its matrices are held
        layers = [(tree[n], tree[n.replace("weight", "bias")]) for n in named if n.endswith("weight")]
        return torch.cat([torch.cat([w, b[..., None]], dim=-1).flatten(-2) for w, b in layers], dim=-1)

    gradients = flatten(torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(named, x, y))
    each = torch.func.vmap(torch.func.jacrev(lambda p, one: outputs(p, one[None])[0]), in_dims=(None, 0))
    J = flatten(each(named, x))
    shares = outputs(named, x).softmax(1)
    H = torch.diag_embed(shares) - shares[:, :, None] * shares[:, None, :]
    mean = torch.func.grad(lambda p: F.cross_entropy(outputs(p, query[0]), query[1]))(named)
    return gradients.detach(), torch.einsum("nkp,nkl,nlq->npq", J, H, J).detach(), flatten(mean)


@pytest.mark.slow
@pytest.mark.parametrize(("seed", "damping"), [(0, 1e-4), (1, 1e-3)])
def test_small_spaces_do_no_harm(seed, damping, monkeypatch):
    monkeypatch.setattr("lightning_influence.methods.forecast._LONG", 0.0)
    monkeypatch.setattr("lightning_influence.methods.compact_building._FEWEST_EXAMPLES", 40)
    module, train, query = draw(seed)
    gradients, matrices, v = differentiate(module, train, query)
    G, size, seen = matrices.mean(0), len(v), []
    measure, read, visited = CompactBuilder.measure_curved, RowsPass.rows, []

    def watch_rows(self, *arguments, **options):
        visited.append(read(self, *arguments, **options))
        return visited[-1]

    def watch(self, vectors, known):
        seen.append((vectors, known, measure(self, vectors, known), visited[-1].indices))
        return seen[-1][2]

    monkeypatch.setattr(RowsPass, "rows", watch_rows)
    monkeypatch.setattr(CompactBuilder, "measure_curved", watch)

    def ask(method, **options):
        return InfluenceModule(module).scores(
            train, [query], method=method, damping=damping, aggregate="mean", **options
        )

    found, plain = ask("auto", memory_budget=400 * 8 * size), ask("ekfac")
    assert found.diagnostics.extra["coarse_space"] <= 64
    assert found.diagnostics.extra["curvature_examples"] < EXAMPLES
    assert found.diagnostics.extra["verified_on"] >= 16
    # Verified on examples that the space was not made of, of those that the pass has visited.
    ((vectors, known, (curved, count), indices),) = seen
    others = indices[~torch.isin(indices, known)]
    assert len(others) == count < len(indices)
    expected = torch.einsum("vp,npq,vq->v", vectors, matrices[others], vectors) / count
    torch.testing.assert_close(curved, expected + damping * vectors.square().sum(1), rtol=1e-8, atol=1e-10)
    exact = torch.linalg.solve(G + damping * torch.eye(size, dtype=G.dtype), v) @ gradients.T / EXAMPLES

    def miss(scores):  # of the best length: where answers are far from solved, their order is what counts
        length = (scores @ exact) / scores.square().sum()
        return float((length * scores - exact).norm() / exact.norm())

    assert miss(found.scores[0]) < 1.02 * miss(plain.scores[0])


def test_what_other_examples_say_of_answers():
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(6, 6, generator=generator, dtype=torch.float64)
    A, v = root @ root.T, torch.randn(3, 6, generator=generator, dtype=torch.float64)
    best = torch.linalg.solve(A, v.T).T
    others = torch.randn(3, 6, generator=generator, dtype=torch.float64)
    answers = torch.stack([best[0], 4 * best[1], -best[2]])  # right, too long, and uphill
    curved = torch.einsum("qp,pr,qr->q", torch.cat([answers, others]), A, torch.cat([answers, others]))
    found = verify_answers(v, answers, others, curved, 20)
    assert found.worse[:2].tolist() == [False, False]
    torch.testing.assert_close(found.lengths[:2], torch.tensor([1.0, 0.25], dtype=torch.float64))
    chosen = found.choose(answers, others)
    torch.testing.assert_close(chosen[:2], best[:2])
    uphill = float(others[2] @ v[2]) > 0
    assert bool(found.worse[2]) == uphill
    assert torch.equal(chosen[2], others[2] if uphill else torch.zeros(6, dtype=torch.float64))
    residuals = (v - answers @ A).norm(dim=1) / v.norm(dim=1)
    true = (v - chosen @ A).norm(dim=1) / v.norm(dim=1)
    assert (found.bound(residuals, (v - others @ A).norm(dim=1) / v.norm(dim=1)) >= true - 1e-9).all()
    assert "shortened" in found.describe(20)
    half = verify_answers(v, best / 2, others, torch.cat([(best @ A * best).sum(1) / 4, curved[3:]]), 20)
    assert half.lengths[~half.worse].tolist() == [1.0] * int((~half.worse).sum())  # never made longer
    few = verify_answers(v, answers, others, curved, 3)
    assert torch.equal(few.choose(answers, others), answers)
    assert few.describe(3) == ""
