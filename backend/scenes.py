"""A georeferenced raster as annotators are to see it: its place checked, on the grid that tiles are cut in, in colours.

Everything is read window by window, so memory does not grow with the scene.
"""

from __future__ import annotations

import hashlib
import math
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyproj
import rasterio
from affine import Affine
from numpy.typing import NDArray
from pyproj.aoi import AreaOfInterest
from pyproj.database import query_utm_crs_info
from rasterio.enums import ColorInterp, MaskFlags, Resampling
from rasterio.errors import NotGeoreferencedWarning, RasterioError
from rasterio.transform import GCPTransformer
from rasterio.vrt import WarpedVRT
from rasterio.windows import Window

from .errors import BadScene, BadTile
from .sources import is_remote, shown
from .stretch import Stretch
from .tile import WEB_MERCATOR_HALF_M, Tile, checked_crs

GRIDS = ("native", "webmercator", "xyz")

_SAMPLE_SIDE_PX = 1024
_XYZ_NAME = re.compile(r"(?:^|[/\\])(\d{1,2})[/_](\d+)[/_](\d+)\.[A-Za-z]+$")
_WORST_GCP_RMS_PX = 20.0
_PACIFIC = (
    "+proj=merc +a=6378137 +b=6378137 +lat_ts=0 +lon_0=180 +x_0=0 +y_0=0 +k=1 +units=m +nadgrids=@null +wktext +no_defs"
)
"""EPSG:3857 with the antimeridian in the middle: its x is less by half the world."""

MAX_CACHE_BYTES = 256 * 2**20
"""Of GDAL's blocks. It takes a share of the machine's memory else, whatever else runs there."""

GDAL_OPTIONS: Mapping[str, Any] = {"GDAL_HTTP_MAX_RETRY": "4", "GDAL_HTTP_RETRY_DELAY": "1", "VSI_CACHE": "TRUE"}
"""Times and seconds; what the operator has set in the environment counts instead."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SceneOptions:
    """How a scene is shown."""

    bands: tuple[int, ...] | None = None
    """The band shown in grey, or the three shown as red, green and blue, counted from 1; None: chosen from the file."""

    nodata: float | None = None
    """The value of pixels that hold no data; None: what the file says."""

    stretch: Stretch | None = None
    """None: bytes in three bands as they are, all else from 2 to 98 % of the scene's values."""

    grid: str = "native"
    """``native`` keeps the scene's own pixels; ``webmercator`` resamples them to EPSG:3857, and ``xyz`` does so in the
    tiles that web maps use."""

    zoom: int | None = None
    """Zoom level of the web-mercator grids; None: the first that loses no detail."""

    rpc_height_m: float | None = None
    """Height of the ground above the ellipsoid, for scenes that only have RPCs; None: those are refused."""

    xyz_names: bool = False
    """Images without a place take that of the web-mercator tile that they are named after: z_x_y.png, z/x/y.png."""

    crs: str = ""
    """The CRS of scenes whose file does not say it (a world file never does), or says it wrongly; empty: the file's."""

    no_place: bool = False
    """Images without a place are taken as they are; those with one keep it."""

    def __post_init__(self) -> None:
        if self.crs:
            try:
                checked_crs(self.crs)
            except BadTile as error:
                raise BadScene(str(error)) from error
        if self.bands is not None and (len(self.bands) not in (1, 3) or min(self.bands) < 1):
            raise BadScene(f"bands must be one or three numbers counted from 1, such as 4,3,2, got {self.bands}")
        if self.grid not in GRIDS:
            raise BadScene(f"grid must be one of {', '.join(GRIDS)}, got {self.grid!r}")
        if self.zoom is not None and (self.grid == "native" or not 0 <= self.zoom <= 30):
            raise BadScene(f"zoom must be 0 to 30 and goes with a web-mercator grid, got {self.zoom} with {self.grid}")
        if self.no_place and (self.crs or self.grid != "native"):
            raise BadScene(f"no_place goes with the native grid and without a CRS, got {self.crs or self.grid}")


@dataclass(frozen=True, slots=True, eq=False)
class Scene:
    """What is known of a scene once it was looked at; it can be opened any number of times, by any thread."""

    address: str
    """What GDAL opens."""

    crs: str | None
    """Authority code or WKT2; None: the image has no place on Earth."""

    transform: Affine
    """Pixel corner of the grid that tiles are cut in → CRS units, or the image's own pixels."""

    size: tuple[int, int]
    """Columns and rows of that grid."""

    bands: tuple[int, ...]
    palette: NDArray[np.uint8] | None
    """RGBA of each palette index, (256, 4), or None."""

    nodata: float | None
    """The operator's, not the file's."""

    warps: tuple[Mapping[str, Any], ...]
    """How the file's pixels come to lie on the grid, step by step; none: they are the grid."""

    is_flipped: bool
    """Rows run the other way in the file, which shows the ground mirrored."""

    has_gaps: bool
    """Whether pixels without data are possible."""

    stretch: Stretch
    fingerprint: str
    """Changes when the scene does."""

    source: Mapping[str, Any] = field(default_factory=dict)
    """What tasks say of where they come from."""

    @contextmanager
    def open(self) -> Iterator[Pixels]:
        """The scene's pixels. A handle is for one thread at a time. Raises BadScene."""
        with environment(self.address), closing(self.opened()) as pixels:
            yield pixels

    def opened(self) -> Pixels:
        """The same for whoever closes it, where GDAL's `environment` is entered around each use. Raises BadScene."""
        with ExitStack() as stack:
            try:
                raster = stack.enter_context(_raster(self.address))
                for warp in self.warps:
                    raster = stack.enter_context(WarpedVRT(raster, **warp))
            except RasterioError as error:
                raise _unreadable(self.address, error) from error
            return Pixels(raster, self, stack.pop_all())

    def to_record(self) -> dict[str, Any]:
        """As JSON, for `from_record`. It holds the address, which may hold secrets."""
        record = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        stretch = {"kind": self.stretch.kind, "low": self.stretch.low, "high": self.stretch.high}
        warps = [{name: _plain(value) for name, value in warp.items()} for warp in self.warps]
        palette = None if self.palette is None else self.palette.tolist()
        return {**record, "transform": self.transform[:6], "stretch": stretch, "warps": warps, "palette": palette}

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Scene:
        """What `to_record` gave, without another look at the scene."""
        given = dict(record)
        stretch = given.pop("stretch")
        warps = [{**warp, "resampling": Resampling(warp["resampling"])} for warp in given.pop("warps")]
        for warp in warps:
            if "transform" in warp:
                warp["transform"] = Affine(*warp["transform"])
        palette = given.pop("palette")
        return cls(
            **{
                **given,
                "transform": Affine(*given["transform"]),
                "size": tuple(given["size"]),
                "bands": tuple(given["bands"]),
                "palette": None if palette is None else np.array(palette, np.uint8),
                "warps": tuple(warps),
                "stretch": Stretch(stretch["kind"], tuple(stretch["low"]), tuple(stretch["high"])),
            }
        )


def _plain(value: Any) -> Any:
    if isinstance(value, Affine):
        return value[:6]
    return value.to_wkt() if isinstance(value, rasterio.crs.CRS) else value


class Pixels:
    """An open scene."""

    def __init__(self, raster: Any, scene: Scene, held: ExitStack) -> None:
        self.raster = raster
        self.scene = scene
        self._held = held

    def close(self) -> None:
        """Let go of the files."""
        self._held.close()

    def read(
        self, window: tuple[int, int, int, int] | None = None, *, shape: tuple[int, int] | None = None
    ) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        """The chosen bands, (1 or 3, rows, columns), palettes expanded; and where there is data, (rows, columns).

        ``window`` is first column, first row, columns and rows; None: the whole scene. ``shape`` makes fewer of them.
        """
        scene = self.scene
        where: dict[str, Any] = {}
        if window is not None:
            column, row, columns, rows = window
            where["window"] = Window(column, scene.size[1] - row - rows if scene.is_flipped else row, columns, rows)
        counted = {"out_shape": (len(scene.bands), *shape)} if shape else {}
        try:
            values: NDArray[Any] = self.raster.read(
                list(scene.bands), resampling=Resampling.nearest, **where, **counted
            )
            valid = np.ones(values.shape[1:], bool)
            if scene.has_gaps:
                valid &= self.raster.dataset_mask(**where, **({"out_shape": shape} if shape else {})) > 0
        except RasterioError as error:
            raise _unreadable(scene.address, error) from error
        if scene.nodata is not None and not scene.warps:
            valid &= (values != scene.nodata).any(axis=0)
        if values.dtype.kind == "f":
            valid &= np.isfinite(values).all(axis=0)
        if scene.palette is not None:
            colours = scene.palette[values[0]]
            valid &= colours[..., 3] > 0
            values = np.moveaxis(colours[..., :3], 2, 0)
        return (values[:, ::-1], valid[::-1]) if scene.is_flipped else (values, valid)


def look(address: str, options: SceneOptions, *, tile_size: int = 256, name: str = "") -> Scene:
    """A scene, checked, on the chosen grid, with its stretch. Raises BadScene with the way out.

    ``name`` is for people, where the address says nothing (a mosaic's).
    """
    title = name or Path(shown(address)).name
    with ExitStack() as stack:
        try:
            raster = stack.enter_context(_opened(address))
        except RasterioError as error:
            raise BadScene(f"{shown(address)} cannot be opened: {_reason(error)}") from error
        try:
            scene = _on_grid(raster, address, title, options, tile_size)
            is_given = options.stretch is not None
            digest = _sha256(address) if raster.driver not in ("VRT", "GTI") else None
            shows_bytes = scene.palette is not None or (len(scene.bands) == 3 and _dtype(raster, scene) == "uint8")
            stretch = options.stretch or Stretch("none")
            fingerprint = digest or ""
            if digest is None or not (is_given or shows_bytes):
                with scene.open() as pixels:
                    samples = [(values, valid) for values, valid in _samples(pixels)]
                fingerprint = digest or _digest(samples, raster)
                if not is_given and not shows_bytes:
                    found = Stretch.of_samples(values[:, valid] for values, valid in samples)
                    if found is None:
                        raise BadScene(f"{title} holds no data: every pixel looked at is nodata or transparent")
                    stretch = found
        except RasterioError as error:
            raise _unreadable(address, error) from error
    source = {"path": title, **scene.source, **({"sha256": digest} if digest else {})}
    return replace(scene, stretch=stretch, fingerprint=fingerprint, source=source)


@contextmanager
def environment(address: str) -> Iterator[None]:
    """GDAL set up for what lies at that address, in this thread."""
    from rasterio._env import get_gdal_config

    wanted = {**GDAL_OPTIONS}
    if is_remote(address):
        # Without it GDAL asks the store for a list of all that lies beside the file.
        wanted["GDAL_DISABLE_READDIR_ON_OPEN"] = "EMPTY_DIR"
    options = {name: value for name, value in wanted.items() if get_gdal_config(name) is None}
    cache = min(get_gdal_config("GDAL_CACHEMAX"), MAX_CACHE_BYTES)
    with rasterio.Env(**options, GDAL_CACHEMAX=cache):
        yield


@contextmanager
def _opened(address: str) -> Iterator[Any]:
    with environment(address), _raster(address) as raster:
        yield raster


def _raster(address: str) -> Any:
    with warnings.catch_warnings():
        # Scenes without a place are refused in words, or wanted.
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        return rasterio.open(address)


def _on_grid(raster: Any, address: str, title: str, options: SceneOptions, tile_size: int) -> Scene:
    """The scene on the chosen grid, without its stretch."""
    bands, palette = _chosen_bands(raster, title, options)
    named = _place_in_name(raster, address) if options.xyz_names and options.grid == "native" else None
    is_placeless = options.no_place and not named and not _has_place(raster)
    tied, notes = (None, {}) if named or is_placeless else _tied_to_ground(raster, title, options)
    warps: list[dict[str, Any]] = []

    def warp(**more: Any) -> Any:
        first = not warps
        # Corners that the turned scene leaves open hold no data.
        has_alpha = ColorInterp.alpha in raster.colorinterp
        needs_alpha = (raster.nodata is None or (first and options.nodata is not None)) and not has_alpha
        warps.append(
            {
                # Palette indices cannot be averaged.
                "resampling": Resampling.nearest if palette is not None else Resampling.bilinear,
                "add_alpha": needs_alpha,
                **({"src_nodata": options.nodata} if first and options.nodata is not None else {}),
                **({"src_crs": options.crs} if first and options.crs else {}),
                **more,
            }
        )
        return stack.enter_context(WarpedVRT(raster, **warps[-1]))

    with ExitStack() as stack:
        try:
            if tied is not None:
                # On a grid of GDAL's choice: rasterio forgets control points where it is given another.
                raster = warp(crs=_local_crs(raster, title, tied), **tied)
            crs = None
            if not is_placeless:
                crs = "EPSG:3857" if named else _checked_place(raster, title, options.crs if not warps else "")
            if options.grid != "native":
                raster = warp(**_web_mercator(raster, options, tile_size, options.crs if not warps else ""))
                crs = "EPSG:3857"
        except (RasterioError, ValueError) as error:
            raise BadScene(f"{title} cannot be warped: {_reason(error)}; warp it first with gdalwarp") from error
        transform, size = named or raster.transform, (raster.width, raster.height)
        if warps and warps[-1].get("crs") == _PACIFIC:
            # East of the antimeridian x goes on.
            transform = Affine.translation(WEB_MERCATOR_HALF_M, 0) @ transform
        if is_placeless:
            transform = Affine.identity()
        has_masks = any(MaskFlags.all_valid not in flags for flags in raster.mask_flag_enums)
        # What is no number is no data, whatever the file says of it.
        has_gaps = bool(warps) or has_masks or any(raster.dtypes[band - 1].startswith("float") for band in bands)
    # South up, or a mirror image: people could not tell left from right.
    is_flipped = bool(transform.determinant > 0) and not is_placeless
    if is_flipped:
        transform = transform @ Affine.translation(0, size[1]) @ Affine.scale(1, -1)
    return Scene(
        address, crs, transform, size, bands, palette, options.nodata, tuple(warps), is_flipped, has_gaps,
        Stretch("none"), "", notes,
    )  # fmt: skip


def _has_place(raster: Any) -> bool:
    is_set = raster.crs is not None and not raster.transform.is_identity
    return is_set or bool(raster.gcps[0]) or raster.rpcs is not None


def _place_in_name(raster: Any, address: str) -> Affine | None:
    """Pixel corner → web-mercator metres, where the image has no place but the name of a tile."""
    found = _XYZ_NAME.search(shown(address))
    if raster.crs is not None or not raster.transform.is_identity or not found:
        return None
    z, x, y = (int(number) for number in found.groups())
    try:
        return Tile.from_xyz(z, x, y, size=(raster.width, raster.height)).transform
    except BadTile:
        return None


def _tied_to_ground(raster: Any, title: str, options: SceneOptions) -> tuple[dict[str, Any] | None, dict[str, Any]]:
    """How to warp a scene that has no geotransform but control points or RPCs, and what to say of it; None else."""
    if (options.crs or raster.crs is not None) and not raster.transform.is_identity:
        return None, {}
    points, points_crs = raster.gcps
    points_crs = rasterio.crs.CRS.from_user_input(options.crs) if options.crs else points_crs
    if points:
        if points_crs is None:
            raise BadScene(f"{title} has {len(points)} control points without a CRS; --crs EPSG:… says which")
        with GCPTransformer(points) as transformer:
            rows, columns = transformer.rowcol([p.x for p in points], [p.y for p in points], op=float)
        off_px = np.hypot(np.asarray(rows) - [p.row for p in points], np.asarray(columns) - [p.col for p in points])
        rms_px = float(np.sqrt(np.mean(off_px**2)))
        if not rms_px <= _WORST_GCP_RMS_PX:
            raise BadScene(
                f"{title} has {len(points)} control points that contradict each other by {rms_px:.0f} pixels;"
                f" look at them, or bend more: gdalwarp -tps -t_srs {_code(points_crs) or 'EPSG:…'} {title} warped.tif"
            )
        return {"src_crs": points_crs}, {"warped_by": f"{len(points)} control points", "rms_px": round(rms_px, 2)}
    if raster.rpcs is not None:
        if options.rpc_height_m is None:
            raise BadScene(
                f"{title} has rational polynomial coefficients (RPC) and no geotransform; orthorectify it first:"
                f" gdalwarp -rpc -to RPC_DEM=dem.tif {title} ortho.tif; or, where the ground is flat, give its height"
                " with --rpc-height METRES"
            )
        return (
            {"src_crs": "EPSG:4326", "RPC_HEIGHT": str(options.rpc_height_m)},
            {"warped_by": f"RPC at {options.rpc_height_m:g} m"},
        )
    return None, {}


def _local_crs(raster: Any, title: str, tied: Mapping[str, Any] | None) -> str:
    """The CRS that a scene without a geotransform is warped to: its control points' own, UTM where that is in degrees.

    In degrees the ground would look squeezed.
    """
    assert tied is not None
    points_crs = rasterio.crs.CRS.from_user_input(tied["src_crs"])
    if not points_crs.is_geographic:
        return _checked_crs(points_crs, title)
    with WarpedVRT(raster, crs="EPSG:4326", **tied) as guess:
        west, south, east, north = guess.bounds
    middle = AreaOfInterest((west + east) / 2, (south + north) / 2, (west + east) / 2, (south + north) / 2)
    found = query_utm_crs_info("WGS 84", middle)
    return f"EPSG:{found[0].code}" if found else "EPSG:3857"


def _checked_place(raster: Any, title: str, given_crs: str) -> str:
    """The scene's CRS as an authority code or WKT2. Raises BadScene where it has no place that tiles could keep."""
    crs = rasterio.crs.CRS.from_user_input(given_crs) if given_crs else raster.crs
    if crs is None:
        if raster.transform.is_identity:
            raise BadScene(
                f"{title} has no CRS and no geotransform; a photo without a place is cut with --no-place, a place can"
                f" be set with gdal_edit.py -a_srs EPSG:… -a_ullr … {title}"
            )
        raise BadScene(f"{title} has no CRS; say which with --crs EPSG:…")
    if raster.transform.is_identity or raster.transform.is_degenerate:
        raise BadScene(
            f"{title} has a CRS but no geotransform; set its corners with gdal_edit.py -a_ullr … {title}, or put a"
            " world file beside it"
        )
    try:
        text = _checked_crs(crs, title)
        Tile((raster.width, raster.height), text, raster.transform).ground_size_m()
    except BadTile as error:
        raise BadScene(f"{title}: {error}; say the right CRS with --crs EPSG:…") from error
    return text


def _checked_crs(crs: Any, title: str) -> str:
    try:
        return checked_crs(_code(crs) or "")
    except BadTile as error:
        raise BadScene(f"{title}: {error}; say the right CRS with --crs EPSG:…") from error


def _code(crs: Any) -> str | None:
    """The horizontal part of rasterio's CRS, as an authority code where one means exactly the same, else as WKT2."""
    try:
        parsed = pyproj.CRS.from_wkt(crs.to_wkt())
    except pyproj.exceptions.CRSError:
        return None
    if parsed.is_compound:
        parsed = parsed.sub_crs_list[0]
    authority = parsed.to_authority(min_confidence=100)
    return ":".join(authority) if authority else str(parsed.to_wkt("WKT2_2019"))


def _chosen_bands(raster: Any, title: str, options: SceneOptions) -> tuple[tuple[int, ...], NDArray[np.uint8] | None]:
    """The bands to show and, for an image with a palette, the palette."""
    if not raster.count:
        inner = ", ".join(raster.subdatasets[:8])
        raise BadScene(f"{title} holds no raster of its own" + (f" but {inner}; name one of those" if inner else ""))
    if options.bands is not None:
        if max(options.bands) > raster.count:
            asked = ",".join(map(str, options.bands))
            raise BadScene(f"{title} has {raster.count} bands; --bands {asked} asks for more")
        bands = options.bands
    else:
        roles = dict(zip(raster.colorinterp, raster.indexes, strict=True))
        rgb = tuple(roles.get(role, 0) for role in (ColorInterp.red, ColorInterp.green, ColorInterp.blue))
        alpha = roles.get(ColorInterp.alpha)
        seen = [band for band in raster.indexes if band != alpha] or list(raster.indexes)
        bands = rgb if all(rgb) else tuple(seen[:3]) if len(seen) >= 3 else tuple(seen[:1])
    if any(raster.dtypes[band - 1].startswith("complex") for band in bands):
        raise BadScene(f"{title} holds complex numbers; take their magnitude first: gdal_calc.py --calc 'abs(A)' …")
    if len(bands) == 1 and raster.colorinterp[bands[0] - 1] == ColorInterp.palette:
        palette = np.zeros((256, 4), np.uint8)
        for index, colour in raster.colormap(bands[0]).items():
            if 0 <= index < 256:
                palette[index] = colour
        return bands, palette
    return bands, None


def _web_mercator(raster: Any, options: SceneOptions, tile_size: int, crs: str) -> dict[str, Any]:
    """The scene in the pixels of a web-mercator zoom level, 256 a tile or the xyz grid's own: what a warp is told.

    Over the antimeridian the map is one that is cut at Greenwich.
    """
    side = tile_size if options.grid == "xyz" else 256
    world_m = 2 * WEB_MERCATOR_HALF_M
    source = {"src_crs": crs} if crs else {}
    with WarpedVRT(raster, crs="EPSG:3857", **source) as guess:
        (left, bottom, right, top), native_m = guess.bounds, min(abs(guess.transform.a), abs(guess.transform.e))
    onto = "EPSG:3857"
    if right - left > world_m / 2:
        with WarpedVRT(raster, crs=_PACIFIC, **source) as guess:
            if guess.bounds.right - guess.bounds.left < world_m / 2:
                onto, source = _PACIFIC, {**source, **_wrapped(raster, crs)}
                (left, bottom, right, top), native_m = guess.bounds, min(abs(guess.transform.a), abs(guess.transform.e))
    zoom = options.zoom
    if zoom is None:
        # A pixel that is a thirtieth too large loses nothing that can be seen, and saves three quarters of the tiles.
        zoom = min(30, max(0, math.ceil(math.log2(world_m / side / native_m) - 0.05)))
    if onto == _PACIFIC:
        # The two maps have no tile border in common on zoom 0.
        zoom = max(1, zoom)
    pixel_m = world_m / side / 2**zoom
    # Whole tiles of the xyz grid, whole pixels of the other.
    step = side if options.grid == "xyz" else 1
    column, row = (math.floor((v + WEB_MERCATOR_HALF_M) / pixel_m / step) * step for v in (left, -top))
    last_column, last_row = (math.ceil((v + WEB_MERCATOR_HALF_M) / pixel_m / step) * step for v in (right, -bottom))
    corner = (column * pixel_m - WEB_MERCATOR_HALF_M, WEB_MERCATOR_HALF_M - row * pixel_m)
    place = Affine(pixel_m, 0, corner[0], 0, -pixel_m, corner[1])
    return {**source, "crs": onto, "transform": place, "width": last_column - column, "height": last_row - row}


def _wrapped(raster: Any, crs: str) -> dict[str, Any]:
    """For a raster in degrees its CRS with longitudes as the raster counts them; PROJ ends them at ±180."""
    known = rasterio.crs.CRS.from_user_input(crs) if crs else raster.crs
    if not known.is_geographic:
        return {}
    middle, _ = raster.transform @ (raster.width / 2, raster.height / 2)
    return {"src_crs": f"{known.to_proj4()} +lon_wrap={middle:.0f}"}


def _samples(pixels: Pixels) -> Iterator[tuple[NDArray[Any], NDArray[np.bool_]]]:
    """Pixels from all over the scene: an overview where there is one, else blocks on a grid."""
    width, height = pixels.scene.size
    ratio = max(1.0, max(width, height) / _SAMPLE_SIDE_PX)
    if pixels.raster.overviews(pixels.scene.bands[0]) or width * height <= 16 * _SAMPLE_SIDE_PX**2:
        yield pixels.read(shape=(max(1, round(height / ratio)), max(1, round(width / ratio))))
        return
    # Without overviews a decimated read would go through the whole file.
    side = _SAMPLE_SIDE_PX // 8
    for row in np.linspace(0, height - side, 12, dtype=int) if height > side else [0]:
        for column in np.linspace(0, width - side, 12, dtype=int) if width > side else [0]:
            yield pixels.read((int(column), int(row), min(side, width), min(side, height)))


def _dtype(raster: Any, scene: Scene) -> str:
    return str(raster.dtypes[scene.bands[0] - 1])


def _digest(samples: list[tuple[NDArray[Any], NDArray[np.bool_]]], raster: Any) -> str:
    """Stands in for the checksum of what is no single file here: its pixels all over, and the age of its parts."""
    digest = hashlib.sha256()
    for values, valid in samples:
        digest.update(np.ascontiguousarray(values).tobytes())
        digest.update(valid.tobytes())
    for part in sorted(raster.files):
        path = Path(part)
        # A mosaic's own description is written anew by each run.
        if path.is_file() and path.suffix not in (".gti", ".gpkg"):
            about = path.stat()
            digest.update(f"{part} {about.st_size} {about.st_mtime_ns}".encode())
    return f"sampled:{digest.hexdigest()}"


def _unreadable(address: str, error: Exception) -> BadScene:
    return BadScene(f"{shown(address)} cannot be read: {_reason(error)}; is the file damaged?")


def _reason(error: Exception) -> str:
    """What GDAL says, without what may be secret in an address."""
    cause = error.__cause__ or error
    return " ".join(shown(word) if "://" in word else word for word in str(cause).split()) or str(error)


def _sha256(address: str) -> str | None:
    """Of the file's content; None for what is no file on this machine."""
    if is_remote(address) or not Path(address).is_file():
        return None
    with open(address, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
