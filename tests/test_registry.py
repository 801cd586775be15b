"""Versions of projects' models: published whole, one of them live, the way back open."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from backend.errors import UnknownVersion
from backend.predictor import Predictor
from backend.registry import Registry
from backend.settings import Settings
from tests.fakes import BrightSegmenter, bright_image


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    # One database for the module, since making its tables takes seconds; each test has a project of its own.
    return Settings(data_dir=tmp_path_factory.mktemp("registry"))


@pytest.fixture(scope="module")
def registry(settings: Settings) -> Registry:
    return Registry(settings)


def publish(
    registry: Registry, project: str, name: str, folder: Path, *, promote: bool = True, parent: str = "base"
) -> None:
    heads = folder / f"{name}.safetensors"
    heads.write_bytes(name.encode())
    registry.publish(project, name, heads, parent=parent, metrics={"iou": 0.5}, tags={"note": "n"}, promote=promote)


def test_nothing_is_made_by_looking(tmp_path: Path):
    registry = Registry(Settings(data_dir=tmp_path / "new"))
    assert registry.versions() == []
    assert registry.champions() == {}
    assert not (tmp_path / "new").exists()


def test_a_published_version_is_whole_and_live(registry: Registry, tmp_path: Path):
    publish(registry, "1.5", "a-1", tmp_path)
    live = registry.champions()["1.5"]
    assert (live.name, live.number, live.parent, live.is_champion) == ("a-1", 1, "base", True)
    assert live.heads_path.read_bytes() == b"a-1"
    assert live.metrics == {"iou": 0.5}


def test_a_challenger_is_listed_and_not_live(registry: Registry, tmp_path: Path):
    publish(registry, "2.5", "b-1", tmp_path)
    publish(registry, "2.5", "b-2", tmp_path, promote=False)
    assert registry.champions()["2.5"].name == "b-1"
    assert [(v.name, v.is_champion) for v in registry.versions("2.5")] == [("b-2", False), ("b-1", True)]


def test_the_way_back_leads_to_the_parent_and_then_to_the_shipped_model(registry: Registry, tmp_path: Path):
    publish(registry, "3.5", "c-1", tmp_path)
    publish(registry, "3.5", "c-2", tmp_path, parent="c-1")
    assert registry.rollback("3.5") == "c-1"
    assert registry.champions()["3.5"].name == "c-1"
    assert registry.rollback("3.5") == ""
    assert "3.5" not in registry.champions()
    with pytest.raises(UnknownVersion):
        registry.rollback("3.5")
    assert registry.activate("3.5", "c-2").is_champion


def test_an_unknown_version_is_refused_with_those_there_are(registry: Registry, tmp_path: Path):
    publish(registry, "4.5", "d-1", tmp_path)
    with pytest.raises(UnknownVersion, match="d-1"):
        registry.activate("4.5", "d-9")
    assert registry.key("4") == "4.5"
    with pytest.raises(UnknownVersion, match="999"):
        registry.key("999")


def test_servers_see_a_promotion_without_a_restart(settings: Settings, registry: Registry, tmp_path: Path):
    predictor = Predictor(settings, Registry(settings), segmenter=BrightSegmenter())
    predictor.start()
    predictor.wait(20)
    assert predictor.version("5.5") == "bright-1"
    publish(registry, "5.5", "bright-new", tmp_path)
    seen = threading.Event()
    for _ in range(50):
        if predictor.version("5.5") == "bright-new":
            seen.set()
            break
        seen.wait(0.1)
    assert seen.is_set()
    assert predictor.model("5.5").version == "bright-new"
    assert predictor.model("6.5").version == "bright-1"
    predictor.stop()


def test_an_embedding_outlives_a_promotion(settings: Settings, registry: Registry, tmp_path: Path):
    predictor = Predictor(settings, registry, segmenter=BrightSegmenter())
    predictor.start()
    predictor.wait(20)
    before = predictor.embed(predictor.model("7.5"), bright_image(), "image")
    publish(registry, "7.5", "e-1", tmp_path)
    predictor.refresh()
    assert predictor.model("7.5").version == "e-1"
    assert predictor.embed(predictor.model("7.5"), bright_image(), "image") is before
    predictor.stop()


def test_a_damaged_version_is_never_used(settings: Settings, registry: Registry, tmp_path: Path):
    predictor = Predictor(settings, registry, segmenter=BrightSegmenter())
    publish(registry, "8.5", "f-1", tmp_path)
    registry.champions()["8.5"].heads_path.unlink()
    predictor.start()
    predictor.wait(20)
    assert predictor.model("8.5").version == "bright-1"
    assert predictor.version("8.5") == "bright-1"
    predictor.stop()
