"""A rectangle of scene pixels that knows where on Earth it lies, and every conversion between its frames.

Frames: *percent* (Label Studio's, 0–100 of the image), *pixels* (corner-based, x right, y down, pixel 0 spans 0…1),
*CRS units* of the scene, and *lon/lat* (EPSG:4326 in degrees, longitude first).
"""

from __future__ import annotations

import functools
import math
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyproj
from affine import Affine
from numpy.typing import NDArray
from pyproj.transformer import AreaOfInterest, TransformerGroup
from shapely import Polygon

from .errors import BadTile

FloatArray = NDArray[np.float64]

WEB_MERCATOR_HALF_M = 20_037_508.342789244
"""Half the width of the web-mercator square (EPSG:3857), in its metres."""

_XYZ_URL = re.compile(r"/(\d{1,2})/(\d{1,8})/(\d{1,8})(?:@(\d)x)?\.(?:png|jpe?g|webp)(?:\?.*)?$", re.IGNORECASE)
_AUTHORITY_CODE = re.compile(r"^[A-Za-z][A-Za-z0-9]{1,15}:[A-Za-z0-9._-]{1,32}$")
_WKT2 = re.compile(
    r"^(?:PROJCRS|GEOGCRS|GEODCRS|COMPOUNDCRS|BOUNDCRS|ENGCRS|DERIVEDPROJCRS|PROJCS|GEOGCS|COMPD_CS|LOCAL_CS)\s*\[",
    re.IGNORECASE,
)
_NAMES_FILE = re.compile(
    r"PARAMETERFILE|PROJ4_GRIDS|PROJ-based|(?:grids?|file|init|catalog|sql)\s*=(?!\s*@null\b)", re.IGNORECASE
)
"""What in WKT makes PROJ open a file, or run a pipeline, of the writer's choice. GDAL's own WKT has nadgrids=@null."""

_MAX_CRS_TEXT = 20_000
_MAX_SCENE_PX = 2**40
_GEOD = pyproj.Geod(ellps="WGS84")


@dataclass(frozen=True, slots=True)
class Tile:
    """A rectangle of scene pixels, as an image of its own, that knows where on Earth it lies."""

    size: tuple[int, int]
    """Columns and rows of the tile's image, in pixels."""

    crs: str | None = None
    """Authority code or WKT2; None for a plain photo."""

    transform: Affine | None = None
    """Tile pixel corner ``(col, row)`` to CRS units ``(x, y)``; None for a plain photo."""

    scene: str = ""
    """Name of the scene that the tile was cut from."""

    window: tuple[int, int, int, int] | None = None
    """First column, first row, columns and rows in the scene, in its pixels."""

    core: tuple[int, int, int, int] | None = None
    """First column, first row, columns and rows, in tile pixels, of the part that no other tile claims."""

    gsd_m: float | None = None
    """Ground size of a pixel at the tile's centre, in metres."""

    stretch: Mapping[str, Any] | None = None
    """How scene values became image values, as recorded by ingest."""

    source: Mapping[str, Any] | None = None
    """File that the scene was read from: ``path`` and ``sha256``."""

    def __post_init__(self) -> None:
        if len(self.size) != 2 or min(self.size) < 1:
            raise BadTile(f"a tile's size must be two positive numbers of pixels, got {self.size}")
        if (self.crs is None) != (self.transform is None):
            raise BadTile("a tile needs both crs and transform, or neither")
        if self.transform is not None:
            place = self.transform
            if not all(map(math.isfinite, (place.a, place.b, place.c, place.d, place.e, place.f))):
                raise BadTile(f"a tile's transform must be six finite numbers, got {list(self.transform[:6])}")
            if self.transform.is_degenerate:
                raise BadTile(f"a tile's transform must map pixels to an area, got {list(self.transform[:6])}")

    @classmethod
    def from_task(
        cls, data: Mapping[str, Any], *, image_url: str = "", size: tuple[int, int] | None = None
    ) -> Tile | None:
        """The tile that a task's data describe, or None for a plain photo.

        ``data["tile"]`` counts first, then an ``image_url`` that ends in ``/{z}/{x}/{y}.png``. ``size`` is the image's
        true size where it is known; the transform is scaled to it. Raises BadTile where a record is there but wrong.
        """
        record = data.get("tile")
        if record is not None:
            tile = cls.from_record(record)
            return tile.at_size(size) if size else tile
        return cls.from_xyz_url(image_url, size=size)

    @classmethod
    def from_record(cls, record: Any) -> Tile:
        """The tile of a task's ``tile`` entry. Raises BadTile with the entry that is wrong."""
        if not isinstance(record, Mapping):
            raise BadTile(f"data.tile must be an object with crs, transform and window, got {type(record).__name__}")
        window = _four_numbers(record.get("window"), "window")
        core = _four_numbers(record.get("core"), "core")
        try:
            columns, rows = (int(v) for v in record.get("size") or (window or ())[2:])
        except (TypeError, ValueError, OverflowError) as error:
            raise BadTile("data.tile needs window [col, row, columns, rows] or size [columns, rows]") from error
        transform = record.get("transform")
        if transform is not None:
            try:
                a, b, c, d, e, f = (float(v) for v in transform)
                transform = Affine(a, b, c, d, e, f)
            except (TypeError, ValueError, OverflowError) as error:
                raise BadTile(f"data.tile.transform must be six numbers, got {transform!r:.120}") from error
        if max(map(abs, (columns, rows, *(window or ()), *(core or ())))) > _MAX_SCENE_PX:
            raise BadTile(f"data.tile has a size, window or core beyond {_MAX_SCENE_PX} pixels")
        gsd_m = record.get("gsd_m")
        try:
            gsd_m = float(gsd_m) if gsd_m is not None else None
        except (TypeError, ValueError, OverflowError) as error:
            raise BadTile(f"data.tile.gsd_m must be a number of metres, got {gsd_m!r:.80}") from error
        if gsd_m is not None and not 1e-6 <= gsd_m <= 1e6:
            raise BadTile(f"data.tile.gsd_m must be a number of metres from 1e-6 to 1e6, got {gsd_m}")
        for name in ("stretch", "source"):
            if not isinstance(record.get(name) or {}, Mapping):
                raise BadTile(f"data.tile.{name} must be an object, got {record[name]!r:.80}")
        return cls(
            size=(columns, rows),
            crs=checked_crs(record["crs"]) if record.get("crs") is not None else None,
            transform=transform,
            scene=str(record.get("scene", "")),
            window=window,
            core=core,
            gsd_m=gsd_m,
            stretch=record.get("stretch") or None,
            source=record.get("source") or None,
        )

    @classmethod
    def from_xyz(cls, z: int, x: int, y: int, *, size: tuple[int, int] = (256, 256)) -> Tile:
        """The web-mercator tile of that zoom, column and row (counted from the north-west)."""
        if not 0 <= z <= 30 or not 0 <= x < 2**z or not 0 <= y < 2**z:
            raise BadTile(f"no web-mercator tile {z}/{x}/{y}: x and y must be below 2^z")
        span_m = 2 * WEB_MERCATOR_HALF_M / 2**z
        origin = Affine.translation(-WEB_MERCATOR_HALF_M + x * span_m, WEB_MERCATOR_HALF_M - y * span_m)
        tile = cls(size=size, crs="EPSG:3857", transform=origin @ Affine.scale(span_m / size[0], -span_m / size[1]))
        return replace(tile, gsd_m=tile.ground_size_m())

    @classmethod
    def from_xyz_url(cls, url: str, *, size: tuple[int, int] | None = None) -> Tile | None:
        """The tile of a URL that ends in ``/{z}/{x}/{y}.png`` (or jpg, webp, ``@2x``); None for any other."""
        found = _XYZ_URL.search(url)
        if not found:
            return None
        z, x, y = (int(v) for v in found.group(1, 2, 3))
        if z > 30 or x >= 2**z or y >= 2**z:
            return None
        side = 256 * int(found.group(4) or 1)
        return cls.from_xyz(z, x, y, size=size or (side, side))

    def to_record(self) -> dict[str, Any]:
        """What ``from_record`` reads: the entry that rides in a task's data."""
        entries: dict[str, Any] = {
            "scene": self.scene,
            "window": list(self.window) if self.window else [0, 0, *self.size],
            "size": list(self.size),
            "crs": self.crs,
            "transform": list(self.transform[:6]) if self.transform else None,
            "gsd_m": self.gsd_m,
            "core": list(self.core) if self.core else None,
            "stretch": dict(self.stretch) if self.stretch else None,
            "source": dict(self.source) if self.source else None,
        }
        return {name: value for name, value in entries.items() if value is not None}

    @property
    def has_place(self) -> bool:
        """Whether the tile knows where on Earth it lies."""
        return self.crs is not None

    def at_size(self, size: tuple[int, int]) -> Tile:
        """The same ground shown by an image of another size."""
        if size == self.size:
            return self
        ratio_x, ratio_y = self.size[0] / size[0], self.size[1] / size[1]
        core = self.core and (
            round(self.core[0] / ratio_x), round(self.core[1] / ratio_y),
            round(self.core[2] / ratio_x), round(self.core[3] / ratio_y),
        )  # fmt: skip
        return replace(
            self,
            size=size,
            transform=self.transform @ Affine.scale(ratio_x, ratio_y) if self.transform else None,
            core=core,
            gsd_m=self.gsd_m * math.sqrt(ratio_x * ratio_y) if self.gsd_m else None,
        )

    def crop(self, col: int, row: int, columns: int, rows: int) -> Tile:
        """The part of the tile that starts at that pixel. A crop of a tile is a tile."""
        window = self.window or (0, 0, *self.size)
        return replace(
            self,
            size=(columns, rows),
            window=(window[0] + col, window[1] + row, columns, rows),
            core=None,
            transform=self.transform @ Affine.translation(col, row) if self.transform else None,
        )

    def px_to_pct(self, ring_px: FloatArray) -> FloatArray:
        """Tile pixels to Label Studio percent, clipped to 0–100, (N, 2) both. Both run right and down."""
        return np.clip(np.asarray(ring_px, np.float64) * (100.0 / np.asarray(self.size)), 0.0, 100.0)

    def pct_to_px(self, ring_pct: FloatArray) -> FloatArray:
        """Label Studio percent to tile pixels, (N, 2) both."""
        return np.asarray(ring_pct, np.float64) * (np.asarray(self.size) / 100.0)

    def px_to_crs(self, points_px: FloatArray) -> FloatArray:
        """Tile pixels to CRS units, (N, 2) both."""
        transform = self._placed()
        points = np.asarray(points_px, np.float64)
        x, y = points[:, 0], points[:, 1]
        return np.column_stack(
            (transform.a * x + transform.b * y + transform.c, transform.d * x + transform.e * y + transform.f)
        )

    def crs_to_px(self, points_crs: FloatArray) -> FloatArray:
        """CRS units to tile pixels, (N, 2) both."""
        # Subtract the origin first: with the inverse's large offsets half the digits would cancel out.
        transform = self._placed()
        points = np.asarray(points_crs, np.float64)
        dx, dy = points[:, 0] - transform.c, points[:, 1] - transform.f
        det = transform.a * transform.e - transform.b * transform.d
        return np.column_stack(
            ((transform.e * dx - transform.b * dy) / det, (transform.a * dy - transform.d * dx) / det)
        )

    def px_to_lonlat(self, points_px: FloatArray) -> FloatArray:
        """Tile pixels to longitude and latitude in degrees, (N, 2) both."""
        points = self.px_to_crs(points_px)
        return _through(to_lonlat(self._crs(), self._area()), points, f"pixels of {self.scene or 'the tile'}")

    def lonlat_to_px(self, lonlat: FloatArray) -> FloatArray:
        """Longitude and latitude in degrees to tile pixels, (N, 2) both."""
        points = np.asarray(lonlat, np.float64)
        forth = to_lonlat(self._crs(), self._area())

        def back(lonlat: FloatArray) -> FloatArray:
            return np.column_stack(forth.transform(lonlat[:, 0], lonlat[:, 1], direction="INVERSE"))

        guess = back(points)
        # PROJ turns a seven-parameter transformation round with its signs only, and comes back a millimetre beside.
        missed = np.column_stack(forth.transform(guess[:, 0], guess[:, 1])) - points
        missed[:, 0] = (missed[:, 0] + 180) % 360 - 180
        return self.crs_to_px(back(points - missed))

    def outline_px(self) -> Polygon:
        """The tile's border, in its pixels."""
        width, height = self.size
        return Polygon([(0, 0), (width, 0), (width, height), (0, height)])

    def ground_size_m(self) -> float:
        """Side of a square that covers as much ground as the pixel at the tile's centre, in metres on the ellipsoid."""
        col, row = self.size[0] / 2, self.size[1] / 2
        points = self.px_to_crs(np.array([(col, row), (col + 1, row), (col, row + 1)]))
        lon, lat = _through(to_lonlat(self._crs(), None), points, "the tile's centre").T
        # PROJ hands on what is called degrees and is metres.
        if max(abs(lon)) > 540 or max(abs(lat)) > 90:
            raise BadTile(f"the centre is at longitude {lon[0]:g}, latitude {lat[0]:g}, which is not on Earth")
        # From two sides: the area of a polygon of few centimetres is lost in the digits of the ellipsoid's.
        azimuths, _, sides_m = _GEOD.inv(lon[[0, 0]], lat[[0, 0]], lon[1:], lat[1:])
        return math.sqrt(sides_m[0] * sides_m[1] * abs(math.sin(math.radians(azimuths[1] - azimuths[0]))))

    def _placed(self) -> Affine:
        if self.transform is None:
            raise BadTile(
                "the task has no place on Earth: its data need tile.crs and tile.transform, as `geoprelabel ingest`"
                " writes them, or an image URL that ends in /{z}/{x}/{y}.png"
            )
        return self.transform

    def _crs(self) -> str:
        self._placed()
        assert self.crs is not None
        return self.crs

    def _area(self) -> tuple[float, float, float, float] | None:
        """West, south, east, north of the tile in whole degrees, outwards, so that neighbours share a transformer."""
        width, height = self.size
        edges = self.px_to_crs(np.array([(0, 0), (width, 0), (width, height), (0, height)], np.float64))
        x, y = to_lonlat(self._crs(), None).transform(edges[:, 0], edges[:, 1])
        if not np.isfinite([x, y]).all():
            return None
        west, south, east, north = math.floor(min(x)), math.floor(min(y)), math.ceil(max(x)), math.ceil(max(y))
        is_one = east - west < 180 and west >= -180 and east <= 180
        return (west, max(south, -90), east, min(north, 90)) if is_one else None


def checked_crs(text: Any) -> str:
    """An authority code or WKT that PROJ knows. Raises BadTile for anything else.

    Only these two forms: a PROJ string from a stranger could name files on this machine.
    """
    if not isinstance(text, str) or len(text) > _MAX_CRS_TEXT or not (_AUTHORITY_CODE.match(text) or _WKT2.match(text)):
        raise BadTile(f"crs must be an authority code such as EPSG:32645, or WKT2, got {text!r:.80}")
    if named := _NAMES_FILE.search(text):
        raise BadTile(f"a crs that names files ({named.group()}) is not taken; give the scene one without grids")
    _crs(text)
    return text


@functools.lru_cache(maxsize=256)
def _crs(text: str) -> pyproj.CRS:
    try:
        return pyproj.CRS.from_user_input(text)
    except pyproj.exceptions.CRSError as error:
        raise BadTile(f"PROJ does not know the crs {text[:80]!r}") from error


@functools.lru_cache(maxsize=64)
def horizontal_crs(text: str) -> pyproj.CRS:
    """The part of a CRS that pixels have coordinates in: of a compound CRS the horizontal one, of a 3D one the 2D one.

    Raises BadTile, with the reason, for a CRS whose coordinates are no places on a map: engineering, vertical and
    geocentric ones.
    """
    crs = _crs(text)
    while crs.is_compound:
        crs = crs.sub_crs_list[0]
    name, kind = crs.name[:80], crs.type_name.removesuffix(" CRS").lower()
    if crs.is_engineering:
        raise BadTile(
            f"the CRS {name!r} is a local engineering CRS: nothing tells where on Earth its zero lies; give the scene a"
            " georeferenced CRS (gdalwarp with ground control points, or gdal_edit -a_srs and -a_ullr)"
        )
    if not (crs.is_geographic or crs.is_projected or crs.is_bound):
        raise BadTile(f"the CRS {name!r} is {kind}, not horizontal; pixels need a projected or geographic one")
    return crs.to_2d() if len(crs.axis_info) > 2 else crs


@functools.lru_cache(maxsize=64)
def operations_to_lonlat(crs: str, area: tuple[float, float, float, float] | None) -> TransformerGroup:
    """What PROJ knows of the ways from a CRS to EPSG:4326, longitude first, in the area (west, south, east, north).

    The best usable way comes first. A ballpark way, which takes one datum for another, is there only where PROJ knows
    no other. Raises BadTile where there is none at all.
    """
    for allow_ballpark in (False, True):
        if group := operations(horizontal_crs(crs), _crs("EPSG:4326"), area, allow_ballpark=allow_ballpark):
            return group
    raise BadTile(f"no coordinate operation leads from {crs[:80]} to EPSG:4326")


def operations(
    source: pyproj.CRS, target: pyproj.CRS, area: tuple[float, float, float, float] | None, *, allow_ballpark: bool
) -> TransformerGroup | None:
    """The usable ways from one CRS to another in the area, the best first; None where there is none."""
    try:
        with warnings.catch_warnings():
            # Which operation was taken, and that a better one needs a grid, is told where it matters: on export.
            warnings.simplefilter("ignore", UserWarning)
            group = TransformerGroup(
                source,
                target,
                always_xy=True,
                area_of_interest=AreaOfInterest(*area) if area else None,
                allow_ballpark=allow_ballpark,
            )
    except (pyproj.exceptions.ProjError, IndexError):
        # pyproj 3.7 raises IndexError where operations are known but none can be made.
        return None
    return group if group.transformers else None


def to_lonlat(crs: str, area: tuple[float, float, float, float] | None) -> pyproj.Transformer:
    """From a CRS to EPSG:4326, longitude first; the best operation for the area (west, south, east, north in degrees).

    Made once for each. Raises BadTile where PROJ knows no operation between the two.
    """
    return operations_to_lonlat(crs, area).transformers[0]


def _through(transformer: pyproj.Transformer, points: FloatArray, what: str) -> FloatArray:
    x, y = transformer.transform(points[:, 0], points[:, 1])
    out = np.column_stack((x, y))
    if not np.isfinite(out).all():
        raise BadTile(f"{what} lie outside the area where the CRS is defined")
    return out


def _four_numbers(value: Any, name: str) -> tuple[int, int, int, int] | None:
    if value is None:
        return None
    try:
        col, row, columns, rows = (int(v) for v in value)
    except (TypeError, ValueError, OverflowError) as error:
        raise BadTile(f"data.tile.{name} must be four whole numbers, got {value!r:.80}") from error
    return col, row, columns, rows


@dataclass(frozen=True, slots=True)
class Region:
    """One labelled outline on a tile."""

    polygon: Polygon
    """Valid, in tile pixels; holes are interior rings."""

    label: str
    """Name of the class, as the label config spells it."""

    score: float | None = None
    """How sure the model is, 0…1; None for what a person drew."""

    id: str = ""
    """Label Studio's region id; depends only on task, version and geometry for what we predict."""

    object_id: str = ""
    """Shared by the parts of one object; empty for an object in one part."""
