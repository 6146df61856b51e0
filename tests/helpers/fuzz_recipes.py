"""Random questions: a model, its data in a random packing, a loss, and what is asked of the library."""

from __future__ import annotations

import dataclasses
import operator
import random
from collections import namedtuple
from dataclasses import dataclass, field, replace
from typing import Any

import fuzz_losses
import torch
from fuzz_losses import LOSSES, Settings
from fuzz_nets import ACTIVATIONS, KRONECKER, NETS, Shape, draw_inputs, make_net
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, SubsetRandomSampler, default_collate

Named = namedtuple("Named", ["x", "t", "w"])


@dataclass
class Record:
    x: Any
    t: Any
    w: Any


PACKINGS = {
    "tuple": lambda x, t, w: (x, t, w),
    "list": lambda x, t, w: [x, t, w],
    "dict": lambda x, t, w: {"x": x, "t": t, "w": w},
    "nested": lambda x, t, w: {"in": {"x": x, "name": "abc"}, "out": (t, w), "number": 3},
    "named": Named,
    "dataclass": Record,
    "lists": lambda x, t, w: (x, t, w),
    "extras": lambda x, t, w: {
        "classes": torch.ones(3),
        "square": torch.eye(4, dtype=torch.bool),
        "steps": torch.arange(4),
        "x": x,
        "t": t,
        "w": w,
    },
}
_SHARED = ("classes", "square", "steps")  # of the whole batch


def unpack(batch: Any) -> tuple[Any, Any, Any]:
    """Inputs, targets and weights of a batch in any packing."""
    if isinstance(batch, dict) and isinstance(batch.get("lists"), list):
        x, t, w = batch["lists"]
        both = isinstance(t[0], tuple)
        return torch.stack(x), tuple(map(torch.stack, zip(*t))) if both else torch.stack(t), torch.stack(w)  # noqa: B905
    if isinstance(batch, Record):
        return batch.x, batch.t, batch.w
    if isinstance(batch, dict):
        inner = batch.get("in", batch)
        return inner["x"], *(batch["out"] if "out" in batch else (batch["t"], batch["w"]))
    return tuple(batch)


def collate_lists(items: list[Any]) -> Any:
    """Lists with an entry for each example, as detectors have them."""
    return {"lists": [list(part) for part in zip(*items)]}  # noqa: B905


def collate(items: list[Any]) -> Any:
    """torch's own collating, which does not know dataclasses, nor what a batch has once."""
    if isinstance(items[0], dict) and "square" in items[0]:
        parts = {name: default_collate([item[name] for item in items]) for name in ("x", "t", "w")}
        return {**{name: items[0][name] for name in _SHARED}, **parts}
    if isinstance(items[0], Record):
        parts = [default_collate([getattr(item, name) for item in items]) for name in ("x", "t", "w")]
        return Record(*parts)
    return default_collate(items)


@dataclass(frozen=True)
class Recipe:
    """All that decides a case; small values are simple ones."""

    net: str
    shape: Shape
    loss: str
    reduction: str
    classes: bool
    smoothing: float
    ignored: bool
    factor: float
    penalty: str
    via: str
    packing: str
    loader: str
    examples: int
    queries: int
    batch: int
    query_batch: int
    frozen: bool
    layers: str
    ask: str
    method: str
    options: dict[str, Any] = field(default_factory=dict)
    measurement: str | None = None
    step: str = "plain"
    fit: str = "none"
    seed: int = 0

    def __str__(self) -> str:
        """The fields that differ from the simplest, as code."""
        parts = [f"{f.name}={getattr(self, f.name)!r}" for f in dataclasses.fields(self)]
        return f"Recipe({', '.join(parts)})"


class _Draws:
    """Draws by a number, whose neighbours have nothing in common."""

    def __init__(self, number: int) -> None:
        self._random = random.Random(number)

    def among(self, *choices: Any) -> Any:
        return self._random.choice(choices)

    def between(self, low: int, high: int) -> int:
        return self._random.randint(low, high)


def _options(draw: _Draws, method: str) -> dict[str, Any]:
    """Options under which the method's answer is known."""
    damping = draw.among(0.05, 0.3, 2.0, "auto", "heuristic")
    close = {"tolerance": 1e-11, "max_steps": 400}
    exactly = {"low_rank_tolerance": 0.0, "fisher": draw.among("exact", "exact", "empirical")}
    own: dict[str, Any] = {
        "identity": {},
        "exact": {"fisher": draw.among(None, "exact", "empirical")},
        "block_ggn": {"blocks": draw.among("layer", "tensor")},
        "diagonal": exactly,
        "kfac": exactly,
        "ekfac": exactly,
        "hessian": {"negative_curvature": draw.among("absolute", "clip")},
        "cg": {**close, "preconditioner": draw.among("ekfac", "two_level", "none")},
        "minres": {**close, "curvature": draw.among("ggn", "hessian")},
        "auto": {"tolerance": 1e-11, "max_steps": 60},
        "astra": {},
        "lissa": {},
    }[method]
    if method == "minres" and own["curvature"] == "hessian" and damping in {"auto", "heuristic"}:
        damping = 2.0
    if (
        method == "lissa" and damping == "heuristic"
    ):  # of a small one it takes minutes for tens of thousand steps
        damping = 0.3
    if method in {"kfac", "ekfac", "diagonal"}:
        own = {**own, "self_influence_tolerance": 0.0}
    return {"damping": damping, **({} if draw.among(False, True) else {"memory_budget": 2**26}), **own}


METHODS = (
    "identity",
    "exact",
    "hessian",
    "block_ggn",
    "diagonal",
    "kfac",
    "ekfac",
    "cg",
    "minres",
    "auto",
    "astra",
    "lissa",
)


# Losses on rows that are picked, whatever picks them.
PICKED = {"ce_picked", "ce_index", "ce_slices", "ce_select"}


def make_recipe(number: int) -> Recipe:
    """The question of a number: its parts fit one another."""
    draw = _Draws(number)
    net = draw.among(*NETS)
    makes = NETS[net][1]
    name = draw.among(*(name for name, kind in LOSSES.items() if makes in kind.outputs))
    kind = LOSSES[name]
    method = draw.among(*(m for m in METHODS if m not in {"kfac", "ekfac"} or net in KRONECKER))
    examples, queries = draw.between(1, 9), draw.between(1, 4)
    classes = (
        draw.among(False, True)
        and kind.targets in {"labels", "shares", "bits"}
        and name in {"ce", "ce_classes_second", "ce_soft", "nll", "bce", "ce_time_first"}
    )
    smoothing = draw.among(0.0, 0.0, 0.1) if name.startswith("ce") and kind.named else 0.0
    smoothing = 0.0 if name in PICKED else smoothing
    labelled = kind.targets == "labels" and kind.named and not kind.coupled
    ask = draw.among("scores", "scores", "top_k", "self_influence", "ihvp")
    is_named = labelled and name != "ce_select"  # whose loss is written by hand
    measured = [None, "loss", "function"] + (["margin", "logit"] if is_named else [])
    alone = makes == "vector" and not kind.coupled and name != "l1"
    steps = ["plain"] * 4 + [*_ORDERS, "parts", "loop", "metrics", "surrogate"]
    steps += ["in place"] if NETS[net][0] != "words" else []
    via = draw.among(*(["step", "step", "hook", "argument", "argument_mean"] if alone else ["step"]))
    # Of an ignored example alone a mean is 0 / 0.
    may_ignore = labelled and name not in PICKED | {"ce_lengths"} and via not in {"hook", "argument"}
    recipe = Recipe(
        net=net,
        shape=Shape(
            hidden=draw.between(2, 4),
            outputs=draw.between(2, 3),
            bias=draw.among(False, True),
            act=draw.among(*ACTIVATIONS),
            norm=draw.among("none", "layer", "batch"),
            dropout=draw.among(False, True),
            zero_head=draw.between(0, 5) == 5,
        ),
        loss=name,
        reduction=draw.among("mean", "sum", "none"),
        classes=classes,
        smoothing=smoothing,
        ignored=may_ignore and draw.among(False, True),
        factor=draw.among(1.0, 1.0, 0.5, 30.0),
        penalty=draw.among("none", "none", "weights", "constant"),
        via=via,
        packing=draw.among(*PACKINGS),
        loader=draw.among("loader", "shuffled", "batches", "subset"),
        examples=examples,
        queries=queries,
        batch=draw.between(1, examples + 1),
        query_batch=draw.between(1, queries),
        frozen=draw.between(0, 5) == 5,
        layers=draw.among("default", "default", "all", "first", "not last"),
        ask=ask,
        method=method,
        options=_options(draw, method),
        measurement=None if ask == "self_influence" else draw.among(*measured),
        seed=draw.between(0, 10**6),
        step="plain" if kind.coupled or via in {"hook", "argument"} else draw.among(*steps),
    )
    if recipe.step == "surrogate" and not _takes_surrogate(recipe):
        recipe = replace(recipe, step="plain")
    return replace(recipe, fit=draw.among(*FITS)) if draw.between(0, 7) == 7 and _can_fit(recipe) else recipe


# Ways in which a step takes the examples in another order than the loader's.
_ORDERS = ("sorted", "flipped", "sometimes", "listed", "stacked")


def _stack(rows: Tensor, order: Tensor) -> Tensor:
    return torch.stack([rows[n] for n in order])


def _takes_surrogate(recipe: Recipe) -> bool:
    """Whether the mean over examples of something else goes together with the loss."""
    kind = LOSSES[recipe.loss]
    other = recipe.classes or recipe.ignored or kind.uses_weights or kind.bend is not None
    return recipe.reduction == "mean" and not other and recipe.loss not in {"pinball", "two"}


FITS = ("sgd", "momentum", "adam", "adamw", "accumulate", "clip", "dynamics")


def _can_fit(recipe: Recipe) -> bool:
    """Whether a fit of it runs, and what is asked afterwards does not depend on what was collected."""
    takes_factors = recipe.method in {"kfac", "ekfac", "diagonal", "astra", "lissa"}
    own = recipe.via == "step" and recipe.loader != "subset" and not recipe.ignored
    plain = recipe.shape.norm != "batch" and recipe.ask in {"scores", "top_k", "self_influence"}
    return own and plain and not takes_factors and recipe.loss not in {"kl", "poisson"}


class Module(LightningModule):
    """What a user would write."""

    def __init__(self, net: nn.Module, recipe: Recipe, settings: Settings) -> None:
        super().__init__()
        self.net, self.recipe, self.settings = net, recipe, settings

    def _batch(self, batch: Any) -> Tensor:
        x, t, w = unpack(batch)
        x, t, w = self._arrange(x, t, w)
        z = self._run(x)
        loss = self.recipe.factor * LOSSES[self.recipe.loss].batch(self.settings, z, t, w)
        loss = self._add_to(loss, z)
        if self.recipe.penalty == "weights":
            loss = loss + 0.1 * sum(p.square().sum() for p in self.parameters())
        return loss + 3.0 if self.recipe.penalty == "constant" else loss

    def _arrange(self, x: Tensor, t: Any, w: Tensor) -> tuple[Tensor, Any, Tensor]:
        """The examples in the order that the step takes them in."""
        if self.recipe.step == "in place":
            x.mul_(2)
            return x.div(2), t, w
        if self.recipe.step not in _ORDERS:
            return x, t, w
        sums = x.double().flatten(1).sum(1)
        order: Any = torch.arange(len(x)).flip(0) if self.recipe.step == "flipped" else sums.argsort()
        if self.recipe.step == "sometimes" and bool(sums[0] > sums[-1]):
            return x, t, w
        if self.recipe.step == "listed":
            order = order.tolist()
        take = _stack if self.recipe.step == "stacked" else operator.getitem
        both = isinstance(t, tuple | list)
        return (
            take(x, order),
            tuple(take(part, order) for part in t) if both else take(t, order),
            take(w, order),
        )

    def _run(self, x: Tensor) -> Any:
        """The network on the batch, on two parts of it, or on each example."""
        if self.recipe.step not in {"parts", "loop"}:
            return self.net(x)
        parts = x.split(1 if self.recipe.step == "loop" else (len(x) + 1) // 2)
        outputs = [self.net(part) for part in parts]
        if isinstance(outputs[0], tuple):
            return tuple(map(torch.cat, zip(*outputs)))  # noqa: B905
        return torch.cat(outputs)

    def _add_to(self, loss: Tensor, z: Any) -> Tensor:
        """Losses that are for show, or that have a gradient and no value."""
        first = z[0] if isinstance(z, tuple) else z
        if self.recipe.step == "metrics":
            torch.nn.functional.mse_loss(first.detach(), torch.zeros_like(first))
            torch.nn.functional.l1_loss(first, torch.zeros_like(first))
        if self.recipe.step == "surrogate":
            term = surrogate(first).mean()
            return loss + (term - term.detach())
        return loss

    def _values(self, batch: Any) -> Tensor:
        x, t, w = unpack(batch)
        z, compute = self.net(x), LOSSES[self.recipe.loss].batch
        alone = [compute(self.settings, z[n : n + 1], t[n : n + 1], w[n : n + 1]) for n in range(len(z))]
        return self.recipe.factor * torch.stack(alone)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self._batch(batch)
        return {"loss": loss} if self.recipe.seed % 2 else loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        own = [p for p in self.parameters() if p.requires_grad]
        if self.recipe.fit in {"adam", "adamw"}:
            return (torch.optim.Adam if self.recipe.fit == "adam" else torch.optim.AdamW)(own, 1e-3)
        return torch.optim.SGD(own, 1e-3, momentum=0.9 if self.recipe.fit == "momentum" else 0.0)


def surrogate(z: Tensor) -> Tensor:
    """A value for each example of a batch of outputs."""
    return 0.3 * z.flatten(1).square().mean(1)


class Hooked(Module):
    def influence_loss(self, batch: Any) -> Tensor:
        return self._values(batch)


def squares(module: Module, batch: Any) -> Tensor:
    """A measurement of the user's own."""
    z = module.net(unpack(batch)[0])
    return sum(part.flatten(1).square().sum(1) for part in (z if isinstance(z, tuple) else (z,)))


class Problem:
    """A recipe's objects, the same at every construction."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe, self.kind = recipe, LOSSES[recipe.loss]
        takes, makes, _ = NETS[recipe.net]
        generator = torch.Generator().manual_seed(recipe.seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            net = make_net(recipe.net, recipe.shape)
        N, Q = recipe.examples, recipe.queries
        self.x = draw_inputs(takes, N + Q, generator)
        with torch.no_grad():
            outputs = net.eval()(self.x)
        width = (outputs[0] if makes == "two" else outputs).shape[-1]
        classes = (
            0.5 + torch.rand(width, generator=generator, dtype=torch.float64) if recipe.classes else None
        )
        self.settings = Settings(recipe.reduction, classes, recipe.smoothing, recipe.ignored)
        self.t = fuzz_losses.draw_targets(self.kind, self.settings, outputs, generator)
        if makes == "steps" and recipe.loss != "ce_weighed":
            lengths = torch.randint(1, outputs.shape[1] + 1, (N + Q,), generator=generator)
            self.w = torch.arange(outputs.shape[1]) < lengths[:, None]
        else:
            self.w = 0.3 + torch.rand(N + Q, generator=generator, dtype=torch.float64)
        self.module = (Hooked if recipe.via == "hook" else Module)(net, recipe, self.settings).train()
        if recipe.frozen:
            next(self.module.parameters()).requires_grad_(False)
        self.train_indices = list(range(N))
        if recipe.loader == "subset":
            self.train_indices = sorted(torch.randperm(N, generator=generator)[: N // 2 + 1].tolist())
        self.generator = generator

    def item(self, n: int) -> Any:
        t = tuple(part[n] for part in self.t) if isinstance(self.t, tuple) else self.t[n]
        return PACKINGS[self.recipe.packing](self.x[n], t, self.w[n])

    def parts(self, n: int) -> tuple[Tensor, Any, Tensor]:
        """Input, target and weight of one example, the first with its batch dimension."""
        t = tuple(part[n] for part in self.t) if isinstance(self.t, tuple) else self.t[n]
        return self.x[n : n + 1], t, self.w[n]

    def train(self) -> Any:
        N, size, how = self.recipe.examples, self.recipe.batch, self.recipe.loader
        items = [self.item(n) for n in range(N)]
        join = collate_lists if self.recipe.packing == "lists" else collate
        if how == "batches":
            return [join(items[start : start + size]) for start in range(0, N, size)]
        if how == "subset":
            sampler = SubsetRandomSampler(self.train_indices, generator=self.generator)
            return DataLoader(items, batch_size=size, sampler=sampler, collate_fn=join)
        return DataLoader(
            items, batch_size=size, shuffle=how == "shuffled", collate_fn=join, generator=self.generator
        )

    def queries(self) -> Any:
        N, Q = self.recipe.examples, self.recipe.queries
        items = [self.item(n) for n in range(N, N + Q)]
        join = collate_lists if self.recipe.packing == "lists" else collate
        return DataLoader(items, batch_size=self.recipe.query_batch, collate_fn=join)

    def keywords(self) -> dict[str, Any]:
        """Arguments of the question."""
        recipe = self.recipe
        given: dict[str, Any] = {"method": recipe.method, **recipe.options}
        linear = (nn.Linear, nn.Conv1d, nn.Conv2d)
        names = [name for name, part in self.module.named_modules() if isinstance(part, linear)]
        if len(names) > 1 and recipe.layers != "default":
            given["layers"] = {"all": ["*"], "first": [names[0]], "not last": [f"!{names[-1]}"]}[
                recipe.layers
            ]
        if recipe.via == "argument":
            given["loss"] = Module._values
        if recipe.via == "argument_mean":
            given["loss"] = Module._batch
        if recipe.ask != "self_influence" and recipe.measurement is not None:
            given["measurement"] = squares if recipe.measurement == "function" else recipe.measurement
        return given
