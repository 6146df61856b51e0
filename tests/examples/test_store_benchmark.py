"""The benchmark of gradient stores runs at a tiny size."""

import pytest
import torch
from benchmarks import load_benchmark

store = load_benchmark("store")


@pytest.mark.parametrize("task", ["digits_mlp", "digits_cnn"])
def test_the_table_has_a_line_for_each_size(task, capsys):
    store.main(["8", "20", "--tasks", task, "--examples", "40", "--untrained"])
    lines = [line.split("│")[1:] for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    assert [line[0].strip() for line in lines] == ["8", "20"]
    assert [int(line[1]) for line in lines] == [2 * 8 + 16, 2 * 20 + 16]
    near = [float(line[4].split()[0]) for line in lines]
    assert 0 < near[0] < near[1] <= 1


def test_ranks():
    scores = torch.tensor([[1.0, 5.0, 2.0], [3.0, 2.0, 1.0]])
    assert store.correlate_ranks(scores, scores**3) == pytest.approx(1)
    assert store.correlate_ranks(scores, -scores) == pytest.approx(-1)
