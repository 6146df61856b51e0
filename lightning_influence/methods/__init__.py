"""Methods of attribution: each solves against one approximation of the curvature, one file a family."""

from lightning_influence.methods import auto as auto
from lightning_influence.methods import closed_form as closed_form
from lightning_influence.methods import dense as dense
from lightning_influence.methods import iterative as iterative
from lightning_influence.methods import stochastic as stochastic
from lightning_influence.methods.context import Context
from lightning_influence.methods.method import Method, find_method, register_method
from lightning_influence.methods.options import Options

__all__ = ["Context", "Method", "Options", "find_method", "register_method"]
