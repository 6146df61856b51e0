"""Methods of attribution: each solves against one approximation of the curvature, one file a kind."""

from lightning_influence.methods import block_ggn as block_ggn
from lightning_influence.methods import closed_form as closed_form
from lightning_influence.methods import exact as exact
from lightning_influence.methods import hessian as hessian
from lightning_influence.methods import two_level as two_level
from lightning_influence.methods.base import Method, find_method, register_method
from lightning_influence.methods.context import Context, Notes
from lightning_influence.methods.options import Damping, Options

__all__ = ["Context", "Damping", "Method", "Notes", "Options", "find_method", "register_method"]
