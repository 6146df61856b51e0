"""A project with LightningCLI and a datamodule, whose YAML file switches the callback on.

Trains the MLP of `digits.py` as `lightning_cli.yaml` says, on labels of which 5% are wrong, and draws the
data map: each training image by the mean and the spread of its loss over the epochs. Any setting can be given
in the shell as well, such as `--trainer.max_epochs 10` or `--data.flipped 0.1`.

    python examples/lightning_cli.py [--output docs/images/data_map.png]
"""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

import torch
from _digits_models import MLP, DigitsData
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from lightning_influence import InfluenceTrainer, Labels, Suspects
from lightning_influence.evaluation import mislabel_auroc
from lightning_influence.results.plots import data_map

HERE = Path(__file__).parent
DEFAULT = HERE.parent / "docs" / "images" / "data_map.png"


class CommandLine(LightningCLI):
    """LightningCLI with one more option."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add ``--output``."""
        parser.add_argument("--output", type=Path, default=DEFAULT, help="where to write the picture")


def main(arguments: list[str] | None = None) -> Suspects:
    """Fit as the configuration says, then look for the wrong labels."""
    torch.set_num_threads(1)  # the network is so small that threads would wait for each other
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    warnings.filterwarnings("ignore", ".*isinstance.treespec, LeafSpec.*")
    cli = CommandLine(
        MLP,
        DigitsData,
        args=arguments,
        parser_kwargs={"default_config_files": [str(HERE / "lightning_cli.yaml")]},
        trainer_class=InfluenceTrainer,
        run=False,
        save_config_callback=None,
    )
    trainer, data = cli.trainer, cli.datamodule
    trainer.fit(cli.model, datamodule=data)

    texts = Labels(train=["wrong" if wrong else "right" for wrong in data.is_flipped])
    suspects: Suspects = trainer.suspects(datamodule=data, labels=texts)
    print(suspects.top(5, labels=texts))
    auroc = float(mislabel_auroc(suspects.scores, data.is_flipped[suspects.train_indices]))
    print(f"AUROC of the ranking as a detector of wrong labels: {auroc:.3f}")

    dynamics = trainer.training_dynamics()
    figure, wrong = data_map(dynamics), data.is_flipped[dynamics.train_indices]
    spread, mean = dynamics.loss_spread[wrong], dynamics.loss_mean[wrong]
    figure.axes[0].scatter(spread, mean, s=30, facecolors="none", edgecolors="black", label="wrong label")
    figure.axes[0].legend()
    cli.config.output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(cli.config.output, dpi=90)
    print(f"wrote {cli.config.output} and logs in {trainer.log_dir}")
    return suspects


if __name__ == "__main__":
    main()
