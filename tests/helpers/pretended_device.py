"""A pretended accelerator: tensors in CPU memory on a device of its own, which mix with no others.

A wrapper subclass says that its tensors are on ``pretended:0`` and runs each operation on the CPU tensors
inside. As on a real accelerator, operations refuse tensors or generators of two devices, but for what a real
one allows: copies, CPU tensors without dimensions, and CPU tensors as indices of tensors on the device.

A real accelerator works behind the program's back: the program waits for it wherever a value is read, and
wherever a shape depends on values. Such operations are counted (:func:`count_waits`). A copy to the CPU that
nobody waits for holds nonsense until somebody does.
"""

from __future__ import annotations

import contextlib
import traceback
from dataclasses import dataclass, field

import torch
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

NAME = "pretended"
# Whether this torch lets a backend be written in Python (2.9 and later).
IS_POSSIBLE = True
try:
    from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend
except ImportError:
    IS_POSSIBLE = False

# Operations that take tensors of two devices: they copy from one to the other.
COPIES = {"aten::_to_copy", "aten::copy_", "aten::_copy_from"}
INDEXING = {
    "aten::index",
    "aten::index_put",
    "aten::index_put_",
    "aten::_index_put_impl_",
    "aten::_unsafe_index",
}
# Operations whose result the program reads, or whose result's shape depends on values.
READS = {
    "aten::_local_scalar_dense",
    "aten::equal",
    "aten::nonzero",
    "aten::masked_select",
    "aten::_unique",
    "aten::_unique2",
    "aten::unique_dim",
    "aten::unique_consecutive",
    "aten::bincount",
    "aten::histc",
    "aten::is_nonzero",
}
# Operations that change a tensor's shape in place, which its wrapper has to follow.
RESHAPES_IN_PLACE = {
    f"aten::{name}_"
    for name in ("squeeze", "unsqueeze", "t", "transpose", "resize", "swapaxes", "as_strided")
}
LITERALS = (torch.tensor, torch.as_tensor, torch.asarray, torch.from_numpy)


@dataclass
class Waits:
    """Counts of operations that wait for the device.

    Attributes:
        places: for each of them its name and the innermost lines of the program around it.
    """

    places: list[str] = field(default_factory=list)

    @property
    def count(self):
        return len(self.places)

    def note(self, name):
        own = [frame for frame in traceback.extract_stack() if "lightning_influence/" in frame.filename]
        lines = [f"{frame.filename.split('lightning_influence/')[-1]}:{frame.lineno}" for frame in own[-3:]]
        self.places.append(f"{name} at {' > '.join(lines)}")


# Operations that autocast runs in the lower precision.
LOWERED = ("linear", "conv2d")
_libraries = []  # as long as these live, torch knows of what is in them

_counters: list[Waits] = []
_copies: list[tuple[torch.Tensor, torch.Tensor]] = []  # on their way to the CPU
_generators: dict[int, torch.Generator] = {}  # by address; kept, so that no other takes it


@contextlib.contextmanager
def count_waits():
    """Count what waits for the device inside."""
    waits = Waits()
    _counters.append(waits)
    try:
        yield waits
    finally:
        _counters.remove(waits)


def _note(name):
    for waits in _counters:
        waits.note(name)
    _arrive()


def _arrive():
    """Let the copies that are on their way to the CPU arrive, as they have once the program has waited."""
    for target, source in _copies:
        target.copy_(source)
    _copies.clear()


def _send(found):
    """Return the tensor on the CPU in which a copy will arrive, nonsense until then."""
    target = torch.empty_like(found)
    target.fill_(torch.nan if target.is_floating_point() else 1 if target.dtype == torch.bool else -(2**6))
    _copies.append((target, found))
    return target


class PretendedTensor(torch.Tensor):
    """A tensor on the device.

    Attributes:
        raw: the CPU tensor inside.
    """

    @staticmethod
    def __new__(cls, raw):
        return torch.Tensor._make_wrapper_subclass(
            cls,
            raw.size(),
            strides=raw.stride(),
            storage_offset=raw.storage_offset(),
            dtype=raw.dtype,
            layout=raw.layout,
            device=torch.device(NAME, 0),
        )

    def __init__(self, raw):
        self.raw = raw

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})

    def __repr__(self):
        return f"PretendedTensor({self.raw!r})"

    def tolist(self):
        _note("tolist")
        return self.raw.tolist()

    def numpy(self, *, force=False):
        raise TypeError(f"can't convert {NAME}:0 device type tensor to numpy.")

    @property
    def data(self):
        return self.detach()

    @data.setter
    def data(self, value):
        torch.Tensor.data.__set__(self, value)
        self.raw = value.raw


def _is_ours(value):
    return isinstance(value, PretendedTensor)


def _is_other(value):
    return isinstance(value, torch.Tensor) and not _is_ours(value)


def _names_device(kwargs):
    return kwargs.get("device") is not None and torch.device(kwargs["device"]).type == NAME


def _refuse_mixture(name, args, leaves):
    others = [t for t in leaves if _is_other(t)]
    if name in COPIES or not others:
        return
    written = name.endswith("_") or name in INDEXING
    wrong = [t for t in others if t.dim() > 0]
    if name in INDEXING:
        wrong = [t for t in wrong if not any(t is index for index in args[1])]
    if wrong or (written and _is_other(args[0])):
        raise RuntimeError(
            "Expected all tensors to be on the same device, but found at least two devices, "
            f"{NAME}:0 and cpu! ({name})"
        )


def _waits(name, args, kwargs, on_device):
    """Return whether an operation waits for the device, which it does not if ``on_device`` is False."""
    if not on_device:
        return False
    if name in READS:
        return True
    if name in INDEXING:
        masks = [i for i in args[1] if i is not None and i.dtype in {torch.bool, torch.uint8}]
        # One value in the places of a mask is filled in without counting them.
        fills = name != "aten::index" and len(args[1]) == 1 and args[2].numel() == 1
        return any(_is_other(i) for i in args[1] if i is not None) or bool(masks and not fills)
    if name == "aten::repeat_interleave":
        return kwargs.get("output_size") is None
    if name == "aten::copy_":
        blocking = not (args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
        return blocking and _is_ours(args[0]) != _is_ours(args[1])
    if name == "aten::_to_copy":
        leaves = kwargs.get("device") is not None and _names_device(kwargs) != _is_ours(args[0])
        return leaves and not kwargs.get("non_blocking", False)
    return False


def _check_generator(name, leaves, on_device):
    for leaf in leaves:
        if isinstance(leaf, torch._C.Generator) and on_device != (leaf._cdata in _generators):
            found = NAME if leaf._cdata in _generators else "cpu"
            raise RuntimeError(f"Expected a generator of the tensor's device, found one of {found} ({name})")


def _fused_gru_cell(inputs, hidden, states, input_bias=None, hidden_bias=None):
    """Return the states after one step and what the backward pass needs, as accelerators do in one kernel."""
    inputs = inputs if input_bias is None else inputs + input_bias
    hidden = hidden if hidden_bias is None else hidden + hidden_bias
    (ir, iz, i_new), (hr, hz, h_new) = inputs.chunk(3, 1), hidden.chunk(3, 1)
    reset, update = (ir + hr).sigmoid(), (iz + hz).sigmoid()
    new = (i_new + reset * h_new).tanh()
    return new + update * (states - new), torch.cat([reset, update, new, states, h_new], 1)


def _fused_gru_cell_backward(grad, workspace, has_bias):
    reset, update, new, states, h_new = workspace.chunk(5, 1)
    d_new = grad * (1 - update) * (1 - new.square())
    d_update = grad * (states - new) * update * (1 - update)
    d_reset = d_new * h_new * reset * (1 - reset)
    inputs = torch.cat([d_reset, d_update, d_new], 1)
    hidden = torch.cat([d_reset, d_update, d_new * reset], 1)
    return inputs, hidden, grad * update, *((inputs.sum(0), hidden.sum(0)) if has_bias else (None, None))


# Kernels that only accelerators have.
OWN_KERNELS = {
    "aten::_thnn_fused_gru_cell": _fused_gru_cell,
    "aten::_thnn_fused_gru_cell_backward": _fused_gru_cell_backward,
}


def _find_leaves(value):
    """Return what is inside of an operation's arguments, which are lists and tuples at most."""
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, list | tuple):
        return [value]
    return [leaf for part in value for leaf in _find_leaves(part)]


def _change_leaves(change, value):
    """Return an operation's arguments or results with each leaf changed."""
    if isinstance(value, dict):
        return {key: _change_leaves(change, part) for key, part in value.items()}
    if isinstance(value, list):
        return [_change_leaves(change, part) for part in value]
    return (
        tuple(_change_leaves(change, part) for part in value) if isinstance(value, tuple) else change(value)
    )


def _run(func, args, kwargs):
    """Run one operation on what is inside, and wrap what comes out."""
    name = func._schema.name
    leaves = _find_leaves((args, kwargs))
    ours = [leaf for leaf in leaves if _is_ours(leaf)]
    inner = dict(kwargs)
    onto = bool(ours)  # whether results are on the device
    if kwargs.get("device") is not None:
        onto, inner["device"] = _names_device(kwargs), torch.device("cpu")
    if ours:
        _refuse_mixture(name, args, leaves)
    _check_generator(name, leaves, onto)
    if _waits(name, args, kwargs, on_device=bool(ours) or onto):
        _note(name)
    take = lambda t: t.raw if _is_ours(t) else t  # noqa: E731
    if name == "aten::_to_copy":
        inner["copy"] = True
        inner.pop("non_blocking", None)
        dtype = inner.get("dtype") or args[0].dtype
        found = take(args[0]).to(dtype=dtype, copy=True)
        found = (
            found.contiguous(memory_format=inner["memory_format"])
            if inner.get("memory_format") in {torch.channels_last, torch.contiguous_format}
            else found
        )
    else:
        found = OWN_KERNELS.get(name, func)(*_change_leaves(take, args), **_change_leaves(take, inner))
    if name == "aten::_to_copy" and ours and not onto and kwargs.get("non_blocking"):
        return _send(found)
    if name == "aten::copy_":
        return args[0]
    if name in RESHAPES_IN_PLACE:
        torch.Tensor.data.__set__(args[0], PretendedTensor(args[0].raw))
    known = {id(t.raw): t for t in ours}

    def wrap(value):
        if not isinstance(value, torch.Tensor) or not onto:
            return value
        return known.get(id(value)) if id(value) in known else PretendedTensor(value)

    return _change_leaves(wrap, found)


class _Factories(TorchDispatchMode):
    """Makes new tensors on the device, which hold no tensor that could dispatch."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        leaves = _find_leaves((args, kwargs))
        if _names_device(kwargs) or any(map(_is_ours, leaves)):
            return _run(func, args, kwargs)
        if func._schema.name == "aten::_local_scalar_dense" and not isinstance(args[0], torch.Tensor):
            return args[0]  # torch hands a number that it wrapped over as the number
        _check_generator(func._schema.name, leaves, on_device=False)
        return func(*args, **kwargs)


class _Literals(TorchFunctionMode):
    """Makes tensors of Python values on the device, as constructors do that bypass the dispatcher."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in LITERALS and _names_device(kwargs):
            others = {key: value for key, value in kwargs.items() if key != "device"}
            if func is not torch.tensor and _is_ours(args[0]):
                return args[0].to(**others) if others else args[0]
            return func(*args, **others).to(kwargs["device"])
        if func is torch.Tensor.new_tensor and _is_ours(args[0]):
            own, *rest = args
            kwargs.setdefault("dtype", own.dtype)
            return torch.tensor(*rest, **{"device": own.device, **kwargs})
        if func in {torch.Tensor.__getitem__, torch.Tensor.__setitem__} and _is_ours(args[0]):
            own, index, *rest = args
            parts = index if isinstance(index, tuple) else (index,)
            parts = tuple(
                torch.tensor(part).to(own.device) if isinstance(part, list) and part else part
                for part in parts
            )
            return func(own, parts if isinstance(index, tuple) else parts[0], *rest)
        return func(*args, **kwargs)


_Generator = torch.Generator


class _DeviceGenerator(_Generator):
    device = property(lambda self: torch.device(NAME, 0))


class _GeneratorType(type):
    def __instancecheck__(cls, value):
        return isinstance(value, _Generator)

    def __call__(cls, device="cpu"):
        if torch.device(device).type != NAME:
            return _Generator(device)
        generator = _DeviceGenerator()
        _generators[generator._cdata] = generator
        return generator


class _AnyGenerator(metaclass=_GeneratorType):
    """In place of ``torch.Generator``, which makes none for a device written in Python."""


@contextlib.contextmanager
def pretended_device():
    """Let there be the device inside; yields it."""
    torch.Generator = _AnyGenerator
    try:
        with _Literals(), _Factories():
            yield torch.device(NAME, 0)
    finally:
        torch.Generator = _Generator
        _generators.clear()
        assert not _copies, "copies to the CPU that nobody has waited for"


def _lower(operation):
    """Return an operation as it runs under autocast, on float32 arguments in the lower precision."""

    def cast(value):
        single = isinstance(value, torch.Tensor) and value.dtype == torch.float32
        return value.to(torch.get_autocast_dtype(NAME)) if single else value

    def run(*args, **kwargs):
        keys = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)
        with torch._C._ExcludeDispatchKeyGuard(keys):
            return operation(*tree_map(cast, args), **tree_map(cast, kwargs))

    return run


def _register():
    """Tell torch of the device, before the first backward pass of a process fixes which devices there are."""

    class Module(_DummyBackendModule):
        def get_amp_supported_dtype(self):
            return [torch.float16, torch.bfloat16]

        def get_rng_state(self, *device):
            return torch.get_rng_state()

        def set_rng_state(self, state, *device):
            pass

        def synchronize(self, *device):
            _note("synchronize")

    _setup_privateuseone_for_python_backend(NAME, backend_module=Module())
    _libraries.append(torch.library.Library("_", "IMPL"))
    _libraries[-1].fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    _libraries.append(torch.library.Library("aten", "IMPL"))
    for name in LOWERED:
        _libraries[-1].impl(name, _lower(getattr(torch.ops.aten, name).default), "AutocastPrivateUse1")


if IS_POSSIBLE:
    _register()


class PretendedAccelerator(Accelerator):
    """What a Trainer needs to know of the device."""

    def setup_device(self, device):
        pass

    def teardown(self):
        pass

    @staticmethod
    def parse_devices(devices):
        return [torch.device(NAME, 0)]

    @staticmethod
    def get_parallel_devices(devices):
        return [torch.device(NAME, 0)]

    @staticmethod
    def auto_device_count():
        return 1

    @staticmethod
    def is_available():
        return True

    @staticmethod
    def name():
        return NAME

    def get_device_stats(self, device):
        return {}


def make_trainer_arguments(device):
    """Return a Trainer's arguments for the CPU or the device."""
    if device.type == "cpu":
        return {"accelerator": "cpu"}
    return {"accelerator": PretendedAccelerator(), "strategy": SingleDeviceStrategy(device)}
