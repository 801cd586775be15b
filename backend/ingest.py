"""Scene → tiles: a georeferenced raster becomes images that Label Studio can show, each knowing its place on Earth.

A scene is read window by window, and tasks and manifest are written as tiles come, so memory does not grow with it. A
run that was interrupted goes on where it stopped; with other options it starts anew.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import IO, Any, Protocol

from affine import Affine

from .cutting import Cut, Work, cut
from .errors import BadScene
from .manifest import Manifest
from .mosaics import mosaic
from .prelabels import Labelled, Outlines, outlines_on
from .scenes import Scene, SceneOptions, look
from .sources import Source, is_remote, sources
from .stores import PART, Store, label_studio_address, store_at, whole, whole_text
from .tile import Tile
from .tiles import FORMATS, NAME, Planned, TileSet, forget, register, signature
from .tiles import plan as plan

log = logging.getLogger(__name__)


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
    planned: int = 0
    """Tiles that the backend makes when they are asked for."""

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
        how = f"{self.planned} made on demand" if self.planned else f"{self.written} written, {self.kept} kept"
        parts = [f"{self.tiles} tiles of {scenes} in {self.tasks_path}: {how}"]
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


# Scenes ---------------------------------------------------------------------------------------------------------------


def ingest(
    scenes: Sequence[str | Path],
    out: Path,
    *,
    tiles_url: str = "",
    options: IngestOptions | None = None,
    mosaic_name: str = "",
    asset: str = "",
    aoi: Path | None = None,
    prelabels: Labelled | None = None,
    upload: str = "",
    is_dynamic: bool = False,
    secret: str = "",
    workers: int = 1,
    progress: Progress | None = None,
) -> IngestReport:
    """Cut the scenes into ``out/tiles/<scene>/<tile>``, with ``out/tasks.json`` and ``out/manifest.parquet``.

    ``scenes`` are what `sources` takes; with ``mosaic_name`` they are one. ``tiles_url`` is where browsers find
    ``out/tiles``. Of the tiles, those are cut that polygons of ``aoi`` touch; what ``prelabels`` names becomes
    predictions in the tasks. ``upload`` names the bucket (``s3://bucket/prefix``, ``gs://…``, ``az://…``) that tiles
    are written to in place of ``out/tiles``, and their address where there is no ``tiles_url``. With ``is_dynamic`` no
    tile is written: the scenes are registered in ``out/scenes``, and the backend makes each tile when it is asked for.
    ``secret`` signs the addresses. ``workers`` are processes. Both files describe this run's scenes, and appear whole
    or not at all. Of several scenes, those that cannot be cut are reported. Raises BadScene with the scene and the way
    out where nothing is left.
    """
    options = options or IngestOptions()
    if upload and (is_dynamic or secret):
        raise BadScene("tiles that are uploaded are neither made on demand nor signed by this backend")
    found = sources(scenes, mosaic=mosaic_name, asset=asset)
    out.mkdir(parents=True, exist_ok=True)
    store = store_at(upload or out / "tiles")
    at = (tiles_url or label_studio_address(upload)).rstrip("/")
    counts: Counter[str] = Counter()
    left_out: Counter[str] = Counter()
    refused: dict[str, str] = {}
    for part in out.glob(f"{PART}*.part"):
        part.unlink()
    with (
        whole(out / "manifest.parquet") as listed,
        whole_text(out / "tasks.json") as file,
        Manifest(listed) as manifest,
    ):
        lists = _Lists(file, manifest, counts)
        for number, source in enumerate(found):
            try:
                kept_in = out / "scenes" / f"{source.name}.mosaic" if is_dynamic else None
                with _scene_of(source, options, kept_in) as scene:
                    cutting = _Cutting(scene, source.name, options, f"{at}/{source.name}", aoi, prelabels, secret)
                    left_out.update(cutting.left_out)
                    jobs = cutting.jobs(_kept_tiles(store, source.name, cutting.tiles, options), counts)
                    for job, made in cut(cutting.tiles, None if is_dynamic else store, jobs, workers=workers):
                        lists.add(cutting, job, made)
                        if progress:
                            message = f"cutting {source.name}, {counts['tiles']} tiles"
                            progress((number + cutting.done(job)) / len(found), message)
                    if is_dynamic:
                        register(out / "scenes", source.name, cutting.tiles, source.addresses)
                    else:
                        forget(out / "scenes", source.name)
            except BadScene as error:
                if len(found) == 1:
                    raise
                refused[source.shown] = str(error)
                log.warning("%s", error)
        lists.close()
        if not counts["tiles"]:
            raise BadScene(next(iter(refused.values()), "") or _why_nothing(found, aoi, counts))
    return IngestReport(
        len(found),
        **{name: counts[name] for name in ("tiles", "written", "kept", "empty", "outside", "prelabels", "planned")},
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
def _scene_of(source: Source, options: IngestOptions, mosaic_folder: Path | None) -> Iterator[Scene]:
    with ExitStack() as stack:
        address, title = source.addresses[0], ""
        if len(source.addresses) > 1:
            address, title = stack.enter_context(mosaic(source.addresses, folder=mosaic_folder)), source.name
        elif not is_remote(address) and Path(address).exists():
            # The server that makes its tiles may run in another folder.
            address = str(Path(address).absolute())
        yield look(address, options, tile_size=options.tile_size, name=title)


# Tiles ----------------------------------------------------------------------------------------------------------------


class _Cutting:
    """How one scene is cut, and what its tasks say."""

    def __init__(
        self,
        scene: Scene,
        name: str,
        options: IngestOptions,
        address: str,
        aoi: Path | None,
        labelled: Labelled | None,
        secret: str,
    ) -> None:
        self.scene, self.name, self.address, self.labelled, self.secret = scene, name, address, labelled, secret
        self.image_key = options.image_key
        is_xyz = options.grid == "xyz"
        overlap = 0 if is_xyz else options.overlap
        self.tiles = TileSet(scene, options.tile_size, overlap, options.format, options.quality, is_xyz)
        self.stretch = scene.stretch.to_record(scene.bands)
        self._columns = len(self.tiles.columns)
        self.area: Outlines | None = None
        self.outlines: Outlines | None = None
        self.left_out: Counter[str] = Counter()
        if aoi:
            self.area, left_out = outlines_on(aoi, self._placed("--aoi"))
            if left_out and not len(self.area.polygons_px):
                raise BadScene(f"{aoi.name} has lines or points alone on {self.name}; --aoi wants polygons")
        if labelled:
            self.outlines, left_out = outlines_on(labelled.path, self._placed("--prelabels"), labelled)
            self.left_out.update(left_out)

    def _placed(self, wanted_for: str) -> Tile:
        """The whole scene as a tile. Raises BadScene where it has no place on Earth."""
        if self.scene.crs is None:
            raise BadScene(f"{self.name} has no place on Earth, so {wanted_for} cannot be laid over it")
        return Tile(self.scene.size, self.scene.crs, self.scene.transform, scene=self.name)

    def jobs(self, kept: frozenset[str], counts: Counter[str]) -> Iterator[Work]:
        """The tiles that are wanted; the others are counted."""
        for spot in self.tiles:
            if self.area is not None and not self.area.touch(spot.window):
                counts["outside"] += 1
            else:
                name = self.tiles.name_of(spot)
                yield Work(spot, f"{self.name}/{name}", name in kept)

    def done(self, job: Work) -> float:
        """The share of the scene up to that tile."""
        return (job.spot.row * self._columns + job.spot.column + 1) / len(self.tiles)

    def task(self, job: Work) -> tuple[Tile, str, int]:
        """The tile, its task as JSON, and how many outlines that has."""
        tile = self._tile(job.spot)
        name = job.name.removeprefix(f"{self.name}/")
        signed = f"?sig={signature(self.secret, self.name, name)}" if self.secret else ""
        task: dict[str, Any] = {"data": {self.image_key: f"{self.address}/{name}{signed}", "tile": tile.to_record()}}
        count = 0
        if self.outlines is not None and self.labelled is not None:
            prediction = self.outlines.prediction(tile, self.labelled, name)
            if prediction is not None:
                task["predictions"] = [prediction]
                count = len(prediction["result"])
        return tile, json.dumps(task, allow_nan=False), count

    def _tile(self, spot: Planned) -> Tile:
        tile = Tile(
            size=spot.window[2:],
            scene=self.name,
            window=spot.window,
            core=spot.core,
            stretch=self.stretch,
            source=self.scene.source,
        )
        if self.scene.crs is None:
            return tile
        column, row = spot.window[:2]
        tile = replace(tile, crs=self.scene.crs, transform=self.scene.transform @ Affine.translation(column, row))
        return replace(tile, gsd_m=round(tile.ground_size_m(), 6))


class _Lists:
    """What is said of each tile: ``tasks.json``, the manifest and the counts, as they grow."""

    def __init__(self, file: IO[str], manifest: Manifest, counts: Counter[str]) -> None:
        self._file, self._manifest, self._counts = file, manifest, counts
        file.write("[")

    def add(self, cutting: _Cutting, job: Work, made: Cut) -> None:
        self._counts.update([made.what])
        if made.what == "empty":
            return
        tile, task, outlines = cutting.task(job)
        self._file.write(("," if self._counts["tiles"] else "") + "\n" + task)
        self._counts.update({"tiles": 1, "prelabels": outlines})
        self._manifest.append(tile, job.name.removeprefix(f"{cutting.name}/"), made.nodata_share)

    def close(self) -> None:
        self._file.write("\n]\n")


def _kept_tiles(store: Store, name: str, tiles: TileSet, options: IngestOptions) -> frozenset[str]:
    """Images of the scene that this run would make again just so; all others that a run has made are removed."""
    scene = tiles.scene
    made_by = {
        "source": scene.fingerprint,
        "crs": scene.crs,
        "transform": list(scene.transform[:6]),
        "size": list(scene.size),
        "shown": scene.stretch.to_record(scene.bands),
        **{key: value for key, value in asdict(options).items() if key != "image_key"},
    }
    note, text = f"{name}.ingest.json", json.dumps(made_by, sort_keys=True).encode()
    there = {file for file in store.names(name) if NAME.match(file)}
    is_same = store.get(note) == text
    kept = {file for file in there if is_same and tiles.spot_of(file) is not None}
    if stale := there - kept:
        log.info("%s: removing %d tiles that were made with other options", name, len(stale))
    for file in stale:
        store.remove(f"{name}/{file}")
    if not is_same:
        store.put(note, text)
    return frozenset(kept)
