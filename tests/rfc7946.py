"""A judge of GeoJSON, written from the text of RFC 7946 and from nothing of ours: one function for each rule.

``broken_rules(text)`` gives the section and the fault of everything that a file does wrong. What the RFC says SHOULD or
SHOULD NOT be is judged too, since exports keep to it; those rules are marked.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

Json = Any
Rule = Callable[[Json], Iterator[str]]

GEOMETRY_DEPTHS = {
    "Point": 0,
    "MultiPoint": 1,
    "LineString": 1,
    "MultiLineString": 2,
    "Polygon": 2,
    "MultiPolygon": 3,
}
"""How many arrays lie around a position in ``coordinates``."""

GEOMETRIES = (*GEOMETRY_DEPTHS, "GeometryCollection")
TYPES = (*GEOMETRIES, "Feature", "FeatureCollection")

RULES: list[tuple[str, Rule]] = []


@dataclass(frozen=True, slots=True)
class Broken:
    """A rule that a text breaks."""

    section: str
    fault: str


def rule(section: str) -> Callable[[Rule], Rule]:
    """Makes a function a rule of the judge. It is called with every GeoJSON object of a text, the outermost first."""

    def register(function: Rule) -> Rule:
        RULES.append((section, function))
        return function

    return register


def broken_rules(text: str | bytes) -> list[Broken]:
    """Everything that a GeoJSON text does wrong; an empty list for a sound one."""
    try:
        content = text.decode("utf-8") if isinstance(text, bytes) else text
        root = json.loads(content, parse_constant=_no_number)
    except (UnicodeDecodeError, ValueError) as error:
        return [Broken("2", f"a GeoJSON text is a JSON text: {error}")]
    if not isinstance(root, dict) or root.get("type") not in TYPES:
        return [Broken("3", f"a GeoJSON object is a JSON object whose type is one of {', '.join(TYPES)}")]
    return [Broken(section, fault) for item in objects(root) for section, check in RULES for fault in check(item)]


def _no_number(name: str) -> Json:
    raise ValueError(f"{name} is no JSON number")


def objects(item: Json) -> Iterator[Json]:
    """The GeoJSON object and those within it, as far as they are where they belong."""
    if not isinstance(item, dict):
        return
    yield item
    within: list[Json] = []
    match item.get("type"):
        case "FeatureCollection":
            within = item["features"] if isinstance(item.get("features"), list) else []
        case "Feature":
            within = [item.get("geometry")]
        case "GeometryCollection":
            within = item["geometries"] if isinstance(item.get("geometries"), list) else []
    for inner in within:
        yield from objects(inner)


def _is_number(value: Json) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def positions(coordinates: Json, depth: int) -> Iterator[Json]:
    """The positions in ``coordinates``, which lie in that many arrays."""
    if depth == 0:
        yield coordinates
    elif isinstance(coordinates, list):
        for inner in coordinates:
            yield from positions(inner, depth - 1)


def sound_positions(item: Json) -> list[list[float]]:
    """The positions of a geometry and of what it is made of, those that are positions."""
    found: list[list[float]] = []
    for part in objects(item):
        depth = GEOMETRY_DEPTHS.get(part.get("type")) if isinstance(part.get("type"), str) else None
        if depth is not None:
            found += [p for p in positions(part.get("coordinates"), depth) if not list(position_faults(p))]
    return found


def polygons(item: Json) -> Iterator[list[Json]]:
    """The arrays of rings of a Polygon or MultiPolygon."""
    coordinates = item.get("coordinates")
    if item.get("type") == "Polygon":
        yield coordinates if isinstance(coordinates, list) else []
    elif item.get("type") == "MultiPolygon" and isinstance(coordinates, list):
        yield from (rings for rings in coordinates if isinstance(rings, list))


def sound_rings(rings: list[Json]) -> list[list[list[float]]]:
    return [ring for ring in rings if isinstance(ring, list) and not any(f for p in ring for f in position_faults(p))]


# Types ----------------------------------------------------------------------------------------------------------------


@rule("1.4")
def types_are_case_sensitive_names(item: Json) -> Iterator[str]:
    """'inside this document, the term "geometry type" refers to seven case-sensitive strings'; so does GeoJSON type."""
    if item.get("type") not in TYPES:
        yield f"type must be one of {', '.join(TYPES)}, got {item.get('type')!r}"


@rule("3.1")
def a_geometry_has_coordinates(item: Json) -> Iterator[str]:
    """'A GeoJSON Geometry object of any type other than "GeometryCollection" has a member "coordinates"', an array."""
    if item.get("type") in GEOMETRY_DEPTHS and not isinstance(item.get("coordinates"), list):
        yield f"{item['type']} needs an array of coordinates"


# Positions ------------------------------------------------------------------------------------------------------------


def position_faults(position: Json) -> Iterator[str]:
    if not isinstance(position, list):
        yield f"a position is an array, got {position!r:.60}"
    elif len(position) < 2:
        yield f"a position has two or more elements, got {position}"
    elif not all(map(_is_number, position)):
        yield f"the elements of a position are numbers, got {position!r:.60}"


@rule("3.1.1")
def positions_are_arrays_of_two_numbers_or_more(item: Json) -> Iterator[str]:
    """'A position is an array of numbers. There MUST be two or more elements.'"""
    depth = GEOMETRY_DEPTHS.get(item.get("type"))
    if depth is not None and isinstance(item.get("coordinates"), list):
        for position in positions(item["coordinates"], depth):
            yield from position_faults(position)


@rule("3.1.1")
def coordinates_lie_in_as_many_arrays_as_the_type_says(item: Json) -> Iterator[str]:
    """3.1.2 to 3.1.7: a position, an array of positions, of arrays of positions, and so on."""
    depth = GEOMETRY_DEPTHS.get(item.get("type"))
    level = [item.get("coordinates")]
    for left in range(depth if depth is not None else -1, -1, -1):
        if not all(isinstance(inner, list) for inner in level):
            yield f"coordinates of {item['type']} must be positions in arrays, {depth} deep"
            return
        level = [inner for outer in level for inner in outer] if left else []


@rule("3.1.1")
def positions_have_no_more_than_three_elements(item: Json) -> Iterator[str]:
    """'Implementations SHOULD NOT extend positions beyond three elements'."""
    for position in sound_positions(item) if item.get("type") in GEOMETRY_DEPTHS else ():
        if len(position) > 3:
            yield f"a position should have no more than three elements, got {position}"


@rule("4")
def positions_are_longitude_and_latitude(item: Json) -> Iterator[str]:
    """'The coordinate reference system for all GeoJSON coordinates is … WGS 84, with longitude and latitude units of
    decimal degrees.'"""
    for lon, lat, *_ in sound_positions(item) if item.get("type") in GEOMETRY_DEPTHS else ():
        if not -180 <= lon <= 180 or not -90 <= lat <= 90:
            yield f"a position must be longitude −180…180 and latitude −90…90, got {lon}, {lat}"


# Lines and rings ------------------------------------------------------------------------------------------------------


@rule("3.1.4")
def a_line_has_two_positions(item: Json) -> Iterator[str]:
    """'For type "LineString", the "coordinates" member is an array of two or more positions.'"""
    lines = {"LineString": [item.get("coordinates")], "MultiLineString": item.get("coordinates")}.get(
        str(item.get("type"))
    )
    for line in lines if isinstance(lines, list) else ():
        if isinstance(line, list) and len(line) < 2:
            yield f"a line has two or more positions, got {len(line)}"


@rule("3.1.6")
def a_ring_has_four_positions(item: Json) -> Iterator[str]:
    """'A linear ring is a closed LineString with four or more positions.'"""
    for rings in polygons(item):
        for ring in rings:
            if isinstance(ring, list) and len(ring) < 4:
                yield f"a linear ring has four or more positions, got {len(ring)}"


@rule("3.1.6")
def a_ring_is_closed(item: Json) -> Iterator[str]:
    """'The first and last positions are equivalent, and they MUST contain identical values'."""
    for rings in polygons(item):
        for ring in rings:
            if isinstance(ring, list) and ring and ring[0] != ring[-1]:
                yield f"a linear ring ends where it begins, got {ring[0]} and {ring[-1]}"


@rule("3.1.6")
def a_ring_follows_the_right_hand_rule(item: Json) -> Iterator[str]:
    """'A linear ring MUST follow the right-hand rule …: exterior rings are counterclockwise, holes clockwise.'"""
    for rings in polygons(item):
        for number, ring in enumerate(sound_rings(rings)):
            twice_area = sum(
                (a[0] - ring[0][0]) * (b[1] - ring[0][1]) - (b[0] - ring[0][0]) * (a[1] - ring[0][1])
                for a, b in itertools.pairwise(ring)
            )
            if twice_area < 0 and number == 0:
                yield "an exterior ring is counterclockwise"
            if twice_area > 0 and number > 0:
                yield "a hole is clockwise"


@rule("3.1.6")
def the_first_ring_is_the_exterior_one(item: Json) -> Iterator[str]:
    """'For Polygons with more than one of these rings, the first MUST be the exterior ring, and any others MUST be
    interior rings.'"""
    for rings in polygons(item):
        boxes = [_box(ring) for ring in sound_rings(rings) if ring]
        for inner in boxes[1:]:
            outer = boxes[0]
            if inner[0] < outer[0] or inner[1] < outer[1] or inner[2] > outer[2] or inner[3] > outer[3]:
                yield "an interior ring lies within the first ring"


def _box(ring: list[list[float]]) -> tuple[float, float, float, float]:
    lon, lat = [p[0] for p in ring], [p[1] for p in ring]
    return min(lon), min(lat), max(lon), max(lat)


@rule("3.1.8")
def a_geometry_collection_has_geometries(item: Json) -> Iterator[str]:
    """'A GeoJSON object with type "GeometryCollection" … has a member with the name "geometries"', an array."""
    if item.get("type") != "GeometryCollection":
        return
    if not isinstance(item.get("geometries"), list):
        yield "a GeometryCollection needs an array of geometries"
        return
    for inner in item["geometries"]:
        if not isinstance(inner, dict) or inner.get("type") not in GEOMETRIES:
            yield f"each of the geometries is a Geometry object, got {inner!r:.60}"


@rule("3.1.9")
def no_geometry_crosses_the_antimeridian(item: Json) -> Iterator[str]:
    """'…geometries … that cross the antimeridian SHOULD be represented by cutting it in two'. An edge of more than half
    the Earth is taken for such a crossing."""
    kind = item.get("type")
    if kind not in ("LineString", "MultiLineString", "Polygon", "MultiPolygon"):
        return
    lines = positions(item.get("coordinates"), GEOMETRY_DEPTHS[kind] - 1)
    for line in sound_rings(list(lines)):
        for a, b in itertools.pairwise(line):
            along_a_pole = abs(a[1]) == abs(b[1]) == 90
            if abs(a[0] - b[0]) > 180 and not along_a_pole:
                yield f"an edge from {a} to {b} crosses the antimeridian, which should cut the geometry"


# Features -------------------------------------------------------------------------------------------------------------


@rule("3.2")
def a_feature_has_a_geometry_or_null(item: Json) -> Iterator[str]:
    """'A Feature object has a member with the name "geometry". The value … SHALL be either a Geometry object … or … a
    JSON null value.'"""
    if item.get("type") != "Feature":
        return
    if "geometry" not in item:
        yield "a Feature needs a geometry, which may be null"
    elif item["geometry"] is not None and (
        not isinstance(item["geometry"], dict) or item["geometry"].get("type") not in GEOMETRIES
    ):
        yield f"the geometry of a Feature is a Geometry object or null, got {item['geometry']!r:.60}"


@rule("3.2")
def a_feature_has_properties_or_null(item: Json) -> Iterator[str]:
    """'A Feature object has a member with the name "properties". The value … is an object (any JSON object or a JSON
    null value).'"""
    if item.get("type") != "Feature":
        return
    if "properties" not in item:
        yield "a Feature needs properties, which may be null"
    elif item["properties"] is not None and not isinstance(item["properties"], dict):
        yield f"the properties of a Feature are an object or null, got {item['properties']!r:.60}"


@rule("3.2")
def an_id_is_text_or_a_number(item: Json) -> Iterator[str]:
    """'…the value of this member is either a JSON string or number.'"""
    if (
        item.get("type") == "Feature"
        and "id" in item
        and not isinstance(item["id"], str)
        and not _is_number(item["id"])
    ):
        yield f"the id of a Feature is text or a number, got {item['id']!r:.60}"


@rule("3.3")
def a_collection_has_features(item: Json) -> Iterator[str]:
    """'A FeatureCollection object has a member with the name "features". The value … is a JSON array. Each element of
    the array is a Feature object'."""
    if item.get("type") != "FeatureCollection":
        return
    if not isinstance(item.get("features"), list):
        yield "a FeatureCollection needs an array of features"
        return
    for feature in item["features"]:
        if not isinstance(feature, dict) or feature.get("type") != "Feature":
            yield f"each of the features is a Feature object, got {feature!r:.60}"


# CRS and bounding box -------------------------------------------------------------------------------------------------


@rule("4")
def there_is_no_other_crs(item: Json) -> Iterator[str]:
    """'…the use of alternative coordinate reference systems … has been removed from this version of the
    specification': a ``crs`` member of the GeoJSON of 2008 means one."""
    if "crs" in item:
        yield "the crs member is gone; all coordinates are WGS 84"


@rule("5")
def a_bbox_is_an_array_of_twice_the_dimensions(item: Json) -> Iterator[str]:
    """'The value of the bbox member MUST be an array of length 2*n where n is the number of dimensions represented in
    the contained geometries, with all axes of the most southwesterly point followed by all axes of the more
    northeasterly point.'"""
    if "bbox" not in item:
        return
    box = item["bbox"]
    if not isinstance(box, list) or not all(map(_is_number, box)):
        yield f"a bbox is an array of numbers, got {box!r:.60}"
        return
    dimensions = max((len(position) for position in sound_positions(item)), default=len(box) // 2)
    if len(box) != 2 * dimensions or len(box) not in (4, 6):
        yield f"a bbox has 2 × {dimensions} numbers, got {len(box)}"


@rule("5")
def a_bbox_goes_from_south_to_north(item: Json) -> Iterator[str]:
    """5 and 5.3: 'with the most southwesterly point … first'; latitudes of −90 to 90. West may exceed east (5.2)."""
    if box := _flat_box(item):
        west, south, east, north = box
        if south > north:
            yield f"a bbox goes from south to north, got {south} to {north}"
        if not (-180 <= west <= 180 and -180 <= east <= 180 and -90 <= south <= 90 and -90 <= north <= 90):
            yield f"a bbox lies on the Earth, got {item['bbox']}"


@rule("5")
def a_bbox_holds_the_geometries_and_no_more(item: Json) -> Iterator[str]:
    """'…information on the coordinate range for its Geometries, Features, or FeatureCollections', to a millimetre."""
    box = _flat_box(item)
    found = sound_positions(item)
    if not box or not found:
        return
    west, south, east, north = box
    near = 1e-8
    # Over the antimeridian longitudes count on (5.2).
    lon = [p[0] + 360 if west > east and p[0] < west - near else p[0] for p in found]
    lat = [p[1] for p in found]
    true = (min(lon), min(lat), max(lon), max(lat))
    said = (west, south, east + 360 if west > east else east, north)
    if any(abs(a - b) > near for a, b in zip(true, said, strict=True)):
        yield f"the bbox {item['bbox']} is not that of the coordinates, {true}"


@rule("5.2")
def a_bbox_over_the_antimeridian_is_narrow(item: Json) -> Iterator[str]:
    """The RFC's example: what lies on both sides of the antimeridian has a bbox whose west exceeds its east, where that
    is the narrower one."""
    box = _flat_box(item)
    found = sorted({p[0] for p in sound_positions(item)})
    if not box or not found or found[0] != -180 or found[-1] != 180:
        return
    gap = max((b - a for a, b in itertools.pairwise(found)), default=0)
    if gap > 180 and box[0] <= box[2]:
        yield f"the bbox {item['bbox']} goes round the Earth; from west to east over the antimeridian it is narrower"


def _flat_box(item: Json) -> tuple[float, float, float, float] | None:
    box = item.get("bbox")
    if not isinstance(box, list) or len(box) not in (4, 6) or not all(map(_is_number, box)):
        return None
    half = len(box) // 2
    return box[0], box[1], box[half], box[half + 1]


# Members --------------------------------------------------------------------------------------------------------------

_FORBIDDEN = {
    **dict.fromkeys(GEOMETRIES, ("geometry", "properties", "features")),
    "Feature": ("coordinates", "geometries", "features"),
    "FeatureCollection": ("coordinates", "geometries", "geometry", "properties"),
}


@rule("7.1")
def members_that_define_one_type_are_not_on_another(item: Json) -> Iterator[str]:
    """'Implementations MUST NOT change the semantics of GeoJSON members and types': 'A GeoJSON Geometry object … MUST
    NOT contain a "geometry" or "properties" member', a Feature no "features", "coordinates" or "geometries", a
    FeatureCollection no "coordinates", "geometries", "geometry" or "properties"."""
    kind = item.get("type")
    for name in _FORBIDDEN.get(kind, ()) if isinstance(kind, str) else ():
        if name in item:
            yield f"a {kind} has no member {name}"


@rule("11.2")
def coordinates_have_no_needless_precision(item: Json) -> Iterator[str]:
    """11.2: 'Implementations should consider the cost of using a greater precision than necessary.' Nine decimals are
    a tenth of a millimetre."""
    for lon, lat, *_ in sound_positions(item) if item.get("type") in GEOMETRY_DEPTHS else ():
        if round(lon, 9) != lon or round(lat, 9) != lat:
            yield f"{lon}, {lat} is more precise than a tenth of a millimetre"
            return
