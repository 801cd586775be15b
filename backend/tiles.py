"""The tiles of a scene: which there are, the image of each to the byte, and those made only when they are asked for.

A scene whose tiles are not written is registered by ingest, in a file of its own; requests name registered scenes,
never a path or an address.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import hmac
import io
import json
import math
import os
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL import __version__ as pillow_version

from .errors import BadScene, Busy
from .sources import is_remote
from .stores import whole_text
from .tile import WEB_MERCATOR_HALF_M

if TYPE_CHECKING:
    from .scenes import Pixels, Scene

FORMATS = ("jpg", "png", "webp")

NAME = re.compile(r"^(?:r\d{4,}_c\d{4,}|\d{1,2}/\d{1,10}/\d{1,10})\.(?:jpg|png|webp)$")
"""Of a tile within its scene's folder: row and column of the plan, or a web map's zoom, column and row."""

_SCENE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_WAIT_S = 20.0
"""For a turn at making a tile; browsers and Label Studio give up later."""


# Plan -----------------------------------------------------------------------------------------------------------------


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
    return (_planned(columns, rows, row, column) for row in range(len(rows)) for column in range(len(columns)))


def _planned(columns: Sequence[_Span], rows: Sequence[_Span], row: int, column: int) -> Planned:
    (x, w, core_x, core_w), (y, h, core_y, core_h) = columns[column], rows[row]
    return Planned(row, column, (x, y, w, h), (core_x - x, core_y - y, core_w, core_h))


def _spans(length: int, size: int, step: int) -> list[_Span]:
    """Start and length of each tile, and of its core, along one axis of the scene."""
    first = starts(length, size, step)
    side = min(length, size)
    # Neighbours a and b share b … a + side.
    borders = [0, *((a + side + b) // 2 for a, b in pairwise(first)), length]
    return [(start, side, borders[i], borders[i + 1] - borders[i]) for i, start in enumerate(first)]


# Images ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TileSet:
    """All that it takes to make any tile of a scene again."""

    scene: Scene
    tile_size: int
    overlap: int
    """Pixels that neighbours share; none on the xyz grid."""

    format: str
    """``jpg``, ``png`` or ``webp``."""

    quality: int
    is_xyz: bool

    @functools.cached_property
    def columns(self) -> list[_Span]:
        """First pixel and length of each column of tiles, and of its core, in scene pixels."""
        return _spans(self.scene.size[0], self.tile_size, self.tile_size - self.overlap)

    @functools.cached_property
    def rows(self) -> list[_Span]:
        """The same of rows."""
        return _spans(self.scene.size[1], self.tile_size, self.tile_size - self.overlap)

    def __len__(self) -> int:
        return len(self.columns) * len(self.rows)

    def __iter__(self) -> Iterator[Planned]:
        """The plan, row by row."""
        return _spots(self.columns, self.rows)

    def name_of(self, spot: Planned) -> str:
        """Of a tile's image, within the scene's folder."""
        if self.is_xyz:
            zoom, column, row = self._first_xyz
            # East of the antimeridian web maps begin anew.
            return f"{zoom}/{(column + spot.column) % 2**zoom}/{row + spot.row}.{self.format}"
        return f"r{spot.row:04d}_c{spot.column:04d}.{self.format}"

    def spot_of(self, name: str) -> Planned | None:
        """The tile of that name; None for any other name."""
        if not NAME.match(name):
            return None
        numbers = [int(number) for number in re.findall(r"\d+", name)]
        if self.is_xyz and len(numbers) == 3:
            zoom, first_column, first_row = self._first_xyz
            column, row = (numbers[1] - first_column) % 2**zoom, numbers[2] - first_row
        else:
            row, column = numbers[:2]
        if not (0 <= row < len(self.rows) and 0 <= column < len(self.columns)):
            return None
        spot = _planned(self.columns, self.rows, row, column)
        return spot if self.name_of(spot) == name else None

    @functools.cached_property
    def _first_xyz(self) -> tuple[int, int, int]:
        """Zoom, column and row of the tile in the scene's north-western corner."""
        place = self.scene.transform
        span_m = self.tile_size * place.a
        column, row = round((place.c + WEB_MERCATOR_HALF_M) / span_m), round((WEB_MERCATOR_HALF_M - place.f) / span_m)
        return round(math.log2(2 * WEB_MERCATOR_HALF_M / span_m)), column, row

    @property
    def is_full(self) -> bool:
        """Whether every pixel holds data, so that a tile's gaps need no look."""
        return not self.scene.has_gaps and self.scene.nodata is None and self.scene.palette is None

    def image(self, pixels: Pixels, spot: Planned, *, is_wanted: bool = True) -> tuple[NDArray[np.uint8] | None, float]:
        """A tile's image values, (1 or 3, rows, columns), and the share of its pixels without data.

        None where it holds no data at all, or ``is_wanted`` is not set. Raises BadScene.
        """
        values, valid = pixels.read(spot.window)
        nodata_share = 1.0 - float(valid.mean())
        if not is_wanted or not valid.any():
            return None, nodata_share
        image = self.scene.stretch.apply(values)
        return (np.where(valid, image, np.uint8(0)) if nodata_share else image), nodata_share

    def encoded(self, image: NDArray[np.uint8]) -> bytes:
        """(1 or 3, rows, columns) as a file."""
        # Three times as fast as moving an axis.
        shown = Image.fromarray(np.stack(list(np.broadcast_to(image, (3, *image.shape[1:]))), axis=2))
        buffer = io.BytesIO()
        match self.format:
            case "jpg":
                # Full colour resolution: a red roof's edge is what annotators look at.
                shown.save(buffer, "JPEG", quality=self.quality, subsampling=0)
            case "png":
                # The fastest level: aerial images hardly shrink with more.
                shown.save(buffer, "PNG", compress_level=1)
            case _:
                shown.save(buffer, "WEBP", quality=self.quality)
        return buffer.getvalue()

    def to_record(self) -> dict[str, Any]:
        """As JSON, for `from_record`."""
        kept = {name: getattr(self, name) for name in ("tile_size", "overlap", "format", "quality", "is_xyz")}
        return {**kept, "scene": self.scene.to_record()}

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> TileSet:
        """What `to_record` gave."""
        from .scenes import Scene

        return cls(**{**record, "scene": Scene.from_record(record["scene"])})


# Made when they are asked for -----------------------------------------------------------------------------------------


def register(folder: Path, name: str, tiles: TileSet, parts: Sequence[str]) -> None:
    """Have `SceneTiles` of that folder make the scene's tiles. ``parts`` are the addresses of its rasters."""
    folder.mkdir(parents=True, exist_ok=True)
    # The address of a scene may be a presigned one.
    folder.chmod(0o700)
    # The server may run in another folder.
    ages = {str(Path(part).absolute()): _age(Path(part)) for part in parts if not is_remote(part)}
    record = {"tiles": tiles.to_record(), "parts": {part: age for part, age in ages.items() if age}}
    with whole_text(folder / f"{name}.json") as file:
        json.dump(record, file)


def forget(folder: Path, name: str) -> None:
    """Make the scene's tiles no longer."""
    (folder / f"{name}.json").unlink(missing_ok=True)


@dataclass(frozen=True, slots=True)
class _Registered:
    tiles: TileSet
    parts: Mapping[str, Sequence[int]]
    digest: str
    age: Sequence[int]


class SceneTiles:
    """Tiles of registered scenes, made from the scene's pixels when they are asked for. May be shared by threads.

    The bytes are those that ingest writes. ``at_once`` tiles are made at a time; of scenes, ``max_open`` handles stay
    open between them.
    """

    def __init__(self, folder: Path, *, at_once: int = 4, max_open: int = 16) -> None:
        self._folder = folder
        self._turns = threading.BoundedSemaphore(at_once)
        self._max_open = max_open
        self._lock = threading.Lock()
        self._known: dict[str, _Registered] = {}
        self._idle: list[tuple[str, Pixels]] = []

    def etag(self, scene: str, name: str) -> str | None:
        """Changes when the tile's bytes could; None for a tile that is not there. Nothing is read from the scene."""
        found = self._registered(scene)
        if found is None or found.tiles.spot_of(name) is None:
            return None
        return hashlib.sha256(f"{found.digest} {name} {pillow_version}".encode()).hexdigest()[:32]

    def image(self, scene: str, name: str) -> bytes | None:
        """The tile's file; None for a tile that is not there, or holds no data.

        Raises BadScene where the scene cannot be read or is no longer the one that was registered, and Busy.
        """
        found = self._registered(scene)
        spot = found.tiles.spot_of(name) if found else None
        if found is None or spot is None:
            return None
        from .scenes import environment

        if changed := next((part for part, age in found.parts.items() if _age(Path(part)) != list(age)), ""):
            raise BadScene(f"scene {scene}: {Path(changed).name} is gone or has changed; ingest it again")
        if not self._turns.acquire(timeout=_WAIT_S):
            raise Busy(f"more tiles are asked for than can be made in {_WAIT_S:g} s; ask again")
        try:
            with environment(found.tiles.scene.address):
                pixels = self._idle_one(found.digest) or found.tiles.scene.opened()
                try:
                    image, _ = found.tiles.image(pixels, spot)
                except BaseException:
                    pixels.close()
                    raise
                self._put_back(found.digest, pixels)
            return None if image is None else found.tiles.encoded(image)
        finally:
            self._turns.release()

    def close(self) -> None:
        """Let go of all files; more may be asked for afterwards."""
        with self._lock:
            idle, self._idle = self._idle, []
        for _, pixels in idle:
            pixels.close()

    def _registered(self, scene: str) -> _Registered | None:
        path = self._folder / f"{scene}.json"
        age = _age(path) if _SCENE_NAME.fullmatch(scene) else None
        if age is None:
            return None
        known = self._known.get(scene)
        if known is None or known.age != age:
            content = path.read_bytes()
            record = json.loads(content)
            known = _Registered(
                TileSet.from_record(record["tiles"]), record["parts"], hashlib.sha256(content).hexdigest(), age
            )
            # Operators make these, so there are not many.
            self._known[scene] = known
        return known

    def _idle_one(self, digest: str) -> Pixels | None:
        with self._lock:
            at = next((i for i, (whose, _) in enumerate(self._idle) if whose == digest), None)
            return None if at is None else self._idle.pop(at)[1]

    def _put_back(self, digest: str, pixels: Pixels) -> None:
        with self._lock:
            self._idle.append((digest, pixels))
            oldest = self._idle.pop(0)[1] if len(self._idle) > self._max_open else None
        if oldest is not None:
            oldest.close()


def _age(path: Path) -> list[int] | None:
    try:
        about = os.stat(path)
    except OSError:
        return None
    return [about.st_size, about.st_mtime_ns]


# Signed addresses -----------------------------------------------------------------------------------------------------


def signature(secret: str, scene: str, name: str) -> str:
    """What ``?sig=`` of a tile's address must be."""
    digest = hmac.digest(secret.encode(), f"tile {scene}/{name}".encode(), "sha256")
    return base64.urlsafe_b64encode(digest[:24]).decode()
