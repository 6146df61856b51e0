"""Dense float64 references, written from the definitions and sharing no code with the package.

Shapes: N examples, R positions, K curvature columns, O outputs of one example (flattened), P parameters,
G groups of a convolution (1 for every other layer), D_out and D_in the sizes of one group, D_in counting the
bias coordinate. A layer's parameters are the matrices (G, D_out, D_in) = [weight.flatten(1), bias as last
column]; the flat vector of P parameters is their concatenation over `layers` in the given order, row-major.
Nothing here changes the model it is given: every function works on a float64 copy in eval mode.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from math import prod
from types import SimpleNamespace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, vmap
from torch.func import hessian as hessian_of

Curvature = Literal["exact", "sampled", "empirical"]
Reduction = Literal["mean", "sum", "none"]

# --------------------------------------------------------------------------------------------- losses


class Loss(Protocol):
    """`example_loss` is the unnormalised sum_t w_t ell_t of one example; l_n = example_loss / normaliser."""

    reduction: Reduction

    def example_loss(self, outputs: Tensor, target: Tensor) -> Tensor: ...
    def normaliser(self, y: Tensor) -> float: ...
    def margin(self, outputs: Tensor, target: Tensor) -> Tensor: ...
    def logit(self, outputs: Tensor, target: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class CrossEntropy:
    """Softmax cross-entropy; also the negative log-likelihood of log-probabilities (their log-sum-exp is 0).

    Outputs of one example: (C,), (C, T...) with `class_dim=0`, or (T..., C) with `class_dim=-1`. Targets:
    labels (), (T...), or probabilities of the shape of the outputs. `reduction`: how a batch's loss is formed
    from its positions ("none": the plain average over all of them, ignored ones included, as users take it).
    """

    weight: Tensor | None = None
    label_smoothing: float = 0.0
    ignore_index: int = -100
    class_dim: int = 0
    reduction: Reduction = "mean"

    def _rows(self, outputs: Tensor) -> Tensor:
        return outputs.movedim(self.class_dim, -1).reshape(-1, outputs.shape[self.class_dim])  # (T, C)

    def _labels(self, target: Tensor, classes: int) -> tuple[Tensor, Tensor]:
        """One-hot labels (T, C) and whether a position counts (T, 1); an ignored one has a row of zeros."""
        if target.is_floating_point():
            raise ValueError("probability targets name no true label")
        labels = target.reshape(-1, 1)
        counts = (labels != self.ignore_index).double()
        return (labels == torch.arange(classes)).double() * counts, counts

    def _target_rows(self, target: Tensor, classes: int) -> Tensor:
        """What -log p is weighed with, (T, C): smoothing spreads evenly, then each class has its weight."""
        if target.is_floating_point():
            hard, counts = self._rows(target), torch.ones(1)
        else:
            hard, counts = self._labels(target, classes)
        eps = self.label_smoothing
        weight = torch.ones(classes, dtype=torch.float64) if self.weight is None else self.weight
        if target.is_floating_point():
            return (hard * (1 - eps) + eps / classes) * weight
        return (hard * (1 - eps) + counts * eps / classes) * weight

    def example_loss(self, outputs: Tensor, target: Tensor) -> Tensor:
        rows = self._rows(outputs)
        log_p = rows - torch.logsumexp(rows, dim=-1, keepdim=True)
        return -(self._target_rows(target, rows.shape[-1]) * log_p).sum()

    def normaliser(self, y: Tensor) -> float:
        """Mean over the dataset of an example's weight: what the batch's loss divides by, per example."""
        if self.reduction == "sum":
            return 1.0
        if y.is_floating_point():
            return float(prod(y.shape[1:]) / y[0].shape[self.class_dim])
        if self.reduction == "none":
            return float(y[0].numel())
        kept = y[y != self.ignore_index]
        total = kept.numel() if self.weight is None else self.weight[kept].sum().item()
        return float(total) / len(y)

    def logit(self, outputs: Tensor, target: Tensor) -> Tensor:
        rows = self._rows(outputs)
        return (self._labels(target, rows.shape[-1])[0] * rows).sum()

    def margin(self, outputs: Tensor, target: Tensor) -> Tensor:
        """Sum over positions of log p_y - log(1 - p_y) = f_y - logsumexp of the other outputs."""
        rows = self._rows(outputs)
        labels, counts = self._labels(target, rows.shape[-1])
        others = torch.where(labels.bool(), -torch.inf, rows).logsumexp(-1, keepdim=True)
        return ((labels * rows).sum(-1, keepdim=True) - others * counts).sum()


@dataclass(frozen=True)
class MeanSquaredError:
    """Squared error, averaged over an example's outputs ("mean", "none") or summed ("sum")."""

    reduction: Reduction = "mean"

    def example_loss(self, outputs: Tensor, target: Tensor) -> Tensor:
        squares = (outputs - target) ** 2
        return squares.sum() if self.reduction == "sum" else squares.sum() / squares.numel()

    def normaliser(self, y: Tensor) -> float:
        return 1.0

    def logit(self, outputs: Tensor, target: Tensor) -> Tensor:
        raise ValueError("regression has no true label")

    margin = logit


@dataclass(frozen=True)
class BinaryCrossEntropy:
    """Binary cross-entropy with logits, averaged over an example's outputs ("mean", "none") or summed."""

    weight: Tensor | None = None
    pos_weight: Tensor | None = None
    reduction: Reduction = "mean"

    def example_loss(self, outputs: Tensor, target: Tensor) -> Tensor:
        one = torch.ones((), dtype=torch.float64)
        log_p, log_1_p = -torch.log1p(torch.exp(-outputs)), -torch.log1p(torch.exp(outputs))
        positive = one if self.pos_weight is None else self.pos_weight
        weight = one if self.weight is None else self.weight
        terms = -weight * (positive * target * log_p + (1 - target) * log_1_p)
        return terms.sum() if self.reduction == "sum" else terms.sum() / terms.numel()

    def normaliser(self, y: Tensor) -> float:
        return 1.0

    def logit(self, outputs: Tensor, target: Tensor) -> Tensor:
        """Log-odds of the true labels, sum over outputs of (2 y - 1) f: one output stands for both labels."""
        return ((2 * target - 1) * outputs).sum()

    margin = logit


# --------------------------------------------------------------------------- parameters and derivatives


def _copy(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).double().eval().requires_grad_(False)


def matrix_shape(layer: nn.Module) -> tuple[int, int, int]:
    """(G, D_out, D_in) of a Linear or convolution layer."""
    groups = getattr(layer, "groups", 1)
    d_out, d_in = layer.weight.flatten(1).shape
    return groups, d_out // groups, d_in + (layer.bias is not None)


def find_block(model: nn.Module, name: str) -> Any:
    """The layer of this name, or a parameter of this name as a layer of one input that is 1."""
    own = dict(model.named_parameters())
    return (
        SimpleNamespace(weight=own[name].reshape(-1, 1), bias=None)
        if name in own
        else model.get_submodule(name)
    )


def flat_parameters(model: nn.Module, layers: Sequence[str]) -> Tensor:
    """The vector (P,) of these layers' parameters."""
    parts = []
    for layer in (find_block(model, name) for name in layers):
        columns = [layer.weight.flatten(1)] + ([] if layer.bias is None else [layer.bias[:, None]])
        parts.append(torch.cat(columns, dim=1).reshape(-1))
    return torch.cat(parts).detach().double()


def unflatten(vector: Tensor, model: nn.Module, layers: Sequence[str]) -> dict[str, Tensor]:
    """Matrices (..., G, D_out, D_in) by layer, from (..., P)."""
    shapes = [matrix_shape(find_block(model, name)) for name in layers]
    parts = vector.split([prod(shape) for shape in shapes], dim=-1)
    return {name: part.unflatten(-1, shape) for name, part, shape in zip(layers, parts, shapes, strict=True)}


def flatten(gradients: Mapping[str, Tensor]) -> Tensor:
    """(N, P) from (N, G, D_out, D_in) by layer, in the mapping's order."""
    return torch.cat([g.flatten(1) for g in gradients.values()], dim=1)


def _forward(model: nn.Module, layers: Sequence[str], theta: Tensor, x_n: Tensor) -> Tensor:
    """Outputs of one example as a function of the flat parameters of `layers`."""
    parameters = {}
    own = dict(model.named_parameters())
    for name, matrix in unflatten(theta, model, layers).items():
        if name in own:
            parameters[name] = matrix.reshape(own[name].shape)
            continue
        layer = model.get_submodule(name)
        rows = matrix.flatten(0, 1)
        parameters[f"{name}.weight"] = rows[:, : layer.weight[0].numel()].reshape(layer.weight.shape)
        if layer.bias is not None:
            parameters[f"{name}.bias"] = rows[:, -1]
    return functional_call(model, parameters, (x_n[None],))[0]


def _gradients(
    model: nn.Module, scalar: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor, layers: Sequence[str]
) -> dict[str, Tensor]:
    model = _copy(model)

    def of_example(theta: Tensor, x_n: Tensor, y_n: Tensor) -> Tensor:
        return scalar(_forward(model, layers, theta, x_n), y_n)

    flat = vmap(grad(of_example), in_dims=(None, 0, 0))(flat_parameters(model, layers), x, y)
    return unflatten(flat, model, layers)


def per_example_gradients(
    model: nn.Module, loss: Loss, x: Tensor, y: Tensor, layers: Sequence[str], normaliser: float | None = None
) -> dict[str, Tensor]:
    """Gradients of l_n, (N, G, D_out, D_in) by layer; `normaliser` is that of `y` unless it is given."""
    gradients = _gradients(model, loss.example_loss, x, y, layers)
    wbar = loss.normaliser(y) if normaliser is None else normaliser
    return {name: g / wbar for name, g in gradients.items()}


def measurement_gradients(
    model: nn.Module,
    loss: Loss,
    x: Tensor,
    y: Tensor,
    layers: Sequence[str],
    measurement: Literal["loss", "margin", "logit"],
    normaliser: float = 1.0,
) -> dict[str, Tensor]:
    """Query gradients (Q, G, D_out, D_in) by layer; "loss" is divided by `normaliser`, the training set's."""
    if measurement == "loss":
        return per_example_gradients(model, loss, x, y, layers, normaliser)
    return _gradients(model, getattr(loss, measurement), x, y, layers)


def output_hessians(model: nn.Module, loss: Loss, x: Tensor, y: Tensor) -> Tensor:
    """Hessian of l_n in the outputs of example n, (N, O, O)."""
    outputs = _copy(model)(x)
    full = vmap(hessian_of(loss.example_loss))(outputs, y)
    size = outputs[0].numel()
    return full.reshape(len(x), size, size) / loss.normaliser(y)


def output_jacobians(model: nn.Module, x: Tensor, layers: Sequence[str]) -> Tensor:
    """Jacobian of the outputs of example n in the parameters, (N, O, P)."""
    model = _copy(model)
    jacobian = jacrev(lambda theta, x_n: _forward(model, layers, theta, x_n).reshape(-1))
    return vmap(jacobian, in_dims=(None, 0))(flat_parameters(model, layers), x)


def ggn(model: nn.Module, loss: Loss, x: Tensor, y: Tensor, layers: Sequence[str]) -> Tensor:
    """Gauss-Newton matrix (1/N) sum_n J_n^T (Hessian of l_n in the outputs) J_n, (P, P)."""
    J = output_jacobians(model, x, layers)
    return torch.einsum("nop,noq,nqr->pr", J, output_hessians(model, loss, x, y), J) / len(x)


def hessian(model: nn.Module, loss: Loss, x: Tensor, y: Tensor, layers: Sequence[str]) -> Tensor:
    """Hessian of (1/N) sum_n l_n, (P, P), by differentiating twice."""
    model = _copy(model)

    def objective(theta: Tensor) -> Tensor:
        values = [loss.example_loss(_forward(model, layers, theta, a), b) for a, b in zip(x, y, strict=True)]
        return torch.stack(values).mean() / loss.normaliser(y)

    return hessian_of(objective)(flat_parameters(model, layers))


def fisher_empirical(model: nn.Module, loss: Loss, x: Tensor, y: Tensor, layers: Sequence[str]) -> Tensor:
    """(1/N) sum_n g_n g_n^T with the training labels' gradients, (P, P)."""
    g = flatten(per_example_gradients(model, loss, x, y, layers))
    return g.T @ g / len(g)


# ------------------------------------------------------------------------------------ positions of a layer


def source_index(i: int, length: int, mode: str) -> int | None:
    """Which coordinate of the unpadded input stands at coordinate `i` (may be negative); None is a zero."""
    if 0 <= i < length:
        return i
    if mode == "reflect":
        return -i if i < 0 else 2 * (length - 1) - i
    if mode == "replicate":
        return 0 if i < 0 else length - 1
    return i % length if mode == "circular" else None


def _pad(layer: nn.Module, a: Tensor) -> Tensor:
    """Pad (C, *spatial) as the convolution `layer` pads its input."""
    for axis, (kernel, dilation) in enumerate(zip(layer.kernel_size, layer.dilation, strict=True)):
        if layer.padding == "same":
            before = dilation * (kernel - 1) // 2
            after = dilation * (kernel - 1) - before
        else:
            before = after = 0 if layer.padding == "valid" else layer.padding[axis]
        length = a.shape[axis + 1]
        sources = [source_index(i, length, layer.padding_mode) for i in range(-before, length + after)]
        slices = [
            torch.zeros_like(a.select(axis + 1, 0)) if i is None else a.select(axis + 1, i) for i in sources
        ]
        a = torch.stack(slices, dim=axis + 1)
    return a


def input_positions(layer: nn.Module, a: Tensor) -> Tensor:
    """What the weights multiply at each position of one call, (R, G, D_in), from the input of one example."""
    if isinstance(layer, nn.Linear):
        rows = a.reshape(-1, 1, a.shape[-1])
    else:
        padded, patches = _pad(layer, a[0]), []
        reach = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        starts = [range(0, n - r, s) for n, r, s in zip(padded.shape[1:], reach, layer.stride, strict=True)]
        for start in product(*starts):
            box = [slice(b, b + r + 1, d) for b, r, d in zip(start, reach, layer.dilation, strict=True)]
            patches.append(padded[(slice(None), *box)].reshape(layer.groups, -1))
        rows = torch.stack(patches)
    return rows if layer.bias is None else torch.cat([rows, torch.ones_like(rows[..., :1])], dim=-1)


def output_positions(layer: nn.Module, s: Tensor) -> Tensor:
    """(K, R, G, D_out) from K stacked tensors of the shape of the layer's output for one example."""
    groups, d_out, _ = matrix_shape(layer)
    by_position = s.reshape(len(s), -1, d_out) if isinstance(layer, nn.Linear) else s.flatten(3)[:, 0].mT
    return by_position.unflatten(-1, (groups, d_out))


@contextmanager
def _at_layers(
    model: nn.Module, layers: Sequence[str], visit: Callable[[str, Tensor, Tensor], Tensor | None]
) -> Iterator[None]:
    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor | None]:
        return lambda _, args, out: visit(name, args[0], out)

    handles = [model.get_submodule(name).register_forward_hook(hook(name)) for name in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def positions(
    model: nn.Module, x_n: Tensor, layers: Sequence[str]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Of one example: abar (R, G, D_in) and the Jacobian of the outputs in ds (O, R, G, D_out), by layer.

    The Jacobian is taken in a shift of zero added to what each call of a layer returns. All calls of a layer
    that is called more than once are positions of that layer.
    """
    model = _copy(model)
    own = {name: p for name, p in model.named_parameters() if name in layers}
    every, layers = layers, [name for name in layers if name not in own]
    inputs: dict[str, list[Tensor]] = {name: [] for name in layers}
    zeros: dict[str, list[Tensor]] = {name: [] for name in layers}

    def record(name: str, a: Tensor, s: Tensor) -> None:
        inputs[name].append(a.clone())
        zeros[name].append(torch.zeros_like(s))

    with _at_layers(model, layers, record):
        model(x_n[None])

    def outputs(shifts: dict[str, list[Tensor]]) -> Tensor:
        left = {name: iter(calls) for name, calls in shifts.items()}
        with _at_layers(model, layers, lambda name, _, s: s + next(left[name])):
            return model(x_n[None])[0].reshape(-1)

    jacobians = jacrev(outputs)(zeros)
    abar, ds = {}, {}
    for name in layers:
        layer = model.get_submodule(name)
        abar[name] = torch.cat([input_positions(layer, a) for a in inputs[name]])
        ds[name] = torch.cat([output_positions(layer, j) for j in jacobians[name]], dim=1)
    if own:  # the output of such a block is the parameter itself
        by_parameter = jacrev(lambda values: functional_call(model, values, (x_n[None],))[0].reshape(-1))(own)
        for name, jacobian in by_parameter.items():
            abar[name] = torch.ones(1, 1, 1, dtype=torch.float64)
            ds[name] = jacobian.reshape(len(jacobian), 1, 1, -1)
    return {name: abar[name] for name in every}, {name: ds[name] for name in every}


# ---------------------------------------------------------------------------------------- K-FAC and EK-FAC


def output_seeds(
    model: nn.Module, loss: Loss, x: Tensor, y: Tensor, curvature: Curvature, seeds: Tensor | None = None
) -> Tensor:
    """Vectors b_nk (N, K, O) whose sum of b b^T over k is the curvature of example n in its outputs.

    "exact": a square root of the Hessian of l_n. "sampled": `seeds` (draws, N, *outputs) with E[s s^T] the
    Hessian of the *unnormalised* loss: divided here by sqrt(draws * normaliser). "empirical": the gradient
    of l_n.
    """
    if curvature == "sampled":
        if seeds is None:
            raise ValueError('curvature="sampled" needs seeds of shape (draws, N, *outputs)')
        return seeds.reshape(*seeds.shape[:2], -1).transpose(0, 1) / (len(seeds) * loss.normaliser(y)) ** 0.5
    if curvature == "empirical":
        gradients = vmap(grad(loss.example_loss))(_copy(model)(x), y)
        return gradients.reshape(len(x), 1, -1) / loss.normaliser(y)
    values, vectors = torch.linalg.eigh(output_hessians(model, loss, x, y))
    return (vectors * values.clamp(min=0).sqrt()[:, None, :]).mT


@dataclass(frozen=True)
class LayerFactors:
    """One layer's factors and the gradients they were made of.

    Attributes:
        A: average over examples and positions of abar abar^T, (G, D_in, D_in).
        S: average over examples of the sum over positions and columns of ds ds^T, (G, D_out, D_out).
        d_A, Q_A, d_S, Q_S: their eigenvalues and eigenvectors (or the bases that were passed in).
        Lambda: average over examples, summed over columns, of (Q_S^T gradient Q_A)^2, (G, D_out, D_in).
        gradients: sum over positions of ds abar^T for each example and column, (N, K, G, D_out, D_in).
    """

    A: Tensor
    S: Tensor
    d_A: Tensor
    Q_A: Tensor
    d_S: Tensor
    Q_S: Tensor
    Lambda: Tensor
    gradients: Tensor

    def fisher(self) -> Tensor:
        """The block that the factors stand for, (1/N) sum of g g^T, (P_l, P_l), with cross-group terms."""
        g = self.gradients.flatten(2)
        return torch.einsum("nkp,nkq->pq", g, g) / len(g)

    def basis(self) -> Tensor:
        """Q_S (x) Q_A, block diagonal over groups, (P_l, P_l)."""
        return block_diagonal([torch.kron(s, a) for s, a in zip(self.Q_S, self.Q_A, strict=True)])

    def kfac(self) -> Tensor:
        """S (x) A, block diagonal over groups, (P_l, P_l)."""
        return block_diagonal([torch.kron(s, a) for s, a in zip(self.S, self.A, strict=True)])

    def ekfac(self) -> Tensor:
        """Q diag(Lambda) Q^T with Q the basis, (P_l, P_l)."""
        Q = self.basis()
        return Q @ torch.diag(self.Lambda.reshape(-1)) @ Q.T


def layer_factors(
    model: nn.Module,
    loss: Loss,
    x: Tensor,
    y: Tensor,
    layers: Sequence[str],
    curvature: Curvature = "exact",
    seeds: Tensor | None = None,
    bases: Mapping[str, tuple[Tensor, Tensor]] | None = None,
) -> dict[str, LayerFactors]:
    """K-FAC and EK-FAC factors by layer.

    `bases` (Q_A (G, D_in, D_in), Q_S (G, D_out, D_out)) by layer replaces the eigenvectors: where A or S has
    repeated eigenvalues (S of a last layer under squared error is a multiple of I) they are not unique, and
    neither is EK-FAC.
    """
    columns = output_seeds(model, loss, x, y, curvature, seeds)
    seen = [positions(model, x_n, layers) for x_n in x]
    result = {}
    for name in layers:
        abar = torch.stack([a[name] for a, _ in seen])  # (N, R, G, D_in)
        jacobian = torch.stack([j[name] for _, j in seen])  # (N, O, R, G, D_out)
        ds = torch.einsum("nko,norgd->nkrgd", columns, jacobian)
        A = torch.einsum("nrgi,nrgj->gij", abar, abar) / (abar.shape[0] * abar.shape[1])
        S = torch.einsum("nkrgd,nkrge->gde", ds, ds) / len(x)
        gradients = torch.einsum("nkrgd,nrgi->nkgdi", ds, abar)
        d_A, Q_A = torch.linalg.eigh(A)
        d_S, Q_S = torch.linalg.eigh(S)
        if bases is not None:
            Q_A, Q_S = bases[name]
            d_A, d_S = (torch.diagonal(Q.mT @ M @ Q, dim1=-2, dim2=-1) for Q, M in ((Q_A, A), (Q_S, S)))
        rotated = torch.einsum("gde,nkgdi,gij->nkgej", Q_S, gradients, Q_A)
        Lambda = rotated.square().sum(dim=(0, 1)) / len(x)
        result[name] = LayerFactors(A, S, d_A, Q_A, d_S, Q_S, Lambda, gradients)
    return result


def kfac_block(
    model: nn.Module, loss: Loss, x: Tensor, y: Tensor, layer: str, curvature: Curvature = "exact", **options
) -> Tensor:
    """K-FAC's approximation of one layer's block, (P_l, P_l)."""
    return layer_factors(model, loss, x, y, [layer], curvature, **options)[layer].kfac()


def ekfac_block(
    model: nn.Module, loss: Loss, x: Tensor, y: Tensor, layer: str, curvature: Curvature = "exact", **options
) -> Tensor:
    """EK-FAC's approximation of one layer's block, (P_l, P_l)."""
    return layer_factors(model, loss, x, y, [layer], curvature, **options)[layer].ekfac()


# --------------------------------------------------------------------------------------------- influence


def block_diagonal(blocks: Sequence[Tensor]) -> Tensor:
    """One matrix with these blocks on its diagonal and zeros elsewhere."""
    return torch.block_diag(*blocks)


def keep_blocks(matrix: Tensor, model: nn.Module, layers: Sequence[str]) -> Tensor:
    """`matrix` (P, P) with its cross-layer terms set to zero."""
    owner = layer_of_parameter(model, layers)
    return torch.where(owner[:, None] == owner, matrix, 0)


def layer_of_parameter(model: nn.Module, layers: Sequence[str]) -> Tensor:
    """Index into `layers` of each coordinate of the flat vector, (P,)."""
    sizes = torch.tensor([prod(matrix_shape(find_block(model, name))) for name in layers])
    return torch.arange(len(sizes)).repeat_interleave(sizes)


def damping_vector(damping: Mapping[str, float], model: nn.Module, layers: Sequence[str]) -> Tensor:
    """Each layer's damping on each of its coordinates, (P,)."""
    values = torch.tensor([damping[name] for name in layers], dtype=torch.float64)
    return values[layer_of_parameter(model, layers)]


def influence(H: Tensor, damping: float | Tensor, query_grads: Tensor, train_grads: Tensor) -> Tensor:
    """Scores (1/N) g_q^T (H + lambda I)^{-1} g_n, (Q, N), from gradients (Q, P) and (N, P).

    A score is the predicted change of query q's measurement when training example n is removed. `damping` is
    a number or one value for each parameter, (P,).
    """
    diagonal = torch.as_tensor(damping, dtype=H.dtype).expand(len(H))
    return query_grads @ torch.linalg.solve(H + torch.diag(diagonal), train_grads.T) / len(train_grads)
