"""Edits: a GeoPackage that was edited in a desktop GIS → what was changed in it, by id.

The file itself says what it held when it was written (`formats.EXPORTED_TABLE`), so that nothing else is needed to
tell a feature that was deleted from one that has been annotated since.
"""

from __future__ import annotations

import contextlib
import hashlib
import sqlite3
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import shapely
from shapely import MultiPolygon, Polygon

from . import vectorize
from .earth import DECIMALS
from .errors import ExportError
from .formats import EXPORTED_TABLE, geometry_digest, wkb_in


@dataclass(frozen=True, slots=True, eq=False)
class Edit:
    """A feature as the desktop GIS left it."""

    geometry: Polygon | MultiPolygon
    """In EPSG:4326, as RFC 7946 wants it."""

    label: str

    repaired: bool = False
    """It crossed itself."""


@dataclass(frozen=True, slots=True, eq=False)
class Edits:
    """What was changed."""

    changed: Mapping[str, Edit] = field(default_factory=dict)
    """Features with another outline or label, by id."""

    deleted: frozenset[str] = frozenset()

    added: Mapping[str, Edit] = field(default_factory=dict)
    """Features that were drawn there, or split off, by the id that they get: it depends on the outline alone."""

    unreadable: Sequence[str] = ()
    """Why rows were left out."""

    def __len__(self) -> int:
        return len(self.changed) + len(self.deleted) + len(self.added)


def read_edits(path: Path) -> Edits:
    """What was changed in a GeoPackage since `export` wrote it.

    Outline and label count; other columns are Label Studio's to say. Where a feature was split, the greatest part keeps
    the id and the others are new. Raises ExportError where the file is none of ours.
    """
    if not path.exists():
        raise ExportError(f"{path} is not there")
    try:
        with contextlib.closing(sqlite3.connect(f"file:{path.resolve().as_posix()}?mode=ro", uri=True)) as database:
            before = {
                identity: (label, digest)
                for identity, label, digest in database.execute(f"SELECT id, label, digest FROM {EXPORTED_TABLE}")
            }
            (layer, column), *_ = database.execute(
                "SELECT g.table_name, g.column_name FROM gpkg_geometry_columns g JOIN layer_styles s"
                " ON s.f_table_name = g.table_name ORDER BY s.id"
            )
            quoted = ['"' + name.replace('"', '""') + '"' for name in (layer, column)]
            rows = database.execute(f"SELECT id, label, {quoted[1]} FROM {quoted[0]} ORDER BY rowid").fetchall()
    except (sqlite3.Error, ValueError) as error:
        raise ExportError(
            f"{path} is not a GeoPackage that `geoprelabel export` wrote, or its layer was renamed: {error}"
        ) from error
    return _compared(before, rows)


def _compared(
    before: Mapping[str, tuple[str, str]], rows: Sequence[tuple[str | None, str | None, bytes | None]]
) -> Edits:
    changed: dict[str, Edit] = {}
    added: dict[str, Edit] = {}
    unreadable: list[str] = []
    by_id: dict[str | None, list[tuple[str, bytes | None]]] = {}
    for identity, label, blob in rows:
        known = identity if identity in before else None
        by_id.setdefault(known, []).append((label or "", blob))
    for identity, versions in by_id.items():
        if identity is not None and len(versions) == 1:
            label, blob = versions[0]
            if (label, geometry_digest(blob)) == (before[identity][0] or "", before[identity][1]):
                continue
        edits: list[Edit] = []
        for label, blob in versions:
            try:
                edits.append(_edit(label, blob))
            except ExportError as error:
                unreadable.append(f"desktop edit of {identity or 'a new feature'}: {error}")
        edits.sort(key=lambda edit: -edit.geometry.area)
        if identity is not None and edits:
            changed[identity] = edits.pop(0)
        added.update((_id_of(edit), edit) for edit in edits)
    return Edits(changed, frozenset(set(before) - set(by_id)), added, tuple(unreadable))


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
    grid = shapely.set_precision(shapely.make_valid(drawn, method="structure", keep_collapsed=False), 10.0**-DECIMALS)
    parts = [shapely.orient_polygons(part) for part in vectorize.repair(grid)]
    if not parts:
        raise ExportError("it encloses nothing")
    return Edit(parts[0] if len(parts) == 1 else MultiPolygon(parts), label, repaired=not drawn.is_valid)


def _id_of(edit: Edit) -> str:
    return hashlib.sha256(b"drawn in a desktop GIS" + shapely.to_wkb(edit.geometry)).hexdigest()[:16]
