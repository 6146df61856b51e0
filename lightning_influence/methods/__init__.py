"""Methods of attribution: each solves against one approximation of the curvature, one file a kind."""

from lightning_influence.methods import closed_form as closed_form
from lightning_influence.methods import exact as exact
from lightning_influence.methods import two_level as two_level
from lightning_influence.methods.base import Context, Damping, Method, Options, find_method, register_method

__all__ = ["Context", "Damping", "Method", "Options", "find_method", "register_method"]
