"""Exports that several processes share: the same files, and none where one of them is ended."""

from __future__ import annotations

import json
import multiprocessing
import re
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from backend import annotations
from backend.annotations import TaskFile
from backend.errors import BadRequest, ExportError
from backend.export import ExportOptions, ExportReport, export
from tests.test_export import CONFIG
from tests.test_export_arrays import mixture


def town(folder: Path, *, copies: int = 12) -> Path:
    """Tasks of two scenes that come by turns, with regions of all kinds, as a file."""
    tasks = []
    for seed in range(copies):
        for task in mixture(seed, odd=0.3):
            task["id"] = len(tasks) + 1
            task["data"]["tile"]["scene"] = f"scene {seed % 2}"
            tasks.append(task)
    path = folder / "tasks.json"
    path.write_text(json.dumps(tasks).replace("Infinity", "1e400"))
    return path


def exported(path: Path, out: Path, workers: int, **options: Any) -> tuple[str, ExportReport]:
    report = export(TaskFile(path), out, label_config=CONFIG, options=ExportOptions(**options), workers=workers)
    text = re.sub('"made_at":"[^"]*"', "", out.read_text())
    return text, replace(report, made_at="")


@pytest.mark.parametrize(("name", "merge_seams"), [("a.geojson", True), ("a.geojsonl", False)])
def test_several_processes_write_what_one_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, merge_seams: bool
) -> None:
    path = town(tmp_path)
    monkeypatch.setattr(annotations, "_CHUNK_BYTES", path.stat().st_size // 9)
    alone, shared = (exported(path, tmp_path / name, workers, merge_seams=merge_seams) for workers in (1, 2))
    assert shared == alone
    report = alone[1]
    assert report.features > 100
    assert report.dropped
    assert len(report.labels) == 2


def test_geometries_come_back_where_a_format_wants_them(tmp_path: Path) -> None:
    import geopandas

    path = town(tmp_path, copies=3)
    one, two = (
        (export(TaskFile(path), tmp_path / f"{workers}.parquet", workers=workers), tmp_path / f"{workers}.parquet")[1]
        for workers in (1, 2)
    )
    assert geopandas.read_parquet(one).equals(geopandas.read_parquet(two))


class Ended(TaskFile):
    """A file during which something happens to the processes, or to this one."""

    what: str = "interrupted"

    def texts(self) -> Iterator[bytes]:
        for number, text in enumerate(super().texts()):
            yield text
            if number == 6:
                if self.what == "interrupted":
                    raise KeyboardInterrupt
                for child in multiprocessing.active_children():
                    child.kill()


@pytest.mark.parametrize("what", ["interrupted", "killed"])
def test_whoever_is_ended_leaves_no_half_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    path = town(tmp_path)
    monkeypatch.setattr(annotations, "_CHUNK_BYTES", path.stat().st_size // 20)
    monkeypatch.setattr(Ended, "what", what)
    out = tmp_path / "out" / "a.geojson"
    error, says = (KeyboardInterrupt, "^$") if what == "interrupted" else (ExportError, "was ended")
    with pytest.raises(error, match=says):
        export(Ended(path), out, label_config=CONFIG, workers=2)
    assert list(out.parent.iterdir()) == []
    until = time.monotonic() + 30
    while multiprocessing.active_children() and time.monotonic() < until:
        time.sleep(0.05)
    assert not multiprocessing.active_children()


def test_a_broken_file_is_refused_by_several_as_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = town(tmp_path, copies=4)
    monkeypatch.setattr(annotations, "_CHUNK_BYTES", path.stat().st_size // 5)
    tasks = json.loads(path.read_text().replace("1e400", "1"))
    path.write_text(json.dumps([*tasks[:-2], {"id": 5}, tasks[-1]]))
    for workers in (1, 2):
        with pytest.raises(BadRequest, match=f"task number {len(tasks) - 2} has no data"):
            export(TaskFile(path), tmp_path / "a.geojson", label_config=CONFIG, workers=workers)
    path.write_text(json.dumps(tasks)[:-1])
    for workers in (1, 2):
        with pytest.raises(BadRequest, match="is not JSON"):
            export(TaskFile(path), tmp_path / "a.geojson", label_config=CONFIG, workers=workers)
    assert not (tmp_path / "a.geojson").exists()
