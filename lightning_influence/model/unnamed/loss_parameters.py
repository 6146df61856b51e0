"""Parameters that the loss uses beside the outputs of modules, and its gradients in them by example.

A loss without a name is a function of the last outputs and of such parameters. Their gradient is one sum over
the batch. The operations that use them tell which part of it is whose, as they do in the network. What the
loss adds to each batch alike, as the logarithm of a variance, is shared equally. Where operations do not
tell, each example is run alone.

Parts of the first batch are the certificate: the gradient of a part's own loss is the sum over the part.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from lightning_influence.model.layers.layer import BIAS, WEIGHT
from lightning_influence.model.losses.batch import BatchLoss, BatchLossTraits
from lightning_influence.model.losses.shared import JointLoss, SharedLoss
from lightning_influence.model.unnamed.last_outputs import CutLoss, Share
from lightning_influence.model.uses.gradients import (
    differentiate_batch,
    edges_of,
    gather_passes,
    names_of,
    pull_uses,
)
from lightning_influence.support.errors import UnsupportedModelError
from lightning_influence.support.notes import Notices

_COVERED, _ALONE, _LEFT_OUT = "the loss uses ", "the loss of each example alone uses ", "the loss alone uses "

_CHANGED = (
    "The loss uses parameter {name!r} beside the outputs of modules, and its gradients for single examples "
    "do not add up to that of this batch, as they did in the first one. Leave it out with "
    "layers=['!{layer}']."
)
_NOT_HAD = (
    "The loss uses {names} beside the outputs of modules, and gradients by it for single examples cannot be "
    "had, so it is left out. To cover it, define `influence_loss(batch) -> (B,)` on the module, or let a "
    "module that owns it return it with a row for each example, such as `self.scale.expand_as(outputs)`."
)
_INSIDE = (
    "The loss uses {name!r} beside the outputs of modules, which depend on it as well, and its gradients for "
    "single examples cannot be had. Leave it out with layers=['!{layer}']."
)
_COMPLEX = (
    "The loss uses complex parameter {name!r} beside the outputs of modules. Accepted are real ones: hold "
    "it as torch.view_as_real(...) and read it with torch.view_as_complex, or leave it out with "
    "layers=['!{layer}']."
)
_PENALISED = (
    "The loss uses {name!r} beside the outputs of modules, which depend on it as well, and adds what is the "
    "same for all data, as a penalty on it: of that it is not known whether it belongs to the examples' "
    "losses. Leave penalties to the optimizer (`weight_decay=`), define `influence_loss(batch) -> (B,)` on "
    "the module, or leave the layer out with layers=['!{layer}']."
)


@dataclass(frozen=True)
class PartGradients:
    """What the loss of a part of a batch says.

    Attributes:
        numbers: of the examples in it.
        ratio: by what their gradients in the whole batch are multiplied there.
        direct: the gradient of the part's loss in parameters that it uses itself, by name.
    """

    numbers: Sequence[int]
    ratio: float
    direct: Mapping[str, Tensor]


def find_direct(value: Tensor, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return gradients of a loss in parameters that it depends on, which do not pass through its leaves."""
    if not value.requires_grad:
        return {}
    found = torch.autograd.grad(value, list(parameters.values()), retain_graph=True, allow_unused=True)
    return {name: grad.to_dense() for name, grad in zip(parameters, found, strict=True) if grad is not None}


@dataclass
class _Rows:
    """Gradients of one parameter.

    Attributes:
        own: what each example adds to the gradient of the batch's loss, ``(B, *shape)``.
        constant: what is added to that of each batch alike, of the parameter's shape.
    """

    own: Tensor
    constant: Tensor

    def fits(self, parts: Sequence[PartGradients], name: str, limit: float) -> bool:
        """Return whether the gradients of parts are the sums over them."""
        for part in parts:
            own = self.own[list(part.numbers)]
            direct = part.direct.get(name, torch.zeros_like(self.constant))
            error = part.ratio * own.sum(0) + self.constant - direct
            if not bool(error.norm() <= limit * (part.ratio * _bound(own) + self.constant.norm())):
                return False
        return True

    def has_constant(self, other: Tensor, limit: float) -> bool:
        """Return whether what is added to each batch is what it was in another one."""
        return bool((self.constant - other).norm() <= limit * (_bound(self.own) + other.norm()))

    def differ(self, limit: float) -> bool:
        """Return whether the gradients of the examples are not all the same."""
        return _bound(self.own - self.own.mean(0)) > limit * _bound(self.own)


def find_covered(verified: Collection[str]) -> list[str]:
    """Return the names of the parameters that the loss was found to use itself, of what passes verified."""
    return [text.removeprefix(_COVERED) for text in sorted(verified) if text.startswith(_COVERED)]


class LossParameters:
    """Finds the parameters that a loss uses itself, and remembers how their gradients are had.

    Args:
        verified: what passes have found in order; completed here.

    Attributes:
        names: of those that are covered.
        left_out: names of those of which no gradients can be had.
    """

    def __init__(self, verified: set[str]) -> None:
        self._verified = verified
        self.names = find_covered(verified)
        self.left_out = {text.removeprefix(_LEFT_OUT) for text in verified if text.startswith(_LEFT_OUT)}
        self._traits: dict[str, BatchLossTraits] = {}
        self._constants: dict[str, tuple[Tensor, Tensor]] = {}

    @property
    def silent(self) -> set[str]:
        """Names of the layers that are left out."""
        return {layer_of(name) for name in self.left_out}

    def settle(
        self,
        direct: Mapping[str, Tensor],
        parts: Sequence[PartGradients],
        limit: float,
        cut: Callable[[Collection[str]], CutLoss],
        alone: Callable[[], Sequence[PartGradients]] | None,
    ) -> None:
        """Find the parameters that the losses of single examples depend on, and how to have their gradients.

        Args:
            direct: the gradient of the first batch's loss in each parameter that it uses.
            parts: what parts of it say. Without any, gradients that differ between the examples are taken for
                right.
            limit: relative error.
            cut: runs the batch again, and follows some parameters.
            alone: runs the examples alone; None where that shows nothing.
        """
        names = [name for name in direct if any(_differs(part, name, direct, limit) for part in parts)]
        if not parts:
            found = self._pull(cut(list(direct)), list(direct))
            return self.cover([name for name, rows in found.items() if rows.differ(limit)])
        found = self._pull(cut(names), names) if names else {}
        failed = [name for name in names if not found[name].fits(parts, name, limit)]
        if failed and alone is not None:
            others = self._run_alone(alone(), direct, failed)
            right = [name for name, rows in others.items() if rows.fits(parts, name, limit)]
            self._verified |= {_ALONE + name for name in right}
            failed = [name for name in failed if name not in right]
        self.cover([name for name in names if name not in failed])
        self.leave_out(failed)

    def settle_noise(
        self,
        direct: Mapping[str, Tensor],
        first: Callable[[Collection[str]], CutLoss],
        second: CutLoss,
        limit: float,
    ) -> None:
        """Find parameters of a loss that draws noise, of which no part of a batch says anything.

        What is added to each batch alike must be the same in two draws.

        Args:
            direct: as for :meth:`settle`.
            first: as ``cut`` there.
            second: another draw of the batch, which follows the parameters.
            limit: relative error.
        """
        assert second.watch is not None
        again = PartGradients((), 1.0, find_direct(second.value, second.watch.parameters))
        names = [name for name in direct if _differs(again, name, direct, limit)]
        one, other = self._pull(first(names), names), self._pull(second, names)
        covered = [name for name in names if one[name].has_constant(other[name].constant, limit)]
        self.cover(covered)
        self.leave_out([name for name in names if name not in covered])

    def cover_given(self, direct: Mapping[str, Tensor], whole: Mapping[str, Tensor]) -> None:
        """Cover the parameters that given losses of the examples use, and no outputs depend on.

        Args:
            direct: the gradient of their mean in each parameter that they use.
            whole: the same, through the outputs as well.
        """
        self.cover([name for name in direct if not _is_inside(whole.get(name), direct[name])])

    def cover_one(self, cut: CutLoss, parameters: Mapping[str, Tensor]) -> None:
        """Cover the parameters whose gradient depends on the outputs for a single example.

        Args:
            cut: a batch of one.
            parameters: by name.
        """
        if not cut.value.requires_grad:
            return
        leaves = list(parameters.values())
        grads = torch.autograd.grad(cut.value, leaves, create_graph=True, allow_unused=True)
        for name, grad in zip(parameters, grads, strict=True):
            if grad is not None and grad.requires_grad:
                probe = torch.randn(grad.shape, generator=torch.Generator().manual_seed(0)).to(grad)
                bent = torch.autograd.grad(grad, cut.leaves, probe, retain_graph=True, allow_unused=True)
                if any(part is not None and bool(part.any()) for part in bent):
                    self.cover([name])

    def check_left_out(self, direct: Mapping[str, Tensor], whole: Mapping[str, Tensor]) -> None:
        """Refuse parameters that are left out, and that the outputs depend on.

        Args:
            direct: as for :meth:`cover_given`.
            whole: as there.

        Raises:
            UnsupportedModelError: if there is one.
        """
        for name in self.left_out:
            if name in direct and _is_inside(whole.get(name), direct[name]):
                raise UnsupportedModelError(_INSIDE.format(name=name, layer=layer_of(name)))

    def cover(self, names: Sequence[str]) -> None:
        """Take parameters for covered ones."""
        self.names = sorted({*self.names, *names})
        self._verified |= {_COVERED + name for name in names}

    def leave_out(self, names: Sequence[str]) -> None:
        """Leave parameters out, and say so."""
        if names:
            self.left_out |= set(names)
            self.names = [name for name in self.names if name not in names]
            self._verified |= {_LEFT_OUT + name for name in names}
            Notices()(_NOT_HAD.format(names=", ".join(map(repr, names))))

    def join(
        self,
        loss: BatchLoss,
        cut: CutLoss,
        parameters: Mapping[str, Tensor],
        spread: Mapping[str, Tensor],
        alone: Callable[[], Sequence[PartGradients]],
    ) -> JointLoss:
        """Return a loss with the parameters that it uses as outputs that all examples share.

        Args:
            loss: the loss as a function of the last outputs.
            cut: the same, computed from leaves.
            parameters: by name.
            spread: their rows, one for each example.
            alone: runs the examples alone.

        Raises:
            UnsupportedModelError: if the gradients of the examples do not make up the batch's, or a parameter
                is complex.
        """
        for name in self.names:
            if parameters[name].is_complex():
                raise UnsupportedModelError(_COMPLEX.format(name=name, layer=layer_of(name)))
        rows = self._differentiate(loss, cut, parameters, alone)
        terms = []
        for name in self.names:
            subject = f"parameter {name!r}"
            fresh = BatchLossTraits(subject=subject, entries=f"entries of {subject}")
            traits = self._traits.setdefault(name, fresh)
            traits.is_mean = loss.traits.is_mean
            own = SharedLoss.of_parameter(parameters[name], spread[name], rows[name], cut.value, traits)
            terms.append(own)
        return JointLoss.join(loss, terms)

    def _differentiate(
        self,
        loss: BatchLoss,
        cut: CutLoss,
        parameters: Mapping[str, Tensor],
        alone: Callable[[], Sequence[PartGradients]],
    ) -> dict[str, Tensor]:
        """Return the gradients of the examples' losses, ``(B, *shape)`` by name."""
        own = {name: parameters[name] for name in self.names}
        if cut.values is not None:
            return _differentiate_values(cut.values, own)
        if loss.num_examples == 1:  # its gradient is that of the example
            if cut.watch is not None:
                self._check_penalties(loss, self._pull(cut, self.names, beside_numbers=True), parameters)
            return {
                name: grad[None] * loss.factor
                for name, grad in _fill(find_direct(cut.value, own), own).items()
            }
        by_alone = [name for name in self.names if _ALONE + name in self._verified]
        found = self._pull(cut, [name for name in self.names if name not in by_alone])
        if by_alone:
            used = {name: parameters[name] for name in by_alone}
            direct = _fill(find_direct(cut.value, used), used)
            found |= self._run_alone(alone(), direct, by_alone)
        for name in self.names:
            self._compare_constant(name, found.get(name), parameters[name])
        self._check_penalties(loss, found, parameters)
        count = loss.num_examples
        return {name: (rows.own + rows.constant / count) * loss.factor for name, rows in found.items()}

    def _compare_constant(self, name: str, rows: _Rows | None, parameter: Tensor) -> None:
        """Refuse a batch in which the rest of the gradient is not what it was with the same parameter.

        Raises:
            UnsupportedModelError: if it is not.
        """
        if rows is not None:
            value = parameter.detach()
            known, constant = self._constants.get(name, (None, None))
            if known is None or constant is None or not torch.equal(known, value):
                self._constants[name] = value.clone(), rows.constant
                return
            if rows.has_constant(constant, _limit(value)):
                return
        raise UnsupportedModelError(_CHANGED.format(name=name, layer=layer_of(name)))

    def _check_penalties(
        self, loss: BatchLoss, rows: Mapping[str, _Rows], parameters: Mapping[str, Tensor]
    ) -> None:
        """Refuse parameters of the network of which the loss says something of its own for all data.

        Of those that the loss alone uses, as the logarithm of a variance, it is part of the examples' losses.

        Raises:
            UnsupportedModelError: if there is one.
        """
        odd = [
            name
            for name, found in rows.items()
            if not found.has_constant(torch.zeros_like(found.constant), _limit(found.constant))
        ]
        if not odd or not loss.outputs.requires_grad:
            return
        probe = torch.randn(loss.outputs.shape, generator=torch.Generator().manual_seed(0))
        leaves = [parameters[name] for name in odd]
        grads = torch.autograd.grad(
            loss.outputs, leaves, probe.to(loss.outputs), retain_graph=True, allow_unused=True
        )
        for name, grad in zip(odd, grads, strict=True):
            if grad is not None and bool(grad.to_dense().any()):
                raise UnsupportedModelError(_PENALISED.format(name=name, layer=layer_of(name)))

    def _pull(self, cut: CutLoss, names: Sequence[str], *, beside_numbers: bool = False) -> dict[str, _Rows]:
        """Return gradients from operations that use the parameters; what these do not tell is constant.

        Args:
            cut: the loss, which follows the parameters.
            names: of these.
            beside_numbers: whether what is added to a single number is constant: in a batch of one it belongs
                to the example as well.
        """
        if cut.watch is None or not names:
            return {}
        parameters = {name: cut.watch.parameters[name] for name in names}
        whole = _fill(find_direct(cut.value, parameters), parameters)
        uses = [
            use
            for use in cut.watch.uses
            if None not in use.outputs
            and names_of(cut.watch, use) & set(names)
            and (any(map(len, use.shapes)) or not beside_numbers)
        ]
        edges = edges_of(uses)
        grads = torch.autograd.grad(cut.value, edges, retain_graph=True, allow_unused=True) if edges else ()
        pulled = pull_uses(cut.watch, uses, gather_passes(uses, [grads]), 1).gradients
        shared = _pull_shares(cut.value, cut.shares, parameters)
        found = {}
        for name, total in whole.items():
            own = total.new_zeros(cut.watch.num_examples, *total.shape)
            own = own + (pulled[name].dense()[0] if name in pulled else 0) + shared.get(name, 0)
            found[name] = _Rows(own, total - own.sum(0))
        return found

    def _run_alone(
        self, singles: Sequence[PartGradients], direct: Mapping[str, Tensor], names: Sequence[str]
    ) -> dict[str, _Rows]:
        """Return gradients from the losses of the examples alone; nothing if these are not known."""
        found: dict[str, _Rows] = {}
        for name in names if singles else ():
            shares = direct[name].new_tensor([1 / single.ratio for single in singles])
            none = torch.zeros_like(direct[name])
            each = torch.stack([single.direct.get(name, none) for single in singles])
            total = torch.einsum("b,b...->...", shares, each)
            # Of a mean each example's loss has what is added to each batch as well.
            rest = 1 - shares.sum()
            constant = (direct[name] - total) / rest if abs(float(rest)) > 1e-3 else torch.zeros_like(total)
            own = (each - constant) * shares.view(-1, *[1] * constant.dim())
            found[name] = _Rows(own, direct[name] - own.sum(0))
        return found


def _pull_shares(
    value: Tensor, shares: Sequence[Share], parameters: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return what the factors of sums over the examples add to their gradients in parameters.

    Args:
        value: the loss, with its graph.
        shares: sums that it is made of.
        parameters: by name.

    Returns:
        ``(B, *shape)`` by name; nothing for a loss that is not linear in the sums.
    """
    edges = [share.edge for share in shares]
    if not edges:
        return {}
    slopes = torch.autograd.grad(value, edges, create_graph=True, allow_unused=True)
    bent = [
        (slope, share.values)
        for slope, share in zip(slopes, shares, strict=True)
        if slope is not None and slope.requires_grad
    ]
    if not bent:
        return {}
    sums = [slope.sum() for slope, _ in bent]
    others = torch.autograd.grad(sums, edges, retain_graph=True, allow_unused=True)
    if any(other is not None and bool(other.any()) for other in others):
        return {}
    found = differentiate_batch(
        [get_gradient_edge(slope) for slope, _ in bent],
        list(parameters.values()),
        [values for _, values in bent],
    )
    return {name: grad for name, grad in zip(parameters, found, strict=True) if grad is not None}


def _fill(grads: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return gradients of all parameters, zero where there is none."""
    return {name: grads.get(name, torch.zeros_like(p)) for name, p in parameters.items()}


def _is_inside(whole: Tensor | None, direct: Tensor) -> bool:
    """Return whether a gradient through the outputs and beside them is not that beside them alone."""
    return whole is not None and bool((whole - direct).norm() > _limit(direct) * direct.norm())


def _limit(values: Tensor) -> float:
    """Return up to which relative error gradients of parameters are the same."""
    return 1e-6 if values.dtype == torch.float64 else 1e-2


def _bound(rows: Tensor) -> float:
    """Return the sum of the norms of rows ``(B, *shape)``."""
    return float(rows.reshape(len(rows), -1).norm(dim=1).sum())


def layer_of(name: str) -> str:
    """Return the name of the layer of a parameter, which may be the weight or the bias of it."""
    return name.removeprefix(WEIGHT).removeprefix(BIAS)


def _differs(part: PartGradients, name: str, direct: Mapping[str, Tensor], limit: float) -> bool:
    """Return whether a part's gradient is another than the whole's: that of a penalty is not."""
    own = part.direct.get(name)
    if own is None:
        return bool(direct[name].any())
    return bool((own - direct[name]).norm() > limit * direct[name].norm())


def _differentiate_values(values: Tensor, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the gradients ``(B, *shape)`` of given values ``(B,)``."""
    leaves = list(parameters.values())
    each = [
        torch.autograd.grad(value, leaves, retain_graph=True, allow_unused=True, materialize_grads=True)
        for value in values
    ]
    columns = [torch.stack(column) for column in zip(*each, strict=True)]
    return dict(zip(parameters, columns, strict=True))
