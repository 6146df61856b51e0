"""How many bytes of tensors are alive at once while something runs, as PyTorch's own operations make them."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class LiveTensors(TorchDispatchMode):
    """Follows every storage that operations return within its block; ``peak`` is in bytes.

    Storages of before the block do not count, nor does what an operation takes for itself while it runs.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: dict[int, weakref.finalize] = {}

    def __enter__(self) -> LiveTensors:
        gc.collect()
        return super().__enter__()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        known = {_key(tensor) for tensor in _tensors((args, kwargs))}
        for tensor in _tensors(result):
            key = _key(tensor)
            if key in known or key in self._seen or not tensor.untyped_storage().nbytes():
                continue
            storage = tensor.untyped_storage()
            self.now += storage.nbytes()
            self._seen[key] = weakref.finalize(storage, self._let_go, key, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return result

    def _let_go(self, key: int, size: int) -> None:
        self.now -= size
        self._seen.pop(key, None)


def _key(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _tensors(item: Any) -> list[torch.Tensor]:
    if isinstance(item, torch.Tensor):
        return [item]
    if isinstance(item, dict):
        item = list(item.values())
    return [tensor for part in item for tensor in _tensors(part)] if isinstance(item, list | tuple) else []
