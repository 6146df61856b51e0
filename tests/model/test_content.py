"""Digests of examples: the same in all batches and processes, another one where anything changes."""

from dataclasses import dataclass

import pytest
import torch
from drive import Setup, run

from lightning_influence.curvature.factors import fingerprint, fingerprint_differs
from lightning_influence.model.content import SeenData, digest_examples
from lightning_influence.model.mean_loss import LossPass
from lightning_influence.support.digests import digest_rows, digest_tensors


@dataclass
class Batch:
    x: torch.Tensor
    names: list


def seen(setup, batches):
    return run(LossPass(setup.plan), setup.module, batches).losses


def split(tensors, size):
    return zip(*(tensor.split(size) for tensor in tensors), strict=True)


@pytest.mark.parametrize("name", ["mlp_gelu", "tokens_weighted", "conv2d"])
def test_batches_and_processes_do_not_matter(name):
    setup = Setup.of(name)
    data = setup.case.x, setup.case.y
    whole = seen(setup, [data])
    assert whole.content != 0
    assert seen(setup, split(data, 5)).content == whole.content
    halves = []
    for rows in (slice(0, 7), slice(7, 12)):
        part = LossPass(setup.plan)
        part.step(setup.module, [tensor[rows] for tensor in data], torch.arange(12)[rows], 0)
        halves.append(part.losses)
    assert halves[0].identify(lambda own: own + halves[1].content) == whole.content


@dataclass
class Slotted:
    """A batch whose parts stand in no ``__dict__``."""

    __slots__ = ("x", "y")
    x: torch.Tensor
    y: torch.Tensor


def test_what_changes_an_example_changes_its_digest_alone():
    x, y = torch.randn(6, 4), torch.arange(6)
    indices = torch.arange(10, 16)
    before = digest_examples((x, y), indices)
    assert len(set(before.tolist())) == 6
    changed = x.clone()
    changed[2, 1] = torch.nextafter(changed[2, 1], torch.tensor(9.0))  # by one bit
    moved = x.clone()
    moved[4] = moved[4].roll(1)
    labels = y.clone()
    labels[5] = 7
    for batch, row in (((changed, y), 2), ((moved, y), 4), ((x, labels), 5)):
        differ = digest_examples(batch, indices) != before
        assert differ.nonzero().flatten().tolist() == [row]
        slotted = digest_examples(Slotted(*batch), indices) != digest_examples(Slotted(x, y), indices)
        assert torch.equal(slotted, differ)
    assert (digest_examples((y, x), indices) != before).all()
    assert (digest_examples((x, y), indices + 1) != before).all()
    other = digest_examples((x.flip(0), y.flip(0)), indices.flip(0))
    assert torch.equal(other.flip(0), before)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int16, torch.bfloat16, torch.complex64])
def test_all_dtypes(dtype):
    x = torch.arange(12).view(3, 4).fmod(2).to(dtype)
    other = x.clone()
    other[1, 3] = 1 - other[1, 3].to(torch.complex64 if dtype.is_complex else torch.float32).real
    assert (digest_rows(x) != digest_rows(other)).tolist() == [False, True, False]


def test_parts_of_a_batch():
    indices, x = torch.arange(3), torch.randn(3, 2)

    def digest(batch):
        return digest_examples(batch, indices)

    nested = {"x": x, "more": [Batch(x, ["a", "b", "c"]), None, 1.5]}
    before = digest(nested)
    assert torch.equal(digest({"x": x, "more": [Batch(x, ["a", "b", "c"]), None, 1.5]}), before)
    assert (digest({"x": x, "more": [Batch(x, ["a", "b", "d"]), None, 1.5]}) != before).tolist() == [0, 0, 1]
    assert (digest({"x": x, "more": [Batch(x, ["a", "b", "c"]), None, 2.5]}) != before).any()
    later = torch.randn(5, 3, 2)  # time first
    assert (digest((later.index_fill(1, torch.tensor(1), 0.0),)) != digest((later,))).tolist() == [0, 1, 0]
    flat = torch.randn(12, 2)  # positions in a run
    assert (digest((flat.index_fill(0, torch.tensor(4), 0.0),)) != digest((flat,))).tolist() == [0, 1, 0]
    odd = torch.randn(7)
    assert (digest((odd + 1,)) != digest((odd,))).any()
    padded = torch.cat([x, torch.zeros(3, 5)], dim=1)
    assert torch.equal(digest((padded,)), digest((x,)))


def test_long_rows_and_many_rows_are_read_in_runs():
    rows = torch.randn(70, 40_000)
    before = digest_rows(rows)
    for row, place in ((0, 39_999), (69, 16_384), (33, 0)):
        other = rows.clone()
        other[row, place] += 1
        assert (digest_rows(other) != before).nonzero().flatten().tolist() == [row]
    swapped = rows.clone()
    swapped[5, [3, 16_387]] = swapped[5, [16_387, 3]]  # the same place in two runs
    assert (digest_rows(swapped) != before).nonzero().flatten().tolist() == [5]
    assert torch.equal(digest_rows(rows[:3].contiguous()), before[:3])


def test_tensors_by_name_shape_precision_and_content():
    a = {"w": torch.randn(3, 4), "b": torch.zeros(2), "empty": torch.zeros(0)}
    assert digest_tensors(a) == digest_tensors({k: v.clone() for k, v in a.items()})
    others = [
        {**a, "w": a["w"].T.contiguous().view(3, 4)},
        {**a, "w": a["w"].double()},
        {**a, "b": torch.zeros(3)},
        {**a, "b": -a["b"]},
        {"w": a["w"], "c": a["b"], "empty": a["empty"]},
    ]
    assert len({digest_tensors(x) for x in [a, *others]}) == 6


def test_nothing_seen_is_zero_and_sums_wrap():
    data = SeenData()
    assert data.identify(lambda own: own) == 0
    data._sum = torch.tensor(2**63 - 1)
    assert data.identify(lambda own: own) == 2**63 - 1


def test_a_fingerprint_tells_places_apart_but_no_rounding():
    model = torch.nn.Linear(30, 20)
    before = fingerprint(model)
    with torch.no_grad():
        model.weight.mul_(1 + 1e-7)
    assert fingerprint_differs(before, model) == []
    with torch.no_grad():
        model.weight.copy_(model.weight[torch.tensor([1, 0, *range(2, 20)])])
    assert fingerprint_differs(before, model) == ["weight"]
