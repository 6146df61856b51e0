"""Every private attribute of Lightning that the package relies on, and the contexts that put them back."""

import signal
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from lightning.pytorch.callbacks import ModelCheckpoint, RichProgressBar, TQDMProgressBar
from lightning.pytorch.overrides.distributed import UnrepeatedDistributedSamplerWrapper
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch import nn
from torch.utils.data import DataLoader, SubsetRandomSampler, TensorDataset

from lightning_influence.running.host.attributes import combined_mode, defines, preserved, wrapped_sampler
from lightning_influence.running.host.module import borrowed_module, unwrap_compiled
from lightning_influence.running.host.trainer import (
    CHECKPOINT_CONNECTOR,
    LOGGER_CONNECTOR,
    RUN,
    SIGNAL_CONNECTOR,
    STRATEGY,
    borrowed_trainer,
    check_strategy,
    check_trainer,
    make_labelled_bar,
    resolve_checkpoint,
)
from lightning_influence.support.errors import UnsupportedTrainerError

# Lightning's own use of torch's pytrees.
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")


class Net(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2))

    def training_step(self, batch, batch_idx):
        loss = nn.functional.cross_entropy(self.body(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def make_loader(n=12):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, 3, generator=generator)
    return DataLoader(TensorDataset(x, torch.arange(n) % 2), batch_size=4)


def make_trainer(tmp_path, **options):
    defaults = {
        "max_epochs": 1,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_model_summary": False,
        "enable_progress_bar": False,
        "default_root_dir": tmp_path,
    }
    return pl.Trainer(**{**defaults, **options})


RELIED_ON = [
    ("trainer", *RUN),
    ("trainer.strategy", *STRATEGY),
    ("trainer._data_connector", "_datahook_selector"),
    ("trainer._logger_connector", *LOGGER_CONNECTOR),
    ("trainer._checkpoint_connector", *CHECKPOINT_CONNECTOR),
    ("trainer._signal_connector", *SIGNAL_CONNECTOR),
    ("trainer.fit_loop", "_combined_loader", "_data_source", "_data_fetcher"),
    ("trainer.fit_loop._data_source", "instance"),
    ("trainer.fit_loop.epoch_loop.val_loop", "_combined_loader", "_data_source", "_data_fetcher"),
    ("trainer.validate_loop", "_combined_loader", "_data_source", "_data_fetcher"),
    ("trainer.test_loop", "_combined_loader", "_data_source", "_data_fetcher"),
    ("trainer.predict_loop", "_combined_loader", "_data_source", "_data_fetcher", "inference_mode"),
    ("module", "_trainer", "_current_fx_name", "_device", "_dtype"),
    ("RichProgressBar()", "_console_kwargs", "progress"),
    ("CombinedLoader([[1]], 'sequential')", "_mode"),
]


@pytest.mark.parametrize(("owner", "names"), [(owner, names) for owner, *names in RELIED_ON])
def test_lightning_still_has_the_attributes(tmp_path, owner, names):
    scope = {
        "trainer": make_trainer(tmp_path),
        "module": Net(),
        "RichProgressBar": RichProgressBar,
        "CombinedLoader": CombinedLoader,
    }
    missing = set(names) - set(vars(eval(owner, scope)))
    assert not missing, (
        f"Lightning {pl.__version__} has moved {owner}.{missing}: adapt lightning_influence/host"
    )


def test_lightning_still_has_the_methods(tmp_path):
    trainer = make_trainer(tmp_path)
    assert callable(trainer._checkpoint_connector._parse_ckpt_path)
    assert trainer._active_loop is None
    trainer.training = True
    assert trainer._active_loop is trainer.fit_loop


def test_preserved_puts_back_after_an_error():
    owner = SimpleNamespace(a=[1], b=2)
    kept = owner.a

    def use():
        with preserved(owner, "a"):
            owner.a, owner.b = None, 3
            raise KeyError

    with pytest.raises(KeyError):
        use()
    assert owner.a is kept
    assert owner.b == 3


def test_preserved_names_what_is_missing():
    with (
        pytest.raises(
            UnsupportedTrainerError, match=r"SimpleNamespace has no attribute gone .*lightning>=2\.4"
        ),
        preserved(SimpleNamespace(), "gone"),
    ):
        pass


def test_spawning_strategies_are_refused(tmp_path):
    trainer = make_trainer(tmp_path, strategy="ddp_spawn", devices=2)
    with pytest.raises(UnsupportedTrainerError, match=r'DDPStrategy starts .* spawn or fork.*strategy="ddp"'):
        check_trainer(trainer)


@pytest.mark.parametrize("kind", [FSDPStrategy, DeepSpeedStrategy])
def test_strategies_that_shard_in_flat_pieces_are_refused(kind):
    strategy = kind.__new__(kind)
    strategy._launcher = None
    text = f"{kind.__name__} splits the parameters .* accepted are .*ModelParallelStrategy"
    with pytest.raises(UnsupportedTrainerError, match=text):
        check_trainer(SimpleNamespace(strategy=strategy))


@pytest.mark.parametrize(("size", "refused"), [(2, True), ("auto", True), (1, False)])
def test_only_data_parallel_shards_are_accepted(size, refused):
    strategy = ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=size)
    strategy.parallel_devices = [torch.device("cpu")] * 2
    trainer = SimpleNamespace(strategy=strategy)
    if not refused:
        check_strategy(trainer)
        return
    with pytest.raises(UnsupportedTrainerError, match=r"tensor_parallel_size=2 .* tensor_parallel_size=1"):
        check_strategy(trainer)


class Checker(pl.Callback):
    def __init__(self):
        self.errors = {}

    def check(self, trainer, name):
        try:
            check_trainer(trainer)
            self.errors[name] = None
        except UnsupportedTrainerError as error:
            self.errors[name] = str(error)

    def on_train_batch_start(self, trainer, *_):
        self.check(trainer, "train")

    def on_validation_batch_start(self, trainer, *_):
        self.check(trainer, "validation")

    def on_fit_end(self, trainer, _):
        self.check(trainer, "end")


def test_a_running_trainer_is_refused_until_fit_ends(tmp_path):
    checker = Checker()
    module = Net()
    module.validation_step = lambda batch, batch_idx: None
    make_trainer(tmp_path, callbacks=[checker]).fit(module, make_loader(), make_loader())
    assert "in the middle of fit()" in checker.errors["train"]
    assert "in the middle of fit()" in checker.errors["validation"]
    assert checker.errors["end"] is None


def test_inference_mode_is_refused(tmp_path):
    trainer = make_trainer(tmp_path)
    check_trainer(trainer)
    with torch.inference_mode(), pytest.raises(UnsupportedTrainerError, match=r"torch\.inference_mode"):
        check_trainer(trainer)


def test_checkpoint_keywords_become_paths(tmp_path):
    saver = ModelCheckpoint(dirpath=tmp_path, filename="best-one", save_last=True)
    trainer = make_trainer(tmp_path, callbacks=[saver], enable_checkpointing=True)
    trainer.fit(Net(), make_loader())
    assert resolve_checkpoint(trainer, "best") == str(tmp_path / "best-one.ckpt")
    assert resolve_checkpoint(trainer, "last") == str(tmp_path / "last.ckpt")
    assert resolve_checkpoint(trainer, "some/path.ckpt") == "some/path.ckpt"


@pytest.mark.filterwarnings("ignore:.*there is no last checkpoint")
def test_a_keyword_without_a_checkpoint_is_an_error(tmp_path):
    trainer = make_trainer(tmp_path)
    with pytest.raises(ValueError, match="'last' names no checkpoint"):
        resolve_checkpoint(trainer, "last")
    with pytest.raises(ValueError, match="ModelCheckpoint"):
        resolve_checkpoint(trainer, "best")


def test_compiled_modules_are_unwrapped_without_being_changed():
    module = Net()
    compiled = torch.compile(module)
    before = set(vars(module))
    assert unwrap_compiled(compiled) is module
    assert unwrap_compiled(module) is module
    assert set(vars(module)) == before


def test_other_models_are_refused():
    with pytest.raises(TypeError, match=r"Expected a LightningModule of .* got Linear\.$"):
        unwrap_compiled(nn.Linear(1, 1))
    foreign = type("Foreign", (nn.Module,), {"__module__": "pytorch_lightning.core"})
    with pytest.raises(TypeError, match=r"got Foreign\.$"):
        unwrap_compiled(foreign())


@pytest.mark.parametrize("kind", [RichProgressBar, TQDMProgressBar])
def test_the_bar_is_of_the_users_kind_and_labelled(tmp_path, kind):
    trainer = make_trainer(tmp_path, callbacks=[kind(refresh_rate=7)], enable_progress_bar=True)
    bar = make_labelled_bar(trainer)
    assert isinstance(bar, kind)
    assert bar.refresh_rate == 7
    bar.label = "Scoring"
    assert bar.predict_description == "Scoring"
    assert trainer.progress_bar_callback.predict_description == "Predicting"


def test_the_rich_bar_writes_where_the_users_does(tmp_path):
    user = RichProgressBar(console_kwargs={"stderr": True})
    trainer = make_trainer(tmp_path, callbacks=[user], enable_progress_bar=True)
    assert make_labelled_bar(trainer)._console_kwargs == {"stderr": True}


def test_no_bar_where_the_user_shows_none(tmp_path):
    assert make_labelled_bar(make_trainer(tmp_path)) is None
    quiet = make_trainer(tmp_path, callbacks=[TQDMProgressBar(refresh_rate=0)], enable_progress_bar=True)
    assert make_labelled_bar(quiet) is None


@pytest.mark.parametrize("wrapper", [DistributedSamplerWrapper, UnrepeatedDistributedSamplerWrapper])
def test_the_users_sampler_is_found_inside_lightnings(wrapper):
    sampler = SubsetRandomSampler([3, 1])
    assert wrapped_sampler(wrapper(sampler, num_replicas=2, rank=0)) is sampler
    assert wrapped_sampler(sampler) is None


def test_combined_mode():
    assert combined_mode(CombinedLoader([[1]], "max_size")) == "max_size"


def test_defines():
    assert defines(Net(), "training_step")
    assert not defines(Net(), "setup")
    assert not defines(pl.LightningDataModule(), "teardown")


def module_state(module):
    return {
        "modes": {name: m.training for name, m in module.named_modules()},
        "requires_grad": {name: p.requires_grad for name, p in module.named_parameters()},
        "grads": {name: id(p.grad) for name, p in module.named_parameters()},
        "dtypes": {name: t.dtype for name, t in module.state_dict().items()},
        "vars": {name: id(value) for name, value in vars(module).items()},
    }


@pytest.mark.parametrize("fail", [False, True])
def test_borrowed_module_is_put_back(fail):
    module = Net()
    module.train()
    module.body[1].eval()  # a frozen BatchNorm in a training model
    module.body[3].requires_grad_(False)
    module.body[0].weight.grad = torch.ones(4, 3)
    module.log = own = lambda *args, **kwargs: None
    weights = {name: t.clone() for name, t in module.state_dict().items()}
    before = module_state(module)

    def use():
        with borrowed_module(module):
            assert not any(m.training for m in module.modules())
            assert module.log is not own
            assert module.log("a", 1) is None
            assert module.log_dict({"a": 1}) is None
            module.body(torch.randn(2, 3)).sum().backward()
            module.requires_grad_(True)
            module.body.train()
            module.double()
            if fail:
                raise OSError

    if fail:
        with pytest.raises(OSError):  # noqa: PT011
            use()
    else:
        use()
    assert module_state(module) == before
    assert module.log is own
    assert torch.equal(module.body[0].weight.grad, torch.ones(4, 3))
    assert all(torch.equal(t, weights[name]) for name, t in module.state_dict().items())


def test_modules_inside_are_muted_too():
    outer = Net()
    outer.inner = Net()
    with borrowed_module(outer):
        assert outer.inner.log("x", 1.0) is None
    assert "log" not in vars(outer.inner)


def test_the_interrupt_handler_comes_back(tmp_path):
    before = signal.getsignal(signal.SIGINT)
    with borrowed_trainer(make_trainer(tmp_path), []):
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    assert signal.getsignal(signal.SIGINT) is before
