"""What RFC 7946 asks of GeoJSON, object by object. Section numbers are the RFC's."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

GEOMETRIES = (
    "Point",
    "MultiPoint",
    "LineString",
    "MultiLineString",
    "Polygon",
    "MultiPolygon",
    "GeometryCollection",
)
_DEPTH = {"Point": 0, "MultiPoint": 1, "LineString": 1, "MultiLineString": 2, "Polygon": 2, "MultiPolygon": 3}
"""How many lists lie round a position in ``coordinates``."""

_FOREIGN_TO = {
    "FeatureCollection": ("coordinates", "geometries", "geometry", "properties"),
    "Feature": ("coordinates", "geometries", "features"),
    "geometry": ("geometry", "properties", "features"),
}
"""Members that make an object something else (7.1)."""


def collection_faults(members: Mapping[str, Any]) -> list[str]:
    """What is wrong with a FeatureCollection, its features aside."""
    faults = []
    if members.get("type") != "FeatureCollection":
        faults.append(f"type must be FeatureCollection, got {members.get('type')!r:.40} (section 3)")
    if not isinstance(members.get("features"), Sequence) or isinstance(members.get("features"), str):
        faults.append("features must be an array (section 3.3)")
    return [*faults, *_common_faults(members, "FeatureCollection")]


def feature_faults(feature: Any) -> list[str]:
    """What is wrong with a Feature and its geometry."""
    if not isinstance(feature, Mapping):
        return [f"a feature must be an object, got {type(feature).__name__} (section 3.2)"]
    faults = []
    if feature.get("type") != "Feature":
        faults.append(f"type must be Feature, got {feature.get('type')!r:.40} (section 3.2)")
    if "properties" not in feature:
        faults.append("has no properties member (section 3.2)")
    elif feature["properties"] is not None and not isinstance(feature["properties"], Mapping):
        faults.append("properties must be an object or null (section 3.2)")
    if "id" in feature and (isinstance(feature["id"], bool) or not isinstance(feature["id"], (str, int, float))):
        faults.append("id must be a string or a number (section 3.2)")
    faults += _common_faults(feature, "Feature")
    if "geometry" not in feature:
        faults.append("has no geometry member (section 3.2)")
    elif feature["geometry"] is not None:
        faults += geometry_faults(feature["geometry"])
    return faults


def geometry_faults(geometry: Any) -> list[str]:
    """What is wrong with a geometry: type, positions, rings and their direction."""
    if not isinstance(geometry, Mapping):
        return [f"a geometry must be an object, got {type(geometry).__name__} (section 3.1)"]
    kind = geometry.get("type")
    if kind not in GEOMETRIES:
        return [f"geometry type must be one of {', '.join(GEOMETRIES)}, got {kind!r:.40} (section 3.1)"]
    faults = _common_faults(geometry, "geometry")
    if kind == "GeometryCollection":
        parts = geometry.get("geometries")
        if not isinstance(parts, list):
            return [*faults, "geometries must be an array (section 3.1.8)"]
        # One level is all that the RFC advises; what lies deeper is said rather than followed.
        for part in parts:
            if isinstance(part, Mapping) and part.get("type") == "GeometryCollection":
                faults.append("a GeometryCollection lies in another (section 3.1.8)")
            else:
                faults += geometry_faults(part)
        return faults
    if "coordinates" not in geometry:
        return [*faults, "has no coordinates member (section 3.1)"]
    coordinates = geometry["coordinates"]
    depth = _DEPTH[kind]
    wrong = next(_wrong_positions(coordinates, depth), None)
    if wrong:
        return [*faults, wrong]
    if kind in ("LineString", "MultiLineString"):
        lines = [coordinates] if kind == "LineString" else coordinates
        if any(len(line) < 2 for line in lines):
            faults.append("a LineString needs two or more positions (section 3.1.4)")
    if kind in ("Polygon", "MultiPolygon"):
        for rings in [coordinates] if kind == "Polygon" else coordinates:
            for number, ring in enumerate(rings):
                faults += _ring_faults(ring, is_hole=number > 0)
    return faults


def _common_faults(members: Mapping[str, Any], kind: str) -> list[str]:
    faults = [f"a {kind} must not have a {name} member (section 7.1)" for name in _FOREIGN_TO[kind] if name in members]
    if "crs" in members:
        faults.append("has a crs member: coordinates are always WGS 84 longitude and latitude (section 4)")
    if "bbox" in members:
        faults += _bbox_faults(members["bbox"])
    return faults


def _bbox_faults(bbox: Any) -> list[str]:
    if not isinstance(bbox, list) or len(bbox) not in (4, 6, 8) or not all(_is_number(value) for value in bbox):
        return [f"bbox must be an array of 2*n numbers, got {bbox!r:.60} (section 5)"]
    half = len(bbox) // 2
    # West may be greater than east where the box crosses the antimeridian (5.2); south is never north of north.
    if any(low > high for low, high in zip(bbox[1:half], bbox[half + 1 :], strict=True)):
        return [f"bbox must name the south-westerly corner first, got {bbox} (section 5)"]
    return []


def _wrong_positions(value: Any, depth: int) -> Iterator[str]:
    if depth == 0:
        if not isinstance(value, list) or len(value) < 2 or not all(_is_number(number) for number in value):
            yield f"a position must be two or more numbers, got {value!r:.60} (section 3.1.1)"
        elif len(value) > 3:
            yield f"a position should have no more than three numbers, got {len(value)} (section 3.1.1)"
    elif depth == 1 and isinstance(value, list) and all(map(_is_plain, value)):
        return
    elif not isinstance(value, list):
        yield f"coordinates must be nested arrays of positions, got {value!r:.60} (section 3.1)"
    else:
        for inner in value:
            yield from _wrong_positions(inner, depth - 1)


def _is_plain(position: Any) -> bool:
    """Whether a position is what nearly all are: two finite floats. Told faster than by all the rules."""
    if type(position) is not list or len(position) != 2:
        return False
    x, y = position
    return type(x) is float and type(y) is float and abs(x) < math.inf and abs(y) < math.inf


def _ring_faults(ring: Sequence[Sequence[float]], *, is_hole: bool) -> list[str]:
    if len(ring) < 4:
        return [f"a linear ring needs four or more positions, got {len(ring)} (section 3.1.6)"]
    if ring[0] != ring[-1]:
        return ["a linear ring is not closed: first and last position differ (section 3.1.6)"]
    x0, y0 = ring[0][:2]
    twice_area = math.fsum((a[0] - x0) * (b[1] - y0) - (b[0] - x0) * (a[1] - y0) for a, b in itertools.pairwise(ring))
    if twice_area and (twice_area > 0) == is_hole:
        way = "a hole runs counter-clockwise" if is_hole else "an exterior ring runs clockwise"
        return [f"{way}, against the right-hand rule (section 3.1.6)"]
    return []


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
