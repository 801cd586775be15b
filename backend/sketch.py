"""Sketch: what a report's pictures are drawn from, gathered while tasks and features go by, and how they are drawn.

Memory is bounded: of many tiles every so many is kept; of many features the outlines are let go and their places
stay. Pictures are inline SVG with embedded images: they need no network, no script and no file beside the page.
"""

from __future__ import annotations

import base64
import io
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any, Generic, TypeVar

import numpy as np
import PIL.Image
import pyproj
import shapely
from numpy.typing import NDArray
from shapely.geometry.base import BaseGeometry

from .errors import BackendError
from .tile import FloatArray, Tile

ImageOf = Callable[[str, Any], NDArray[np.uint8]]
"""Address of a task's image and the task's number to red, green, blue, (H, W, 3); raises BackendError."""

COLOURS = ("#e69f00", "#56b4e9", "#cc79a7", "#f0e442", "#d55e00", "#009e73", "#7c8cff", "#ff7f7f")
"""Of labels, the most frequent first, then round again. After Okabe and Ito: told apart by the colour-blind too."""

WORST_REPAIRS = 10

_WIDTH_PX = 1100
"""Of a map, in its own pixels; it is scaled to the page."""

_MAX_HEIGHT_PX = 900
_MARGIN_PX = 12
_MAX_VERTICES = 300_000
"""Of all outlines together; beyond, features are drawn as dots."""

_MAX_TILES = 4096
_MAX_PLACES = 6
_MAX_IMAGES = 64
"""Images fetched for a map."""

_CELL_DEG = 0.25
"""What lies in neighbouring cells of this size is on one map."""

_SIMPLIFY_PX = 0.4

Item = TypeVar("Item")


@dataclass(frozen=True, slots=True, eq=False)
class Repair:
    """An outline that could not stay as it was drawn."""

    task: Any
    region: str
    reason: str

    before: FloatArray
    """As drawn, (N, 2) tile pixels; may cross itself, and is empty where it is not known."""

    after: BaseGeometry
    """As exported, in tile pixels."""

    area_change: float
    """From −1 to 1, as `area_change` counts it; nan where that says nothing."""


def area_change(before: FloatArray, after: BaseGeometry) -> float:
    """What an outline gained or lost, as a share of the larger area: −1…1, nan where it is not known as drawn.

    Before, loops that run against the outline count against it, as they do where repairs are put into words.
    """
    if len(before) < 3:
        return math.nan
    drawn_px = shapely.Polygon(before).area
    larger_px = max(drawn_px, float(after.area))
    return (float(after.area) - drawn_px) / larger_px if larger_px else math.nan


@dataclass(slots=True)
class _Thinned(Generic[Item]):
    """Of what comes by, every so many, evenly; never more than ``limit``."""

    limit: int
    kept: list[Item] = field(default_factory=list)
    seen: int = 0
    step: int = 1

    def add(self, item: Item) -> None:
        if self.seen % self.step == 0:
            if len(self.kept) == self.limit:
                self.kept = self.kept[::2]
                self.step *= 2
            if self.seen % self.step == 0:
                self.kept.append(item)
        self.seen += 1


@dataclass(frozen=True, slots=True, eq=False)
class _Footprint:
    tile: Tile
    corners: FloatArray
    """Longitude and latitude of the image's corners from the first pixel's on, (4, 2)."""

    image_url: str
    task_id: Any


class Sketch:
    """Gathers what the pictures show."""

    def __init__(self) -> None:
        self._tiles: _Thinned[_Footprint] = _Thinned(_MAX_TILES)
        self._cells: set[int] = set()
        self._labels: dict[str, int] = {}
        self._counts: Counter[str] = Counter()
        self._points: list[FloatArray] = []
        self._label_numbers: list[NDArray[np.int32]] = []
        self._shapes: list[NDArray[np.object_]] | None = []
        self._vertices = 0
        self._repairs: list[Repair] = []

    def add_tile(self, tile: Tile, *, image_url: str = "", task_id: Any = None) -> None:
        """A tile that somebody annotated."""
        corners = tile.px_to_lonlat(shapely.get_coordinates(tile.outline_px())[:4])
        self._cells.add(int(_cells_of(corners[:1])[0]))
        self._tiles.add(_Footprint(tile, corners, image_url, task_id))

    def add_features(self, geometries: Sequence[BaseGeometry] | NDArray[np.object_], labels: Sequence[str]) -> None:
        """Features in longitude and latitude, and their labels."""
        shapes = np.asarray(geometries, dtype=object)
        if len(shapes) != len(labels):
            raise ValueError(f"there must be a label for each geometry, got {len(labels)} for {len(shapes)}")
        if not len(shapes):
            return
        # Any point of a feature will do for a dot, and its first costs nothing.
        counts = shapely.get_num_coordinates(shapes)
        points = shapely.get_coordinates(shapes)[np.cumsum(counts) - counts]
        self._points.append(points)
        self._label_numbers.append(
            np.array([self._labels.setdefault(label, len(self._labels)) for label in labels], np.int32)
        )
        self._counts.update(labels)
        self._cells.update(np.unique(_cells_of(points)).tolist())
        self._vertices += int(counts.sum())
        if self._vertices > _MAX_VERTICES:
            self._shapes = None
        if self._shapes is not None:
            self._shapes.append(shapes)

    def add_repair(self, repair: Repair) -> None:
        """An outline that was repaired; those are kept that changed most."""
        self._repairs = sorted([*self._repairs, repair], key=_seriousness, reverse=True)[:WORST_REPAIRS]

    @property
    def repairs(self) -> Sequence[Repair]:
        """Those that changed the area most, the worst first."""
        return self._repairs

    def colours(self) -> dict[str, str]:
        """The colour of each label, the most frequent label first."""
        names = [label for label, _ in self._counts.most_common()]
        return {label: COLOURS[number % len(COLOURS)] for number, label in enumerate(names)}

    def maps(self, image_of: ImageOf | None = None) -> tuple[list[Map], int]:
        """A map of each place, those with most features first, and the number of places that are not drawn."""
        places = _places(self._cells)
        points = np.concatenate([np.empty((0, 2)), *self._points])
        labels = np.concatenate([np.empty(0, np.int32), *self._label_numbers])
        shapes = None if self._shapes is None else np.concatenate([np.empty(0, object), *self._shapes])
        cells, cell_of_point = np.unique(_cells_of(points), return_inverse=True)
        where = np.array([places[cell] for cell in cells.tolist()], np.int64)[cell_of_point]
        tiles: dict[int, list[_Footprint]] = {}
        for footprint in self._tiles.kept:
            tiles.setdefault(places[int(_cells_of(footprint.corners[:1])[0])], []).append(footprint)
        numbers = sorted(set(places.values()), key=lambda number: (-int((where == number).sum()), number))
        colours = self.colours()
        palette = [colours[label] for label in self._labels]
        maps = []
        for number in numbers[:_MAX_PLACES]:
            here = where == number
            chosen = None if shapes is None else shapes[here]
            maps.append(
                _draw(
                    points[here],
                    chosen,
                    labels[here],
                    tiles.get(number, []),
                    list(self._labels),
                    palette,
                    image_of,
                )
            )
        return maps, max(0, len(numbers) - _MAX_PLACES)


def _seriousness(repair: Repair) -> float:
    return 0.0 if math.isnan(repair.area_change) else abs(repair.area_change)


# Places ---------------------------------------------------------------------------------------------------------------


_COLUMNS = round(360 / _CELL_DEG)
_ROWS = round(180 / _CELL_DEG) + 1
"""One more for the north pole itself."""


def _cells_of(lonlat: FloatArray) -> NDArray[np.int64]:
    """The number of each point's cell, counted column by column."""
    columns, rows = np.floor(np.add(lonlat, (180, 90)) / _CELL_DEG).astype(np.int64).T
    # At a pole all longitudes are one place.
    columns = np.where(np.abs(lonlat[:, 1]) > 89.5, 0, columns)
    return np.asarray(columns % _COLUMNS * _ROWS + np.clip(rows, 0, _ROWS - 1))


def _places(cells: Collection[int]) -> dict[int, int]:
    """The place of each cell: cells that touch, also over the antimeridian, are one place."""
    places: dict[int, int] = {}
    number = 0
    for start in sorted(cells):
        if start in places:
            continue
        waiting = [start]
        while waiting:
            cell = waiting.pop()
            if cell in places:
                continue
            places[cell] = number
            column, row = divmod(cell, _ROWS)
            around = [((column + i) % _COLUMNS * _ROWS, row + j) for i in (-1, 0, 1) for j in (-1, 0, 1)]
            waiting += [base + row for base, row in around if 0 <= row < _ROWS and base + row in cells]
        number += 1
    return places


# Maps -----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Map:
    """A drawn place."""

    svg: str
    features: int
    tiles: int
    images: int
    """Tiles whose image lies under the features."""

    centre_lonlat: tuple[float, float]
    is_dots: bool
    """Whether features are drawn as dots, being too many for outlines."""


@dataclass(frozen=True, slots=True)
class _Frame:
    """From longitude and latitude to pixels of a map: equal-area around its centre, north up."""

    to_metres: pyproj.Transformer
    left_m: float
    top_m: float
    px_per_m: float
    size_px: tuple[int, int]

    def __call__(self, lonlat: FloatArray) -> FloatArray:
        x, y = self.to_metres.transform(lonlat[:, 0], lonlat[:, 1])
        return np.column_stack(((x - self.left_m) * self.px_per_m, (self.top_m - y) * self.px_per_m))


def _frame_of(lonlat: FloatArray) -> _Frame:
    # The mean of directions, not of degrees: it holds at the antimeridian and at the poles.
    lon, lat = np.radians(lonlat).T
    x, y, z = (np.cos(lat) * np.cos(lon)).mean(), (np.cos(lat) * np.sin(lon)).mean(), np.sin(lat).mean()
    centre = math.degrees(math.atan2(y, x)), math.degrees(math.atan2(z, math.hypot(x, y)))
    # Built from numbers alone.
    local = pyproj.CRS.from_dict({"proj": "laea", "lon_0": centre[0], "lat_0": centre[1], "datum": "WGS84"})
    to_metres = pyproj.Transformer.from_crs("EPSG:4326", local, always_xy=True)
    east, north = to_metres.transform(lonlat[:, 0], lonlat[:, 1])
    width_m, height_m = max(float(np.ptp(east)), 1.0), max(float(np.ptp(north)), 1.0)
    inner = _WIDTH_PX - 2 * _MARGIN_PX
    px_per_m = min(inner / width_m, (_MAX_HEIGHT_PX - 2 * _MARGIN_PX) / height_m)
    height = math.ceil(height_m * px_per_m) + 2 * _MARGIN_PX
    spare_m = (_WIDTH_PX / px_per_m - width_m) / 2
    return _Frame(
        to_metres,
        float(east.min()) - spare_m,
        float(north.max()) + _MARGIN_PX / px_per_m,
        px_per_m,
        (_WIDTH_PX, height),
    )


def _draw(
    points: FloatArray,
    shapes: NDArray[np.object_] | None,
    labels: NDArray[np.int32],
    tiles: Sequence[_Footprint],
    names: Sequence[str],
    palette: Sequence[str],
    image_of: ImageOf | None,
) -> Map:
    outlines = [footprint.corners for footprint in tiles]
    extent = [points if shapes is None else shapely.get_coordinates(shapes)]
    frame = _frame_of(np.concatenate([*extent, *outlines]))
    width, height = frame.size_px
    picture, images = _mosaic(tiles, frame, image_of) if image_of else ("", 0)
    parts = [picture, *_footprints(outlines, frame)]
    parts += (
        _dots(points, labels, frame, palette) if shapes is None else _outlines(shapes, labels, frame, names, palette)
    )
    parts.append(_scale_bar(frame))
    description = f"Map of {len(points)} features on {len(tiles)} tiles"
    svg = (
        f'<svg class="map" viewBox="0 0 {width} {height}" role="img" aria-label="{description}">'
        + "".join(parts)
        + "</svg>"
    )
    lon, lat = frame.to_metres.transform(
        frame.left_m + width / 2 / frame.px_per_m, frame.top_m - height / 2 / frame.px_per_m, direction="INVERSE"
    )
    return Map(svg, len(points), len(tiles), images, (float(lon), float(lat)), shapes is None)


def _footprints(outlines: Sequence[FloatArray], frame: _Frame) -> Iterator[str]:
    if outlines:
        paths = "".join(_path(frame(corners)) for corners in outlines)
        yield f'<path class="tiles" d="{paths}"/>'


def _outlines(
    shapes: NDArray[np.object_], labels: NDArray[np.int32], frame: _Frame, names: Sequence[str], palette: Sequence[str]
) -> Iterator[str]:
    """One path a label, over a dark line that keeps it legible on bright ground; points as dots, alike."""
    drawn = shapely.simplify(shapely.transform(shapes, frame), _SIMPLIFY_PX)
    is_point = shapely.get_type_id(drawn) == shapely.GeometryType.POINT
    for number in np.unique(labels):
        here, colour = labels == number, palette[number]
        paths = "".join(_rings_path(shape) for shape in drawn[here & ~is_point])
        dots = "".join(f"M{x:.1f} {y:.1f}h0" for x, y in shapely.get_coordinates(drawn[here & is_point]).tolist())
        outlines = (
            f'<path class="casing" d="{paths}"/><path d="{paths}" fill="{colour}" fill-opacity=".25"'
            f' fill-rule="evenodd" stroke="{colour}" stroke-width="1.4" stroke-linejoin="round"/>'
        )
        points = (
            f'<path class="dots casing" d="{dots}"/><path class="dots" d="{dots}" stroke="{colour}" stroke-width="6"/>'
        )
        yield (f"<g><title>{escape(names[number])}</title>{outlines if paths else ''}{points if dots else ''}</g>")


def _dots(points: FloatArray, labels: NDArray[np.int32], frame: _Frame, palette: Sequence[str]) -> Iterator[str]:
    """One image, in which the most frequent label of a pixel gives its colour, and the number its strength."""
    width, height = frame.size_px
    at = np.clip(frame(points).astype(np.int64), 0, (width - 1, height - 1))
    cell = at[:, 1] * width + at[:, 0]
    total = np.bincount(cell, minlength=width * height)
    most = np.zeros(width * height, np.int64)
    winner = np.zeros(width * height, np.int64)
    for number in range(len(palette)):
        count = np.bincount(cell[labels == number], minlength=width * height)
        winner[count > most] = number
        most = np.maximum(most, count)
    rgba = np.zeros((width * height, 4), np.uint8)
    there = total > 0
    colours = np.array([_rgb(colour) for colour in palette], np.uint8).reshape(-1, 3)
    rgba[there, :3] = colours[winner[there]]
    rgba[there, 3] = 110 + 145 * np.log1p(total[there]) / np.log1p(total.max())
    yield _embedded(PIL.Image.fromarray(rgba.reshape(height, width, 4)), "PNG", frame)


def _mosaic(tiles: Sequence[_Footprint], frame: _Frame, image_of: ImageOf) -> tuple[str, int]:
    """The tiles' images in their places, as one embedded image, and how many there are."""
    chosen = [footprint for footprint in tiles if footprint.image_url]
    step = math.ceil(len(chosen) / _MAX_IMAGES) if chosen else 1
    canvas = PIL.Image.new("RGB", frame.size_px, (128, 128, 128))
    seen = PIL.Image.new("L", frame.size_px, 0)
    shown = 0
    for footprint in chosen[::step]:
        try:
            rgb = image_of(footprint.image_url, footprint.task_id)
        except BackendError:
            continue
        picture = PIL.Image.fromarray(np.ascontiguousarray(rgb[..., :3]))
        corners = frame(footprint.corners)
        factor = max(1, int(picture.width / max(1.0, float(np.hypot(*(corners[1] - corners[0]))))))
        picture = picture.reduce(factor)
        size = picture.width, picture.height
        # From map pixels to image pixels; two edges of the tile are the axes.
        axes = np.column_stack(((corners[1] - corners[0]) / size[0], (corners[3] - corners[0]) / size[1]))
        if abs(np.linalg.det(axes)) < 1e-9:
            continue
        back = np.linalg.inv(axes)
        offset = -back @ corners[0]
        row, column = (*back[0], offset[0]), (*back[1], offset[1])
        warp = {
            "size": frame.size_px,
            "method": PIL.Image.Transform.AFFINE,
            "data": (*map(float, row), *map(float, column)),
        }
        mask = PIL.Image.new("L", size, 255).transform(**warp)  # type: ignore[arg-type]
        moved = picture.transform(**warp, resample=PIL.Image.Resampling.BILINEAR)  # type: ignore[arg-type]
        canvas.paste(moved, mask=mask)
        seen.paste(mask, mask=mask)
        shown += 1
    if not shown:
        return "", 0
    canvas.putalpha(seen)
    return _embedded(canvas, "WEBP", frame), shown


def _embedded(image: PIL.Image.Image, kind: str, frame: _Frame) -> str:
    file = io.BytesIO()
    image.save(file, kind, quality=78)
    text = base64.b64encode(file.getvalue()).decode()
    width, height = frame.size_px
    return f'<image width="{width}" height="{height}" href="data:image/{kind.lower()};base64,{text}"/>'


def _scale_bar(frame: _Frame) -> str:
    """A bar of a round number of metres, at most a quarter of the map."""
    longest_m = frame.size_px[0] / 4 / frame.px_per_m
    power = 10.0 ** math.floor(math.log10(longest_m))
    length_m = next(power * factor for factor in (5, 2, 1) if power * factor <= longest_m)
    text = f"{length_m / 1000:g} km" if length_m >= 1000 else f"{length_m:g} m"
    x, y, length = _MARGIN_PX + 14, frame.size_px[1] - _MARGIN_PX - 14, length_m * frame.px_per_m
    return (
        f'<g class="scale"><rect x="{x - 8}" y="{y - 26}" width="{length + 16:.1f}" height="34" rx="5"/>'
        f'<path d="M{x} {y - 6}v6h{length:.1f}v-6"/>'
        f'<text x="{x + length / 2:.1f}" y="{y - 8}" text-anchor="middle">{text}</text></g>'
    )


# Repairs --------------------------------------------------------------------------------------------------------------


def repair_pictures(repair: Repair, *, size_px: int = 220) -> tuple[str, str]:
    """The outline as drawn and as exported, in one frame, as SVG."""
    after = repair.after
    points = np.concatenate([np.asarray(repair.before, np.float64).reshape(-1, 2), shapely.get_coordinates(after)])
    points = points[np.isfinite(points).all(axis=1)]
    if not len(points):
        return "", ""
    low, high = points.min(axis=0), points.max(axis=0)
    scale = (size_px - 32) / max(float((high - low).max()), 1e-6)
    shift = np.array([size_px / 2, size_px / 2]) - (low + high) / 2 * scale

    def placed(ring: FloatArray) -> FloatArray:
        return np.asarray(ring * scale + shift)

    before = placed(np.asarray(repair.before, np.float64).reshape(-1, 2))
    before = before[np.isfinite(before).all(axis=1)]
    drawn = _path(before) if len(before) else ""
    exported = _rings_path(shapely.transform(after, placed))
    return (
        _panel(f'<path class="before" d="{drawn}"/>{_vertices(before)}', size_px, "as drawn"),
        _panel(
            f'<path class="ghost" d="{drawn}"/><path class="after" d="{exported}"/>'
            + _vertices(shapely.get_coordinates(shapely.transform(after, placed))),
            size_px,
            "as exported",
        ),
    )


def _panel(content: str, size_px: int, name: str) -> str:
    return f'<svg class="outline" viewBox="0 0 {size_px} {size_px}" role="img" aria-label="{name}">{content}</svg>'


def _vertices(points: FloatArray) -> str:
    """A dot on each vertex, where they can be told apart."""
    if len(points) > 150:
        return ""
    dots = "".join(f"M{x:.1f} {y:.1f}h0" for x, y in points.tolist())
    return f'<path class="vertices" d="{dots}"/>'


# SVG ------------------------------------------------------------------------------------------------------------------


def _rings_path(shape: BaseGeometry) -> str:
    rings = [
        ring
        for part in shapely.get_parts(shape)
        if isinstance(part, shapely.Polygon) and not part.is_empty
        for ring in (part.exterior, *part.interiors)
    ]
    return "".join(_path(shapely.get_coordinates(ring)) for ring in rings)


def _path(points: FloatArray) -> str:
    """A closed ring, in tenths of a pixel."""
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points.tolist()) + "Z"


def _rgb(colour: str) -> tuple[int, int, int]:
    value = int(colour[1:], 16)
    return value >> 16, value >> 8 & 255, value & 255
