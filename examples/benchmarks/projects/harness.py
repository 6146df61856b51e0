"""What is asked of every project: the same fit with and without our callback, and an answer as shipped.

One case is one model of a project, trained by the project's own code. Reported are whether the weights are
the same bits with the callback, whether ``influence`` answers without a line written for us, the
share of the trainable parameters and of the queries' squared gradient that is covered, the relative error of
identity scores against one backward pass of ``training_step`` for each example, and the seconds of the
answer in epochs of the plain fit.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import logging
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import Tensor

# torchvision can be imported beside a torch that its compiled operators were not built for if these exist.
_OPERATORS = torch.library.Library("torchvision", "DEF")
for _name in ("nms", "qnms"):
    _OPERATORS.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

from lightning_influence import InfluenceCallback, influence  # noqa: E402
from lightning_influence.model.layers.plan import find_layers  # noqa: E402

torch.set_num_threads(1)
for _name in ("lightning.pytorch", "pytorch_lightning", "lightning.fabric", "lightning_fabric", "lightning"):
    logging.getLogger(_name).setLevel(logging.ERROR)

QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}
"""Options of a Trainer that prints and writes nothing."""


@dataclass
class Fitted:
    """A finished fit.

    Attributes:
        trainer: the Trainer that the project made.
        module: the LightningModule that it trained.
        train: the project's loader of the training examples.
        queries: a loader of some queries.
        epochs: of the fit.
        train_singles: a batch of each training example alone (or twice, where the project's metrics fail on
            batches of one), in the order of the dataset; read after the answer.
        query_singles: a batch of each query alone, or twice.
        loss: the loss of such a batch in eval mode.
        quiet: a context for comparisons: without the noise that the project draws in eval mode too, or one
            that keeps what was drawn.
        draws: what is drawn in each pass anew; scores are compared with those of the call that they are of.
    """

    trainer: Any
    module: Any
    train: Any
    queries: Any
    epochs: int
    train_singles: Iterable[Any]
    query_singles: Iterable[Any]
    loss: Callable[[Any, Any], Tensor] | None = None
    quiet: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
    draws: Draws | None = None


# Calls of what a step draws that are tried, for training examples and for queries: scores equal those of one.
_TURNS = 3

Fit = Callable[[list[Any]], Fitted]
"""Maps further callbacks to the fit with them."""


def collate_singles(dataset: Any, collate: Callable[[list[Any]], Any], copies: int = 1) -> list[Any]:
    """Return a batch of each example alone, once or several times."""
    return [collate([dataset[n]] * copies) for n in range(len(dataset))]


@dataclass(frozen=True)
class Later:
    """What is made each time that it is read.

    Attributes:
        make: makes it.
    """

    make: Callable[[], Iterable[Any]]

    def __iter__(self) -> Iterator[Any]:
        """Yield what is made."""
        return iter(self.make())


@dataclass
class Draws:
    """What the training step draws at random, by what it draws for.

    A batch's step runs again where it is checked, and draws anew.

    Attributes:
        owner: a class.
        name: of its method that draws.
        made: arguments and results of calls, by :meth:`key` of their first argument.
        turn: which of several calls :meth:`find` returns.
    """

    owner: type
    name: str
    made: dict[bytes, list[tuple[Any, Any]]] = field(default_factory=dict)
    turn: int = 0

    @staticmethod
    def key(tensor: Tensor) -> bytes:
        """Return the content of a tensor."""
        return tensor.detach().numpy().tobytes()

    def find(self, tensor: Tensor) -> tuple[Any, Any]:
        """Return arguments and result of a call for a tensor."""
        calls = self.made[self.key(tensor)]
        return calls[min(self.turn, len(calls) - 1)]

    @contextlib.contextmanager
    def keep(self) -> Iterator[None]:
        """Keep what is drawn."""
        method = getattr(self.owner, self.name)

        def draw(module: Any, *args: Any, **kwargs: Any) -> Any:
            result = method(module, *args, **kwargs)
            given = inspect.signature(method).bind(module, *args, **kwargs).arguments
            self.made.setdefault(self.key(list(given.values())[1]), []).append((given, result))
            return result

        with mock.patch.object(self.owner, self.name, draw):
            yield


def run(project: str, cases: dict[str, Fit]) -> None:
    """Run the cases that the command line names, or all, and print one line of JSON for each."""
    for name in sys.argv[1:] or cases:
        print(
            "RESULT " + json.dumps({"project": project, "model": name, **run_case(cases[name])}), flush=True
        )


def run_case(fit: Fit) -> dict[str, Any]:
    """Run one case.

    Returns:
        The figures of its row.
    """
    row: dict[str, Any] = {"lines": 0}
    try:
        start = time.perf_counter()
        plain = fit([])
        epoch = (time.perf_counter() - start) / plain.epochs
        mine = fit([InfluenceCallback()])
        row["unchanged"] = have_same_state(plain.module, mine.module)
    except Exception as error:
        return {**row, "failed": _describe(error)}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            start = time.perf_counter()
            answer = influence(mine.trainer, mine.module, mine.train, mine.queries)
            row["answered"] = bool(torch.isfinite(answer.scores).all())
            row["epochs"] = (time.perf_counter() - start) / epoch
            row["method"] = answer.diagnostics.method
        except Exception as error:
            row |= {"answered": False, "reason": _describe(error)}
        try:
            with mine.quiet():
                identity = influence(mine.trainer, mine.module, mine.train, mine.queries, method="identity")
                row |= compare(mine, identity)
        except Exception as error:
            row["identity"] = _describe(error)
    row["notes"] = sorted({str(w.message) for w in caught if "nfluence" in w.category.__name__})
    return row


def compare(fitted: Fitted, identity: Any) -> dict[str, Any]:
    """Compare identity scores with gradients by plain automatic differentiation.

    Returns:
        Shares that are covered, and the relative error of the scores of what is.
    """
    plan = find_layers(fitted.module)
    layers = {name: plan.layers[name] for name in identity.diagnostics.layers}
    kept = {
        id(p)
        for layer in layers.values()
        for p in (layer.rule.weight(layer.module), layer.rule.bias(layer.module))
        if p is not None and p.requires_grad
    }
    found = []
    for turn in range(1 if fitted.draws is None else _TURNS):
        if fitted.draws is not None:
            fitted.draws.turn = turn
        with Evaluating(fitted), fitted.quiet():
            train, _ = differentiate(fitted, fitted.train_singles, kept)
            found.append((train, *differentiate(fitted, fitted.query_singles, kept)))
    scores, share = identity.scores.double(), found[0][2]
    answers = [queries @ train.T / len(train) for train, *_ in found for _, queries, _ in found]
    sizes = [tuple(scores.shape), tuple(answers[0].shape)]
    return {
        "covered": identity.diagnostics.parameters_covered,
        "gradient_share": share,
        "error": min(float((scores - expected).norm() / expected.norm()) for expected in answers),
        "sizes": sizes,
    }


def differentiate(fitted: Fitted, singles: Iterable[Any], kept: set[int]) -> tuple[Tensor, float]:
    """Return gradients of examples, one a row, in the parameters that are kept, and these' squared share."""
    module, loss = fitted.module, fitted.loss or run_step
    parameters = [p for p in module.parameters() if p.requires_grad]
    rows, some, everything = [], 0.0, 0.0
    for batch in singles:
        grads = torch.autograd.grad(
            loss(module, batch), parameters, allow_unused=True, materialize_grads=True
        )
        mine = [grad.double().flatten() for p, grad in zip(parameters, grads, strict=True) if id(p) in kept]
        rows.append(torch.cat(mine))
        some += float(rows[-1].square().sum())
        everything += sum(float(grad.double().square().sum()) for grad in grads)
    return torch.stack(rows), some / everything


class Evaluating:
    """Eval mode within the training stage, without logging."""

    def __init__(self, fitted: Fitted) -> None:
        self._module, self._trainer = fitted.module, fitted.trainer

    def __enter__(self) -> None:
        self._module.trainer = self._trainer  # some projects let go of it
        self._module.eval()
        if not type(self._module).on_validation_model_eval.__module__.startswith((
            "lightning",
            "pytorch_light",
        )):
            self._module.on_validation_model_eval()
        self._trainer.training = True
        for name in ("log", "log_dict"):
            setattr(self._module, name, lambda *args, **kwargs: None)

    def __exit__(self, *details: Any) -> None:
        for name in ("log", "log_dict"):
            delattr(self._module, name)


def run_step(module: Any, batch: Any) -> Tensor:
    """Return the loss of a batch by the module's own step."""
    numbered = len(inspect.signature(module.training_step).parameters) > 1
    result = module.training_step(batch, 0) if numbered else module.training_step(batch)
    loss = result["loss"] if isinstance(result, dict) else result
    assert isinstance(loss, Tensor)
    return loss


def have_same_state(first: Any, second: Any) -> bool:
    """Return whether all tensors of two modules are the same bits."""
    one, two = first.state_dict(), second.state_dict()
    tensors = [name for name, value in one.items() if isinstance(value, Tensor)]
    return one.keys() == two.keys() and all(
        torch.equal(one[name].nan_to_num(), two[name].nan_to_num()) for name in tensors
    )


def _describe(error: Exception) -> str:
    if os.environ.get("TRACE"):
        traceback.print_exception(error)
    frame = traceback.extract_tb(error.__traceback__)[-1]
    text = str(error).strip().partition("\n")[0]
    place = f"{frame.filename.rpartition('site-packages/')[2][-60:]}:{frame.lineno}"
    return f"{type(error).__name__}: {text[:300]} [{place}]"
