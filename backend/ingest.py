"""Scene → tiles: a georeferenced raster becomes images that Label Studio can show, each knowing its place on Earth.

A scene is read window by window, so memory does not grow with it. Its values become image values by one stretch for the
whole scene, recorded in every task. A run that was interrupted goes on where it stopped; with other options it starts
anew.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import math
import os
import re
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import IO, Any, Literal, Protocol

import numpy as np
import pyproj
import rasterio
from affine import Affine
from numpy.typing import NDArray
from PIL import Image
from rasterio.enums import ColorInterp, MaskFlags, Resampling
from rasterio.errors import NotGeoreferencedWarning, RasterioError
from rasterio.vrt import WarpedVRT
from rasterio.windows import Window
from shapely import MultiPolygon, Polygon

from .errors import BadScene, BadTile
from .tile import WEB_MERCATOR_HALF_M, Tile, checked_crs

log = logging.getLogger(__name__)

FORMATS = ("jpg", "png", "webp")
GRIDS = ("native", "webmercator")

_STATISTICS_SIDE_PX = 1024
_LOW_SHARE, _HIGH_SHARE = 0.02, 0.98
_TILE_NAME = re.compile(r"^r\d{4,}_c\d{4,}\.(?:jpg|png|webp)$")
_REMOTE = re.compile(r"^(?:[a-z0-9+.-]+://|/vsi)", re.IGNORECASE)


class Progress(Protocol):
    """Told now and then how far the work is."""

    def __call__(self, done: float, message: str | None = None) -> None:
        """``done`` is a share, 0…1."""


@dataclass(frozen=True, slots=True)
class IngestOptions:
    """How scenes are cut."""

    tile_size: int = 512
    """Side of a tile, in pixels of the grid."""

    overlap: int = 64
    """Pixels that neighbours share, at most half a tile."""

    bands: tuple[int, ...] | None = None
    """The band shown in grey, or the three shown as red, green and blue, counted from 1; None: chosen from the file."""

    format: str = "jpg"
    """``jpg``, ``png`` or ``webp``."""

    image_key: str = "image"
    """Key of the image's address in a task's data."""

    quality: int = 92
    """Of jpg and webp, 1…100."""

    grid: str = "native"
    """``native`` keeps the scene's own pixels; ``webmercator`` resamples them to EPSG:3857."""

    zoom: int | None = None
    """Zoom level of the web-mercator grid; None: the first that loses no detail."""

    def __post_init__(self) -> None:
        if not 16 <= self.tile_size <= 8192:
            raise BadScene(f"tile_size must be 16 to 8192 pixels, got {self.tile_size}")
        if not 0 <= self.overlap <= self.tile_size // 2:
            raise BadScene(f"overlap must be 0 to {self.tile_size // 2} pixels (half a tile), got {self.overlap}")
        if self.bands is not None and (len(self.bands) not in (1, 3) or min(self.bands) < 1):
            raise BadScene(f"bands must be one or three numbers counted from 1, such as 4,3,2, got {self.bands}")
        if self.format not in FORMATS:
            raise BadScene(f"format must be one of {', '.join(FORMATS)}, got {self.format!r}")
        if self.grid not in GRIDS:
            raise BadScene(f"grid must be one of {', '.join(GRIDS)}, got {self.grid!r}")
        if not 1 <= self.quality <= 100:
            raise BadScene(f"quality must be 1 to 100, got {self.quality}")
        if self.zoom is not None and (self.grid != "webmercator" or not 0 <= self.zoom <= 30):
            raise BadScene(f"zoom must be 0 to 30 and goes with the webmercator grid, got {self.zoom} with {self.grid}")


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
class Stretch:
    """How scene values become image values, 0…255."""

    kind: Literal["none", "percentile"]
    """``none``: the values are image values already."""

    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()
    """Of each band: the values that become 0 and 255."""

    def apply(self, values: NDArray[Any]) -> NDArray[np.uint8]:
        """Scene values, (bands, rows, columns), to image values of the same shape; what is no number becomes 0."""
        if self.kind == "none":
            return values.astype(np.uint8)
        low, high = (np.asarray(ends, np.float64)[:, None, None] for ends in (self.low, self.high))
        # Clipped before they are scaled: a stray 1e38 overflows.
        within = np.clip(np.where(np.isnan(values), low, values), low, high)
        image: NDArray[np.uint8] = np.rint((within - low) * (255.0 / (high - low))).astype(np.uint8)
        return image

    def to_record(self, bands: Sequence[int]) -> dict[str, Any]:
        """The ``stretch`` entry of a task."""
        record: dict[str, Any] = {"kind": self.kind, "bands": list(bands)}
        if self.kind == "percentile":
            record |= {"low": list(self.low), "high": list(self.high)}
        return record


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

    def sentence(self) -> str:
        """For a person."""
        scenes = f"{self.scenes} scene{'s' if self.scenes != 1 else ''}"
        parts = [f"{self.tiles} tiles of {scenes} in {self.tasks_path}: {self.written} written, {self.kept} kept"]
        return ", ".join([*parts, *([f"{self.empty} without data left out"] if self.empty else [])])


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
    return [
        Planned(row, column, (x, y, w, h), (core_x - x, core_y - y, core_w, core_h))
        for row, (y, h, core_y, core_h) in enumerate(rows)
        for column, (x, w, core_x, core_w) in enumerate(columns)
    ]


def _spans(length: int, size: int, step: int) -> list[tuple[int, int, int, int]]:
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
    progress: Progress | None = None,
) -> IngestReport:
    """Cut the scenes into ``out/tiles/<scene>/<tile>``, with ``out/tasks.json`` and ``out/manifest.parquet``.

    A scene is a path, or any address that GDAL opens. ``tiles_url`` is where browsers find ``out/tiles``. Both files
    describe this run's scenes, and appear whole or not at all. Raises BadScene with the scene and the way out.
    """
    options = options or IngestOptions()
    if not scenes:
        raise BadScene("no scene was named; give the path of a georeferenced raster")
    names = scene_names([str(scene) for scene in scenes])
    out.mkdir(parents=True, exist_ok=True)
    counts = {"written": 0, "kept": 0, "empty": 0, "tiles": 0}
    rows: list[dict[str, Any]] = []
    with _whole_file(out / "tasks.json") as file:
        file.write("[")
        for number, (scene, name) in enumerate(zip(scenes, names, strict=True)):
            with _open_scene(str(scene), options) as source:
                for tile, entry in _cut(source, name, out / "tiles" / name, options, counts):
                    if entry is not None:
                        address = f"{tiles_url.rstrip('/')}/{name}/{entry['name']}"
                        task = {"data": {options.image_key: address, "tile": tile.to_record()}}
                        file.write(("," if counts["tiles"] else "") + "\n" + json.dumps(task, allow_nan=False))
                        counts["tiles"] += 1
                        rows.append({**entry, "tile": tile})
                    if progress:
                        done = counts["written"] + counts["kept"] + counts["empty"]
                        progress((number + source.done / source.tiles) / len(scenes), f"cutting {name}, {done} tiles")
        file.write("\n]\n")
        if not rows:
            raise BadScene(f"{', '.join(str(scene) for scene in scenes)}: no pixel holds data")
        _write_manifest(rows, out / "manifest.parquet")
    return IngestReport(len(scenes), **counts, tasks_path=out / "tasks.json", manifest_path=out / "manifest.parquet")


def scene_names(sources: Sequence[str]) -> list[str]:
    """A name for each source, of letters, digits, ``.``, ``_`` and ``-``; no two alike."""
    names: list[str] = []
    for source in sources:
        last = re.split(r"[/\\]", source.split("?")[0].rstrip("/\\"))[-1]
        stem = re.sub(r"\.[A-Za-z][A-Za-z0-9]{0,4}$", "", last)
        base = re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip(".-")[:80] or "scene"
        name, number = base, 1
        while name.casefold() in {taken.casefold() for taken in names}:
            number += 1
            name = f"{base}-{number}"
        names.append(name)
    return names


@dataclass(slots=True)
class _Source:
    """An open scene on the grid that it is cut in."""

    raster: Any
    """rasterio's DatasetReader or WarpedVRT."""

    path: str
    crs: str
    bands: tuple[int, ...]
    palette: NDArray[np.uint8] | None
    """RGBA of each palette index, (256, 4), or None."""

    stretch: Stretch
    sha256: str | None
    has_gaps: bool
    """Whether pixels without data are possible."""

    tiles: int = 0
    done: int = 0

    def values(self, **where: Any) -> NDArray[Any]:
        """The chosen bands, (1 or 3, rows, columns), palettes expanded."""
        values: NDArray[Any] = self.raster.read(list(self.bands), **where)
        return values if self.palette is None else np.moveaxis(self.palette[values[0], :3], 2, 0)

    def valid(self, values: NDArray[Any], **where: Any) -> NDArray[np.bool_]:
        """Where there is data, (rows, columns)."""
        valid = np.ones(values.shape[1:], bool)
        if self.has_gaps:
            valid &= self.raster.dataset_mask(**where) > 0
        if values.dtype.kind == "f":
            valid &= np.isfinite(values).all(axis=0)
        return valid


@contextmanager
def _open_scene(path: str, options: IngestOptions) -> Iterator[_Source]:
    """The scene, checked, on the chosen grid, with its stretch. Raises BadScene."""
    with ExitStack() as stack:
        with warnings.catch_warnings():
            # Scenes without a place are refused in words below.
            warnings.simplefilter("ignore", NotGeoreferencedWarning)
            try:
                raster = stack.enter_context(rasterio.open(path))
            except RasterioError as error:
                raise BadScene(f"{path} cannot be opened: {error}") from error
            crs = _checked_place(raster, path)
        bands, palette = _chosen_bands(raster, path, options)
        if options.grid == "webmercator":
            raster = stack.enter_context(_web_mercator(raster, options, is_palette=palette is not None))
            crs = "EPSG:3857"
        has_gaps = any(MaskFlags.all_valid not in flags for flags in raster.mask_flag_enums)
        source = _Source(raster, path, crs, bands, palette, Stretch("none"), _sha256(path), has_gaps)
        try:
            source.stretch = _stretch_of(source)
            yield source
        except RasterioError as error:
            raise BadScene(f"{path} cannot be read: {error}; is the file damaged?") from error


def _checked_place(raster: Any, path: str) -> str:
    """The scene's CRS as an authority code or WKT2. Raises BadScene where it has no place that tiles could keep."""
    name = Path(path).name
    if raster.crs is None or raster.transform.is_identity:
        points, points_crs = raster.gcps
        if points:
            raise BadScene(
                f"{name} is tied to the ground by {len(points)} control points and has no geotransform;"
                f" warp it first: gdalwarp -t_srs {_code(points_crs) or 'EPSG:…'} {name} warped.tif"
            )
        if raster.rpcs is not None:
            raise BadScene(
                f"{name} has rational polynomial coefficients (RPC) and no geotransform;"
                f" orthorectify it first: gdalwarp -rpc -to RPC_DEM=dem.tif {name} ortho.tif"
            )
    if raster.crs is None:
        raise BadScene(f"{name} has no CRS; set one with gdal_edit.py -a_srs EPSG:… {name}")
    if raster.transform.is_identity or raster.transform.is_degenerate:
        raise BadScene(f"{name} has a CRS but no geotransform; set its corners with gdal_edit.py -a_ullr … {name}")
    try:
        code = _code(raster.crs)
        text = checked_crs(code or "")
        Tile((raster.width, raster.height), text, raster.transform).ground_size_m()
    except BadTile as error:
        raise BadScene(f"{name}: {error}; set the right CRS with gdal_edit.py -a_srs EPSG:… {name}") from error
    return text


def _code(crs: Any) -> str | None:
    """The horizontal part of rasterio's CRS, as an authority code where one means exactly the same, else as WKT2."""
    if crs is None:
        return None
    try:
        parsed = pyproj.CRS.from_wkt(crs.to_wkt())
    except pyproj.exceptions.CRSError:
        return None
    if parsed.is_compound:
        parsed = parsed.sub_crs_list[0]
    authority = parsed.to_authority(min_confidence=100)
    return ":".join(authority) if authority else str(parsed.to_wkt("WKT2_2019"))


def _chosen_bands(raster: Any, path: str, options: IngestOptions) -> tuple[tuple[int, ...], NDArray[np.uint8] | None]:
    """The bands to show and, for an image with a palette, the palette."""
    if options.bands is not None:
        if max(options.bands) > raster.count:
            asked = ",".join(map(str, options.bands))
            raise BadScene(f"{Path(path).name} has {raster.count} bands; --bands {asked} asks for more")
        bands = options.bands
    else:
        roles = dict(zip(raster.colorinterp, raster.indexes, strict=True))
        rgb = tuple(roles.get(role, 0) for role in (ColorInterp.red, ColorInterp.green, ColorInterp.blue))
        alpha = roles.get(ColorInterp.alpha)
        shown = [band for band in raster.indexes if band != alpha] or list(raster.indexes)
        bands = rgb if all(rgb) else tuple(shown[:3]) if len(shown) >= 3 else tuple(shown[:1])
    if np.dtype(raster.dtypes[bands[0] - 1]).kind == "c":
        raise BadScene(f"{Path(path).name} holds complex numbers; take their magnitude first")
    if len(bands) == 1 and raster.colorinterp[bands[0] - 1] == ColorInterp.palette:
        palette = np.zeros((256, 4), np.uint8)
        for index, colour in raster.colormap(bands[0]).items():
            if 0 <= index < 256:
                palette[index] = colour
        return bands, palette
    return bands, None


def _web_mercator(raster: Any, options: IngestOptions, *, is_palette: bool) -> Any:
    """The scene resampled to the pixels of a web-mercator zoom level, 256 a tile."""
    try:
        with WarpedVRT(raster, crs="EPSG:3857") as guess:
            left, bottom, right, top = guess.bounds
            native_m = min(abs(guess.transform.a), abs(guess.transform.e))
    except RasterioError as error:
        raise BadScene(f"{Path(raster.name).name} cannot be warped to EPSG:3857: {error}; use --grid native") from error
    world_m = 2 * WEB_MERCATOR_HALF_M
    zoom = options.zoom
    if zoom is None:
        zoom = min(30, max(0, math.ceil(math.log2(world_m / 256 / native_m) - 0.05)))
    pixel_m = world_m / 256 / 2**zoom
    column, row = (math.floor((v + WEB_MERCATOR_HALF_M) / pixel_m) for v in (left, -top))
    last_column, last_row = (math.ceil((v + WEB_MERCATOR_HALF_M) / pixel_m) for v in (right, -bottom))
    corner = (column * pixel_m - WEB_MERCATOR_HALF_M, WEB_MERCATOR_HALF_M - row * pixel_m)
    has_alpha = ColorInterp.alpha in raster.colorinterp
    return WarpedVRT(
        raster,
        crs="EPSG:3857",
        transform=Affine(pixel_m, 0, corner[0], 0, -pixel_m, corner[1]),
        width=last_column - column,
        height=last_row - row,
        # Palette indices cannot be averaged.
        resampling=Resampling.nearest if is_palette else Resampling.bilinear,
        # Corners that the turned scene leaves open hold no data.
        add_alpha=raster.nodata is None and not has_alpha,
    )


def _stretch_of(source: _Source) -> Stretch:
    """One stretch for the whole scene, from a sample of its pixels that hold data. Raises BadScene where none does."""
    is_bytes = source.raster.dtypes[source.bands[0] - 1] == "uint8"
    if source.palette is not None or (is_bytes and len(source.bands) == 3):
        return Stretch("none")
    samples = [values[:, valid] for values, valid in _samples(source)]
    values = np.concatenate(samples, axis=1) if samples else np.zeros((len(source.bands), 0))
    if not values.shape[1]:
        raise BadScene(f"{Path(source.path).name} holds no data: every pixel looked at is nodata or transparent")
    low, high = np.quantile(values.astype(np.float64), (_LOW_SHARE, _HIGH_SHARE), axis=1)
    # A flat band would divide by nothing.
    high = np.where(high > low, high, low + 1)
    return Stretch("percentile", tuple(low.tolist()), tuple(high.tolist()))


def _samples(source: _Source) -> Iterator[tuple[NDArray[Any], NDArray[np.bool_]]]:
    """Pixels from all over the scene: an overview where there is one, else blocks on a grid."""
    raster = source.raster
    width, height = raster.width, raster.height
    ratio = max(1.0, max(width, height) / _STATISTICS_SIDE_PX)
    if raster.overviews(source.bands[0]) or width * height <= 16 * _STATISTICS_SIDE_PX**2:
        shape = (max(1, round(height / ratio)), max(1, round(width / ratio)))
        values = source.values(out_shape=(len(source.bands), *shape), resampling=Resampling.nearest)
        yield values, source.valid(values, out_shape=shape)
        return
    # Without overviews a decimated read would go through the whole file.
    side = _STATISTICS_SIDE_PX // 8
    for row in np.linspace(0, height - side, 12, dtype=int) if height > side else [0]:
        for column in np.linspace(0, width - side, 12, dtype=int) if width > side else [0]:
            window = Window(int(column), int(row), min(side, width), min(side, height))
            values = source.values(window=window)
            yield values, source.valid(values, window=window)


# Tiles ----------------------------------------------------------------------------------------------------------------


def _cut(
    source: _Source, name: str, folder: Path, options: IngestOptions, counts: dict[str, int]
) -> Iterator[tuple[Tile, dict[str, Any] | None]]:
    """Each tile of the scene and its manifest entry, None where the tile holds no data; its image is in the folder."""
    planned = plan(source.raster.width, source.raster.height, tile_size=options.tile_size, overlap=options.overlap)
    source.tiles = len(planned)
    wanted = {f"r{spot.row:04d}_c{spot.column:04d}.{options.format}" for spot in planned}
    known = _kept_tiles(source, folder, options, wanted)
    stretch = source.stretch.to_record(source.bands)
    origin = {"path": Path(source.path).name, **({"sha256": source.sha256} if source.sha256 else {})}
    for spot in planned:
        file_name = f"r{spot.row:04d}_c{spot.column:04d}.{options.format}"
        column, row, columns, rows = spot.window
        tile = Tile(
            size=(columns, rows),
            crs=source.crs,
            transform=source.raster.transform @ Affine.translation(column, row),
            scene=name,
            window=spot.window,
            core=spot.core,
            stretch=stretch,
            source=origin,
        )
        tile = replace(tile, gsd_m=round(tile.ground_size_m(), 6))
        window = Window(column, row, columns, rows)
        is_kept = file_name in known
        source.done += 1
        if is_kept and not source.has_gaps and not _is_float(source):
            nodata_share = 0.0
        else:
            values = source.values(window=window)
            valid = source.valid(values, window=window)
            nodata_share = 1.0 - float(valid.mean())
            if not valid.any():
                counts["empty"] += 1
                yield tile, None
                continue
            if not is_kept:
                image = source.stretch.apply(values)
                image[:, ~valid] = 0
                _write_image(image, folder / file_name, options)
        counts["kept" if is_kept else "written"] += 1
        yield tile, {"scene": name, "name": file_name, "window": list(spot.window), "nodata": nodata_share}


def _is_float(source: _Source) -> bool:
    return bool(np.dtype(source.raster.dtypes[source.bands[0] - 1]).kind == "f")


def _kept_tiles(source: _Source, folder: Path, options: IngestOptions, wanted: set[str]) -> set[str]:
    """Images in the folder that this run would make again just so; all others that a run has made are removed."""
    folder.mkdir(parents=True, exist_ok=True)
    made_by = {
        "source": source.sha256,
        "crs": source.crs,
        "transform": list(source.raster.transform[:6]),
        "size": [source.raster.width, source.raster.height],
        "stretch": source.stretch.to_record(source.bands),
        **{key: value for key, value in asdict(options).items() if key != "image_key"},
    }
    note = folder.parent / f"{folder.name}.ingest.json"
    text = json.dumps(made_by, sort_keys=True)
    there = {path.name for path in folder.iterdir() if _TILE_NAME.match(path.name)}
    # A source without a checksum may have changed unseen.
    is_same = source.sha256 is not None and note.exists() and note.read_text(encoding="utf-8") == text
    stale = there - wanted if is_same else there
    if stale:
        log.info("%s: removing %d tiles that were made with other options", folder.name, len(stale))
    for file_name in stale:
        (folder / file_name).unlink()
    if not is_same:
        with _whole_file(note) as file:
            file.write(text)
    return there - stale


def _write_image(image: NDArray[np.uint8], path: Path, options: IngestOptions) -> None:
    """(1 or 3, rows, columns) as an image file that appears whole or not at all."""
    shown = Image.fromarray(np.ascontiguousarray(np.moveaxis(np.broadcast_to(image, (3, *image.shape[1:])), 0, 2)))
    buffer = io.BytesIO()
    match options.format:
        case "jpg":
            # Full colour resolution: a red roof's edge is what annotators look at.
            shown.save(buffer, "JPEG", quality=options.quality, subsampling=0)
        case "png":
            shown.save(buffer, "PNG")
        case _:
            shown.save(buffer, "WEBP", quality=options.quality)
    with _whole_file(path, "wb") as file:
        file.write(buffer.getvalue())


def _write_manifest(rows: list[dict[str, Any]], path: Path) -> None:
    """One row a tile, as GeoParquet."""
    import geopandas

    outlines = [_lonlat_outline(row["tile"]) for row in rows]
    bounds = [_west_south_east_north(outline) for outline in outlines]
    frame = geopandas.GeoDataFrame(
        {
            "scene": [row["scene"] for row in rows],
            "name": [row["name"] for row in rows],
            "window": [row["window"] for row in rows],
            **{side: [b[i] for b in bounds] for i, side in enumerate(("west", "south", "east", "north"))},
            "nodata_share": [row["nodata"] for row in rows],
        },
        geometry=outlines,
        crs="EPSG:4326",
    )
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=path.suffix)
    os.close(handle)
    try:
        frame.to_parquet(name, compression="zstd", schema_version="1.1.0", write_covering_bbox=True, index=False)
        _reveal(name, path)
    finally:
        Path(name).unlink(missing_ok=True)


def _lonlat_outline(tile: Tile) -> Polygon | MultiPolygon:
    """The tile's border on Earth, cut in two where it crosses the antimeridian."""
    border = np.asarray(tile.outline_px().segmentize(max(tile.size) / 4).exterior.coords)
    ring = tile.px_to_lonlat(border)
    if np.ptp(ring[:, 0]) <= 180:
        return Polygon(ring)
    import antimeridian

    return antimeridian.fix_polygon(Polygon(ring[:: 1 if tile.transform and tile.transform.determinant > 0 else -1]))


def _west_south_east_north(outline: Polygon | MultiPolygon) -> tuple[float, float, float, float]:
    """Bounds as in RFC 7946: west is greater than east where the outline crosses the antimeridian."""
    west, south, east, north = outline.bounds
    if isinstance(outline, MultiPolygon) and east - west > 180:
        west = min(part.bounds[0] for part in outline.geoms if part.bounds[0] > 0)
        east = max(part.bounds[2] for part in outline.geoms if part.bounds[2] < 0)
    return west, south, east, north


# Files ----------------------------------------------------------------------------------------------------------------


@contextmanager
def _whole_file(path: Path, mode: str = "w") -> Iterator[IO[Any]]:
    """A file that takes its name when all of it is written; nothing is left of one that failed."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".part")
    try:
        with os.fdopen(handle, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
        _reveal(name, path)
    finally:
        Path(name).unlink(missing_ok=True)


def _reveal(temporary: str, path: Path) -> None:
    # mkstemp makes files that only their owner reads; the web server may be another user.
    os.chmod(temporary, 0o644)
    os.replace(temporary, path)


def _sha256(path: str) -> str | None:
    """Of the file's content; None for what is no file on this machine."""
    if _REMOTE.match(path) or not Path(path).is_file():
        return None
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
