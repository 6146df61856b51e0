"""How a kind of layer turns a forward and a backward pass into per-example gradients.

Weight-sharing format, used throughout the package: a layer that computes ``s = W abar`` at ``R`` positions of
each of ``B`` examples, in ``G`` independent groups, has

- inputs ``abar`` of shape ``(G, B, R, D_in)``, the last coordinate being 1 when the layer has a trainable
  bias;
- output gradients ``ds`` of shape ``(G, B, R, D_out)``;
- a gradient matrix ``sum_r ds_r abar_r^T`` per example, of shape ``(G, D_out, D_in)``.

A rule is stateless: it says how one module class maps its tensors to this format and its parameters to the
matrix.

Which rule serves which class of modules.

Linear layers: every leading dimension after the examples is a position.

Convolutions in one, two and three dimensions: every output pixel is a position, every group a block.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_influence.support.coordinates import count_coordinates, from_coordinates, to_coordinates


class LayerRule(ABC):
    """How one class of modules fits the weight-sharing format; see :func:`register_layer`.

    Attributes:
        transposed: whether the weight, a matrix, has an output in each column, not in each row.
    """

    transposed: ClassVar[bool] = False

    @abstractmethod
    def shape(self, module: nn.Module) -> tuple[int, int, int]:
        """``(G, D_out, D_in)`` without the bias coordinate."""

    @abstractmethod
    def inputs(self, module: nn.Module, x: Tensor, num_examples: int) -> Tensor:
        """Inputs ``(G, B, R, D_in)`` without the bias coordinate, from the module's input tensor."""

    @abstractmethod
    def output_gradients(self, module: nn.Module, grad: Tensor, num_examples: int) -> Tensor:
        """Output gradients ``(G, B, R, D_out)`` from the gradient of the module's output tensor."""

    def inputs_at(self, module: nn.Module, x: Tensor, num_examples: int, positions: Tensor) -> Tensor:
        """Inputs ``(G, B, p, D_in)`` at some positions ``(B, p)`` of those of :meth:`inputs`."""
        everywhere = self.inputs(module, x, num_examples)
        return everywhere[:, torch.arange(num_examples, device=x.device)[:, None], positions]

    def weight(self, module: nn.Module) -> nn.Parameter:
        """The weight, ``module.weight`` by default; its rows are the ``G * D_out`` rows of the matrix."""
        weight: nn.Parameter = module.weight  # type: ignore[assignment]
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
    def dtype(self) -> torch.dtype:
        """Precision of the weights; of the coordinates of complex ones."""
        return self.rule.weight(self.module).dtype.to_real()

    @property
    def diagonal_sides(self) -> tuple[bool, bool]:
        """Whether only the diagonal is held of the covariance of outputs, and of that of inputs."""
        limit = MATRIX_WIDTH if isinstance(self.rule, ParameterRule) else SIDE_WIDTH
        return self.is_table or self.d_out > limit, self.d_in - self.has_bias > limit

    @property
    def is_table(self) -> bool:
        """Whether the layer is a parameter by itself whose larger dimension has a diagonal alone."""
        return isinstance(self.rule, ParameterRule) and self.rule.is_table(self.module)

    @property
    def has_gradient_hooks(self) -> bool:
        """Whether somebody's hooks change the gradients of the parameters, as masks of a part do."""
        parameters = (self.rule.weight(self.module), self.rule.bias(self.module))
        return any(p is not None and p._backward_hooks for p in parameters)

    @property
    def numel(self) -> int:
        """Number of parameters in the gradient matrix."""
        return self.groups * self.d_out * self.d_in

    def inputs(self, x: Tensor, num_examples: int) -> Tensor:
        """Return inputs ``(G, B, R, D_in)`` in full precision, with the bias coordinate."""
        return self._with_bias(self.rule.inputs(self.module, full_precision(x), num_examples))

    def inputs_at(self, x: Tensor, num_examples: int, positions: Tensor) -> Tensor:
        """Return :meth:`inputs` at some positions ``(B, p)`` of each example, ``(G, B, p, D_in)``."""
        positions = positions.to(x.device)
        return self._with_bias(self.rule.inputs_at(self.module, full_precision(x), num_examples, positions))

    def output_gradients(self, grad: Tensor, num_examples: int) -> Tensor:
        """Return output gradients ``(G, B, R, D_out)`` in full precision."""
        return self.rule.output_gradients(self.module, full_precision(grad), num_examples)

    def _with_bias(self, abar: Tensor) -> Tensor:
        if not self.has_bias:
            return abar
        return torch.cat([abar, abar.new_ones(*abar.shape[:-1], 1)], dim=-1)

    def from_parameters(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Bring tensors ``(..., *weight.shape)`` and ``(..., *bias.shape)`` into matrix form.

        Returns:
            Matrices ``(..., G, D_out, D_in)``.
        """
        lead = weight.shape[: weight.ndim - self.rule.weight(self.module).ndim]
        weight = to_coordinates(weight.mT if self.rule.transposed else weight)
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
        whole = self.rule.weight(self.module)
        shape = whole.shape
        rows, bias = (
            (matrix[..., :-1], matrix[..., -1].reshape(*lead, -1)) if self.has_bias else (matrix, None)
        )
        if self.rule.transposed:
            return rows.reshape(*lead, *reversed(shape)).mT, bias
        if whole.is_complex():
            return from_coordinates(rows.reshape(*lead, *shape, 2)), bias
        return rows.reshape(*lead, *shape), bias


#: What the names of parameters of modules begin with, see :func:`parameters_of`.
WEIGHT, BIAS = "weight of ", "bias of "
# A parameter by itself is a vector up to the first width: the second moments of its gradients are a matrix,
# whose eigendecomposition costs what that of a layer of this width does. Above, it is a matrix of rows and
# columns; if one dimension is larger than the second width it is a table, of whose larger dimension only a
# diagonal is held. Of the inputs and of the outputs of a layer only the diagonal is held above the last
# width, the widest whose eigendecomposition takes minutes on one core. Chosen by hand.
DENSE_WIDTH, MATRIX_WIDTH, SIDE_WIDTH = 1024, 4096, 8192
# An embedding is a table from fewer rows on: an example looks up few of them, and a full matrix of all rows
# was most of the cost of a small language model (2,000 tokens: factors 16 epochs in place of 8, rank
# correlation with converged solves .81 and .80; examples/benchmarks/peers.py).
LOOKUP_WIDTH = 1024


@dataclass(frozen=True)
class ParameterRule(LayerRule):
    """A parameter by itself, whatever uses it.

    A small one is a vector: one input, which is 1, and its gradient as output gradient. A matrix has inputs
    and output gradients of the operations that it maps in, or the columns of its gradient. A large matrix is
    a table, whose ``V`` rows are its larger dimension. Each entry of another large one is a group of its own.
    A complex one is the real one of its coordinates, ``(*shape, 2)``.

    Attributes:
        attribute: the parameter's name in its module.
    """

    attribute: str

    def shape(self, module: nn.Module) -> tuple[int, int, int]:
        """Return ``(1, numel, 1)``, ``(1, rows, columns)`` for a matrix or table, ``(numel, 1, 1)`` else."""
        weight = self.weight(module)
        numel, rows = count_coordinates(weight), weight.shape[0] if weight.ndim else 1
        if numel <= DENSE_WIDTH:
            return (1, numel, 1)
        if self.is_table(module):
            return (1, max(weight.shape), min(weight.shape))
        return (1, rows, numel // rows) if max(rows, numel // rows) <= MATRIX_WIDTH else (numel, 1, 1)

    def is_table(self, module: nn.Module) -> bool:
        """Return whether the parameter is a table: a matrix one of whose dimensions is large."""
        return is_table(self.weight(module), isinstance(module, nn.Embedding | nn.EmbeddingBag))

    def inputs(self, module: nn.Module, x: Tensor, num_examples: int) -> Tensor:
        """Return ones ``(G, B, 1, 1)``, or the identity ``(1, B, D_in, D_in)`` for a matrix."""
        groups, _, d_in = self.shape(module)
        x = to_coordinates(x)
        if d_in > 1:
            return torch.eye(d_in, dtype=x.dtype, device=x.device).expand(groups, num_examples, d_in, d_in)
        return x.new_ones(groups, num_examples, 1, 1)

    def output_gradients(self, module: nn.Module, grad: Tensor, num_examples: int) -> Tensor:
        """Return per-example gradients ``(B, *shape)`` as ``(G, B, 1, D_out)`` or columns of a matrix."""
        groups, d_out, d_in = self.shape(module)
        grad = to_coordinates(grad)
        if d_in > 1:
            return grad.reshape(1, num_examples, d_out, d_in).transpose(2, 3)
        return grad.reshape(num_examples, groups, 1, d_out).transpose(0, 1)

    def weight(self, module: nn.Module) -> nn.Parameter:
        """Return the parameter."""
        parameter = getattr(module, self.attribute)
        assert isinstance(parameter, nn.Parameter)
        return parameter

    def bias(self, module: nn.Module) -> nn.Parameter | None:
        """Return None."""
        return None


class WideTableRule(ParameterRule):
    """A table that stands on its side: its larger dimension are the columns of the parameter."""

    transposed: ClassVar[bool] = True


def is_table(parameter: Tensor, looked_up: bool = False) -> bool:
    """Return whether a parameter by itself is a table: a matrix one of whose dimensions is large.

    Args:
        parameter: any.
        looked_up: whether it is an embedding's, whose rows are looked up.
    """
    if (
        parameter.ndim != 2
        or parameter.is_complex()
        or min(parameter.shape) < 2
        or parameter.numel() <= DENSE_WIDTH
    ):
        return False
    rows, columns = parameter.shape
    return max(rows, columns) > MATRIX_WIDTH or (looked_up and rows > LOOKUP_WIDTH and rows >= columns)


def rule_of_parameter(attribute: str, parameter: Tensor) -> ParameterRule:
    """Return the rule that serves a parameter by itself.

    Args:
        attribute: its name in its module.
        parameter: the parameter.
    """
    lies = is_table(parameter) and parameter.shape[1] > parameter.shape[0]
    return WideTableRule(attribute) if lies else ParameterRule(attribute)


def parameters_of(layers: Mapping[str, Layer]) -> dict[str, Tensor]:
    """Return all covered parameters.

    Args:
        layers: the covered layers by name.

    Returns:
        By name those that are layers by themselves, others as the weight or the bias of theirs.
    """
    parameters: dict[str, Tensor] = {}
    for name, layer in layers.items():
        is_single = isinstance(layer.rule, ParameterRule)
        bias = layer.rule.bias(layer.module) if layer.has_bias else None
        parameters[name if is_single else WEIGHT + name] = layer.rule.weight(layer.module)
        if bias is not None:
            parameters[BIAS + name] = bias
    return parameters


def full_precision(x: Tensor) -> Tensor:
    """Return ``x`` detached, in float32 if it was of lower precision."""
    x = x.detach()
    return x if x.is_complex() or x.dtype in (torch.float32, torch.float64) else x.float()


def split_rows(x: Tensor, num_examples: int) -> Tensor:
    """Return ``(B * R', ..., D)`` as ``(1, B, R, D)``: all dimensions but the last are positions."""
    return x.reshape(1, num_examples, -1, x.shape[-1])


_RULES: dict[type[nn.Module] | str, LayerRule] = {}


def register_layer(*module_types: type[nn.Module] | str) -> Callable[[type[LayerRule]], type[LayerRule]]:
    """Class decorator: serve modules of these types with the decorated rule.

    Args:
        *module_types: classes whose instances the rule can handle, or their full names where the package
            need not be installed; a subclass is served too unless it overrides ``forward``.

    Returns:
        The decorator; it returns the rule unchanged.
    """

    def decorate(rule: type[LayerRule]) -> type[LayerRule]:
        for module_type in module_types:
            _RULES[module_type] = rule()
        return rule

    return decorate


def find_rule(module: nn.Module) -> LayerRule | None:
    """Return the rule for this module, or None; with a ``forward`` of its own a subclass may differ."""
    for base in type(module).__mro__:
        rule = _RULES.get(base) or _RULES.get(f"{base.__module__}.{base.__qualname__}")
        if rule is not None and type(module).forward is getattr(base, "forward", None):
            return rule
    return None


def supported_types() -> list[str]:
    """Return names of the registered module classes, sorted."""
    return sorted(kind.rpartition(".")[2] if isinstance(kind, str) else kind.__name__ for kind in _RULES)


@register_layer(nn.Linear)
class LinearRule(LayerRule):
    """``nn.Linear`` on ``(B, ..., D)`` or on rows ``(B * R, D)``."""

    def shape(self, module: nn.Module) -> tuple[int, int, int]:
        """Return ``(1, out_features, in_features)``."""
        assert isinstance(module, nn.Linear)
        return 1, module.out_features, module.in_features

    def inputs(self, module: nn.Module, x: Tensor, num_examples: int) -> Tensor:
        """Return inputs ``(1, B, R, in_features)``."""
        return split_rows(x, num_examples)

    def output_gradients(self, module: nn.Module, grad: Tensor, num_examples: int) -> Tensor:
        """Return output gradients ``(1, B, R, out_features)``."""
        return split_rows(grad, num_examples)


@register_layer("transformers.pytorch_utils.Conv1D")
class TransposedLinearRule(LinearRule):
    """The linear layer of GPT-2 and its kin, ``x W + b`` with ``W (D_in, D_out)``."""

    transposed: ClassVar[bool] = True

    def shape(self, module: nn.Module) -> tuple[int, int, int]:
        """Return ``(1, D_out, D_in)``."""
        d_in, d_out = self.weight(module).shape
        return 1, d_out, d_in


_Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d


@register_layer(nn.Conv1d, nn.Conv2d, nn.Conv3d)
class ConvRule(LayerRule):
    """``nn.ConvNd`` with any stride, dilation, groups, padding and padding mode."""

    def shape(self, module: nn.Module) -> tuple[int, int, int]:
        """Return ``(groups, out_channels / groups, in_channels / groups * kernel pixels)``."""
        assert isinstance(module, _Conv)
        groups, kernel = module.groups, module.weight[0, 0].numel()
        return groups, module.out_channels // groups, module.in_channels // groups * kernel

    def inputs(self, module: nn.Module, x: Tensor, num_examples: int) -> Tensor:
        """Return patches ``(G, B, R, D_in)``: what each output pixel sees, after padding."""
        assert isinstance(module, _Conv)
        # Rows may be more than the examples: these may have been folded with a factor of their own.
        per_group = _patches(module, x).view(num_examples, -1, module.groups, self.shape(module)[2])
        return per_group.permute(2, 0, 1, 3)

    def inputs_at(self, module: nn.Module, x: Tensor, num_examples: int, positions: Tensor) -> Tensor:
        """Return the patches of some output pixels: only these are copied."""
        assert isinstance(module, _Conv)
        padded = _pad(module, x)
        pixels = torch.zeros(1, dtype=torch.long, device=x.device)  # of the output, and in each patch
        inside, step = pixels, 1
        for size, kernel, dilation, stride, count in reversed(_axes(module, padded)):
            along = torch.arange(count, device=x.device) * stride * step
            pixels = (along[:, None] + pixels).flatten()
            inside = (torch.arange(kernel, device=x.device)[:, None] * dilation * step + inside).flatten()
            step *= size
        rows = len(padded) // num_examples  # of one example
        row = torch.arange(num_examples, device=x.device)[:, None] * rows + positions // len(pixels)
        places = pixels[positions % len(pixels)][..., None] + inside  # (B, p, kernel pixels)
        patches = padded.flatten(2).transpose(1, 2)[row[..., None], places]  # (B, p, kernel pixels, C)
        per_group = patches.transpose(2, 3).reshape(*positions.shape, module.groups, -1)
        return per_group.permute(2, 0, 1, 3)

    def output_gradients(self, module: nn.Module, grad: Tensor, num_examples: int) -> Tensor:
        """Return output gradients ``(G, B, R, D_out)``."""
        assert isinstance(module, _Conv)
        pixels = _batched(module, grad).flatten(2).transpose(1, 2)
        per_group = pixels.reshape(num_examples, -1, module.groups, module.out_channels // module.groups)
        return per_group.permute(2, 0, 1, 3)


def _patches(module: _Conv, x: Tensor) -> Tensor:
    """Return what each output pixel sees, ``(B', *out, C, *kernel)``: one copy a pixel of the kernel."""
    padded = _pad(module, x)
    axes = _axes(module, padded)
    out = [axis[-1] for axis in axes]
    result = padded.new_empty(len(padded), *out, padded.shape[1], *module.kernel_size)
    for pixel in itertools.product(*map(range, module.kernel_size)):
        window = tuple(
            slice(at * dilation, at * dilation + (count - 1) * stride + 1, stride)
            for at, (_, _, dilation, stride, count) in zip(pixel, axes, strict=True)
        )
        seen = padded[(slice(None), slice(None), *window)]
        result[(..., *pixel)] = seen.movedim(1, -1)  # type: ignore[index]
    return result


def _axes(module: _Conv, padded: Tensor) -> list[tuple[int, int, int, int, int]]:
    """Return size, kernel, dilation, stride and number of outputs along each dimension in space."""
    given = zip(padded.shape[2:], module.kernel_size, module.dilation, module.stride, strict=True)
    return [
        (n, k, dilation, step, (n - dilation * (k - 1) - 1) // step + 1) for n, k, dilation, step in given
    ]


def _batched(module: _Conv, x: Tensor) -> Tensor:
    """Return an unbatched call's tensor ``(C, *spatial)`` as a batch of one; others as they are."""
    return x.unsqueeze(0) if x.ndim == len(module.kernel_size) + 1 else x


def _pad(module: _Conv, x: Tensor) -> Tensor:
    """Return the input as the kernel sees it: padded in the module's own mode."""
    spatial = len(module.kernel_size)
    x = _batched(module, x)
    amounts: list[int] = []
    for axis in reversed(range(spatial)):
        reach = module.dilation[axis] * (module.kernel_size[axis] - 1)
        if module.padding == "same":
            amounts += [reach // 2, reach - reach // 2]
        elif module.padding == "valid":
            amounts += [0, 0]
        else:
            amounts += [int(module.padding[axis])] * 2
    if not any(amounts):
        return x
    if module.padding_mode == "zeros":
        return functional.pad(x, amounts)
    return functional.pad(x, amounts, mode=module.padding_mode)
