"""Per-example gradients of parameters from the operations that use them, whoever owns them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from lightning_influence.model.batches.forms import place_examples
from lightning_influence.model.layers.gradients import DenseGradients, FactoredGradients, LayerGradients
from lightning_influence.model.layers.layer import (
    BIAS,
    WEIGHT,
    Layer,
    ParameterRule,
    full_precision,
    parameters_of,
)
from lightning_influence.model.layers.table_uses import TableUses
from lightning_influence.model.layers.use_recorder import Slopes
from lightning_influence.model.uses.calls import ADDITIONS, Use
from lightning_influence.model.uses.certificate import certify, draw_weights, weigh_losses
from lightning_influence.model.uses.gradients import (
    differentiate_rows,
    edges_of,
    gather_passes,
    names_of,
    pull_gradients,
    pull_uses,
)
from lightning_influence.model.uses.parts import ParameterGradient, Part, Product, lay_over
from lightning_influence.model.uses.places import Place
from lightning_influence.model.uses.spreading import make_spread_use
from lightning_influence.model.uses.watch import Watch
from lightning_influence.support.errors import ReadOtherwiseError, UnsupportedModelError


class ParameterRecorder:
    """Watches the uses of parameters in a forward pass.

    Blocks of one parameter are always had from its uses; modules that are linear in their weight only where
    something uses the weight without calling the module, as attention does with its output projection.

    Args:
        layers: the covered layers by name; those of one parameter are told by their rule.
        batch: the batch.
        num_examples: ``B``.
        slow: names of parameters whose gradients take a backward pass for each example; :meth:`certify` adds
            to it.
        verified: what passes have found in order, which says where batches hold their examples.
    """

    def __init__(
        self, layers: Mapping[str, Layer], batch: Any, num_examples: int, slow: set[str], verified: set[str]
    ) -> None:
        self.layers, self._slow = dict(layers), slow
        self._single = {name for name, layer in layers.items() if isinstance(layer.rule, ParameterRule)}
        parameters = parameters_of(layers)
        self.watch = Watch(parameters, batch, num_examples, place_examples(verified, batch, num_examples))
        self._large = {name for name in self._single if layers[name].is_table}
        # Matrices may be products of the inputs and output gradients of what they map.
        self._matrices = {name for name in self._single if layers[name].d_in > 1} - self._large
        # Inputs of matrices that are; None for those that are not.
        self._products: dict[str, Tensor | None] = {}
        # What large tables look up and map, and matrices of which rows are looked up, once it is known.
        self._tables: dict[str, TableUses] = {}
        self._uses: list[Use] | None = None
        self._heard: set[str] = set()
        self._paired: set[str] = set()  # modules whose weights map in other ways than by calling them
        self._whole: set[str] = set()  # modules that are not called, whose weights are used in any way

    @property
    def heard(self) -> list[str]:
        """Names of the layers that are had from uses, and took part in the forward pass."""
        return [name for name in self.layers if name in self._heard or name in self._slow & self._single]

    @property
    def picks(self) -> bool:
        """Whether the step has picked rows by values, which are others in the next batch."""
        return self.watch.picks

    @property
    def coincidences(self) -> set[str]:
        """Where several dimensions have the batch's size: it is a guess which one is the examples'."""
        return self.watch.coincidences

    @property
    def is_needed(self) -> bool:
        """Whether some layers are not had from calls of modules on the batch, or may not be in the next."""
        return bool(self._single or self._heard or self.watch.picks)

    def __enter__(self) -> None:
        """Begin to watch."""
        self.watch.__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *details: Any) -> None:
        """Stop watching; what was recorded stays until :meth:`clear`."""
        self.watch.__exit__(*details)  # type: ignore[no-untyped-call]

    def clear(self) -> None:
        """Let go of the recorded tensors and their graph."""
        self.watch.clear()
        self._uses, self._heard, self._products, self._tables = [], set(), {}, {}

    @property
    def activations(self) -> list[GradientEdge]:
        """Where gradients of the examples' outputs arrive, not of numbers: penalties are added to a loss."""
        return [
            edge
            for use in self._uses or []
            for edge, place, shape in zip(use.edges, use.outputs, use.shapes, strict=True)
            if edge is not None and place is not None and shape
        ]

    def close(self, calls: Mapping[str, int]) -> set[str]:
        """Choose the uses that matter when the forward pass is over.

        Args:
            calls: how often each module was called.

        Returns:
            Names of the modules that are had from uses: other calls of theirs do not count.
        """
        uses: dict[str, list[Use]] = {}
        for use in self.watch.uses:
            for name in names_of(self.watch, use):
                # What penalties on a module's weights use them for says nothing of where its examples are.
                if name in self._single or use.is_of_examples:
                    uses.setdefault(name, []).append(use)
        modules = self.layers.keys() - self._single
        mine = {name for name in modules if not self._is_called(name, uses, calls.get(name, 0))}
        other = {name for name in mine if not self._is_linear(name, uses)}
        # Of modules that are called as often as their weights are used, the calls are what is had.
        self._whole = {
            name
            for name in other
            if WEIGHT + name in uses
            and not (self._uses_itself(name, uses) and _most_uses(name, uses) <= calls.get(name, 0))
        }
        self._paired, mine = mine - other, (mine - other) | self._whole
        wanted = {name: name for name in self.layers if name in self._single}
        for name in (name for name in self.layers if name in mine):
            wanted |= dict.fromkeys(_keys([name]), name)
        chosen = {id(use): use for name in wanted for use in uses.get(name, [])}
        self._uses = list(chosen.values())
        # A loss that is divided by a parameter, or that one is added to, is a number: what these do to single
        # examples cannot be told from the outputs.
        self._heard = {
            wanted[name]
            for name in uses.keys() & wanted.keys()
            if any(use.is_of_examples for use in uses[name])
        }
        return mine & self._heard

    def _is_called(self, name: str, uses: Mapping[str, list[Use]], calls: int) -> bool:
        """Return whether a weight is used by calls of its module alone, on rows of the examples in order."""
        own = uses.get(WEIGHT + name, [])
        if own and not self._uses_itself(name, uses):
            return False
        regular = (None, (0,)) if self.watch.num_examples == 1 else (None,)
        first = [use.places.get((0, 0)) for use in own]
        return _most_uses(name, uses) <= calls and all(
            place is not None and place.dim in (0, None) and place.outer == 1 and place.owners in regular
            for place in first
        )

    def _uses_itself(self, name: str, uses: Mapping[str, list[Use]]) -> bool:
        """Return whether a use takes a module's weight, and not what was made of it."""
        weight = self.watch.parameters[WEIGHT + name]
        return any(source is weight for use in uses[WEIGHT + name] for source in use.sources.values())

    def _is_linear(self, name: str, uses: Mapping[str, list[Use]]) -> bool:
        """Return whether the uses of a module's weight are those of one linear map, wherever it is called."""
        self._uses = [*uses.get(WEIGHT + name, []), *uses.get(BIAS + name, [])]
        if any(place is None for use in self._uses for place in use.outputs):
            return False
        try:
            self.inputs(name)
        except UnsupportedModelError:
            return False
        return True

    def edges(self) -> list[GradientEdge]:
        """Return the edges at which a backward pass is to be differentiated."""
        return edges_of(self._uses or [])

    def is_whole(self, name: str) -> bool:
        """Return whether a layer is a matrix whose gradients are no products, so that it has no inputs."""
        is_matrix = name in self._matrices and name not in self._tables
        return name in self._whole or (is_matrix and self._products[name] is None)

    def assemble(self, name: str, slopes: Slopes) -> LayerGradients:
        """Return gradients of a layer from output gradients of ``K`` seeds."""
        if name in self._tables:
            return self._tables[name].assemble(slopes)
        if self.is_whole(name):  # the output gradients are columns
            return DenseGradients(slopes[0].mT.transpose(1, 2))
        if self._is_numbers(name):  # as many products with one would be slow
            return DenseGradients(slopes[0].transpose(1, 2).contiguous())
        inputs = self.inputs(name)
        assert inputs is not None
        return FactoredGradients(inputs, slopes[0])

    def _is_numbers(self, name: str) -> bool:
        """Return whether each number of a parameter is a group of its own, whose input is one."""
        alone = self.layers[name].shape[1:] == (1, 1)
        return alone and name in self._single and self._products.get(name) is None

    def inputs(self, name: str) -> Tensor | None:
        """Return the inputs ``(G, B, R, D_in)`` of a layer: ones or the identity where it has none.

        Those of a table are part of its gradients.
        """
        if name in self._matrices | self._large and not self._products and not self._tables:
            self._read_products(self._pull_zeros())
        if name in self._tables:
            return None
        layer, count = self.layers[name], self.watch.num_examples
        if name in self._whole:
            eye = torch.eye(layer.d_in).to(full_precision(layer.rule.weight(layer.module)))
            return eye.expand(layer.groups, count, layer.d_in, layer.d_in)
        if name in self._single:
            inputs = self._products.get(name)
            return (
                layer.inputs(full_precision(layer.rule.weight(layer.module)), count)
                if inputs is None
                else inputs
            )
        return self._pair(name, self._pull_zeros({*_keys([name])}))[0]

    def _read_products(self, gradients: Mapping[str, ParameterGradient]) -> None:
        """Find out what matrices map and tables look up, from gradients that all uses have a part in."""
        for name in self._large:
            known = name in gradients and name not in self._slow
            self._tables[name] = TableUses.read(self.layers[name], gradients[name] if known else None)
        for name in self._matrices:
            known = name in gradients and name not in self._slow
            product = self._product_of(name, gradients[name]) if known else None
            self._products[name] = None if product is None else product.inputs
            uses = TableUses.read(self.layers[name], gradients[name]) if known and product is None else None
            if uses is not None and uses.looks_up:
                self._tables[name] = uses

    def _product_of(self, name: str, gradient: ParameterGradient) -> Product | None:
        product = gradient.product(tables=False)
        if product is None or not product.is_plain():
            return None
        shape = (product.inputs.shape[0], product.outputs.shape[-1], product.inputs.shape[-1])
        return product if shape == self.layers[name].shape else None

    def _pull_zeros(self, names: set[str] | None = None) -> dict[str, ParameterGradient]:
        """Pull gradients of zero back, which shows the inputs; those of some names, or of all."""
        uses = [use for use in self._uses or [] if names is None or names_of(self.watch, use) & names]
        return pull_uses(self.watch, uses, [use.make_zeros() for use in uses], 1).gradients

    def pull(self, outputs: Tensor, seed: Tensor | None, found: Sequence[Tensor | None]) -> dict[str, Slopes]:
        """Pull the gradients of one backward pass back, example by example.

        Args:
            outputs: what was differentiated; its graph is still there.
            seed: what the pass started from; None for a scalar.
            found: gradients at :meth:`edges`.

        Returns:
            By name ``(G, B, R, D_out)``, and of tables what :class:`TableUses` has; zero where ``outputs``
            does not depend on one.

        Raises:
            ReadOtherwiseError: if those of a parameter cannot be had this way; they take the slow one then.
            UnsupportedModelError: if there is none.
        """
        uses = self._uses or []
        passes = gather_passes(uses, [found])
        # Positions are in one order for all seeds, those that a seed does not reach among them.
        aligned = self._matrices.union(self._large, _keys(self._paired))
        for use, grads in zip(uses, passes, strict=True):
            if all(grad is None for grad in grads) and aligned & names_of(self.watch, use):
                grads[:] = use.make_zeros()
        pulled = pull_uses(self.watch, uses, passes, 1)
        if not self._products and not self._tables:
            self._read_products(pulled.gradients)
        gradients = {name: grad for name, grad in pulled.gradients.items() if name not in self._slow}
        known = self._single.union(_keys(self._whole))
        slow = self._slow & known
        if slow:
            gradients |= differentiate_rows(self.watch, outputs, self._rows(outputs, seed), slow)
        failed = pulled.failed.keys() - slow
        if failed:
            name = sorted(failed)[0]
            self._slow |= failed & known
            raise (ReadOtherwiseError if failed <= known else UnsupportedModelError)(
                f"The gradients of parameter {name!r} cannot be had example by example "
                f"({pulled.failed[name]}). Leave it out with layers=['!{name}']."
            )
        found_by = {name: self._block for name in self._single} | {
            name: self._columns for name in self._whole
        }
        slopes: dict[str, Slopes] = {}
        for name in self.heard:
            if name in self._tables:
                gradient = gradients.get(name)
                slopes[name] = self._tables[name].slopes(gradient, self.watch.num_examples)
            elif name in found_by:
                slopes[name] = (found_by[name](name, gradients),)
            else:
                slopes[name] = (self._pair(name, gradients)[1],)
        return slopes

    def spread(self, key: str) -> Tensor:
        """Give a parameter a row for each example, ``(B, *shape)``, before the forward pass.

        Gradients that arrive there are added to those of its uses.

        Args:
            key: one of :func:`parameters_of` the layers.

        Returns:
            The rows, with their graph.
        """
        with torch.enable_grad():
            rows, use = make_spread_use(self.watch.parameters[key], self.watch.num_examples)
        self.watch.uses.append(use)
        return rows

    def add_example(self, batch: Any, number: int) -> None:
        """Take the tensors of a batch of one for those of an example."""
        self.watch.add_example(batch, number)

    def count_calls(self) -> dict[str, int]:
        """Return how often each layer that is had from uses is used, without those of picked rows."""
        uses = [(names_of(self.watch, use), use) for use in self._uses or [] if use.is_of_examples]
        counts = {}
        for name in self.heard:
            own = [use for names, use in uses if names & {name, WEIGHT + name}]
            places = [place for use in own for place in use.outputs if place is not None]
            if not (self.picks and any(place.owners is not None for place in places)):
                counts[name] = len(own)
        return counts

    def take_penalties(self) -> list[Tensor]:
        """Return numbers that weights alone have made and that were added to the numbers of single examples.

        They are no uses of the weights from now on. A parameter that takes part in nothing but numbers, as
        the logarithm of a variance, is no weight.
        """
        uses = self.watch.uses
        weights = {name for use in uses if use.is_of_examples for name in names_of(self.watch, use)}
        found = [
            use
            for use in uses
            if use.call.name in ADDITIONS and not use.is_of_examples and names_of(self.watch, use) & weights
        ]
        for use in found:
            uses.remove(use)
        return [source for use in found for source in use.sources.values()]

    def is_in_order(self, tensor: Tensor) -> bool:
        """Return whether the rows of a tensor are known to be the examples in their order."""
        place = self.watch.place_of(tensor)
        return place is not None and place.is_plain()

    def place_of(self, tensor: Tensor) -> Place | None:
        """Return where the examples stand in a tensor of the forward pass, or None if that is not known."""
        return self.watch.place_of(tensor)

    def certify(self, values: Tensor) -> None:
        """Find the parameters whose gradients do not add up, which take the slow way from now on.

        Args:
            values: of each example, ``(B,)``, with their graph.
        """
        checked = self._single.union(_keys(self._whole))
        own = {name: p for name, p in self.watch.parameters.items() if name in checked}
        if not own:
            return
        weights = draw_weights(self.watch.num_examples, values)
        reference = weigh_losses(values, weights, own)
        found = pull_gradients(self.watch, values, [torch.ones_like(values)], only=set(own))
        verdicts = certify(found.gradients, weights, reference, self.watch.eps)
        failed = {name for name, verdict in verdicts.items() if not verdict.passed}
        if failed - self._slow:
            self._slow |= failed
            # What earlier backward passes took for products or rows alone is read anew.
            self._products, self._tables = {}, {}

    def _rows(self, outputs: Tensor, seed: Tensor | None) -> Tensor:
        """Return what each example's own backward pass starts from.

        Raises:
            UnsupportedModelError: if it is not known which outputs are whose.
        """
        count = self.watch.num_examples
        place = self.watch.place_of(outputs)
        if place is None and outputs.ndim and len(outputs) % count == 0:
            # Losses put the rows of their outputs in the order of the examples themselves.
            place = Place(0, inner=len(outputs) // count)
        if place is None or seed is None:
            raise UnsupportedModelError(
                f"Which of the outputs, of shape {tuple(outputs.shape)}, belong to which of the {count} "
                f"examples is not known, and {sorted(self._slow)[:4]} cannot be differentiated otherwise. "
                "Leave them out with layers=['!name']."
            )
        if place.dim is None:
            rows = seed.new_zeros(count, *seed.shape)
            assert place.owners is not None
            rows[place.owners[0]] = seed
            return rows
        owners = place.owner_vector(count).to(seed.device)
        mask = owners == torch.arange(count, device=seed.device)[:, None]
        view = [count] + [-1 if dim == place.dim else 1 for dim in range(seed.ndim)]
        return seed * mask.view(view)

    def _pair(self, name: str, gradients: Mapping[str, ParameterGradient]) -> tuple[Tensor, Tensor]:
        """Return inputs and output gradients of a module whose weight is used without calling it.

        Raises:
            UnsupportedModelError: if its uses are not those of a linear map, with the same bias.
        """
        layer = self.layers[name]
        weight, bias = (gradients.get(kind + name) for kind in (WEIGHT, BIAS))
        # Uses without the bias have 0 where the others have 1; both gradients of one use are of one tensor.
        shifted = [] if bias is None else [part for part, _ in bias.parts]
        parts: list[tuple[Part, int | None]] = []
        for part, example in () if weight is None else weight.parts:
            mate = next((b for b in shifted if _are_of_one_use(part, b)), None)
            shifted = [b for b in shifted if b is not mate]
            if layer.has_bias and isinstance(part, Product):
                zeros = part.inputs.new_zeros(*part.inputs.shape[:-1], 1)
                ones = mate.inputs if isinstance(mate, Product) else zeros
                part = replace(part, inputs=torch.cat([part.inputs, ones.to(part.inputs)], dim=-1))
            parts.append((part, example))
        parts = lay_over(parts, self._share_out(name))
        product = None if weight is None else replace(weight, parts=parts).product(tables=False)
        if product is None or not product.is_plain() or (layer.has_bias and shifted):
            raise UnsupportedModelError(
                f"The weight of layer {name!r} is used without calling the layer, and in another way. "
                f"Leave it out with layers=['!{name}']."
            )
        return product.inputs, product.outputs[0]

    def _share_out(self, name: str) -> list[set[int]]:
        """Return the examples of each use of a module's weight; none where some take part in several."""
        places = [
            use.outputs[0]
            for use in self._uses or []
            if WEIGHT + name in names_of(self.watch, use) and use.is_of_examples
        ]
        count = self.watch.num_examples
        owners = [set() if p is None else set(p.owners or range(count)) for p in places]
        apart = count > 1 and sum(map(len, owners)) == len(set().union(*owners)) and all(owners)
        return owners if apart else []

    def _columns(self, name: str, gradients: Mapping[str, ParameterGradient]) -> Tensor:
        """Return the columns ``(G, B, D_in, D_out)`` of a module's gradient matrices."""
        layer, count = self.layers[name], self.watch.num_examples
        weight, bias = layer.rule.weight(layer.module), layer.rule.bias(layer.module)
        parts = [
            None if p is None else gradients[key].dense()[0] if key in gradients else _no_gradients(p, count)
            for p, key in ((weight, WEIGHT + name), (bias, BIAS + name))
        ]
        assert parts[0] is not None
        return layer.from_parameters(parts[0], parts[1]).transpose(0, 1).transpose(2, 3)

    def _block(self, name: str, gradients: Mapping[str, ParameterGradient]) -> Tensor:
        layer, count, gradient = self.layers[name], self.watch.num_examples, gradients.get(name)
        if gradient is None:
            return layer.output_gradients(_no_gradients(layer.rule.weight(layer.module), count), count)
        if name in self._matrices and not self.is_whole(name):
            product = self._product_of(name, gradient)
            assert product is not None
            return product.outputs[0]
        return layer.output_gradients(gradient.dense()[0], count)


def _most_uses(module: str, uses: Mapping[str, list[Use]]) -> int:
    """Return how often a module's weight, or its bias, is used, but for penalties on a batch."""
    return max(sum(use.is_of_examples for use in uses.get(kind + module, [])) for kind in (WEIGHT, BIAS))


def _keys(modules: Iterable[str]) -> list[str]:
    """Return the names of the modules' weights and biases among the parameters that are watched."""
    return [kind + name for name in modules for kind in (WEIGHT, BIAS)]


def _no_gradients(parameter: Tensor, count: int) -> Tensor:
    return full_precision(parameter).new_zeros(count, *parameter.shape)


def _are_of_one_use(weight: Part, bias: Part) -> bool:
    return isinstance(weight, Product) and isinstance(bias, Product) and weight.outputs is bias.outputs
