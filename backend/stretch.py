"""How a scene's values become image values: one stretch for the whole scene, recorded in each of its tasks."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from .errors import BadScene

_LOW_SHARE, _HIGH_SHARE = 0.02, 0.98


@dataclass(frozen=True, slots=True)
class Stretch:
    """How scene values become image values, 0…255."""

    kind: Literal["none", "percentile", "given"]
    """``none``: the values are image values already."""

    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()
    """Of each band, or of all: the values that become 0 and 255."""

    def __post_init__(self) -> None:
        if self.kind != "none" and not all(low < high for low, high in zip(self.low, self.high, strict=True)):
            raise BadScene(f"a stretch goes from a low value to a higher one, got {self.low} to {self.high}")

    @classmethod
    def from_text(cls, text: str) -> Stretch | None:
        """What a person typed: ``none``; ``low,high``; or low and high of each band in turn. None: nothing.

        Raises BadScene.
        """
        if not text.strip():
            return None
        if text.strip().casefold() == "none":
            return cls("none")
        try:
            numbers = [float(number) for number in text.split(",")]
        except ValueError:
            numbers = []
        if len(numbers) not in (2, 6) or not np.isfinite(numbers).all():
            raise BadScene(
                f"a stretch must be none, or low,high such as 200,3000, or that of three bands, got {text!r}"
            )
        return cls("given", tuple(numbers[::2]), tuple(numbers[1::2]))

    @classmethod
    def of_samples(cls, samples: Iterable[NDArray[Any]]) -> Stretch | None:
        """From 2 to 98 % of the values of each band, (bands, pixels) each; None where there are no pixels."""
        listed = [sample for sample in samples if sample.shape[1]]
        if not listed:
            return None
        values = np.concatenate(listed, axis=1).astype(np.float64)
        low, high = np.quantile(values, (_LOW_SHARE, _HIGH_SHARE), axis=1)
        # A border of one value that the file does not call nodata can fill nearly all of a scene.
        for band in np.flatnonzero(low == high):
            others = values[band][values[band] != low[band]]
            if others.size:
                low[band], high[band] = np.quantile(others, (_LOW_SHARE, _HIGH_SHARE))
        # A flat band would divide by nothing.
        high = np.where(high > low, high, np.maximum(low + 1, np.nextafter(low, np.inf)))
        return cls("percentile", tuple(low.tolist()), tuple(high.tolist()))

    def apply(self, values: NDArray[Any]) -> NDArray[np.uint8]:
        """Scene values, (bands, rows, columns), to image values of the same shape; what is no number becomes 0."""
        if self.kind == "none":
            return values if values.dtype == np.uint8 else np.clip(np.nan_to_num(values), 0, 255).astype(np.uint8)
        low, high = (np.asarray(ends, np.float64)[:, None, None] for ends in (self.low, self.high))
        if values.dtype in (np.uint8, np.uint16):
            return self._looked_up(values)
        # Clipped before they are scaled: a stray 1e38 overflows.
        within = np.clip(np.where(np.isnan(values), low, values), low, high)
        image: NDArray[np.uint8] = np.rint((within - low) * (255.0 / (high - low))).astype(np.uint8)
        return image

    def _looked_up(self, values: NDArray[Any]) -> NDArray[np.uint8]:
        ends = list(zip(self.low, self.high, strict=True))
        ends = ends if len(ends) > 1 else ends * len(values)
        tables = (_table(low, high, values.dtype.itemsize) for low, high in ends)
        return np.stack([table[band] for table, band in zip(tables, values, strict=True)])

    def to_record(self, bands: Sequence[int]) -> dict[str, Any]:
        """The ``stretch`` entry of a task."""
        record: dict[str, Any] = {"kind": self.kind, "bands": list(bands)}
        if self.kind != "none":
            record |= {"low": list(self.low), "high": list(self.high)}
        return record


@functools.lru_cache(maxsize=64)
def _table(low: float, high: float, size_bytes: int) -> NDArray[np.uint8]:
    """The image value of every value there can be: three times as fast as arithmetic on every pixel."""
    every = np.arange(256**size_bytes, dtype=np.float64)
    image: NDArray[np.uint8] = np.rint((np.clip(every, low, high) - low) * (255.0 / (high - low))).astype(np.uint8)
    return image
