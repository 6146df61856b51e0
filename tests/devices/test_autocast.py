"""Mixed precision on the device: the fit collects, its scaler is taken in, and questions are answered."""

import pytest
import torch
from device_models import fit
from lightning.pytorch import Callback
from lightning.pytorch.plugins import MixedPrecision
from pretended_device import NAME

HALF = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
pytestmark = pytest.mark.devices


@pytest.mark.parametrize("precision", HALF)
def test_a_fit_in_mixed_precision_has_the_factors_of_one_in_float32(device, precision):
    """The scale that float16 gradients are multiplied by is no part of what is collected."""
    scaler = torch.amp.GradScaler(NAME, init_scale=2.0**10) if precision == "16-mixed" else None
    plugin = MixedPrecision(precision, NAME, scaler)
    seen = set()

    class Watch(Callback):
        def on_fit_start(self, trainer, pl_module):
            pl_module.net.head[1].register_forward_hook(lambda *call: seen.add(call[-1].dtype))

    mixed = fit("convolutional", device, dtype=torch.float32, plugins=[plugin], more=[Watch()])
    assert HALF[precision] in seen
    plain = fit("convolutional", device, dtype=torch.float32)
    ours, theirs = (found.trainer.callbacks[0] for found in (mixed, plain))
    assert ours.num_collected == theirs.num_collected > 0
    for name, layer in theirs.factors.layers.items():
        other = ours.factors.layers[name]
        for part in ("inputs", "outputs", "squares"):
            one, two = getattr(other, part).cpu(), getattr(layer, part).cpu()
            assert one.dtype == torch.float32
            assert float((one - two).norm()) <= 0.1 * float(two.norm()), (name, part)
    scores = [
        found.trainer.influence(found.module, found.train, found.queries, method="ekfac").scores
        for found in (mixed, plain)
    ]
    assert float((scores[0] - scores[1]).norm()) <= 0.1 * float(scores[1].norm())
