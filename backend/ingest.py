"""Scene → tiles: a georeferenced raster becomes images that Label Studio can show, each knowing its place on Earth.

A scene is read window by window, and tasks and manifest are written as tiles come, so memory does not grow with it. A
run that was interrupted goes on where it stopped; with other options it starts anew.
"""

from __future__ import annotations

import io
import json
import logging
import os
import queue
import re
import tempfile
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from itertools import islice, pairwise
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
from affine import Affine
from numpy.typing import NDArray
from PIL import Image

from .errors import BadScene
from .manifest import Manifest
from .mosaics import mosaic
from .prelabels import Labelled, Outlines, outlines_on
from .scenes import Pixels, Scene, SceneOptions, look
from .sources import Source, sources
from .tile import WEB_MERCATOR_HALF_M, Tile

log = logging.getLogger(__name__)

FORMATS = ("jpg", "png", "webp")

_PART = ".ingest-"
"""How the names of files begin that are not yet whole."""

_TILE_NAME = re.compile(r"^(?:r\d{4,}_c\d{4,}|\d+/\d+/\d+)\.(?:jpg|png|webp)$")


class Progress(Protocol):
    """Told now and then how far the work is."""

    def __call__(self, done: float, message: str | None = None) -> None:
        """``done`` is a share, 0…1."""


@dataclass(frozen=True, slots=True)
class IngestOptions(SceneOptions):
    """How scenes are cut."""

    tile_size: int = 512
    """Side of a tile, in pixels of the grid."""

    overlap: int = 64
    """Pixels that neighbours share, at most half a tile; the xyz grid has none."""

    format: str = "jpg"
    """``jpg``, ``png`` or ``webp``."""

    image_key: str = "image"
    """Key of the image's address in a task's data."""

    quality: int = 92
    """Of jpg and webp, 1…100."""

    def __post_init__(self) -> None:
        SceneOptions.__post_init__(self)
        if not 16 <= self.tile_size <= 8192:
            raise BadScene(f"tile_size must be 16 to 8192 pixels, got {self.tile_size}")
        if not 0 <= self.overlap <= self.tile_size // 2:
            raise BadScene(f"overlap must be 0 to {self.tile_size // 2} pixels (half a tile), got {self.overlap}")
        if self.format not in FORMATS:
            raise BadScene(f"format must be one of {', '.join(FORMATS)}, got {self.format!r}")
        if not 1 <= self.quality <= 100:
            raise BadScene(f"quality must be 1 to 100, got {self.quality}")


@dataclass(frozen=True, slots=True)
class Planned:
    """One tile of the plan."""

    row: int
    column: int
    """Of the grid of tiles, from the north-west."""

    window: tuple[int, int, int, int]
    """First column, first row, columns and rows, in scene pixels."""

    core: tuple[int, int, int, int]
    """The same in tile pixels, of the part that no other tile claims."""


@dataclass(frozen=True, slots=True)
class IngestReport:
    """What came of it."""

    scenes: int
    tiles: int
    """Tasks written: tiles that show something."""

    written: int
    """Images written by this run."""

    kept: int
    """Images that an earlier run with the same options had written."""

    empty: int
    """Tiles left out because they hold no data at all."""

    tasks_path: Path
    manifest_path: Path
    outside: int = 0
    """Tiles left out because they lie outside the area that was asked for."""

    prelabels: int = 0
    """Outlines in the tasks' predictions; one that several tiles show counts on each."""

    prelabels_left_out: Mapping[str, int] = field(default_factory=dict)
    """Why features of that file became none, and how many."""

    refused: Mapping[str, str] = field(default_factory=dict)
    """Scenes that could not be cut, or not to their end, and why; the others are there."""

    def sentence(self) -> str:
        """For a person."""
        scenes = f"{self.scenes} scene{'s' if self.scenes != 1 else ''}"
        parts = [f"{self.tiles} tiles of {scenes} in {self.tasks_path}: {self.written} written, {self.kept} kept"]
        if self.empty:
            parts.append(f"{self.empty} without data left out")
        if self.outside:
            parts.append(f"{self.outside} outside the area left out")
        if self.prelabels or self.prelabels_left_out:
            parts.append(f"{self.prelabels} outlines as pre-annotations")
        if self.refused:
            parts.append(f"{len(self.refused)} scenes refused")
        parts += [f"{count} features left out ({reason})" for reason, count in self.prelabels_left_out.items()]
        return ", ".join(parts)


# Plan -----------------------------------------------------------------------------------------------------------------


def starts(length: int, size: int, step: int) -> list[int]:
    """First pixel of each tile along one axis.

    The tiles cover ``0 … length`` without a gap, none reaches past the end, and the last one is moved back rather than
    cut short.
    """
    if length <= size:
        return [0]
    return [*range(0, length - size, step), length - size]


def plan(width: int, height: int, *, tile_size: int = 512, overlap: int = 64) -> list[Planned]:
    """The tiles of a scene of that many pixels, row by row.

    Together they cover it; each is ``tile_size`` square unless the scene is smaller. Their cores cover each pixel once:
    they meet in the middle of what neighbours share.
    """
    columns, rows = (_spans(length, tile_size, tile_size - overlap) for length in (width, height))
    return list(_spots(columns, rows))


_Span = tuple[int, int, int, int]


def _spots(columns: Sequence[_Span], rows: Sequence[_Span]) -> Iterator[Planned]:
    for row, (y, h, core_y, core_h) in enumerate(rows):
        for column, (x, w, core_x, core_w) in enumerate(columns):
            yield Planned(row, column, (x, y, w, h), (core_x - x, core_y - y, core_w, core_h))


def _spans(length: int, size: int, step: int) -> list[_Span]:
    """Start and length of each tile, and of its core, along one axis of the scene."""
    first = starts(length, size, step)
    side = min(length, size)
    # Neighbours a and b share b … a + side.
    borders = [0, *((a + side + b) // 2 for a, b in pairwise(first)), length]
    return [(start, side, borders[i], borders[i + 1] - borders[i]) for i, start in enumerate(first)]


# Scenes ---------------------------------------------------------------------------------------------------------------


def ingest(
    scenes: Sequence[str | Path],
    out: Path,
    *,
    tiles_url: str,
    options: IngestOptions | None = None,
    mosaic_name: str = "",
    asset: str = "",
    aoi: Path | None = None,
    prelabels: Labelled | None = None,
    workers: int = 1,
    progress: Progress | None = None,
) -> IngestReport:
    """Cut the scenes into ``out/tiles/<scene>/<tile>``, with ``out/tasks.json`` and ``out/manifest.parquet``.

    ``scenes`` are what `sources` takes; with ``mosaic_name`` they are one. ``tiles_url`` is where browsers find
    ``out/tiles``. Of the tiles, those are cut that polygons of ``aoi`` touch; what ``prelabels`` names becomes
    predictions in the tasks. ``workers`` are threads. Both files describe this run's scenes, and appear whole or not at
    all. Of several scenes, those that cannot be cut are reported. Raises BadScene with the scene and the way out where
    nothing is left.
    """
    options = options or IngestOptions()
    found = sources(scenes, mosaic=mosaic_name, asset=asset)
    out.mkdir(parents=True, exist_ok=True)
    counts: Counter[str] = Counter()
    left_out: Counter[str] = Counter()
    refused: dict[str, str] = {}
    for part in out.glob(f"{_PART}*.part"):
        part.unlink()
    with (
        _whole(out / "manifest.parquet") as listed,
        _whole_text(out / "tasks.json") as file,
        Manifest(listed) as manifest,
    ):
        file.write("[")
        for number, source in enumerate(found):
            try:
                with _scene_of(source, options) as scene:
                    cutting = _Cutting(scene, source.name, out / "tiles" / source.name, options, tiles_url, prelabels)
                    if aoi:
                        cutting.area, _ = outlines_on(aoi, cutting.whole)
                    if prelabels:
                        cutting.outlines, reasons = outlines_on(prelabels.path, cutting.whole, prelabels)
                        left_out.update(reasons)
                    for done, cut in _in_order(cutting, max(1, workers)):
                        counts.update([cut.what])
                        if cut.task is not None:
                            file.write(("," if counts["tiles"] else "") + "\n" + cut.task)
                            counts.update({"tiles": 1, "prelabels": cut.prelabels})
                            manifest.append(cut.tile, cut.name, cut.nodata_share)
                        if progress:
                            message = f"cutting {source.name}, {counts['written'] + counts['kept']} tiles"
                            progress((number + done) / len(found), message)
            except BadScene as error:
                if len(found) == 1:
                    raise
                refused[source.shown] = str(error)
                log.warning("%s", error)
        file.write("\n]\n")
        if not counts["tiles"]:
            raise BadScene(next(iter(refused.values()), "") or _why_nothing(found, aoi, counts))
    return IngestReport(
        len(found),
        **{name: counts[name] for name in ("tiles", "written", "kept", "empty", "outside", "prelabels")},
        tasks_path=out / "tasks.json",
        manifest_path=out / "manifest.parquet",
        prelabels_left_out=dict(left_out),
        refused=refused,
    )


def _why_nothing(found: Sequence[Source], aoi: Path | None, counts: Counter[str]) -> str:
    names = ", ".join(source.shown for source in found[:5]) + (" …" if len(found) > 5 else "")
    if counts["outside"] and aoi:
        return f"{names}: no tile with data touches the polygons of {aoi.name}"
    return f"{names}: no pixel holds data"


@contextmanager
def _scene_of(source: Source, options: IngestOptions) -> Iterator[Scene]:
    with ExitStack() as stack:
        address, title = source.addresses[0], ""
        if len(source.addresses) > 1:
            address, title = stack.enter_context(mosaic(source.addresses)), source.name
        yield look(address, options, tile_size=options.tile_size, name=title)


# Tiles ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Cut:
    """What came of one tile of the plan."""

    what: str
    """``written``, ``kept``, ``empty`` or ``outside``."""

    tile: Tile
    name: str
    nodata_share: float = 1.0
    task: str | None = None
    """As JSON; None where the tile is left out."""

    prelabels: int = 0


class _Cutting:
    """How one scene is cut: all that a thread needs to know beside the pixels."""

    def __init__(
        self, scene: Scene, name: str, folder: Path, options: IngestOptions, tiles_url: str, labelled: Labelled | None
    ) -> None:
        self.scene, self.name, self.folder, self.options, self.labelled = scene, name, folder, options, labelled
        self.is_xyz = options.grid == "xyz"
        overlap = 0 if self.is_xyz else options.overlap
        self.columns, self.rows = (_spans(side, options.tile_size, options.tile_size - overlap) for side in scene.size)
        self.total = len(self.columns) * len(self.rows)
        self.address = f"{tiles_url.rstrip('/')}/{name}"
        self.whole = Tile(scene.size, scene.crs, scene.transform, scene=name)
        self.stretch = scene.stretch.to_record(scene.bands)
        # Where every pixel is there, a tile's gaps need no look.
        self.is_full = not scene.has_gaps and scene.nodata is None and scene.palette is None
        self.area: Outlines | None = None
        self.outlines: Outlines | None = None
        self.known = _kept_tiles(scene, folder, options, self._is_wanted)

    def spots(self) -> Iterator[Planned]:
        return _spots(self.columns, self.rows)

    def file_name(self, spot: Planned) -> str:
        """Of a tile's image, within the scene's folder."""
        if self.is_xyz:
            zoom, column, row = self._first_xyz()
            return f"{zoom}/{column + spot.column}/{row + spot.row}.{self.options.format}"
        return f"r{spot.row:04d}_c{spot.column:04d}.{self.options.format}"

    def _first_xyz(self) -> tuple[int, int, int]:
        """Zoom, column and row of the tile in the scene's north-western corner."""
        place, side = self.scene.transform, self.options.tile_size
        span_m = side * place.a
        column = round((place.c + WEB_MERCATOR_HALF_M) / span_m)
        return round(np.log2(2 * WEB_MERCATOR_HALF_M / span_m)), column, round((WEB_MERCATOR_HALF_M - place.f) / span_m)

    def _is_wanted(self, file_name: str) -> bool:
        if not file_name.endswith(self.options.format):
            return False
        numbers = [int(number) for number in re.findall(r"\d+", file_name)]
        if self.is_xyz:
            _, column, row = self._first_xyz()
            spot_row, spot_column = numbers[2] - row, numbers[1] - column
        else:
            spot_row, spot_column = numbers[0], numbers[1]
        return 0 <= spot_row < len(self.rows) and 0 <= spot_column < len(self.columns)

    def cut(self, pixels: Pixels, spot: Planned) -> _Cut:
        """Write the tile's image, unless it is there, and its task."""
        name = self.file_name(spot)
        column, row = spot.window[:2]
        tile = Tile(
            size=spot.window[2:],
            crs=self.scene.crs,
            transform=self.scene.transform @ Affine.translation(column, row),
            scene=self.name,
            window=spot.window,
            core=spot.core,
            stretch=self.stretch,
            source=self.scene.source,
        )
        if self.area is not None and not self.area.touch(spot.window):
            return _Cut("outside", tile, name)
        is_kept = name in self.known
        nodata_share = 0.0
        if not is_kept or not self.is_full:
            values, valid = pixels.read(spot.window)
            nodata_share = 1.0 - float(valid.mean())
            if not valid.any():
                return _Cut("empty", tile, name)
            if not is_kept:
                image = self.scene.stretch.apply(values)
                if nodata_share:
                    image = np.where(valid, image, np.uint8(0))
                _write_image(image, self.folder / name, self.options)
        tile = replace(tile, gsd_m=round(tile.ground_size_m(), 6))
        task: dict[str, Any] = {"data": {self.options.image_key: f"{self.address}/{name}", "tile": tile.to_record()}}
        count = 0
        if self.outlines is not None and self.labelled is not None:
            prediction = self.outlines.prediction(tile, self.labelled, name)
            if prediction is not None:
                task["predictions"] = [prediction]
                count = len(prediction["result"])
        text = json.dumps(task, allow_nan=False)
        return _Cut("kept" if is_kept else "written", tile, name, nodata_share, text, count)


def _in_order(cutting: _Cutting, workers: int) -> Iterator[tuple[float, _Cut]]:
    """Each tile of the plan once it is cut, in the plan's order, and what share of the scene is done then."""
    spots = cutting.spots()
    if workers == 1 or cutting.total < 2 * workers:
        with cutting.scene.open() as pixels:
            for number, spot in enumerate(spots, 1):
                yield number / cutting.total, cutting.cut(pixels, spot)
        return
    jobs: queue.SimpleQueue[tuple[Future[_Cut], Planned] | None] = queue.SimpleQueue()
    # GDAL's reading and warping and the writing of images let other threads run; each has a handle of its own.
    threads = [threading.Thread(target=_work, args=(cutting, jobs), daemon=True) for _ in range(workers)]
    for thread in threads:
        thread.start()
    waiting: deque[Future[_Cut]] = deque()
    try:
        for number in range(1, cutting.total + 1):
            # A few ahead, so that nobody waits for work and memory stays small.
            for spot in islice(spots, 4 * workers - len(waiting)):
                future: Future[_Cut] = Future()
                waiting.append(future)
                jobs.put((future, spot))
            yield number / cutting.total, waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()
        for _ in threads:
            jobs.put(None)
        for thread in threads:
            thread.join()


def _work(cutting: _Cutting, jobs: queue.SimpleQueue[tuple[Future[_Cut], Planned] | None]) -> None:
    failed: BaseException | None = None
    with ExitStack() as stack:
        pixels: Pixels | None = None
        while (job := jobs.get()) is not None:
            future, spot = job
            if not future.set_running_or_notify_cancel():
                continue
            if failed is not None:
                future.set_exception(failed)
                continue
            try:
                pixels = pixels or stack.enter_context(cutting.scene.open())
                future.set_result(cutting.cut(pixels, spot))
            except BaseException as error:
                failed = error
                future.set_exception(error)


def _kept_tiles(scene: Scene, folder: Path, options: IngestOptions, is_wanted: Callable[[str], bool]) -> frozenset[str]:
    """Images in the folder that this run would make again just so; all others that a run has made are removed."""
    folder.mkdir(parents=True, exist_ok=True)
    made_by = {
        "source": scene.fingerprint,
        "crs": scene.crs,
        "transform": list(scene.transform[:6]),
        "size": list(scene.size),
        "shown": scene.stretch.to_record(scene.bands),
        **{key: value for key, value in asdict(options).items() if key != "image_key"},
    }
    note = folder.parent / f"{folder.name}.ingest.json"
    text = json.dumps(made_by, sort_keys=True)
    there = {path.relative_to(folder).as_posix() for path in folder.rglob("*.*")}
    # What a killed run was writing.
    for part in (name for name in there if Path(name).match(f"{_PART}*.part")):
        (folder / part).unlink()
    there = {name for name in there if _TILE_NAME.match(name)}
    is_same = note.exists() and note.read_text(encoding="utf-8") == text
    kept = {name for name in there if is_same and is_wanted(name)}
    if stale := there - kept:
        log.info("%s: removing %d tiles that were made with other options", folder.name, len(stale))
    for file_name in stale:
        (folder / file_name).unlink()
    if not is_same:
        with _whole_text(note) as file:
            file.write(text)
    return frozenset(kept)


def _write_image(image: NDArray[np.uint8], path: Path, options: IngestOptions) -> None:
    """(1 or 3, rows, columns) as an image file that appears whole or not at all."""
    # Three times as fast as moving an axis.
    shown = np.stack(list(np.broadcast_to(image, (3, *image.shape[1:]))), axis=2)
    if options.grid == "xyz":
        path.parent.mkdir(parents=True, exist_ok=True)
    with _whole(path) as part:
        part.write_bytes(_encoded(shown, options))


def _encoded(shown: NDArray[np.uint8], options: IngestOptions) -> bytes:
    buffer = io.BytesIO()
    match options.format:
        case "jpg":
            # Full colour resolution: a red roof's edge is what annotators look at.
            Image.fromarray(shown).save(buffer, "JPEG", quality=options.quality, subsampling=0)
        case "png":
            # The fastest level: aerial images hardly shrink with more.
            Image.fromarray(shown).save(buffer, "PNG", compress_level=1)
        case _:
            Image.fromarray(shown).save(buffer, "WEBP", quality=options.quality)
    return buffer.getvalue()


# Files ----------------------------------------------------------------------------------------------------------------


@contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """Where to write what takes its name when all of it is written; nothing is left of what failed."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=_PART, suffix=".part")
    os.close(handle)
    try:
        yield Path(name)
        # mkstemp makes files that only their owner reads; the web server may be another user.
        os.chmod(name, 0o644)
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)


@contextmanager
def _whole_text(path: Path) -> Iterator[IO[str]]:
    with _whole(path) as part, part.open("w", encoding="utf-8") as file:
        yield file
