"""Accepted annotations become a version: what is learned from, and when it goes live."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

import cv2
import pytest
from shapely import box

from backend import fit, labelstudio, training
from backend.errors import TrainingError
from backend.images import ImageStore
from backend.problems import Problems
from backend.registry import Registry
from backend.settings import Settings
from backend.tile import Region, Tile
from backend.training import LabelReport, TrainingReport
from tests.fakes import bright_image

CONFIG = labelstudio.parse_config(
    """<View><Image name="image" value="$image"/><PolygonLabels name="polygon" toName="image">
    <Label value="House"/><Label value="Tent" predicted_values="canvas"/></PolygonLabels>
    <KeyPoint name="click" toName="image" smart="true"/></View>"""
)


def annotated(number: int, label: str = "House", **fields: Any) -> dict[str, Any]:
    """A task on a row of tiles, with one bright house that an annotator drew."""
    image = bright_image((40 + number, 50, 90 + number, 100), size=(128, 128))
    png = cv2.imencode(".png", image)[1].tobytes()
    tile = Tile.from_xyz(19, 1000 + number, 2000, size=(128, 128))
    regions = [Region(box(40 + number, 50, 90 + number, 100), label)]
    results = labelstudio.results_of(regions, CONFIG.tags[0], tile, task_id=number)
    click = {"type": "keypoint", "from_name": "click", "to_name": "image", "id": "k", "is_positive": True,
             "value": {"x": 5, "y": 5, "width": 1}}  # fmt: skip
    return {
        "id": number,
        "data": {"image": "data:image/png;base64," + base64.b64encode(png).decode(), "tile": tile.to_record()},
        "annotations": [{"id": 100 + number, "result": [*results, click], "was_cancelled": False, **fields}],
    }


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    # One registry for all tests, since making its tables takes seconds; each has a project of its own.
    return Settings(data_dir=tmp_path_factory.mktemp("fit"))


@pytest.fixture(autouse=True)
def _few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "_STEPS", 20)


def run(settings: Settings, project: str, tasks: list[Mapping[str, Any]]) -> fit.Fitted:
    return fit.fit(settings, project, tasks, CONFIG, ImageStore(settings, None))


def test_a_version_is_made_and_published_and_the_same_data_make_no_second_one(settings: Settings):
    tasks = [annotated(number) for number in range(3)]
    fitted = run(settings, "1.17", tasks)
    live = Registry(settings).champions()["1.17"]
    assert fitted.is_new
    assert live.name == fitted.version
    assert live.parent.startswith("compact-")
    assert live.tags["annotations"] == "3"
    assert "3 tiles" in fitted.message
    again = run(settings, "1.17", tasks)
    assert (again.version, again.is_new) == (fitted.version, False)
    assert len(Registry(settings).versions("1.17")) == 1


def test_a_label_never_seen_before_gets_a_head_of_its_own(settings: Settings):
    run(settings, "2.17", [annotated(0), annotated(1, "Tent")])
    live = Registry(settings).champions()["2.17"]
    assert {label["label"] for label in live.metrics["labels"]} == {"building", "Tent"}


def test_what_cannot_be_read_is_noted_and_the_rest_is_learned_from(settings: Settings):
    broken = {**annotated(1), "data": {"image": "data:image/png;base64,AAAA"}}
    skipped = annotated(2, was_cancelled=True)
    fitted = run(settings, "3.17", [annotated(0), broken, skipped])
    assert "1 tiles" in fitted.message
    assert "task 1" in Problems(settings.data_dir).recent()[0].where


def test_of_too_many_tiles_the_newest_are_learned_from(settings: Settings, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(fit, "MAX_TILES", 2)
    gathered = fit.Gathered()
    tasks, labels = [annotated(number) for number in range(4)], {"House": "building"}
    images, problems = ImageStore(settings, None), Problems(settings.data_dir)
    examples = list(gathered.examples(tasks, CONFIG, labels, images, problems, lambda done, message: None))
    assert gathered.annotation_ids == [102, 103]
    assert [len(example.regions) for example in examples] == [1, 1]
    assert gathered.left_out["tiles older than the newest 2"] == 2


def test_nothing_to_learn_from_is_said(settings: Settings):
    with pytest.raises(TrainingError, match="no annotation was submitted"):
        run(settings, "4.17", [{**annotated(0), "annotations": []}])


def test_neighbours_are_held_out_together():
    places = [fit.place_of(Tile.from_xyz(19, 1000 + number, 2000), {"id": number}) for number in range(8)]
    assert len(set(places)) in (4, 5)
    assert sorted(places, key=places.index) == places
    assert fit.place_of(Tile(size=(10, 10)), {"id": 3}) == "task 3"


@pytest.mark.parametrize(
    ("before_and_after", "held_out", "goes_live"),
    [
        ([(0.5, 0.6)], ("a",), True),
        ([(0.5, 0.5)], ("a",), False),
        ([(0.5, 0.4)], ("a",), False),
        ([(0.5, 0.7), (0.5, 0.4)], ("a",), False),
        ([(None, 0.3)], ("a",), True),
        ([(None, None)], (), True),
    ],
)
def test_a_version_goes_live_only_when_it_is_better_on_held_out_tiles(before_and_after, held_out, goes_live):
    labels = tuple(LabelReport(f"l{i}", 9, 20, before, after) for i, (before, after) in enumerate(before_and_after))
    report = TrainingReport(labels, (), 9, held_out, 1.0)
    assert fit.verdict(report)[0] is goes_live
