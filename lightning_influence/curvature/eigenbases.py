"""Eigenbases of the covariances of layers: as cheap as these allow, and shared out over processes."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from lightning_influence.curvature.factors import Eigenbasis, LayerStatistics
from lightning_influence.linalg.placement import decompose_symmetric
from lightning_influence.model.layers.bases import Basis
from lightning_influence.support.errors import NonFiniteError

# Chosen by hand: below this width a decomposition takes too little time to look for a cheaper one.
LARGE = 1024
# A covariance of so many times fewer rows than its width is decomposed within the span of the rows. A quarter
# takes about a third of the time of a whole decomposition.
_THIN = 4
# Columns that are always zero are left out of a basis where they are at least such a part of all.
_UNSEEN = 16
# Directions of a random sketch beyond the number of rows, and roundings of the trace that may be missing.
_OVERSAMPLE, _ROUNDINGS = 8, 100
# Vectors that a basis in single precision is tried on, and the error of its products that is let pass: a
# basis has to be orthonormal, and need not be accurate, as eigenvalues are measured in it.
_PROBES, _SINGLE = 4, 1e-4


def compute_eigenbasis(
    name: str, statistics: LayerStatistics, dtype: torch.dtype = torch.float64
) -> Eigenbasis:
    """Eigenvectors of the two covariances of a layer.

    Where far fewer rows than columns were summed, these are decomposed in the span of the rows, and the rest
    of the basis is any orthonormal one: its eigenvalues are zero. Wide covariances in single precision are
    decomposed in that, and checked.

    Args:
        name: the layer's name, for errors.
        statistics: its sums.
        dtype: precision of the decomposition; the result has the precision of the sums.

    Returns:
        The basis; none of a side that is held as a diagonal.

    Raises:
        NonFiniteError: if a covariance is not finite or cannot be decomposed.
    """
    bases: list[Basis | None] = []
    for side, sums, average in (
        ("input", statistics.inputs, statistics.covariance_in),
        ("output-gradient", statistics.outputs, statistics.covariance_out),
    ):
        seen = find_seen(sums)
        covariance = average(seen)
        if not bool(torch.isfinite(covariance.sum())):
            raise NonFiniteError(
                f"The {side} covariance of layer {name!r} is not finite after {statistics.examples:g} "
                "examples. Look for NaN or infinity in the inputs, the weights or the loss of this layer."
            )
        if covariance.ndim == 2:
            bases.append(None)
            continue
        try:
            vectors = find_eigenvectors(covariance, statistics.positions, dtype)
        except RuntimeError as error:
            raise NonFiniteError(
                f"The {side} covariance of layer {name!r} could not be decomposed ({error}). Its entries "
                f"range to {float(covariance.abs().max()):.3g}: rescale the inputs or leave the layer out "
                "with `layers=`."
            ) from error
        bases.append(Basis.of_seen(vectors.to(covariance.dtype), seen))
    return Eigenbasis(*bases)


def find_seen(sums: Tensor) -> Tensor | None:
    """Return which columns of wide sums ``(G, D, D)`` were ever other than zero, if many were not.

    Args:
        sums: of products of columns, or the diagonal ``(G, D)``.

    Returns:
        ``(D,)``; None where all columns are to be taken for seen.
    """
    width = sums.shape[-1]
    if sums.ndim == 2 or width < LARGE or len(sums) > 1:
        return None
    seen = sums[0].diagonal() != 0
    return seen if int(seen.sum()) <= width - width // _UNSEEN else None


def find_eigenvectors(covariance: Tensor, rows: float, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return eigenvectors of covariances, by ascending eigenvalue.

    Args:
        covariance: ``(G, D, D)``, symmetric up to rounding.
        rows: about how many rows were summed; a number that is too small costs time and no accuracy.
        dtype: precision of the decomposition.

    Returns:
        ``(G, D, D)``, in columns.

    Raises:
        RuntimeError: if the decomposition does not converge in double precision either.
    """
    width = covariance.shape[-1]
    single = covariance.dtype == torch.float32
    vectors: Tensor
    if width >= LARGE and rows * _THIN <= width:
        thin = _decompose_span(covariance.to(dtype), int(rows), torch.finfo(covariance.dtype).eps)
        if thin is not None:
            return thin
    if width >= LARGE and single and dtype == torch.float64:
        found = _decompose_in_single(covariance)
        if found is not None:
            return found
    try:
        vectors = decompose_symmetric(covariance, dtype)[1]
    except RuntimeError:
        if dtype == torch.float64:
            raise
        vectors = decompose_symmetric(covariance, torch.float64)[1]
    return vectors


def _decompose_in_single(symmetric: Tensor) -> Tensor | None:
    """Return eigenvectors of matrices in single precision, None where that does not converge or hold."""
    try:
        values, vectors = decompose_symmetric(symmetric, symmetric.dtype)
    except RuntimeError:  # wide matrices with many eigenvalues near zero, as of channels that a ReLU shut
        return None
    return vectors if _holds(symmetric, values, vectors) else None


def _decompose_span(symmetric: Tensor, rows: int, eps: float) -> Tensor | None:
    """Return eigenvectors of matrices of low rank, None if their rank is higher than the number of rows."""
    size = rows + _OVERSAMPLE
    sketch = torch.randn(symmetric.shape[-1], size, generator=torch.Generator().manual_seed(0)).to(symmetric)
    basis = torch.linalg.qr(symmetric @ sketch, mode="complete").Q
    span, rest = basis[..., :size], basis[..., size:]
    small = span.mT @ symmetric @ span
    found, whole = (matrix.diagonal(dim1=1, dim2=2).sum(-1) for matrix in (small, symmetric))
    if bool((whole - found > _ROUNDINGS * eps * whole).any()):
        return None
    return torch.cat([rest, span @ decompose_symmetric((small + small.mT) / 2, small.dtype)[1]], dim=-1)


def _holds(symmetric: Tensor, values: Tensor, vectors: Tensor) -> bool:
    """Return whether vectors are orthonormal and products with them are those of the matrices, in float64."""
    width = symmetric.shape[-1]
    probes = torch.randn(width, _PROBES, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    probes = probes.to(symmetric.device)
    shares = _multiply(vectors.mT, probes)
    lost = (_multiply(vectors, shares) - probes).norm() / (probes.norm() * len(symmetric) ** 0.5)
    scale = values.abs().amax().double() * probes.norm()
    off = (_multiply(symmetric, probes) - _multiply(vectors, values.double()[..., None] * shares)).norm()
    return bool(lost <= _SINGLE) and bool(off <= _SINGLE * scale)


def _multiply(matrices: Tensor, columns: Tensor) -> Tensor:
    """Return products in float64 without a copy of the matrices in it, which would be twice their size."""
    step = LARGE // 4
    parts = [matrices[:, start : start + step] for start in range(0, matrices.shape[1], step)]
    return torch.cat([part.double() @ columns for part in parts], dim=1)


def compute_eigenbases(
    layers: Mapping[str, LayerStatistics],
    dtype: torch.dtype = torch.float64,
    *,
    rank: int = 0,
    world_size: int = 1,
    all_reduce_sum: Callable[[Tensor], Tensor] | None = None,
    raise_together: Callable[[Exception | None], None] | None = None,
    decompose: Callable[[str, LayerStatistics, torch.dtype], Eigenbasis] = compute_eigenbasis,
    owned: bool = False,
) -> dict[str, Eigenbasis]:
    """Eigenbases of all layers, each decomposed by one of the processes.

    Args:
        layers: the same sums on every process, or where they are ``owned`` those of its own layers.
        dtype: see :func:`compute_eigenbasis`.
        rank: number of this process.
        world_size: how many there are.
        all_reduce_sum: sums a tensor over them; every process has to call it.
        raise_together: raises on all of them the error that one of them has.
        decompose: computes a layer's basis.
        owned: whether each layer is on one process only, where its basis stays.

    Returns:
        The bases, the same on every process unless they are owned.

    Raises:
        Exception: on all processes, if one of them fails; a NonFiniteError if a covariance cannot be
            decomposed.
    """
    if world_size == 1 or all_reduce_sum is None or raise_together is None:
        return {name: decompose(name, layer, dtype) for name, layer in layers.items()}
    owners = share_out({name: _count_cost(layer) for name, layer in layers.items()}, world_size)
    own: dict[str, Eigenbasis] = {}
    failure: Exception | None = None
    try:
        names = [name for name in layers if owned or owners[name] == rank]
        own = {name: decompose(name, layers[name], dtype) for name in names}
    except Exception as error:  # whatever it is: the others would wait
        failure = error
    raise_together(failure)
    if owned:
        return own
    result = {}
    for name, layer in layers.items():
        mine = own.get(name, Eigenbasis())
        result[name] = Eigenbasis(
            *(
                None if sums.ndim == 2 else _share(sums, basis, all_reduce_sum)
                for sums, basis in ((layer.inputs, mine.inputs), (layer.outputs, mine.outputs))
            )
        )
    return result


def _share(sums: Tensor, basis: Basis | None, all_reduce_sum: Callable[[Tensor], Tensor]) -> Basis:
    """Return the basis of one side of a layer that one process has, on all of them."""
    seen = find_seen(sums)  # the same on all, as the sums are
    width = sums.shape[-1] if seen is None else int(seen.sum())
    vectors = sums.new_zeros(len(sums), width, width) if basis is None else basis.vectors.contiguous()
    return Basis.of_seen(all_reduce_sum(vectors), seen)


def share_out(costs: Mapping[str, float], count: int) -> dict[str, int]:
    """Share pieces of work out over processes: the most expensive first, to who has least (Graham 1969).

    Args:
        costs: of each piece.
        count: how many processes there are.

    Returns:
        The process of each piece.
    """
    loads, owners = [0.0] * count, {}
    for name in sorted(costs, key=lambda name: -costs[name]):
        owner = loads.index(min(loads))
        owners[name] = owner
        loads[owner] += costs[name]
    return owners


def _count_cost(layer: LayerStatistics) -> float:
    dense = [side for side in (layer.inputs, layer.outputs) if side.ndim == 3]
    return float(sum(len(side) * side.shape[-1] ** 3 for side in dense))
