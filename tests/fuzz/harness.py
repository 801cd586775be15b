"""Fuzzing by coverage: ``python -m tests.fuzz.harness config|rle|ring|tile|json -max_total_time=60``.

What follows the name are libFuzzer's options.

Whatever the bytes, each reader gives a value or raises its one kind of error. Where a crash is found, the input lies in
the working folder as ``crash-…``; it belongs into ``tests/fuzz/corpus/<name>/`` with the mend.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import atheris

with atheris.instrument_imports(include=["backend.labelstudio", "backend.tile", "backend.vectorize", "backend.wire"]):
    from backend import labelstudio, vectorize, wire
    from backend.tile import Tile

import numpy as np

from backend.errors import BackendError, BadConfig, BadRequest, BadTile


def config(data: bytes) -> None:
    """A label config."""
    is_any = data[:1] == b"\0"
    text = atheris.FuzzedDataProvider(data).ConsumeUnicode(len(data)) if is_any else data.decode("utf-8", "replace")
    reason = ""
    try:
        parsed = labelstudio.parse_config(text)
        labelstudio.labels_by_tag(text)
    except BadConfig as error:
        reason = str(error)
    assert len(reason.encode("latin-1")) <= labelstudio.MAX_REASON_CHARS
    for tag in () if reason else parsed.tags:
        assert tag.image_key
        tag.match(["building", "road"])


def rle(data: bytes) -> None:
    """A brush stroke: four bytes of size, then the code."""
    columns, rows = (int.from_bytes(data[n : n + 2]) for n in (0, 2))
    packed = (columns * rows * 4 % 2**32).to_bytes(4) + data[4:] if columns % 2 else data[4:]
    try:
        mask = labelstudio.brush_mask(list(packed), (columns, rows))
    except BadRequest:
        return
    assert mask.shape == (rows, columns)
    assert mask.dtype == bool


def ring(data: bytes) -> None:
    """An outline on a coarse grid, so that points meet and edges run both ways."""
    points = np.frombuffer(data[: len(data) // 2 * 2], np.int8).reshape(-1, 2).astype(np.float64)
    polygons, reasons = vectorize.unbridge(points / (4 if data[:1] < b"\x80" else 1))
    assert all(polygon.is_valid and polygon.area > 0 for polygon in polygons)
    assert polygons or reasons


def tile(data: bytes) -> None:
    """A task's ``tile`` entry as JSON."""
    try:
        found = Tile.from_record(wire.read_json(data)).at_size((64, 64))
        if found.has_place:
            found.px_to_lonlat(np.array([(0.0, 0.0), (64.0, 64.0)]))
            found.ground_size_m()
    except (BadTile, BadRequest):
        return


def json(data: bytes) -> None:
    """Any body."""
    try:
        wire.read_json(data)
    except BackendError:
        return


TARGETS: dict[str, Callable[[bytes], None]] = {"config": config, "rle": rle, "ring": ring, "tile": tile, "json": json}


def main() -> None:
    """Fuzz the target that the first argument names."""
    name, *options = sys.argv[1:]
    atheris.Setup([sys.argv[0], *options], TARGETS[name])
    atheris.Fuzz()


if __name__ == "__main__":
    main()
