"""Where matrices of a device are decomposed: there, or on the CPU where that is clearly faster."""

import pytest
import torch

from lightning_influence.linalg import placement
from lightning_influence.linalg.placement import decompose_symmetric


@pytest.fixture
def device(monkeypatch):
    """Takes CPU tensors for those of a device, and notes who decomposes which widths."""
    real = placement._decompose_in_place, placement._decompose_on_cpu

    class Device(list):
        refuses = None

    device = Device()

    def there(matrix, dtype):
        if device.refuses is not None:
            raise device.refuses
        device.append(("device", matrix.shape[-1]))
        return real[0](matrix, dtype)

    def here(matrix, dtype):
        device.append(("cpu", matrix.shape[-1]))
        return real[1](matrix, dtype)

    monkeypatch.setattr(placement, "_decompose_in_place", there)
    monkeypatch.setattr(placement, "_decompose_on_cpu", here)
    monkeypatch.setattr(placement, "_is_cpu", lambda matrix: False)
    monkeypatch.setattr(placement, "_on_cpu", {})
    return device


def pretend(monkeypatch, there, here):
    """Let decompositions take these seconds."""

    def time(work, block, dtype):
        work(block, dtype)
        return there if work is placement._decompose_in_place else here

    monkeypatch.setattr(placement, "_time", time)


def make(width):
    root = torch.randn(2, width, width, dtype=torch.float64)
    return root @ root.mT


@pytest.mark.parametrize(
    ("there", "here", "who"), [(1.0, 3.0, "device"), (3.0, 1.0, "cpu"), (1.5, 1.0, "device")]
)
def test_the_clearly_faster_one_decomposes(device, monkeypatch, there, here, who):
    pretend(monkeypatch, there, here)
    matrix = make(6)
    values, vectors = decompose_symmetric(matrix, torch.float64)
    assert list(device) == [("device", 6), ("cpu", 6), (who, 6)]
    torch.testing.assert_close(vectors * values[:, None] @ vectors.mT, matrix)


def test_each_class_of_widths_is_tried_once_on_a_block(device, monkeypatch):
    monkeypatch.setattr(placement, "_TRIED", 8)
    pretend(monkeypatch, 3.0, 1.0)
    for width in (3, 4, 7, 8, 20, 30):
        decompose_symmetric(make(width), torch.float64)
    tried = [("device", 3), ("cpu", 3)], [("device", 7), ("cpu", 7)]
    found = [*tried[0], ("cpu", 3), ("cpu", 4), *tried[1], ("cpu", 7), ("cpu", 8), ("cpu", 20), ("cpu", 30)]
    assert list(device) == found
    decompose_symmetric(make(4), torch.float32)  # a precision of its own
    assert list(device)[len(found) :] == [("device", 4), ("cpu", 4), ("cpu", 4)]


@pytest.mark.parametrize("error", [NotImplementedError("no eigh"), TypeError("no float64")])
def test_a_device_that_cannot_decompose_is_asked_once(device, error):
    device.refuses = error
    for _ in range(2):
        values, vectors = decompose_symmetric(matrix := make(5), torch.float64)
        torch.testing.assert_close(vectors * values[:, None] @ vectors.mT, matrix)
    assert list(device) == [("cpu", 5), ("cpu", 5)]


def test_what_does_not_converge_is_told_and_tried_again(device):
    device.refuses = torch.linalg.LinAlgError("did not converge")
    with pytest.raises(RuntimeError, match="did not converge"):
        decompose_symmetric(make(5), torch.float64)
    device.refuses = None
    decompose_symmetric(make(5), torch.float64)
    assert ("device", 5) in device


def test_times_are_those_of_the_second_call(monkeypatch):
    ticks = iter([0.0, 10.0, 13.0])
    monkeypatch.setattr(placement.time, "perf_counter", lambda: next(ticks))
    assert placement._time(placement._decompose_in_place, make(3), torch.float64) == 3.0


def test_matrices_on_the_cpu_are_decomposed_without_trying(monkeypatch):
    monkeypatch.setattr(placement, "_time", None)
    values, _ = decompose_symmetric(make(4).float(), torch.float64)
    assert values.dtype == torch.float64
