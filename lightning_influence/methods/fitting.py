"""What methods need in passes of their own: Kronecker factors, and second moments."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

import torch

from lightning_influence.curvature.eigenbases import compute_eigenbases, compute_eigenbasis
from lightning_influence.curvature.factor_passes import CovariancePass, DiagonalPass, SquaresPass
from lightning_influence.curvature.factors import (
    ENOUGH_EXAMPLES,
    Factors,
    LayerStatistics,
    fingerprint_differs,
)
from lightning_influence.methods.context import Context, Ownership, compute_digest, note_unknown_outputs
from lightning_influence.methods.factor_groups import divide_layers, fit_in_groups
from lightning_influence.methods.resuming import FactorFolder
from lightning_influence.model.captured import Fisher
from lightning_influence.model.content import SeenData
from lightning_influence.model.layers.plan import LayerPlan, Layout, find_layers
from lightning_influence.model.unnamed.alone import ONE_BY_ONE

# Chosen by hand: memory for gradients kept between covariances and eigenvalues, so that one pass gives both.
CACHE_BYTES = 2**28
# What passes have found out of a layer that a fit has no factors of either.
_TAKES_NO_PART = "{} takes no part"


def provide_factors(context: Context) -> Factors:
    """The model's factors with eigenvalues: those there are, completed, or fitted in passes.

    Returns:
        Factors of the layers that the context's plan is left with.

    Raises:
        FactorMismatchError: if stored factors belong to another model.
    """
    state, owned = context.state, context.owners is not None
    # Parts of factors are of no use to a method that needs all; whole ones serve those that need parts.
    others = state.owns_part and not owned
    none = state.factors is None or not (state.factors.layers or state.owns_part)
    as_soon = _is_fitted_as_soon(context)
    if as_soon:
        context.notes.inform(
            "The fit ended before eigenvalues were collected. The pass that they take fitted all factors "
            "anew, on all training examples, at the weights that the model has now."
        )
    if none or others or as_soon or _is_stale(context):
        key = _key(context, context.options.fitted_fisher)
        state.factors, state.owns_part = _fit_all(context), owned
        state.factors_key, context.made = key, True
    else:
        assert state.factors is not None
        context.reused |= bool(state.factors_key)
        if not state.owns_part:
            state.factors = _adopt(context, state.factors)
        state.factors = _complete(context, state.factors)
    factors = state.factors
    _note_empirical(context, factors)
    known = dict.fromkeys(factors.layers, 1.0)
    known = known if context.owners is None else context.owners.merge(known)
    context.leave_out(
        [name for name in context.plan.layers if name not in known],
        "have no factors, because no training step used them: they were frozen when the fit began, not "
        "called, or not selected. Pass factors='refit' to fit factors of all that take part now",
    )
    context.extra["factors"] = f"from the {factors.origin}, {factors.fisher} Fisher"
    factors = replace(factors, layers={name: factors.layers[name] for name in context.own_layers})
    _tell_examples(context, factors)
    return factors


def count_passes_to_come(context: Context, nbytes: float) -> int:
    """Return how many passes :func:`provide_factors` is going to take, without taking any.

    Args:
        context: of the call.
        nbytes: memory that an example's gradients take.
    """
    state = context.state
    is_known = not state.factors_key or state.factors_key in _accepted_keys(context)
    if _is_fitted_as_soon(context):
        return 1
    if state.factors is None or not state.factors.layers or not is_known:
        return 1 if _keeps_gradients(context, nbytes) else 2 * len(divide_layers(context))
    return 0 if state.factors.has_squares else 1


def _keeps_gradients(context: Context, nbytes: float) -> bool:
    """Return whether gradients of so many bytes an example are all kept between covariances and squares."""
    options = context.options
    room = min(options.memory_budget, CACHE_BYTES)
    return options.factors_dir is None and nbytes * context.train.num_examples <= room


def _is_fitted_as_soon(context: Context) -> bool:
    """Return whether a fit's factors need a pass that would fit all of them as well.

    That is where their eigenvalues are missing, and all gradients can be kept between covariances and
    eigenvalues. Factors of all training examples at the final weights are better than those of few examples
    on the way there.
    """
    state, factors = context.state, context.state.factors
    if factors is None or not state.collected or state.factors_key or factors.has_squares:
        return False
    numbers = sum(layer.numel for layer in context.plan.layers.values())
    one_pass = context.owners is None and _keeps_gradients(context, numbers * context.dtype.itemsize)
    return one_pass and factors.fisher == context.options.fitted_fisher


def _tell_examples(context: Context, factors: Factors) -> None:
    """Tell how many examples each factor stands for, and of factors from a fit whether they are few."""
    counts = [
        {name: getattr(layer, part) for name, layer in factors.layers.items()}
        for part in ("examples", "squares_examples")
    ]
    if context.owners is not None:
        counts = list(map(context.owners.merge, counts))
    context.extra["factor_examples"] = {
        name: {"covariances": count, "eigenvalues": counts[1][name]} for name, count in counts[0].items()
    }
    enough = min(ENOUGH_EXAMPLES, context.train.num_examples // 2)
    few = {
        name: layer
        for name, layer in factors.layers.items()
        if layer.examples < enough or layer.squares_examples < enough / 2
    }
    if factors.origin == "fit" and few:
        name, layer = min(few.items(), key=lambda item: min(item[1].examples, item[1].squares_examples))
        more = f" (and {len(few) - 1} more layers have few)" if len(few) > 1 else ""
        context.notes.add(
            f"The factors from the fit stand for few examples: the covariances of {name!r} for "
            f"{layer.examples:g}, its eigenvalues for {layer.squares_examples:g}{more}. Below {enough} and "
            f"{enough / 2:g} scores differ visibly from those of factors fitted on all training examples, "
            "which factors='refit' asks for; a longer fit or a larger overhead collects more."
        )


def fit_diagonal(context: Context) -> Factors:
    """Return second moments of the gradients in the parameters' own basis, fitted in one pass."""
    one_pass = DiagonalPass(context.plan, fisher=context.options.fitted_fisher, seed=context.options.seed)
    context.run_on_train(one_pass)
    factors = one_pass.factors
    if context.runner.world_size > 1:
        _fill(context, factors, context.plan)
        factors.reduce_counts(context.runner.all_reduce_sum)
    _reduce_squares(context, factors)
    _note_empirical(context, factors)
    return factors


def _note_empirical(context: Context, factors: Factors) -> None:
    """Say so if factors are made of training labels because the loss is unknown."""
    unknown = (
        callable(getattr(context.runner.module, "influence_loss", None))
        or context.plan.loss is not None
        or ONE_BY_ONE in context.plan.verified
    )
    # During a fit the empirical Fisher is collected where it was asked for, and never for want of another.
    if (
        factors.origin == "pass"
        and unknown
        and factors.fisher == "empirical"
        and context.options.fisher != "empirical"
    ):
        note_unknown_outputs(context)


def _key(context: Context, fisher: Fisher) -> str:
    """Return what factors from a pass were fitted for: weights, examples, kind of Fisher, layers."""
    return compute_digest(context.weights_key, context.train.num_examples, fisher, list(context.plan.layers))


def _accepted_keys(context: Context) -> set[str]:
    """Return the keys of factors that this call can use: of any kind of Fisher, unless one is asked for."""
    asked = context.options.fisher
    return {_key(context, kind) for kind in (get_args(Fisher) if asked is None else (asked,))}


def _is_stale(context: Context) -> bool:
    """Return whether factors from an earlier pass were fitted for something else, and say so."""
    state = context.state
    factors = state.factors
    assert factors is not None
    if state.factors_key:
        stale = state.factors_key not in _accepted_keys(context)
        if stale:
            context.notes.inform(
                "The factors of an earlier call were fitted for other weights, buffers, training examples, "
                "layers or another kind of Fisher; they are fitted again."
            )
        return stale
    differing = fingerprint_differs(factors.fingerprint, context.weights)
    if differing:
        shown = ", ".join(differing[:4]) + (" and more" if len(differing) > 4 else "")
        context.notes.add(
            f"The factors were collected at other weights than the model has now (they differ in {shown}). "
            "Scores are less accurate the further the weights have moved; pass the checkpoint that holds the "
            "factors as ckpt_path, or fit factors for these weights with factors='refit'."
        )
    examples = context.train.num_examples
    if factors.origin == "pass" and factors.weight_examples != examples:
        context.notes.add(
            f"The factors were fitted on {factors.weight_examples:g} examples, the training data has "
            f"{examples}. They are used as they are; fit factors for these with factors='refit'."
        )
    return False


def _fit_all(context: Context) -> Factors:
    """Fit the factors of all layers: together, or in groups where a folder is named and memory is short."""
    groups, folder = divide_layers(context), _open_folder(context, context.plan)
    if folder is None or len(groups) == 1:
        return _fit(context, owners=context.owners)
    context.notes.inform(
        f"Factors exceed memory_budget: they are fitted in {len(groups)} groups of layers, each in passes of "
        "its own, and read from factors_dir where they are used."
    )
    factors = fit_in_groups(context, groups, folder, lambda plan: _fit(context, plan))
    if folder.restored and context.losses is not None:
        _compare_later(context, context.losses)
    return factors


def _fit(context: Context, plan: LayerPlan | None = None, owners: Ownership | None = None) -> Factors:
    options, runner, plan = context.options, context.runner, plan or context.plan
    folder = _open_folder(context, plan)
    hand_over = None if owners is None else owners.hand_over
    covariance = CovariancePass(
        plan,
        fisher=options.fitted_fisher,
        seed=options.seed,
        cache_bytes=min(options.memory_budget, CACHE_BYTES),
        num_examples=context.train.num_examples,
        hand_over=hand_over,
    )
    if folder is None:
        context.run_on_train(covariance)
    else:
        covariance.cache = None  # which would be lost
        context.run_on_train(covariance, lambda one: folder.run(one, "covariances", covariance.losses))
    context.losses = covariance.losses
    factors = covariance.factors
    if runner.world_size > 1:
        _fill(context, factors, plan, owners)
        for layer in factors.layers.values() if owners is None else ():
            layer.reduce(runner.all_reduce_sum, covariances=True)
        factors.reduce_counts(runner.all_reduce_sum)
        # A process whose gradients did not fit has to pass again, and no process passes alone.
        dropped = runner.all_reduce_sum(torch.tensor([float(covariance.cache is None)]))
        covariance.cache = None if float(dropped) else covariance.cache
    for layer in factors.layers.values():
        layer.examples = float(context.train.num_examples)  # also of batches that did not use the layer
    covariance.finish(
        compute_eigenbases(
            factors.layers,
            rank=runner.rank,
            world_size=runner.world_size,
            all_reduce_sum=runner.all_reduce_sum,
            raise_together=runner.raise_together,
            decompose=compute_eigenbasis if folder is None else folder.decompose,
            owned=owners is not None,
        )
    )
    if covariance.cache is None:
        squares = SquaresPass(plan, factors, seed=options.seed, hand_over=hand_over)
        if folder is None:
            runner.run(squares, context.train)
        else:
            folder.run(squares, "squares")
    _reduce_squares(context, factors, owned=owners is not None)
    factors.fingerprint = context.weights
    if folder is not None and folder.restored:
        _compare_later(context, covariance.losses)
    return factors


def _open_folder(context: Context, plan: LayerPlan) -> FactorFolder | None:
    """Return the folder in which the fit keeps what it has finished, None without one."""
    options = context.options
    if options.factors_dir is None:
        return None
    key = compute_digest(
        _key(context, options.fitted_fisher),
        Layout.of(plan.layers).shapes,
        options.seed,
        context.dtype,
        context.runner.world_size,
        options.memory_budget > 0,
    )
    folder = FactorFolder(options.factors_dir, key, context)
    if context.state.forgotten:  # what is kept there is of other data
        folder.clear()
        context.state.forgotten = False
    return folder


def _compare_later(context: Context, losses: SeenData) -> None:
    """Let a pass of this call compare its data with those that kept factors were made on."""
    runner, state = context.runner, context.state
    state.mean_loss = losses.mean(runner.all_reduce_sum)
    state.content = losses.identify(runner.all_reduce_sum)
    context.reused = True
    context.notes.inform("Factors, or parts of them, were read from factors_dir.")


def _adopt(context: Context, factors: Factors) -> Factors:
    """Return stored factors, checked against the model, on its device, and completed."""
    module = context.runner.module
    shapes = {name: layer.shape for name, layer in context.plan.layers.items()}
    modules = {name for name, _ in (*module.named_modules(), *module.named_parameters())}
    # Layers that are there but not covered (frozen, not selected) are not compared; all others are.
    compared = {n: s for n, s in factors.layers.items() if n in shapes or n not in modules}
    known = {name: shape for name, shape in shapes.items() if name in factors.layers}
    replace(factors, layers=compared).check_fits(known)
    factors = factors.to(context.device, context.dtype)
    if factors.has_squares:
        return factors
    covered = {name: layer for name, layer in find_layers(module).layers.items() if name in factors.layers}
    factors.layers = {name: factors.layers[name] for name in covered}
    for name, layer in factors.layers.items():
        if layer.basis is None:
            layer.set_basis(compute_eigenbasis(name, layer))
    plan = LayerPlan(covered, {}, loss=context.plan.loss)
    squares = SquaresPass(plan, factors, seed=context.options.seed)
    context.runner.run(squares, context.train)
    _reduce_squares(context, factors)
    factors.layers = {name: layer for name, layer in factors.layers.items() if layer.squares_examples}
    context.notes.inform(
        "The fit ended before eigenvalues were collected; they were measured in a pass of their own."
    )
    return factors


def _complete(context: Context, factors: Factors) -> Factors:
    """Fit factors of what the fit has collected none of, as parameters outside of layers, in a pass."""
    known = {name: layer for name, layer in context.plan.layers.items() if name in factors.layers}
    verified = context.plan.verified
    missing = {
        name: layer
        for name, layer in context.plan.layers.items()
        if name not in known and _TAKES_NO_PART.format(name) not in verified
    }
    if factors.origin != "fit" or not missing or not known:
        return factors
    fitted = _fit(context, replace(context.plan, layers=missing, is_part=True))
    added = {name: layer for name, layer in fitted.layers.items() if name in missing}
    verified.update(_TAKES_NO_PART.format(name) for name in missing.keys() - added.keys())
    if added:
        context.notes.inform(
            f"The fit has collected no factors of {next(iter(added))!r}"
            + (f" and {len(added) - 1} more" if len(added) > 1 else "")
            + ", because it collects those of Linear and convolution layers that are called and that it was "
            "to watch. They were fitted in a pass of their own."
        )
    return replace(factors, layers=factors.layers | added)


def _fill(context: Context, factors: Factors, plan: LayerPlan, owners: Ownership | None = None) -> None:
    """Give every process statistics of the same layers in the same order, or of those that it owns."""
    own = plan.layers if owners is None else owners.own
    zeros = {
        name: LayerStatistics.zeros(
            layer.shape, layer.diagonal_sides, device=context.device, dtype=context.dtype
        )
        for name, layer in plan.layers.items()
        if name not in factors.layers
    }
    factors.layers = {name: (factors.layers | zeros)[name] for name in plan.layers if name in own}


def _reduce_squares(context: Context, factors: Factors, *, owned: bool = False) -> None:
    """Sum squares over the processes, unless each layer's are on one that owns it.

    What did not use a layer has a gradient of zero there, and counts.
    """
    for layer in factors.layers.values():
        if context.runner.world_size > 1 and layer.squares is None:
            layer.squares = layer.inputs.new_zeros(layer.shape)
        if context.runner.world_size > 1 and not owned:
            layer.reduce(context.runner.all_reduce_sum, covariances=False)
        if layer.squares_examples:
            layer.squares_examples = float(context.train.num_examples)
