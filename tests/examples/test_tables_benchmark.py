"""The benchmark of large vocabularies runs at a tiny size."""

import pytest
import torch
from benchmarks import load_benchmark

tables = load_benchmark("tables")
TINY = ["40", "--width", "32", "--length", "6", "--depth", "1", "--batch", "4", "--sequences", "8"]


@pytest.mark.slow
@pytest.mark.parametrize("head", [[], ["--untied"]])
def test_the_table_has_a_line_for_each_vocabulary(head, capsys):
    tables.main([*TINY, "--queries", "2", *head])
    printed = capsys.readouterr().out
    assert "ekfac, 8 sequences of 6" in printed
    options = tables.read_options([*TINY, *head])
    model = tables.Model(40, options.width, options.length, options.depth, tied=not options.untied)
    assert (model.head.weight is model.embedding.weight) == (head == [])
    assert f"{sum(p.numel() for p in model.parameters()):,}" in printed


def test_tokens_are_as_frequent_as_words():
    (tokens,) = tables.make_loader(200, 20, 30, 50, 0).dataset.tensors
    assert tokens.shape == (200, 21)
    counts = torch.bincount(tokens.flatten(), minlength=30)
    assert counts[0] == pytest.approx(2 * int(counts[1]), rel=0.15)
