"""Whether a factory makes fresh models: what it hands out twice, a second run would find trained."""

from __future__ import annotations

from torch import nn

from lightning_influence.support.errors import UnsupportedModelError


def check_distinct_models(
    model: nn.Module, other: nn.Module, factory: str = "factory", *, frozen: bool = True
) -> None:
    """Refuse a factory whose products are the same object, or share parameters.

    Args:
        model: of one run.
        other: of another run.
        factory: what the factory is called.
        frozen: whether sharing parameters that are not trained is refused as well.

    Raises:
        UnsupportedModelError: naming what is shared.
    """
    if model is other:
        raise UnsupportedModelError(
            f"`{factory}()` returned the same object twice: a second run would start from the first run's "
            "parameters whatever its seed. Build the module inside the function."
        )
    known = {id(parameter) for parameter in other.parameters()}
    known |= {parameter.data_ptr() for parameter in other.parameters() if parameter.numel()}
    for name, parameter in model.named_parameters():
        shared = id(parameter) in known or parameter.data_ptr() in known
        if shared and (frozen or parameter.requires_grad):
            raise UnsupportedModelError(
                f"Two modules of `{factory}()` share the parameter {name!r}: the runs would not have values "
                "of their own. Build every layer inside the function."
            )
