"""What every segmenter takes and gives: prompts in, probabilities out, no state in between.

Coordinates are pixel *corners*: x runs right, y down, pixel 0 spans 0…1, so the centre of the first pixel is 0.5.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from .errors import BadPrompt


@dataclass(frozen=True, slots=True, eq=False)
class Prompts:
    """An annotator's clicks and box, in tile pixels."""

    points_xy: NDArray[np.float64] = field(default_factory=lambda: np.zeros((0, 2)))
    """Clicks, (N, 2)."""

    is_foreground: NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, bool))
    """For each click: on the object (True) or on what is not the object (False), (N,)."""

    box_xyxy: NDArray[np.float64] | None = None
    """Left, top, right, bottom of the object, (4,)."""

    label: str | None = None
    """The class that the annotator picked, if one was."""

    def __post_init__(self) -> None:
        points = np.asarray(self.points_xy, np.float64)
        flags = np.asarray(self.is_foreground, bool)
        if points.ndim != 2 or points.shape[1] != 2:
            raise BadPrompt(f"points_xy must be (N, 2), got {points.shape}")
        if flags.shape != points.shape[:1]:
            raise BadPrompt(
                f"is_foreground must be ({len(points)},) as there are {len(points)} points, got {flags.shape}"
            )
        if not np.isfinite(points).all():
            raise BadPrompt(f"points_xy must be finite, got {points[~np.isfinite(points).all(axis=1)][0].tolist()}")
        object.__setattr__(self, "points_xy", points)
        object.__setattr__(self, "is_foreground", flags)
        if self.box_xyxy is not None:
            box = np.asarray(self.box_xyxy, np.float64)
            if box.shape != (4,) or not np.isfinite(box).all():
                raise BadPrompt(f"box_xyxy must be four finite numbers, got {np.asarray(self.box_xyxy).tolist()}")
            if box[2] <= box[0] or box[3] <= box[1]:
                raise BadPrompt(f"box_xyxy must run from left top to right bottom, got {box.tolist()}")
            object.__setattr__(self, "box_xyxy", box)

    @property
    def is_empty(self) -> bool:
        """Nothing says where the object is: no box and no click on it."""
        return self.box_xyxy is None and not self.is_foreground.any()

    def within(self, image_hw: tuple[int, int]) -> tuple[NDArray[np.float64], NDArray[np.float64] | None]:
        """Clicks, (N, 2), and box, (4,), moved to lie in an image of so many rows and columns.

        Raises BadPrompt where they mean no object, or where the box lies beside the image.
        """
        if self.is_empty:
            raise BadPrompt("a box or a click on the object is needed")
        height, width = image_hw
        clicks_xy = np.clip(self.points_xy, 0.01, (width - 0.01, height - 0.01))
        if self.box_xyxy is None:
            return clicks_xy, None
        box = np.clip(self.box_xyxy, 0, (width, height, width, height))
        if box[2] <= box[0] or box[3] <= box[1]:
            raise BadPrompt(f"box_xyxy must meet the image of {width} by {height} px, got {self.box_xyxy}")
        return clicks_xy, box


@dataclass(frozen=True, slots=True, eq=False)
class Embedding:
    """What a segmenter needs to know of an image, computed once."""

    features: Mapping[str, NDArray[np.generic]]
    """Named arrays; which ones is the segmenter's own matter."""

    image_hw: tuple[int, int]
    """Rows and columns of the image that was embedded, in pixels."""

    version: str
    """Version of the weights that made it. Another version's embedding is of no use."""

    @property
    def nbytes(self) -> int:
        """Memory that the arrays take, in bytes."""
        return sum(array.nbytes for array in self.features.values())


@dataclass(frozen=True, slots=True, eq=False)
class Masks:
    """Candidate outlines of one prompted object, best first."""

    probabilities: NDArray[np.float32]
    """Probability that a pixel is of the object, (K, H, W), 0…1."""

    scores: NDArray[np.float32]
    """Expected IoU with what the annotator means, (K,), 0…1, falling."""

    def __post_init__(self) -> None:
        if self.probabilities.ndim != 3 or self.scores.shape != self.probabilities.shape[:1]:
            raise ValueError(
                f"probabilities must be (K, H, W), scores (K,), got {self.probabilities.shape}, {self.scores.shape}"
            )


@dataclass(frozen=True, slots=True, eq=False)
class DenseMaps:
    """What lies where on a tile, without any prompt."""

    labels: tuple[str, ...]
    """Names of the C classes."""

    probabilities: NDArray[np.float32]
    """Probability of each class at each pixel, (C, H, W), 0…1; classes may overlap."""

    boundary: NDArray[np.float32]
    """Probability that a pixel lies on the border between an object of the class and anything else, (C, H, W), 0…1."""

    scoring: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    """By class, what makes a candidate likely an object: factors of `backend.instances`, if the weights bring some."""

    evidence: NDArray[np.float32] | None = None
    """How much each pixel speaks for an object that it is inside of, and for one that ends beside it, (C, 2, H, W),
    as log odds; `backend.instances` takes the mean. None where the model has none."""

    def __post_init__(self) -> None:
        expected = (len(self.labels), *self.probabilities.shape[1:])
        if self.probabilities.shape != expected or self.boundary.shape != expected:
            raise ValueError(
                f"probabilities, boundary must be {expected}, got {self.probabilities.shape}, {self.boundary.shape}"
            )
        if self.evidence is not None and self.evidence.shape != (expected[0], 2, *expected[1:]):
            raise ValueError(f"evidence must be {(expected[0], 2, *expected[1:])}, got {self.evidence.shape}")

    def mean_with_mirrored(self, mirrored: DenseMaps) -> DenseMaps:
        """The mean of these maps and of those of the mirror image, whose columns run the other way."""

        def mean(one: NDArray[np.float32], other: NDArray[np.float32]) -> NDArray[np.float32]:
            return np.asarray((one + other[..., ::-1]) / 2, np.float32)

        evidence = None
        if self.evidence is not None and mirrored.evidence is not None:
            evidence = mean(self.evidence, mirrored.evidence)
        return replace(
            self,
            probabilities=mean(self.probabilities, mirrored.probabilities),
            boundary=mean(self.boundary, mirrored.boundary),
            evidence=evidence,
        )


class Segmenter(Protocol):
    """Finds objects in an image. All methods may be called from several threads at once."""

    @property
    def version(self) -> str:
        """Name of the weights; changes exactly when they do."""
        ...

    @property
    def labels(self) -> tuple[str, ...]:
        """Classes that ``dense`` finds."""
        ...

    def embed(self, image_rgb: NDArray[np.uint8]) -> Embedding:
        """Features of an image, (H, W, 3) uint8 RGB."""
        ...

    def segment(self, embedding: Embedding, prompts: Prompts) -> Masks:
        """The object that the prompts mean. Raises BadPrompt where they mean none."""
        ...

    def dense(self, embedding: Embedding, *, window_xyxy: tuple[int, int, int, int] | None = None) -> DenseMaps:
        """Class and border probabilities of the whole tile, or of its columns and rows from … to."""
        ...
