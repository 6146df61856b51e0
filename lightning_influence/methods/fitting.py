"""Fitting what methods need in passes of their own: Kronecker factors, second moments, gradients of a sample."""

from __future__ import annotations

from torch import Tensor

from lightning_influence.errors import UnsupportedDataError
from lightning_influence.factors.factors import Factors
from lightning_influence.factors.statistics import eigenbasis
from lightning_influence.layers import DenseGradients, FactoredGradients, LayerGradients, LayerPlan
from lightning_influence.methods.base import Context, Passes
from lightning_influence.passes.statistics import CovariancePass, DiagonalPass, SquaresPass


def fitted_factors(context: Context) -> Factors:
    """The model's factors with eigenvalues: those that are there, completed or fitted in one or two passes.

    Raises:
        FactorMismatchError: if stored factors belong to another model.
    """
    factors = context.state.factors
    if factors is None or not factors.layers:
        factors = _fit(context)
    else:
        factors = _adopt(context, factors)
    context.state.factors = factors
    context.plan = _restrict(context, factors)
    context.extra["factors"] = f"from the {factors.origin}, {factors.fisher} Fisher"
    return factors


def fitted_diagonal(context: Context) -> Factors:
    """Second moments of the gradients in the parameters' own basis, fitted in one pass."""
    one_pass = DiagonalPass(context.plan, fisher=context.options.fisher, seed=context.options.seed)
    context.runner.run(one_pass, context.train)
    _reduce(context.runner, one_pass.factors, covariances=False)
    context.plan = _restrict(context, one_pass.factors)
    return one_pass.factors


def _fit(context: Context) -> Factors:
    options = context.options
    covariance = CovariancePass(
        context.plan, fisher=options.fisher, seed=options.seed, cache_bytes=options.memory_budget
    )
    context.runner.run(covariance, context.train)
    _reduce(context.runner, covariance.factors, covariances=True)
    covariance.finish()
    if covariance.cache is None:
        squares = SquaresPass(context.plan, covariance.factors, seed=options.seed)
        context.runner.run(squares, context.train)
    _reduce(context.runner, covariance.factors, covariances=False)
    return covariance.factors


def _adopt(context: Context, factors: Factors) -> Factors:
    """Check stored factors against the model, bring them to its device, and complete them."""
    shapes = {name: layer.shape for name, layer in context.plan.layers.items()}
    factors.check_fits({name: shape for name, shape in shapes.items() if name in factors.layers})
    factors = factors.to(context.device, context.dtype)
    if not factors.has_squares:
        for name, layer in factors.layers.items():
            if layer.basis is None:
                layer.set_basis(eigenbasis(name, layer))
        squares = SquaresPass(context.plan, factors, seed=context.options.seed)
        context.runner.run(squares, context.train)
        _reduce(context.runner, factors, covariances=False)
        context.warnings.append(
            "The fit ended before eigenvalues were collected; they were measured in a pass of their own."
        )
    return factors


def _restrict(context: Context, factors: Factors) -> LayerPlan:
    """The plan without layers that have no factors because no training step used them."""
    unused = [name for name in context.plan.layers if name not in factors.layers]
    if not unused:
        return context.plan
    message = f"Layers {unused} took no part in the training loss and are left out."
    if message not in context.warnings:
        context.warnings.append(message)
    layers = {name: layer for name, layer in context.plan.layers.items() if name in factors.layers}
    left_out = {f"{name}.*": (context.plan.layers[name].numel, "not used by the loss") for name in unused}
    return LayerPlan(layers, {**context.plan.uncovered, **left_out})


def _reduce(runner: Passes, factors: Factors, *, covariances: bool) -> None:
    """Sum raw statistics over the processes."""
    if runner.world_size == 1:
        return
    for layer in factors.layers.values():
        layer.reduce(runner.all_reduce_sum, covariances=covariances)
    if covariances or not factors.weight_examples:
        factors.reduce_counts(runner.all_reduce_sum)


def gather(runner: Passes, gradients: dict[str, LayerGradients]) -> dict[str, LayerGradients]:
    """All processes' gradients, in the order of their ranks."""
    if runner.world_size == 1:
        return gradients
    return {name: _gather_layer(runner, layer) for name, layer in gradients.items()}


def _gather_layer(runner: Passes, layer: LayerGradients) -> LayerGradients:
    def along(tensor: Tensor, dim: int) -> Tensor:
        return runner.all_gather_cat(tensor.transpose(0, dim).contiguous()).transpose(0, dim).contiguous()

    if isinstance(layer, FactoredGradients):
        return FactoredGradients(along(layer.inputs, 1), along(layer.outputs, 2))
    if not isinstance(layer, DenseGradients):
        raise UnsupportedDataError(f"gradients of type {type(layer).__name__} cannot be gathered")
    return DenseGradients(along(layer.matrices, 1))
