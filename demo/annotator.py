"""An annotator who draws what is really there: truth in lon/lat → Label Studio results for a task."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import shapely
from shapely import Polygon, STRtree
from shapely.geometry import shape

from backend import labelstudio
from backend.labelstudio import PolygonTag
from backend.tile import Region, Tile


class Truth:
    """Outlines of a GeoJSON file (EPSG:4326), by their ``label`` property or, where there is none, all of one label."""

    def __init__(self, path: Path, *, label: str = "building") -> None:
        features = json.loads(path.read_text())["features"]
        pairs = [
            (part, str((feature.get("properties") or {}).get("label") or label))
            for feature in features
            for part in shapely.get_parts(shape(feature["geometry"]))
        ]
        self.polygons: list[Polygon] = [polygon for polygon, _ in pairs]
        self.labels = [name for _, name in pairs]
        self._tree = STRtree(self.polygons)

    def on(self, tile: Tile, labels: Sequence[str], *, min_area_px: float = 4.0) -> list[Region]:
        """What of the truth lies on the tile, in its pixels, cut at its border."""
        outline = tile.outline_px()
        corners = Polygon(tile.px_to_lonlat(np.asarray(outline.exterior.coords)))
        regions = []
        for index in self._tree.query(corners, predicate="intersects"):
            if self.labels[index] in labels:
                drawn = shapely.transform(self.polygons[index], tile.lonlat_to_px)
                for part in shapely.get_parts(shapely.intersection(drawn, outline)):
                    if isinstance(part, Polygon) and part.area >= min_area_px:
                        regions.append(Region(part, self.labels[index]))
        return regions

    def agreement(self, export: Path, tasks: Sequence[Mapping[str, Any]], labels: Sequence[str]) -> tuple[float, float]:
        """Worst and mean IoU of the exported outlines with the truth, over objects wholly on those tasks' tiles.

        In degrees: IoU does not change with the scale of an axis.
        """
        ground = shapely.union_all([_ground(task) for task in tasks])
        exported = [shape(f["geometry"]) for f in json.loads(export.read_text())["features"]]
        tree = STRtree(exported)
        best = []
        for polygon, label in zip(self.polygons, self.labels, strict=True):
            if label in labels and ground.contains(polygon):
                near = [exported[index] for index in tree.query(polygon)]
                best.append(max((polygon.intersection(e).area / polygon.union(e).area for e in near), default=0.0))
        return (min(best), sum(best) / len(best)) if best else (0.0, 0.0)


def _ground(task: Mapping[str, Any]) -> Polygon:
    tile = Tile.from_task(task["data"], image_url=str(task["data"].get("image", "")))
    assert tile is not None, "the task has no place"
    # A hair wider: an object that ends at the border of two tiles lies on both together.
    return Polygon(tile.px_to_lonlat(np.asarray(tile.outline_px().buffer(0.01, join_style="mitre").exterior.coords)))


def drawn(task: Mapping[str, Any], truth: Truth, tag: PolygonTag) -> list[dict[str, Any]]:
    """The ``result`` of an annotation that outlines what is really on the task's tile."""
    tile = Tile.from_task(task["data"], image_url=labelstudio.image_of(task, tag))
    assert tile is not None, "the task has no place"
    results = labelstudio.results_of(
        truth.on(tile, [label.value for label in tag.labels]), tag, tile, task_id=task["id"]
    )
    return [{**result, "origin": "manual"} for result in results]
