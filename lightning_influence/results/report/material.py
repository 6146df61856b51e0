"""What a report shows of examples: their items, labels and predictions, each looked up once."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_influence.results.ranking import Labels, to_labels
from lightning_influence.results.report.items import Part, cut, show, split_item, write_number
from lightning_influence.support.arguments import check_callable, check_number
from lightning_influence.support.errors import InfluenceWarning

#: Makes of an item and its index what is to be shown: a text, a picture, a mapping of numbers, ...
Renderer = Callable[[Any, int], Any]


@dataclass
class ReportOptions:
    """What a report shows beside the numbers; everything may be left out.

    Attributes:
        dataset: the training examples: anything indexed by training dataset indices.
        query_dataset: the same for queries; with several query dataloaders, a sequence with one for each.
        labels: texts of examples, such as class names; by default the items' own targets.
        class_names: names of integer targets and predictions, by number.
        predictions: what the model said to each query, by query index (with several query dataloaders, a
            sequence with one for each): a class, a text, a number, or a vector over classes.
        render: a function ``(item, index)`` that returns what to show of an item: a text, an image, a vector,
            a mapping of names to numbers, or a sequence of them. By default this is chosen by type and shape.
        title: heading of the page.
        spectrum: a :class:`~lightning_influence.curvature.spectrum.Spectrum` to draw.
        megabytes: the most that pictures, texts and rows may take up; of further examples only numbers and
            labels are shown, and the page says so.

    Raises:
        TypeError: if an argument is of a wrong type.
        ValueError: if ``megabytes`` is not positive.
    """

    dataset: Any = None
    query_dataset: Any = None
    labels: Labels | None = None
    class_names: Any = None
    predictions: Any = None
    render: Renderer | None = None
    title: str | None = None
    spectrum: Any = None
    megabytes: float = 64.0

    def __post_init__(self) -> None:
        self.labels = to_labels(self.labels)
        check_callable("render", self.render)
        check_number("megabytes", self.megabytes, positive=True)
        for name in ("dataset", "query_dataset"):
            value = getattr(self, name)
            if value is not None and not hasattr(value, "__getitem__"):
                raise TypeError(
                    f"Got {name} of type {type(value).__name__}, which has no items by index; accepted is "
                    "anything indexed by dataset indices: a map-style dataset, a list, a mapping, a tensor."
                )


class Material:
    """Examples as a page's data, each under a key, looked up when it is first asked for.

    Args:
        options: where they come from.

    Attributes:
        options: the same.
        examples: what the page shows of each example, by key.
        bare: how many examples are without their item, for lack of room.
    """

    def __init__(self, options: ReportOptions) -> None:
        self.options = options
        self.examples: dict[str, dict[str, Any]] = {}
        self.bare = 0
        self._left = options.megabytes * 2**20

    def train(self, index: int) -> str:
        """Returns the key of training example ``index``."""
        key = f"train-{index}"
        if key not in self.examples:
            item = _look_up("dataset", self.options.dataset, index)
            assert self.options.labels is not None
            label = self.options.labels.train_text(index)
            self.examples[key] = self._describe(item, index, label, f"training example {index}")
        return key

    def query(self, index: int, loader: int | None = None) -> str:
        """Returns the key of query ``index`` (of query dataloader ``loader``)."""
        key = f"query-{index}" if loader is None else f"query-{loader}-{index}"
        if key not in self.examples:
            dataset, predictions = self.options.query_dataset, self.options.predictions
            if loader is not None:
                dataset = None if dataset is None else _look_up_loader("query_dataset", dataset, loader)
                predictions = (
                    None if predictions is None else _look_up_loader("predictions", predictions, loader)
                )
            assert self.options.labels is not None
            label = self.options.labels.query_text(index, loader)
            name = f"query {index}" + ("" if loader is None else f" of dataloader {loader}")
            example = self._describe(_look_up("query_dataset", dataset, index), index, label, name)
            prediction = _look_up("predictions", predictions, index)
            if prediction is not None:
                example |= self._describe_prediction(prediction)
                if "label" in example and not _is_measured(prediction):
                    example["agrees"] = example["predicted"] == example["label"]
            self.examples[key] = example
        return key

    def group(self, key: str, index: int, name: str) -> str:
        """Returns the key of a group of examples, which has no item to look at."""
        self.examples[key] = {"name": cut(name), "index": index, "parts": []}
        return key

    def warn(self) -> str | None:
        """Returns what could not be shown, after a warning; None if everything is."""
        if not self.bare:
            return None
        message = (
            f"Of {self.bare} of {len(self.examples)} examples the report shows numbers and labels alone: "
            f"{self.options.megabytes:g} megabytes were full. Raise `megabytes`, lower `k`, or make items "
            "smaller with `render`."
        )
        warnings.warn(message, InfluenceWarning, stacklevel=4)
        return message

    def _describe(self, item: Any, index: int, label: str, name: str) -> dict[str, Any]:
        content, target = split_item(item)
        example: dict[str, Any] = {"name": name, "index": index}
        if not label and isinstance(target, float) and not target.is_integer():
            example["measured"] = True
        label = label or ("" if target is None else self._name_class(target))
        if label:
            example["label"] = cut(label)
        parts = self._render(item, content, index)
        size = sum(_measure(part) for part in parts)
        if size > self._left:
            self.bare += 1
        else:
            self._left -= size
            example["parts"] = parts
        return example

    def _render(self, item: Any, content: Any, index: int) -> list[Part]:
        if item is None:
            return []
        if self.options.render is None:
            return show(content)
        return show(self.options.render(item, index))

    def _describe_prediction(self, prediction: Any) -> dict[str, Any]:
        values = torch.as_tensor(prediction) if not isinstance(prediction, str) else None
        if values is None or values.numel() == 1:
            value = prediction if values is None else values.item()
            return {"predicted": self._name_class(value)}
        values = values.detach().flatten().double()
        best = int(values.argmax())
        shown: dict[str, Any] = {"predicted": self._name_class(best)}
        if bool((values >= 0).all()) and abs(float(values.sum()) - 1) < 1e-3:
            shown["confidence"] = round(float(values[best]), 4)
        return shown

    def _name_class(self, value: Any) -> str:
        names = self.options.class_names
        if names is not None and isinstance(value, int) and not isinstance(value, bool) and value >= 0:
            try:
                return cut(str(names[value]))
            except (KeyError, IndexError):
                pass
        return write_number(value)


def _is_measured(prediction: Any) -> bool:
    """Return whether a prediction is one number of a continuum, which is never quite the target."""
    if isinstance(prediction, str):
        return False
    values = torch.as_tensor(prediction)
    return values.numel() == 1 and values.is_floating_point()


def _look_up(name: str, source: Any, index: int) -> Any:
    """Return an entry, None where there is no source.

    Raises:
        ValueError: if the source does not have it.
    """
    if source is None:
        return None
    try:
        return source[index]
    except (KeyError, IndexError) as error:
        size = f" of {len(source)} entries" if hasattr(source, "__len__") else ""
        raise ValueError(
            f"{name}{size} has no entry {index} ({type(error).__name__}: {error}); pass what is indexed as "
            "the dataset was that the scores were computed for."
        ) from error


def _look_up_loader(name: str, source: Any, loader: int) -> Any:
    """Return what belongs to one of several query dataloaders.

    Raises:
        ValueError: if there is nothing for it.
    """
    if isinstance(source, Tensor) or not isinstance(source, Sequence) or loader >= len(source):
        raise ValueError(
            f"{name} has nothing for query dataloader {loader}; with several dataloaders pass a list with "
            "one entry for each."
        )
    return source[loader]


def _measure(part: Part) -> int:
    """Return about how many bytes a part takes up in the page."""
    signal = part.get("signal", ())
    row = part.get("row", ())
    return (
        len(part.get("image", ""))
        + len(part.get("text", ""))
        + 8 * sum(map(len, signal))
        + sum(len(name) + len(value) + 8 for name, value in row)
    )
