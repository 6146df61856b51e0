"""Repair a backdoor: teach a digits CNN that a patch in the corner does not make an image a zero.

A tenth of the training images carries a white patch and the label 0. The model learns both the digits and the
patch; then these images get their true labels by an edit of few parameters, in several steps because the
model is sure of the wrong labels. Compared with a model that was trained on the true labels.

    python examples/repair_backdoor.py [--seeds 10] [--rules gain random] [--ratios 0.05] [--quick]
"""

from __future__ import annotations

from typing import Any

import torch
from _editing import Batch, Rows, Task, digits, main
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_influence import InfluenceModule
from lightning_influence.edits.parameter_edit import ParameterEdit

TARGET, SHARE, WEIGHT_DECAY = 0, 0.1, 1e-3
RULES = ["gain", "highest_gradients", "random"]  # others with --rules


def triggered(images: Tensor) -> Tensor:
    """Return the images with a white patch of 2 x 2 pixels in a corner."""
    images = images.clone()
    images[..., -2:, -2:] = 1.0
    return images


def make(seed: int, count: int | None) -> Task:
    """The task, on the first ``count`` training images; the seed decides which carry the patch."""
    (images, labels), (test, answers) = digits(count)
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(labels), generator=generator)[: round(SHARE * len(labels))]
    poisoned = images.clone()
    poisoned[chosen] = triggered(images[chosen])
    wrong = labels.clone()
    wrong[chosen] = TARGET
    lied = wrong != labels

    def edit(module: InfluenceModule, loader: DataLoader[Batch], options: dict[str, Any]) -> ParameterEdit:
        return module.relabel(lied, labels[lied], loader, **options)

    return Task(
        name="repair_backdoor",
        edited="triggered",
        kept="clean",
        train=(poisoned, wrong),
        retrain=(poisoned, labels),
        edit=edit,
        groups=((triggered(test), answers), (test, answers)),
        options={"weight_decay": WEIGHT_DECAY},
    )


def run(arguments: list[str] | None = None) -> Rows:
    """Run the example."""
    return main(make, __doc__ or "", RULES, arguments)


if __name__ == "__main__":
    run()
