"""Values of every kind that can change in place are put back, in the objects that hold them."""

import collections
import dataclasses
import functools
import queue
import random
import types

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_influence import InfluenceModule
from lightning_influence.running.host import holding
from lightning_influence.running.host.holding import hold
from lightning_influence.running.host.states import ModuleStates


class Calls:
    def __init__(self):
        self.count = 0

    def __call__(self):
        self.count += 1
        return self.count


class Slots:
    __slots__ = ("later", "value")

    def __init__(self):
        self.value = 0

    def change(self):
        self.value, self.later = 1, 2


@dataclasses.dataclass(slots=True)
class SlottedRecord:
    value: int = 0


class Refusing(dict):
    """Writes to it do what its class says, which is not what putting back is about."""

    def __setitem__(self, key, value):
        super().__setitem__(key, value + 1)

    def clear(self):
        raise TypeError("this dictionary grows only")


class Numbers(list):
    pass


class Gauge(random.Random):
    def __init__(self):
        super().__init__(0)
        self.drawn = []


def function(value=0):
    return value


def counter():
    count = 0

    def step():
        nonlocal count
        count += 1
        return count

    return step


def raise_count(calls):
    return calls()


def fresh_function():
    made = types.FunctionType(function.__code__, globals())
    made.count = 0
    return made


def circle():
    one = {"list": []}
    one["list"].append(one)
    return one


def set_attribute(name, value):
    return lambda owner: setattr(owner, name, value)


def draw_gauge(gauge):
    gauge.drawn.append(gauge.random())


def deep(levels, inside):
    for _ in range(levels):
        inside = {"a": [inside]}
    return inside


def reach(value):
    while isinstance(value, dict) and "a" in value:
        value = value["a"][0]
    return value


def shape(net):
    return {name: t.tolist() for name, t in net.state_dict().items()}


def train_norm(net):
    net(torch.randn(4, 3))
    with torch.no_grad():
        net.weight.add_(1)
    net.count = 3


# How a value is made, changed, and read.
KINDS = {
    "torch generator": (lambda: torch.Generator().manual_seed(0), lambda g: torch.rand(3, generator=g),
                        lambda g: g.get_state().tolist()),
    "NumPy generator": (lambda: np.random.default_rng(0), lambda g: g.random(3),
                        lambda g: str(g.bit_generator.state)),
    "NumPy generator of another kind": (lambda: np.random.Generator(np.random.MT19937(0)),
                                        lambda g: g.random(3),
                                        lambda g: str(g.bit_generator.state)),
    "NumPy random state": (lambda: np.random.RandomState(0), lambda g: g.rand(3),
                           lambda g: str(g.get_state())),
    "Python generator": (lambda: random.Random(0), lambda g: g.gauss(0, 1), lambda g: g.getstate()),
    "generator with attributes": (Gauge, draw_gauge, lambda g: (g.getstate(), list(g.drawn))),
    "Counter": (lambda: collections.Counter("aab"), lambda c: c.update("xx"), dict),
    "list subclass": (lambda: Numbers([1]), lambda v: v.append(2), list),
    "dict subclass": (lambda: Refusing(a=1), lambda d: d.update(b=2), dict),
    "OrderedDict": (lambda: collections.OrderedDict(a=1, b=2), lambda d: d.move_to_end("a"),
                    lambda d: [*d.items()]),
    "set": (lambda: {1}, lambda s: s.add(2), set),
    "deque": (lambda: collections.deque([1], maxlen=1), lambda d: d.append(2), list),
    "bytearray": (lambda: bytearray(b"abc"), lambda b: b.extend(b"d"), bytes),
    "NumPy array": (lambda: np.zeros(3), lambda a: a.__iadd__(1), lambda a: a.tolist()),
    "slots": (Slots, Slots.change, lambda s: (s.value, hasattr(s, "later"))),
    "slotted dataclass": (SlottedRecord, set_attribute("value", 3), lambda s: s.value),
    "callable": (Calls, raise_count, lambda c: c.count),
    "partial": (lambda: functools.partial(raise_count, Calls()), lambda p: p(), lambda p: p.args[0].count),
    "method": (lambda: Calls().__call__, raise_count, lambda m: m.__self__.count),
    "function attribute": (fresh_function, set_attribute("count", 1), lambda f: f.count),
    "closure": (counter, raise_count, lambda f: f.__closure__[0].cell_contents),
    "namespace": (lambda: types.SimpleNamespace(a=1), set_attribute("a", 2), lambda n: n.a),
    "queue": (queue.Queue, lambda q: q.put(1), lambda q: q.qsize()),
    "deep": (lambda: deep(30, [1]), lambda v: reach(v).append(2), lambda v: len(reach(v))),
    "circle": (circle, lambda v: v["list"].append(1), lambda v: len(v["list"])),
    "unregistered module": (lambda: [nn.BatchNorm1d(3)], lambda v: train_norm(v[0]),
                            lambda v: (shape(v[0]), hasattr(v[0], "count"))),
}  # fmt: skip


class Holder(nn.Module):
    def __init__(self, value):
        super().__init__()
        self.value = value


@pytest.mark.parametrize("name", KINDS)
def test_the_content_of_a_value_is_put_back(name):
    make, change, read = KINDS[name]
    module = Holder(make())
    value, before = module.value, read(module.value)
    states = ModuleStates(module)
    for _ in range(2):  # what is held can be put back more than once
        change(value)
        assert read(value) != before
        states.restore()
        assert module.value is value
        assert read(value) == before


def test_hyperparameters_are_put_back():
    class Module(LightningModule):
        def __init__(self):
            super().__init__()
            self.save_hyperparameters({"seen": 0, "kinds": []})

    module = Module()
    states = ModuleStates(module)
    module.hparams["seen"] = 1
    module.hparams.kinds.append("x")
    module.hparams["new"] = 2
    states.restore()
    assert dict(module.hparams) == {"seen": 0, "kinds": []}


def test_what_did_not_change_is_not_written(monkeypatch):
    """Other threads may look at it, and classes may count what is written."""

    class Watched(list):
        pass

    values = Watched([1])
    put_back = hold([values], [])
    monkeypatch.setattr(holding, "_COLLECTIONS", ())
    iterator = iter(values)
    next(iterator)
    put_back()
    assert values == [1]
    assert next(iterator, None) is None


def test_parameters_and_known_tensors_are_not_copied(monkeypatch):
    copied = []
    monkeypatch.setattr(holding, "_hold_tensor", lambda value: copied.append(value) or (lambda: None))
    module = nn.Linear(3, 3)
    module.all, module.again = list(module.parameters()), {"w": module.weight}
    module.hidden = [nn.BatchNorm1d(2)]
    ModuleStates(module)
    hidden = module.hidden[0]
    assert {id(t) for t in copied} == {id(t) for t in (*hidden.parameters(), *hidden.buffers())}
    copied.clear()
    ModuleStates(module, parameters=False)
    assert {id(t) for t in copied} == {id(t) for t in hidden.buffers()}


def test_the_work_is_bounded_and_the_nearest_is_held_first(monkeypatch):
    monkeypatch.setattr(holding, "_MOST", 5)
    near, far = [[1], [2], [3]], deep(10, [1])
    put_back = hold([near, far], [])
    near[2].append(4)
    reach(far).append(4)
    put_back()
    assert near == [[1], [2], [3]]
    assert len(reach(far)) == 2


def test_what_cannot_be_held_is_left_as_it_is():
    class Strange:
        def __getattribute__(self, name):
            raise RuntimeError("not today")

    module = Holder([Strange(), iter([1]), open, np, random.SystemRandom(), [1]])
    states = ModuleStates(module)
    module.value[-1].append(2)
    states.restore()
    assert module.value[-1] == [1]


def test_after_one_error_the_rest_is_put_back():
    frozen, after = np.zeros(2), [1]
    put_back = hold([frozen, after], [])
    after.append(2)
    frozen.flags.writeable = False
    with pytest.raises(ValueError, match="read-only"):
        put_back()
    assert after == [1]


class Drawing(LightningModule):
    """A step that draws from, and counts in, what the module holds."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(4, 3)
        self.generator, self.counts = torch.Generator().manual_seed(0), collections.Counter()

    def training_step(self, batch, batch_idx):
        self.counts["steps"] += 1
        torch.rand(2, generator=self.generator)
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])


def test_asking_leaves_generators_and_counts():
    module = Drawing()
    before = module.generator.get_state()
    data = DataLoader(TensorDataset(torch.randn(12, 4), torch.arange(12) % 3), 4)
    InfluenceModule(module).scores(data, data, method="ekfac")
    assert torch.equal(module.generator.get_state(), before)
    assert not module.counts
