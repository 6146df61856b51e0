"""Eigenbases by cheaper ways against whole decompositions, and work shared out over processes."""

import threading

import pytest
import torch

from lightning_influence.curvature import eigenbases
from lightning_influence.curvature.eigenbases import (
    compute_eigenbases,
    compute_eigenbasis,
    find_eigenvectors,
    share_out,
)
from lightning_influence.curvature.factors import LayerStatistics
from lightning_influence.support.errors import NonFiniteError

D = 40


def covariance(rows, dtype=torch.float64, scale=1.0):
    data = torch.randn(2, rows, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * scale
    return (data.mT @ data / rows).to(dtype)


@pytest.fixture
def low(monkeypatch):
    monkeypatch.setattr(eigenbases, "LARGE", 20)


@pytest.fixture
def widths(monkeypatch):
    """The sizes of what is decomposed."""
    found, eigh = [], torch.linalg.eigh

    def watch(matrix):
        found.append((matrix.shape[-1], matrix.dtype))
        return eigh(matrix)

    monkeypatch.setattr(torch.linalg, "eigh", watch)
    return found


def check_diagonalises(vectors, matrix, tolerance):
    vectors, matrix = vectors.double(), matrix.double()
    eye = torch.eye(D, dtype=torch.float64).expand(len(vectors), D, D)
    torch.testing.assert_close(vectors.mT @ vectors, eye, rtol=0, atol=tolerance)
    rotated = vectors.mT @ matrix @ vectors
    torch.testing.assert_close(
        rotated, torch.diag_embed(rotated.diagonal(dim1=1, dim2=2)), rtol=0, atol=tolerance
    )
    values = torch.linalg.eigvalsh(matrix)
    torch.testing.assert_close(rotated.diagonal(dim1=1, dim2=2), values, rtol=0, atol=tolerance)


def test_few_rows_are_decomposed_in_their_span(low, widths):
    matrix = covariance(6)
    vectors = find_eigenvectors(matrix, 6)
    assert widths == [(14, torch.float64)]
    check_diagonalises(vectors, matrix, 1e-9)


def test_more_rows_than_were_said_are_noticed(low, widths):
    matrix = covariance(30)
    check_diagonalises(find_eigenvectors(matrix, 6), matrix, 1e-9)
    assert widths == [(D, torch.float64)]
    check_diagonalises(find_eigenvectors(matrix, 30), matrix, 1e-9)


def test_wide_covariances_in_single_precision_stay_in_it(low, widths):
    matrix = covariance(200, torch.float32)
    vectors = find_eigenvectors(matrix, 200)
    assert widths == [(D, torch.float32)]
    check_diagonalises(vectors, matrix, 1e-5)


def test_a_basis_that_does_not_hold_is_computed_again(low, widths, monkeypatch):
    watched = torch.linalg.eigh

    def spoil(matrix):
        values, vectors = watched(matrix)
        return (values, vectors + 1e-2) if matrix.dtype == torch.float32 else (values, vectors)

    matrix = covariance(200, torch.float32)
    with monkeypatch.context() as patch:
        patch.setattr(torch.linalg, "eigh", lambda m: torch.return_types.linalg_eigh(spoil(m)))
        vectors = find_eigenvectors(matrix, 200)
    assert [dtype for _, dtype in widths] == [torch.float32, torch.float64]
    check_diagonalises(vectors, matrix, 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_does_not_converge_in_single_precision_is_decomposed_in_double(low, widths, monkeypatch, dtype):
    watched = torch.linalg.eigh

    def fail(matrix):
        found = watched(matrix)
        if matrix.dtype == torch.float32:
            raise torch.linalg.LinAlgError("linalg.eigh: The algorithm failed to converge")
        return found

    matrix = covariance(200, torch.float32)
    with monkeypatch.context() as patch:
        patch.setattr(torch.linalg, "eigh", fail)
        vectors = find_eigenvectors(matrix, 200, dtype)
    assert [found for _, found in widths] == [torch.float32, torch.float64]
    check_diagonalises(vectors, matrix, 1e-5)


def test_narrow_covariances_are_decomposed_as_before(widths):
    matrix = covariance(6, torch.float32)
    check_diagonalises(find_eigenvectors(matrix, 6), matrix, 1e-5)
    assert widths == [(D, torch.float64)]


def make_layers(bad=()):
    layers = {}
    for number, width in enumerate((3, 7, 5, 2)):
        sums = LayerStatistics.zeros((1, width, 4), (number == 3, False), dtype=torch.float64)
        sums.inputs += covariance(9)[:1, :4, :4]
        sums.outputs += covariance(9)[:1, :width, :width] if sums.outputs.ndim == 3 else 1.0
        sums.examples = sums.positions = 9.0
        if number in bad:
            sums.outputs[0, 0, 0] = float("nan")
        layers[f"layer{number}"] = sums
    return layers


class Meeting:
    """Two threads that add tensors up as two processes do."""

    def __init__(self):
        self.barrier, self.parts = threading.Barrier(2), {}

    def add(self, rank, tensor):
        self.parts[rank] = tensor.clone()
        self.barrier.wait(10)
        total = self.parts[0] + self.parts[1]
        self.barrier.wait(10)
        return total

    def fail(self, rank, error):
        self.parts[rank] = error
        self.barrier.wait(10)
        both = [self.parts[rank], self.parts[1 - rank]]
        self.barrier.wait(10)
        for found in both:
            if found is not None:
                raise found


def on_two(layers):
    """What each of two processes gets, and which layers it decomposed."""
    meeting, found, own = Meeting(), {}, {0: [], 1: []}

    def work(rank):
        def decompose(name, layer, dtype):
            own[rank].append(name)
            return eigenbases.compute_eigenbasis(name, layer, dtype)

        try:
            found[rank] = compute_eigenbases(
                layers, rank=rank, world_size=2, decompose=decompose,
                all_reduce_sum=lambda tensor: meeting.add(rank, tensor),
                raise_together=lambda error: meeting.fail(rank, error),
            )  # fmt: skip
        except NonFiniteError as error:
            found[rank] = error

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    return found, own


def test_two_processes_share_the_layers_and_have_the_same_bases():
    layers = make_layers()
    found, own = on_two(layers)
    assert sorted(own[0] + own[1]) == sorted(layers)
    assert own[0]
    assert own[1]
    for name, expected in compute_eigenbases(layers).items():
        for rank in range(2):
            assert torch.equal(found[rank][name].q_in, expected.q_in)
            if expected.q_out is None:
                assert found[rank][name].q_out is None
            else:
                assert torch.equal(found[rank][name].q_out, expected.q_out)


def test_both_processes_end_with_the_error_of_one():
    found, _ = on_two(make_layers(bad=(1,)))
    for rank in range(2):
        assert "output-gradient covariance of layer 'layer1' is not finite" in str(found[rank])


def test_work_is_shared_out_by_cost():
    owners = share_out({"a": 8.0, "b": 5.0, "c": 4.0, "d": 1.0, "e": 0.0}, 2)
    loads = [
        sum(cost for name, cost in zip("abcd", (8, 5, 4, 1), strict=True) if owners[name] == n)
        for n in (0, 1)
    ]
    assert loads == [9, 9]


def hide_columns(layer, count):
    """Take the same columns out of a layer's sums each time, more of them with a larger count."""
    unseen = torch.randperm(D, generator=torch.Generator().manual_seed(0))[:count]
    layer.inputs[:, unseen] = 0
    layer.inputs[:, :, unseen] = 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_columns_that_were_never_seen_are_left_out_of_the_decomposition(low, widths, dtype):
    sums = LayerStatistics(covariance(200, dtype)[:1], torch.ones(1, 1, 1, dtype=dtype), 200.0, 200.0)
    hide_columns(sums, D // 4)
    basis = compute_eigenbasis("layer", sums)
    assert {width for width, _ in widths} == {D - D // 4, 1}
    values = torch.linalg.eigvalsh(sums.inputs.double() / 200)
    found = basis.inputs.energies(sums.covariance_in())
    torch.testing.assert_close(found.double().sort().values, values, rtol=0, atol=1e-7)
    rotated = basis.q_in.mT @ sums.covariance_in() @ basis.q_in
    torch.testing.assert_close(rotated, torch.diag_embed(found), rtol=0, atol=1e-7)


def test_a_covariance_of_nothing_has_a_basis(low):
    basis = compute_eigenbasis("layer", LayerStatistics.zeros((1, 1, D)))
    assert torch.equal(basis.q_in, torch.eye(D)[None])


def test_few_columns_that_were_never_seen_stay(low):
    sums = LayerStatistics(covariance(200)[:1], torch.ones(1, 1, 1, dtype=torch.float64), 200.0, 200.0)
    hide_columns(sums, D // 16 - 1)
    assert compute_eigenbasis("layer", sums).inputs.seen is None
    hide_columns(sums, D // 16)
    assert compute_eigenbasis("layer", sums).inputs.seen.sum() == D - D // 16


def test_two_processes_know_the_columns_that_were_never_seen(low):
    layers = {}
    for number in range(3):
        sums = LayerStatistics.zeros((1, 4, D), dtype=torch.float64)
        sums.inputs += covariance(90)[:1]
        sums.outputs += covariance(9)[:1, :4, :4]
        sums.examples = sums.positions = 9.0
        hide_columns(sums, 10 * number)
        layers[f"layer{number}"] = sums
    found, own = on_two(layers)
    assert own[0]
    assert own[1]
    for name, expected in compute_eigenbases(layers).items():
        for rank in range(2):
            torch.testing.assert_close(found[rank][name].tensors(), expected.tensors(), rtol=0, atol=0)
    assert [found[0][name].inputs.vectors.shape[1] for name in layers] == [D, D - 10, D - 20]
