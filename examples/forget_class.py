"""Forget a class: remove the zeros from a trained digits CNN without training it again.

Compares generalized influence (5% of the parameters, one shot) with its baselines and with a model that was
trained without the class. The step is found on training losses; test images are only measured on.

    python examples/forget_class.py [--seeds 10] [--rules gain random] [--ratios 0.05] [--quick]
"""

from __future__ import annotations

from typing import Any

from _editing import Batch, Rows, Task, digits, main
from torch.utils.data import DataLoader

from lightning_influence import InfluenceModule
from lightning_influence.edits.parameter_edit import ParameterEdit
from lightning_influence.edits.rules import rule_names

FORGOTTEN = 0


def make(seed: int, count: int | None) -> Task:
    """The task, on the first ``count`` training images; the same for every seed."""
    (images, labels), (test, answers) = digits(count)
    gone, gone_test = labels == FORGOTTEN, answers == FORGOTTEN

    def edit(module: InfluenceModule, loader: DataLoader[Batch], options: dict[str, Any]) -> ParameterEdit:
        return module.forget(gone, loader, **options)

    return Task(
        name="forget_class",
        edited="forgotten",
        kept="kept",
        train=(images, labels),
        retrain=(images[~gone], labels[~gone]),
        edit=edit,
        groups=((test[gone_test], answers[gone_test]), (test[~gone_test], answers[~gone_test])),
    )


def run(arguments: list[str] | None = None) -> Rows:
    """Run the example."""
    return main(make, __doc__ or "", rule_names(), arguments)


if __name__ == "__main__":
    run()
