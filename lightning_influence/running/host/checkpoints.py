"""Lightning's checkpoints: read without unpickling, and loaded into a module that exists."""

from __future__ import annotations

import contextlib
import copy
import os
import pickle
import re
import zipfile
from collections.abc import Callable, Mapping
from typing import Any

import torch
from lightning.fabric.utilities.cloud_io import _load as load_by_torch
from lightning.pytorch import LightningModule
from lightning.pytorch.plugins.io import CheckpointIO, TorchCheckpointIO
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_influence.running.host.attributes import defines
from lightning_influence.running.host.module import unwrap_compiled
from lightning_influence.support.errors import CorruptFileError, InfluenceError, UnsafeCheckpointError
from lightning_influence.support.storage import PathLike

# How torch names what it does not unpickle: a global, a class in a blocked module, a class met on the way.
_REFUSED = (
    r"Unsupported global: GLOBAL (\S+) was not an allowed",
    r"unsupported GLOBAL (\S+) whose module",
    r"(?:add_safe_globals`|OrderedDict objects),? but got <class '([^']+)'>",
)


def read_checkpoint(path: PathLike) -> dict[str, Any]:
    """Return a Lightning checkpoint as it was saved.

    Raises:
        CorruptFileError: if it cannot be read, or is something else.
        UnsafeCheckpointError: if it holds more than tensors and plain values.
        OSError: if there is none, or it may not be read.
    """
    _check_sums(path)
    with open(os.path.expanduser(path), "rb") as file:
        try:
            checkpoint = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # depends on where the damage is
            refusal = _unreadable(path, error)
            raise refusal from error
    return _check_checkpoint(path, checkpoint)


def _check_sums(path: PathLike) -> None:
    """Verify the checksums that a checkpoint has of its records, which torch writes but does not look at.

    Weights, factors or sums in which a bit has flipped would otherwise load, and change every answer. Files
    of a form that torch had before it wrote zip archives have no checksums.

    Raises:
        CorruptFileError: if a record is not as it was written.
        OSError: if there is no such file, or it may not be read.
    """
    where = repr(os.fspath(path))
    with open(os.path.expanduser(path), "rb") as file:
        if file.read(4) != b"PK\x03\x04":
            return
        try:
            with zipfile.ZipFile(file) as archive:
                altered = archive.testzip()
        except Exception as error:  # depends on where the damage is
            raise CorruptFileError(
                f"{where} cannot be read as a Lightning checkpoint: it is truncated or damaged "
                f"({type(error).__name__}: {error}). Write it again."
            ) from error
    if altered is not None:
        raise CorruptFileError(
            f"{where} was altered since it was written: the checksum of its record {altered!r} is wrong. "
            "Write it again, with torch.serialization.set_crc32_options(True) if that was turned off."
        )


def _check_checkpoint(path: PathLike, checkpoint: Any) -> dict[str, Any]:
    """Return a checkpoint that is one of Lightning's.

    Raises:
        CorruptFileError: if it is something else.
    """
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise CorruptFileError(
            f"{os.fspath(path)!r} is no Lightning checkpoint: it has no 'state_dict'. Pass a file that "
            "Trainer.save_checkpoint or ModelCheckpoint wrote."
        )
    return checkpoint


def _unreadable(path: PathLike, error: Exception) -> InfluenceError:
    """Return the error that tells a sound file with other objects from a damaged one.

    Args:
        path: the checkpoint.
        error: what ``torch.load`` raised.
    """
    where, refused = repr(os.fspath(path)), _refused(path, error)
    if not refused:
        return CorruptFileError(
            f"{where} cannot be read as a Lightning checkpoint with weights_only=True: it is truncated or "
            f"damaged ({type(error).__name__}: {_without_advice(error)}). Write it again."
        )
    names = ", ".join(refused)
    return UnsafeCheckpointError(
        f"{where} holds objects other than tensors and plain values: {names}. They are not unpickled, which "
        "could run code from the file. If you trust it, allow them: call "
        f"torch.serialization.add_safe_globals([{names}]), or with torch 2.5 and later ask inside "
        f"torch.serialization.safe_globals([{names}]). Or load the model yourself with "
        "Model.load_from_checkpoint(path, weights_only=False) and pass it: to InfluenceModule(model), or to "
        "the Trainer's method as the model, with ckpt_path=None; what the file holds of factors and the "
        "training run is not used then."
    )


def _without_advice(error: Exception) -> str:
    """Return what torch found, without its advice to unpickle the file or to report a bug of torch's."""
    found = str(error).partition("WeightsUnpickler error:")[2].partition("Check the documentation")[0]
    return found.strip() or str(error)


def _refused(path: PathLike, error: Exception) -> list[str]:
    """Return the names of what torch does not unpickle, all of them if the file can be looked at."""
    if not isinstance(error, pickle.UnpicklingError):
        return []
    named = [name for pattern in _REFUSED for name in re.findall(pattern, str(error))]
    if named:
        with contextlib.suppress(Exception):  # a remote or an old file: torch has named the first
            every = torch.serialization.get_unsafe_globals_in_checkpoint(os.path.expanduser(path))
            named += sorted(every)
    return list(dict.fromkeys(named))


class ExplainingCheckpointIO(CheckpointIO):
    """The user's way to read checkpoints, with our words for files that are not unpickled."""

    def __init__(self, inner: CheckpointIO) -> None:
        self._inner = inner

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Read a checkpoint.

        Returns:
            What the user's own way reads.

        Raises:
            InfluenceError: if it is damaged or not unpickled, in place of torch's error.
        """
        if os.path.isfile(os.path.expanduser(path)):
            _check_sums(path)
        try:
            checkpoint = self._load(path, *args, **kwargs)
        except Exception as error:
            if not isinstance(error, pickle.UnpicklingError) and not self._damaged(path, error):
                raise
            refusal = _unreadable(path, error)
            raise refusal from error
        return _check_checkpoint(path, checkpoint)

    def _load(self, path: Any, *args: Any, **kwargs: Any) -> Any:
        """Return what a plugin reads, or torch without unpickling, no default before Lightning 2.6."""
        if type(self._inner) is TorchCheckpointIO:
            return load_by_torch(path, map_location="cpu", weights_only=True)
        return self._inner.load_checkpoint(path, *args, **kwargs)

    def _damaged(self, path: Any, error: Exception) -> bool:
        """Return whether torch failed at a file that is there; plugins have errors of their own."""
        there = os.path.isfile(os.path.expanduser(path)) and not isinstance(error, PermissionError)
        return there and type(self._inner) is TorchCheckpointIO

    def save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """Write a checkpoint as the user does."""
        self._inner.save_checkpoint(*args, **kwargs)

    def remove_checkpoint(self, path: Any) -> None:
        """Remove a checkpoint as the user does."""
        self._inner.remove_checkpoint(path)


def load_weights(
    model: LightningModule | type[LightningModule],
    path: PathLike,
    checkpoint: dict[str, Any],
    kwargs: Mapping[str, Any],
) -> LightningModule:
    """Make a module of a checkpoint, or load its weights into one that exists.

    Args:
        model: the class, or the module; its loading hooks and ``strict_loading`` count either way.
        path: the checkpoint.
        checkpoint: what :func:`read_checkpoint` returned; hooks may change it.
        kwargs: passed to ``load_from_checkpoint`` of the class.

    Returns:
        The module; after an error one that exists has its own weights.

    Raises:
        TypeError: if the model is neither, or there are ``kwargs`` for a module that exists.
    """
    if isinstance(model, type):
        if not issubclass(model, LightningModule):
            raise TypeError(
                f"Got {model.__name__}; accepted are classes of lightning.pytorch.LightningModule."
            )
        return model.load_from_checkpoint(os.fspath(path), map_location="cpu", **kwargs)
    if kwargs:
        raise TypeError(
            f"Got {', '.join(kwargs)} with a module that exists; only load_from_checkpoint of a class takes "
            "them. Pass the class, or set them on the module, such as module.strict_loading for strict."
        )
    module = unwrap_compiled(model)
    _load_into(module, checkpoint)
    return module


def _load_into(module: LightningModule, checkpoint: dict[str, Any]) -> None:
    put_back = remember_weights(module)
    try:
        if defines(module, "configure_model"):
            module.configure_model()
        module.on_load_checkpoint(checkpoint)
        module.load_state_dict(checkpoint["state_dict"], strict=module.strict_loading)
    except BaseException:
        put_back()
        raise


def remember_weights(module: nn.Module) -> Callable[[], None]:
    """Copy what loading a checkpoint changes: parameters, buffers, and what else the state dict holds.

    Returns:
        A function that puts it back.
    """
    live = _tensors(module)
    own = {name: tensor.detach().clone() for name, tensor in live.items()}

    def held(name: str, value: Any) -> Any:
        shared = name in live and isinstance(value, Tensor) and value.is_set_to(live[name])
        return own[name] if shared else _copy_entry(value)

    state = {name: held(name, value) for name, value in module.state_dict().items() if not is_lazy(value)}

    def put_back() -> None:
        # Not strict: hooks and `configure_model` may have added parts since.
        module.load_state_dict(state, strict=False)
        with torch.no_grad():
            for name, tensor in _tensors(module).items():
                if name in own:
                    tensor.copy_(own[name])

    return put_back


def _tensors(module: nn.Module) -> Mapping[str, Tensor]:
    named: dict[str, Tensor] = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return {name: tensor for name, tensor in named.items() if not is_lazy(tensor)}


def _copy_entry(value: Any) -> Any:
    """Return a copy of an entry of a state dict, which need not be a tensor."""
    return value.detach().clone() if isinstance(value, Tensor) else copy.deepcopy(value)
