"""Two processes that share a module's parameters (FSDP2) answer as one process that holds them."""

from __future__ import annotations

import pytest
from two_processes import check_script

BEGIN = """
import sys, warnings
import lightning.pytorch as pl
import torch
from sharded_models import Narrow, Reader, load, make_trainer, make_vectors, make_whole, make_words
from lightning_influence import InfluenceCallback, InfluenceModule, InfluenceTrainer

torch.set_num_threads(1)
warnings.simplefilter("ignore")
exact = {"damping": 0.1, "fisher": "exact", "low_rank_tolerance": 0.0}


def close(ours, theirs, rtol=1e-9):
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=1e-12)
"""

ANSWERS = """
data, asked = make_words(13), make_words(3)  # neither is shared out evenly
trainer = make_trainer(InfluenceTrainer, sys.argv[1], max_epochs=2)
module = Reader()
trainer.fit(module, load(data, 4))
grads = [p.grad for p in module.parameters()]
alone = InfluenceModule(make_whole(module))
from lightning_influence.model import checks

checks._SHARED_AT_ONCE = 10  # gradients of parameters layer by layer
for method in ("identity", "kfac", "ekfac", "exact", "cg", "auto"):
    options = {"method": method, **exact}
    if method in ("auto", "cg"):
        options |= {"tolerance": 1e-11, "max_steps": 200}
    ours = trainer.influence(module, load(data, 4), load(asked, 2), log=False, **options)
    theirs = alone.scores(load(data, 13), load(asked, 3), **options)
    close(ours.scores, theirs.scores, 1e-7 if method == "cg" else 1e-9)
    assert ours.diagnostics.parameters_covered == 1.0
    assert ours.diagnostics.layers == theirs.diagnostics.layers
options = {"method": "ekfac", **exact}


def gap(module, batch):
    return (module(batch[0]).square().mean(1).diff().abs()).sum()


sets = load(data, 7), {"measurement": gap, **options}
ours = trainer.influence(module, load(data, 4), sets[0], log=False, **sets[1])
close(ours.scores, alone.scores(load(data, 13), sets[0], **sets[1]).scores)
for further in ({"aggregate": "mean"}, {"aggregate": [0, 1, 0]}, {"by": "layer"}, {"measurement": "margin"}):
    ours = trainer.influence(module, load(data, 4), load(asked, 2), log=False, **options, **further)
    theirs = alone.scores(load(data, 13), load(asked, 3), **options, **further)
    close(ours.scores, theirs.scores)
    if "by" in further:
        close(ours.layer_scores, theirs.layer_scores)
few = trainer.influence(module, load(data, 4), load(asked, 2), log=False, top_k=2, **options)
theirs = alone.scores(load(data, 13), load(asked, 3), top_k=2, **options)
close(few.top_scores, theirs.top_scores)
assert torch.equal(few.top_indices, theirs.top_indices)
for method in ("identity", "ekfac", "auto"):
    options = {"method": method, "damping": 0.1, "fisher": "exact"}
    ours = trainer.self_influence(module, load(data, 4), log=False, **options)
    close(ours.scores, alone.self_influence(load(data, 13), **options).scores)

# Each layer's factors, basis and solved queries are on one process.
from lightning_influence.methods import closed_form, fitting

held = {"factors": [], "queries": []}
decompose, scorer = fitting.compute_eigenbases, closed_form.PreconditionedScorer


def watch_factors(layers, *args, **options):
    held["factors"] += layers
    found = decompose(layers, *args, **options)
    held["factors"] += found
    return found


def watch_queries(inverse, queries, **options):
    held["queries"] += [*inverse.layers, *queries]
    return scorer(inverse, queries, **options)


fitting.compute_eigenbases, closed_form.PreconditionedScorer = watch_factors, watch_queries
ours = trainer.influence(module, load(data, 4), load(asked, 2), method="ekfac", log=False, **exact)
everyone = [None, None]
torch.distributed.all_gather_object(everyone, {name: set(layers) for name, layers in held.items()})
for name in held:
    assert not everyone[0][name] & everyone[1][name], (name, everyone)
    assert everyone[0][name] | everyone[1][name] == set(ours.diagnostics.layers)
told = ours.diagnostics
assert told.damping.keys() == told.extra["factor_examples"].keys() == set(told.layers)

one = torch.utils.data.Subset(data, [4])  # a process without examples serves the other
options = {"method": "ekfac", **exact}
ours = trainer.influence(module, load(one, 1), load(asked, 2), log=False, **options)
close(ours.scores, alone.scores(load(one, 1), load(asked, 3), **options).scores)
assert all(hasattr(p, "full_tensor") for p in module.parameters()), "the shards are back in their places"
assert all(p.grad is before for p, before in zip(module.parameters(), grads))
trainer.fit_loop.max_epochs = 3
trainer.fit(module, load(data, 4))  # FSDP goes on
"""


@pytest.mark.slow
def test_every_method_answers_as_one_process_does(tmp_path):
    check_script(BEGIN + ANSWERS, tmp_path)


FITS = """
import copy
from lightning.pytorch.strategies import DDPStrategy
from sharded_models import OFF

data = make_words(24)


def fit(strategy, *callbacks):
    torch.manual_seed(0)
    if strategy == "fsdp":
        trainer = make_trainer(InfluenceTrainer, sys.argv[1], max_epochs=6, callbacks=list(callbacks))
    else:
        trainer = InfluenceTrainer(
            max_epochs=6, accelerator="cpu", devices=2, strategy="ddp", callbacks=list(callbacks), **OFF
        )
    module = Reader()
    trainer.fit(module, load(data, 4))
    return trainer, module


_, plain = fit("fsdp")
callback, other = (InfluenceCallback(every_n_steps=1, log_statistics=False) for _ in range(2))
trainer, module = fit("fsdp", callback)
for a, b in zip(module.parameters(), plain.parameters()):
    assert torch.equal(a.to_local(), b.to_local()), "watching has changed the weights"
_, twin = fit("ddp", other)
assert callback.num_collected == other.num_collected > 6
assert callback.factors.layers.keys() == other.factors.layers.keys() != set()
for name, layer in callback.factors.layers.items():
    theirs = other.factors.layers[name]
    assert (layer.examples, layer.squares_examples) == (theirs.examples, theirs.squares_examples)
    close(layer.inputs, theirs.inputs, 1e-7)
    close(layer.outputs, theirs.outputs, 1e-7)
    close(layer.squares.sum(), theirs.squares.sum(), 1e-7)
close(torch.tensor([r.metric for r in callback.record.layers.values()]),
      torch.tensor([r.metric for r in other.record.layers.values()]), 1e-7)

# Parts of factors serve the next question of their kind, and are neither taken for whole ones nor saved.
asked, more = make_words(3), {"damping": 0.1, "fisher": "exact", "low_rank_tolerance": 0.0, "log": False}
whole = InfluenceModule(make_whole(module))
for method in ("ekfac", "kfac", "auto", "ekfac"):
    options = more | ({"max_steps": 0} if method == "auto" else {})
    options |= {"factors": "refit"} if not callback.influence_state.owns_part else {}
    ours = trainer.influence(module, load(data, 4), load(asked, 2), method=method, **options)
    for name in ("log", "factors"):
        options.pop(name, None)
    close(ours.scores, whole.scores(load(data, 24), load(asked, 3), method=method, **options).scores)
callback.influence_state = type(callback.influence_state)(callback.factors, callback.record)

# A checkpoint's weights and factors serve one process, and go into a module that was never fitted.
trainer.save_checkpoint(sys.argv[1] + "/a.ckpt")
trainer.strategy.barrier()
asked = make_words(3)
options = {"method": "ekfac", "damping": 0.1, "low_rank_tolerance": 0.0, "layers": ["conv", "head"]}
ours = trainer.influence(module, load(data, 4), load(asked, 2), log=False, **options)
alone = InfluenceModule.from_checkpoint(sys.argv[1] + "/a.ckpt", Reader())
close(ours.scores, alone.scores(load(data, 4), load(asked, 3), **options).scores)
fresh = make_trainer(InfluenceTrainer, sys.argv[1], callbacks=[InfluenceCallback(log_statistics=False)])
found = fresh.influence(
    Reader(), load(data, 4), load(asked, 2), log=False, ckpt_path=sys.argv[1] + "/a.ckpt", **options
)
close(found.scores, ours.scores)

# What cannot be collected on one process does not leave the other waiting, nor change the training.
from lightning_influence.collecting import collector as watched

real = watched.Collector.add


def fail_once(self, *args, **kwargs):
    if self._processes.rank == 1 and self.run.collected == 3:
        raise MemoryError("no room for it")
    return real(self, *args, **kwargs)


watched.Collector.add = fail_once
_, module = fit("fsdp", callback := InfluenceCallback(every_n_steps=1, log_statistics=False))
for a, b in zip(module.parameters(), plain.parameters()):
    assert torch.equal(a.to_local(), b.to_local())
assert callback.num_collected == 0
"""


@pytest.mark.slow
def test_a_fit_is_collected_as_under_ddp_and_not_changed(tmp_path):
    check_script(BEGIN + FITS, tmp_path)


REFUSED = """
from lightning_influence.errors import InfluenceError, UnsupportedTrainerError

data = make_vectors(12)
trainer = make_trainer(InfluenceTrainer, sys.argv[1], max_epochs=1)
module = Narrow()
trainer.fit(module, load(data, 3))
before = [p.to_local().clone() for p in module.parameters()]


def refused(kind, text, ask):
    try:
        ask()
    except kind as error:
        assert text in str(error), error
    else:
        raise AssertionError(text)


edits = "ModelParallelStrategy shards the parameters, which edits change whole"
refused(UnsupportedTrainerError, edits, lambda: trainer.forget([0], module, load(data, 3)))
refused(UnsupportedTrainerError, edits, lambda: trainer.relabel([0], 1, module, load(data, 3)))
alone = InfluenceModule(module)
refused(InfluenceError, "sharded over processes", lambda: alone.scores(load(data, 3), load(data, 3)))
assert all(torch.equal(p.to_local(), old) for p, old in zip(module.parameters(), before))
"""


def test_edits_and_passes_without_a_trainer_are_refused(tmp_path):
    check_script(BEGIN + REFUSED, tmp_path)
