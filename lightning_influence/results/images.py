"""Items of a dataset as pictures, and pictures as PNG files, with nothing but NumPy."""

from __future__ import annotations

import struct
import zlib
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor


def is_array(value: Any) -> bool:
    """Whether a value is an array to NumPy: a tensor, an array, a picture of Pillow's."""
    return hasattr(value, "__array__") or hasattr(value, "__array_interface__")


def to_image(item: Any) -> NDArray[Any]:
    """An item of a dataset as matplotlib draws it.

    Args:
        item: an image ``(H, W)``, ``(C, H, W)`` or ``(H, W, C)`` (tensor, array or PIL image) with 1, 3 or 4
            channels, or a tuple or list that starts with one.

    Returns:
        ``(H, W)`` or ``(H, W, C)``. Colours outside 0 to 1 (normalised images) are scaled into it.

    Raises:
        ValueError: if it is no image.
    """
    if isinstance(item, tuple | list) and len(item) and is_array(item[0]):
        item = item[0]
    image = item.detach().cpu().float().numpy() if isinstance(item, Tensor) else np.asarray(item)
    shape = image.shape
    if image.ndim == 3 and shape[0] in {1, 3, 4} and shape[2] not in {1, 3, 4}:
        image = np.moveaxis(image, 0, 2)
    if image.ndim == 3 and image.shape[2] == 1:
        image = image[:, :, 0]
    if image.ndim != 2 and not (image.ndim == 3 and image.shape[2] in {3, 4}):
        raise ValueError(
            f"an item of shape {shape} is no image; accepted are (H, W), (C, H, W) and (H, W, C) with 1, 3 "
            "or 4 channels: pass a mapping or dataset that returns images"
        )
    return image if image.ndim == 2 or image.dtype == np.uint8 else _unit_range(image)


def _unit_range(image: NDArray[Any]) -> NDArray[Any]:
    low, high = float(image.min()), float(image.max())
    if low >= 0.0 and high <= 1.0:
        return image
    if low >= 0.0 and high <= 255.0 and bool((image == np.round(image)).all()):
        return image / 255.0
    return np.zeros_like(image) if high == low else (image - low) / (high - low)


def encode_png(image: NDArray[Any], longest: int = 96) -> bytes:
    """A picture as a PNG file.

    Args:
        image: what :func:`to_image` returned. Grey values outside 0 to 1 are scaled into it; those that are
            not finite are black.
        longest: a picture with a longer side is made smaller, by means over areas, until it fits.

    Returns:
        The file's bytes.
    """
    values = image.astype(np.float64) / 255.0 if image.dtype == np.uint8 else image.astype(np.float64)
    values = np.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0)
    low, high = values.min(initial=0.0), values.max(initial=1.0)
    if low < 0.0 or high > 1.0:  # grey: colours are in range by now
        values = (values - values.min()) / max(float(np.ptp(values)), np.finfo(np.float64).tiny)
    values = _shrink(values.reshape(*values.shape[:2], -1), longest)
    pixels = np.round(values.clip(0.0, 1.0) * 255.0).astype(np.uint8)
    height, width, channels = pixels.shape
    # A byte before each line says how it is filtered: not at all.
    lines = np.concatenate([np.zeros((height, 1), np.uint8), pixels.reshape(height, -1)], axis=1)
    colour = {1: 0, 3: 2, 4: 6}[channels]
    header = struct.pack(">IIBBBBB", width, height, 8, colour, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(lines.tobytes(), 9)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind, content) for kind, content in chunks)


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def _shrink(values: NDArray[Any], longest: int) -> NDArray[Any]:
    """Average ``(H, W, C)`` over areas until neither side is longer than ``longest``."""
    ratio = longest / max(values.shape[:2])
    for axis, size in enumerate(values.shape[:2]):
        target = max(1, round(size * ratio))
        if target < size:
            starts = np.arange(target) * size // target
            counts = np.diff(np.append(starts, size))
            shape = [-1 if other == axis else 1 for other in range(3)]
            values = np.add.reduceat(values, starts, axis=axis) / counts.reshape(shape)
    return values
