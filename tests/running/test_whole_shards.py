"""Shards of several tensors that travel together give what each gives alone."""

from __future__ import annotations

from two_processes import check_script

SCRIPT = """
import os
import torch
import torch.distributed as dist
from types import SimpleNamespace
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from lightning_influence.running.host.whole_shards import make_whole

dist.init_process_group("gloo", rank=int(os.environ["LOCAL_RANK"]), world_size=2)
trainer = SimpleNamespace(global_rank=dist.get_rank())
mesh = init_device_mesh("cpu", (2,))
torch.manual_seed(0)
wholes = [
    (torch.randn(5, 3), Shard(0)),  # the second process has less
    (torch.randn(1), Shard(0)),  # or nothing
    (torch.randn(0, 4), Shard(0)),
    (torch.randn(2, 5, 3), Shard(1)),
    (torch.randn(2, 5), Shard(-1)),
    (torch.randn(4, 2), Replicate()),
    (torch.arange(7), Shard(0)),
    (torch.randn(3, 2, dtype=torch.float64), Shard(0)),
    (torch.randn(4).bfloat16(), Shard(0)),
]
parts = [distribute_tensor(whole, mesh, [placement]) for whole, placement in wholes]
calls = []
real = dist.all_gather_into_tensor
dist.all_gather_into_tensor = lambda *args, **kwargs: calls.append(args) or real(*args, **kwargs)
found = make_whole(parts)
assert len(calls) == 4, "one collective for each kind of number"
dist.all_gather_into_tensor = real
for (whole, _), ours in zip(wholes, found):
    assert ours.dtype == whole.dtype and ours.shape == whole.shape and ours.is_contiguous()
    assert torch.equal(ours, whole)
assert len({ours.untyped_storage()._cdata for ours in found}) == len(found), "each has memory of its own"
assert torch.equal(make_whole(parts[:1])[0], wholes[0][0])
"""


def test_uneven_parts_along_any_dimension_are_put_together(tmp_path):
    check_script(SCRIPT, tmp_path)
