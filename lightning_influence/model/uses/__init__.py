"""Per-example gradients of every parameter of an unchanged model, from the operations that use it.

A :class:`Watch` follows two kinds of tensors through a forward pass: those that hold the examples of the
batch, each with the dimension in which these stand, and those made of parameters alone. An operation that
takes one of each is a *use*. Backward passes give the gradients at the uses' outputs, and each use pulls
them back to its parameters example by example. A certificate checks the result against automatic
differentiation.
"""

from lightning_influence.model.uses.certificate import Verdict, certify, draw_weights, weigh_losses
from lightning_influence.model.uses.exact import (
    Certified,
    ParameterReport,
    UseReport,
    Way,
    differentiate_examples,
    differentiate_losses,
)
from lightning_influence.model.uses.gradients import (
    UseGradients,
    differentiate_rows,
    edges_of,
    gather_passes,
    names_of,
    pull_gradients,
    pull_uses,
)
from lightning_influence.model.uses.operations import ExampleCall, register_operation, supported_operations
from lightning_influence.model.uses.parts import Dense, ParameterGradient, Part, Product, Rows
from lightning_influence.model.uses.places import Place
from lightning_influence.model.uses.watch import Watch

__all__ = [
    "Certified",
    "Dense",
    "ExampleCall",
    "ParameterGradient",
    "ParameterReport",
    "Part",
    "Place",
    "Product",
    "Rows",
    "UseGradients",
    "UseReport",
    "Verdict",
    "Watch",
    "Way",
    "certify",
    "differentiate_examples",
    "differentiate_losses",
    "differentiate_rows",
    "draw_weights",
    "edges_of",
    "gather_passes",
    "names_of",
    "pull_gradients",
    "pull_uses",
    "register_operation",
    "supported_operations",
    "weigh_losses",
]
