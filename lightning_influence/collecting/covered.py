"""Which layers a fit collects factors of."""

from __future__ import annotations

from dataclasses import replace

from torch import nn
from torch.nn.parameter import is_lazy

from lightning_influence.collecting.state import Settings
from lightning_influence.model.layers.layer import supported_types
from lightning_influence.model.layers.plan import LayerPlan, find_layers
from lightning_influence.support.errors import UnsupportedModelError


def find_collected(module: nn.Module, settings: Settings) -> LayerPlan:
    """Return the layers that a fit collects factors of.

    Parameters that are blocks by themselves are fitted in a pass after the fit: they count as covered.

    Args:
        module: the model.
        settings: of the callback.

    Raises:
        UnsupportedModelError: if it has none, or one whose shape is not known yet.
    """
    lazy = {name.rpartition(".")[0] for name, p in module.named_parameters() if is_lazy(p)}
    if lazy:
        raise UnsupportedModelError(
            f"The shapes of {', '.join(map(repr, sorted(lazy)[:4]))} are not known before the first batch, "
            "because they are lazy modules. Run the model once on a batch before `fit` to have factors "
            "collected."
        )
    whole = find_layers(module, settings.layers)
    try:
        plan = find_layers(module, settings.layers, parameters=False)
    except UnsupportedModelError as error:
        what = "this model has none that is trained" if settings.layers is None else "layers= selects none"
        raise UnsupportedModelError(
            f"A fit collects factors of linear and convolution layers ({', '.join(supported_types())}), and "
            f"{what}."
        ) from error
    return replace(plan, uncovered=whole.uncovered, loss=settings.loss)
