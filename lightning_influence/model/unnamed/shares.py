"""Numbers that a loss makes of all examples, as the mean of a term, and the share of each example in them.

Where the loss is linear in these numbers ``M_k = sum_n m_kn``, with factors that parameters make, as in
``sum_k exp(-s_k) M_k``, what each example adds to its gradient in the parameters is known by the shares.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.overrides import TorchFunctionMode

from lightning_influence.model.losses.registry import find_losses, parse
from lightning_influence.model.unnamed.last_outputs import Share
from lightning_influence.model.uses.places import Place
from lightning_influence.support.errors import LossCaptureError

_MEANS: set[Callable[..., Any]] = {torch.mean, Tensor.mean}
_SUMS: set[Callable[..., Any]] = {torch.sum, Tensor.sum}


class ShareWatch(TorchFunctionMode):
    """Records sums, means and loss functions over the examples, for the duration of a ``with`` block.

    Args:
        num_examples: ``B``.
        place_of: tells where the examples stand in a tensor.

    Attributes:
        shares: what was recorded.
    """

    def __init__(self, num_examples: int, place_of: Callable[[Tensor], Place | None]) -> None:
        super().__init__()
        self.shares: list[Share] = []
        self._num_examples, self._place_of = num_examples, place_of
        self._losses = find_losses()

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run the function; note what the examples add to a result that they share.

        Returns:
            What the function returns.
        """
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        is_known = func in _MEANS or func in _SUMS or func in self._losses
        if is_known and isinstance(result, Tensor) and result.requires_grad:
            with torch._C.DisableTorchFunction(), torch.no_grad():
                values = None if self._place_of(result) else self._split(func, args, kwargs, result)
                if values is not None:
                    with torch.enable_grad():
                        self.shares.append(Share(get_gradient_edge(result), values))
        return result

    def _split(
        self, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], result: Tensor
    ) -> Tensor | None:
        """Return what each example adds to a result, ``(B, *shape)``; None where that is not known."""
        if func in self._losses:
            return self._split_loss(func, args, kwargs, result)
        tensor = args[0] if args else kwargs.get("input")
        place = self._place_of(tensor) if isinstance(tensor, Tensor) else None
        if tensor is None or place is None or place.dim is None:
            return None
        given = kwargs.get("dim", args[1] if len(args) > 1 else None)
        dims = range(tensor.ndim) if given is None else [given] if isinstance(given, int) else given
        own = sorted({dim % tensor.ndim for dim in dims} or range(tensor.ndim))
        keeps = bool(kwargs.get("keepdim", args[2] if len(args) > 2 else False))
        split = place.split(tensor, self._num_examples)
        total = split.sum([dim + 1 for dim in own], keepdim=keeps)
        count = tensor.numel() / max(1, result.numel())
        return (total / count if func in _MEANS else total).to(result.dtype)

    def _split_loss(
        self, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], result: Tensor
    ) -> Tensor | None:
        try:
            loss = replace(parse(func, args, kwargs), num_examples=self._num_examples)
        except LossCaptureError:
            return None
        place = self._place_of(next(part for part in (*args, *kwargs.values()) if isinstance(part, Tensor)))
        if result.dim() or place is None or not place.is_plain():
            return None
        return (loss.per_example() * loss.share()).to(result.dtype)
