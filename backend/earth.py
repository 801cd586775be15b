"""Earth: from pixels of a scene to EPSG:4326 as RFC 7946 wants it, and the record of how.

How exact is that? PROJ states an accuracy for each way from a CRS to EPSG:4326, and that figure mixes two things.

* *How well the CRS is tied to a frame of today.* OSGB36, NAD27 and DHDN are old nets with distortions of metres. Grids
  take them out; where a grid is missing, features lie metres off those that everybody else has.
* *How well that frame agrees with "WGS 84".* EPSG:4326 is an ensemble of realisations that agree within 2 m, as the
  registry itself says. National frames made with GNSS (ETRS89, NAD83(2011), JGD2011, SIRGAS 2000, …) are therefore tied
  to it by a *null* transformation, one of nothing but zeros, with an accuracy of 1 to 4 m. There can be no better one,
  since the target says no more. All GIS software takes the one for the other in this way, so that features laid over
  their imagery, in the CRS that it came in, fit to the last digit.

The gate asks for the first and records the second: an operation passes where the CRS is tied, more exactly than a
pixel, to a frame that PROJ's registry takes for WGS 84. Both are read from PROJ, not from a list of ours: `_is_null`
looks at the parameters of the operation's steps; and for an operation that leaps from an old net straight to WGS 84
(CH1903+, Amersfoort) `_frame_between` looks for a frame of the area such that going there, and taking it for WGS 84,
ends at the same place. ``docs/crs.md`` has examples.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyproj
import shapely
from pyproj.aoi import AreaOfInterest
from pyproj.database import get_database_metadata, query_crs_info
from pyproj.enums import PJType
from pyproj.transformer import TransformerGroup
from shapely import MultiPolygon, Point, Polygon, affinity
from shapely.geometry.base import BaseGeometry

from . import vectorize
from .errors import BadTile, ExportError
from .tile import FloatArray, Tile, horizontal_crs, operations, operations_to_lonlat, to_lonlat

Area = tuple[float, float, float, float]
"""West, south, east and north in degrees."""

DECIMALS = 7
"""Of degrees in GeoJSON: a centimetre. With six, polygons of 5 cm pixels become invalid."""

_MAX_BEND_PX = 0.05
"""How far an edge may leave its line on the ground by being drawn straight in lon/lat."""

_MAX_EDGE_PX = 1000.0
"""Edges are looked at in pieces of this length: over half the Earth the middle may lie right and all else wrong."""

_GEOD = pyproj.Geod(ellps="WGS84")


@dataclass(frozen=True, slots=True)
class Lineage:
    """How coordinates of one CRS became EPSG:4326."""

    crs: str
    operation: str
    accuracy_m: float | None
    """As PROJ states it, towards EPSG:4326; None where it states nothing."""

    is_best: bool
    """False where a better operation needs a grid that is not installed."""

    definition: str
    """The PROJ pipeline."""

    horizontal: str = ""
    """Name of the CRS that coordinates were taken in: of a compound CRS the horizontal part."""

    frame: str = ""
    """The reference frame that was taken for WGS 84, as PROJ's registry does; empty where none had to be."""

    frame_accuracy_m: float | None = None
    """How exactly the CRS is tied to that frame; what is left of ``accuracy_m`` is WGS 84's own vagueness."""

    grids: tuple[str, ...] = ()
    """Grids that were used."""

    missing_grids: tuple[str, ...] = ()
    """Grids that a better operation needs, and are not installed."""

    area: Area | None = None
    """Where the operation was asked for."""

    warnings: tuple[str, ...] = ()
    """What a reader of the file should know, in sentences."""


def checked_lineage(anchor: Tile, area: Area | None, *, allow_ballpark: bool = False) -> Lineage:
    """How the CRS of a scene, whose first tile is ``anchor``, is left.

    Raises ExportError where the CRS is tied less exactly than a pixel to a frame that counts as WGS 84, unless
    ``allow_ballpark``; BadTile where there is no way at all.
    """
    lineage = lineage_of(anchor, area)
    if allow_ballpark:
        return lineage
    pixel_m = anchor.gsd_m or anchor.ground_size_m()
    where = f"{anchor.scene or 'the scene'}: the way from {lineage.crs[:60]} to EPSG:4326"
    way_out = "accept that with --allow-ballpark"
    if lineage.missing_grids:
        way_out = f"install the PROJ grid {lineage.missing_grids[0]} (projsync, or PROJ_NETWORK=ON), or {way_out}"
    if _is_ballpark(lineage.operation):
        raise ExportError(f"{where} is unknown to PROJ, which can only take one datum for the other; {way_out}")
    accuracy_m = lineage.accuracy_m if lineage.frame_accuracy_m is None else lineage.frame_accuracy_m
    if accuracy_m is not None and accuracy_m > pixel_m:
        raise ExportError(
            f"{where} is accurate to {accuracy_m:.2g} m, worse than its pixel of {pixel_m:.3g} m"
            f" ({lineage.operation}); {way_out}"
        )
    return lineage


def lineage_of(anchor: Tile, area: Area | None) -> Lineage:
    """How the CRS of a scene, whose first tile is ``anchor``, is left. Raises BadTile where there is no way."""
    crs = str(anchor.crs)
    group = operations_to_lonlat(crs, area)
    used = group.transformers[0]
    accuracy_m = _stated(used.accuracy)
    frame, frame_accuracy_m = _frame_in(used)
    if not frame and accuracy_m and not _is_ballpark(used.description):
        pixel_m = anchor.gsd_m or anchor.ground_size_m()
        # Looking for a frame takes a second; an operation that is exact enough as it stands needs none.
        if accuracy_m > pixel_m:
            frame, frame_accuracy_m = _frame_between(anchor, area, at_most_m=accuracy_m)
    missing = [] if group.best_available else _missing_grids(group.unavailable_operations)
    horizontal = horizontal_crs(crs)
    return Lineage(
        crs=crs,
        operation=used.description,
        accuracy_m=accuracy_m,
        is_best=group.best_available,
        definition=used.definition,
        horizontal=horizontal.name,
        frame=frame,
        frame_accuracy_m=frame_accuracy_m,
        grids=tuple(grid.short_name for step in used.operations or () for grid in step.grids),
        missing_grids=tuple(missing),
        area=area,
        warnings=tuple(_cautions(crs, group, accuracy_m, frame, missing)),
    )


def lineage_record(lineages: Iterable[Lineage], *, made_at: str = "") -> dict[str, Any]:
    """The lineage of a file as a JSON object, for its metadata or a file beside it."""
    return {
        "target_crs": "EPSG:4326",
        **({"made_at": made_at} if made_at else {}),
        "operations": [asdict(lineage) for lineage in lineages],
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """The libraries that places depend on, and their versions."""
    import pyogrio

    from . import __version__

    return {
        "GeoPrelabel": __version__,
        "PROJ": pyproj.proj_version_str,
        "EPSG registry": get_database_metadata("EPSG.VERSION") or "unknown",
        "pyproj": pyproj.__version__,
        "GDAL": pyogrio.__gdal_version_string__,
        "GEOS": shapely.geos_version_string,
        "shapely": shapely.__version__,
    }


def _stated(accuracy: float | None) -> float | None:
    """An accuracy in metres; PROJ writes a negative one where nothing is stated."""
    return accuracy if accuracy is not None and accuracy >= 0 else None


def _is_ballpark(operation: str) -> bool:
    return "ballpark" in operation.lower()


def _is_null(step: Any) -> bool:
    """Whether a step of an operation takes one frame for another: a transformation with nothing but zeros."""
    values = [parameter.value for parameter in step.params]
    return (
        step.type_name == "Transformation"
        and _stated(step.accuracy) is not None
        and not step.grids
        and bool(values)
        and all(value == 0 for value in values)
    )


def _frame_in(operation: pyproj.Transformer) -> tuple[str, float | None]:
    """The frame that the operation itself takes for WGS 84, and how exactly (m) it gets there; empty for none."""
    steps = [step for step in operation.operations or () if step.type_name == "Transformation"]
    if not steps:
        # Nothing but a map projection, on WGS 84 itself.
        return "", _stated(operation.accuracy)
    if not _is_null(steps[-1]):
        return "", None
    before = [_stated(step.accuracy) for step in steps[:-1]]
    if None in before:
        return "", None
    ends = steps[-1].to_json_dict()
    # The inverse of "WGS 84 to X" is written with its ends already turned round.
    return str(ends["source_crs"]["name"]), float(sum(value for value in before if value is not None))


def _frame_between(anchor: Tile, area: Area | None, *, at_most_m: float) -> tuple[str, float | None]:
    """The frame of the area through which the scene's CRS is tied to WGS 84 most exactly, and how exactly (m).

    That is the stated accuracy of the way to the frame, and how far on the ground its end, taken for WGS 84, lies from
    where the operation in use ends. Empty and None where none is better than ``at_most_m``.
    """
    if area is None:
        return "", None
    corners = anchor.px_to_crs(shapely.get_coordinates(anchor.outline_px()))
    here = np.array(to_lonlat(str(anchor.crs), area).transform(*corners.T))
    best: tuple[str, float | None] = "", None
    for code, name in _frames_taken_for_wgs84(area):
        way = _way_to(str(anchor.crs), code, area)
        stated_m = _stated(way.accuracy) if way else None
        if way is None or stated_m is None or stated_m >= at_most_m:
            continue
        there = np.array(way.transform(*corners.T))
        if not np.isfinite([there, here]).all():
            continue
        # In whole centimetres: accuracies are stated in one digit.
        tied_m = round(stated_m + float(max(_GEOD.inv(*here, *there)[2])), 2)
        if tied_m < at_most_m:
            best, at_most_m = (name, tied_m), tied_m
    return best


@functools.lru_cache(maxsize=64)
def _frames_taken_for_wgs84(area: Area) -> Sequence[tuple[str, str]]:
    """Code and name of the geographic CRS in use there that PROJ's registry ties to EPSG:4326 by a null transformation.

    Without the realisations of ensembles, since the ensemble stands for them, and without frames whose places move
    with the plates, which need a date.
    """
    west, south, east, north = area
    found = query_crs_info(
        auth_name="EPSG",
        pj_types=PJType.GEOGRAPHIC_2D_CRS,
        area_of_interest=AreaOfInterest(west, south, east, north),
    )
    frames = {f"EPSG:{info.code}": pyproj.CRS.from_epsg(int(info.code)) for info in found}
    ensembles = [crs.to_json_dict().get("datum_ensemble", {}) for crs in frames.values()]
    members = {member["name"] for ensemble in ensembles for member in ensemble.get("members", ())}
    polar_m = _polar_m(pyproj.CRS.from_epsg(4326))
    taken = []
    for code, crs in frames.items():
        if crs.datum is None or crs.datum.name in members or "Dynamic" in crs.datum.type_name:
            continue
        # All other ellipsoids are tens of metres away: nothing null can lie between. This spares most of the list.
        if abs(_polar_m(crs) - polar_m) > 0.01:
            continue
        try:
            way = to_lonlat(code, area)
        except BadTile:
            continue
        frame, accuracy_m = _frame_in(way)
        if frame and accuracy_m == 0:
            taken.append((code, crs.name))
    return tuple(taken)


def _polar_m(crs: pyproj.CRS) -> float:
    """From the Earth's centre to its pole, in metres."""
    return crs.ellipsoid.semi_minor_metre if crs.ellipsoid else math.nan


@functools.lru_cache(maxsize=256)
def _way_to(crs: str, frame: str, area: Area) -> pyproj.Transformer | None:
    """The best usable operation from a CRS to a frame, longitude first; None where there is none."""
    group = operations(horizontal_crs(crs), pyproj.CRS(frame), area, allow_ballpark=False)
    return group.transformers[0] if group else None


def _missing_grids(unusable: Iterable[Any]) -> list[str]:
    """The grids that are not installed of the first operation that needs one, from the best on."""
    for operation in unusable:
        grids = [grid for step in (operation.operations or (operation,)) for grid in step.grids]
        if missing := [grid.short_name for grid in grids if not grid.available]:
            return list(dict.fromkeys(missing))
    return []


def _cautions(
    crs: str, group: TransformerGroup, accuracy_m: float | None, frame: str, missing: Sequence[str]
) -> Iterable[str]:
    """What a reader of the file should know about its places."""
    whole, part = pyproj.CRS(crs), horizontal_crs(crs)
    if whole.is_compound:
        yield f"Only the horizontal part {part.name} of {whole.name} counts; heights are left out."
    if _is_ballpark(group.transformers[0].description):
        yield f"PROJ knows no operation from {part.name} to WGS 84; one datum was taken for the other."
    elif accuracy_m is None:
        yield "How exact the operation is, is stated nowhere."
    elif frame and accuracy_m > 0:
        yield (
            f"{frame} was taken for WGS 84, as the EPSG registry does: the two agree within {accuracy_m:.2g} m, and"
            f" WGS 84 itself stands for realisations that agree within {_ensemble_accuracy_m():g} m."
        )
    if missing:
        yield f"A better operation needs grids that are not installed: {', '.join(missing)}."


@functools.cache
def _ensemble_accuracy_m() -> float:
    """How well the realisations that EPSG:4326 stands for agree, as the registry states."""
    return float(pyproj.CRS.from_epsg(4326).to_json_dict()["datum_ensemble"]["accuracy"])


def area_of(anchor: Tile, bounds: tuple[float, float, float, float]) -> Area | None:
    """West, south, east, north in whole degrees, outwards, of a box (left, top, right, bottom) in the anchor's pixels.

    None where that says nothing.
    """
    points = anchor.px_to_crs(shapely.get_coordinates(shapely.box(*bounds).exterior))
    lon, lat = to_lonlat(str(anchor.crs), None).transform(points[:, 0], points[:, 1])
    if not np.isfinite([lon, lat]).all() or np.ptp(lon) >= 180:
        return None
    west, south, east, north = math.floor(min(lon)), math.floor(min(lat)), math.ceil(max(lon)), math.ceil(max(lat))
    return west, max(south, -90), east, min(north, 90)


def area_m2(geometry: Polygon | MultiPolygon) -> float:
    """Area on the ellipsoid of a shape in lon/lat, in square metres."""
    return round(abs(_GEOD.geometry_area_perimeter(geometry)[0]), 3)


def lonlat_geometry(
    shape_px: BaseGeometry, tile: Tile, area: Area | None = None
) -> Polygon | MultiPolygon | Point | None:
    """A shape in pixels of a tile as RFC 7946 wants it: degrees, shells counter-clockwise, cut at the antimeridian.

    Edges that would bend are given more points. Coordinates lie on the grid of ``DECIMALS`` decimals, on which the
    shape is valid; None where nothing is left of it there. ``area`` picks the operation between the CRS and EPSG:4326.
    """
    transformer = to_lonlat(str(tile.crs), area)

    def ring_lonlat(ring: FloatArray) -> FloatArray:
        points = tile.px_to_crs(_unbent(ring, tile, transformer))
        x, y = transformer.transform(points[:, 0], points[:, 1])
        return np.column_stack((x, y))

    off_the_map = f"{tile.scene or 'the scene'}: an outline lies outside the area where its CRS is defined"
    if isinstance(shape_px, Point):
        x, y = transformer.transform(*tile.px_to_crs(shapely.get_coordinates(shape_px))[0])
        if not np.isfinite([x, y]).all():
            raise ExportError(off_the_map)
        return Point(round((x + 180) % 360 - 180, DECIMALS), round(y, DECIMALS))
    parts: list[Polygon] = []
    for polygon in vectorize.repair(shape_px):
        # In pixels, where the antimeridian is no matter, it is still plain which way round a ring runs.
        seen_from_above = -1.0 if tile.transform is not None and tile.transform.determinant > 0 else 1.0
        turned = shapely.geometry.polygon.orient(polygon, -seen_from_above)
        rings = [ring_lonlat(shapely.get_coordinates(ring)) for ring in (turned.exterior, *turned.interiors)]
        if not all(np.isfinite(ring).all() for ring in rings):
            raise ExportError(off_the_map)
        parts += _cut_at_antimeridian(Polygon(rings[0], rings[1:]))
    # Splitting leaves one object in two parts, and so may the grid.
    grid = shapely.set_precision(shapely.make_valid(MultiPolygon(parts)), 10.0**-DECIMALS)
    found = [shapely.geometry.polygon.orient(part) for part in vectorize.repair(grid)]
    if not found:
        return None
    return found[0] if len(found) == 1 else MultiPolygon(found)


def _unbent(ring_px: FloatArray, tile: Tile, transformer: pyproj.Transformer) -> FloatArray:
    """The ring with points added where an edge that is straight in the CRS is not straight in lon/lat."""
    if _is_straight(str(tile.crs)):
        return ring_px
    ring_px = _in_pieces(ring_px, np.hypot(*np.diff(ring_px, axis=0).T) / _MAX_EDGE_PX)
    starts, ends = ring_px[:-1], ring_px[1:]
    halves = (starts + ends) / 2
    points = tile.px_to_crs(np.concatenate((ring_px, halves)))
    lon, lat = transformer.transform(points[:, 0], points[:, 1])
    lonlat = np.column_stack((lon, lat))
    ends_lonlat, halves_lonlat = lonlat[: len(ring_px)], lonlat[len(ring_px) :]
    bend = halves_lonlat - (ends_lonlat[:-1] + ends_lonlat[1:]) / 2
    # Over the antimeridian the mean of two longitudes lies on the other side of the Earth.
    bend[:, 0] = (bend[:, 0] + 90) % 180 - 90
    metres = np.hypot(bend[:, 0] * np.cos(np.radians(halves_lonlat[:, 1])), bend[:, 1]) * 111_320
    pixel_m = tile.gsd_m or tile.ground_size_m()
    # The bend falls with the square of the number of pieces.
    return _in_pieces(ring_px, np.sqrt(np.nan_to_num(metres) / (_MAX_BEND_PX * pixel_m)))


def _in_pieces(ring: FloatArray, wanted: FloatArray) -> FloatArray:
    """The ring with each edge cut into as many pieces, rounded up."""
    pieces = np.clip(np.ceil(wanted), 1, 256).astype(int)
    if (pieces == 1).all():
        return ring
    rows = [
        start + (end - start) * np.arange(count)[:, None] / count
        for start, end, count in zip(ring[:-1], ring[1:], pieces.tolist(), strict=True)
    ]
    return np.concatenate([*rows, ring[-1:]])


@functools.lru_cache(maxsize=64)
def _is_straight(crs: str) -> bool:
    """Whether what is straight in the CRS is straight in lon/lat: not so for maps, nor for rotated poles."""
    horizontal = horizontal_crs(crs)
    return bool(horizontal.is_geographic and not horizontal.is_derived)


def _cut_at_antimeridian(polygon: Polygon) -> list[Polygon]:
    """The polygon, whose rings run as RFC 7946 wants it, as polygons within −180 to 180; round a pole up to it."""
    lon = shapely.get_coordinates(polygon.exterior)[:, 0]
    if (np.abs(np.diff(lon)) <= 180).all() and (np.abs(lon) <= 180).all():
        return [polygon]
    ground = _ground_within(shapely.get_coordinates(polygon.exterior))
    for ring in polygon.interiors:
        ground = ground.difference(_ground_within(shapely.get_coordinates(ring)[::-1]))
    return vectorize.repair(ground)


def _ground_within(ring: FloatArray) -> BaseGeometry:
    """What a counter-clockwise ring in lon/lat holds, within −180 to 180."""
    lon = np.unwrap(ring[:, 0], period=360)
    points = np.column_stack((lon, ring[:, 1]))
    turn = lon[-1] - lon[0]
    if abs(turn) > 180:
        # Once round the Earth: eastwards, the north pole lies on the left, within.
        pole = math.copysign(90, turn)
        points = np.concatenate((points, [(lon[-1], pole), (lon[0], pole)]))
    whole = shapely.union_all(vectorize.repair(Polygon(points)))
    first, last = (math.floor((edge + 180) / 360) for edge in (lon.min(), lon.max()))
    parts = [
        affinity.translate(whole.intersection(shapely.box(360 * k - 180, -90, 360 * k + 180, 90)), -360 * k)
        for k in range(first, last + 1)
    ]
    return shapely.union_all(parts)
