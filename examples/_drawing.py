"""What the scripts that draw pictures of a fit for the documentation share: their options, and silence."""

from __future__ import annotations

import argparse
import logging
import warnings
from pathlib import Path

import torch


def read_options(description: str | None, picture: Path, arguments: list[str] | None) -> argparse.Namespace:
    """Read ``--output`` and ``--epochs``, and keep Lightning from talking beside the picture.

    Args:
        description: of the script.
        picture: where its picture is written by default.
        arguments: of the command line; those of the process if None.

    Returns:
        The options.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=picture, help="where to write the picture")
    parser.add_argument("--epochs", type=int, default=40, help="of the training")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # the network is so small that threads would wait for each other
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    warnings.filterwarnings("ignore", ".*isinstance.treespec, LeafSpec.*")
    return options
