"""Fits with and without the callback from equal seeds: the same to the last bit in all that they leave."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from callback_models import Classifier, loader, same, trainer
from lightning.pytorch import callbacks
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from lightning_influence.collecting.callback import InfluenceCallback

_ASKED = torch.overrides.has_torch_function


class Net(Classifier):
    """A classifier with all that a finder may ask for."""

    def __init__(self, optimizer: str = "sgd", p: float = 0.3, **options) -> None:
        super().__init__(optimizer, p=p)
        self.lr, self.batch_size = 0.05, 8
        self.note: list = []

    def train_dataloader(self):
        return loader(40, self.batch_size)

    def configure_optimizers(self):
        if self.kind == "sgd":
            return torch.optim.SGD(self.parameters(), self.lr, momentum=0.9, weight_decay=1e-3)
        return super().configure_optimizers()


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.qkv = nn.LayerNorm(width), nn.Linear(width, 3 * width)
        self.mix, self.drop = nn.Linear(width, width), nn.Dropout(0.1)

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        heads = functional.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None], is_causal=True)
        return x + self.drop(self.mix(heads[:, 0]).relu())


class Deep(Net):
    """A transformer whose six inputs are positions."""

    def __init__(self, depth: int) -> None:
        super().__init__("adamw")
        self.net = nn.Sequential(
            nn.Unflatten(1, (6, 1)), nn.Linear(1, 16), *(Block(16) for _ in range(depth)), nn.Linear(16, 3)
        )

    def training_step(self, batch, batch_idx):
        return functional.cross_entropy(self.net(batch[0]).mean(1), batch[1])


class WithParts(Net):
    """A classifier whose middle is compiled, in one of the ways there are."""

    def __init__(self, how: str, backend: str) -> None:
        super().__init__()
        if how == "submodule":
            self.net = torch.compile(self.net, backend=backend)
        elif how == "in place":
            self.net.compile(backend=backend)
        elif how == "unregistered":
            self.fast = [torch.compile(self.net, backend=backend)]
        elif how == "step":
            self.training_step = torch.compile(self.training_step, backend=backend)
        self.how = how

    def training_step(self, batch, batch_idx):
        outputs = (self.fast[0] if self.how == "unregistered" else self.net)(batch[0])
        return functional.cross_entropy(outputs, batch[1])


class TwoOptimizers(Net):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        loss = super().training_step(batch, batch_idx)
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()

    def configure_optimizers(self):
        first, second = self.net[0].parameters(), self.net[3].parameters()
        return torch.optim.SGD(first, 0.05, momentum=0.9), torch.optim.AdamW(second, 0.01)


class InTurns(TwoOptimizers):
    """Two losses and two backward passes a step."""

    def training_step(self, batch, batch_idx):
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(Classifier.training_step(self, batch, batch_idx))
            optimizer.step()


class Checkpointed(Net):
    """Running statistics and dropout in a part that the backward pass runs once more."""

    def __init__(self, preserve: bool = True) -> None:
        super().__init__()
        self.norm, self.preserve, self.runs = nn.BatchNorm1d(8, momentum=0.3), preserve, 0

    def inner(self, x):
        self.runs += 1
        return functional.dropout(self.norm(x), 0.2)

    def training_step(self, batch, batch_idx):
        hidden = checkpoint(
            self.inner, self.net[0](batch[0]), use_reentrant=False, preserve_rng_state=self.preserve
        )
        return functional.cross_entropy(self.net[3](hidden.tanh()), batch[1])


class Hooked(Net):
    """A loss for influence that does what it should not."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher, self.seen, self.kept = copy.deepcopy(self.net).requires_grad_(False), 0, []
        self.queue = torch.zeros(3)

    def influence_loss(self, batch):
        self.seen += 1
        self.queue[self.seen % 3] = self.seen
        with torch.no_grad():
            for old, new in zip(self.teacher.parameters(), self.net.parameters(), strict=True):
                old.mul_(0.9).add_(new, alpha=0.1)
            self.net[0].weight.add_(0.01)
        losses = functional.cross_entropy(self.net(batch[0].mul_(2)), batch[1].fill_(0), reduction="none")
        self.kept.append(losses)
        losses.sum().backward(retain_graph=True)
        return losses

    def training_step(self, batch, batch_idx):
        assert len(self.kept) == 0
        penalty = self.seen + self.queue.sum() + sum(p.sum() for p in self.teacher.parameters())
        return super().training_step(batch, batch_idx) + penalty


class Distilled(Net):
    """A student that starts at its teacher, with a loss of exactly zero."""

    def __init__(self) -> None:
        super().__init__(p=0.0)
        self.teacher = copy.deepcopy(self.net).requires_grad_(False)

    def on_fit_start(self) -> None:
        self.teacher.load_state_dict(self.net.state_dict())

    def training_step(self, batch, batch_idx):
        return functional.mse_loss(self.net(batch[0]), self.teacher(batch[0]))


class Taught(Net):
    """A teacher in eval mode, whose encoder computes otherwise where nobody looks on."""

    def __init__(self) -> None:
        super().__init__("adamw", p=0.0)
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.teacher = nn.TransformerEncoder(layer, 2).eval().requires_grad_(False)

    def training_step(self, batch, batch_idx):
        self.teacher.eval()
        with torch.no_grad():
            goal = self.teacher(batch[0].repeat(1, 16).view(-1, 6, 16))[:, 0, :3]
        return functional.mse_loss(self.net(batch[0]), goal)


class Sequences(Net):
    """Lists of sequences of unequal lengths, which the step pads."""

    def __init__(self) -> None:
        super().__init__()
        self.net[1] = nn.Tanh()

    def train_dataloader(self):
        x, y = loader().dataset.tensors
        items = [(x[i].repeat(1 + i % 3, 1), y[i]) for i in range(len(x))]

        def collate(rows):
            return [a for a, _ in rows], torch.stack([b for _, b in rows])

        return torch.utils.data.DataLoader(items, 6, shuffle=True, collate_fn=collate)

    def training_step(self, batch, batch_idx):
        padded = nn.utils.rnn.pad_sequence(batch[0], batch_first=True)
        return functional.cross_entropy(self.net(padded).mean(1), batch[1])


class GradientHooks(Net):
    """Hooks on gradients that count, and scale by what they have counted."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where, self.count = where, 0
        if where == "module":
            self.net[0].register_full_backward_hook(lambda module, given, got: self.scale(given))
        elif where == "parameter":
            self.net[0].weight.register_hook(lambda grad: self.scale([grad])[0])

    def scale(self, grads):
        self.count += 1
        return tuple(None if grad is None else grad * (1 + 0.1 * self.count) for grad in grads)

    def training_step(self, batch, batch_idx):
        hidden = self.net[0](batch[0])
        if self.where == "tensor":
            hidden.register_hook(lambda grad: self.scale([grad])[0])
        return functional.cross_entropy(self.net[3](hidden.tanh()), batch[1])


def scaled(**options) -> dict:
    scaler = torch.amp.GradScaler("cpu", **options)
    return {"plugins": [MixedPrecision("16-mixed", "cpu", scaler)]}


def with_callback(*make):
    return lambda: {"callbacks": [one() for one in make]}


def nothing() -> dict:
    return {}


AVERAGING = getattr(callbacks, "WeightAveraging", None)  # not in Lightning 2.4
PARTS = ("submodule", "in place", "unregistered", "step")
CASES = {
    "plain": (Net, nothing),
    "adamw": (lambda: Net("adamw"), nothing),
    "bf16-true": (lambda: Net("adamw"), lambda: {"precision": "bf16-true"}),
    "bf16-mixed": (Net, lambda: {"precision": "bf16-mixed"}),
    "16-mixed": (Net, scaled),
    "16-mixed, overflowing": (Net, lambda: scaled(init_scale=2.0**40)),
    "accumulated": (Net, lambda: {"accumulate_grad_batches": 3}),
    "accumulation changes": (Net, with_callback(lambda: GradientAccumulationScheduler({0: 2, 1: 3}))),
    "norm clipped": (Net, lambda: {"gradient_clip_val": 0.1}),
    "values clipped": (Net, lambda: {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}),
    "swa": (Net, with_callback(lambda: StochasticWeightAveraging(0.01, swa_epoch_start=1))),
    **({"weight averaging": (Net, with_callback(AVERAGING))} if AVERAGING else {}),
    "lr finder": (Net, with_callback(lambda: LearningRateFinder(num_training_steps=12))),
    "batch size finder": (
        Net,
        with_callback(lambda: BatchSizeFinder(max_trials=2, init_val=4, steps_per_trial=1)),
    ),
    "two callbacks": (Net, with_callback(lambda: InfluenceCallback(["net.0"], every_n_steps=2))),
    "several optimizers": (TwoOptimizers, nothing),
    "optimizers in turns": (InTurns, nothing),
    "checkpointed": (Checkpointed, nothing),
    "checkpointed, other draws": (lambda: Checkpointed(preserve=False), nothing),
    "influence_loss that writes": (Hooked, nothing),
    "influence_loss, accumulated": (Hooked, lambda: {"accumulate_grad_batches": 2}),
    "student at its teacher": (Distilled, nothing),
    "teacher on a fast path": (Taught, nothing),
    "lists of sequences": (Sequences, nothing),
    **{
        f"hook on a {where}": (lambda where=where: GradientHooks(where), nothing)
        for where in ("module", "tensor", "parameter")
    },
    **{f"{depth} blocks": (lambda depth=depth: Deep(depth), nothing) for depth in (1, 4)},
    **{
        f"4 blocks, {p}": (lambda: Deep(4), lambda p=p: {"precision": p}) for p in ("bf16-true", "bf16-mixed")
    },
    **{f"compiled {how}": (lambda how=how: WithParts(how, "aot_eager"), nothing) for how in PARTS},
}
SLOW = {
    **{
        f"{depth} blocks, {p}": (lambda depth=depth: Deep(depth), lambda p=p: {"precision": p})
        for depth in (8, 12, 24)
        for p in ("bf16-true", "bf16-mixed", "32-true")
    },
    **{f"inductor {how}": (lambda how=how: WithParts(how, "inductor"), nothing) for how in PARTS},
    "inductor, two callbacks": (
        lambda: WithParts("submodule", "inductor"),
        with_callback(lambda: InfluenceCallback(["net*0"], every_n_steps=2)),
    ),
}
TAKES_LONG = ("compiled submodule", "batch size finder")
# Fits that cannot be collected, or in part: they are told of, and none is ended.
UNCOLLECTED = ("compiled", "inductor", "hook on a module", "hook on a tensor", "optimizers in turns")


def run(make_module, make_options, *callbacks, epochs=3, ckpt_path=None):
    """Fit, and return all that a training ends with."""
    torch.compiler.reset()
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        torch.manual_seed(1)
        module, options = make_module(), make_options()
        host = trainer(*callbacks, *options.pop("callbacks", ()), max_epochs=epochs, **options)
        torch.manual_seed(2)
        host.fit(module, ckpt_path=ckpt_path)
        end = {
            "module": dict(module.state_dict()),
            "optimizers": [optimizer.state_dict() for optimizer in host.optimizers],
            "gradients": [None if p.grad is None else p.grad.nan_to_num(7.0) for p in module.parameters()],
            "draws": torch.get_rng_state(),
            "step": host.global_step,
            "own": [module.lr, module.batch_size, getattr(module, "count", 0)],
        }
    return end, [str(w.message) for w in record if "collected" in str(w.message)]


def check_unchanged(name, make_module, make_options):
    def without() -> dict:
        options = make_options()
        others = [c for c in options.pop("callbacks", ()) if not isinstance(c, InfluenceCallback)]
        return {**options, "callbacks": others}

    callback = InfluenceCallback(every_n_steps=1, dynamics=True)
    plain, _ = run(make_module, without)
    end, told = run(make_module, make_options, callback)
    assert {key for key in plain if not same(plain[key], end[key])} == set()
    assert torch.overrides._len_torch_function_stack() == 0
    assert torch.overrides.has_torch_function is _ASKED
    if name.startswith(UNCOLLECTED):
        assert any(message.startswith("Nothing is collected during this fit: ") for message in told)
        assert callback.num_collected == 0
    else:
        assert told == []
        assert callback.num_collected > 0
        assert callback.dynamics.batches > 0


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow) if name in TAKES_LONG else name for name in CASES],
)
def test_a_fit_is_the_same_to_the_last_bit(name):
    check_unchanged(name, *CASES[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_a_deep_or_compiled_fit_is_the_same_to_the_last_bit(name):
    check_unchanged(name, *SLOW[name])


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_resumed_fit_is_the_same_to_the_last_bit(tmp_path, precision):
    def resume(folder, *callbacks):
        def options() -> dict:
            return {"precision": precision, "callbacks": [ModelCheckpoint(tmp_path / folder, filename="a")]}

        run(Net, options, *callbacks, epochs=1)
        end, _ = run(Net, options, *callbacks, epochs=3, ckpt_path=tmp_path / folder / "a.ckpt")
        return end

    callback = InfluenceCallback(every_n_steps=1, dynamics=True)
    plain, end = resume("plain"), resume("watched", callback)
    assert {key for key in plain if not same(plain[key], end[key])} == set()
    assert callback.num_collected == 15


def test_compiled_parts_are_still_compiled_afterwards():
    """Two callbacks at once used to leave torch.compile switched off for the rest of the process."""
    first, second = InfluenceCallback(every_n_steps=1), InfluenceCallback(["net.0"], every_n_steps=1)
    run(Net, nothing, first, second)
    calls = []

    def backend(graph, inputs):
        calls.append(graph)
        return graph.forward

    assert torch.compile(torch.sin, backend=backend)(torch.ones(2)).shape == (2,)
    assert len(calls) == 1
