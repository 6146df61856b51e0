"""The metric's states across two real processes, with an unequal number of subsets on each."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from lightning_influence.evaluation.lds import LinearDatamodelingScore


def table(seed):
    return torch.randn(9, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rank(index, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=index, world_size=2)
    mine = slice(0, 6) if index == 0 else slice(6, 9)
    metric = LinearDatamodelingScore(bootstrap=20)
    metric.update(table(0)[mine], table(1)[mine])
    result = metric.compute()
    torch.save({name: value.item() for name, value in result.items()}, f"{folder}/{index}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_compute_what_one_does(tmp_path):
    mp.start_processes(rank, args=(str(tmp_path),), nprocs=2, start_method="spawn")
    whole = LinearDatamodelingScore(bootstrap=20)
    whole.update(table(0), table(1))
    expected = {name: value.item() for name, value in whole.compute().items()}
    assert [torch.load(tmp_path / f"{index}.pt") for index in (0, 1)] == [expected, expected]
