"""What running a training step can change in a module, held for the time of a pass and put back.

A training step is the user's code: it may update a moving average of the weights, count, append to lists, and
change buffers and metrics. A pass runs it for its loss alone, so all of that is undone.
"""

from __future__ import annotations

import functools
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils.data import DataLoader, Dataset, Sampler
from torchmetrics import Metric

from lightning_influence.running.host.packages import find_package
from lightning_influence.support.whole import is_stand_in, read_own_part

PutBack = Callable[[], None]
# Objects in objects are followed so far: a moving average in a helper object lies two levels down.
_DEPTH = 4
_NOT_FOLLOWED = (nn.Module, Dataset, DataLoader, Sampler)
_FOREIGN = ("torch", "numpy", "lightning", "pytorch_lightning", "torchmetrics", "builtins", "transformers")


class ModuleStates:
    """Parameters, buffers, metrics and plain attributes of a module and its submodules, as they are now.

    The copies take as much memory as the parameters and buffers do.

    Args:
        module: the user's module.
        parameters: whether to hold the parameters too.
    """

    def __init__(self, module: nn.Module, *, parameters: bool = True) -> None:
        parts = list(module.modules())
        # A step does not reach the values that a stand-in is filled with for the time of a call.
        own = [t for t in module.parameters() if parameters and not is_lazy(t) and not is_stand_in(t)]
        self._live = [read_own_part(t.data) for t in own]
        self._copies = [t.clone() for t in self._live]
        self._buffers = [(m, name, b.clone()) for m in parts for name, b in m.named_buffers(recurse=False)]
        self._metrics = [(m, _metric_state(m)) for m in parts if isinstance(m, Metric)]
        self._attributes = [_hold_attributes(m) for m in parts if not isinstance(m, Metric)]

    def have_weights_changed(self) -> bool:
        """Tell whether a parameter or a buffer is not what it was; NaN counts as unchanged where it stood."""
        buffers = [(getattr(owner, name, None), held) for owner, name, held in self._buffers]
        pairs = [*zip(self._live, self._copies, strict=True), *buffers]
        return any(now is None or not _equal(now, held) for now, held in pairs)

    def restore_weights(self) -> None:
        """Put parameters and buffers back, in the tensors that hold them now."""
        with torch.no_grad():
            for weight, held in zip(self._live, self._copies, strict=True):
                if not _equal(weight, held):
                    weight.copy_(held)
            for owner, name, held in self._buffers:
                now: Any = getattr(owner, name, None)
                if isinstance(now, Tensor) and now.shape == held.shape:
                    if not _equal(now, held):  # a write counts as a change to graphs that are still needed
                        now.copy_(held)
                else:
                    setattr(owner, name, held.clone())

    def restore(self) -> None:
        """Put everything back."""
        self.restore_weights()
        for metric, state in self._metrics:
            # The pass may have moved the module.
            vars(metric).update({name: _copy_value(value, metric.device) for name, value in state.items()})
        for put_back in self._attributes:
            put_back()


def _equal(one: Tensor, other: Tensor) -> bool:
    """Tell whether two tensors are the same to the bit, wherever they are."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    other = other.to(one.device)
    return torch.equal(one, other) or (
        one.is_floating_point() and torch.equal(one.nan_to_num(), other.nan_to_num())
    )


def _metric_state(metric: Metric) -> dict[str, object]:
    """Copy everything that a metric changes when it is updated or computed."""
    names = [*metric._defaults, "_update_count", "_computed", "_forward_cache"]
    return {name: _copy_value(vars(metric)[name]) for name in names if name in vars(metric)}


def _copy_value(value: object, device: torch.device | None = None) -> object:
    """Copy a metric's value, a tensor or a list of them as a rule."""
    if isinstance(value, Tensor):
        return value.to(device, copy=True)
    return [_copy_value(item, device) for item in value] if isinstance(value, list) else value


def _hold_attributes(module: nn.Module) -> PutBack:
    """Hold what a module's author keeps in plain attributes; the machinery of torch and Lightning is not."""
    machinery = _machinery(module)
    own = {name: value for name, value in vars(module).items() if name not in machinery}
    seen: set[int] = set()
    inside = _hold_all(own.values(), _DEPTH, seen)

    def put_back() -> None:
        for name in [name for name in vars(module) if name not in machinery and name not in own]:
            del vars(module)[name]
        vars(module).update(own)
        for undo in inside:
            undo()

    return put_back


def _machinery(module: nn.Module) -> frozenset[str]:
    """Name the attributes that torch's and Lightning's base classes set."""
    is_lightning = isinstance(getattr(module, "_fabric_optimizers", None), list)
    return _name_machinery(tuple(vars(module)), is_lightning)


@functools.lru_cache(maxsize=1024)  # modules of one kind have the same attributes, and a model has many
def _name_machinery(attributes: tuple[str, ...], is_lightning: bool) -> frozenset[str]:
    names = {"log", "log_dict", "training", "_compiled_call_impl", "_is_full_backward_hook"}
    own = {name for name in attributes if name.endswith(("_hooks", "_hooks_with_kwargs", "_always_called"))}
    known = {"_parameters", "_buffers", "_modules", "_non_persistent_buffers_set", "_backward_pre_hooks"}
    if is_lightning:
        known |= {"_trainer", "_fabric", "_fabric_optimizers", "_device", "_dtype", "_current_fx_name"}
        known |= {"_hparams", "_hparams_initial", "_hparams_name", "_jit_is_scripting", "_device_mesh"}
    return frozenset(names | own | known)


def _hold_all(values: Iterable[Any], depth: int, seen: set[int]) -> list[PutBack]:
    found = (_hold(value, depth, seen) for value in values)
    return [put_back for put_back in found if put_back is not None]


def _hold(value: Any, depth: int, seen: set[int]) -> PutBack | None:
    """Hold the content of a value that can change in place; None for all else."""
    if isinstance(value, (int, float, complex, str, bytes, type(None), type)) or id(value) in seen:
        return None
    seen.add(id(value))
    if isinstance(value, Tensor):
        return None if is_lazy(value) else _hold_tensor(value)
    if isinstance(value, np.ndarray):
        copy = value.copy()
        return lambda: np.copyto(value, copy)
    if depth == 0 or isinstance(value, _NOT_FOLLOWED) or find_package(value) is not None:
        return None
    if isinstance(value, tuple):
        return _join(_hold_all(value, depth - 1, seen))
    if type(value) in (list, deque, set, dict, OrderedDict, defaultdict):
        return _hold_container(value, depth, seen)
    plain = type(value).__module__.split(".")[0] not in _FOREIGN and not callable(value)
    if plain and isinstance(getattr(value, "__dict__", None), dict):
        return _hold_container(vars(value), depth, seen)
    return None


def _hold_tensor(value: Tensor) -> PutBack:
    data = read_own_part(value.data)
    copy = data.clone()

    def put_back() -> None:
        if not _equal(data, copy):
            data.copy_(copy)

    return put_back


def _hold_container(value: Any, depth: int, seen: set[int]) -> PutBack:
    mapping = isinstance(value, dict)
    items = dict(value) if mapping else list(value)
    inside = _hold_all(items.values() if isinstance(items, dict) else items, depth - 1, seen)

    def put_back() -> None:
        value.clear()
        value.update(items) if mapping or isinstance(value, set) else value.extend(items)
        for undo in inside:
            undo()

    return put_back


def _join(parts: list[PutBack]) -> PutBack | None:
    def put_back() -> None:
        for part in parts:
            part()

    return put_back if parts else None
