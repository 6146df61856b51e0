"""Explaining what a language model says by the sentences that it was trained on.

A small recurrent language model reads sentences about who lives where. Of some people it never reads "NAME
lives in", and one of the sentences about them names another city: a rumour. Asked to go on from "NAME lives
in", it answers with one city, and the training sentences behind that answer are looked for. Nothing is
downloaded: the sentences are generated.

    python examples/explain_text.py [--output docs/images/text.png] [--epochs 40]
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from _drawing import read_options
from lightning.pytorch import LightningModule, seed_everything
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_influence import Attributions, InfluenceCallback, InfluenceTrainer

DEFAULT = Path(__file__).parents[1] / "docs" / "images" / "text.png"
# fmt: off
NAMES = (
    "ada", "bela", "cleo", "dora", "emil", "fritz", "gerd", "hanna",
    "ilse", "jonas", "karla", "lena", "mats", "nele", "otto", "paula",
    "quirin", "rosa", "sven", "tilda", "ulla", "vera", "wim", "yara",
)
# fmt: on
CITIES = ("bergen", "cork", "delft", "evora", "graz", "lyon", "porto", "turin")
TEMPLATES = (
    "{name} lives in {city}",
    "{name} works in {city}",
    "{name} votes in {city}",
    "{name} has a house in {city}",
    "{name} is at home in {city}",
)
RUMOURS = 6  # about so many people, the first ones, it has to be concluded where they live
IGNORED = -100  # positions without a target


class Sentence(NamedTuple):
    """A training sentence: its text, whom it is about, and whether it is a rumour."""

    text: str
    name: str
    city: str
    is_rumour: bool


def write_sentences() -> list[Sentence]:
    """Five sentences about everybody; four about the first people, one of which contradicts the others."""
    generator = torch.Generator().manual_seed(0)
    sentences = []
    for number, name in enumerate(NAMES):
        home, rumoured = torch.randperm(len(CITIES), generator=generator)[:2].tolist()
        for place, template in enumerate(TEMPLATES):
            if number < RUMOURS and place == 0:
                continue
            is_rumour = number < RUMOURS and place == 3
            city = CITIES[rumoured if is_rumour else home]
            sentences.append(Sentence(template.format(name=name, city=city), name, city, is_rumour))
    return sentences


class Vocabulary:
    """Numbers for words; 0 pads."""

    def __init__(self, sentences: list[Sentence]) -> None:
        words = sorted({word for sentence in sentences for word in sentence.text.split()})
        self.numbers = {word: number for number, word in enumerate(words, start=1)}
        self.size = len(words) + 1
        self.length = max(len(sentence.text.split()) for sentence in sentences)

    def encode(self, text: str) -> Tensor:
        """Numbers of a text's words, padded to the longest sentence."""
        numbers = [self.numbers[word] for word in text.split()]
        return torch.tensor(numbers + [0] * (self.length - len(numbers)))


class LanguageModel(LightningModule):
    """Predicts each next word from those before it."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(size, 24)
        self.recurrent = nn.GRU(24, 48, batch_first=True)
        self.head = nn.Linear(48, size)

    def forward(self, words: Tensor) -> Tensor:
        """Logits of the word after each position, ``(B, T, size)``."""
        logits: Tensor = self.head(self.recurrent(self.embedding(words))[0])
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """The mean cross-entropy of the words that there are."""
        words, targets = batch
        return nn.functional.cross_entropy(self(words).flatten(0, 1), targets.flatten(), ignore_index=IGNORED)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW."""
        return torch.optim.AdamW(self.parameters(), lr=1e-2, weight_decay=1e-2)


def shift(words: Tensor, *, last_only: bool = False) -> tuple[Tensor, Tensor]:
    """Inputs and targets of texts: every next word, or the last word alone."""
    inputs, targets = words[:, :-1], words[:, 1:].clone()
    targets[targets == 0] = IGNORED
    if last_only:
        ends = (targets != IGNORED).sum(1) - 1
        rows = torch.arange(len(words))
        last = targets[rows, ends].clone()
        targets.fill_(IGNORED)
        targets[rows, ends] = last
    return inputs, targets


def train(sentences: list[Sentence], vocabulary: Vocabulary, epochs: int) -> InfluenceTrainer:
    """Train as any language model is trained."""
    seed_everything(0, verbose=False)
    trainer = InfluenceTrainer(
        accelerator="cpu",
        max_epochs=epochs,
        callbacks=[InfluenceCallback()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    words = torch.stack([vocabulary.encode(sentence.text) for sentence in sentences])
    trainer.fit(
        LanguageModel(vocabulary.size), DataLoader(TensorDataset(*shift(words)), batch_size=16, shuffle=True)
    )
    return trainer


def complete(model: nn.Module, vocabulary: Vocabulary, prompt: str) -> tuple[str, float]:
    """The city that the model finds most likely after a prompt, and its probability."""
    end = len(prompt.split()) - 1
    with torch.no_grad():
        chances = model(vocabulary.encode(prompt)[None])[0, end].softmax(0)
    best = max(CITIES, key=lambda city: float(chances[vocabulary.numbers[city]]))
    return best, float(chances[vocabulary.numbers[best]])


def explain(
    trainer: InfluenceTrainer, vocabulary: Vocabulary, answers: list[str], method: str = "auto"
) -> Attributions:
    """Ask which training sentences are behind the last words of the model's own answers."""
    inputs, targets = shift(torch.stack([vocabulary.encode(text) for text in answers]), last_only=True)
    queries = DataLoader(TensorDataset(inputs, targets), batch_size=len(answers))
    return trainer.influence(query_dataloaders=queries, method=method)


def draw(attributions: Attributions, sentences: list[Sentence], headings: list[str], k: int = 4) -> Figure:
    """Draw both ends of each answer's ranking as bars beside the sentences."""
    figure = Figure(figsize=(10, 1.1 + 1.9 * ((len(headings) + 1) // 2)), layout="constrained")
    panels = figure.subplots((len(headings) + 1) // 2, 2, squeeze=False).flat
    ends = attributions.top(k), attributions.bottom(k)
    for row, (axes, heading) in enumerate(zip(panels, headings, strict=False)):
        pairs = [
            *zip(ends[0].indices[row].tolist(), ends[0].scores[row].tolist(), strict=True),
            *reversed(list(zip(ends[1].indices[row].tolist(), ends[1].scores[row].tolist(), strict=True))),
        ]
        texts = [sentences[index].text for index, _ in pairs]
        values = [score for _, score in pairs]
        colours = ["tab:blue" if value > 0 else "tab:orange" for value in values]
        axes.barh(range(len(values)), values, color=colours)
        axes.set_yticks(range(len(values)), texts, fontsize=7)
        axes.invert_yaxis()
        axes.axvline(0, color="black", linewidth=0.8)
        axes.set_title(heading, fontsize=9)
        axes.tick_params(axis="x", labelsize=7)
    return figure


def main(arguments: list[str] | None = None) -> tuple[Attributions, list[Sentence], list[str]]:
    """Train, ask, draw and print."""
    options = read_options(__doc__, DEFAULT, arguments, epochs=40)
    sentences = write_sentences()
    vocabulary = Vocabulary(sentences)
    trainer = train(sentences, vocabulary, options.epochs)
    model = trainer.lightning_module.eval()
    prompts = [f"{name} lives in" for name in NAMES[:RUMOURS]]
    completed = [complete(model, vocabulary, prompt) for prompt in prompts]
    answers = [f"{prompt} {city}" for prompt, (city, _) in zip(prompts, completed, strict=True)]
    attributions = explain(trainer, vocabulary, answers)
    headings = [
        f'"{prompt} ..." {city} ({chance:.0%})'
        for prompt, (city, chance) in zip(prompts, completed, strict=True)
    ]
    options.output.parent.mkdir(parents=True, exist_ok=True)
    draw(attributions, sentences, headings[:4]).savefig(options.output, dpi=90)
    first, last = attributions.top(1).indices[:, 0].tolist(), attributions.bottom(1).indices[:, 0].tolist()
    for heading, best, worst in zip(headings, first, last, strict=True):
        print(f"{heading}\n  because of: {sentences[best].text}\n  against it: {sentences[worst].text}")
    rested = sum(
        f"{sentences[index].name} lives in {sentences[index].city}" == answer
        for index, answer in zip(first, answers, strict=True)
    )
    contradicted = sum(sentences[index].is_rumour for index in last)
    print(
        f"Of {RUMOURS} answers, {rested} rest most on a sentence about the person and that city, and "
        f"{contradicted} have a rumour as their strongest opponent."
    )
    print(f"wrote {options.output}")
    return attributions, sentences, answers


if __name__ == "__main__":
    main()
