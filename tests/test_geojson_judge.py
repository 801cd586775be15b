"""The judge of tests/rfc7946.py catches a bad file for each of its rules, and our exports stand before it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import shapely
from affine import Affine
from shapely import Polygon, affinity

from backend import labelstudio
from backend.export import export
from backend.tile import Region, Tile, to_lonlat
from backend.validation import validate

from . import rfc7946
from .rfc7946 import RULES, broken_rules

TAG = labelstudio.parse_config(
    '<View><Image name="image" value="$image"/>'
    '<PolygonLabels name="polygon" toName="image"><Label value="building"/></PolygonLabels></View>'
).tags[0]

SQUARE = [[0, 0], [4, 0], [4, 4], [0, 4], [0, 0]]
HOLE = [[1, 1], [1, 2], [2, 2], [2, 1], [1, 1]]


def polygon(*rings: Any, **members: Any) -> dict[str, Any]:
    return {"type": "Polygon", "coordinates": list(rings), **members}


def feature(geometry: Any = None, **members: Any) -> dict[str, Any]:
    return {"type": "Feature", "geometry": geometry, "properties": {}, **members}


def collection(*features: Any, **members: Any) -> dict[str, Any]:
    return {"type": "FeatureCollection", "features": list(features), **members}


OVER_THE_ANTIMERIDIAN = {
    "type": "MultiPolygon",
    "coordinates": [[[[179, 0], [180, 0], [180, 1], [179, 0]]], [[[-180, 0], [-179, 0], [-180, 1], [-180, 0]]]],
}
GOOD: list[dict[str, Any]] = [
    collection(),
    collection(feature(polygon(SQUARE, HOLE), id="a", bbox=[0, 0, 4, 4]), bbox=[0, 0, 4, 4]),
    feature(None, properties=None, id=7),
    {"type": "Point", "coordinates": [1, 2, 3]},
    {"type": "MultiPoint", "coordinates": []},
    {"type": "LineString", "coordinates": [[0, 0], [1, 1]]},
    {"type": "MultiLineString", "coordinates": [[[0, 0], [1, 1]]]},
    {"type": "MultiPolygon", "coordinates": [[SQUARE], [[[x + 9, y] for x, y in ring] for ring in (SQUARE, HOLE)]]},
    {"type": "GeometryCollection", "geometries": [polygon(SQUARE), {"type": "Point", "coordinates": [0, 0]}]},
    feature(OVER_THE_ANTIMERIDIAN, bbox=[179, 0, -179, 1]),
    collection(feature(), lineage={"made_by": "a foreign member is allowed (6.1)"}),
]

BAD: list[tuple[str, Any]] = [
    ("types_are_case_sensitive_names", collection(feature({"type": "polygon", "coordinates": [SQUARE]}))),
    ("a_geometry_has_coordinates", {"type": "Polygon"}),
    ("a_geometry_has_coordinates", feature({"type": "Point", "coordinates": None})),
    ("positions_are_arrays_of_two_numbers_or_more", {"type": "Point", "coordinates": [1]}),
    ("positions_are_arrays_of_two_numbers_or_more", {"type": "Point", "coordinates": ["1", 2]}),
    ("positions_are_arrays_of_two_numbers_or_more", {"type": "Point", "coordinates": [True, 2]}),
    ("coordinates_lie_in_as_many_arrays_as_the_type_says", {"type": "Polygon", "coordinates": SQUARE}),
    ("positions_have_no_more_than_three_elements", {"type": "Point", "coordinates": [1, 2, 3, 4]}),
    ("positions_are_longitude_and_latitude", {"type": "Point", "coordinates": [354_000.0, 3_057_000.0]}),
    ("positions_are_longitude_and_latitude", {"type": "Point", "coordinates": [27.6, 95.5]}),
    ("a_line_has_two_positions", {"type": "LineString", "coordinates": [[0, 0]]}),
    ("a_line_has_two_positions", {"type": "MultiLineString", "coordinates": [[[0, 0]]]}),
    ("a_ring_has_four_positions", polygon([[0, 0], [1, 0], [0, 0]])),
    ("a_ring_is_closed", polygon([[0, 0], [4, 0], [4, 4], [0, 4]])),
    ("a_ring_is_closed", {"type": "MultiPolygon", "coordinates": [[SQUARE], [[[0, 0], [4, 0], [4, 4], [0, 4]]]]}),
    ("a_ring_follows_the_right_hand_rule", polygon(SQUARE[::-1])),
    ("a_ring_follows_the_right_hand_rule", polygon(SQUARE, HOLE[::-1])),
    ("the_first_ring_is_the_exterior_one", polygon(HOLE[::-1], SQUARE[::-1])),
    ("a_geometry_collection_has_geometries", {"type": "GeometryCollection"}),
    ("a_geometry_collection_has_geometries", {"type": "GeometryCollection", "geometries": [feature()]}),
    ("no_geometry_crosses_the_antimeridian", polygon([[-179, 0], [-179, 1], [179, 1], [179, 0], [-179, 0]])),
    ("no_geometry_crosses_the_antimeridian", {"type": "LineString", "coordinates": [[170, 45], [-170, 45]]}),
    ("a_feature_has_a_geometry_or_null", {"type": "Feature", "properties": {}}),
    ("a_feature_has_a_geometry_or_null", feature([1, 2])),
    ("a_feature_has_a_geometry_or_null", feature(feature())),
    ("a_feature_has_properties_or_null", {"type": "Feature", "geometry": None}),
    ("a_feature_has_properties_or_null", feature(properties=[])),
    ("an_id_is_text_or_a_number", feature(id=None)),
    ("an_id_is_text_or_a_number", feature(id=["a"])),
    ("a_collection_has_features", {"type": "FeatureCollection"}),
    ("a_collection_has_features", collection(polygon(SQUARE))),
    ("there_is_no_other_crs", collection(crs={"type": "name", "properties": {"name": "EPSG:32645"}})),
    ("a_bbox_is_an_array_of_twice_the_dimensions", polygon(SQUARE, bbox=[0, 0, 0, 4, 4, 0])),
    ("a_bbox_is_an_array_of_twice_the_dimensions", polygon(SQUARE, bbox="0,0,4,4")),
    ("a_bbox_goes_from_south_to_north", polygon(SQUARE, bbox=[0, 4, 4, 0])),
    ("a_bbox_goes_from_south_to_north", feature(None, bbox=[0, -91, 4, 0])),
    ("a_bbox_holds_the_geometries_and_no_more", feature(polygon(SQUARE), bbox=[0, 0, 3, 4])),
    ("a_bbox_holds_the_geometries_and_no_more", collection(feature(polygon(SQUARE)), bbox=[0, 0, 5, 4])),
    ("a_bbox_over_the_antimeridian_is_narrow", feature(OVER_THE_ANTIMERIDIAN, bbox=[-180, 0, 180, 1])),
    ("members_that_define_one_type_are_not_on_another", feature(coordinates=[0, 0])),
    ("members_that_define_one_type_are_not_on_another", collection(properties={})),
    ("members_that_define_one_type_are_not_on_another", polygon(SQUARE, properties={})),
    ("coordinates_have_no_needless_precision", {"type": "Point", "coordinates": [0.1 + 0.2, 1 / 3]}),
]


@pytest.mark.parametrize("content", GOOD, ids=lambda content: str(content)[:50])
def test_a_sound_text_breaks_no_rule(content: dict[str, Any]) -> None:
    assert broken_rules(json.dumps(content)) == []


@pytest.mark.parametrize(("name", "content"), BAD, ids=[f"{name}-{number}" for number, (name, _) in enumerate(BAD)])
def test_a_bad_text_breaks_the_rule_it_is_made_for(name: str, content: dict[str, Any]) -> None:
    section = next(section for section, check in RULES if check.__name__ == name)
    check = getattr(rfc7946, name)
    faults = [fault for item in rfc7946.objects(content) for fault in check(item)]
    assert faults
    assert {(broken.section, broken.fault) for broken in broken_rules(json.dumps(content))} >= {
        (section, fault) for fault in faults
    }


def test_every_rule_has_a_text_that_breaks_it() -> None:
    assert {check.__name__ for _, check in RULES} == {name for name, _ in BAD}


@pytest.mark.parametrize(
    ("text", "section"),
    [
        ("", "2"),
        ('{"type": "Point", "coordinates": [NaN, 0]}', "2"),
        (b'{"type": "Feature", "properties": {"name": "\xe9"}}', "2"),
        ("[]", "3"),
        ('{"type": "Topology"}', "3"),
        ('{"features": []}', "3"),
    ],
)
def test_what_is_no_geojson_at_all_is_said(text: str | bytes, section: str) -> None:
    assert [broken.section for broken in broken_rules(text)] == [section]


# What an export can get wrong, and `validate` therefore has to find; exact precision is a matter of taste.
_OURS = [item for item in BAD if item[1].get("type") == "FeatureCollection"] + [
    (name, collection(content if content.get("type") == "Feature" else feature(content)))
    for name, content in BAD
    if content.get("type") in ("Feature", "Polygon", "MultiPolygon")
]


@pytest.mark.parametrize(("name", "content"), _OURS, ids=[f"{name}-{n}" for n, (name, _) in enumerate(_OURS)])
def test_validate_finds_what_the_judge_finds(tmp_path: Path, name: str, content: dict[str, Any]) -> None:
    path = tmp_path / "a.geojson"
    path.write_text(json.dumps(content))
    assert broken_rules(path.read_bytes())
    assert validate(path)


# Exports


def placed(crs: str, lon: float, lat: float, *, pixel_m: float = 0.25, turn: float = 0.0, up: int = -1) -> Tile:
    """A tile of 400 × 400 pixels around a place."""
    x, y = to_lonlat(crs, None).transform(lon, lat, direction="INVERSE")
    unit = pixel_m / 111_320 if crs == "EPSG:4326" else pixel_m
    middle = Affine.translation(x, y) @ Affine.rotation(turn) @ Affine.scale(unit, up * unit)
    return Tile((400, 400), crs, middle @ Affine.translation(-200, -200), scene="town", gsd_m=pixel_m)


PLACES = {
    "utm north": placed("EPSG:32645", 85.52, 27.63),
    "utm south, turned": placed("EPSG:32733", 15.0, -22.5, turn=33),
    "web mercator": placed("EPSG:3857", 85.52, 27.63),
    "degrees, south up": placed("EPSG:4326", -70.3, -33.4, up=1),
    "europe": placed("EPSG:25832", 9.5, 50.1),
    "switzerland": placed("EPSG:2056", 7.45, 46.95),
    "arctic": placed("EPSG:3413", -45.0, 72.0),
    "antimeridian": placed("EPSG:32660", 180.0, 10.0),
    "antimeridian, arctic": placed("EPSG:3413", 180.0, 75.0),
    "antimeridian, degrees": placed("EPSG:4326", 180.0, -16.0),
    "north pole": placed("EPSG:3413", 0.0, 90.0),
    "south pole": placed("EPSG:3031", 0.0, -90.0),
}
SHAPES = [
    Polygon(affinity.rotate(shapely.box(20, 20, 120, 90), 20).exterior, [shapely.box(50, 45, 80, 65).exterior.coords]),
    affinity.rotate(shapely.box(250, 40, 330, 90), 50),
    Polygon(shapely.box(150, 150, 260, 250).exterior, [shapely.box(170, 170, 190, 190).exterior.coords]),
]
WINGS = shapely.box(20, 320, 50, 350), shapely.box(80, 320, 110, 350)


@pytest.mark.parametrize("place", PLACES)
def test_exports_break_no_rule(tmp_path: Path, place: str) -> None:
    tile = PLACES[place]
    regions = [Region(shape, "building") for shape in SHAPES]
    regions += [Region(wing, "building", object_id="wings") for wing in WINGS]
    task = {
        "id": 1,
        "data": {"image": "http://host/tiles/town/1.jpg", "tile": tile.to_record()},
        "annotations": [{"id": 2, "result": labelstudio.results_of(regions, TAG, tile, task_id=1)}],
    }
    out = tmp_path / "a.geojson"
    export([task], out)
    assert broken_rules(out.read_bytes()) == []
    assert validate(out) == []
    features = json.loads(out.read_text())["features"]
    # Maps stretch: a map's metre is a metre on the ground only near its standard lines.
    drawn_m2 = [area * tile.ground_size_m() ** 2 for area in sorted([*(shape.area for shape in SHAPES), 1800])]
    assert sorted(item["properties"]["area_m2"] for item in features) == pytest.approx(drawn_m2, rel=0.01)
    if "pole" not in place:
        over = [item["bbox"][0] > item["bbox"][2] for item in features]
        assert any(over) == ("antimeridian" in place)
