"""What must hold between a scene's pixels and the Earth: there and back, the accuracy gate, edges, seams of the map."""

from __future__ import annotations

import json
import math
import re
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyproj
import pytest
import shapely
from affine import Affine
from hypothesis import given, settings
from hypothesis import strategies as st
from shapely import MultiPolygon, Polygon

from backend import earth
from backend.earth import area_m2, area_of, checked_lineage, lineage_of, lineage_record, lonlat_geometry
from backend.errors import BadTile, ExportError
from backend.tile import Tile, horizontal_crs, to_lonlat

# Where on Earth each CRS is at home.
HOMES = {
    "EPSG:4326": (-70.3, -33.4),
    "EPSG:3857": (85.52, 27.63),
    "EPSG:32645": (85.52, 27.63),
    "EPSG:32733": (15.0, -22.5),
    "EPSG:27700": (-0.5, 51.5),
    "EPSG:2056": (7.45, 46.95),
    "EPSG:25832": (9.5, 50.1),
    "EPSG:3413": (-45.0, 72.0),
    "EPSG:3031": (0.0, -90.0),
    "EPSG:32660": (180.0, 10.0),
}
ANYWHERE = {
    **HOMES,
    "EPSG:26910": (-123.0, 37.5),
    "EPSG:26710": (-123.0, 37.5),
    "EPSG:6339": (-123.0, 37.5),
    "EPSG:7856": (151.0, -33.5),
    "EPSG:2154": (2.3, 48.8),
    "EPSG:31983": (-46.6, -23.5),
    "EPSG:28992": (5.4, 52.1),
    "EPSG:31370": (4.5, 50.5),
    "EPSG:31467": (9.5, 49.5),
    "EPSG:23032": (9.5, 49.5),
    "EPSG:5555": (9.5, 50.1),
    "EPSG:9000": (9.5, 50.1),
    "EPSG:4490": (110.5, 30.5),
}


def placed(crs: str, *, pixel_m: float = 0.25, side_px: int = 500, turn: float = 0.0, up: int = -1) -> Tile:
    """A tile around the CRS's home."""
    x, y = to_lonlat(crs, None).transform(*ANYWHERE[crs], direction="INVERSE")
    unit = pixel_m / 111_320 if horizontal_crs(crs).is_geographic else pixel_m
    middle = Affine.translation(x, y) @ Affine.rotation(turn) @ Affine.scale(unit, up * unit)
    half = -side_px / 2
    return Tile((side_px, side_px), crs, middle @ Affine.translation(half, half), scene="town", gsd_m=pixel_m)


def whole_area(tile: Tile) -> earth.Area | None:
    return area_of(tile, (0, 0, *tile.size))


# There and back


@settings(deadline=None, max_examples=50)
@given(
    crs=st.sampled_from(sorted(HOMES)),
    pixel_m=st.floats(0.03, 30),
    turn=st.one_of(st.just(0.0), st.floats(0, 360)),
    up=st.sampled_from([-1, 1]),
    shares=st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=12),
)
def test_scene_to_percent_to_lonlat_and_back_is_within_a_hundredth_of_a_pixel(
    crs: str, pixel_m: float, turn: float, up: int, shares: list[tuple[float, float]]
) -> None:
    tile = placed(crs, pixel_m=pixel_m, turn=turn, up=up)
    px = np.array(shares) * tile.size
    lonlat = tile.px_to_lonlat(tile.pct_to_px(tile.px_to_pct(px)))
    again = tile.pct_to_px(tile.px_to_pct(tile.lonlat_to_px(lonlat)))
    assert np.abs(again - px).max() <= 0.01


@settings(deadline=None, max_examples=40)
@given(
    crs=st.sampled_from(sorted(set(HOMES) - {"EPSG:3031", "EPSG:32660"})),
    pixel_m=st.floats(0.2, 10),
    turn=st.floats(0, 360),
    up=st.sampled_from([-1, 1]),
    seed=st.integers(0, 1000),
)
def test_an_exported_shape_is_the_drawn_one(crs: str, pixel_m: float, turn: float, up: int, seed: int) -> None:
    tile = placed(crs, pixel_m=pixel_m, turn=turn, up=up)
    rng = np.random.default_rng(seed)
    angles = np.sort(rng.uniform(0, 2 * math.pi, 9))
    star = 250 + np.column_stack((np.cos(angles), np.sin(angles))) * rng.uniform(60, 240, (9, 1))
    court = shapely.union_all([Polygon(star).buffer(0), shapely.box(180, 180, 320, 320)]).difference(
        shapely.box(235, 235, 265, 265)
    )
    geometry = lonlat_geometry(court, tile, whole_area(tile))
    assert geometry is not None
    assert geometry.is_valid
    assert all(
        part.exterior.is_ccw and not any(r.is_ccw for r in part.interiors) for part in shapely.get_parts(geometry)
    )
    back = shapely.transform(geometry, tile.lonlat_to_px)
    assert back.symmetric_difference(court).area <= 0.12 * court.length


# The gate


@pytest.mark.parametrize(
    ("crs", "frame"),
    [
        ("EPSG:25832", "ETRS89"),
        ("EPSG:26910", "NAD83"),
        ("EPSG:6339", "NAD83(2011)"),
        ("EPSG:7856", "GDA2020"),
        ("EPSG:2154", "RGF93 v1"),
        ("EPSG:31983", "SIRGAS 2000"),
        ("EPSG:5555", "ETRS89"),
    ],
)
def test_a_frame_that_the_registry_takes_for_wgs_84_is_taken_for_it_and_said(crs: str, frame: str) -> None:
    tile = placed(crs, pixel_m=0.05)
    lineage = checked_lineage(tile, whole_area(tile))
    assert (lineage.frame, lineage.frame_accuracy_m) == (frame, 0)
    assert lineage.accuracy_m is not None
    assert lineage.accuracy_m >= 1
    assert any(f"{frame} was taken for WGS 84" in text and "agree within 2 m" in text for text in lineage.warnings)


def test_an_operation_straight_to_wgs_84_is_judged_by_the_frame_on_its_way() -> None:
    # PROJ goes from CH1903+ to WGS 84 in one step of 1 m; the same numbers lead to ETRS89 with 0.1 m.
    tile = placed("EPSG:2056", pixel_m=0.1)
    lineage = checked_lineage(tile, whole_area(tile))
    assert lineage.accuracy_m == 1
    assert lineage.frame in ("ETRS89", "CHTRS95")
    assert lineage.frame_accuracy_m == pytest.approx(0.1)
    with pytest.raises(ExportError, match=r"accurate to 0\.1 m, worse than its pixel of 0\.05 m"):
        checked_lineage(placed("EPSG:2056", pixel_m=0.05), whole_area(tile))


@pytest.mark.parametrize(
    ("crs", "least_m", "grid"),
    [("EPSG:27700", 2, "OSTN15"), ("EPSG:26710", 5, "conus"), ("EPSG:31467", 1, "BETA2007"), ("EPSG:23032", 1, "")],
    ids=["OSGB36 without its grid", "NAD27 without its grid", "DHDN without its grid", "ED50, which has none"],
)
def test_an_old_net_is_refused_at_fine_pixels_with_the_way_out(crs: str, least_m: float, grid: str) -> None:
    tile = placed(crs)
    lineage = lineage_of(tile, whole_area(tile))
    if lineage.grids:
        pytest.skip(f"this installation of PROJ has the grid {lineage.grids}")
    with pytest.raises(ExportError, match=rf"town: .*{crs}.* accurate to [\d.]+ m, worse.*--allow-ballpark") as refusal:
        checked_lineage(tile, whole_area(tile))
    assert grid in str(refusal.value)
    assert any(grid in name for name in lineage.missing_grids) == bool(grid)
    assert checked_lineage(tile, whole_area(tile), allow_ballpark=True) == lineage
    coarse = placed(crs, pixel_m=10)
    assert (lineage.frame_accuracy_m or lineage.accuracy_m or 0) >= least_m
    assert checked_lineage(coarse, whole_area(coarse)).operation == lineage.operation


def test_one_datum_taken_for_another_is_refused_unless_asked_for() -> None:
    tile = placed("EPSG:4490", pixel_m=10)
    with pytest.raises(ExportError, match=r"unknown to PROJ.*--allow-ballpark"):
        checked_lineage(tile, whole_area(tile))
    (warning,) = checked_lineage(tile, whole_area(tile), allow_ballpark=True).warnings
    assert "knows no operation" in warning


def test_a_local_crs_is_refused_with_the_reason() -> None:
    site = 'ENGCRS["site",EDATUM["peg"],CS[Cartesian,2],AXIS["x",east],AXIS["y",north],LENGTHUNIT["metre",1]]'
    tile = Tile((5, 5), site, Affine(1, 0, 0, 0, -1, 0), gsd_m=1)
    with pytest.raises(BadTile, match="local engineering CRS"):
        checked_lineage(tile, None, allow_ballpark=True)


def test_accuracies_that_are_stated_nowhere_are_said() -> None:
    bound = pyproj.CRS("+proj=utm +zone=32 +ellps=intl +towgs84=-87,-98,-121 +type=crs").to_wkt()
    tile = Tile((500, 500), bound, Affine(0.2, 0, 500_000, 0, -0.2, 5_400_000), gsd_m=0.2)
    lineage = checked_lineage(tile, whole_area(tile))
    assert lineage.accuracy_m is None
    assert "stated nowhere" in lineage.warnings[0]


def test_of_a_compound_crs_the_horizontal_part_counts_and_that_is_said() -> None:
    lineage = lineage_of(placed("EPSG:5555"), None)
    assert lineage.horizontal == "ETRS89 / UTM zone 32N"
    assert "heights are left out" in lineage.warnings[0]


@pytest.mark.parametrize("crs", sorted(ANYWHERE))
def test_the_lineage_leads_where_the_features_are(crs: str) -> None:
    """The recorded pipeline, given to PROJ by itself, gives the coordinates that were written."""
    tile = placed(crs)
    lineage = lineage_of(tile, whole_area(tile))
    corners_px = shapely.get_coordinates(tile.outline_px())
    alone = pyproj.Transformer.from_pipeline(lineage.definition)
    got = np.column_stack(alone.transform(*tile.px_to_crs(corners_px).T))
    # Both sides of the antimeridian are one line.
    apart = (got - tile.px_to_lonlat(corners_px) + (180, 0)) % (360, 360) - (180, 0)
    assert np.abs(apart).max() < 1e-9
    record = json.loads(json.dumps(lineage_record([lineage], made_at="2026-01-01T00:00:00+00:00")))
    (operation,) = record["operations"]
    assert operation["crs"] == crs
    assert operation == json.loads(json.dumps(asdict(lineage)))
    assert {"PROJ", "pyproj", "GDAL", "GEOS", "EPSG registry"} <= set(record["versions"])


TABLE = re.compile(r"^\| (EPSG:\d+) [^|]*\| ([^|]+) \| ([^|]+) \| ([^|]+) \| (exported|refused)(.*) \|$", re.MULTILINE)
ROWS = TABLE.findall((Path(__file__).resolve().parent.parent / "docs" / "crs.md").read_text(encoding="utf-8"))


@pytest.mark.parametrize(("crs", "stated", "frame", "tied", "verdict", "note"), ROWS, ids=[row[0] for row in ROWS])
def test_the_documentations_table_is_true(
    crs: str, stated: str, frame: str, tied: str, verdict: str, note: str
) -> None:
    tile = placed(crs, pixel_m=0.2)
    lineage = lineage_of(tile, whole_area(tile))
    if lineage.grids:
        pytest.skip(f"this installation of PROJ has the grid {lineage.grids}")

    def metres(text: str) -> float | None:
        return {"exact": 0.0, "nothing": None, "–": None}[text] if " m" not in text else float(text.removesuffix(" m"))

    assert lineage.accuracy_m == metres(stated)
    assert lineage.frame == frame.replace("–", "")
    if lineage.frame:
        assert lineage.frame_accuracy_m == pytest.approx(metres(tied), abs=0.15)
    assert ("warning" in note) == bool(lineage.warnings and verdict == "exported")
    assert all(grid in lineage.missing_grids for grid in re.findall("`(.*?)`", note))
    try:
        checked_lineage(tile, whole_area(tile))
        assert verdict == "exported"
    except ExportError:
        assert verdict == "refused"


def test_the_documentations_table_is_read() -> None:
    assert len(ROWS) == 12


# Edges


@pytest.mark.parametrize("crs", ["EPSG:32645", "EPSG:3413", "EPSG:2056"])
def test_long_edges_follow_the_ground(crs: str) -> None:
    tile = placed(crs, pixel_m=10, side_px=4000)
    long = shapely.box(100, 100, 3900, 3900)
    geometry = lonlat_geometry(long, tile)
    assert isinstance(geometry, Polygon)
    back = shapely.transform(geometry.segmentize(0.001), tile.lonlat_to_px)
    assert shapely.hausdorff_distance(back.exterior, long.exterior) < 0.1
    assert len(geometry.exterior.coords) < 600


def test_an_edge_whose_middle_lies_right_is_bent_all_the_same() -> None:
    # Across the equator a line of the map bends one way and then the other.
    tile = Tile((8000, 8000), "EPSG:32645", Affine(100, 0, 700_000, 0, -100, 400_000), gsd_m=100)
    geometry = lonlat_geometry(shapely.box(1000, 0, 2000, 8000), tile)
    assert isinstance(geometry, Polygon)
    assert len(geometry.exterior.coords) > 9
    back = shapely.transform(geometry.segmentize(0.01), tile.lonlat_to_px)
    assert shapely.hausdorff_distance(back.exterior, shapely.box(1000, 0, 2000, 8000).exterior) < 0.1


def test_a_rotated_pole_bends_edges_too() -> None:
    rotated = pyproj.CRS(
        "+proj=ob_tran +o_proj=longlat +o_lon_p=-162 +o_lat_p=39.25 +lon_0=180 +to_meter=0.0174532925199433 +type=crs"
    )
    assert rotated.is_geographic
    # WKT of a rotated pole as weather models write it.
    wkt = rotated.to_wkt()
    if not wkt.startswith(("GEOGCRS", "PROJCRS")):
        pytest.skip(f"PROJ writes this rotated pole as {wkt[:20]}")
    tile = Tile((100, 100), wkt, Affine(0.1, 0, -5, 0, -0.1, 5), gsd_m=11_000)
    geometry = lonlat_geometry(shapely.box(0, 0, 100, 100), tile)
    assert geometry is not None
    assert shapely.get_num_coordinates(geometry) > 20


# Antimeridian and poles


@pytest.mark.parametrize("crs", ["EPSG:32660", "EPSG:4326", "EPSG:3413"])
def test_what_crosses_the_antimeridian_is_cut_there_and_keeps_its_area(crs: str) -> None:
    lat = {"EPSG:32660": 10.0, "EPSG:4326": -16.5, "EPSG:3413": 75.0}[crs]
    x, y = to_lonlat(crs, None).transform(180.0, lat, direction="INVERSE")
    unit = 1 / 111_320 if crs == "EPSG:4326" else 1.0
    tile = Tile((200, 200), crs, Affine(unit, 0, abs(x) - 100 * unit, 0, -unit, y + 100 * unit), gsd_m=1.0)
    if crs == "EPSG:3413":
        tile = Tile((200, 200), crs, Affine(1, 0, x - 100, 0, -1, y + 100), gsd_m=1.0)
    whole = shapely.box(60, 60, 140, 110).difference(shapely.box(95, 80, 105, 90))
    geometry = lonlat_geometry(whole, tile)
    assert isinstance(geometry, MultiPolygon)
    west, _, east, _ = geometry.bounds
    assert (west, east) == (-180, 180)
    assert all(np.ptp(shapely.get_coordinates(part)[:, 0]) < 1 for part in geometry.geoms)
    assert area_m2(geometry) == pytest.approx(whole.area * tile.ground_size_m() ** 2, rel=3e-3)


@pytest.mark.parametrize(("crs", "pole"), [("EPSG:3413", 90), ("EPSG:3031", -90)])
def test_what_holds_a_pole_reaches_it(crs: str, pole: int) -> None:
    tile = Tile((200, 200), crs, Affine(100, 0, -10_000, 0, -100, 10_000), gsd_m=100.0)
    geometry = lonlat_geometry(shapely.box(40, 40, 160, 160), tile)
    assert geometry is not None
    assert geometry.is_valid
    ring = shapely.box(40, 40, 160, 160).difference(shapely.box(80, 70, 120, 130))
    round_the_pole = lonlat_geometry(ring, tile)
    assert round_the_pole is not None
    assert max(abs(edge) for edge in round_the_pole.bounds[1::2]) < 90
    assert area_m2(round_the_pole) == pytest.approx(ring.area * tile.ground_size_m() ** 2, rel=2e-3)
    west, south, east, north = geometry.bounds
    assert (west, east) == (-180, 180)
    assert (north if pole > 0 else south) == pole
    assert area_m2(geometry) == pytest.approx(120**2 * tile.ground_size_m() ** 2, rel=2e-3)
