"""How much damping a solve needs: from the training run, from the curvature, or as the user says."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

from lightning_influence.curvature.factors import Factors
from lightning_influence.curvature.training_record import LayerRecord, TrainingRecord

# Shares of a layer's mean eigenvalue: the usual heuristic (Grosse et al. 2023), and that of closed forms,
# which is their share of the run's damping as well. The numbers of resolve_damping's docstring are from
# examples/benchmarks/damping_rules.py and closed_damping.py.
_HEURISTIC = 0.1
CLOSED_FORM = (0.01, 0.01)
_UNRESOLVED = 4.0


def resolve_damping(
    damping: float | Literal["auto", "heuristic"],
    factors: Factors,
    record: TrainingRecord | None,
    *,
    solver: Literal["closed", "full"],
    means: Mapping[str, float] | None = None,
) -> tuple[dict[str, float], str]:
    """Decide ``lambda`` of each layer.

    ``"auto"`` for a solver of the full Gauss-Newton system is the damping that training itself applied (Bae
    et al. 2024; Wang et al. 2025). ``K`` steps ``theta <- theta - eta (s g + w theta)`` on a batch loss that
    is ``s`` times the mean loss, with curvature ``h`` along a direction, end where ``1 - prod(1 - eta (s h +
    w))`` of the distance is covered: directions with ``s h + w`` below ``1 / sum(eta)`` are not resolved. The
    stationary point of the decayed loss adds ``w``, so in the unit of the mean loss

    - SGD: ``lambda = (w + c / rate) / s``, with ``rate`` the sum of ``eta / (1 - momentum)``;
    - Adam: steps are measured with ``D = diag(sqrt(v_hat) + eps)``: ``theta <- theta - eta D^-1 (s g + w
      theta)`` gives ``(w + c metric / rate) / s``, ``metric`` the layer's mean of ``D``;
    - AdamW decays outside the metric, ``theta <- theta - eta (D^-1 s g + w theta)``; multiplied by ``D`` this
      is a decay of ``D w``, so ``lambda = metric (w + c / rate) / s``.

    The argument above leaves ``c`` open at about 1. It is 4: models retrained on a part of the data take
    fewer steps, and directions near the limit are the noisiest. Over 26 small tasks ``c = 4`` lost .016 of
    linear datamodeling score to each task's best damping on average, ``c = 1`` .050
    (``examples/benchmarks/damping_rules.py``).

    Where no run was recorded, a solver of the full system uses one number for all layers, the mean eigenvalue
    of a layer averaged over the layers.

    ``"auto"`` for closed-form factors is 1% of the layer's mean eigenvalue and 1% of what a solver of the
    full system would use. The run's damping itself is too much for them: they miss the cross-layer terms,
    and where ``L`` layers move together, a block's eigenvalues are an ``L``-th of the whole matrix's, beside
    which an ``L``-th of the damping does the same. Over eight small tasks EK-FAC's mean linear datamodeling
    score is .639 so, .628 at 3% of the eigenvalues alone and .594 at the run's damping; its rank correlation
    with converged CG on a language model of 1.3 M parameters is .92, .80 and .85, on a ResNet of 1.2 M .54,
    .43 and .45 (``examples/benchmarks/closed_damping.py``).

    ``"heuristic"`` is a tenth of each layer's mean eigenvalue (Grosse et al. 2023).

    Args:
        damping: a number for all layers, or the rule.
        factors: factors of the model; their layers are those of the result.
        record: the training run, or None if nobody watched it.
        solver: ``"closed"`` for inverses of the factors themselves, ``"full"`` for systems in the exact
            Gauss-Newton matrix.
        means: the mean eigenvalue of every layer, where ``factors`` are those of some.

    Returns:
        The damping of each layer, in the unit of the mean per-example loss, and its origin in words.

    Raises:
        ValueError: if ``damping`` is neither a rule nor a finite number of at least 0.
    """
    if isinstance(damping, bool) or not isinstance(damping, str | int | float):
        raise ValueError(_message(damping))
    if not isinstance(damping, str):
        if not (math.isfinite(damping) and damping >= 0):
            raise ValueError(_message(damping))
        return dict.fromkeys(factors.layers, float(damping)), "given"
    if damping not in {"auto", "heuristic"}:
        raise ValueError(_message(damping))
    own = {name: average_eigenvalues(factors, name) for name in factors.layers}
    if damping == "heuristic":
        shares = {name: _HEURISTIC * mean for name, mean in own.items()}
        return shares, f"heuristic: {_HEURISTIC} of each layer's mean eigenvalue"
    means = means or own
    full, origin = _from_run(list(own), sum(means.values()) / max(len(means), 1), record)
    if solver == "full":
        return full, f"auto: {origin}"
    of_mean, of_run = CLOSED_FORM
    found = {name: of_mean * mean + of_run * full[name] for name, mean in own.items()}
    words = f"{of_mean} of each layer's mean eigenvalue and {of_run} of the full system's damping"
    return found, f"auto: {words}, {origin}"


def average_eigenvalues(factors: Factors, name: str) -> float:
    """Return the mean of the layer's ``Lambda``, or of its Kronecker product if no squares were summed."""
    layer = factors.layers[name]
    moment = layer.second_moment()
    if moment is not None:
        return float(moment.mean()) / factors.mean_weight
    traces = [
        (side if side.ndim == 2 else side.diagonal(dim1=1, dim2=2)).sum(-1)
        for side in (layer.covariance_in(), layer.covariance_out())
    ]
    return float((traces[0] * traces[1]).sum()) / math.prod(layer.shape) / factors.mean_weight


def _from_run(names: list[str], level: float, record: TrainingRecord | None) -> tuple[dict[str, float], str]:
    """Return the run's damping of layers; where no run is known, a level of the size that was found for runs.

    On the digits MLP the level is 2.2 times the run's own damping, on a digits CNN half of it; a tenth of
    each layer's mean, the usual heuristic, is far too small for the full system there.
    """
    fallback = "the mean eigenvalue of a layer, averaged over the layers"
    if record is None:
        return dict.fromkeys(names, level), f"no training run was recorded, so {fallback}"
    if record.family == "other" or not record.steps:
        reason = record.reason or "no optimizer step was recorded"
        return dict.fromkeys(names, level), f"{reason}, so {fallback}"
    found = {name: _of_layer(record, record.layers.get(name)) for name in names}
    missing = [name for name, value in found.items() if value is None]
    result = {name: level if value is None else value for name, value in found.items()}
    origin = f"from {record.steps} steps of {_NAMES[record.family]} (weight decay and learning rates)"
    return result, origin + (f"; {fallback} for {missing}, which no step updated" if missing else "")


_NAMES = {"sgd": "SGD", "adam": "Adam", "adamw": "AdamW"}


def _of_layer(record: TrainingRecord, layer: LayerRecord | None) -> float | None:
    """Return the run's damping for one layer, None if it took no step."""
    if layer is None or not layer.rate > 0:
        return None
    decay, inverse = layer.weight_decay, _UNRESOLVED / layer.rate
    run = layer.metric * inverse
    total = run + (layer.metric * decay if record.family == "adamw" else decay)
    return total / record.loss_scale


def _message(damping: object) -> str:
    return (
        f"Got damping={damping!r}; accepted are 'auto', 'heuristic', or a finite number of at least 0, in "
        "the unit of the mean loss's curvature."
    )
