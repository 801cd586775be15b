"""Each MUST of RFC 7946 that a file can break, broken once, and a sound file beside it."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from backend.rfc7946 import collection_faults, feature_faults, geometry_faults

SQUARE = [[0.0, 0.0], [10.0, 0.0], [10.0, 10.0], [0.0, 10.0], [0.0, 0.0]]
HOLE = [[2.0, 2.0], [2.0, 4.0], [4.0, 4.0], [4.0, 2.0], [2.0, 2.0]]
SOUND: dict[str, Any] = {
    "type": "Feature",
    "id": "a",
    "bbox": [0.0, 0.0, 10.0, 10.0],
    "properties": {"label": "building"},
    "geometry": {"type": "Polygon", "coordinates": [SQUARE, HOLE]},
}


@pytest.mark.parametrize(
    "geometry",
    [
        SOUND["geometry"],
        {"type": "MultiPolygon", "coordinates": [[SQUARE], [[[20, 0], [30, 0], [30, 10], [20, 0]]]]},
        {"type": "Point", "coordinates": [1, 2, 3]},
        {"type": "MultiPoint", "coordinates": []},
        {"type": "LineString", "coordinates": [[0, 0], [1, 1]]},
        {"type": "MultiLineString", "coordinates": [[[0, 0], [1, 1]]]},
        {"type": "GeometryCollection", "geometries": [{"type": "Point", "coordinates": [1, 2]}]},
    ],
)
def test_sound_geometries_have_no_faults(geometry: dict[str, Any]):
    assert geometry_faults(geometry) == []


def test_sound_features_and_collections_have_no_faults():
    assert feature_faults(SOUND) == []
    assert feature_faults({**SOUND, "geometry": None, "properties": None}) == []
    # A box that crosses the antimeridian has its west east of its east (5.2).
    assert collection_faults({"type": "FeatureCollection", "features": [], "bbox": [177.0, -20.0, -178.0, -16.0]}) == []


@pytest.mark.parametrize(
    ("geometry", "words"),
    [
        (None, "must be an object"),
        ([], "must be an object"),
        ({"type": "polygon", "coordinates": [SQUARE]}, "geometry type"),
        ({"type": "Circle", "coordinates": [0, 0]}, "geometry type"),
        ({"type": "Polygon"}, "no coordinates"),
        ({"type": "Point", "coordinates": [1]}, "3.1.1"),
        ({"type": "Point", "coordinates": ["1", "2"]}, "3.1.1"),
        ({"type": "Point", "coordinates": [True, 1]}, "3.1.1"),
        ({"type": "Point", "coordinates": [float("nan"), 1.0]}, "3.1.1"),
        ({"type": "Point", "coordinates": [1, 2, 3, 4]}, "3.1.1"),
        ({"type": "MultiPoint", "coordinates": [1, 2]}, "3.1.1"),
        ({"type": "Polygon", "coordinates": SQUARE}, "3.1.1"),
        ({"type": "Polygon", "coordinates": "all"}, "nested arrays"),
        ({"type": "LineString", "coordinates": [[0, 0]]}, "3.1.4"),
        ({"type": "Polygon", "coordinates": [[[0, 0], [1, 0], [0, 0]]]}, "four or more"),
        ({"type": "Polygon", "coordinates": [SQUARE[:-1]]}, "not closed"),
        ({"type": "Polygon", "coordinates": [SQUARE[::-1]]}, "clockwise"),
        ({"type": "Polygon", "coordinates": [SQUARE, HOLE[::-1]]}, "counter-clockwise"),
        ({"type": "MultiPolygon", "coordinates": [[SQUARE], [SQUARE[::-1]]]}, "clockwise"),
        ({"type": "GeometryCollection", "geometries": {}}, "3.1.8"),
        ({"type": "GeometryCollection", "geometries": [{"type": "GeometryCollection", "geometries": []}]}, "3.1.8"),
        ({"type": "Point", "coordinates": [1, 2], "properties": {}}, "7.1"),
        ({"type": "Point", "coordinates": [1, 2], "crs": {}}, "crs"),
    ],
)
def test_a_broken_geometry_is_named(geometry: Any, words: str):
    faults = geometry_faults(geometry)
    assert any(words in fault for fault in faults), faults
    assert any(words in fault for fault in feature_faults({**SOUND, "geometry": geometry})) or geometry is None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"type": "feature"}, "type must be Feature"),
        ({"properties": []}, "properties"),
        ({"id": None}, "id must be"),
        ({"id": {}}, "id must be"),
        ({"features": []}, "7.1"),
        ({"coordinates": [1, 2]}, "7.1"),
        ({"bbox": [1, 2, 3]}, "section 5"),
        ({"bbox": [0, 10, 10, 0]}, "south-westerly"),
        ({"crs": {"type": "name"}}, "section 4"),
    ],
)
def test_a_broken_feature_is_named(change: dict[str, Any], words: str):
    assert any(words in fault for fault in feature_faults({**SOUND, **change}))


@pytest.mark.parametrize("name", ["geometry", "properties"])
def test_a_feature_needs_its_members(name: str):
    feature = copy.deepcopy(SOUND)
    del feature[name]
    assert any(f"no {name}" in fault for fault in feature_faults(feature))


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ({"features": []}, "type must be FeatureCollection"),
        ({"type": "FeatureCollection"}, "features must be an array"),
        ({"type": "FeatureCollection", "features": {}}, "features must be an array"),
        ({"type": "FeatureCollection", "features": [], "properties": {}}, "7.1"),
        ({"type": "FeatureCollection", "features": [], "crs": {}}, "section 4"),
    ],
)
def test_a_broken_collection_is_named(members: dict[str, Any], words: str):
    assert any(words in fault for fault in collection_faults(members))
