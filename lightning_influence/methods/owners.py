"""Layers owned by one process each: their factors, bases and solved queries are nowhere else.

Where the parameters are sharded, no process should hold what takes several times as much for all layers.
Gradients of a batch go to the owners of their layers, and what these make of them comes back, a term of a sum
over the owners. Processes need not be at the same batch, nor have as many: see :class:`~.passes.Exchange`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor

from lightning_influence.curvature.eigenbases import share_out
from lightning_influence.methods.scoring_passes import LayeredScorer
from lightning_influence.model.layers.gradients import DenseGradients, FactoredGradients, LayerGradients
from lightning_influence.model.layers.plan import LayerPlan
from lightning_influence.model.layers.table_gradients import TableGradients
from lightning_influence.support.passes import Exchange, Parcel, Passes

Gradients = Mapping[str, LayerGradients]


class Owners:
    """Who owns which layer.

    Args:
        runner: knows the processes.
        exchange: lets them work together in mid-pass.
        plan: the covered layers.

    Attributes:
        own: names of this process's layers, in the order of the plan.
    """

    def __init__(self, runner: Passes, exchange: Exchange, plan: LayerPlan) -> None:
        self._names, self._exchange, self._runner = list(plan.layers), exchange, runner
        costs = {name: float(_count_cost(layer.shape)) for name, layer in plan.layers.items()}
        self._owners = share_out(costs, runner.world_size)
        self.own = [name for name in plan.layers if self._owners[name] == runner.rank]

    def hand_over(self, gradients: Gradients) -> list[dict[str, LayerGradients]]:
        """Send gradients to the owners of their layers.

        Args:
            gradients: of a batch of this process, by layer; none to help others.

        Returns:
            Gradients of this process's layers from a batch of each process.
        """
        self._exchange.join()
        return [found for _, found in self._send(gradients, None)]

    def ask(
        self, gradients: Gradients, note: Any, answer: Callable[[Any, Gradients], Mapping[str, Tensor]]
    ) -> dict[str, Tensor]:
        """Let the owners of layers compute something of gradients.

        Args:
            gradients: of a batch of this process; none to help others.
            note: primitives for ``answer``.
            answer: maps the note and gradients of its own layers to named tensors.

        Returns:
            The sums over the owners of the tensors of each name.
        """
        self._exchange.join()
        failure: Exception | None = None
        answers: list[Parcel] = []
        try:
            for asked, found in self._send(gradients, note):
                told = answer(asked, found) if found else {}
                answers.append(Parcel(list(told), list(told.values())))
        except Exception as error:
            failure, answers = error, [Parcel([], [])] * self._runner.world_size
        sums: dict[str, Tensor] = {}
        for parcel in self._exchange.swap(answers, failure):
            for name, tensor in zip(parcel.note, parcel.tensors, strict=True):
                sums[name] = sums[name] + tensor if name in sums else tensor
        return sums

    def merge(self, values: Mapping[str, float]) -> dict[str, float]:
        """Return the numbers of all layers, of which each owner has its own."""
        found = torch.tensor([values.get(name, 0.0) if name in self.own else 0.0 for name in self._names])
        known = torch.tensor([float(name in self.own and name in values) for name in self._names])
        found = self._runner.all_reduce_sum(found.double())
        known = self._runner.all_reduce_sum(known)
        pairs = zip(self._names, found.tolist(), known.tolist(), strict=True)
        return {name: value for name, value, is_known in pairs if is_known}

    def _send(self, gradients: Gradients, note: Any) -> list[tuple[Any, dict[str, LayerGradients]]]:
        outgoing = []
        for rank in range(self._runner.world_size):
            theirs = {name: layer for name, layer in gradients.items() if self._owners[name] == rank}
            packed = {name: _pack(layer) for name, layer in theirs.items()}
            forms = [(name, kind, len(tensors)) for name, (kind, tensors) in packed.items()]
            outgoing.append(Parcel((note, forms), [t for _, tensors in packed.values() for t in tensors]))
        found = []
        for parcel in self._exchange.swap(outgoing):
            (asked, forms), tensors = parcel.note, iter(parcel.tensors)
            layers = {name: _unpack(kind, [next(tensors) for _ in range(n)]) for name, kind, n in forms}
            found.append((asked, layers))
        return found


class OwnedScorer:
    """A scorer of which each process has the part of its own layers.

    Args:
        owners: of the layers.
        scorer: this process's part.
        names: layers in which the queries of this part have gradients.
    """

    def __init__(self, owners: Owners, scorer: LayeredScorer, names: Collection[str]) -> None:
        self._owners, self._scorer, self._names = owners, scorer, names

    def __call__(self, gradients: Gradients) -> Tensor:
        """Return inner products ``(Q, B)``."""
        return self._owners.ask(gradients, False, self._answer)[""]

    def by_layer(self, gradients: Gradients) -> dict[str, Tensor]:
        """Return what each layer adds to the inner products, ``(Q, B)`` by name."""
        return self._owners.ask(gradients, True, self._answer)

    def help(self) -> None:
        """Take part in what other processes ask."""
        self._owners.ask({}, False, self._answer)

    def _answer(self, by_layer: bool, gradients: Gradients) -> Mapping[str, Tensor]:
        known = {name: layer for name, layer in gradients.items() if name in self._names}
        if not known:
            return {}
        return self._scorer.by_layer(known) if by_layer else {"": self._scorer(known)}


class OwnedQuadratic:
    """A quadratic of which each process has the part of its own layers.

    Args:
        owners: of the layers.
        quadratic: this process's part, without residuals.
    """

    def __init__(self, owners: Owners, quadratic: Callable[[Gradients], Tensor]) -> None:
        self._owners, self._quadratic = owners, quadratic

    def __call__(self, gradients: Gradients) -> Tensor:
        """Return ``g^T (.)^{-1} g``, ``(B,)``."""
        return self._owners.ask(gradients, None, self._answer)[""]

    def help(self) -> None:
        """Take part in what other processes ask."""
        self._owners.ask({}, None, self._answer)

    def _answer(self, _: Any, gradients: Gradients) -> Mapping[str, Tensor]:
        return {"": self._quadratic(gradients)}


def _count_cost(shape: tuple[int, int, int]) -> int:
    """Return what a layer weighs: the numbers of its factors, bases and eigenvalues."""
    groups, d_out, d_in = shape
    return groups * (2 * d_out**2 + 2 * d_in**2) + prod(shape)


def _pack(gradients: LayerGradients) -> tuple[str, list[Tensor]]:
    """Return gradients as the name of a form and tensors."""
    if isinstance(gradients, TableGradients):
        products = gradients.products
        return "table", [gradients.rows, gradients.values, products.inputs, products.outputs]
    if isinstance(gradients, FactoredGradients):
        return "factored", [gradients.inputs, gradients.outputs]
    return "dense", [gradients.dense()]


def _unpack(kind: str, tensors: list[Tensor]) -> LayerGradients:
    if kind == "table":
        return TableGradients(tensors[0], tensors[1], FactoredGradients(tensors[2], tensors[3]))
    if kind == "dense":
        return DenseGradients(tensors[0])
    return FactoredGradients(tensors[0], tensors[1])
