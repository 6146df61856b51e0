"""A model as it has second derivatives: on kernels that have them, and have them right."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode


@contextlib.contextmanager
def differentiable_twice(module: nn.Module) -> Iterator[None]:
    """Run a forward pass of a module on kernels that have second derivatives.

    Fused attention and fused recurrent layers have first derivatives only, and the second ones of weight norm
    are wrong in torch; their plain counterparts compute the same function.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        if any(isinstance(part, nn.RNNBase) for part in module.modules()):
            # Other flags as they are: what their defaults would set, not all versions of torch put back.
            stack.enter_context(torch.backends.cudnn.flags(enabled=False, allow_tf32=None))
            mkldnn: Any = torch.backends.mkldnn  # which has that flag in newer versions
            kept = {"allow_tf32": None} if hasattr(mkldnn, "allow_tf32") else {}
            stack.enter_context(mkldnn.flags(enabled=False, **kept))
        stack.enter_context(_PlainFunctions())
        yield


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    return v * (g / torch.norm_except_dim(v, 2, dim))


def _hardsigmoid(input: Tensor, inplace: bool = False) -> Tensor:
    result = functional.relu6(input + 3) / 6
    return input.copy_(result) if inplace else result


# Up to 2.14 at least, the fused kernel of weight norm passes gradgradcheck in the gains only.
_PLAIN: Mapping[Callable[..., Any], Callable[..., Tensor]] = {
    torch._weight_norm: _weight_norm,
    functional.hardsigmoid: _hardsigmoid,
}


class _PlainFunctions(TorchFunctionMode):
    """Runs functions whose second derivatives torch lacks as others make them up."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run the function, or its plain counterpart.

        Returns:
            What the function returns.
        """
        function: Callable[..., Any] = _PLAIN.get(func, func)
        return function(*args, **(kwargs or {}))
