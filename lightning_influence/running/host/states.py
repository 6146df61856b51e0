"""What running a training step can change in a module, held for the time of a pass and put back.

A training step is the user's code: it may update a moving average of the weights, count, append to lists, and
change buffers and metrics. A pass runs it for its loss alone, so all of that is undone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torchmetrics import Metric

from lightning_influence.running.host.holding import (
    equal_to_the_bit,
    hold,
    hold_attributes,
    put_all_back,
)
from lightning_influence.support.whole import is_stand_in, read_own_part


class ModuleStates:
    """Parameters, buffers, metrics and plain attributes of a module and its submodules, as they are now.

    The copies take as much memory as the parameters, buffers and the tensors in attributes do.

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
        attributes = [hold_attributes(m) for m in parts if not isinstance(m, Metric)]
        inside = [value for _, values in attributes for value in values]
        known = [*parts, *module.parameters(), *module.buffers()]
        content = hold(inside, known, parameters=parameters)
        self._attributes = [*(put_back for put_back, _ in attributes), content]

    def have_weights_changed(self) -> bool:
        """Tell whether a parameter or a buffer is not what it was; NaN counts as unchanged where it stood."""
        buffers = [(getattr(owner, name, None), held) for owner, name, held in self._buffers]
        pairs = [*zip(self._live, self._copies, strict=True), *buffers]
        return any(now is None or not equal_to_the_bit(now, held) for now, held in pairs)

    def restore_weights(self) -> None:
        """Put parameters and buffers back, in the tensors that hold them now."""
        with torch.no_grad():
            for weight, held in zip(self._live, self._copies, strict=True):
                if not equal_to_the_bit(weight, held):
                    weight.copy_(held)
            for owner, name, held in self._buffers:
                now: Any = getattr(owner, name, None)
                if isinstance(now, Tensor) and now.shape == held.shape:
                    if not equal_to_the_bit(
                        now, held
                    ):  # a write counts as a change to graphs that are still needed
                        now.copy_(held)
                else:
                    setattr(owner, name, held.clone())

    def restore(self) -> None:
        """Put everything back."""
        self.restore_weights()
        for metric, state in self._metrics:
            # The pass may have moved the module.
            vars(metric).update({name: _copy_value(value, metric.device) for name, value in state.items()})
        put_all_back(self._attributes)


def _metric_state(metric: Metric) -> dict[str, object]:
    """Copy everything that a metric changes when it is updated or computed."""
    names = [*metric._defaults, "_update_count", "_computed", "_forward_cache"]
    return {name: _copy_value(vars(metric)[name]) for name in names if name in vars(metric)}


def _copy_value(value: object, device: torch.device | None = None) -> object:
    """Copy a metric's value, a tensor or a list of them as a rule."""
    if isinstance(value, Tensor):
        return value.to(device, copy=True)
    return [_copy_value(item, device) for item in value] if isinstance(value, list) else value
