"""The command line asks what Python asks, of a LightningCLI's own configuration and checkpoint."""

import csv
import importlib
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch import Trainer, seed_everything

import lightning_influence
from lightning_influence import (
    Attributions,
    InfluenceCallback,
    InfluenceTrainer,
    ParameterEdit,
    SelfInfluence,
    Suspects,
    TrainingDynamics,
)

jsonargparse = pytest.importorskip("jsonargparse", reason="jsonargparse is not installed")
pytest.importorskip("jinja2", reason="jinja2 is not installed")

from cli_project import QUERIES, Classifier, LinkedCLI, Points  # noqa: E402
from lightning.pytorch.cli import LightningCLI  # noqa: E402

from lightning_influence.__main__ import COMMANDS, main  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*logging interval"),
    pytest.mark.filterwarnings("ignore:LightningCLI's args parameter"),
    pytest.mark.filterwarnings("ignore:.*fisher"),
]
WIDTH, EXAMPLES = 6, 40
BARE = ["--model_class=cli_project.Classifier", "--data_class=cli_project.Points"]
FUNCTIONS = {
    "influence": lightning_influence.influence,
    "self-influence": lightning_influence.self_influence,
    "dynamics": lightning_influence.training_dynamics,
    "suspects": lightning_influence.suspects,
    "forget": lightning_influence.forget,
    "relabel": lightning_influence.relabel,
}
GIVEN = {"trainer", "model", "train_dataloaders", "query_dataloaders", "datamodule", "validation", "labels"}


def write_config(folder, **more):
    config = {
        "seed_everything": 3,
        "model": {"width": WIDTH},
        "data": {"examples": EXAMPLES},
        "trainer": {
            "max_epochs": 2,
            "accelerator": "cpu",
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "logger": {
                "class_path": "lightning.pytorch.loggers.CSVLogger",
                "init_args": {"save_dir": "logs"},
            },
        },
    }
    config["trainer"] |= more.pop("trainer", {})
    path = Path(folder) / "mine.yaml"
    path.write_text(yaml.safe_dump(config | more))
    return str(path)


class Run:
    """A fit's folder: the configuration that LightningCLI saved there, and the checkpoint."""

    def __init__(self, folder):
        logs = max((folder / "logs" / "lightning_logs").iterdir(), key=lambda path: path.stat().st_mtime)
        (self.checkpoint,) = map(str, logs.glob("checkpoints/*.ckpt"))
        self.config = str(logs / "config.yaml")
        self.common = [f"--config={self.config}", *BARE, "--log=false"]
        self.asked = [*self.common, f"--ckpt_path={self.checkpoint}"]


@pytest.fixture(scope="module")
def by_lightning(tmp_path_factory):
    """A run of the user's own LightningCLI, which knows nothing of this package."""
    folder = tmp_path_factory.mktemp("by_lightning")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        LightningCLI(Classifier, Points, args=["fit", f"--config={write_config(folder)}"])
    return Run(folder)


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    """A run of the command ``fit``, with the same configuration and training dynamics."""
    folder = tmp_path_factory.mktemp("watched")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert (
            main(["fit", f"--config={write_config(folder)}", *BARE, "--influence_callback.dynamics=true"])
            == 0
        )
    return Run(folder)


@pytest.fixture(autouse=True)
def _own_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))


def ask_in_python(function, run, *args, with_data=True, **options):
    """The same question in Python, of a fresh module that the checkpoint is loaded into."""
    seed_everything(3)
    trainer = InfluenceTrainer(accelerator="cpu", logger=False, enable_progress_bar=False)
    if with_data:
        options |= {"model": Classifier(width=WIDTH), "datamodule": Points(examples=EXAMPLES)}
    return function(trainer, *args, ckpt_path=run.checkpoint, log=False, **options)


def read_table(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def read_help(command, capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        main([command, *arguments])
    return stop.value.code, capsys.readouterr()


def test_influence_is_what_python_answers(by_lightning, capsys):
    options = ["--method=kfac", "--damping=0.1", "--layers=[net.2]", "--k=3", "--output=out"]
    assert main(["influence", *by_lightning.asked, *options]) == 0
    expected = ask_in_python(
        lightning_influence.influence, by_lightning, method="kfac", damping=0.1, layers=["net.2"]
    )
    found = Attributions.load("out/attributions.safetensors")
    assert found.scores.shape == (QUERIES, EXAMPLES)
    torch.testing.assert_close(found.scores, expected.scores, rtol=0, atol=0)
    rows = read_table("out/attributions.csv")
    assert [(row["end"], int(row["query"]), int(row["train"])) for row in rows] == [
        (end, query, index)
        for end, ranking in (("top", expected.top(3)), ("bottom", expected.bottom(3)))
        for query, indices in enumerate(ranking.indices.tolist())
        for index in indices
    ]
    assert "train-" in Path("out/report.html").read_text()
    said = capsys.readouterr().out
    assert "Strongest proponents" in said
    assert "attributions.csv, attributions.safetensors, config.yaml, report.html" in said


def test_the_saved_configuration_asks_the_same_again(by_lightning):
    assert main(["influence", *by_lightning.asked, "--method=kfac", "--damping=0.1", "--top_k=4"]) == 0
    first = Path("influence_results/influence")
    assert main(["influence", f"--config={first / 'config.yaml'}", "--output=again"]) == 0
    one, two = (Attributions.load(folder / "attributions.safetensors") for folder in (first, Path("again")))
    assert one.stored == 4
    assert torch.equal(one.top_scores, two.top_scores)
    assert one.top_indices.equal(two.top_indices)


def test_callables_several_checkpoints_and_options_of_one_method(by_lightning):
    options = ["--measurement=cli_project.squared_margin", f"--ckpt_path+={by_lightning.checkpoint}"]
    options += ["--method=cg", "--max_steps=2", "--preconditioner=none", "--damping=0.1", "--output=out"]
    assert main(["influence", *by_lightning.common, *options]) == 0
    found = Attributions.load("out/attributions.safetensors")
    assert found.diagnostics.measurement == "squared_margin"

    from cli_project import squared_margin

    expected = ask_in_python(
        lightning_influence.influence,
        by_lightning,
        method="cg",
        max_steps=2,
        preconditioner="none",
        damping=0.1,
        measurement=squared_margin,
    )
    torch.testing.assert_close(found.scores, expected.scores)


def test_self_influence_is_what_python_answers(watched):
    assert main(["self-influence", *watched.asked]) == 0
    expected = ask_in_python(lightning_influence.self_influence, watched)
    folder = Path("influence_results/self_influence")
    found = SelfInfluence.load(folder / "self_influence.safetensors")
    torch.testing.assert_close(found.scores, expected.scores, rtol=0, atol=0)
    rows = read_table(folder / "self_influence.csv")
    assert len(rows) == EXAMPLES
    assert [int(row["train"]) for row in rows] == expected.top(EXAMPLES).indices[0].tolist()
    assert [float(row["score"]) for row in rows] == expected.top(EXAMPLES).scores[0].tolist()


def test_dynamics_are_those_that_fit_kept(watched):
    assert main(["dynamics", *watched.asked]) == 0
    expected = ask_in_python(lightning_influence.training_dynamics, watched, with_data=False)
    folder = Path("influence_results/training_dynamics")
    found = TrainingDynamics.load(folder / "training_dynamics.safetensors")
    assert found.epochs == 2
    assert torch.equal(found.loss_mean, expected.loss_mean)
    rows = {int(row["train"]): row for row in read_table(folder / "training_dynamics.csv")}
    for index, mean, learned in zip(
        expected.train_indices.tolist(),
        expected.loss_mean.tolist(),
        expected.first_learned.tolist(),
        strict=True,
    ):
        assert float(rows[index]["loss_mean"]) == mean
        assert int(rows[index]["first_learned"]) == learned
    assert (folder / "report.html").exists()


def test_suspects_are_what_python_answers(watched):
    assert main(["suspects", *watched.asked, "--method=kfac"]) == 0
    expected = ask_in_python(lightning_influence.suspects, watched, method="kfac")
    folder = Path("influence_results/suspects")
    assert torch.equal(Suspects.load(folder / "suspects.safetensors").scores, expected.scores)
    rows = read_table(folder / "suspects.csv")
    order = expected.top(EXAMPLES).indices[0]
    assert [int(row["train"]) for row in rows] == order.tolist()
    assert [row["reasons"] for row in rows] == ["; ".join(reasons) for reasons in expected.reasons(order)]


@pytest.mark.parametrize("command", ["forget", "relabel"])
def test_edits_are_those_of_python_and_the_checkpoint_has_them(watched, command):
    options = ["--examples=[1, 2, 5]", "--ratio=0.2", "--step=theory"]
    options += ["--new_targets=[0, 1, 0]"] if command == "relabel" else []
    assert main([command, *watched.asked, *options]) == 0
    targets = [[0, 1, 0]] if command == "relabel" else []
    expected = ask_in_python(FUNCTIONS[command], watched, [1, 2, 5], *targets, ratio=0.2, step="theory")
    folder = Path("influence_results") / command
    plain, edited = (
        Classifier.load_from_checkpoint(path) for path in (watched.checkpoint, folder / "edited.ckpt")
    )
    edit = ParameterEdit.load(folder / "edit.safetensors", edited)
    assert edit.applied
    expected.apply()
    for name, value in expected.model.state_dict().items():
        assert torch.equal(edited.state_dict()[name], value)
    assert not all(torch.equal(a, b) for a, b in zip(plain.parameters(), edited.parameters(), strict=True))
    rows = {row["name"]: float(row["value"]) for row in read_table(folder / "edit.csv")}
    metrics = {name: float(value) for name, value in expected.report.metrics().items()}
    assert rows.pop("seconds") > 0
    assert metrics.pop("seconds") > 0
    assert rows == metrics
    assert (folder / "report.html").exists()


def test_report_shows_results_that_were_written_before(watched):
    assert main(["self-influence", *watched.asked]) == 0
    results = Path("influence_results/self_influence")
    shown = (results / "report.html").read_text()
    (results / "report.html").unlink()
    assert main(["report", f"--config={watched.config}", *BARE, f"--results={results}"]) == 0
    assert (results / "report.html").read_text() == shown
    file = results / "self_influence.safetensors"
    options = ["--k=2", "--title=Two", "--output=two.html"]
    assert main(["report", f"--config={watched.config}", *BARE, f"--results={file}", *options]) == 0
    two = Path("two.html").read_text()
    assert "<title>Two</title>" in two
    assert len(two) < len(shown)


def test_fit_is_lightnings_fit_and_keeps_what_questions_need(by_lightning, watched):
    plain, seen = (torch.load(run.checkpoint, weights_only=True) for run in (by_lightning, watched))
    for name, value in plain["state_dict"].items():
        assert torch.equal(seen["state_dict"][name], value)
    assert not any("Influence" in key for key in plain["callbacks"])
    assert sum("Influence" in key for key in seen["callbacks"]) == 1


def test_questions_log_to_the_trainers_loggers_unless_told_not_to(watched):
    arguments = [argument for argument in watched.asked if argument != "--log=false"]
    assert main(["self-influence", *arguments, "--method=kfac", "--name=mine"]) == 0
    (metrics,) = Path("logs/lightning_logs").glob("*/metrics.csv")
    assert "mine/score_max" in metrics.read_text()
    assert Path("influence_results/mine/self_influence.csv").exists()
    main(["self-influence", *watched.asked, "--method=kfac"])
    assert len(list(Path("logs/lightning_logs").iterdir())) == 1


@pytest.mark.parametrize("command", FUNCTIONS)
def test_names_and_defaults_are_those_of_python(command, by_lightning, capsys):
    needed = ["--examples=[1]"] if command in {"forget", "relabel"} else []
    needed += ["--new_targets=0"] if command == "relabel" else []
    code, said = read_help(command, capsys, *by_lightning.common[:-1], *needed, "--print_config")
    assert code == 0
    printed = yaml.safe_load(said.out)
    parameters = inspect.signature(FUNCTIONS[command]).parameters
    expected = {
        name: parameter.default
        for name, parameter in parameters.items()
        if parameter.kind is not parameter.VAR_KEYWORD and name not in GIVEN
    }
    assert expected.keys() <= printed.keys()
    for name, default in expected.items():
        assert name in {"examples", "new_targets"} or printed[name] == default
    if command in {"forget", "relabel"}:
        assert printed["ratio"] == 0.05
        assert printed["rule"] == "gain"
    assert printed["model"] == {"features": 4, "width": WIDTH, "lr": 0.1}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "arguments are required: command"),
        (["explain"], "invalid choice: 'explain'"),
        (["influence", "--methid=ekfac"], "--methid"),
        (["influence", "--damping=much"], "much"),
        (["influence", "--config=nowhere.yaml"], "nowhere.yaml"),
        (["influence", "--model_class=cli_project.Nothing"], "--model_class=cli_project.Nothing cannot be"),
        (["influence", "--model_class=cli_project.Points"], "is no subclass of LightningModule"),
        (["forget"], "examples"),
        (["report"], "results"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_misuse_is_said_and_ends_with_two(arguments, said, by_lightning, capsys):
    arguments = [*arguments[:1], *by_lightning.common[:-1], *arguments[1:]] if arguments[1:] else arguments
    if arguments in (["forget"], ["report"]):
        arguments = [*arguments, *by_lightning.common[:-1]]
    try:
        code = main(arguments)
    except SystemExit as stop:
        code = stop.code
    error = capsys.readouterr().err
    assert code == 2
    assert said in error
    assert "Traceback" not in error


def test_configurations_that_name_no_class_are_refused_with_what_to_do(by_lightning, capsys):
    assert main(["influence", f"--config={by_lightning.config}"]) == 2
    assert "Name the class: --model_class module.Class" in capsys.readouterr().err
    Path("main.yaml").write_text("model: {class_path: __main__.Classifier}\n")
    assert main(["influence", "--config=main.yaml"]) == 2
    assert "Replace __main__ there" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "options", "said"),
    [
        ("influence", ["--ckpt_path=nowhere.ckpt"], "There is no checkpoint 'nowhere.ckpt'"),
        ("fit", ["--ckpt_path=nowhere.ckpt"], "There is no checkpoint 'nowhere.ckpt'"),
        ("influence", ["--method=ekfax"], "Got method='ekfax'; accepted are"),
        ("influence", ["--method=kfac", "--k=1000"], "k is 1 to 40"),
        ("self-influence", ["--damping=-1"], "Got damping=-1"),
        ("dynamics", [], "There are no training dynamics"),
        ("suspects", [], "There are no training dynamics"),
        ("forget", ["--examples=[900]"], "900 are not among the 40 training examples"),
        ("relabel", ["--examples=[1]", "--new_targets=0", "--ratio=2"], "ratio"),
        ("report", ["--results=."], "holds 0 files of results"),
        ("report", ["--results=mine.safetensors"], "mine.safetensors"),
    ],
)
def test_errors_are_sentences_and_end_with_one(command, options, said, by_lightning, capsys):
    common = by_lightning.common[:-1]
    needs_checkpoint = command != "fit" and command != "report" and "--ckpt_path=nowhere.ckpt" not in options
    more = [f"--ckpt_path={by_lightning.checkpoint}"] if needs_checkpoint else []
    assert main([command, *common, *more, *options]) == 1
    error = capsys.readouterr().err
    assert f"lightning-influence {command}: error: " in error
    assert said in error
    assert "Traceback" not in error
    assert not Path("influence_results").exists()


def test_errors_of_the_users_code_keep_their_traceback(by_lightning):
    arguments = [*by_lightning.asked, "--data_class=cli_project.BrokenPoints"]
    with pytest.raises(ValueError, match="the user's own mistake"):
        main(["influence", *arguments])


def test_a_question_without_checkpoint_warns(by_lightning):
    with pytest.warns(lightning_influence.InfluenceWarning, match="Without --ckpt_path"):
        assert main(["self-influence", *by_lightning.common, "--method=identity"]) == 0


def test_without_jsonargparse_the_extra_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "jsonargparse", None)
    assert main(["influence"]) == 1
    assert "pip install 'lightning-influence[cli]'" in capsys.readouterr().err


def test_without_jinja_the_rest_is_written(watched, monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    assert main(["self-influence", *watched.asked, "--method=kfac"]) == 0
    names = {path.name for path in Path("influence_results/self_influence").iterdir()}
    assert names == {"config.yaml", "self_influence.csv", "self_influence.safetensors"}


def test_callback_and_trainer_can_be_configured_by_class_path(capsys):
    callback = {"class_path": "lightning_influence.InfluenceCallback", "init_args": {"dynamics": True}}
    models = {
        "model": {"class_path": "cli_project.Classifier", "init_args": {"width": WIDTH}},
        "data": {"class_path": "cli_project.Points"},
    }
    config = write_config(".", trainer={"callbacks": [callback]}, **models)
    # In Lightning's own command line, whose Trainer is a class given in Python.
    cli = LightningCLI(trainer_class=InfluenceTrainer, run=False, args=[f"--config={config}"])
    assert isinstance(cli.trainer, InfluenceTrainer)
    assert [c._settings.dynamics for c in cli.trainer.callbacks if isinstance(c, InfluenceCallback)] == [True]
    # In a parser that takes the Trainer by class path as well.
    parser = jsonargparse.ArgumentParser()
    parser.add_subclass_arguments(Trainer, "trainer")
    settings = {"max_epochs": 1, "logger": False, "accelerator": "cpu", "callbacks": [callback]}
    path = {"class_path": "lightning_influence.InfluenceTrainer", "init_args": settings}
    trainer = parser.instantiate_classes(parser.parse_object({"trainer": path})).trainer
    assert isinstance(trainer, InfluenceTrainer)
    trainer.fit(Classifier(), datamodule=Points())
    assert trainer.training_dynamics().epochs == 1
    # In this command line, which adds no second callback.
    assert main(["fit", f"--config={config}"]) == 0
    saved = torch.load(Run(Path.cwd()).checkpoint, weights_only=True)
    assert sum("Influence" in key for key in saved["callbacks"]) == 1
    assert main(["fit", f"--config={config}", "--influence_callback.seed=3"]) == 2
    assert "trainer.callbacks has an InfluenceCallback" in capsys.readouterr().err


def test_links_and_arguments_of_the_users_own_cli_hold():
    Path("linked.yaml").write_text(Path(write_config(".")).read_text() + "note: mine\n")
    config = yaml.safe_load(Path("linked.yaml").read_text())
    config["data"]["features"] = 5
    Path("linked.yaml").write_text(yaml.safe_dump(config))
    LinkedCLI(Classifier, Points, args=["fit", "--config=linked.yaml"])
    run = Run(Path.cwd())
    assert "features" not in yaml.safe_load(Path(run.config).read_text())["model"]
    arguments = [*run.asked, "--cli_class=cli_project.LinkedCLI", "--method=kfac"]
    assert main(["influence", *arguments]) == 0
    file = Path("influence_results/influence/attributions.safetensors")
    assert Attributions.load(file).scores.shape == (QUERIES, EXAMPLES)


# What `python -m lightning_influence --help` runs, after a look at what the package alone has imported.
PROGRAM = """
import runpy, sys
import lightning_influence
print([m for m in sys.modules if "jsonargparse" in m or "command_line" in m])
sys.argv = ["lightning-influence", "--help"]
runpy.run_module("lightning_influence", run_name="__main__", alter_sys=True)
"""


@pytest.mark.slow
def test_python_m_is_the_program_of_the_script_which_the_package_does_not_import():
    settings = (Path(__file__).parents[2] / "pyproject.toml").read_text("utf-8")
    module, name = re.search(r'^lightning-influence = "(.+):(.+)"$', settings, re.M).groups()
    assert getattr(importlib.import_module(module), name) is main
    paths = os.pathsep.join(filter(None, [str(Path(lightning_influence.__file__).parents[1]), *sys.path]))
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=True,
    )
    imported, _, shown = done.stdout.partition("\n")
    assert imported.strip() == "[]"
    for name, command in COMMANDS.items():
        assert f"  {name:14}  {command.summary}" in shown
