"""Evaluation: how well polygons lie on true ones, and what went wrong where they do not.

The definitions are those of the benchmarks, which judge in pixels what is judged on the ground here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyproj
import shapely
from numpy.typing import NDArray
from shapely import MultiPolygon, Polygon, STRtree
from shapely.geometry.base import BaseGeometry

from . import vectorize
from .errors import ExportError
from .formats import read_frame

MATCH_IOU = 0.5
"""A prediction and a true object are a pair from this IoU on."""

POOR_IOU = 0.3
"""Below `MATCH_IOU` and from here on, the object was seen and its outline is poor."""

OBJECT_FATES = ("found", "merged", "split", "poor outline", "missed")
PREDICTION_FATES = ("right", "merged", "split", "poor outline", "false alarm")

Labelled = tuple[str | None, BaseGeometry]
FloatArray = NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Overlaps:
    """Where predictions and true objects lie on each other, in any unit of area. What does not touch is not listed."""

    predicted: NDArray[np.intp]
    true: NDArray[np.intp]
    shared: FloatArray
    """Number of the prediction, number of the object and what they have in common, (K,) each."""

    predicted_area: FloatArray
    """Of all predictions, (P,)."""

    true_area: FloatArray
    """Of all objects, (T,)."""

    @property
    def ious(self) -> FloatArray:
        """Intersection over union of each listed pair, (K,)."""
        union = self.predicted_area[self.predicted] + self.true_area[self.true] - self.shared
        return np.divide(self.shared, union, out=np.zeros(len(self.shared)), where=union > 0)

    def pairs(self, least: float = MATCH_IOU) -> list[tuple[int, int, float]]:
        """Prediction, object and IoU of at least ``least``, one to one, the best first."""
        listed = zip(self.ious.tolist(), self.predicted.tolist(), self.true.tolist(), strict=True)
        taken: tuple[set[int], set[int]] = set(), set()
        pairs = []
        for value, i, j in sorted((entry for entry in listed if entry[0] >= least), reverse=True):
            if i not in taken[0] and j not in taken[1]:
                taken[0].add(i)
                taken[1].add(j)
                pairs.append((i, j, value))
        return pairs

    def fates(self, pairs: Sequence[tuple[int, int, float]]) -> tuple[list[str], list[str]]:
        """What became of each object, and of each prediction, given the ``pairs`` at `MATCH_IOU`.

        Of an object, the first that holds: *found*, in a pair; *merged*, half of it and half of another object under
        one prediction; *split*, two or more predictions lie in it by half of themselves and cover half of it together;
        *poor outline*, a best IoU of at least `POOR_IOU`; *missed*. Of a prediction likewise: *right*; *merged*, over
        half of each of two or more objects; *split*, a part of an object that was split; *poor outline*; *false alarm*.
        """
        count, objects = len(self.predicted_area), len(self.true_area)
        covers = self.shared >= 0.5 * self.true_area[self.true]
        merges = np.bincount(self.predicted[covers], minlength=count) >= 2
        is_merged = np.isin(np.arange(objects), self.true[covers & merges[self.predicted]])
        inside = self.shared >= 0.5 * self.predicted_area[self.predicted]
        parts = np.bincount(self.true[inside], minlength=objects)
        held = np.bincount(self.true[inside], self.shared[inside], objects)
        is_split = (parts >= 2) & (held >= 0.5 * self.true_area)
        is_part = np.isin(np.arange(count), self.predicted[inside & is_split[self.true]])
        near = self.ious >= POOR_IOU
        return (
            _first_of(
                OBJECT_FATES, np.isin(np.arange(objects), [j for _, j, _ in pairs]), is_merged, is_split,
                np.isin(np.arange(objects), self.true[near]),
            ),
            _first_of(
                PREDICTION_FATES, np.isin(np.arange(count), [i for i, _, _ in pairs]), merges, is_part,
                np.isin(np.arange(count), self.predicted[near]),
            ),
        )  # fmt: skip


def _first_of(names: Sequence[str], *holds: NDArray[np.bool_]) -> list[str]:
    """For each row the name of the first that holds, the last name where none does."""
    every = np.stack([*holds, np.ones_like(holds[0])])
    return [names[number] for number in every.argmax(0)]


@dataclass(frozen=True, slots=True)
class Evaluation:
    """How well predicted polygons lie on true ones."""

    f1: float
    precision: float
    recall: float
    mean_iou: float | None
    """Of matched pairs."""

    area_iou: float
    """Of all that is predicted, taken together, with all that is true."""

    polis_m: float | None
    """Mean distance of each one's vertices to the other's outline, over matched pairs, in metres (PoLiS)."""

    vertex_ratio: float | None
    """Vertices of matched predictions over those of their truth."""

    vertices_per_polygon: float | None
    """Points of a predicted polygon as Label Studio would hold it, holes bridged."""

    invalid_rate: float
    predicted: int
    truth: int
    matched: int
    objects: Mapping[str, int]
    """True objects by what became of them, see `Overlaps.fates`."""

    predictions: Mapping[str, int]
    """Predicted ones likewise."""


def evaluate(predicted: Path, truth: Path, *, label: str | None = None, iou: float = MATCH_IOU) -> Evaluation:
    """Match polygons one to one at that IoU, in the local UTM zone; of one label, where both files name labels.

    ``label`` judges the polygons of that label alone. Raises ExportError where a file cannot be read as polygons.
    """
    guesses, truths = _polygons_of(predicted, label), _polygons_of(truth, label)
    invalid = sum(not shape.is_valid for _, shape in guesses)
    to_utm = _utm([shape for _, shape in (*guesses, *truths)]) if guesses or truths else None
    a, b = ([(name, _metres(shape, to_utm)) for name, shape in listed if to_utm] for listed in (guesses, truths))
    lying = overlaps(a, b)
    pairs = lying.pairs(iou)
    matched = len(pairs)
    # Nothing found where there is nothing is right.
    nothing = float(not a and not b)
    object_fates, prediction_fates = lying.fates(pairs)
    corners = [_corners(shape) for _, shape in a], [_corners(shape) for _, shape in b]
    parts = [part for _, shape in a for part in vectorize.repair(shape)]
    return Evaluation(
        f1=2 * matched / (len(a) + len(b)) if a or b else nothing,
        precision=matched / len(a) if a else nothing,
        recall=matched / len(b) if b else nothing,
        mean_iou=sum(share for _, _, share in pairs) / matched if matched else None,
        area_iou=_area_iou(a, b),
        polis_m=sum(polis(a[i][1], b[j][1]) for i, j, _ in pairs) / matched if matched else None,
        vertex_ratio=sum(corners[0][i] for i, _, _ in pairs) / sum(corners[1][j] for _, j, _ in pairs)
        if matched
        else None,
        vertices_per_polygon=sum(map(vectorize.ring_points, parts)) / len(parts) if parts else None,
        invalid_rate=invalid / max(1, len(a)),
        predicted=len(a),
        truth=len(b),
        matched=matched,
        objects=_counted(object_fates, OBJECT_FATES),
        predictions=_counted(prediction_fates, PREDICTION_FATES),
    )


def polis(a: BaseGeometry, b: BaseGeometry) -> float:
    """Mean distance of the vertices of each to the outline of the other, in their units (Avbelj and others, 2015)."""
    return sum(
        float(shapely.distance(shapely.points(_vertices(one)), other.boundary).mean()) / 2
        for one, other in ((a, b), (b, a))
    )


def _vertices(shape: BaseGeometry) -> FloatArray:
    """Corners of all rings, none of them twice, (N, 2)."""
    rings = shapely.get_rings(shapely.get_parts(shape))
    return np.concatenate([shapely.get_coordinates(ring)[:-1] for ring in rings])


def _corners(shape: BaseGeometry) -> int:
    return len(_vertices(shape)) if not shape.is_empty else 0


def _counted(fates: Sequence[str], names: Sequence[str]) -> dict[str, int]:
    counts = Counter(fates)
    return {name: counts[name] for name in names}


def _polygons_of(path: Path, label: str | None) -> list[Labelled]:
    """Label and shape (lon/lat) of each polygon or multipolygon in a vector file."""
    frame = read_frame(path)
    if frame.crs is not None:
        frame = frame.to_crs("EPSG:4326")
    named = "label" in frame.columns
    rows = zip(frame["label"] if named else [None] * len(frame), frame.geometry, strict=True)
    found = [
        (None if name is None else str(name), shape)
        for name, shape in rows
        if isinstance(shape, (Polygon, MultiPolygon)) and not shape.is_empty
    ]
    if len(frame) and not found:
        raise ExportError(f"{path} has {len(frame)} features and no polygon among them; polygons are compared")
    return [(name, shape) for name, shape in found if label is None or name == label]


def _utm(shapes: Sequence[BaseGeometry]) -> pyproj.Transformer:
    lon, lat = shapely.get_coordinates(np.array(shapes, dtype=object)).mean(axis=0)
    zone = int((lon + 180) // 6) % 60 + 1
    return pyproj.Transformer.from_crs(
        "EPSG:4326", f"EPSG:{32600 + zone if lat >= 0 else 32700 + zone}", always_xy=True
    )


def _metres(shape: BaseGeometry, to_utm: pyproj.Transformer) -> BaseGeometry:
    moved = shapely.transform(shape, lambda points: np.column_stack(to_utm.transform(points[:, 0], points[:, 1])))
    return shapely.union_all(vectorize.repair(moved))


def overlaps(a: Sequence[Labelled], b: Sequence[Labelled]) -> Overlaps:
    """How predictions lie on true objects whose labels agree, or where one has none; valid shapes, in any frame."""
    guesses = np.array([shape for _, shape in a], dtype=object)
    truths = np.array([shape for _, shape in b], dtype=object)
    i, j = STRtree(truths).query(guesses, predicate="intersects")
    agree = np.array(
        [a[m][0] is None or b[n][0] is None or a[m][0] == b[n][0] for m, n in zip(i, j, strict=True)], bool
    )
    i, j = i[agree], j[agree]
    return Overlaps(
        i, j, shapely.area(shapely.intersection(guesses[i], truths[j])), shapely.area(guesses), shapely.area(truths)
    )


def _area_iou(a: Sequence[Labelled], b: Sequence[Labelled]) -> float:
    one, other = (shapely.union_all([shape for _, shape in listed]) for listed in (a, b))
    union = one.union(other).area
    return float(one.intersection(other).area / union) if union else float(not a and not b)
