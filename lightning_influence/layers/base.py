"""How a kind of layer turns a forward and a backward pass into per-example gradients.

Weight-sharing format, used throughout the package: a layer that computes ``s = W abar`` at ``R`` positions of
each of ``B`` examples, in ``G`` independent groups, has

- inputs ``abar`` of shape ``(G, B, R, D_in)``, the last coordinate being 1 when the layer has a trainable
  bias;
- output gradients ``ds`` of shape ``(G, B, R, D_out)``;
- a gradient matrix ``sum_r ds_r abar_r^T`` per example, of shape ``(G, D_out, D_in)``.

A rule is stateless: it says how one module class maps its tensors to this format and its parameters to the
matrix.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn


class LayerRule(ABC):
    """How one class of modules fits the weight-sharing format; register it with :func:`..layers.register`."""

    @abstractmethod
    def shape(self, module: nn.Module) -> tuple[int, int, int]:
        """``(G, D_out, D_in)`` without the bias coordinate."""

    @abstractmethod
    def inputs(self, module: nn.Module, x: Tensor, num_examples: int) -> Tensor:
        """Inputs ``(G, B, R, D_in)`` without the bias coordinate, from the module's input tensor."""

    @abstractmethod
    def output_gradients(self, module: nn.Module, grad: Tensor, num_examples: int) -> Tensor:
        """Output gradients ``(G, B, R, D_out)`` from the gradient of the module's output tensor."""

    def weight(self, module: nn.Module) -> nn.Parameter:
        """Return the weight; its rows in row-major order are the ``G * D_out`` rows of the matrix."""
        weight = module.weight
        assert isinstance(weight, nn.Parameter)
        return weight

    def bias(self, module: nn.Module) -> nn.Parameter | None:
        """Return the bias parameter (``G * D_out`` entries), or None."""
        bias = getattr(module, "bias", None)
        return bias if isinstance(bias, nn.Parameter) else None


@dataclass(frozen=True)
class Layer:
    """One layer of a model, with what the algebra needs to know of it.

    Attributes:
        name: the module's name in the model.
        module: the module itself.
        rule: how its class fits the weight-sharing format.
        groups: ``G``.
        d_out: ``D_out``, outputs per group.
        d_in: ``D_in``, inputs per group, with the bias coordinate if ``has_bias``.
        has_bias: whether a trainable bias is the last input coordinate.
    """

    name: str
    module: nn.Module
    rule: LayerRule
    groups: int
    d_out: int
    d_in: int
    has_bias: bool

    @classmethod
    def of(cls, name: str, module: nn.Module, rule: LayerRule) -> Layer:
        """Describe ``module``; a bias counts only if it is trained.

        Returns:
            The layer, with ``D_in`` including the bias coordinate.
        """
        groups, d_out, d_in = rule.shape(module)
        bias = rule.bias(module)
        has_bias = bias is not None and bias.requires_grad
        return cls(name, module, rule, groups, d_out, d_in + has_bias, has_bias)

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(G, D_out, D_in)`` of the gradient matrix."""
        return self.groups, self.d_out, self.d_in

    @property
    def numel(self) -> int:
        """Number of parameters in the gradient matrix."""
        return self.groups * self.d_out * self.d_in

    def inputs(self, x: Tensor, num_examples: int) -> Tensor:
        """Return inputs ``(G, B, R, D_in)`` in full precision, with the bias coordinate."""
        abar = self.rule.inputs(self.module, full_precision(x), num_examples)
        if not self.has_bias:
            return abar
        return torch.cat([abar, abar.new_ones(*abar.shape[:-1], 1)], dim=-1)

    def output_gradients(self, grad: Tensor, num_examples: int) -> Tensor:
        """Return output gradients ``(G, B, R, D_out)`` in full precision."""
        return self.rule.output_gradients(self.module, full_precision(grad), num_examples)

    def from_parameters(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Bring tensors ``(..., *weight.shape)`` and ``(..., *bias.shape)`` into matrix form.

        Returns:
            Matrices ``(..., G, D_out, D_in)``.
        """
        lead = weight.shape[: weight.ndim - self.rule.weight(self.module).ndim]
        matrix = weight.reshape(*lead, self.groups, self.d_out, self.d_in - self.has_bias)
        if not self.has_bias:
            return matrix
        assert bias is not None
        return torch.cat([matrix, bias.reshape(*lead, self.groups, self.d_out, 1)], dim=-1)

    def to_parameters(self, matrix: Tensor) -> tuple[Tensor, Tensor | None]:
        """Undo :meth:`from_parameters` for matrices ``(..., G, D_out, D_in)``.

        Returns:
            The weight-shaped part, and the bias-shaped one or None.
        """
        lead = matrix.shape[:-3]
        shape = self.rule.weight(self.module).shape
        if not self.has_bias:
            return matrix.reshape(*lead, *shape), None
        return matrix[..., :-1].reshape(*lead, *shape), matrix[..., -1].reshape(*lead, -1)


def full_precision(x: Tensor) -> Tensor:
    """Return ``x`` detached, in float32 if it was of lower precision."""
    x = x.detach()
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def split_rows(x: Tensor, num_examples: int) -> Tensor:
    """Return ``(B * R', ..., D)`` as ``(1, B, R, D)``: all dimensions but the last are positions."""
    return x.reshape(1, num_examples, -1, x.shape[-1])
