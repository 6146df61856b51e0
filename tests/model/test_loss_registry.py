import pytest
import torch
from torch.nn import functional as F

from lightning_influence.model.losses import registry
from lightning_influence.model.losses.capture import LossCapture
from lightning_influence.model.losses.mse import SquaredErrorLoss
from lightning_influence.model.losses.registry import register_loss
from lightning_influence.support.errors import LossCaptureError


@pytest.mark.filterwarnings("ignore:size_average and reduce args")
@pytest.mark.parametrize(
    "arguments", [(False, None), (None, False), (False, False), (True, None), (None, True), (True, False)]
)
def test_deprecated_arguments_mean_what_they_mean_to_torch(arguments):
    size_average, reduce = arguments
    outputs, target = torch.randn(3, 2, requires_grad=True), torch.zeros(3, 2)
    value = F.mse_loss(outputs, target, size_average, reduce)
    loss = registry.parse(F.mse_loss, (outputs, target, size_average, reduce), {})
    assert (loss.reduction == "none") == (value.dim() > 0)
    torch.testing.assert_close(loss.batch_value(), value.mean().detach())


def test_unknown_arguments_and_reductions_are_explained():
    outputs, target = torch.randn(3, 2, requires_grad=True), torch.zeros(3, 2)
    with pytest.raises(
        LossCaptureError, match=r"F.mse_loss was called with arguments .* \['flavour'\]. Accepted are"
    ):
        registry.parse(F.mse_loss, (outputs, target), {"flavour": 1})
    with pytest.raises(LossCaptureError, match="reduction='median'; accepted are 'mean', 'sum' and 'none'"):
        registry.parse(F.mse_loss, (outputs, target), {"reduction": "median"})


def test_every_loss_of_torch_is_recorded():
    names = {name for name in dir(F) if "loss" in name or name.endswith("entropy") or name == "kl_div"}
    public = {getattr(F, name) for name in names if not name.startswith("_")}
    assert len(public) > 15
    assert public <= registry.find_losses()


def test_a_loss_can_be_registered(monkeypatch):
    monkeypatch.setattr(registry, "_PARSERS", dict(registry._PARSERS))

    @register_loss(F.multi_margin_loss)
    def parse(input, target, reduction="mean", p=1, margin=1.0):
        return SquaredErrorLoss(input, target, input.shape[0], reduction)

    assert registry.is_supported(F.multi_margin_loss)
    outputs = torch.randn(3, 2, requires_grad=True)
    with LossCapture() as capture:
        value = F.multi_margin_loss(outputs, torch.zeros(3, dtype=torch.long))
    assert isinstance(capture.resolve(value, 3), SquaredErrorLoss)
    registry.find_losses.cache_clear()
