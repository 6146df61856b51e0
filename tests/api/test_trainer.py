"""``trainer.influence`` on every kind of Trainer, with every kind of data, and what is kept and logged."""

from __future__ import annotations

import csv
import warnings
from dataclasses import replace

import lightning
import pytest
import torch
from influence_cases import CLOSE, quiet
from influence_models import Net, dataset, fitted, names, queries, train, trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch.utils.data import DataLoader, Subset, WeightedRandomSampler

from lightning_influence import (
    InfluenceCallback,
    InfluenceModule,
    InfluenceTrainer,
    influence,
    self_influence,
)
from lightning_influence.support.errors import FactorMismatchError, InfluenceWarning

pytestmark = pytest.mark.filterwarnings("ignore:.*logging interval")
EXACT = {"method": "kfac", "damping": 0.1, "fisher": "exact", "low_rank_tolerance": 0.0, "factors": "refit"}


def same(found, expected) -> None:
    torch.testing.assert_close(found.scores, expected.scores, rtol=1e-4, atol=1e-6)
    assert found.train_indices.tolist() == expected.train_indices.tolist()


def alone(module, loader=None, asked=None, **options):
    options = {k: v for k, v in {**EXACT, **options}.items() if k != "factors"}
    return InfluenceModule(module).scores(loader or train(), asked or queries(), **options)


def test_every_way_to_ask_gives_the_same_answer(tmp_path):
    module = Net()
    host = trainer(InfluenceCallback(), kind=lightning.Trainer)
    host.fit(module, train())
    expected = alone(module)
    asked = queries()
    same(host.influence(train_dataloaders=train(), query_dataloaders=asked, **EXACT), expected)
    same(host.influence(query_dataloaders=asked, **EXACT), expected)  # the loader of the fit
    bare = trainer(kind=lightning.Trainer)
    same(influence(bare, module, train(), asked, **EXACT), expected)
    same(InfluenceTrainer.influence(trainer(), module, train(), asked, **EXACT), expected)
    same(influence(bare, module, list(train(shuffle=False)), list(asked), **EXACT), expected)
    mine = self_influence(bare, module, train(), method="kfac", damping=0.1, fisher="exact", factors="refit")
    theirs = InfluenceModule(module).self_influence(train(), method="kfac", damping=0.1, fisher="exact")
    same(mine, theirs)


class Data(lightning.LightningDataModule):
    def train_dataloader(self):
        return train(drop_last=True)

    def predict_dataloader(self):
        return queries()


def test_datamodules_and_loaders_of_the_module():
    module = Net()
    expected = alone(module)
    same(trainer().influence(module, datamodule=Data(), **EXACT), expected)
    host = trainer()
    host.fit(module, datamodule=Data())
    same(host.influence(datamodule=Data(), **EXACT), alone(module))
    module.predict_dataloader = queries
    module.train_dataloader = train
    same(trainer().influence(module, **EXACT), alone(module))


def test_samplers_give_dataset_indices():
    module = Net()
    whole = alone(module)
    same(alone(module, train(drop_last=True)), whole)
    same(alone(module, train(batch_size=7)), whole)
    weights = torch.ones(22)
    weights[3] = 0
    sampler = WeightedRandomSampler(weights, 40)  # draws with repetition
    found = alone(module, DataLoader(dataset(), 5, sampler=sampler))
    assert found.train_indices.tolist() == [i for i in range(22) if i != 3]
    kept = Subset(dataset(), found.train_indices.tolist())
    torch.testing.assert_close(found.scores, alone(module, DataLoader(kept, 21)).scores, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", ["auto", "ekfac"])
def test_top_k_is_what_sorting_gives(method):
    host, _ = fitted()
    full = host.influence(train_dataloaders=train(), query_dataloaders=queries(), method=method)
    few = host.influence(train_dataloaders=train(), query_dataloaders=queries(), method=method, top_k=4)
    for k in (1, 4):
        torch.testing.assert_close(few.top(k).scores, full.top(k).scores)
        assert few.top(k).indices.tolist() == full.top(k).indices.tolist()
        assert few.bottom(k).indices.tolist() == full.bottom(k).indices.tolist()
    assert few.scores is None


def test_a_second_question_takes_one_scoring_pass():
    host, module = fitted()
    first = host.influence(query_dataloaders=queries())
    assert names(first) == ["leverages", "anchors", "curvature products", "query gradients", "scores"]
    second = host.influence(query_dataloaders=queries())
    assert names(second) == ["query gradients", "scores"]
    torch.testing.assert_close(first.scores, second.scores)
    assert names(host.influence(query_dataloaders=queries(), damping=0.3)) == ["query gradients", "scores"]
    assert names(host.influence(query_dataloaders=queries(), seed=5)) == names(first)
    assert names(host.influence(query_dataloaders=queries(), layers=["body.0"]))[0] == "leverages"
    assert names(host.self_influence()) == ["self-influence"]
    assert names(host.influence(query_dataloaders=queries(), method="ekfac")) == ["query gradients", "scores"]
    host.fit_loop.max_epochs += 1
    host.fit(module, train())  # other weights
    assert names(host.influence(query_dataloaders=queries())) == names(first)


def test_factors_of_the_users_serve_one_call():
    host, module = fitted()
    mine = InfluenceModule(module).fit_factors(train(), fisher="exact")
    own = host.influence(query_dataloaders=queries(), method="kfac", damping=0.1)
    given = host.influence(query_dataloaders=queries(), method="kfac", damping=0.1, factors=mine)
    expected = InfluenceModule(module, mine).scores(train(), queries(), method="kfac", damping=0.1)
    same(given, expected)
    assert names(given) == ["query gradients", "scores"]
    assert not torch.allclose(given.scores, own.scores, rtol=1e-3)
    same(host.influence(query_dataloaders=queries(), method="kfac", damping=0.1), own)
    again = host.influence(
        query_dataloaders=queries(), method="kfac", damping=0.1, fisher="exact", factors="refit"
    )
    assert names(again)[0] == "covariances"
    same(again, expected)
    with pytest.raises(TypeError, match="Got factors of type int; accepted are Factors, 'refit' or None"):
        host.influence(query_dataloaders=queries(), factors=3)


def test_factors_of_a_short_fit_are_fitted_anew_in_the_pass_that_their_eigenvalues_take():
    callback, module = InfluenceCallback(), Net()
    host = trainer(callback, max_epochs=1)
    host.fit(module, train())
    collected = callback.factors
    assert collected.layers
    assert not collected.has_squares
    asked = {"train_dataloaders": train(), "query_dataloaders": queries(), "method": "ekfac", "damping": 0.1}
    told = "fitted all factors anew"
    # A user's factors are used as they are, and so are those whose gradients would take two passes.
    given = host.influence(factors=collected, **asked)
    large = InfluenceModule(module, state=callback.influence_state).scores(memory_budget=1000, **asked)
    for found in (given, large):
        assert found.diagnostics.extra["factors"].startswith("from the fit")
        assert not any(told in note for note in found.diagnostics.warnings)
    assert names(given) == ["eigenvalues", "query gradients", "scores"]
    sampled = InfluenceCallback(fisher="sampled")
    other = trainer(sampled, max_epochs=1)
    other.fit(Net(), train())
    assert not sampled.factors.has_squares
    # So are those of another kind of Fisher than a pass would fit.
    assert other.influence(**asked).diagnostics.extra["factors"] == "from the fit, sampled Fisher"
    callback.influence_state = replace(callback.influence_state, factors=collected, factors_key="")
    found = host.influence(**asked)
    assert names(found) == ["covariances", "query gradients", "scores"]
    assert any(told in note for note in found.diagnostics.warnings)
    assert torch.equal(found.scores, host.influence(factors="refit", **asked).scores)
    again = host.influence(**asked)
    assert names(again) == ["query gradients", "scores"]
    assert callback.factors.origin == "fit"  # what the fit has collected is still there


def test_factors_for_other_data_are_not_reused_silently():
    module = InfluenceModule(Net())
    half = DataLoader(Subset(dataset(), range(11)), 4)
    module.scores(half, queries(), method="ekfac")
    found = module.scores(train(), queries(), method="ekfac")
    told = "factors of an earlier call were fitted for other weights, buffers, training"
    assert any(told in message for message in found.diagnostics.warnings)
    assert names(found)[0] == "covariances"
    assert names(module.scores(train(), queries(), method="ekfac")) == ["query gradients", "scores"]
    given = InfluenceModule(module.model, InfluenceModule(module.model).fit_factors(half))
    with pytest.warns(InfluenceWarning, match="fitted on 11 examples, the training data has 22"):
        assert names(given.scores(train(), queries(), method="ekfac"))[0] == "query gradients"


def test_layers_select():
    module = Net()
    found = alone(module, layers=["body.3"])
    assert list(found.diagnostics.layers) == ["body.3"]
    assert 0 < found.diagnostics.parameters_covered < 1
    host, _ = fitted(module=module)  # the callback's factors are for both
    with quiet():
        part = host.influence(query_dataloaders=queries(), method="ekfac", layers=["body.3"])
        both = host.influence(query_dataloaders=queries(), method="ekfac")
        other = host.influence(query_dataloaders=queries(), method="ekfac", layers=["*.0"])
    torch.testing.assert_close(part.scores + other.scores, both.scores, rtol=2e-2, atol=1e-3)
    assert list(part.diagnostics.damping) == ["body.3"]


def saved(tmp_path, *callbacks, ask=True, **options):
    host, module = fitted(*callbacks, default_root_dir=tmp_path, **options)
    answer = host.influence(query_dataloaders=queries()) if ask else None
    path = tmp_path / "a.ckpt"
    host.save_checkpoint(path)
    return host, module, answer, path


def test_a_checkpoint_holds_all_that_a_question_needs(tmp_path):
    _, module, answer, path = saved(tmp_path)
    assert torch.load(path, weights_only=True)["callbacks"]
    loaded = InfluenceModule.from_checkpoint(path, Net)
    found = loaded.scores(train(), queries())
    assert names(found) == ["query gradients", "scores"]
    torch.testing.assert_close(found.scores, answer.scores)
    assert found.diagnostics.damping == pytest.approx(answer.diagnostics.damping)
    for host in (trainer(), trainer(InfluenceCallback()), trainer(InfluenceCallback(layers=["body.*"]))):
        fresh = Net()
        found = host.influence(fresh, train(), queries(), ckpt_path=str(path))
        assert names(found) == ["query gradients", "scores"]
        torch.testing.assert_close(found.scores, answer.scores)
        assert found.diagnostics.checkpoint == str(path)
        torch.testing.assert_close(dict(fresh.state_dict()), dict(module.state_dict()))
    resumed = trainer(InfluenceCallback(every_n_steps=1), max_epochs=7)
    resumed.fit(Net(), train(), ckpt_path=str(path))
    assert (
        names(resumed.influence(query_dataloaders=queries()))[0] == "leverages"
    )  # the weights have moved on


def test_a_checkpoint_of_a_callback_with_other_settings_is_found(tmp_path):
    host = trainer(InfluenceCallback(layers=["body.0"], fisher="empirical", every_n_steps=1))
    module = Net()
    host.fit(module, train())
    host.save_checkpoint(tmp_path / "a.ckpt")
    found = trainer().influence(
        module, train(), queries(), method="ekfac", ckpt_path=str(tmp_path / "a.ckpt")
    )
    (told,) = (message for message in found.diagnostics.warnings if "no factors of 'body.3'" in message)
    assert told.endswith("They were fitted in a pass of their own.")
    assert names(found)[-2:] == ["query gradients", "scores"]
    assert list(found.diagnostics.layers) == ["body.0", "body.3"]


def test_results_that_are_too_large_are_not_saved(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "lightning_influence.curvature.state.InfluenceState.stored_results.__defaults__", (100,)
    )
    _, _, answer, path = saved(tmp_path)
    found = InfluenceModule.from_checkpoint(path, Net).scores(train(), queries())
    assert names(found) == ["leverages", "anchors", "curvature products", "query gradients", "scores"]
    torch.testing.assert_close(found.scores, answer.scores)


def test_factors_from_a_pass_are_saved_too(tmp_path):
    class Closed(Net):
        def configure_optimizers(self):
            return torch.optim.LBFGS(self.parameters(), max_iter=2)

    with quiet():
        _, _, answer, path = saved(tmp_path, module=Closed(), max_epochs=1)
        assert names(answer)[0] == "covariances"
        found = InfluenceModule.from_checkpoint(path, Closed).scores(train(), queries())
    assert names(found) == ["query gradients", "scores"]
    torch.testing.assert_close(found.scores, answer.scores)


def test_best_weights_with_their_factors(tmp_path):
    checkpoint = ModelCheckpoint(
        tmp_path, monitor="loss", mode="max", save_top_k=1
    )  # the first epoch, most likely
    host, module = fitted(checkpoint, default_root_dir=tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", InfluenceWarning)  # such as one on other weights
        found = host.influence(query_dataloaders=queries(), method="kfac", damping=0.1, ckpt_path="best")
    assert found.diagnostics.checkpoint == checkpoint.best_model_path
    best = torch.load(checkpoint.best_model_path, weights_only=True)["state_dict"]
    torch.testing.assert_close(dict(module.state_dict()), dict(best))


def test_other_weights_are_noticed_after_saving_too(tmp_path):
    host, module = fitted()
    module.body[0].weight.data += 0.1
    text = r"collected at other weights than the model has now \(they differ in body.0.weight\)"
    with pytest.warns(InfluenceWarning, match=text):
        found = host.influence(query_dataloaders=queries(), method="ekfac")
    assert any("other weights" in note for note in found.diagnostics.warnings)
    host.save_checkpoint(tmp_path / "a.ckpt")
    with pytest.warns(InfluenceWarning, match=text):
        InfluenceModule.from_checkpoint(tmp_path / "a.ckpt", Net).scores(train(), queries(), method="ekfac")


def test_factors_of_another_model():
    host, _ = fitted()
    other = InfluenceModule(Net(width=7)).fit_factors(train())
    shapes = r"body.0: factors \(1, 7, 5\), model \(1, 5, 5\); body.3: factors \(1, 3, 8\), model \(1, 3, 6\)"
    with pytest.raises(FactorMismatchError, match=shapes):
        host.influence(query_dataloaders=queries(), factors=other)
    other.layers["head"] = other.layers.pop("body.3")
    with pytest.raises(FactorMismatchError, match=r"head: factors \(1, 3, 8\), model missing"):
        host.influence(query_dataloaders=queries(), factors=other)


def test_loggers_and_files(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    boards = [TensorBoardLogger(tmp_path, name="tb"), CSVLogger(tmp_path, name="csv")]
    host, _ = fitted(logger=boards, default_root_dir=tmp_path, log_every_n_steps=1)
    found = host.influence(query_dataloaders=queries(), name="asked")
    host.self_influence(name="own")
    for board in boards:
        board.finalize("success")
    events = EventAccumulator(boards[0].log_dir)
    events.Reload()
    tags = events.Tags()
    scalars = [tag for tag in tags["scalars"] if tag.startswith(("asked/", "own/"))]
    assert {tag.split("/")[0] for tag in scalars} == {"asked", "own"}
    assert any("asked" in tag for tag in tags["tensors"])  # the table, as text
    with open(f"{boards[1].log_dir}/metrics.csv") as file:
        columns = next(csv.reader(file))
    assert set(scalars) <= set(columns)
    directory = tmp_path / "tb" / "version_0" / "asked"
    again = type(found).load(directory / "attributions.safetensors")
    torch.testing.assert_close(again.scores, found.scores, **CLOSE)
    assert (directory / "attributions.csv").exists()
    assert not (tmp_path / "tb" / "version_0" / "quiet").exists()


@pytest.mark.parametrize("layers", [None, ["body.0"]])
def test_the_run_tells_the_damping_of_every_parameter(layers):
    """Not only of the layers whose factors the fit collects: the damping of others would be far off."""

    class Normed(Net):
        def __init__(self):
            super().__init__()
            self.norm = torch.nn.LayerNorm(4)

        def forward(self, x):
            return super().forward(self.norm(x))

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), 1e-2)

    host, module = trainer(InfluenceCallback(every_n_steps=1, layers=layers)), Normed()
    host.fit(module, train())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", InfluenceWarning)
        found = host.influence(module, train(), queries(), method="auto")
    assert list(found.diagnostics.damping) == ["body.0", "body.3", "norm.weight", "norm.bias"]
    assert "which no step updated" not in found.diagnostics.damping_origin
    steps = host.global_step
    scale = host.callbacks[0].record.loss_scale
    for name, parameter in module.norm.named_parameters():
        state = host.optimizers[0].state[parameter]
        metric = float((state["exp_avg_sq"] / (1 - 0.999**steps)).sqrt().mean())
        expected = metric * (0.01 + 4 / (1e-2 * steps)) / scale
        assert found.diagnostics.damping[f"norm.{name}"] == pytest.approx(expected, rel=1e-3)
