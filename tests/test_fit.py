"""Accepted annotations become a version: what is learned from, and when it goes live."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import cv2
import pytest
from mlflow.tracking import MlflowClient
from shapely import box

from backend import fit, labelstudio, training
from backend.errors import TrainingError
from backend.images import ImageStore
from backend.problems import Problems
from backend.registry import Registry
from backend.settings import Settings
from backend.tile import Region, Tile
from tests.fakes import bright_image

CONFIG = labelstudio.parse_config(
    """<View><Image name="image" value="$image"/><PolygonLabels name="polygon" toName="image">
    <Label value="House"/><Label value="Tent" predicted_values="canvas"/></PolygonLabels>
    <KeyPoint name="click" toName="image" smart="true"/></View>"""
)

TENTS = replace(CONFIG, tags=tuple(replace(tag, labels=tag.labels[1:]) for tag in CONFIG.tags))


def annotated(number: int, label: str = "House", *, shift_px: int = 0, **fields: Any) -> dict[str, Any]:
    """A task on a row of tiles, with one bright house that an annotator drew, or drew beside its place."""
    image = bright_image((40 + number, 50, 90 + number, 100), size=(128, 128))
    png = cv2.imencode(".png", image)[1].tobytes()
    tile = Tile.from_xyz(19, 1000 + number, 200_000, size=(128, 128))
    regions = [Region(box(40 + number, 50 - shift_px, 90 + number, 100 - shift_px), label)]
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


def run(
    settings: Settings, project: str, tasks: list[Mapping[str, Any]], config: labelstudio.LabelConfig = CONFIG
) -> fit.Fitted:
    return fit.fit(settings, project, tasks, config, ImageStore(settings, None))


def test_too_few_tiles_to_judge_make_a_version_that_waits_for_a_persons_word(settings: Settings):
    tasks = [annotated(number) for number in range(3)]
    fitted = run(settings, "1.17", tasks)
    (version,) = Registry(settings).versions("1.17")
    assert fitted.is_new
    assert (version.name, version.is_champion) == (fitted.version, False)
    assert version.parent.startswith("compact-")
    assert version.tags["annotations"] == "3"
    assert version.metrics["judging"] is None
    assert "3 tiles are too few to judge it by, 4 are needed" in fitted.message
    assert f"geoprelabel models activate {version.name} --project 1 makes it live" in fitted.message
    assert "GEOPRELABEL_PROMOTE=always" in fitted.message

    again = run(settings, "1.17", tasks)
    assert (again.version, again.is_new) == (fitted.version, False)
    assert len(Registry(settings).versions("1.17")) == 1
    assert "1.17" not in Registry(settings).champions()

    insisted = run(settings.model_copy(update={"promote": "always"}), "1.17", tasks)
    assert "GEOPRELABEL_PROMOTE=always" in insisted.message
    assert Registry(settings).champions()["1.17"].name == fitted.version


def test_a_label_never_seen_before_gets_a_head_of_its_own(settings: Settings):
    fitted = run(settings.model_copy(update={"promote": "always"}), "2.17", [annotated(0), annotated(1, "Tent")])
    live = Registry(settings).champions()["2.17"]
    assert {label["label"] for label in live.metrics["labels"]} == {"building", "Tent"}
    assert fitted.message.endswith(f"live as GEOPRELABEL_PROMOTE=always says: {live.name}")


def test_a_version_goes_live_when_it_is_better_and_not_when_its_labels_are_spoiled(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(training, "_STEPS", 40)
    registry = Registry(settings)
    clean = run(settings, "5.17", [annotated(number, "Tent") for number in range(10)], TENTS)
    assert registry.champions().keys() >= {"5.17"}, clean.message
    live = registry.champions()["5.17"]
    assert live.name == clean.version
    assert "better on" in live.tags["note"]
    judged = live.metrics["judging"]
    assert (judged["f1"]["before"], judged["labels"]["Tent"]["f1"]["before"]) == (0, 0)
    assert judged["f1"]["after"] > 0.5
    assert judged["in_turn"]
    assert live.tags["judged_blocks"] == ""
    assert len(live.tags["learned_blocks"].split()) in (5, 6)

    spoiled = [annotated(number, "Tent", shift_px=20 * (number % 2)) for number in range(10)]
    kept = run(settings, "5.17", spoiled, TENTS)
    assert registry.champions()["5.17"].name == clean.version, kept.message
    assert "kept as challenger" in kept.message
    (challenger,) = [version for version in registry.versions("5.17") if not version.is_champion]
    assert (challenger.name, challenger.parent) == (kept.version, clean.version)
    assert challenger.tags["judged_blocks"]  # the live version learned from all: some are held out
    assert challenger.tags["data_sha256"] != live.tags["data_sha256"]

    never = settings.model_copy(update={"promote": "never"})
    assert "GEOPRELABEL_PROMOTE=never" in run(never, "6.17", [annotated(0, "Tent")]).message
    assert "6.17" not in registry.champions()


def test_a_training_is_a_run_in_mlflow_with_its_progress_and_figures(settings: Settings):
    run(settings, "7.17", [annotated(number) for number in range(8)])
    with pytest.raises(TrainingError):
        run(settings, "7.17", [{**annotated(0), "annotations": []}])
    client = MlflowClient(f"sqlite:///{settings.model_dir.absolute() / 'mlflow.db'}")
    failed, done = client.search_runs([client.get_experiment_by_name("geoprelabel-project-7.17").experiment_id])
    assert (done.info.status, failed.info.status) == ("FINISHED", "FAILED")
    assert (done.data.params["tiles_learned"], done.data.params["tiles_judged"]) == ("8", "8")
    assert {"judging/f1/before", "judging/labels/building/f1/after", "labels/building/objects"} <= set(
        done.data.metrics
    )
    assert Registry(settings).versions("7.17")[0].run_id == done.info.run_id


def test_what_cannot_be_read_is_noted_and_the_rest_is_learned_from(settings: Settings):
    broken = {**annotated(1), "data": {"image": "data:image/png;base64,AAAA"}}
    skipped = annotated(2, was_cancelled=True)
    fitted = run(settings, "3.17", [annotated(0), broken, skipped])
    assert "1 tiles" in fitted.message
    assert "task 1" in Problems(settings.data_dir).recent()[0].where


def test_of_too_many_tiles_some_with_every_label_are_learned_from_whenever_they_were_saved(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(fit, "MAX_TILES", 4)
    gathered = fit.Gathered()
    empty = [annotated(number, updated_at=f"2026-01-02T00:00:{number:02}Z", result=[]) for number in range(1, 30)]
    tasks = [annotated(0, updated_at="2026-01-01T00:00:00Z"), *empty]
    images, problems = ImageStore(settings, None), Problems(settings.data_dir)
    examples = list(
        gathered.examples(tasks, CONFIG, {"House": "building"}, images, problems, lambda done, message: None)
    )
    assert [len(example.regions) for example in examples] == [1, 0, 0, 0]
    assert {100, 128, 129} < set(gathered.annotation_ids)
    assert gathered.left_out["tiles beyond the 4 that one training takes"] == 26


def test_nothing_to_learn_from_is_said(settings: Settings):
    with pytest.raises(TrainingError, match="no annotation was submitted"):
        run(settings, "4.17", [{**annotated(0), "annotations": []}])


def test_neighbours_are_held_out_together():
    places = [fit.place_of(Tile.from_xyz(19, 1000 + number, 2000), {"id": number}) for number in range(8)]
    assert len(set(places)) in (4, 5)
    assert sorted(places, key=places.index) == places
    assert fit.place_of(Tile(size=(10, 10)), {"id": 3}) == "task 3"
