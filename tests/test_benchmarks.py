"""The benchmarks of quality measure what they say, through the backend as it is served."""

from __future__ import annotations

import importlib.util
import json
import runpy
import sys
import xml.etree.ElementTree as ET
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import cv2
import numpy as np
import pytest
from shapely import Polygon
from shapely.geometry import mapping, shape

from backend import training
from benchmarks import _judging as judging
from benchmarks import card, effort, learning_curve, quality
from benchmarks._judging import Backend, PreLabel, Tile

from .fakes import BrightSegmenter, bright_image

REPOSITORY = Path(__file__).resolve().parent.parent
SCORE = REPOSITORY.parent / "shared" / "tools" / "score.py"

BRIGHT = ((20, 20, 60, 60), (100, 20, 140, 60), (200, 200, 256, 256), (20, 160, 60, 180))
TRUE = (
    (20, 20, 60, 60),  # outlined exactly
    (100, 20, 118, 60), (122, 20, 140, 60),  # one bright patch
    (200, 200, 256, 256),  # cut by the tile's edge
    (150, 120, 170, 140),  # dark
    (5, 5, 10, 10),  # too small to be judged
)  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """One tile: of five objects of some size two are bright, two share a patch, one is dark; one patch is no object."""
    (tmp_path / "images").mkdir()
    (tmp_path / "labels" / "px").mkdir(parents=True)
    cv2.imwrite(str(tmp_path / "images" / "town.png"), bright_image(*BRIGHT))
    features = [
        {
            "type": "Feature",
            "properties": {"touches_edge": x1 == 256},
            "geometry": mapping(Polygon([(x0, y0), (x1, y0), (x1, y1), (x0, y1)])),
        }
        for x0, y0, x1, y1 in TRUE
    ]
    (tmp_path / "labels" / "px" / "town.geojson").write_text(json.dumps({"features": features}))
    return tmp_path


@pytest.fixture
def backend(folder: Path) -> Iterator[Backend]:
    with Backend(folder, "building", segmenter=BrightSegmenter(), min_score=0.0) as running:
        yield running


def test_pre_labels_are_judged_as_they_are_served(folder: Path, backend: Backend) -> None:
    (tile,) = judging.labelled_tiles(folder)
    figures, details = quality.automatic(backend, [tile], all_scores=True)
    assert (figures["polygons"], figures["objects"], figures["invalid"]) == (4, 5, 0)
    assert (figures["precision"], figures["recall"]) == (2 / 4, 2 / 5)
    assert figures["F1@0.5"] == pytest.approx(4 / 9)
    assert figures["matched_iou"] > 0.9
    assert details["objects by size"]["all"] == {
        "found": 2, "merged": 2, "split": 0, "poor outline": 0, "missed": 1,
    }  # fmt: skip
    assert details["polygons by size"]["all"] == {
        "right": 2, "merged": 1, "split": 0, "poor outline": 0, "false alarm": 1,
    }  # fmt: skip
    assert details["by least score"]["0.95"]["polygons"] <= 4
    assert sum(details["reliability"]["counts"]) == 4


def test_a_least_score_is_heeded(folder: Path) -> None:
    (tile,) = judging.labelled_tiles(folder)
    with Backend(folder, "building", segmenter=BrightSegmenter(), min_score=1.0) as strict:
        assert strict.pre_labels(tile) == []
        assert len(strict.pre_labels(tile, min_score=0.0)) == 4


def test_clicks_and_boxes_reach_what_can_be_reached(folder: Path, backend: Backend) -> None:
    tiles = judging.labelled_tiles(folder)
    arguments = Namespace(limit=10, max_clicks=4)
    clicks, details = quality.prompted(backend, "clicks", tiles, arguments)
    # Whole objects of 150 px and more: one bright, two in one patch (half of it each), one dark.
    assert clicks["objects"] == sum(row["objects"] for row in details["by size"].values()) == 4
    assert clicks["iou@1"] == pytest.approx((1 + 0.45 + 0.45 + 0) / 4, abs=0.03)
    assert clicks["NoC@85"] == pytest.approx((1 + 4 + 4 + 4) / 4)
    boxes, _ = quality.prompted(backend, "boxes", tiles, arguments)
    assert boxes["objects"] == 4
    assert boxes["mean_iou"] > 0.6


def test_an_image_that_cannot_be_read_is_no_tile_without_objects(folder: Path, backend: Backend) -> None:
    (tile,) = judging.labelled_tiles(folder)
    tile.image.write_bytes(b"no image")
    with pytest.raises(RuntimeError, match=r"town\.png was not answered"):
        backend.pre_labels(tile)


def test_effort_follows_the_rule(folder: Path, backend: Backend) -> None:
    (tile,) = judging.labelled_tiles(folder)
    done = [effort.worked(backend, tile, 2, 0.85)]
    # Two of four pre-labels are good. What is left is clicked in vain: the dark is not found, the shared patch not cut.
    by_hand = 6 * 5
    review = 1 + 2 * 2
    clicks = effort.ways(done, 2, 0.0)
    assert clicks["by hand"] == by_hand
    assert clicks["pre-labels, by hand"] == review + 4 * 5
    assert clicks["smart clicks"] == 2 * (1 + 1) + 4 * (2 + 1 + 5)
    assert clicks["pre-labels, smart clicks"] == review + 4 * (2 + 1 + 5)
    figures = effort.summary(done, 2, 0.0)
    assert (figures["pre_labels_accepted"], figures["pre_labels_deleted"], figures["redrawn_by_hand"]) == (2, 2, 4)
    assert figures["saved: pre-labels, by hand"] == pytest.approx(1 - 25 / 30)
    # Where no pre-label is served, looking is all they cost.
    assert effort.ways(done, 2, 1.1)["pre-labels, by hand"] == 1 + by_hand


def test_learning_curve_learns_from_some_tiles_and_judges_others(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_torch_thread: None
) -> None:
    monkeypatch.setattr(training, "_STEPS", 5)
    for name in ("village", "hamlet"):
        for kind, ending in (("images", "png"), ("labels/px", "geojson")):
            (folder / kind / f"{name}.{ending}").write_bytes((folder / kind / f"town.{ending}").read_bytes())
    out = tmp_path / "curves"
    monkeypatch.setattr(sys, "argv", ["learning_curve", str(folder), "--learn", "town", "hamlet", "--judge", "village",
                                      "--new", "--counts", "0", "5", "--out", str(out)])  # fmt: skip
    learning_curve.main()
    before, after = json.loads((out / f"{folder.name}.json").read_text())
    assert (before["accepted"], before["polygons"], before["F1@0.5"]) == (0, 0, 0)
    assert (after["accepted"], after["learned"], after["objects"]) == (2, 2, 5)
    assert after["version"].startswith(before["version"] + "-")
    ET.parse(out / f"{folder.name}.svg")
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--judge", "town"])
    with pytest.raises(SystemExit, match="different images"):
        learning_curve.main()


def test_scores_are_compared_with_the_share_that_is_right() -> None:
    square = np.array([(0, 0), (20, 0), (20, 20), (0, 20)], float)
    truth = judging.Truth(np.ones((20, 20), bool), 0, 0, 400, (0, 0, 20, 20), is_whole=False)
    tile = Tile(Path("t.png"), 1, (64, 64), (truth,))
    one = judging.matched(tile, [PreLabel(square, 0.95), PreLabel(square + 40, 0.65), PreLabel(square + 30, 1.0)])
    measured = judging.reliability([one])
    assert measured.counts == [0] * 6 + [1, 0, 0, 2]
    assert measured.shares[9] == 0.5
    assert measured.error == pytest.approx((0.65 + 2 * (0.975 - 0.5)) / 3)


def test_pictures_of_the_card_are_small_and_whole(folder: Path, backend: Backend, tmp_path: Path) -> None:
    tiles = judging.labelled_tiles(folder)
    matched = [judging.matched(tile, backend.pre_labels(tile)) for tile in tiles]
    clicked = [judging.click_through(backend, target, most=3) for target in judging.whole_objects(tiles, 4)]
    picture = card.failures(matched, clicked, backend)
    assert picture.shape[1:] == (card.WIDTH, 3)
    ET.fromstring(card.reliability_svg(judging.reliability(matched), backend.version))


@pytest.mark.parametrize("name", ["quality", "effort", "card", "learning_curve"])
def test_without_data_a_benchmark_says_so(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [name])
    runpy.run_path(str(REPOSITORY / "benchmarks" / f"{name}.py"), run_name="__main__")
    assert capsys.readouterr().out.startswith(f"{name}: not ")


@pytest.mark.parametrize(
    ("ring", "valid"),
    [
        ([(0, 0), (9, 0), (9, 9), (0, 9)], True),
        ([(0, 0), (9, 9), (9, 0), (0, 9)], False),
        # A hole, bridged from the corner of the shell.
        ([(0, 0), (9, 0), (9, 9), (0, 9), (0, 0), (3, 3), (3, 6), (6, 6), (6, 3), (3, 3)], True),
        ([(0, 0), (9, 0), (5, 0)], False),
        ([(0, 0), (9, 0)], False),
    ],
)
def test_rings_are_valid_with_bridges_and_no_other_crossing(ring: list[tuple[float, float]], valid: bool) -> None:
    assert judging.is_valid(np.array(ring, float)) is valid


@pytest.fixture
def score() -> ModuleType:
    if not SCORE.is_file():
        pytest.skip(f"no {SCORE}: the script that judges over the wire is compared with where it lies beside")
    spec = importlib.util.spec_from_file_location("score", SCORE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_definitions_are_those_of_the_judge_over_the_wire(folder: Path, backend: Backend, score: ModuleType) -> None:
    """Its own functions, given our backend in place of a server, come to the same figures."""
    ours = judging.labelled_tiles(folder)
    theirs = score.load(folder)
    config = judging.CONFIG.format(labels='<Label value="building"/>', least=0.0)

    class InProcess:
        def predict(self, image: Path, task_id: int, prompts: list[dict[str, object]] | None) -> tuple[object, float]:
            task = {"id": task_id, "data": {"image": f"/data/local-files/?d=images/{image.name}"}}
            context = None if prompts is None else {"result": prompts}
            (answer,), _ = backend._service.predict(judging.PredictRequest([task], "0", config, context))
            return answer["result"], 0.0

    given = SimpleNamespace(limit=10, min_area=150, seed=7, max_clicks=4)
    arguments = Namespace(limit=10, max_clicks=4)
    for mode in ("clicks", "boxes", "auto"):
        expected = getattr(score, f"score_{mode}")(InProcess(), theirs, "building", given)
        figures = quality.automatic(backend, ours)[0] if mode == "auto" else quality.prompted(
            backend, mode, ours, arguments
        )[0]  # fmt: skip
        shared = {name for name in expected if not name.endswith(("_s", "seconds", "seconds_per_tile"))}
        assert {name: figures[name] for name in shared} == pytest.approx({name: expected[name] for name in shared})


def test_masks_are_those_of_the_judge_over_the_wire(score: ModuleType) -> None:
    rng = np.random.default_rng(3)
    for _ in range(50):
        outline = Polygon(rng.uniform(0, 64, (5, 2))).buffer(0)
        feature = {"geometry": mapping(outline), "properties": {}}
        mask = judging._truth(feature, 64, 64).mask((64, 64))
        assert np.array_equal(mask, score.truth_mask(shape(feature["geometry"]), 64, 64))
        assert not mask.any() or judging.deepest(mask) == score.deepest(mask)
        ring = rng.integers(0, 6, (8, 2)).astype(float)
        assert judging.is_valid(ring) == score.is_valid_ring(ring)
