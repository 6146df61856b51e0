"""Scores of many queries against a batch of training gradients, by the cheapest of three routes a layer.

*Dense*: the solved query ``x_q`` is formed, ``2 D_out D_in`` operations a pair. *Low rank* (one position per
example): the preconditioner's weights are a sum of ``r`` outer products, ``2 r (D_in + D_out)`` operations a
pair and no matrix of the size of the parameters. *Compressed* (several positions): each solved query is cut
to a rank ``r`` of its own, see :mod:`~lightning_influence.methods.compressing`. Ranks follow from a tolerance
on the scores and are checked on the first training batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from functools import reduce
from math import prod

import torch
from torch import Tensor

from lightning_influence.curvature.factors import Eigenbasis
from lightning_influence.curvature.inverse import BlockInverse, EigenInverse
from lightning_influence.curvature.low_rank_matrices import DenseMatrices, LowRankMatrices
from lightning_influence.curvature.two_level import Correction
from lightning_influence.linalg.low_rank import LowRank, factorise_weights
from lightning_influence.methods.compressing import compress_solved
from lightning_influence.methods.score_parts import stack_layers
from lightning_influence.methods.scoring_passes import LayeredScorer
from lightning_influence.model.layers.bases import Basis
from lightning_influence.model.layers.gradients import DenseGradients, FactoredGradients, LayerGradients
from lightning_influence.model.layers.table_gradients import TableGradients, lay_out

# Chosen by hand: entries of an intermediate that should stay in a processor's cache, 1 MiB of float32.
_CACHED = 2**18


# Bytes of solved queries of all layers that are held as they are unless low rank saves time, by default: a
# quarter of the default memory budget. Those of low rank are formed again for every batch.
_HELD_BYTES = 2**28
# Chosen by hand: a lower rank is rarely enough for these, and trying it takes as much as some batches.
_LEAST_RANK = 4
# What writing and reading a number costs, in multiplications.
_FORMED = 12


class Thin:
    """Queries of one layer in low-rank form, rotated back so that training factors need no rotation.

    Args:
        inverse: the layer's inverse.
        queries: factored gradients with one position.
        form: low-rank form of the inverse's weights.
    """

    def __init__(self, inverse: EigenInverse, queries: FactoredGradients, form: LowRank) -> None:
        inputs, outputs = queries.inputs[0, :, 0], queries.outputs[0, 0, :, 0]
        basis = inverse.basis or Eigenbasis()
        inputs, outputs = _turn(inputs, basis.inputs), _turn(outputs, basis.outputs)
        left = outputs[:, None] * form.left  # (Q, r, D_out)
        right = inputs[:, None] * form.right
        back = inverse.back
        left, right = _turn(left, back.outputs), _turn(right, back.inputs)
        self.rank, self.count = form.rank, inputs.shape[0]
        self.left, self.right = left.contiguous(), right.contiguous()

    @property
    def nbytes(self) -> int:
        """Memory held, in bytes."""
        return self.left.nbytes + self.right.nbytes

    def scores(self, gradients: FactoredGradients) -> Tensor:
        """Return ``(Q, B)``, a few queries at a time so that the terms are summed while in the cache."""
        _, examples, positions, _ = gradients.inputs.shape
        outputs = gradients.outputs[0, 0].flatten(0, 1).T.contiguous()
        inputs = gradients.inputs[0].flatten(0, 1).T.contiguous()
        result = outputs.new_empty(self.count, examples)
        step = max(1, _CACHED // (self.rank * outputs.shape[1]))
        for start in range(0, self.count, step):
            rows = slice(start, start + step)
            left = (self.left[rows].flatten(0, 1) @ outputs).view(-1, self.rank, examples, positions)
            right = (self.right[rows].flatten(0, 1) @ inputs).view(-1, self.rank, examples, positions)
            if positions == 1:
                result[rows] = left.mul_(right).sum(dim=(1, 3))
            else:
                result[rows] = torch.einsum("qkbr,qkbs->qb", left, right)
        return result


def factorise(inverse: EigenInverse, tolerance: float, max_rank: int) -> LowRank | None:
    """Return low-rank form of one layer's weights, weighed by the energy its eigenvalues show."""
    if max_rank < 1:
        return None
    eigenvalues = inverse.eigenvalues[0]
    return factorise_weights(inverse.weights[0], eigenvalues.sum(1), eigenvalues.sum(0), tolerance, max_rank)


# Chosen by hand: thin products run below the speed of square ones, so the low-rank route has to save more
# operations than it takes. A few pairs are enough to tell whether its scores are right.
_THIN = 0.6
_MAX_RANK = 256
_CHECK_QUERIES = 16
# Coordinates of queries and training gradients are not independent, as compressing takes them to be: what
# both have much of adds up. Scores of ResNets were off by a tenth of what was allowed: more is, at first.
_COMPRESSED = 3
# Chosen by hand: where the first batch shows too large an error, the tolerance of the layer that errs most is
# divided by this, so many times at most.
_REFINE, _REFINEMENTS = 3, 4
# Chosen by hand: from so many queries on, every training example is rotated in place of every query back.
_ROTATE_QUERIES = 16
_CHECK_EXAMPLES = 32
# Chosen by hand: numbers of solved queries of one layer that the check holds at a time.
_CHECK_NUMBERS = 2**23


class PreconditionedScorer:
    """Scores ``x_q^T g_n`` with ``x_q`` in closed form, optionally corrected.

    Args:
        inverse: the preconditioner ``P``.
        queries: query gradients by layer, ``K = 1``.
        correction: directions to add.
        tolerance: largest relative error of a layer's scores from the low-rank route; 0 forbids it.
        consume: take a layer out of ``queries`` once it is solved, so that not both have to fit in memory.
        held_bytes: solved queries that take no more are cut to low rank for the sake of time alone.
    """

    def __init__(
        self,
        inverse: BlockInverse,
        queries: MutableMapping[str, LayerGradients],
        *,
        correction: Correction | None = None,
        tolerance: float = 1e-3,
        consume: bool = False,
        held_bytes: int = _HELD_BYTES,
    ) -> None:
        self._inverse, self._correction = inverse, correction
        self._queries = queries if consume else dict(queries)
        self._count = next((query.num_examples for query in queries.values()), 0)
        self._tolerance = tolerance
        self.ranks: dict[str, int] = {}
        self._dense: dict[str, Tensor] = {}
        self._thin: dict[str, tuple[Thin, Thin | None]] = {}
        self._compressed: dict[str, LowRankMatrices] = {}
        self._bases: dict[str, Eigenbasis] = {}
        self._rows: dict[str, Tensor] = {}  # of tables, the only ones in which solved queries are not zero
        self._checked = tolerance <= 0
        # Less memory is no gain where whole solutions take little.
        solved = sum(query.like.element_size() * prod(query.shape) for query in queries.values())
        self._is_small = solved * self._count <= held_bytes
        for name in list(queries if correction is None else inverse.layers):
            if not self._try_low_rank(name, tolerance):
                self._go_dense(name)

    @property
    def nbytes(self) -> int:
        """Memory that solved queries take, in bytes, and those gradients that are still held."""
        held = sum(tensor.nbytes for tensor in self._dense.values())
        held += sum(matrices.nbytes for matrices in self._compressed.values())
        held += sum(thin.nbytes for pair in self._thin.values() for thin in pair if thin is not None)
        return held + sum(layer.nbytes for layer in self._queries.values())

    def __call__(self, gradients: Mapping[str, LayerGradients]) -> Tensor:
        """Return inner products ``(Q, B)``."""
        total: Tensor | None = None
        anchors: Tensor | None = None
        for _, own, anchor in self._layers(gradients):
            total = _add(total, own)
            if anchor is not None:
                anchors = _add(anchors, anchor)
        if total is None:  # the examples have no gradients in any layer of the queries
            some = next(iter(gradients.values()))
            return some.like.new_zeros(self._count, some.num_examples)
        return total if anchors is None else total + self._mix() @ anchors

    def by_layer(self, gradients: Mapping[str, LayerGradients]) -> dict[str, Tensor]:
        """Return what each layer adds to the inner products, ``(Q, B)`` by name."""
        return {
            name: own if anchor is None else own + self._mix() @ anchor
            for name, own, anchor in self._layers(gradients)
        }

    def _layers(self, gradients: Mapping[str, LayerGradients]) -> Iterator[tuple[str, Tensor, Tensor | None]]:
        """Yield each layer's scores of the queries, and those of the anchors, which are to be mixed."""
        if not self._checked:
            self._check(gradients)
            self._checked = True
            for name in self._compressed:
                self._queries.pop(name, None)  # which the check alone still needed
        for name, layer in gradients.items():
            if name in self._thin and not isinstance(layer, FactoredGradients):
                self._go_dense(name)  # the queries have one position, these examples several
            if name in self._dense:
                yield name, self._rotated(name, layer).dot(self._dense[name])[0].T, None
            elif name in self._compressed:
                yield name, self._compressed[name].dot(layer)[0].T, None
            elif name in self._thin and isinstance(layer, FactoredGradients):
                query, anchor = self._thin[name]
                yield name, query.scores(layer), None if anchor is None else anchor.scores(layer)

    def _solve(self, name: str, rows: slice = slice(None)) -> Tensor:
        """Return corrected solution of some queries in one layer, ``(Q, G, D_out, D_in)``."""
        solved: Tensor | None = None
        if name in self._rows:
            few = self._restricted(name, self._queries[name].select(rows))
            return self._inverse.layers[name].apply(few.dense()[0], self._rows[name])
        if name in self._queries:
            solved = self._inverse.layers[name].solve(self._queries[name].select(rows))
        if self._correction is not None:
            solved = _add(solved, self._correction.select(rows).mix(name))
        assert solved is not None
        return solved

    def _try_low_rank(self, name: str, tolerance: float) -> bool:
        """Set up one of the low-rank routes of a layer if it is allowed, accurate and cheaper.

        Returns:
            Whether one is.
        """
        if tolerance <= 0:
            return False
        return self._try_thin(name, tolerance) or self._try_compressed(name, tolerance)

    def _try_compressed(self, name: str, tolerance: float) -> bool:
        """Cut the solved queries of a layer to a low rank, see :func:`.compress_solved`."""
        self._compressed.pop(name, None)
        queries = self._queries.get(name)
        if self._correction is not None or queries is None or isinstance(queries, TableGradients):
            return False
        most = _find_most_rank(queries) if self._is_small else None
        if most is not None and most < _LEAST_RANK:
            return False
        found = compress_solved(self._inverse.layers[name], queries, _COMPRESSED * tolerance, most)
        if isinstance(found, LowRankMatrices):
            self._compressed[name], self.ranks[name] = found, found.rank
        elif isinstance(found, DenseMatrices):
            self._keep_dense(name, found.matrices)
        return found is not None

    def _try_thin(self, name: str, tolerance: float) -> bool:
        """Write the inverse's weights as few outer products, for queries with one position."""
        self._thin.pop(name, None)
        queries, inverse = self._queries.get(name), self._inverse.layers[name]
        if not isinstance(queries, FactoredGradients) or queries.inputs.shape[0] > 1:
            return False
        correction = self._correction
        if queries.inputs.shape[2] > 1 or not _is_factored(correction, name):
            return False
        _, d_out, d_in = inverse.eigenvalues.shape
        # Terms that an outer product of each query's may have until they take too many operations.
        most = _THIN * queries.num_examples * d_out * d_in / (d_out + d_in)
        anchors = None if correction is None else correction.anchors.get(name)
        limit = int(most / (queries.num_examples + (anchors.num_examples if anchors else 0)))
        form = factorise(inverse, tolerance, min(limit, _MAX_RANK))
        if form is None:
            return False
        thin: Thin | None = None
        if correction is not None and isinstance(anchors, FactoredGradients):
            first = correction.inverse.layers[name]
            anchor_form = form if first is inverse else factorise(first, tolerance, min(limit, _MAX_RANK))
            if anchor_form is None:
                return False
            thin = Thin(first, anchors, anchor_form)
        self._thin[name] = (Thin(inverse, queries, form), thin)
        self.ranks[name] = form.rank
        return True

    def _check(self, gradients: Mapping[str, LayerGradients]) -> None:
        """Compare a few pairs with exact scores; refine the layer that errs most until the sum is right."""
        few = {name: layer.select(slice(0, _CHECK_EXAMPLES)) for name, layer in gradients.items()}
        for name in [name for name in self._thin if isinstance(few.get(name), DenseGradients)]:
            self._go_dense(name)
        if not self._thin and not self._compressed:
            return
        exact = {
            name: self._exact(name, layer)
            for name, layer in few.items()
            if name in self._dense or name in self._thin or name in self._compressed
        }
        norm = float(torch.stack(list(exact.values())).sum(dim=0).norm())
        tolerances = dict.fromkeys([*self._thin, *self._compressed], self._tolerance)
        while errors := {
            n: self._approximate(n, few[n]) - exact[n] for n in (*self._thin, *self._compressed) if n in few
        }:
            if float(torch.stack(list(errors.values())).sum(dim=0).norm()) <= self._tolerance * norm:
                return
            worst = max(errors, key=lambda name: float(errors[name].norm()))
            tolerances[worst] /= _REFINE
            spent = tolerances[worst] < self._tolerance / _REFINE**_REFINEMENTS
            if spent or not self._try_low_rank(worst, tolerances[worst]):
                self._go_dense(worst)

    def _go_dense(self, name: str) -> None:
        """Give up the low-rank route of a layer."""
        self._find_rows(name)
        self._keep_dense(name, self._weigh(name) if self._stays_rotated(name) else self._solve(name))

    def _keep_dense(self, name: str, solved: Tensor) -> None:
        """Score a layer by its solved queries ``(Q, G, D_out, D_in)``; the queries are not needed again."""
        self._thin.pop(name, None)
        self._compressed.pop(name, None)
        self.ranks.pop(name, None)
        self._dense[name] = lay_out(solved) if isinstance(self._queries.get(name), TableGradients) else solved
        self._queries.pop(name, None)

    def _find_rows(self, name: str) -> None:
        """Note the rows of a table that queries have looked up, if they have no other gradients in it."""
        queries, basis = self._queries.get(name), self._inverse.layers[name].basis
        if self._correction is not None or not isinstance(queries, TableGradients) or queries.maps:
            return
        if basis is None or basis.outputs is None:
            rows = torch.unique(queries.rows)
            self._rows[name] = rows if len(rows) else rows.new_zeros(1)

    def _restricted(self, name: str, layer: LayerGradients) -> LayerGradients:
        """Return gradients in the rows alone that a layer's solved queries have."""
        rows = self._rows.get(name)
        if rows is None:
            return layer
        if isinstance(layer, TableGradients):
            return layer.restrict(rows)
        return DenseGradients(layer.dense()[:, :, :, rows])

    def _stays_rotated(self, name: str) -> bool:
        """Return whether a layer's dense scores are taken in the eigenbasis.

        Rotating one position's factors of every training example then replaces rotating every query back.
        """
        queries, basis = self._queries.get(name), self._inverse.layers[name].basis
        if self._correction is not None or basis is None or not isinstance(queries, FactoredGradients):
            return False
        return queries.inputs.shape[2] == 1 and queries.num_examples >= _ROTATE_QUERIES

    def _weigh(self, name: str) -> Tensor:
        """Return one layer's solved queries in the eigenbasis, ``(Q, G, D_out, D_in)``."""
        inverse, queries = self._inverse.layers[name], self._queries[name]
        assert inverse.basis is not None
        self._bases[name] = inverse.basis
        return queries.rotate(inverse.basis.inputs, inverse.basis.outputs).dense()[0] * inverse.weights

    def _rotated(self, name: str, layer: LayerGradients) -> LayerGradients:
        """Return training gradients in the basis that the layer's queries are in."""
        basis, layer = self._bases.get(name), self._restricted(name, layer)
        return layer if basis is None else layer.rotate(basis.inputs, basis.outputs)

    def _exact(self, name: str, layer: LayerGradients) -> Tensor:
        """Return one layer's exact scores of the first queries."""
        if name in self._dense:
            return self._rotated(name, layer).dot(self._dense[name][:_CHECK_QUERIES])[0].T
        inverse = self._inverse.layers[name]
        # In the eigenbasis factors are rotated, which takes less than rotating solutions back.
        basis = inverse.basis if self._correction is None else None
        layer = layer.rotate(basis.inputs, basis.outputs) if basis else self._restricted(name, layer)
        count, scores = min(_CHECK_QUERIES, self._count or _CHECK_QUERIES), []
        step = max(1, _CHECK_NUMBERS // prod(layer.shape))
        for start in range(0, count, step):
            few = slice(start, min(start + step, count))
            if basis:
                queries = self._queries[name].select(few).rotate(basis.inputs, basis.outputs)
                scores.append(layer.dot(queries.dense()[0] * inverse.weights)[0].T)
            else:
                scores.append(layer.dot(self._solve(name, few))[0].T)
        return torch.cat(scores)

    def _approximate(self, name: str, layer: LayerGradients) -> Tensor:
        """Return one layer's low-rank scores of the first queries."""
        if name in self._compressed:
            return self._compressed[name].select(slice(_CHECK_QUERIES)).dot(layer)[0].T
        query, anchor = self._thin[name]
        assert isinstance(layer, FactoredGradients)
        scores = query.scores(layer)
        if anchor is not None:
            scores = scores + self._mix() @ anchor.scores(layer)
        return scores[:_CHECK_QUERIES]

    def _mix(self) -> Tensor:
        """Return weights of the anchors in each query's correction, ``(Q, M)``."""
        assert self._correction is not None
        return self._correction.weights


def _find_most_rank(queries: LayerGradients) -> int:
    """Return the largest rank of solutions whose scores take fewer operations than those of whole matrices.

    Training examples are taken to have as many positions as the queries; factors of gradients that were
    formed already have too many of them.
    """
    if not isinstance(queries, FactoredGradients):
        return 0
    (_, d_out, d_in), count, positions = queries.shape, queries.num_examples, queries.inputs.shape[2]
    whole = d_out * d_in * (positions + count + _FORMED)
    return whole // max(1, positions * count * (d_out + d_in + _FORMED))


def _is_factored(correction: Correction | None, name: str) -> bool:
    """Return whether what a correction adds in a layer can be scored without a matrix of its size."""
    if correction is None:
        return True
    return name not in correction.anchors or isinstance(correction.anchors[name], FactoredGradients)


class DenseScorer:
    """Scores ``x_q^T g_n`` for solved queries given as flat vectors.

    Args:
        blocks: solutions ``(Q, G, D_out, D_in)`` by layer.
    """

    def __init__(self, blocks: Mapping[str, Tensor]) -> None:
        self._blocks = dict(blocks)

    def __call__(self, gradients: Mapping[str, LayerGradients]) -> Tensor:
        """Return inner products ``(Q, B)``."""
        return reduce(torch.add, (self._score(name, layer) for name, layer in gradients.items()))

    def by_layer(self, gradients: Mapping[str, LayerGradients]) -> dict[str, Tensor]:
        """Return what each layer adds to the inner products, ``(Q, B)`` by name."""
        return {name: self._score(name, layer) for name, layer in gradients.items()}

    def _score(self, name: str, layer: LayerGradients) -> Tensor:
        """Return one layer's inner products ``(Q, B)``."""
        return layer.dot(self._block(name, layer.like.dtype))[0].T

    def _block(self, name: str, dtype: torch.dtype) -> Tensor:
        """Return a layer's solutions in the gradients' precision, converted once."""
        if self._blocks[name].dtype != dtype:
            self._blocks[name] = self._blocks[name].to(dtype)
        return self._blocks[name]


class JointScorer:
    """Scores of queries that were solved in different ways.

    Args:
        parts: which queries (their positions) each scorer answers for; together every query once.
    """

    def __init__(self, parts: Sequence[tuple[Tensor, LayeredScorer]]) -> None:
        self._parts = parts
        self._order = torch.cat([positions for positions, _ in parts]).argsort()

    def __call__(self, gradients: Mapping[str, LayerGradients]) -> Tensor:
        """Return inner products ``(Q, B)`` in the order of the queries."""
        return torch.cat([scorer(gradients) for _, scorer in self._parts])[self._order]

    def by_layer(self, gradients: Mapping[str, LayerGradients]) -> dict[str, Tensor]:
        """Return what each layer adds to the inner products, ``(Q, B)`` by name."""
        parts = [stack_layers(scorer.by_layer(gradients), [*gradients]) for _, scorer in self._parts]
        return dict(zip(gradients, torch.cat(parts, dim=1)[:, self._order], strict=True))


def _turn(rows: Tensor, basis: Basis | None) -> Tensor:
    """Return rows ``(..., D)`` in a basis of one group; None stands for the identity."""
    return rows if basis is None else basis.turn(rows)


def _add(total: Tensor | None, part: Tensor) -> Tensor:
    return part if total is None else total + part
