"""What the scripts that draw pictures of a fit for the documentation share: their options, and silence."""

from __future__ import annotations

import argparse
import logging
import warnings
from pathlib import Path

import torch


def read_options(
    description: str | None, picture: Path, arguments: list[str] | None, *, epochs: int = 40, seeds: int = 0
) -> argparse.Namespace:
    """Read ``--output``, ``--epochs`` and ``--seeds``, and keep Lightning from talking beside the picture.

    Args:
        description: of the script.
        picture: where its picture is written by default.
        arguments: of the command line; those of the process if None.
        epochs: of the training by default.
        seeds: over how many seeds the script averages by default; 0 for one that does not.

    Returns:
        The options.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=picture, help="where to write the picture")
    parser.add_argument("--epochs", type=int, default=epochs, help="of the training")
    if seeds:
        parser.add_argument("--seeds", type=int, default=seeds, help="how many runs are averaged")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # the network is so small that threads would wait for each other
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    warnings.filterwarnings("ignore", ".*isinstance.treespec, LeafSpec.*")
    warnings.filterwarnings("ignore", ".*have no `val_dataloader`.*")
    return options
