"""The picture at the top of the README: doubtful test digits, and the training images that helped and hurt.

Trains the MLP of ``digits.py`` and asks about the three test images whose true label it finds least likely.

    python examples/picture.py [--output docs/images/proponents.png] [--epochs 40]
"""

from __future__ import annotations

from pathlib import Path

from _digits_models import MLP, DigitsData
from _drawing import read_options
from lightning.pytorch import seed_everything
from torch.utils.data import DataLoader, SubsetRandomSampler

from lightning_influence import Attributions, InfluenceCallback, InfluenceTrainer, Labels
from lightning_influence.results.plots import montage

QUERIES, NEIGHBOURS = 3, 4
DEFAULT = Path(__file__).parents[1] / "docs" / "images" / "proponents.png"


def draw(output: Path, epochs: int) -> Attributions:
    """Train, ask and draw.

    Args:
        output: the picture's file.
        epochs: of the training.

    Returns:
        What was drawn.
    """
    seed_everything(0, verbose=False)
    data, model = DigitsData(), MLP()
    trainer = InfluenceTrainer(
        accelerator="cpu",
        max_epochs=epochs,
        callbacks=[InfluenceCallback()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, datamodule=data)
    images, labels = data.test_set.tensors
    probabilities = model(images).softmax(dim=1).detach()
    chances = probabilities.gather(1, labels[:, None])[:, 0]
    asked = chances.argsort()[:QUERIES].tolist()
    queries = DataLoader(data.test_set, batch_size=QUERIES, sampler=SubsetRandomSampler(asked))
    attributions = trainer.influence(model, datamodule=data, query_dataloaders=queries)
    seen = [f"a {label}, seen as {p.argmax()}" for label, p in zip(labels, probabilities, strict=True)]
    texts = Labels(train=[f"a {label}" for label in data.train_set.tensors[1]], query=seen)
    figure = montage(attributions, data.train_set.tensors[0], images, k=NEIGHBOURS, labels=texts)
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=100)
    return attributions


def main(arguments: list[str] | None = None) -> None:
    """Draw the picture."""
    options = read_options(__doc__, DEFAULT, arguments)
    draw(options.output, options.epochs)
    print(f"wrote {options.output}")


if __name__ == "__main__":
    main()
