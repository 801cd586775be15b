"""Polygons that are there already: those that say which tiles are wanted, and those that become pre-annotations."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyproj
import shapely
from numpy.typing import NDArray
from shapely import Polygon

from . import vectorize
from .errors import BadScene, BadTile
from .labelstudio import LabelConfig, PolygonTag, prediction_of, results_of
from .tile import WEB_MERCATOR_HALF_M, Region, Tile, checked_crs, to_lonlat

if TYPE_CHECKING:
    from geopandas import GeoDataFrame

MAX_VERTICES = vectorize.VectorizeOptions().max_vertices

_LONGEST_EDGE_M = 1000.0
"""An edge that is straight in one CRS is bent in another: by 2 cm over this length."""

_LEAST_AREA_PX = 1.0


@dataclass(frozen=True, slots=True)
class Labelled:
    """A file of polygons that are to be pre-annotations."""

    path: Path
    tag: PolygonTag

    label: str = ""
    """Of all of them, as the tag spells it; empty: ``field`` says."""

    field: str = ""
    """The attribute that holds the label."""

    version: str = ""
    """The model version that the predictions carry: the file's name and the beginning of its checksum."""

    @classmethod
    def of(cls, path: Path, config: LabelConfig, *, label: str = "", field: str = "") -> Labelled:
        """Checked against the label config. Raises BadScene with the labels that there are."""
        if not path.is_file():
            raise BadScene(f"{path} is not there")
        offered = [item.value for tag in config.tags for item in tag.labels]
        if not label and not field and len(set(offered)) == 1:
            label = offered[0]
        if not label and not field:
            raise BadScene(f"{path.name}: which label do its polygons get? --prelabel-label {' or '.join(offered)}")
        tag = next((tag for tag in config.tags if tag.label_named(label)), None) if label else config.tags[0]
        if tag is None:
            raise BadScene(f"the label config has no label {label!r}; it has {', '.join(offered)}")
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        return cls(path, tag, tag.label_named(label) or "", field, f"{path.name[:100]}@{digest[:8]}")


class Outlines:
    """Polygons of a file that lie on a scene, found by tile."""

    def __init__(
        self, polygons_px: NDArray[np.object_], labels: NDArray[np.object_], names: NDArray[np.object_]
    ) -> None:
        self.polygons_px = polygons_px
        """In pixels of the scene's grid, valid, (N,)."""

        self.labels = labels
        self.names = names
        """Empty, or shared by the parts of one feature."""

        self._tree = shapely.STRtree(polygons_px)
        shapely.prepare(polygons_px)

    def __len__(self) -> int:
        return len(self.polygons_px)

    def touch(self, window: tuple[int, int, int, int]) -> bool:
        """Whether one of them covers some of those scene pixels."""
        return bool(len(self._on(window)))

    def prediction(self, tile: Tile, labelled: Labelled, task_name: str) -> dict[str, Any] | None:
        """What lies on the tile as a prediction of Label Studio, None where nothing does.

        Clipped to the tile; holes go out bridged; what has too many points for Label Studio's page is cut in parts of
        one object.
        """
        assert tile.window is not None
        column, row = tile.window[:2]
        box = tile.outline_px()
        regions: list[Region] = []
        for number in self._on(tile.window):
            moved = shapely.transform(self.polygons_px[number], lambda points: points - (column, row))
            kept = vectorize.repair(shapely.intersection(moved, box))
            kept = [part for part in kept if part.area >= _LEAST_AREA_PX]
            parts = [small for part in kept for small in vectorize.cut_up(part, MAX_VERTICES)]
            name = self.names[number] or (f"{labelled.version}:{number}" if len(parts) > len(kept) else "")
            regions += [Region(part, self.labels[number], object_id=name) for part in parts]
        if not regions:
            return None
        meta = {"source": labelled.path.name}
        results = results_of(
            regions, labelled.tag, tile, meta=meta, task_id=f"{tile.scene}/{task_name}", version=labelled.version
        )
        return prediction_of(results, version=labelled.version)

    def _on(self, window: tuple[int, int, int, int]) -> NDArray[np.int64]:
        column, row, columns, rows = window
        box = shapely.box(column, row, column + columns, row + rows)
        near = np.sort(self._tree.query(box))
        # Those that only touch the border cover nothing.
        inner = shapely.box(column + 1e-6, row + 1e-6, column + columns - 1e-6, row + rows - 1e-6)
        return np.asarray(near[shapely.intersects(self.polygons_px[near], inner)], np.int64)


def outlines_on(path: Path, scene: Tile, labelled: Labelled | None = None) -> tuple[Outlines, Mapping[str, int]]:
    """The polygons of a vector file, in any CRS, that lie on the scene; and why others were left out, how often.

    ``scene`` is the whole scene as a tile. Raises BadScene where the file cannot be read or has no CRS.
    """
    frame = _read(path, scene)
    left_out: dict[str, int] = {}
    labels = np.full(len(frame), labelled.label if labelled else "", dtype=object)
    if labelled and labelled.field:
        if labelled.field not in frame.columns:
            there = ", ".join(str(name) for name in frame.columns if name != frame.geometry.name) or "none"
            raise BadScene(f"{path.name} has no attribute {labelled.field!r}; it has {there}")
        found = [labelled.tag.label_named(str(value)) for value in frame[labelled.field]]
        labels[:] = [name or labelled.label for name in found]
    polygons: list[Polygon] = []
    which: list[int] = []
    for number, geometry in enumerate(_in_pixels(frame, scene)):
        if geometry is None or geometry.is_empty or shapely.get_dimensions(geometry) != 2:
            left_out["no polygons"] = left_out.get("no polygons", 0) + 1
        elif labelled and not labels[number]:
            left_out["a label that the config lacks"] = left_out.get("a label that the config lacks", 0) + 1
        else:
            parts = vectorize.repair(geometry)
            polygons += parts
            which += [number] * len(parts)
    counts = np.bincount(which, minlength=len(frame)) if which else np.zeros(len(frame), int)
    names = [f"{labelled.version if labelled else ''}:{frame.index[i]}" if counts[i] > 1 else "" for i in which]
    outlines = Outlines(
        np.array(polygons, dtype=object), labels[which] if which else labels[:0], np.array(names, dtype=object)
    )
    return outlines, left_out


def _read(path: Path, scene: Tile) -> GeoDataFrame:
    """The features near the scene; only those, where the format has an index."""
    import geopandas
    import pyogrio

    if not path.is_file():
        raise BadScene(f"{path} is not there")
    try:
        if path.suffix.casefold() == ".parquet":
            frame = geopandas.read_parquet(path)
            crs = frame.crs
        else:
            layers = [
                name for name, kind in pyogrio.list_layers(path) if kind == "Unknown" or "Polygon" in (kind or "")
            ]
            layer = layers[0] if layers else None
            crs = pyogrio.read_info(path, layer=layer)["crs"]
            box = _bounds_in(scene, crs, path) if crs else None
            frame = pyogrio.read_dataframe(path, layer=layer, bbox=box, fid_as_index=True)
    except BadScene:
        raise
    except Exception as error:  # each driver raises its own
        raise BadScene(f"{path} cannot be read as polygons: {error}") from error
    if crs is None or not hasattr(frame, "geometry"):
        raise BadScene(
            f"{path.name} has no {'CRS' if crs is None else 'geometry'}; its polygons have no place on Earth"
        )
    return frame.to_crs(crs) if frame.crs is None else frame


def _bounds_in(scene: Tile, crs: Any, path: Path) -> tuple[float, float, float, float] | None:
    """The scene's bounds in another CRS, with some room; None where they cannot be told."""
    width, height = scene.size
    border = shapely.get_coordinates(shapely.box(0, 0, width, height).segmentize(max(width, height) / 16))
    lonlat = scene.px_to_lonlat(border)
    if np.ptp((lonlat[:, 0] + 180) % 360) > 180:
        return None
    try:
        back = to_lonlat(_crs_text(crs), None)
    except BadTile as error:
        raise BadScene(f"{path.name}: {error}") from error
    x, y = back.transform(lonlat[:, 0], lonlat[:, 1], direction="INVERSE")
    if not np.isfinite([x, y]).all():
        return None
    room = 0.05 * max(np.ptp(x), np.ptp(y))
    return float(min(x) - room), float(min(y) - room), float(max(x) + room), float(max(y) + room)


def _in_pixels(frame: GeoDataFrame, scene: Tile) -> NDArray[np.object_]:
    """The features' shapes in pixels of the scene's grid."""
    text = _crs_text(frame.crs)
    shapes = shapely.force_2d(np.asarray(frame.geometry.array, dtype=object))
    if text == scene.crs:
        return np.asarray(shapely.transform(shapes, lambda points: _near(scene.crs_to_px(points), scene)), dtype=object)
    unit_m = frame.crs.axis_info[0].unit_conversion_factor if not frame.crs.is_geographic else math.radians(6_378_137.0)
    shapes = shapely.segmentize(shapes, _LONGEST_EDGE_M / (unit_m or 1.0))
    forth = to_lonlat(text, None)

    def to_px(points: NDArray[np.float64]) -> NDArray[np.float64]:
        return _near(scene.lonlat_to_px(np.column_stack(forth.transform(points[:, 0], points[:, 1]))), scene)

    return np.asarray(shapely.transform(shapes, to_px), dtype=object)


def _near(points_px: NDArray[np.float64], scene: Tile) -> NDArray[np.float64]:
    """Pixels of the scene, (N, 2), on that side of the antimeridian where it goes on: PROJ ends the world at ±180."""
    assert scene.crs is not None
    if pyproj.CRS.from_user_input(scene.crs).is_geographic:
        world = 360.0
    elif scene.crs == "EPSG:3857":
        world = 2 * WEB_MERCATOR_HALF_M
    else:
        return points_px
    ends_px = scene.crs_to_px(np.array([(0.0, 0.0), (world, 0.0)]))
    round_px = ends_px[1] - ends_px[0]
    turns = np.rint((np.asarray(scene.size) / 2 - points_px) @ round_px / (round_px @ round_px))
    near_px: NDArray[np.float64] = points_px + turns[:, None] * round_px
    return near_px


def _crs_text(crs: Any) -> str:
    parsed = pyproj.CRS.from_user_input(crs)
    if parsed.is_compound:
        parsed = parsed.sub_crs_list[0]
    authority = parsed.to_authority(min_confidence=100)
    return checked_crs(":".join(authority) if authority else parsed.to_wkt("WKT2_2019"))
