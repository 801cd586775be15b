"""Every conversion of a tile against somebody else's arithmetic: rasterio, mercantile, pyproj."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import FrozenInstanceError, replace
from typing import Any

import mercantile
import numpy as np
import pyproj
import pytest
import rasterio.transform
import rasterio.warp
from affine import Affine
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from backend.errors import BadTile
from backend.tile import Tile, checked_crs, operations_to_lonlat, to_lonlat

settings.register_profile("tile", deadline=None, max_examples=60)
settings.load_profile("tile")

# Where on Earth each CRS is at home.
HOMES = {
    "EPSG:32645": (85.52, 27.63),
    "EPSG:32733": (15.0, -22.5),
    "EPSG:3857": (85.52, 27.63),
    "EPSG:4326": (-70.3, -33.4),
    "EPSG:3413": (-45.0, 72.0),
    "EPSG:2193": (174.8, -41.3),
    "EPSG:27700": (-0.5, 51.5),
    "EPSG:2056": (7.45, 46.95),
    "EPSG:25832": (9.5, 50.1),
}


@st.composite
def transforms(draw: st.DrawFn, crs: str) -> Affine:
    """Any way a scene can lie: north up, south up, turned, sheared, with pixels that are not square."""
    lon, lat = HOMES[crs]
    x, y = pyproj.Transformer.from_crs("EPSG:4326", crs, always_xy=True).transform(lon, lat)
    unit = 1 / 111_320 if crs == "EPSG:4326" else 1.0
    pixel_x, pixel_y = (draw(st.floats(0.02, 30)) * unit for _ in range(2))
    turn, shear = draw(st.one_of(st.just((0.0, 0.0)), st.tuples(st.floats(0, 360), st.floats(-30, 30))))
    up = draw(st.sampled_from([-1, 1]))
    return Affine.translation(x, y) @ Affine.rotation(turn) @ Affine.shear(shear) @ Affine.scale(pixel_x, up * pixel_y)


@st.composite
def tiles(draw: st.DrawFn, among: Sequence[str] = tuple(HOMES)) -> Tile:
    crs = draw(st.sampled_from(among))
    size = (draw(st.integers(1, 2000)), draw(st.integers(1, 2000)))
    return Tile(size, crs, draw(transforms(crs)), scene="town")


points = st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=20).map(np.array)


# There and back


@given(tile=tiles(), shares=points)
def test_pixels_to_percent_to_crs_to_lonlat_and_back_are_within_a_hundredth_of_a_pixel(
    tile: Tile, shares: np.ndarray
) -> None:
    px = shares * tile.size
    assert tile.pct_to_px(tile.px_to_pct(px)) == pytest.approx(px, abs=1e-9)
    assert tile.crs_to_px(tile.px_to_crs(px)) == pytest.approx(px, abs=1e-3)
    again = tile.lonlat_to_px(tile.px_to_lonlat(tile.pct_to_px(tile.px_to_pct(px))))
    assert np.abs(again - px).max() <= 0.01


@given(tile=tiles(), shares=points)
def test_percent_counts_from_the_top_left_and_is_clipped(tile: Tile, shares: np.ndarray) -> None:
    assert tile.px_to_pct(shares * tile.size) == pytest.approx(shares * 100)
    outside = tile.px_to_pct(np.array([(-5.0, -5.0), (tile.size[0] + 5.0, tile.size[1] + 5.0)]))
    assert outside.tolist() == [[0, 0], [100, 100]]


# Against rasterio


@given(tile=tiles(), shares=points)
def test_crs_units_are_rasterios(tile: Tile, shares: np.ndarray) -> None:
    px = shares * tile.size
    assert tile.transform is not None
    xs, ys = rasterio.transform.xy(tile.transform, px[:, 1], px[:, 0], offset="ul")
    pixel = math.sqrt(abs(tile.transform.determinant))
    assert np.abs(tile.px_to_crs(px) - np.column_stack((xs, ys))).max() <= 1e-6 * pixel + 1e-8


@given(tile=tiles(), column=st.integers(0, 1999), row=st.integers(0, 1999))
def test_the_middle_of_a_pixel_is_found_in_that_pixel(tile: Tile, column: int, row: int) -> None:
    assume(column < tile.size[0] and row < tile.size[1])
    assert tile.transform is not None
    middle = tile.px_to_crs(np.array([(column + 0.5, row + 0.5)]))
    assert middle[0] == pytest.approx(rasterio.transform.xy(tile.transform, row, column), rel=1e-12, abs=1e-8)
    rows, columns = rasterio.transform.rowcol(tile.transform, middle[:, 0], middle[:, 1])
    assert (int(columns[0]), int(rows[0])) == (column, row)
    assert np.floor(tile.crs_to_px(middle)).tolist() == [[column, row]]


@given(tile=tiles(), shares=points)
def test_longitude_and_latitude_are_rasterios(tile: Tile, shares: np.ndarray) -> None:
    crs_points = tile.px_to_crs(shares * tile.size)
    lon, lat = rasterio.warp.transform(tile.crs, "EPSG:4326", crs_points[:, 0], crs_points[:, 1])
    found = tile.px_to_lonlat(shares * tile.size)
    assert np.abs(found - np.column_stack((lon, lat))).max() < 1e-8, "within a millimetre"


# Against mercantile


@given(z=st.integers(0, 24), x_share=st.floats(0, 0.999999), y_share=st.floats(0, 0.999999))
def test_xyz_tiles_are_mercantiles(z: int, x_share: float, y_share: float) -> None:
    x, y = int(x_share * 2**z), int(y_share * 2**z)
    tile = Tile.from_xyz(z, x, y)
    bounds = mercantile.xy_bounds(x, y, z)
    corners = tile.px_to_crs(np.array([(0.0, 0.0), (256.0, 256.0)]))
    assert corners[0] == pytest.approx((bounds.left, bounds.top), abs=1e-5)
    assert corners[1] == pytest.approx((bounds.right, bounds.bottom), abs=1e-5)
    geographic = mercantile.bounds(x, y, z)
    lonlat = tile.px_to_lonlat(np.array([(0.0, 0.0), (256.0, 256.0)]))
    # Both sides of the antimeridian are the same line.
    assert np.cos(np.radians(lonlat[:, 0] - (geographic.west, geographic.east))) == pytest.approx(1, abs=1e-12)
    assert lonlat[:, 1] == pytest.approx((geographic.north, geographic.south), abs=1e-8)


@pytest.mark.parametrize(
    ("ending", "size"),
    [("png", 256), ("jpg", 256), ("jpeg", 256), ("webp?token=a", 256), ("PNG", 256), ("@2x.png", 512)],
)
def test_xyz_urls_are_read(ending: str, size: int) -> None:
    url = f"https://tiles.example/a/19/386000/220000{'' if ending.startswith('@') else '.'}{ending}"
    tile = Tile.from_task({}, image_url=url)
    assert tile is not None
    assert tile.size == (size, size)
    middle = tile.px_to_lonlat(np.array([(size / 2, size / 2)]))[0]
    assert mercantile.tile(*middle, 19) == mercantile.Tile(386000, 220000, 19)


@pytest.mark.parametrize(
    "url",
    [
        "https://h/photo.jpg", "https://h/19/386000.png", "https://h/3/8/1.png", "https://h/3/1/8.png", "https://h/31/0/0.png",
        "https://h/2/1/1.tif", "https://h/1/2/3.png/more", "", "/19/-1/3.png",
    ],
)  # fmt: skip
def test_other_urls_are_photos(url: str) -> None:
    assert Tile.from_task({}, image_url=url) is None


@pytest.mark.parametrize("numbers", [(1, 2, 0), (1, 0, 2), (-1, 0, 0), (31, 0, 0), (3, -1, 0)])
def test_xyz_tiles_that_are_not_there_are_refused(numbers: tuple[int, int, int]) -> None:
    with pytest.raises(BadTile, match="no web-mercator tile"):
        Tile.from_xyz(*numbers)


# Crops and sizes


@given(tile=tiles(), data=st.data())
def test_a_crop_is_the_same_ground(tile: Tile, data: st.DataObject) -> None:
    column, row = data.draw(st.integers(0, tile.size[0] - 1)), data.draw(st.integers(0, tile.size[1] - 1))
    crop = tile.crop(column, row, tile.size[0] - column, tile.size[1] - row)
    px = np.array([(0.0, 0.0), (crop.size[0] / 3, crop.size[1] / 2)])
    assert tile.crs_to_px(crop.px_to_crs(px)) == pytest.approx(px + np.array([column, row]), abs=1e-3)
    deeper = crop.crop(0, 0, 1, 1)
    assert deeper.window == (column, row, 1, 1)


@given(tile=tiles(), size=st.tuples(st.integers(1, 3000), st.integers(1, 3000)), shares=points)
def test_another_size_is_the_same_ground(tile: Tile, size: tuple[int, int], shares: np.ndarray) -> None:
    other = tile.at_size(size)
    assert other.size == size
    assert tile.crs_to_px(other.px_to_crs(shares * size)) == pytest.approx(shares * tile.size, abs=1e-3)
    assert other.px_to_pct(shares * size) == pytest.approx(shares * 100)


def test_the_core_and_the_pixel_size_follow_the_image_size() -> None:
    tile = Tile((512, 512), "EPSG:32645", Affine(1, 0, 3e5, 0, -1, 3e6), core=(32, 32, 480, 480), gsd_m=1.0)
    half = tile.at_size((256, 256))
    assert half.core == (16, 16, 240, 240)
    assert half.gsd_m == 2.0


# Ground size


@pytest.mark.parametrize("latitude", [0, 27.6, -41, 60, 84])
def test_a_web_mercator_pixel_shrinks_with_latitude(latitude: float) -> None:
    xyz = mercantile.tile(10, latitude, 18)
    tile = Tile.from_xyz(18, xyz.x, xyz.y)
    middle = tile.px_to_lonlat(np.array([(128.0, 128.0)]))[0]
    geod = pyproj.Geod(ellps="WGS84")
    east = tile.px_to_lonlat(np.array([(127.5, 128.0), (128.5, 128.0)]))
    south = tile.px_to_lonlat(np.array([(128.0, 127.5), (128.0, 128.5)]))
    sides = [geod.inv(*pair[0], *pair[1])[2] for pair in (east, south)]
    assert tile.ground_size_m() == pytest.approx(math.sqrt(sides[0] * sides[1]), rel=1e-3)
    assert tile.gsd_m == pytest.approx(0.597 * math.cos(math.radians(middle[1])), rel=0.01)


@given(tile=tiles(["EPSG:32645", "EPSG:32733"]))
def test_utm_pixels_are_as_large_as_they_say(tile: Tile) -> None:
    assert tile.transform is not None
    assert tile.ground_size_m() == pytest.approx(math.sqrt(abs(tile.transform.determinant)), rel=1e-3)


# Records


@given(tile=tiles(), data=st.data())
def test_a_record_survives_json(tile: Tile, data: st.DataObject) -> None:
    full = replace(
        tile,
        window=(data.draw(st.integers(0, 10**6)), 7, *tile.size),
        core=(0, 0, *tile.size),
        gsd_m=data.draw(st.floats(1e-3, 1e3)),
        stretch={"kind": "percentile", "low": [1.5], "high": [9.0]},
        source={"path": "town.tif", "sha256": "00"},
    )
    assert Tile.from_record(json.loads(json.dumps(full.to_record()))) == full
    assert Tile.from_task({"tile": json.loads(json.dumps(full.to_record()))}) == full


def test_wkt2_is_a_crs_too() -> None:
    wkt = pyproj.CRS("EPSG:32645").to_wkt()
    coded = Tile((9, 9), "EPSG:32645", Affine(1, 0, 3e5, 0, -1, 3e6))
    spelled = Tile.from_record({**coded.to_record(), "crs": wkt})
    px = np.array([(3.0, 4.0)])
    assert spelled.px_to_lonlat(px) == pytest.approx(coded.px_to_lonlat(px), abs=1e-9)


GOOD: dict[str, Any] = {"window": [0, 0, 10, 10], "crs": "EPSG:32645", "transform": [1, 0, 3e5, 0, -1, 3e6]}


@pytest.mark.parametrize(
    "wrong",
    [
        {"crs": None},
        {"transform": None},
        {"crs": 32645},
        {"crs": "EPSG:999999"},
        {"crs": "+proj=utm +zone=45"},
        {"crs": ""},
        {"crs": "/etc/passwd"},
        {"crs": "PROJCRS[oops"},
        {"crs": "urn:ogc:def:crs:EPSG::32645"},
        {"crs": "EPSG:32645" * 3000},
        {"crs": ["EPSG:4326"]},
        {"crs": '{"type": "x"}'},
        {"crs": "+proj=hgridshift +grids=/etc/passwd"},
        {"transform": [1, 2]},
        {"transform": "abcdef"},
        {"transform": [1, 0, 0, 0, 0, 0]},
        {"transform": [0] * 6},
        {"transform": [1, 0, math.nan, 0, -1, 0]},
        {"transform": [1, 0, math.inf, 0, -1, 0]},
        {"transform": [10**400] * 6},
        {"transform": 5},
        {"transform": [1, 0, 0, 0, 1, 0, 0]},
        {"transform": [None] * 6},
        {"transform": {}},
        {"window": [0, 0, 0, 10]},
        {"window": [0, 0, -5, 10]},
        {"window": [0, 0, 10]},
        {"window": "abcd"},
        {"window": None},
        {"window": [0, 0, math.inf, 10]},
        {"window": [0, 0, math.nan, 10]},
        {"window": 5},
        {"window": {}},
        {"size": [10]},
        {"size": ["a", "b"]},
        {"size": [-1, 5]},
        {"size": [0, 5]},
        {"size": 7},
        {"size": [math.nan, 5]},
        {"core": [1, 2, 3]},
        {"core": "core"},
        {"core": [0, 0, math.inf, 0]},
        {"gsd_m": "fine"},
        {"gsd_m": []},
        {"gsd_m": math.nan},
        {"gsd_m": -1},
        {"gsd_m": 0},
        {"gsd_m": math.inf},
        {"stretch": "percentile"},
        {"source": [1]},
    ],
    ids=lambda wrong: f"{wrong}"[:60],
)
def test_bad_records_are_refused_in_words(wrong: dict[str, Any]) -> None:
    with pytest.raises(BadTile) as caught:
        Tile.from_record({**GOOD, **wrong})
    assert 10 < len(str(caught.value)) < 400


@pytest.mark.parametrize("record", [None, 5, "tile", [], [1, 2]])
def test_what_is_no_record_is_refused(record: Any) -> None:
    with pytest.raises(BadTile, match="must be an object"):
        Tile.from_record(record)


json_values = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=6) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(
    changes=st.dictionaries(
        st.sampled_from(["crs", "transform", "window", "size", "core", "gsd_m", "scene", "stretch", "source"]),
        json_values,
        max_size=3,
    )
)
@settings(max_examples=300)
def test_no_record_breaks_the_reader(changes: dict[str, Any]) -> None:
    try:
        tile = Tile.from_record({**GOOD, **changes})
    except BadTile:
        return
    assert min(tile.size) >= 1
    json.dumps(tile.to_record(), allow_nan=True)


def test_a_plain_photo_has_no_place_and_says_so() -> None:
    photo = Tile((100, 50))
    assert not photo.has_place
    assert photo.pct_to_px(np.array([(50.0, 50.0)])).tolist() == [[50, 25]]
    for ask in (photo.px_to_crs, photo.crs_to_px, photo.px_to_lonlat, photo.lonlat_to_px):
        with pytest.raises(BadTile, match="no place on Earth"):
            ask(np.array([(1.0, 1.0)]))


def test_pixels_outside_the_crs_are_refused_rather_than_infinite() -> None:
    tile = Tile((10, 10), "EPSG:32645", Affine(1e7, 0, 1e9, 0, -1e7, 1e9))
    with pytest.raises(BadTile):
        tile.px_to_lonlat(np.array([(5.0, 5.0)]))


def test_a_tile_does_not_change() -> None:
    with pytest.raises(FrozenInstanceError):
        Tile((1, 1)).size = (2, 2)  # type: ignore[misc]


# CRS


def test_transformers_are_made_once() -> None:
    assert to_lonlat("EPSG:32645", (85, 27, 86, 28)) is to_lonlat("EPSG:32645", (85, 27, 86, 28))


@pytest.mark.parametrize(
    ("crs", "reason"),
    [
        (
            'ENGCRS["site",EDATUM["peg"],CS[Cartesian,2],AXIS["x",east],AXIS["y",north],LENGTHUNIT["metre",1]]',
            r"'site' is a local engineering CRS.*gdalwarp",
        ),
        ('LOCAL_CS["site",UNIT["metre",1]]', "'site' is a local engineering CRS"),
        ("EPSG:5703", "'NAVD88 height' is vertical, not horizontal"),
        ("EPSG:4978", "'WGS 84' is geocentric, not horizontal"),
    ],
)
def test_a_crs_without_places_on_a_map_is_refused_with_the_reason(crs: str, reason: str) -> None:
    tile = Tile((5, 5), checked_crs(crs), Affine(1, 0, 0, 0, -1, 0))
    for ask in (lambda: tile.px_to_lonlat(np.zeros((1, 2))), tile.ground_size_m):
        with pytest.raises(BadTile, match=reason):
            ask()


@pytest.mark.parametrize(
    ("compound", "horizontal"),
    [("EPSG:5555", "EPSG:25832"), ("EPSG:6697", "EPSG:6668"), ("EPSG:4979", "EPSG:4326")],
    ids=["projected and height", "geographic and height", "ellipsoidal height"],
)
def test_of_a_crs_with_heights_the_horizontal_part_counts(compound: str, horizontal: str) -> None:
    lon, lat = (9.3, 50.2) if compound == "EPSG:5555" else (139.7, 35.6)
    x, y = to_lonlat(horizontal, None).transform(lon, lat, direction="INVERSE")
    point = to_lonlat(compound, None).transform(x, y)
    assert point == pytest.approx((lon, lat), abs=1e-9)


def test_a_crs_that_no_operation_leads_out_of_is_left_by_a_ballpark_one() -> None:
    # Export says so, and refuses it unless told otherwise.
    lon, lat = to_lonlat("EPSG:4490", (110, 30, 111, 31)).transform(110.5, 30.5)
    assert (lon, lat) == pytest.approx((110.5, 30.5))
    # pyproj 3.7 raises IndexError for this one where ballpark ways are ruled out.
    assert to_lonlat("EPSG:9474", None).transform(30.0, 60.0) == pytest.approx((30, 60))


def test_a_missing_grid_is_no_warning() -> None:
    # OSGB 36 is best left by a grid that a bare installation of PROJ does not hold.
    operations_to_lonlat.cache_clear()
    lon, lat = to_lonlat("EPSG:27700", (-1, 51, 0, 52)).transform(530_000, 180_000)
    assert (lon, lat) == pytest.approx((-0.128, 51.504), abs=0.001)
