"""A batch of one example has the gradients that the example has in a larger batch."""

import torch
from drive import mute
from torch import nn

from lightning_influence.model.forward import Forward
from lightning_influence.model.layers.plan import find_layers


class Attention(nn.Module):
    """Its output projection is used by a function, not called as a module."""

    def __init__(self):
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 1)
        self.double()

    def training_step(self, batch, batch_idx):
        x, y = batch
        out = self.attention(x, x, x, need_weights=False)[0]
        return (self.head(out).mean((1, 2)) - y).square().mean()


def test_weights_that_functions_use_are_covered_in_a_batch_of_one():
    torch.manual_seed(0)
    module, x, y = mute(Attention()), torch.randn(3, 5, 8).double(), torch.randn(3).double()
    forward = Forward(find_layers(module))
    single = forward(module, (x[:1], y[:1]), 1).loss_gradients()
    assert not forward.silent
    value = module.training_step((x[:1], y[:1]), 0)
    weight = module.attention.out_proj.weight
    expected = torch.autograd.grad(value, weight)[0]
    torch.testing.assert_close(single["attention.out_proj"].dense()[0, 0, 0, :, :-1], expected)
