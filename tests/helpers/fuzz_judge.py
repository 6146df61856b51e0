"""Asks a random question and compares the answer with the dense reference."""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from fuzz_losses import LOSSES
from fuzz_recipes import PICKED, Problem, Recipe
from fuzz_reference import Reference, UndeterminedError
from lightning.pytorch import Trainer
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_influence import (
    InfluenceCallback,
    InfluenceError,
    InfluenceModule,
    InfluenceWarning,
    influence,
    self_influence,
)

# Relative error of float64 answers: of closed forms and dense solvers, and of iterations to 1e-11.
CLOSED, ITERATED = 1e-7, 1e-5
LOOSE = ("astra", "lissa")  # to a residual or an error of a few percent
_LINEAR, _PARTLY_LINEAR = "so its second derivative is zero", {"huber"}
_ALONE = "with the squared gradients of the examples for the curvature"
_SHARES = "Weights count as shares of their batch"
# What an iteration says that it has not solved, and is then held to what it claims to have left.
_UNSOLVED = "have a residual above the tolerance", "relative residual above the tolerance"
_EPS = 1e-12  # that torch adds to probabilities in second derivatives of their binary cross-entropy


class WrongError(AssertionError):
    """The library was wrong, and how."""


@dataclass
class Tally:
    """What came of the cases."""

    counts: Counter[str] = field(default_factory=Counter)
    refusals: Counter[str] = field(default_factory=Counter)
    wrong: list[tuple[str, Recipe]] = field(default_factory=list)
    doubtful: list[tuple[str, str]] = field(default_factory=list)

    def add(self, recipe: Recipe) -> None:
        """Judge a recipe; what is wrong is kept."""
        try:
            verdict = judge(recipe)
        except WrongError as error:
            verdict = "wrong"
            self.wrong.append((str(error), recipe))
        kind, _, reason = verdict.partition(": ")
        self.counts[kind] += 1
        if kind == "refused":
            self.refusals[reason] += 1
            if not LOSSES[recipe.loss].coupled and recipe.loss != "ce_time_first":
                self.doubtful.append((reason, str(recipe)))


@dataclass
class Answer:
    """What the library said."""

    values: Any
    diagnostics: Any
    told: list[str]


def judge(recipe: Recipe) -> str:
    """Ask and compare.

    Returns:
        "right", "undetermined", or "refused: REASON".

    Raises:
        WrongError: if the answer is wrong, an exception is none of the library's, or something was changed.
    """
    problem, trainer = Problem(recipe), None
    if recipe.fit != "none":
        trainer = _fit(problem)
        if trainer is None:
            return "undetermined"
    before = _state(problem)
    try:
        answer = _ask(problem, trainer)
    except InfluenceError as error:
        _check_unchanged(before, _state(problem))
        return _refusal(recipe, error)
    except Exception as error:
        raise WrongError(f"{type(error).__name__}: {str(error)[:200]}") from error
    _check_unchanged(before, _state(problem))
    if problem.kind.coupled:
        reads_train = (recipe.ask, recipe.method) != ("ihvp", "identity")
        # Where no covered weight has a gradient, as before a head of zeros, nothing is coupled and all is 0;
        # and examples of equal outputs may be exchanged without a trace.
        shows = not _is_zero(recipe, answer) and not _are_alike(problem)
        if min(recipe.batch, len(problem.train_indices)) > 1 and reads_train and shows:
            raise WrongError(f"answered although the loss couples examples: {problem.kind.coupled}")
        return "undetermined"
    try:
        with sdpa_kernel(SDPBackend.MATH):  # others have no second derivatives
            again = Problem(recipe)
            again.module.load_state_dict(problem.module.state_dict())
            _compare(again, answer)
    except UndeterminedError:
        return "undetermined"
    except WrongError:
        # Of a loss that is linear from somewhere on, a batch without any example in its curved part is told.
        if recipe.loss in _PARTLY_LINEAR and any(_LINEAR in text for text in answer.told):
            return "undetermined"
        raise
    return "right"


def _is_zero(recipe: Recipe, answer: Answer) -> bool:
    if recipe.ask == "ihvp":
        return not any(bool(part.any()) for part in answer.values.values())
    if recipe.ask == "top_k":
        return not any(bool(part.scores.any()) for part in (answer.values.top(1), answer.values.bottom(1)))
    return not bool(answer.values.scores.any())


def _are_alike(problem: Problem) -> bool:
    with torch.no_grad():
        outputs = problem.module.eval().net(problem.x)
        own = outputs[problem.train_indices]
        # Of words, one token may be in both, and its loss the least of both.
        losses = torch.stack([_loss_alone(problem, outputs, n) for n in problem.train_indices])
    same = torch.allclose(losses, losses[:1], rtol=1e-12, atol=0)
    return same or bool((outputs == outputs[:1]).all() or (own == own[:1]).all())


def _loss_alone(problem: Problem, outputs: Tensor, n: int) -> Tensor:
    one = slice(n, n + 1)
    return problem.kind.batch(problem.settings, outputs[one], problem.t[one], problem.w[one])


def _must_be_answered(recipe: Recipe) -> bool:
    """Whether the documentation says that there is an answer."""
    kind = LOSSES[recipe.loss]
    return not (
        kind.coupled
        or recipe.loss in {"ce_time_first", *PICKED}
        or recipe.net in {"time_inside", "multihead", "multihead_time", "functional"}
        or recipe.net.startswith("experts")
        or recipe.step in {"surrogate", "listed", "stacked"}
        or (
            recipe.step in {"parts", "loop"}
            and (recipe.net.startswith("conv") or recipe.penalty == "weights")
        )
        # A list of as many equal tensors as these have rows may be a batch of inputs and targets.
        or (recipe.packing == "lists" and recipe.loader == "batches")
        # Sums over bags of words have no second derivatives in torch.
        or (recipe.net == "bag" and "hessian" in {recipe.method, recipe.options.get("curvature")})
        or recipe.frozen
        or recipe.ignored  # perhaps all of it
        or (recipe.method in {"cg", "minres", "astra", "lissa"} and recipe.ask == "self_influence")
        or recipe.options["damping"] in {"auto", "heuristic"}  # perhaps of no curvature
        or (recipe.measurement in {"margin", "logit"} and recipe.via in {"hook", "argument"})
    )


def _refusal(recipe: Recipe, error: InfluenceError) -> str:
    text = " ".join(str(error).split())
    if len(text) < 40:
        raise WrongError(f"refused without a reason: {text}")
    if _must_be_answered(recipe):
        raise WrongError(f"refused although it is documented: {text[:200]}")
    return f"refused: {type(error).__name__}: {text[:150]}"


def _fit(problem: Problem) -> Trainer | None:
    """Train, and check that watching changed nothing; None if this trains to nothing, watched or not."""
    found = []
    for own, callbacks in (
        (Problem(problem.recipe), []),
        (problem, [InfluenceCallback(every_n_steps=1, dynamics=problem.recipe.fit == "dynamics")]),
    ):
        trainer = Trainer(
            accelerator="cpu",
            max_epochs=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=callbacks,
            accumulate_grad_batches=2 if problem.recipe.fit == "accumulate" else 1,
            gradient_clip_val=0.1 if problem.recipe.fit == "clip" else None,
        )
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                trainer.fit(own.module, own.train())
            except Exception as error:
                if not callbacks:
                    return None
                raise WrongError(f"watching ended a fit: {type(error).__name__}: {error}") from error
        found.append(own.module.state_dict())
    if not _same(*found):
        raise WrongError("watching changed the weights of a fit")
    problem.module.train()
    return trainer if all(bool(p.isfinite().all()) for p in problem.module.parameters()) else None


def _ask(problem: Problem, trainer: Trainer | None = None) -> Answer:
    recipe, given = problem.recipe, problem.keywords()
    if trainer is not None:
        return _ask_trainer(problem, trainer)
    asked = InfluenceModule(problem.module)
    train, queries = problem.train(), problem.queries()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if recipe.ask == "self_influence":
            found: Any = asked.self_influence(train, **given)
            diagnostics = found.diagnostics
        elif recipe.ask == "ihvp":
            found, diagnostics = asked.ihvp(train, queries, **given)
        else:
            top = {"top_k": 2} if recipe.ask == "top_k" else {}
            found = asked.scores(train, queries, **given, **top)
            diagnostics = found.diagnostics
    told = [str(w.message) for w in caught if issubclass(w.category, InfluenceWarning)]
    return Answer(found, diagnostics, told + list(diagnostics.warnings))


def _ask_trainer(problem: Problem, trainer: Trainer) -> Answer:
    recipe, given = problem.recipe, {**problem.keywords(), "log": False}
    train, queries = problem.train(), problem.queries()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if recipe.ask == "self_influence":
            found: Any = self_influence(trainer, problem.module, train, **given)
        else:
            top = {"top_k": 2} if recipe.ask == "top_k" else {}
            found = influence(trainer, problem.module, train, queries, **given, **top)
    told = [str(w.message) for w in caught if issubclass(w.category, InfluenceWarning)]
    return Answer(found, found.diagnostics, told + list(found.diagnostics.warnings))


# ---------------------------------------------------------------------- what is changed


def _state(problem: Problem) -> dict[str, Any]:
    module = problem.module
    return {
        "weights": copy.deepcopy(module.state_dict()),
        "modes": [m.training for m in module.modules()],
        "trained": [p.requires_grad for p in module.parameters()],
        "gradients": [p.grad for p in module.parameters()],
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules()],
        "inputs": problem.x.clone(),
        "random numbers": torch.get_rng_state(),
    }


def _check_unchanged(before: dict[str, Any], after: dict[str, Any]) -> None:
    for name, value in before.items():
        if not _same(value, after[name]):
            raise WrongError(f"asking changed the {name}")


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    return a == b


# ---------------------------------------------------------------------- comparison


def _compare(problem: Problem, answer: Answer) -> None:
    recipe, diagnostics = problem.recipe, answer.diagnostics
    shares, squares = (any(text in told for told in answer.told) for text in (_SHARES, _LINEAR))
    squares = (squares and recipe.loss == "l1") or any(_ALONE in told for told in answer.told)
    if shares and recipe.loader in {"shuffled", "subset"}:
        raise UndeterminedError
    try:
        _compare_with(Reference(problem, diagnostics.layers, shares, squares=squares), answer)
    except WrongError:
        other = Reference(problem, diagnostics.layers, units=True, squares=squares)
        is_by_value = recipe.step != "plain" or recipe.loss in {"ce_time_first", *PICKED}
        if shares or not is_by_value or not Reference(problem, diagnostics.layers).weighs_the_same():
            raise
        _compare_with(other, answer)


def _compare_with(reference: Reference, answer: Answer) -> None:
    recipe, diagnostics = reference.recipe, answer.diagnostics
    if not reference.wbar:  # ignored examples only: nothing to be normalised by
        raise UndeterminedError
    given = recipe.options.get("damping")
    if (
        recipe.method != "identity"
        and isinstance(given, float)
        and set(diagnostics.damping.values()) != {given}
    ):
        raise WrongError(f"damping={given} was asked for, {diagnostics.damping} taken")
    {"self_influence": _compare_self, "ihvp": _compare_ihvp, "top_k": _compare_top}.get(
        recipe.ask, _compare_scores
    )(reference, answer)


def _limit(recipe: Recipe) -> float:
    if recipe.method in LOOSE:
        return 0.5
    return ITERATED if recipe.method in {"cg", "minres", "auto"} else CLOSED


def _slack(reference: Reference, answer: Answer) -> float:
    """Norm by which products may differ beside rounding: what was told, and what torch itself adds."""
    recipe, damping, told = reference.recipe, answer.diagnostics.damping, answer.told
    is_unsolved = any(text in line for line in told for text in _UNSOLVED)
    uses_hessian = "hessian" in {recipe.method, recipe.options.get("curvature")}
    uses_hessian |= reference.values  # whose curvature is that of their second derivatives
    is_rounded = recipe.loss == "bce_probabilities" and uses_hessian
    is_unsolved |= recipe.method in LOOSE  # products of vectors that are nearly orthogonal are told no better
    if recipe.method == "identity" or not (is_unsolved or is_rounded):
        return 0.0
    vectors = reference.train_gradients if recipe.ask == "self_influence" else reference.query_gradients
    system = reference.damped(damping)
    size, slack = float(torch.linalg.inv(system).norm()), 0.0
    if is_unsolved:
        slack += 2 * float(answer.diagnostics.residuals.double().max() * vectors.norm()) * size
    if is_rounded:
        odds = max(float(reference.outputs(n).abs().max().exp()) for n in reference.train)
        solved = reference.solutions(damping, vectors)
        slack += 4 * _EPS * odds * float(system.norm() * solved.norm()) * size
    return slack


def _check_close(
    found: Tensor, expected: Tensor, recipe: Recipe, what: str, scale: float = 0.0, slack: float = 0.0
) -> None:
    if found.shape != expected.shape:
        raise WrongError(f"{what} of shape {tuple(found.shape)}, expected {tuple(expected.shape)}")
    if not bool(torch.isfinite(found).all()):
        raise WrongError(f"{what} not finite")
    size = max(float(expected.norm()), scale)
    gap = (float((found.double() - expected).norm()) - slack) / max(size, 1e-10)
    if gap > _limit(recipe):
        raise WrongError(f"{what} of {recipe.method} off by {gap:.2g}")


def _score_slack(reference: Reference, answer: Answer) -> float:
    return _slack(reference, answer) * float(reference.train_gradients.norm()) / len(reference.train)


def _scale(reference: Reference) -> float:
    """Size of scores if nothing cancelled, whose rounding is what is left where all cancels."""
    largest = reference.query_gradients.norm() * reference.train_gradients.norm() / len(reference.train)
    return 1e-6 * float(largest)


def _compare_scores(reference: Reference, answer: Answer) -> None:
    found, recipe = answer.values, reference.recipe
    if found.train_indices.tolist() != reference.train:
        raise WrongError(f"train_indices {found.train_indices.tolist()}, expected {reference.train}")
    if found.query_indices.tolist() != list(range(recipe.queries)):
        raise WrongError(f"query_indices {found.query_indices.tolist()}")
    expected = reference.scores(answer.diagnostics.damping)
    _check_close(found.scores, expected, recipe, "scores", _scale(reference), _score_slack(reference, answer))


def _compare_top(reference: Reference, answer: Answer) -> None:
    expected = reference.scores(answer.diagnostics.damping)
    if reference.recipe.method in LOOSE:
        raise UndeterminedError
    k, sizes = min(2, len(reference.train)), (_scale(reference), _score_slack(reference, answer))
    for largest, part in ((True, answer.values.top(k)), (False, answer.values.bottom(k))):
        values = expected.topk(k, largest=largest).values
        _check_close(part.scores, values, reference.recipe, "strongest scores", *sizes)
        place = {index: at for at, index in enumerate(reference.train)}
        at = torch.tensor([[place[i] for i in row] for row in part.indices.tolist()])
        picked = expected.gather(1, at)
        _check_close(part.scores, picked, reference.recipe, "indices of the strongest", *sizes)


def _compare_self(reference: Reference, answer: Answer) -> None:
    found, recipe = answer.values, reference.recipe
    if found.train_indices.tolist() != reference.train:
        raise WrongError(f"train_indices {found.train_indices.tolist()}, expected {reference.train}")
    expected = reference.self_influence(answer.diagnostics.damping)
    _check_close(found.scores, expected, recipe, "self-influence", slack=_score_slack(reference, answer))


def _compare_ihvp(reference: Reference, answer: Answer) -> None:
    named = {id(p): name for name, p in reference.module.named_parameters()}
    try:
        parts = [answer.values[named[id(p)]] for p in reference.flat]
    except KeyError as error:
        raise WrongError(f"no product for {error}") from error
    found = torch.cat([part.flatten(1) for part in parts], 1)
    recipe, damping = reference.recipe, answer.diagnostics.damping
    vectors = reference.query_gradients
    if recipe.method == "identity":  # which knows of no weights
        vectors = vectors * (reference.wbar if recipe.measurement in {None, "loss"} else 1)
    expected, scale = reference.solutions(damping, vectors), 1e-6 * float(vectors.norm())
    _check_close(found, expected, recipe, "products", scale, _slack(reference, answer))
    _check_residuals(reference, answer, found)


def _check_residuals(reference: Reference, answer: Answer, found: Tensor) -> None:
    """The residual that is claimed is that of the solution."""
    claimed = answer.diagnostics.residuals
    if claimed is None:
        return
    vectors, system = reference.query_gradients, reference.damped(answer.diagnostics.damping)
    rest = (vectors - found.double() @ system).norm(dim=1) / vectors.norm(dim=1).clamp_min(1e-12)
    slack = _slack(reference, answer) * system.norm() / vectors.norm(dim=1).clamp_min(1e-12)
    if bool((rest > 1.5 * claimed.double() + 1e-5 + slack).any()):
        raise WrongError(f"residuals {rest.tolist()} where {claimed.tolist()} were claimed")


# ---------------------------------------------------------------------- smaller examples

_SIMPLE: dict[str, tuple[Any, ...]] = {
    "net": ("linear", "mlp", "tokens", "words"),
    "loss": ("ce", "mse"),
    "reduction": ("mean",),
    "classes": (False,),
    "smoothing": (0.0,),
    "ignored": (False,),
    "factor": (1.0,),
    "penalty": ("none",),
    "via": ("step",),
    "packing": ("tuple",),
    "loader": ("batches", "loader"),
    "examples": (1, 2, 3),
    "queries": (1,),
    "batch": (2, 1, 9),
    "query_batch": (1,),
    "frozen": (False,),
    "layers": ("default",),
    "ask": ("scores",),
    "method": ("identity", "exact"),
    "options": ({"damping": 0.3},),
    "measurement": (None,),
    "step": ("plain",),
    "fit": ("none",),
}


def simplify(recipe: Recipe) -> tuple[str, str]:
    """What is wrong with the simplest recipe found that still has the same kind of fault."""

    def fault(candidate: Recipe) -> str | None:
        try:
            judge(candidate)
        except WrongError as error:
            return str(error)
        except Exception:  # parts that do not fit one another
            return None
        return None

    found = fault(recipe)
    assert found is not None
    kind = found.split()[0]
    for name, values in _SIMPLE.items():
        for value in values:
            if getattr(recipe, name) == value:
                break
            candidate = replace(recipe, **{name: value})
            again = fault(candidate)
            if again is not None and again.split()[0] == kind:
                recipe, found = candidate, again
                break
    return found, str(recipe)
