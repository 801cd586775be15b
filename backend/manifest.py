"""The list of a run's tiles as GeoParquet: where each lies on Earth and how much of it holds no data."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyproj
import shapely
from shapely import MultiPolygon, Polygon

from .tile import Tile

_ROWS_AT_ONCE = 1024
_SIDES = ("west", "south", "east", "north")


class Manifest:
    """A GeoParquet 1.1 file of one row a tile, written as they come: memory does not grow with their number."""

    def __init__(self, path: Path) -> None:
        """Begin the file."""
        import pyarrow as pa
        from pyarrow import parquet

        box = pa.struct([(side, pa.float64()) for side in ("xmin", "ymin", "xmax", "ymax")])
        self._schema = pa.schema(
            [
                ("scene", pa.string()),
                ("name", pa.string()),
                ("window", pa.list_(pa.int64())),
                *((side, pa.float64()) for side in _SIDES),
                ("nodata_share", pa.float64()),
                ("geometry", pa.binary()),
                ("bbox", box),
            ]
        )
        self._writer = parquet.ParquetWriter(path, self._schema, compression="zstd")
        self._rows: list[dict[str, Any]] = []
        self._box = np.array([np.inf, np.inf, -np.inf, -np.inf])
        self._kinds: set[str] = set()

    def __enter__(self) -> Manifest:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._flush()
                self._writer.add_key_value_metadata({"geo": json.dumps(self._metadata())})
        finally:
            self._writer.close()

    def append(self, tile: Tile, name: str, nodata_share: float) -> None:
        """Add a tile; ``name`` is its image's within the scene's folder. One without a place has no outline."""
        row = {"scene": tile.scene, "name": name, "window": list(tile.window or ()), "nodata_share": nodata_share}
        if tile.has_place:
            outline = lonlat_outline(tile)
            box = outline.bounds
            self._box = np.concatenate((np.minimum(self._box, box)[:2], np.maximum(self._box, box)[2:]))
            self._kinds.add(outline.geom_type)
            row |= {
                **dict(zip(_SIDES, _west_south_east_north(outline), strict=True)),
                "geometry": shapely.to_wkb(outline),
                "bbox": dict(zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True)),
            }
        self._rows.append(row)
        if len(self._rows) >= _ROWS_AT_ONCE:
            self._flush()

    def _flush(self) -> None:
        import pyarrow as pa

        if self._rows:
            self._writer.write_table(pa.Table.from_pylist(self._rows, schema=self._schema))
            self._rows = []

    def _metadata(self) -> dict[str, Any]:
        sides = ("xmin", "ymin", "xmax", "ymax")
        geometry = {
            "encoding": "WKB",
            "geometry_types": sorted(self._kinds),
            "crs": pyproj.CRS("EPSG:4326").to_json_dict(),
            "covering": {"bbox": {side: ["bbox", side] for side in sides}},
            **({"bbox": self._box.tolist()} if self._kinds else {}),
        }
        return {"version": "1.1.0", "primary_column": "geometry", "columns": {"geometry": geometry}}


def lonlat_outline(tile: Tile) -> Polygon | MultiPolygon:
    """The tile's border on Earth, cut in two where it crosses the antimeridian."""
    border = shapely.get_coordinates(tile.outline_px().segmentize(max(tile.size) / 4))
    ring: Any = tile.px_to_lonlat(border)
    if np.abs(ring[:, 0]).max() > 180:
        # A scene in degrees may count on beyond 180.
        ring = np.column_stack(((ring[:, 0] + 180) % 360 - 180, ring[:, 1]))
    if np.ptp(ring[:, 0]) <= 180:
        return Polygon(ring)
    import antimeridian

    ring = ring[:: 1 if tile.transform and tile.transform.determinant > 0 else -1]
    return antimeridian.fix_polygon(Polygon(ring))


def _west_south_east_north(outline: Polygon | MultiPolygon) -> Sequence[float]:
    """Bounds as in RFC 7946: west is greater than east where the outline crosses the antimeridian."""
    west, south, east, north = outline.bounds
    if isinstance(outline, MultiPolygon) and east - west > 180:
        west = min(part.bounds[0] for part in outline.geoms if part.bounds[0] > 0)
        east = max(part.bounds[2] for part in outline.geoms if part.bounds[2] < 0)
    return west, south, east, north
