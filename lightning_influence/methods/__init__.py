"""Methods of attribution: each solves against one approximation of the curvature, one file a kind."""

from lightning_influence.methods import astra as astra
from lightning_influence.methods import block_ggn as block_ggn
from lightning_influence.methods import closed_form as closed_form
from lightning_influence.methods import exact as exact
from lightning_influence.methods import hessian as hessian
from lightning_influence.methods import krylov as krylov
from lightning_influence.methods import lissa as lissa
from lightning_influence.methods import two_level as two_level
from lightning_influence.methods.base import Method, find_method, register_method
from lightning_influence.methods.context import Context, Notes
from lightning_influence.methods.options import Curvature, Damping, Options, Preconditioner

__all__ = [
    "Context",
    "Curvature",
    "Damping",
    "Method",
    "Notes",
    "Options",
    "Preconditioner",
    "find_method",
    "register_method",
]
