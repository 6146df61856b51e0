"""How each kind of operation pulls output gradients back to its parameters; one file a family."""

from lightning_influence.model.uses.operations import contraction as contraction
from lightning_influence.model.uses.operations import convolution as convolution
from lightning_influence.model.uses.operations import elementwise as elementwise
from lightning_influence.model.uses.operations import embedding as embedding
from lightning_influence.model.uses.operations import linear as linear
from lightning_influence.model.uses.operations import normalisation as normalisation
from lightning_influence.model.uses.operations import recurrent as recurrent
from lightning_influence.model.uses.operations.general import pull_in_loop, pull_mapped
from lightning_influence.model.uses.operations.registry import (
    ExampleCall,
    find_operation,
    register_operation,
    supported_operations,
)

__all__ = [
    "ExampleCall",
    "find_operation",
    "pull_in_loop",
    "pull_mapped",
    "register_operation",
    "supported_operations",
]
