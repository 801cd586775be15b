"""Edits: a GeoPackage that was edited in a desktop GIS → what was changed in it, by id.

The file itself says what it held when it was written (`formats.EXPORTED_TABLE`), so that nothing else is needed to
tell a feature that was deleted from one that has been annotated since.
"""

from __future__ import annotations

import contextlib
import hashlib
import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import shapely
from shapely import MultiPolygon, Point, Polygon

from . import vectorize
from .earth import DECIMALS
from .errors import ExportError
from .formats import EXPORTED_TABLE, geometry_digest, quoted, wkb_in


@dataclass(frozen=True, slots=True, eq=False)
class Edit:
    """A feature as the desktop GIS left it."""

    geometry: Point | Polygon | MultiPolygon
    """In EPSG:4326, as RFC 7946 wants it."""

    label: str

    repaired: bool = False
    """It crossed itself."""


@dataclass(frozen=True, slots=True, eq=False)
class Edits:
    """What was changed."""

    changed: Mapping[str, Edit] = field(default_factory=dict)
    """Features with another outline, place or label, by id."""

    deleted: frozenset[str] = frozenset()

    points: frozenset[str] = frozenset()
    """Those of the file as it was written that are points."""

    added: Mapping[str, Edit] = field(default_factory=dict)
    """Features that were drawn there, or split off, by the id that they get: it depends on the geometry alone."""

    unreadable: Sequence[str] = ()
    """Why rows were left out."""

    def __len__(self) -> int:
        return len(self.changed) + len(self.deleted) + len(self.added)

    def of_outlines(self) -> Edits:
        """The same without points."""
        changed, added = (
            {identity: edit for identity, edit in edits.items() if not isinstance(edit.geometry, Point)}
            for edits in (self.changed, self.added)
        )
        return replace(self, changed=changed, added=added, deleted=self.deleted - self.points)


def read_edits(path: Path) -> Edits:
    """What was changed in a GeoPackage since `export` wrote it.

    Geometry and label count; other columns are Label Studio's to say. Where a feature was split, the greatest part
    keeps the id and the others are new; of a feature and its copy the one that stayed as it was. Raises ExportError
    where the file is none of ours.
    """
    if not path.exists():
        raise ExportError(f"{path} is not there")
    try:
        with contextlib.closing(sqlite3.connect(f"file:{path.resolve().as_posix()}?mode=ro", uri=True)) as database:
            written = database.execute(f"SELECT * FROM {EXPORTED_TABLE}").fetchall()
            (main, _), *_ = columns = database.execute(
                "SELECT g.table_name, g.column_name FROM gpkg_geometry_columns g JOIN layer_styles s"
                " ON s.f_table_name = g.table_name ORDER BY s.id"
            ).fetchall()
            # Files of earlier releases do not say what points they had; those are not read.
            before = {identity: (label, digest) for identity, label, digest, *_ in written}
            layers = dict.fromkeys([main, *(layer for *_, layer in (row[3:] or (main,) for row in written))])
            points = frozenset(row[0] for row in written if row[3:] not in ((), (main,)))
            named = dict(columns)
            rows = []
            for layer in layers:
                table, column = quoted(layer), quoted(named.get(layer, "geom"))
                rows += database.execute(f"SELECT id, label, {column} FROM {table} ORDER BY rowid").fetchall()
    except (sqlite3.Error, ValueError) as error:
        raise ExportError(
            f"{path} is not a GeoPackage that `geoprelabel export` wrote, or its layer was renamed: {error}"
        ) from error
    return replace(_compared(before, rows), points=points)


def _compared(
    before: Mapping[str, tuple[str, str]], rows: Iterable[tuple[str | None, str | None, bytes | None]]
) -> Edits:
    changed: dict[str, Edit] = {}
    added: dict[str, Edit] = {}
    unreadable: list[str] = []
    by_id: dict[str | None, list[tuple[str, bytes | None]]] = {}
    for identity, label, blob in rows:
        known = identity if identity in before else None
        by_id.setdefault(known, []).append((label or "", blob))
    for identity, versions in by_id.items():
        as_before = (before[identity][0] or "", before[identity][1]) if identity is not None else None
        edits: list[tuple[bool, Edit]] = []
        is_known = [(label, geometry_digest(blob)) == as_before for label, blob in versions]
        if is_known == [True]:
            continue
        for (label, blob), same in zip(versions, is_known, strict=True):
            try:
                edits.append((same, _edit(label, blob)))
            except ExportError as error:
                unreadable.append(f"desktop edit of {identity or 'a new feature'}: {error}")
        edits.sort(key=lambda edit: (not edit[0], -edit[1].geometry.area))
        if identity is not None and edits:
            same, kept = edits.pop(0)
            changed |= {} if same else {identity: kept}
        added.update((_id_of(edit), edit) for _, edit in edits)
    return Edits(changed, frozenset(set(before) - set(by_id)), added=added, unreadable=tuple(unreadable))


def _edit(label: str, blob: bytes | None) -> Edit:
    try:
        drawn = shapely.force_2d(shapely.from_wkb(wkb_in(blob))) if blob else None
    except shapely.errors.ShapelyError as error:
        raise ExportError("its geometry cannot be read") from error
    if drawn is None or drawn.is_empty:
        raise ExportError("it has no geometry")
    west, south, east, north = drawn.bounds
    if not (-180 <= west <= east <= 180 and -90 <= south <= north <= 90):
        raise ExportError(f"it lies off the Earth: west {west:g}, south {south:g}, east {east:g}, north {north:g}")
    if isinstance(drawn, Point):
        return Edit(shapely.set_precision(drawn, 10.0**-DECIMALS), label)
    grid = shapely.set_precision(shapely.make_valid(drawn, method="structure", keep_collapsed=False), 10.0**-DECIMALS)
    parts = [shapely.orient_polygons(part) for part in vectorize.repair(grid)]
    if not parts:
        raise ExportError("it encloses nothing")
    return Edit(parts[0] if len(parts) == 1 else MultiPolygon(parts), label, repaired=not drawn.is_valid)


def _id_of(edit: Edit) -> str:
    return hashlib.sha256(b"drawn in a desktop GIS" + shapely.to_wkb(edit.geometry)).hexdigest()[:16]
