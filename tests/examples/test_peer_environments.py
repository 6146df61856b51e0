"""What a peer in an environment of its own is handed, hands back, and is left out for."""

import sys
from dataclasses import replace

import pytest
import torch
from benchmarks import load_benchmark

foreign = load_benchmark("foreign")
large_tasks = load_benchmark("large_tasks")
meter = load_benchmark("meter")
tasks = load_benchmark("tasks")
worker = load_benchmark("worker")


def small_task():
    task = tasks.digits_mlp()
    return replace(task, train=task.train.head(12), queries=task.queries.head(3))


class Products(worker.Peer):
    """Inner products of inputs, and their negatives as defaults."""

    name = "dattri-llm"
    untuned = "negative"

    def stages(self):
        return [meter.Stage("scores", "scores", self.multiply, (len(self.job.train),))]

    def multiply(self, count):
        self.found = self.job.queries.tensors[0] @ self.job.train.tensors[0].T

    def scores(self):
        return {"negative": -self.found, "positive": self.found}


class Silent(Products):
    def __init__(self, job):
        raise worker.UnansweredError("answers for nothing")


@pytest.fixture
def run_here(monkeypatch):
    """Measure in this process what would run in another."""

    def run(words, limit):
        monkeypatch.setattr(sys, "argv", ["worker", words[-1]])
        worker.main({"ekfac": run.method})
        return ""

    monkeypatch.setattr(foreign, "_run", run)
    monkeypatch.setattr(foreign, "make_environment", lambda name, folder: sys.executable)
    return run


def test_a_job_is_read_as_it_was_written(tmp_path):
    task = small_task()
    model = task.untrained().eval()
    foreign.write_job(task, model, "ekfac", tmp_path, freeze=False)
    job, said = worker.read(tmp_path)
    assert said["method"] == "ekfac"
    assert not job.net.training
    inputs = task.queries.tensors[0]
    assert torch.equal(job.net(inputs), model(inputs))
    for table, original in ((job.train, task.train), (job.queries, task.queries)):
        assert all(map(torch.equal, table.tensors, original.tensors))


@pytest.mark.slow
def test_the_best_setting_is_told_and_so_are_the_defaults(run_here, monkeypatch):
    run_here.method = Products
    task = small_task()
    target = task.queries.tensors[0] @ task.train.tensors[0].T
    monkeypatch.setattr(
        foreign, "judge", lambda task, scores, small: (None, large_tasks.correlate(scores, target))
    )
    found = foreign.measure_foreign("dattri-llm", task, task.untrained().eval(), freeze=False)
    assert (found.correlation, found.untuned) == (pytest.approx(1.0), pytest.approx(-1.0))
    assert found.settings["best"] == "positive"
    (stage,) = found.stages
    assert stage.epochs > 0
    assert found.num_train == 12


def test_what_a_peer_does_not_answer_leaves_it_out(run_here):
    run_here.method = Silent
    task = small_task()
    with pytest.raises(foreign.LeftOutError, match="answers for nothing"):
        foreign.measure_foreign("bergson", task, task.untrained().eval(), freeze=False)


@pytest.mark.slow
def test_failures_name_the_last_line_of_their_process(tmp_path):
    script = tmp_path / "fails.py"
    script.write_text("import sys\nassert len(sys.argv) == 2\nraise ValueError('no such layer')\n")
    assert foreign._run([sys.executable, str(script), str(tmp_path)], 60.0) == "ValueError: no such layer"


@pytest.mark.parametrize("name", ["resnet10", "language_small"])
def test_larger_networks_have_the_sizes_that_they_are_named_for(name):
    task = large_tasks.LARGE[name]()
    parameters = sum(p.numel() for p in task.net().parameters())
    assert parameters == {"resnet10": 1_228_970, "language_small": 1_309_440}[name]
    inputs, targets = task.queries.tensors
    outputs = task.net()(inputs[:2])
    assert outputs.shape[:-1] == targets[:2].shape


def test_every_contender_of_its_own_environment_can_be_run():
    peers = load_benchmark("peers")
    assert set(peers.FOREIGN) == set(foreign.METHODS)
    for environment, _ in foreign.METHODS.values():
        assert (foreign.HERE / foreign.ENVIRONMENTS[environment][2]).exists()
