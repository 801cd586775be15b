"""The demo scene: exact truth, a sound raster, the same for the same seed."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import rasterio
import shapely
from rasterio.features import rasterize
from shapely.geometry import shape

from backend.tile import Tile
from demo.scene import make_scene


@pytest.fixture(scope="module")
def town(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    path = tmp_path_factory.mktemp("scene") / "town.tif"
    return path, make_scene(path, size_px=(900, 800), seed=2)


def truth_px(town: tuple[Path, Path], label: str) -> list[shapely.Geometry]:
    with rasterio.open(town[0]) as raster:
        tile = Tile((raster.width, raster.height), "EPSG:32645", raster.transform)
    features = json.loads(town[1].read_text())["features"]
    return [
        shapely.transform(shape(f["geometry"]), tile.lonlat_to_px)
        for f in features
        if f["properties"]["label"] == label
    ]


def test_the_raster_is_what_gis_users_expect(town: tuple[Path, Path]) -> None:
    with rasterio.open(town[0]) as raster:
        assert (raster.width, raster.height, raster.count) == (900, 800, 3)
        assert raster.dtypes == ("uint8",) * 3
        assert raster.crs.to_epsg() == 32645
        assert raster.res == pytest.approx((0.2, 0.2))
        assert raster.profile["tiled"]
        assert raster.compression is not None
        assert raster.overviews(1)


def test_the_truth_lies_beside_it_with_all_labels(town: tuple[Path, Path]) -> None:
    assert town[1] == town[0].with_name("town_truth.geojson")
    features = json.loads(town[1].read_text())["features"]
    counts = Counter(f["properties"]["label"] for f in features)
    assert set(counts) == {"building", "road", "water", "vegetation"}
    assert counts["building"] > 20
    geometries = [shape(f["geometry"]) for f in features]
    assert all(g.is_valid and g.exterior.is_ccw for g in geometries)
    lon, lat = shapely.get_coordinates(geometries[0])[0]
    assert 85.5 < lon < 85.6
    assert 27.6 < lat < 27.7


def test_the_truth_of_a_whole_town_is_valid(tmp_path: Path) -> None:
    # Rounding its degrees once made a road of this seed cross itself.
    features = json.loads(make_scene(tmp_path / "a.tif", size_px=(512, 512), gsd_m=0.8, seed=0).read_text())["features"]
    assert [f["properties"]["label"] for f in features if not shape(f["geometry"]).is_valid] == []


def test_objects_stay_in_the_scene_and_buildings_apart(town: tuple[Path, Path]) -> None:
    extent = shapely.box(0, 0, 900, 800).buffer(0.01)
    buildings = truth_px(town, "building")
    assert all(extent.contains(b) for b in buildings)
    tree = shapely.STRtree(buildings)
    for i, j in tree.query(buildings, predicate="intersects").T:
        if i < j:
            assert buildings[i].intersection(buildings[j]).area < 0.5
    for label in ("road", "water", "vegetation"):
        others = shapely.union_all(truth_px(town, label))
        assert shapely.union_all(buildings).intersection(others).area < 1


def test_shapes_vary(town: tuple[Path, Path]) -> None:
    buildings = truth_px(town, "building")
    corners = Counter(len(b.exterior.coords) - 1 for b in buildings)
    assert len(corners) >= 3
    tree = shapely.STRtree(buildings)
    touching = sum(1 for i, j in tree.query(buildings, predicate="dwithin", distance=0.05).T if i < j)
    assert touching > 0, "some buildings share a wall"
    assert any(
        shapely.box(*b.bounds).touches(shapely.box(0, 0, 900, 800).exterior) or b.bounds[0] < 0.01 for b in buildings
    )


def test_the_picture_shows_the_truth(town: tuple[Path, Path]) -> None:
    with rasterio.open(town[0]) as raster:
        rgb = raster.read().astype(float)

    def inside(label: str, inset_px: float) -> np.ndarray:
        shapes = [g.buffer(-inset_px) for g in truth_px(town, label)]
        return rasterize([s for s in shapes if not s.is_empty], out_shape=rgb.shape[1:]).astype(bool)

    water, road, green = inside("water", 6), inside("road", 3), inside("vegetation", 2)
    assert np.median(rgb[1][water]) < 120
    grey = np.ptp(rgb, axis=0)
    assert np.median(grey[road]) < 35
    assert np.median((rgb[1] - rgb[0])[green]) > 0
    # An outline that lies on its edge: brightness changes across it more than two pixels further out.
    edges = shapely.union_all([b.exterior for b in truth_px(town, "building")])
    steepness = np.hypot(*np.gradient(rgb.mean(axis=0)))
    on = rasterize([edges.buffer(0.7)], out_shape=rgb.shape[1:]).astype(bool)
    off = rasterize([edges.buffer(6).difference(edges.buffer(3))], out_shape=rgb.shape[1:]).astype(bool)
    assert steepness[on].mean() > 2 * steepness[off].mean()


def test_the_same_seed_draws_the_same_scene(tmp_path: Path) -> None:
    first, again, other = (
        make_scene(tmp_path / f"{name}.tif", size_px=(300, 260), seed=seed)
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    assert first.read_text() == again.read_text() != other.read_text()
    assert (tmp_path / "a.tif").read_bytes() == (tmp_path / "b.tif").read_bytes()


@pytest.mark.parametrize("crs", ["EPSG:3857", "EPSG:4326"])
def test_other_crs_keep_the_pixel_on_the_ground(tmp_path: Path, crs: str) -> None:
    make_scene(tmp_path / "a.tif", size_px=(200, 200), gsd_m=0.5, crs=crs)
    with rasterio.open(tmp_path / "a.tif") as raster:
        tile = Tile((200, 200), crs, raster.transform)
    assert tile.ground_size_m() == pytest.approx(0.5, rel=0.01)
