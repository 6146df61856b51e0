"""Scores that live in a file while they are computed: the same numbers, and nothing of them left behind."""

import numpy as np
import pytest
import torch
from influence_models import Net, dataset, fitted, names, queries, train
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader
from two_processes import BEGIN, check_script

from lightning_influence import InfluenceError, InfluenceModule
from lightning_influence.errors import ExistingFileError
from lightning_influence.methods.answers import Answer

OPTIONS = {"damping": 0.1, "low_rank_tolerance": 0.0}


@pytest.mark.grid
@pytest.mark.parametrize("method", ["identity", "ekfac", "auto"])
@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
def test_a_file_holds_what_memory_would(tmp_path, method, kind):
    module, path = InfluenceModule(Net().to(kind)), tmp_path / "new" / "scores.npy"
    data = torch.utils.data.TensorDataset(*(t.to(kind) if t.is_floating_point() else t for t in dataset()[:]))
    loaders = DataLoader(data, 5), DataLoader(data, 3)
    budget = {"memory_budget": 3000}
    plain = module.scores(*loaders, method=method, **OPTIONS, **budget)
    found = module.scores(*loaders, method=method, scores_file=path, **OPTIONS, **budget)
    assert torch.equal(found.scores, plain.scores)
    if method != "auto":
        assert names(found).count("scores") > 1  # groups of queries
    stored = np.load(path, mmap_mode="r")
    assert (stored.shape, stored.dtype) == ((22, 22), np.dtype(str(kind).removeprefix("torch.")))
    assert np.array_equal(stored, plain.scores.numpy())
    assert found.diagnostics.extra["scores_file"] == str(path)
    assert "scores_file" not in plain.diagnostics.extra
    assert [entry.name for entry in path.parent.iterdir()] == ["scores.npy"]
    found.scores[0, 0] = 7.0  # the tensor is the file
    assert stored[0, 0] == 7.0


def test_a_file_that_exists_is_kept(tmp_path):
    path = tmp_path / "scores.npy"
    path.write_text("mine")
    host = InfluenceModule(Net())
    with pytest.raises(ExistingFileError, match=r"exists and is not overwritten\. Pass another path"):
        host.scores(train(), queries(), scores_file=str(path))
    assert path.read_text() == "mine"
    assert host.state.factors is None  # before any pass
    assert issubclass(ExistingFileError, InfluenceError | FileExistsError)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_nothing_is_left_of_a_file_after_an_error(tmp_path, monkeypatch, error):
    path = tmp_path / "scores.npy"

    def fail(self, *arguments):
        assert not path.exists()
        assert len([*tmp_path.iterdir()]) == 1
        raise error("in mid-call")

    monkeypatch.setattr(Answer, "end", fail)
    with pytest.raises(error, match="in mid-call"):
        InfluenceModule(Net()).scores(train(), queries(), method="identity", scores_file=path)
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"top_k": 2}, ValueError, "scores_file with top_k"),
        ({"by": "layer"}, ValueError, "scores_file with by"),
        ({"train_groups": [0] * 22}, ValueError, "scores_file with train_groups"),
        ({"scores_file": 3}, TypeError, "scores_file=3; accepted is the path"),
    ],
)
def test_what_does_not_go_with_a_file_is_refused(tmp_path, options, error, message):
    options = {"scores_file": tmp_path / "a.npy", **options}
    with pytest.raises(error, match=message):
        InfluenceModule(Net()).scores(train(), queries(), **options)


def test_a_trainer_logs_no_second_copy(tmp_path):
    torch.manual_seed(0)
    host, module = fitted(logger=CSVLogger(tmp_path), default_root_dir=tmp_path)
    path = tmp_path / "scores.npy"
    found = host.influence(module, query_dataloaders=queries(), method="ekfac", scores_file=path)
    plain = host.influence(module, query_dataloaders=queries(), method="ekfac", log=False)
    assert torch.equal(found.scores, plain.scores)
    folder = tmp_path / "lightning_logs" / "version_0" / "influence"
    assert [file.name for file in folder.iterdir()] == ["attributions.csv"]
    assert torch.equal(found.group([3, 5]), plain.scores[:, [3, 5]].sum(1))
    page = found.report(tmp_path / "page.html")
    assert page.exists()
    with pytest.raises(ValueError, match="scores_file with several checkpoints"):
        host.influence(module, ckpt_path=["a", "b"], scores_file=tmp_path / "b.npy")


SCRIPT = """
import os
import numpy as np
from lightning_influence import InfluenceError

path = os.path.join(sys.argv[1], "scores.npy")
options = {"method": "ekfac", "damping": 0.1, "fisher": "exact", "low_rank_tolerance": 0.0}
loaders = DataLoader(data, 4), DataLoader(TensorDataset(x[:5], y[:5]), 2)
ours = trainer.influence(module, *loaders, log=False, scores_file=path, memory_budget=4000, **options)
theirs = InfluenceModule(module).scores(*loaders, **options)
torch.testing.assert_close(ours.scores, theirs.scores)
torch.testing.assert_close(torch.from_numpy(np.load(path)), theirs.scores)
trainer.strategy.barrier()
assert not [name for name in os.listdir(sys.argv[1]) if name.endswith(".tmp")]
try:
    trainer.influence(module, *loaders, log=False, scores_file=path, **options)
    raise SystemExit("not refused")
except InfluenceError:
    pass
"""


def test_two_processes_leave_one_file(tmp_path):
    check_script(BEGIN + SCRIPT, tmp_path)
