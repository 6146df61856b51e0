"""Everything that a step may change in a module: put back after steps that are none of the training."""

from __future__ import annotations

import contextlib
import operator
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode

# References to the rest of the program, and what every module has and no step changes: hooks and submodules.
_NOT_STATE = {"_trainer", "_fabric", "trainer", *vars(nn.Module())} - {"_parameters", "_buffers"}
# A longer container, such as a vocabulary, is copied but its items are not looked into. Chosen by hand: above
# the number of losses or outputs that modules gather in an epoch, and no noticeable time to walk.
_MOST_ITEMS = 10_000

# Besides the methods whose names end with an underscore: `p.data = x`, `p[0] = x`, `p += x`.
_WRITERS = {"__set__", "__setitem__", *(f"__i{name}__" for name in ("add", "sub", "mul", "truediv", "pow"))}


@contextlib.contextmanager
def preserved_states(module: nn.Module, *, users_code: bool = True) -> Iterator[None]:
    """Put a module's state back on exit: what it was, in the same objects, whatever was run in between.

    This covers parameters (their values and ``.grad``), buffers, states of torchmetrics, and all attributes
    of the module and its submodules: numbers, tensors, lists, dicts and sets, and modules inside them that
    are not registered. Parameters are copied only when an operation is about to write to them.

    Args:
        module: the module.
        users_code: whether code of the user's runs that may write to parameters. To notice it costs about a
            microsecond for every torch function.
    """
    put_back = _PutBack()
    for part in module.modules():
        put_back.keep_module(part)
    guard = _WriteGuard(put_back.parameters) if users_code else None
    grads = [(p, p.grad) for p in put_back.parameters] if users_code else []
    for parameter, _ in grads:
        parameter.grad = None
    try:
        with guard or contextlib.nullcontext():
            yield
    finally:
        with torch.no_grad():
            for restore in reversed(put_back.actions):
                restore()
            if guard is not None:
                guard.restore()
        for parameter, grad in grads:
            parameter.grad = grad


_PLAIN = (bool, int, float, str)


class _PutBack:
    """Collects the actions that put state back."""

    def __init__(self) -> None:
        self.actions: list[Callable[[], None]] = []
        self.parameters: list[nn.Parameter] = []
        self._seen: set[int] = set()

    def keep_module(self, module: nn.Module) -> None:
        """Keep one module's attributes; its submodules only where they hang on it otherwise."""
        if id(module) in self._seen or isinstance(module, torch.jit.ScriptModule):
            return
        self._seen.add(id(module))
        attributes = vars(module)
        self.actions.append(_restore_mapping(attributes, dict(attributes)))
        for name in attributes.keys() - _NOT_STATE:
            value = attributes[name]
            if value is not None and not isinstance(value, _PLAIN):
                self._keep(value)

    def _keep(self, value: Any) -> None:
        if isinstance(value, nn.Parameter):
            if id(value) not in self._seen:
                self._seen.add(id(value))
                self.parameters.append(value)
        elif isinstance(value, Tensor):
            self._keep_tensor(value)
        elif isinstance(value, nn.Module):
            self.keep_module(value)
        elif isinstance(value, dict | list | set | deque | tuple) and id(value) not in self._seen:
            self._seen.add(id(value))
            if isinstance(value, dict):
                self.actions.append(_restore_mapping(value, dict(value)))
            elif not isinstance(value, tuple):
                self.actions.append(_restore_items(value, list(value)))
            items = value.values() if isinstance(value, dict) else value
            for item in list(items) if len(value) <= _MOST_ITEMS else ():
                self._keep(item)

    def _keep_tensor(self, tensor: Tensor) -> None:
        if id(tensor) in self._seen or tensor.is_meta or is_lazy(tensor):
            return
        self._seen.add(id(tensor))
        saved = tensor.detach().clone()

        def restore() -> None:
            # Writing what is there already would count as a change to autograd graphs of the user's.
            if not _is_equal(tensor, saved):
                tensor.detach().copy_(saved)

        self.actions.append(restore)


def _is_equal(tensor: Tensor, saved: Tensor) -> bool:
    if tensor.shape != saved.shape or tensor.layout != saved.layout:
        return False
    return tensor.layout == torch.strided and bool(torch.equal(tensor, saved.to(tensor.device, tensor.dtype)))


def _restore_mapping(mapping: dict[Any, Any], saved: dict[Any, Any]) -> Callable[[], None]:
    def restore() -> None:
        same = all(map(operator.is_, mapping.values(), saved.values()))
        if not same or list(mapping) != list(saved):
            mapping.clear()
            mapping.update(saved)

    return restore


def _restore_items(items: Any, saved: list[Any]) -> Callable[[], None]:
    def restore() -> None:
        if len(items) != len(saved) or any(a is not b for a, b in zip(items, saved, strict=True)):
            items.clear()
            (items.update if isinstance(items, set) else items.extend)(saved)

    return restore


class _WriteGuard(TorchFunctionMode):
    """Copies a watched parameter before an operation writes to its memory for the first time."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        super().__init__()
        self._watched: dict[int, list[nn.Parameter]] = {}
        self._saved: list[tuple[nn.Parameter, Tensor, Tensor]] = []
        for parameter in parameters:
            self.watch(parameter)

    def watch(self, parameter: nn.Parameter) -> None:
        """Take care of a parameter."""
        if not is_lazy(parameter):
            self._watched.setdefault(_memory_of(parameter), []).append(parameter)

    def restore(self) -> None:
        """Put back the values, and the memory that holds them unless the module has moved."""
        for parameter, data, saved in self._saved:
            moved = parameter.device != data.device or parameter.dtype != data.dtype
            if not moved and parameter.data_ptr() != data.data_ptr():
                parameter.data = data
            if not _is_equal(parameter.detach(), saved):
                parameter.detach().copy_(saved)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run the function, after copying the watched parameters that it writes to.

        Returns:
            What the function returns.
        """
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if torch.compiler.is_compiling():
            return func(*args, **kwargs)
        if name == "__set__" and _moves(*args[:2]):  # `Module.to`
            result = func(*args, **kwargs)
            if isinstance(args[0], nn.Parameter):
                self.watch(args[0])
            return result
        if name in _WRITERS or (name.endswith("_") and not name.endswith("__")):
            self._save(args[:1])
        if kwargs.get("out") is not None:
            self._save([kwargs["out"]])
        return func(*args, **kwargs)

    def _save(self, targets: Sequence[Any]) -> None:
        for target in targets:
            if isinstance(target, list | tuple):
                self._save(target)
            elif isinstance(target, Tensor) and target.layout == torch.strided:
                for parameter in self._watched.pop(_memory_of(target), ()):
                    data = parameter.data
                    self._saved.append((parameter, data, data.clone()))


def _moves(target: Any, value: Any) -> bool:
    """Return whether setting a tensor's data brings it to another device or precision."""
    tensors = isinstance(target, Tensor) and isinstance(value, Tensor)
    return tensors and (target.device != value.device or target.dtype != value.dtype)


def _memory_of(tensor: Tensor) -> int:
    with torch._C.DisableTorchFunction():
        return tensor.untyped_storage().data_ptr()
