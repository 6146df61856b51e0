"""All methods on tables above the limit against a dense reference: looked up, mapped, both, on their side."""

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.nn import functional

from lightning_influence import InfluenceModule
from lightning_influence.model.forward import Forward
from lightning_influence.model.layers.gradients import DenseGradients
from lightning_influence.model.layers.plan import find_layers
from lightning_influence.model.layers.table_gradients import TableGradients

V, D, T, N, Q = 9, 3, 4, 6, 3
DAMPING = 0.07
DOUBLE = torch.float64


class Words(LightningModule):
    """Sequences whose next words are predicted; ``look_up`` and ``map_out`` say how tables are used."""

    def training_step(self, batch, batch_idx=0):
        words, following = batch
        outputs = self.map_out(torch.tanh(self.look_up(words) * self.scale))
        return functional.cross_entropy(outputs.flatten(0, 1), following.flatten())

    def __init__(self):
        super().__init__()
        self.register_buffer("scale", torch.linspace(0.5, 2, D))
        self.register_buffer("fixed_in", torch.randn(V, D))
        self.register_buffer("fixed_out", torch.randn(V, D))

    def look_up(self, words):
        return functional.embedding(words, self.fixed_in)

    def map_out(self, hidden):
        return functional.linear(hidden, self.fixed_out)


class Embedding(Words):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(V, D)

    def look_up(self, words):
        return self.embedding(words)


class Padded(Embedding):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(V, D, padding_idx=2)


class Sparse(Embedding):
    """Its gradients are sparse, and rows are renormalised as they are looked up."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(V, D, sparse=True, max_norm=1.0)


class Frequent(Embedding):
    """Looked up twice, and rows come again within a sequence."""

    def look_up(self, words):
        return self.embedding(words) + self.embedding((words + 1) % 3)


class Bag(Words):
    def __init__(self):
        super().__init__()
        self.bag = nn.EmbeddingBag(V, D, mode="mean")

    def look_up(self, words):
        return self.bag(words)[:, None] + functional.embedding(words, self.fixed_in)


class Tied(Embedding):
    def map_out(self, hidden):
        return hidden @ self.embedding.weight.T


class Lying(Words):
    """A head whose table stands on its side."""

    def __init__(self):
        super().__init__()
        self.out = nn.Parameter(torch.randn(D, V))

    def map_out(self, hidden):
        return hidden @ self.out


class Headed(Embedding):
    """An untied head, which is a layer with a bias."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(D, V)

    def map_out(self, hidden):
        return self.head(hidden)


class Scaled(Embedding):
    """A table that is scaled before it is looked up: gradients of no form of their own."""

    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor([0.8]))

    def look_up(self, words):
        return functional.embedding(words, self.embedding.weight * self.factor)


MODELS = {
    cls.__name__.lower(): cls for cls in (Embedding, Padded, Frequent, Bag, Tied, Lying, Headed, Scaled)
}


@pytest.fixture(autouse=True)
def limits(monkeypatch):
    for name, limit in (("DENSE_WIDTH", 10), ("MATRIX_WIDTH", 7), ("SIDE_WIDTH", 7)):
        monkeypatch.setattr(f"lightning_influence.model.layers.layer.{name}", limit)


def make(name):
    torch.manual_seed(1)
    model = MODELS[name]().double()
    generator = torch.Generator().manual_seed(2)
    words = torch.randint(0, V, (N + Q, T + 1), generator=generator)
    pairs = [(part[:, :-1], part[:, 1:]) for part in (words[:N], words[N:])]
    batches = [[(x[i : i + 4], y[i : i + 4]) for i in range(0, len(x), 4)] for x, y in pairs]
    return model.eval(), pairs, batches


def parameters_of(model):
    return [p for p in model.parameters() if p.requires_grad]


def flat(grads, parameters):
    pairs = zip(grads, parameters, strict=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g.to_dense()).flatten() for g, p in pairs])


def loss_gradients(model, words, following):
    """``(examples, P)`` in the order of the parameters."""
    parameters = parameters_of(model)
    rows = []
    for x, y in zip(words, following, strict=True):
        loss = model.training_step((x[None], y[None]))
        rows.append(flat(torch.autograd.grad(loss, parameters, allow_unused=True), parameters))
    return torch.stack(rows)


def curvature_gradients(model, words):
    """``(examples, T V, P)``: their outer products sum to each example's Gauss-Newton matrix."""
    parameters, result = parameters_of(model), []
    for x in words:
        outputs = model.map_out(torch.tanh(model.look_up(x[None]) * model.scale))[0]  # (T, V)
        p = outputs.detach().softmax(-1)
        rows = []
        for t in range(T):
            for c in range(V):
                column = (p[t, c] / T).sqrt() * (torch.eye(V, dtype=DOUBLE)[c] - p[t])
                grads = torch.autograd.grad(
                    outputs[t] @ column, parameters, retain_graph=True, allow_unused=True
                )
                rows.append(flat(grads, parameters))
        result.append(torch.stack(rows))
    return torch.stack(result)


def reference(name, method):
    """Scores ``(Q, N)`` from dense matrices; ``method`` maps curvature gradients to a damped inverse."""
    model, ((x, y), (query_x, query_y)), _ = make(name)
    train, queries = loss_gradients(model, x, y), loss_gradients(model, query_x, query_y)
    return queries @ method(curvature_gradients(model, x)) @ train.T / N


def ask(name, method, **options):
    model, _, (train, queries) = make(name)
    options = {"damping": DAMPING, **options} if method != "identity" else options
    return InfluenceModule(model).scores(train, queries, method=method, **options)


def exact_inverse(columns):
    matrix = columns.flatten(0, 1).T @ columns.flatten(0, 1) / N
    return torch.linalg.inv(matrix + DAMPING * torch.eye(len(matrix), dtype=DOUBLE))


def diagonal_inverse(columns):
    return torch.diag(1 / (columns.square().sum((0, 1)) / N + DAMPING))


@pytest.mark.parametrize("name", MODELS)
def test_gradients_have_their_form_and_are_those_of_autograd(name):
    model, ((x, y), _), _ = make(name)
    plan = find_layers(model)
    assert plan.coverage == 1.0
    found = Forward(plan)(model, (x, y), N).loss_gradients()
    expected, start = loss_gradients(model, x, y), 0
    for key, parameter in model.named_parameters():
        part = expected[:, start : start + parameter.numel()].reshape(N, *parameter.shape)
        start += parameter.numel()
        if key.startswith("head."):
            continue
        weight = plan.layers[key].to_parameters(found[key].dense()[0])[0]
        torch.testing.assert_close(weight / T, part, rtol=1e-9, atol=1e-11)
        if parameter.ndim == 2:
            assert isinstance(found[key], DenseGradients if name == "scaled" else TableGradients)


@pytest.mark.parametrize("name", MODELS)
def test_exact_diagonal_and_identity_are_those_of_the_matrices(name):
    kept = {"rtol": 1e-8, "atol": 1e-11}
    for method, inverse, options in (
        ("exact", exact_inverse, {}),
        ("diagonal", diagonal_inverse, {"fisher": "exact", "low_rank_tolerance": 0.0}),
        ("identity", lambda columns: torch.eye(columns.shape[-1], dtype=DOUBLE), {"low_rank_tolerance": 0.0}),
    ):
        torch.testing.assert_close(ask(name, method, **options).scores, reference(name, inverse), **kept)


@pytest.mark.grid
@pytest.mark.parametrize("method", ["cg", "auto"])
@pytest.mark.parametrize("name", ["frequent", "tied", "headed", "bag"])
def test_solvers_reach_the_exact_answer(name, method):
    options = {"fisher": "exact"} if method == "cg" else {}
    found = ask(name, method, tolerance=1e-9, max_steps=200, **options)
    torch.testing.assert_close(found.scores, reference(name, exact_inverse), rtol=1e-5, atol=1e-7)


def shape_of(name):
    (parameter,) = parameters_of(make(name)[0])
    return parameter.shape


def kronecker_inverse(name, statistics, *, measured):
    """The inverse of EK-FAC (``measured``) or K-FAC of a model of one table, from its own positions."""
    shape = shape_of(name)
    lying = shape[0] < shape[1]

    def invert(columns):
        narrow, wide, total = statistics(columns)
        basis = torch.linalg.eigh(narrow / total).eigenvectors
        matrices = columns.reshape(N, -1, *shape)
        matrices = matrices.mT if lying else matrices
        rotated = matrices @ basis
        if measured:
            eigenvalues = rotated.square().sum((0, 1)) / N
        else:
            energies = (basis.T @ (narrow / total) @ basis).diagonal()
            eigenvalues = torch.outer(wide / N, energies)
        whole = torch.kron(torch.eye(V, dtype=DOUBLE), basis.contiguous())
        inverse = whole @ torch.diag(1 / (eigenvalues.flatten() + DAMPING)) @ whole.T
        if lying:
            order = torch.arange(V * D).view(V, D).T.flatten()
            inverse = inverse[order][:, order]
        return inverse

    return invert


def split_positions(name):
    """What each use of the table contributes, at each position alone: ``(uses T, N, T V, V, D)``."""
    model, ((x, _), _), _ = make(name)
    eye, result = torch.eye(V, dtype=DOUBLE), torch.zeros(2 * T, N, T * V, V, D, dtype=DOUBLE)
    for n, words in enumerate(x):
        looked_up = model.look_up(words[None]).detach().requires_grad_()
        hidden = torch.tanh(looked_up * model.scale)
        outputs = model.map_out(hidden)[0]
        p = outputs.detach().softmax(-1)
        for k in range(T * V):
            t, c = divmod(k, V)
            column = (p[t, c] / T).sqrt() * (eye[c] - p[t])
            (grad,) = torch.autograd.grad(outputs[t] @ column, looked_up, retain_graph=True)
            if name in ("tied", "lying"):
                result[T + t, n, k] = torch.outer(column, hidden[0, t].detach())
            for place, word in enumerate(words.tolist() if name != "lying" else ()):
                if name != "padded" or word != 2:
                    result[place, n, k] = torch.outer(eye[word], grad[0, place])
    return result


@pytest.mark.grid
@pytest.mark.parametrize("method", ["ekfac", "kfac"])
@pytest.mark.parametrize("name", ["embedding", "padded", "tied", "lying"])
def test_kronecker_factors_have_a_diagonal_side(name, method):
    def statistics(columns):
        each = split_positions(name)
        torch.testing.assert_close(each.sum(0), _standing(columns, name))
        narrow = torch.einsum("unkvi,unkvj->ij", each, each)
        return narrow, torch.einsum("unkvi,unkvi->v", each, each), narrow.trace()

    expected = reference(name, kronecker_inverse(name, statistics, measured=method == "ekfac"))
    found = ask(name, method, fisher="exact", low_rank_tolerance=0.0)
    torch.testing.assert_close(found.scores, expected, rtol=1e-8, atol=1e-11)


@pytest.mark.grid
@pytest.mark.parametrize("method", ["ekfac", "kfac"])
@pytest.mark.parametrize("name", ["embedding", "padded", "frequent", "bag", "tied"])
def test_a_small_table_has_bases_of_both_sides(name, method, monkeypatch):
    """Its factors are the second moments of its gradient matrices over rows and over columns."""
    monkeypatch.setattr("lightning_influence.model.layers.layer.MATRIX_WIDTH", 100)
    model, (train, _), _ = make(name)
    (gradients,) = Forward(find_layers(model))(model, train, N).loss_gradients().values()
    assert isinstance(gradients, TableGradients)

    def invert(columns):
        matrices = columns.reshape(-1, V, D)
        narrow, wide = matrices.mT @ matrices, matrices @ matrices.mT
        narrow, wide = narrow.sum(0) / matrices.square().sum(), wide.sum(0) / N
        q_in, q_out = (torch.linalg.eigh(moment).eigenvectors for moment in (narrow, wide))
        if method == "ekfac":
            eigenvalues = (q_out.T @ matrices @ q_in).square().sum(0) / N
        else:
            eigenvalues = torch.outer(*((q.T @ m @ q).diagonal() for q, m in ((q_out, wide), (q_in, narrow))))
        basis = torch.kron(q_out.contiguous(), q_in.contiguous())
        return basis @ torch.diag(1 / (eigenvalues.flatten() + DAMPING)) @ basis.T

    found = ask(name, method, fisher="exact", low_rank_tolerance=0.0)
    torch.testing.assert_close(found.scores, reference(name, invert), rtol=1e-8, atol=1e-11)


def _standing(columns, name):
    shape = shape_of(name)
    matrices = columns.reshape(N, -1, *shape)
    return matrices.mT if shape[0] < shape[1] else matrices


def test_a_wide_layer_has_a_diagonal_side_too():
    model, ((x, _), _), (train, queries) = make("headed")
    factors = InfluenceModule(model).fit_factors(train, fisher="exact")
    head = factors.layers["head"]
    assert head.outputs.shape == (1, V)
    assert head.inputs.shape == (1, D + 1, D + 1)
    assert head.basis.q_out is None
    columns = curvature_gradients(model, x)[:, :, V * D :]
    weight, bias = columns[..., : V * D].reshape(N, -1, V, D), columns[..., V * D :]
    matrices = torch.cat([weight, bias[..., None]], dim=-1)
    rotated = matrices @ head.basis.q_in[0]
    torch.testing.assert_close(
        head.second_moment()[0] / factors.mean_weight, rotated.square().sum((0, 1)) / N
    )
    # What is stored is what there was.
    again = type(factors).from_state_dict(factors.state_dict())
    given = [
        InfluenceModule(model, found).scores(train, queries, method="ekfac") for found in (factors, again)
    ]
    assert torch.equal(given[0].scores, given[1].scores)


@pytest.mark.grid
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("method", ["ekfac", "kfac", "identity"])
def test_parts_means_and_self_influence_are_those_of_the_scores(name, method):
    model, _, (train, queries) = make(name)
    module, kept = InfluenceModule(model), {"rtol": 1e-8, "atol": 1e-11}
    options = {"damping": DAMPING} if method != "identity" else {}
    exact = {"method": method, "low_rank_tolerance": 0.0, **options}
    scores = module.scores(train, queries, **exact).scores
    torch.testing.assert_close(
        module.scores(train, queries, memory_budget=4096, **exact).scores, scores, **kept
    )
    mean = module.scores(train, queries, aggregate="mean", **exact).scores
    torch.testing.assert_close(mean[0], scores.mean(0), **kept)
    layers = module.scores(train, queries, by="layer", **exact).layer_scores
    torch.testing.assert_close(layers.sum(0), scores, **kept)
    own = module.scores(train, train, **exact).scores
    found = module.self_influence(train, method=method, self_influence_tolerance=0.0, **options)
    torch.testing.assert_close(found.scores, own.diagonal(), **kept)


class Hidden(torch.autograd.Function):
    """Linear, out of sight."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x @ weight.T

    @staticmethod
    def backward(ctx, slopes):
        x, weight = ctx.saved_tensors
        return slopes @ weight, slopes.T @ x


class HalfSeen(LightningModule):
    """One of two uses of a weight cannot be seen, and gradients are asked for before that is found out."""

    def __init__(self):
        super().__init__()
        self.weight, self.out = nn.Parameter(torch.randn(V, D)), nn.Linear(V, 3)

    def influence_loss(self, batch):
        mapped = functional.linear(batch[0], self.weight) + Hidden.apply(batch[0], self.weight)
        return functional.cross_entropy(self.out(torch.tanh(mapped)), batch[1], reduction="none")

    def training_step(self, batch, batch_idx=0):
        return self.influence_loss(batch).mean()


@pytest.mark.parametrize("limit", [7, 100])  # a table, and a matrix that maps
def test_a_use_that_is_not_seen_counts_whatever_was_read_before(limit, monkeypatch):
    monkeypatch.setattr("lightning_influence.model.layers.layer.MATRIX_WIDTH", limit)
    torch.manual_seed(0)
    model = HalfSeen().double().eval()
    batch = torch.randn(N, D, dtype=DOUBLE), torch.arange(N) % 3
    plan = find_layers(model)
    captured = Forward(plan)(model, batch, N)
    found = captured.loss_gradients()["weight"].dense()[0, :, 0]
    losses = model.influence_loss(batch)
    rows = [torch.autograd.grad(loss, model.weight, retain_graph=True)[0] for loss in losses]
    torch.testing.assert_close(found, torch.stack(rows))
