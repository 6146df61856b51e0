"""The right answer of a random question, dense in float64: one example at a time, by automatic derivatives.

Only the names of the covered layers and the damping of each come from the answer that is checked.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property, partial
from typing import Any

import oracle
import torch
from fuzz_losses import IGNORED
from fuzz_recipes import Problem, squares, surrogate
from torch import Tensor, nn
from torch.nn.utils.parametrizations import _WeightNorm


class UndeterminedError(Exception):
    """The definition leaves the answer open, as eigenvectors of repeated eigenvalues are."""


class Reference:
    """Dense gradients and curvature over the covered parameters.

    Args:
        problem: the question.
        layers: names of the covered modules, or of single parameters.
        shares: whether weights of examples are shares of their batch, which is said of losses without a name.
        units: whether all examples, which weigh the same, weigh one, as where losses are read by value.
        squares: whether squared gradients stand for the curvature, as is said of absolute errors that are
            read by value, and of examples that are run one by one.
    """

    def __init__(
        self,
        problem: Problem,
        layers: Mapping[str, int],
        shares: bool = False,
        units: bool = False,
        squares: bool = False,
    ) -> None:
        self.problem, self.recipe, self.kind = problem, problem.recipe, problem.kind
        self.module = problem.module
        self.module.eval()
        every = dict(self.module.named_parameters())
        self.parameters: dict[str, list[nn.Parameter]] = {}
        for name, count in layers.items():
            if name in every:
                own = [every[name]]
            else:
                own = [
                    p for p in self.module.get_submodule(name).parameters(recurse=False) if p.requires_grad
                ]
            assert sum(p.numel() for p in own) == count, f"{name} has other parameters than are said"
            self.parameters[name] = own
        self.flat = [p for own in self.parameters.values() for p in own]
        self.train = problem.train_indices
        self.query = list(range(self.recipe.examples, self.recipe.examples + self.recipe.queries))
        for module in self.module.modules():
            if isinstance(module, nn.EmbeddingBag):  # of which torch has first derivatives only
                module.forward = partial(_sum_bag, module)
            if isinstance(module, _WeightNorm):  # whose second derivatives are wrong in torch
                module.forward = partial(_scale_rows, module)
        self.values = self.recipe.via in {"hook", "argument"}
        self.shares, self.units = shares, units
        self.squares = self.recipe.loss == "pinball" or squares

    # ------------------------------------------------------------------ one example

    def outputs(self, n: int) -> Tensor:
        """Flattened outputs of one example, with their graph."""
        z = self.module.net(self.problem.parts(n)[0])
        return torch.cat([part.reshape(-1) for part in (z if isinstance(z, tuple) else (z,))])

    def loss(self, n: int, flat: Tensor) -> tuple[Tensor, float]:
        """Unnormalised loss of one example as a function of its outputs, and its weight."""
        x, t, w = self.problem.parts(n)
        with torch.no_grad():
            z = self.module.net(x)
        if isinstance(z, tuple):
            sizes = [part.numel() for part in z]
            z = tuple(p.reshape(q.shape[1:]) for p, q in zip(flat.split(sizes), z, strict=True))
        else:
            z = flat.reshape(z.shape[1:])
        value, weight = self.kind.example(self.problem.settings, z, t, w)
        weight = float(weight)
        if self.recipe.step == "surrogate":
            first = z[0] if isinstance(z, tuple) else z
            term = surrogate(first[None])[0]
            value = value + weight * (term - term.detach()) / self.recipe.factor
        if self.units or self.values or not (self.kind.named or self.shares):  # known as means of examples
            return self.recipe.factor * value / weight, 1.0
        return self.recipe.factor * value, weight

    def _flat_gradient(self, value: Tensor) -> Tensor:
        grads = torch.autograd.grad(
            value, self.flat, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        return torch.cat([g.reshape(-1) for g in grads])

    def gradient(self, n: int) -> Tensor:
        return self._flat_gradient(self.loss(n, self.outputs(n))[0])

    def jacobian(self, n: int) -> Tensor:
        return torch.stack([self._flat_gradient(entry) for entry in self.outputs(n)])

    def bend(self, n: int) -> Tensor:
        """Curvature of one example's loss in its outputs, unnormalised."""
        z = self.outputs(n).detach()
        if self.kind.bend is not None and not self.squares:
            _, t, _ = self.problem.parts(n)
            return self.recipe.factor * self.kind.bend(self.problem.settings, z, t)
        H = torch.autograd.functional.hessian(lambda flat: self.loss(n, flat)[0], z)
        if self.squares:  # no curvature of its own
            z = z.requires_grad_()
            g = torch.autograd.grad(self.loss(n, z)[0], z)[0]
            return g[:, None] * g
        values, vectors = torch.linalg.eigh((H + H.T) / 2)
        return vectors @ torch.diag(values.clamp_min(0)) @ vectors.T

    # ------------------------------------------------------------------ all of them

    def _factors(self, indices: list[int], size: int) -> tuple[list[float], float]:
        """What each example's unnormalised loss is multiplied with, and the mean weight that goes with it."""
        weights = [self.loss(n, self.outputs(n).detach())[1] for n in indices]
        if not self.shares:
            return [1.0] * len(indices), sum(weights) / len(weights)
        factors = []
        for start in range(0, len(indices), size):
            batch = weights[start : start + size]
            factors += [len(batch) / sum(batch)] * len(batch)
        return factors, 1.0

    def weighs_the_same(self) -> bool:
        """Whether all examples, and all queries, have one weight."""
        weights = {self.loss(n, self.outputs(n).detach())[1] for n in (*self.train, *self.query)}
        return len(weights) == 1

    @cached_property
    def wbar(self) -> float:
        return self._factors(self.train, self.recipe.batch)[1]

    @cached_property
    def train_gradients(self) -> Tensor:
        factors, wbar = self._factors(self.train, self.recipe.batch)
        return torch.stack([f * self.gradient(n) for n, f in zip(self.train, factors, strict=True)]) / wbar

    @cached_property
    def query_gradients(self) -> Tensor:
        measured = self.recipe.measurement
        if measured in {None, "loss"}:
            factors, _ = self._factors(self.query, self.recipe.query_batch)
            rows = [f * self.gradient(n) for n, f in zip(self.query, factors, strict=True)]
            return torch.stack(rows) / self.wbar
        if measured == "function":
            items = [self.problem.queries().collate_fn([self.problem.item(n)]) for n in self.query]
            return torch.stack([self._flat_gradient(squares(self.module, item).sum()) for item in items])
        return torch.stack([self._flat_gradient(self._labelled(n, measured)) for n in self.query])

    def _labelled(self, n: int, measured: str) -> Tensor:
        """Sum over counted positions of the true output, or of its log-odds."""
        _, t, w = self.problem.parts(n)
        if self.kind.uses_weights and w.dtype == torch.bool:
            t = torch.where(w, t, IGNORED)
        z = self.outputs(n).reshape(*t.shape, -1)
        z = z.log_softmax(-1) if self.recipe.loss == "nll" else z  # what the loss takes for outputs
        total = z.sum() * 0
        for row, label in zip(z.reshape(-1, z.shape[-1]), t.reshape(-1).tolist(), strict=True):
            if label >= 0:
                others = torch.cat([row[:label], row[label + 1 :]])
                total = total + row[label] - (others.logsumexp(0) if measured == "margin" else 0)
        return total

    @cached_property
    def ggn(self) -> Tensor:
        factors, wbar = self._factors(self.train, self.recipe.batch)
        total = 0
        for n, f in zip(self.train, factors, strict=True):
            J = self.jacobian(n)
            total = total + f * J.T @ self.bend(n) @ J
        return total / (wbar * len(self.train))

    @cached_property
    def empirical(self) -> Tensor:
        """Gradients before the division by the mean weight, whose squares have it once."""
        rows = self.train_gradients
        return self.wbar * rows.T @ rows / len(rows)

    @cached_property
    def hessian(self) -> Tensor:
        factors, wbar = self._factors(self.train, self.recipe.batch)
        total = sum(
            f * self.loss(n, self.outputs(n))[0] for n, f in zip(self.train, factors, strict=True)
        ) / (wbar * len(self.train))
        grads = torch.autograd.grad(
            total, self.flat, create_graph=True, allow_unused=True, materialize_grads=True
        )
        flat = torch.cat([g.reshape(-1) for g in grads])
        if not flat.requires_grad:
            return torch.zeros(len(flat), len(flat), dtype=flat.dtype)
        return torch.stack([self._flat_gradient(entry) for entry in flat])

    def owners(self, tensors: bool) -> Tensor:
        """Number of the block that each coordinate is in."""
        sizes = [[p.numel() for p in own] for own in self.parameters.values()]
        sizes = [[size] for own in sizes for size in own] if tensors else sizes
        return torch.arange(len(sizes)).repeat_interleave(torch.tensor([sum(own) for own in sizes]))

    def curvature(self, factors: Any = None) -> Tensor:
        """The matrix that a method inverts."""
        method, options = self.recipe.method, self.recipe.options
        if options.get("curvature") == "hessian":
            return self.hessian
        if method == "hessian":
            values, vectors = torch.linalg.eigh(self.hessian)
            how = options["negative_curvature"]
            values = values.abs() if how == "absolute" else values.clamp_min(0)
            return vectors @ torch.diag(values) @ vectors.T
        G = self.empirical if options.get("fisher") == "empirical" else self.ggn
        if method == "block_ggn":
            owner = self.owners(options["blocks"] == "tensor")
            return torch.where(owner[:, None] == owner, G, 0)
        if method == "diagonal":
            return torch.diag(torch.diag(G))
        return self.kronecker(method) if method in {"kfac", "ekfac"} else G

    def damped(self, damping: Mapping[str, float]) -> Tensor:
        H = self.curvature()
        sizes = torch.tensor([sum(p.numel() for p in own) for own in self.parameters.values()])
        values = torch.tensor([damping[name] for name in self.parameters], dtype=torch.float64)
        return H + torch.diag(values.repeat_interleave(sizes))

    def solutions(self, damping: Mapping[str, float], vectors: Tensor) -> Tensor:
        if self.recipe.method == "identity":
            return vectors
        system = self.damped(damping)
        if float(torch.linalg.eigvalsh(system).abs().min()) <= 1e-9 * float(system.abs().max()):
            raise UndeterminedError
        return torch.linalg.solve(system, vectors.T).T

    def scores(self, damping: Mapping[str, float]) -> Tensor:
        return self.solutions(damping, self.query_gradients) @ self.train_gradients.T / len(self.train)

    def self_influence(self, damping: Mapping[str, float]) -> Tensor:
        rows = self.train_gradients
        return (self.solutions(damping, rows) * rows).sum(1) / len(rows)

    # ------------------------------------------------------------------ Kronecker

    def kronecker(self, method: str) -> Tensor:
        """K-FAC's or EK-FAC's matrix over the parameters in their own order."""
        blocks = []
        modules = dict(self.module.named_modules())
        if any(name not in modules and own[0].numel() > 1024 for name, own in self.parameters.items()):
            raise UndeterminedError
        single = {
            name: self._second_moment(own) for name, own in self.parameters.items() if name not in modules
        }
        data = {name: () if name in single else self._statistics(name) for name in self.parameters}
        for name, statistics in data.items():
            if name in single:
                blocks.append(single[name])
                continue
            inputs, outputs, gradients = statistics
            layer = self.module.get_submodule(name)
            A = torch.einsum("nrgi,nrgj->gij", inputs, inputs) / (inputs.shape[0] * inputs.shape[1])
            S = torch.einsum("nkrgd,nkrge->gde", outputs, outputs) / len(outputs)
            parts = []
            for group in range(len(A)):
                if method == "kfac":
                    parts.append(torch.kron(S[group], A[group]))
                    continue
                QS, QA = _basis(S[group]), _basis(A[group])
                rotated = QS.T @ gradients[:, :, group] @ QA
                Q = torch.kron(QS, QA)
                parts.append(Q @ torch.diag(rotated.square().sum((0, 1)).reshape(-1) / len(inputs)) @ Q.T)
            block = torch.block_diag(*parts)
            blocks.append(
                _to_parameter_order(block, layer, layer.bias is not None and layer.bias.requires_grad)
            )
        return torch.block_diag(*blocks)

    def _seeds(self, n: int, z: Tensor, factor: float, wbar: float) -> Tensor:
        """Gradients at the outputs whose squares sum to the curvature there, one a row."""
        if self.recipe.options.get("fisher") == "empirical":
            seed = torch.autograd.grad(self.loss(n, z)[0], z, retain_graph=True)[0][None]
            return factor * wbar**-0.5 * seed
        values, vectors = torch.linalg.eigh(factor * self.bend(n) / wbar)
        return (vectors * values.clamp_min(0).sqrt()).T

    def _second_moment(self, own: list[nn.Parameter]) -> Tensor:
        """The block of the Gauss-Newton matrix of a parameter that no layer holds."""
        factors, wbar = self._factors(self.train, self.recipe.batch)
        total = torch.zeros(own[0].numel(), own[0].numel(), dtype=own[0].dtype)
        for n, factor in zip(self.train, factors, strict=True):
            z = self.outputs(n)
            for seed in self._seeds(n, z, factor, wbar):
                [row] = torch.autograd.grad(
                    z, own, seed, retain_graph=True, allow_unused=True, materialize_grads=True
                )
                total += torch.outer(row.reshape(-1), row.reshape(-1))
        return total / len(self.train)

    def _statistics(self, name: str) -> tuple[Tensor, Tensor, Tensor]:
        """Inputs `(N, R, G, D_in)`, their outputs' and their own gradients, with `K` seeds an example."""
        layer = self.module.get_submodule(name)
        factors, wbar = self._factors(self.train, self.recipe.batch)
        inputs, outputs = [], []
        for n, factor in zip(self.train, factors, strict=True):
            calls: list[tuple[Tensor, Tensor]] = []
            with layer.register_forward_hook(
                lambda _, args, out, calls=calls: calls.append((args[0].clone(), out))
            ):
                z = self._hooked_outputs(n, layer, calls)
            seeds = self._seeds(n, z, factor, wbar)
            made = [out for _, out in calls]
            rows = [
                torch.autograd.grad(
                    z, made, seed, retain_graph=True, allow_unused=True, materialize_grads=True
                )
                for seed in seeds
            ]
            stacked = [torch.stack([row[call] for row in rows]) for call in range(len(made))]
            outputs.append(torch.cat([oracle.output_positions(layer, ds) for ds in stacked], 1))
            inputs.append(torch.cat([oracle.input_positions(layer, a.detach()) for a, _ in calls]))
        abar, ds = torch.stack(inputs), torch.stack(outputs)
        if layer.bias is not None and not layer.bias.requires_grad:
            abar = abar[..., :-1]
        return abar, ds, torch.einsum("nkrgd,nrgi->nkgdi", ds, abar)

    def _hooked_outputs(self, n: int, layer: nn.Module, calls: list[Any]) -> Tensor:
        """Outputs of one example; what the layer returned is kept from operations in place."""
        with layer.register_forward_hook(lambda _, args, out: out.clone()):
            return self.outputs(n)


def _sum_bag(bag: nn.EmbeddingBag, words: Tensor) -> Tensor:
    """Embed each bag of words as a sum, or mean, of rows of the table."""
    rows = bag.weight[words]
    return rows.sum(1) if bag.mode == "sum" else rows.mean(1)


def _scale_rows(norm: _WeightNorm, gains: Tensor, rows: Tensor) -> Tensor:
    """Give the rows of a matrix the lengths of the gains."""
    assert norm.dim == 0
    return rows * gains / rows.square().sum(1, keepdim=True).sqrt()


def _basis(matrix: Tensor) -> Tensor:
    """Eigenvectors, where those that matter are unique."""
    values, vectors = torch.linalg.eigh(matrix)
    largest = float(values[-1])
    kept = values[values > 1e-10 * largest]
    if len(kept) > 1 and bool((kept.diff() < 1e-5 * largest).any()):
        raise UndeterminedError
    return vectors


def _to_parameter_order(block: Tensor, layer: nn.Module, has_bias: bool) -> Tensor:
    """From rows `[weight, bias]` of each output to all of the weight and then all of the bias."""
    rows = layer.weight.shape[0]
    place = torch.arange(len(block)).reshape(rows, -1)
    order = torch.cat([place[:, :-1].reshape(-1), place[:, -1]]) if has_bias else place.reshape(-1)
    return block[order][:, order]
