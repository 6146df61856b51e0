"""The tables of the documentation say what the package does: coverage, methods, options, and names."""

import pkgutil
import re
import warnings
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule
from test_documentation import run_page
from torch import nn
from torch.nn import functional

import lightning_influence
from lightning_influence import InfluenceModule, errors, evaluation, register_layer
from lightning_influence.edits import directions, rules
from lightning_influence.methods import method as methods
from lightning_influence.model.layers import layer as layers
from lightning_influence.model.uses import Watch, differentiate_losses
from lightning_influence.results.loggers import name_pass, summary_metrics

DOCS = Path(__file__).parents[1] / "docs"
B, POSITIONS, WIDTH, WORDS = 6, 5, 8, 9


def read(page):
    return (DOCS / page).read_text("utf-8")


class Model(LightningModule):
    """A part to look at, and a covered head behind it."""

    def __init__(self, part, run):
        super().__init__()
        self.part, self.run, self.head = part, run, nn.Linear(WIDTH, 3)

    def outputs(self, x):
        return self.head(self.run(self.part, x))

    def training_step(self, batch, batch_idx):
        return functional.cross_entropy(self.outputs(batch[0]), batch[1])


class OwnLayer(nn.Linear):
    """A class that no rule is registered for."""


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x):
        return x * self.scale


class Frequencies(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH // 2 + 1, dtype=torch.cfloat))

    def forward(self, x):
        return torch.fft.irfft(torch.fft.rfft(x) * self.weight, n=WIDTH)


def channels(part, x):
    return part(x.transpose(1, 2)).mean(2)


def tokens(part, x):
    return part(x).mean(1)


def first_of_pair(part, x):
    return part(x)[0].mean(1)


def share_a_weight():
    part = nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False))
    part[1].weight = part[0].weight
    return part


def freeze(part):
    return part.requires_grad_(False)


# The beginning of each row of the table of coverage, and a model for it.
PARTS = {
    "`nn.Linear`": (lambda: nn.Linear(WIDTH, WIDTH), tokens),
    "`nn.Conv1d`": (
        lambda: nn.Conv1d(WIDTH, WIDTH, 3, groups=2, padding=1, padding_mode="circular"),
        channels,
    ),
    "a layer of your own": (lambda: OwnLayer(WIDTH, WIDTH), tokens),
    "transposed convolutions": (lambda: nn.ConvTranspose1d(WIDTH, WIDTH, 3), channels),
    "`nn.Embedding`": (lambda: nn.Embedding(WORDS, WIDTH), tokens),
    "norms": (lambda: nn.LayerNorm(WIDTH), tokens),
    "recurrent layers": (lambda: nn.LSTM(WIDTH, WIDTH, batch_first=True), first_of_pair),
    "`nn.MultiheadAttention`": (
        lambda: nn.MultiheadAttention(WIDTH, 2, batch_first=True),
        lambda part, x: part(x, x, x)[0].mean(1),
    ),
    "a weight that two modules share": (share_a_weight, tokens),
    "a weight that is also used outside": (
        lambda: nn.Linear(WIDTH, WIDTH),
        lambda part, x: functional.linear(part(x), part.weight).mean(1),
    ),
    "parametrized weights": (
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH)),
        tokens,
    ),
    "parameters used bare": (Scale, tokens),
    "complex parameters": (Frequencies, tokens),
    "frozen parameters": (lambda: freeze(nn.Linear(WIDTH, WIDTH)), tokens),
}


def make(name):
    make_part, run = PARTS[name]
    model = Model(make_part(), run)
    words = name == "`nn.Embedding`"
    x = torch.randint(WORDS, (B, POSITIONS)) if words else torch.randn(B, POSITIONS, WIDTH)
    return model, (x, torch.randint(3, (B,)))


def coverage_rows():
    table = read("coverage.md").split("| --- | --- | --- |\n")[1].split("\n\n")[0]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table.splitlines()]


def test_every_row_of_coverage_has_a_model():
    rows = [row[0] for row in coverage_rows()]
    assert len(rows) == len(PARTS)
    assert [next((name for name in PARTS if row.startswith(name)), row) for row in rows] == list(PARTS)


@pytest.mark.parametrize("name", PARTS)
def test_scores_cover_what_the_table_says(name, monkeypatch):
    monkeypatch.setattr(layers, "_RULES", dict(layers._RULES))
    if name == "a layer of your own":
        register_layer(OwnLayer)(type(layers._RULES[nn.Linear]))
    said = next(row[1] for row in coverage_rows() if row[0].startswith(name))
    model, batch = make(name)
    total = sum(p.numel() * (1 + p.is_complex()) for p in model.parameters())
    head = sum(p.numel() for p in model.head.parameters())
    module = InfluenceModule(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        answer = module.scores([batch], [batch], method="ekfac")
    covered = sum(answer.diagnostics.layers.values())
    assert covered == {"covered": total, "left out": head}[said]


@pytest.mark.parametrize("name", PARTS)
def test_uses_cover_what_the_table_says(name):
    said = next(row[1] for row in coverage_rows() if row[0].startswith(name))
    model, batch = make(name)
    watched = {name: p for name, p in model.named_parameters() if p.requires_grad}
    with Watch(watched, batch, B) as watch:
        losses = functional.cross_entropy(model.outputs(batch[0]), batch[1], reduction="none")
    found = differentiate_losses(watch, losses)
    assert not found.report.left_out
    assert (set(watched) == {name for name, _ in model.named_parameters()}) == (said == "covered")


def is_own(registered):
    """Whether the package itself has registered it, not a test of the same process."""
    return registered.__module__.startswith("lightning_influence.")


def test_every_method_and_option_is_on_its_page():
    page = read("methods.md")
    own = {name: kind for name, kind in methods._METHODS.items() if is_own(kind)}
    assert len(own) > 10
    for name, kind in own.items():
        assert f'"{name}"' in page, name
        for option in fields(kind.options_type):
            # max_parameters guards against dense matrices; the page of the reference has it.
            if option.name not in {"unused", "seed", "max_parameters", "damping"}:
                assert f"`{option.name}" in page or f"`{option.name}=" in page, (name, option.name)


def test_every_edit_method_and_rule_is_on_its_page():
    page = read("editing.md") + read("papers/generalized-influence.md")
    own = [name for name, found in directions._DIRECTIONS.items() if is_own(found.function)]
    assert len(own) > 3
    for name in own:
        assert f"`{name}`" in page or f'`"{name}"`' in page, name
    for name in (name for name, found in rules._RULES.items() if is_own(found)):
        family, _, source = name.rpartition("_")  # `highest_` with `outputs` or `gradients`
        assert f"`{name}`" in page or (family and f"`{family}_`" in page and f"`{source}`" in page), name


def logged_names(page, heading):
    section = read(page).split(f"## {heading}\n")[1].split("\n## ")[0]
    return set(re.findall(r"`([\w/<>]+)`", " ".join(re.findall(r"^\| (`.+?) \|", section, re.MULTILINE))))


@pytest.mark.slow
def test_names_logged_during_the_fit_are_on_the_page(tmp_path, monkeypatch):
    """Watch a real fit: these names are stable, and each is explained."""
    names = run_page(DOCS / "loggers.md", monkeypatch, tmp_path)
    own = {name for name in names["rows"][0] if name.startswith("influence/")}
    own = {re.sub(r"grad_norm/.+", "grad_norm/<layer>", name) for name in own}
    assert own == logged_names("loggers.md", "During the fit")
    answered = {re.sub(r"^seconds_.+", "seconds_<pass>", name) for name in summary_metrics(names["quietly"])}
    assert answered == logged_names("loggers.md", "After a question")
    assert answered.isdisjoint(name.removeprefix("influence/") for name in own)  # both are under `influence/`
    assert set(names["edit"].report.metrics()) == logged_names("loggers.md", "After an edit")


def test_passes_that_are_timed_are_on_the_page():
    """Their names are what progress bars show, in the form that every logger takes."""
    source = "".join(path.read_text("utf-8") for path in (DOCS.parent / "lightning_influence").rglob("*.py"))
    passes = {f"seconds_{name_pass(text)}" for text in re.findall(r'"(Influence: [^"{]+)"', source)}
    told = read("loggers.md").split("A pass is one of ")[1].split(";")[0]
    assert {f"seconds_{name}" for name in re.findall(r"`(\w+)`", told)} == passes
    assert len(passes) > 10


def test_reference_holds_every_public_name():
    text = "".join(path.read_text("utf-8") for path in (DOCS / "api").glob("*.md"))
    listed = set(re.findall(r"^::: lightning_influence\.(.+)$", text, re.MULTILINE))
    short = {name.rpartition(".")[2] for name in listed}
    assert set(lightning_influence.__all__) <= short
    assert set(errors.__all__) <= short
    assert set(evaluation.__all__) <= short
    for name in listed:  # a name that is not there would only fail when the site is built
        pkgutil.resolve_name(f"lightning_influence.{name}")  # imports modules that no other test has
