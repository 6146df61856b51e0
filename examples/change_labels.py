"""Change labels: half of the sevens were labelled 1, and a trained digits CNN is told so afterwards.

The mislabelled training images get their true labels by an edit of few parameters, in one shot. Compared with
a model that was trained on the true labels.

    python examples/change_labels.py [--seeds 10] [--rules gain random] [--ratios 0.05] [--quick]
"""

from __future__ import annotations

from typing import Any

import torch
from _editing import Batch, Rows, Task, digits, main
from torch.utils.data import DataLoader

from lightning_influence import InfluenceModule
from lightning_influence.edits.parameter_edit import ParameterEdit

TRUE, WRONG, WEIGHT_DECAY = 7, 1, 1e-3
RULES = ["gain", "highest_gradients", "highest_outputs", "random", "lowest_gradients"]


def make(seed: int, count: int | None) -> Task:
    """The task, on the first ``count`` training images; the seed decides which sevens are mislabelled."""
    (images, labels), (test, answers) = digits(count)
    sevens = (labels == TRUE).nonzero().flatten()
    generator = torch.Generator().manual_seed(seed)
    chosen = sevens[torch.randperm(len(sevens), generator=generator)[: len(sevens) // 2]]
    wrong = labels.clone()
    wrong[chosen] = WRONG

    def edit(module: InfluenceModule, loader: DataLoader[Batch], options: dict[str, Any]) -> ParameterEdit:
        return module.relabel(chosen, TRUE, loader, **options)

    seven, other = answers == TRUE, answers != TRUE
    groups: tuple[Batch, Batch] = ((test[seven], answers[seven]), (test[other], answers[other]))
    return Task(
        name="change_labels",
        edited="sevens",
        kept="others",
        train=(images, wrong),
        retrain=(images, labels),
        edit=edit,
        groups=groups,
        options={"linearisations": 1, "weight_decay": WEIGHT_DECAY},
    )


def run(arguments: list[str] | None = None) -> Rows:
    """Run the example."""
    return main(make, __doc__ or "", RULES, arguments)


if __name__ == "__main__":
    run()
