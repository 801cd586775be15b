"""Formats: batches of features to files and back, whole or not at all; the ending of the name says which.

All take the same features with the same attributes (``FIELDS``) and are written batch by batch, so that memory does not
grow with the file. What each format cannot hold is said in ``docs/export.md``.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import sqlite3
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any
from xml.sax.saxutils import quoteattr

import msgspec
import numpy as np
import shapely
from numpy.typing import NDArray
from shapely.geometry.base import BaseGeometry

from .earth import DECIMALS
from .errors import ExportError
from .rings import IntArray, Outlines

if TYPE_CHECKING:
    import pyarrow
    from geopandas import GeoDataFrame

ENDINGS = (".geojson", ".json", ".geojsonl", ".ndjson", ".parquet", ".gpkg", ".fgb", ".shp")

FIELDS: Mapping[str, str] = {
    "id": "text",
    "label": "text",
    "score": "real",
    "area_m2": "real",
    "annotators": "ids",
    "tasks": "ids",
    "annotations": "ids",
    "scene": "text",
    "model_version": "text",
    "edited": "flag",
    "lead_time_s": "real",
    "created": "text",
    "updated": "text",
}
"""Attributes of a feature, in their order, and what they hold. All but the first two may be missing."""

FINDINGS_LAYER = "validation_findings"
POINTS_SUFFIX = "_points"
"""In a GeoPackage: what the layer of points is named after that of outlines."""

EXPORTED_TABLE = "geoprelabel_exported"
"""In a GeoPackage: what was written, so that changes made in a desktop GIS can be told."""

_SHAPEFILE_NAMES = {"annotations": "annots", "model_version": "model_vers", "lead_time_s": "lead_s"}
_SHAPEFILE_CHARS = 254
_FOLDER_PREFIX = ".export-"
_OLD = ".old"
_TYPES = {0: "Point", 3: "Polygon", 6: "MultiPolygon"}
_PALETTE = ("#e4572e", "#17bebb", "#ffc914", "#76b041", "#8e6cc3", "#2e86ab", "#d81159", "#9c6644")
_NO_LABEL = "#5f6b6d"


class Coded(Sequence[Any]):
    """A column of few different values, each of which is kept once."""

    def __init__(self, values: Sequence[Any], codes: IntArray) -> None:
        """``codes`` (N,) are indices of ``values``. Columns that share them are written together."""
        self.values = values
        self.codes = codes

    @classmethod
    def of(cls, column: Sequence[Any]) -> Coded:
        """A column of values that can be keys."""
        if isinstance(column, Coded):
            return column
        known: dict[Any, int] = {}
        codes = [known.setdefault(value, len(known)) for value in column]
        return cls(list(known), np.array(codes, np.int64))

    def __len__(self) -> int:
        return len(self.codes)

    def __getitem__(self, at: Any) -> Any:
        return [self.values[i] for i in self.codes[at]] if isinstance(at, slice) else self.values[self.codes[at]]

    def __iter__(self) -> Iterator[Any]:
        return map(self.values.__getitem__, self.codes.tolist())


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Some features."""

    outlines: Outlines
    """Points, polygons and multipolygons in EPSG:4326 as RFC 7946 wants them, N."""

    columns: Mapping[str, Sequence[Any]]
    """The attributes that ``FIELDS`` names, each of N values."""

    def __len__(self) -> int:
        return len(self.columns["label"])

    @property
    def geometry(self) -> NDArray[np.object_]:
        """The outlines as geometries, (N,)."""
        return self.outlines.shapes

    def only(self, wanted: NDArray[np.bool_]) -> Batch:
        """Those features that are wanted, (N,)."""
        at = np.flatnonzero(wanted)
        return Batch(
            self.outlines.take(at), {name: [col[i] for i in at.tolist()] for name, col in self.columns.items()}
        )


@dataclass(frozen=True, slots=True, eq=False)
class Remark:
    """A place that a person should look at."""

    geometry: BaseGeometry | None
    """Point or polygon in EPSG:4326; None where the place is not known."""

    reason: str
    task: str = ""
    region: str = ""


def check_ending(out: Path) -> None:
    """Raises ExportError where no format has the ending."""
    if out.suffix.lower() not in ENDINGS:
        raise ExportError(f"{out.name}: no format has this ending; use one of {', '.join(ENDINGS)}")


@contextlib.contextmanager
def whole_or_not_at_all(out: Path) -> Iterator[Path]:
    """A path in a folder of its own; the files (or folders) written there move to ``out``'s side at the end.

    Nothing appears there before, whatever happens. What a run left behind that was killed is cleared away.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    for leftover in out.parent.glob(_FOLDER_PREFIX + "*"):
        _clear(leftover)
    made = Path(tempfile.mkdtemp(dir=out.parent, prefix=".new"))
    with _locked(made):
        # From here on another run may look at it, and finds it locked.
        folder = made.rename(out.parent / (_FOLDER_PREFIX + made.name.removeprefix(".new")))
        try:
            yield folder / out.name
            _move_out(folder, out)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _move_out(folder: Path, out: Path) -> None:
    """Bring what a folder holds to the side of ``out``."""
    # Several files make a Shapefile; the one that is asked for comes last.
    for part in sorted(folder.iterdir(), key=lambda part: part.name == out.name):
        final = out.parent / part.name
        if final.is_dir() and part.is_dir():
            # A folder cannot be replaced in one step; the old one steps aside.
            os.replace(final, folder / (part.name + _OLD))
        os.replace(part, final)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Hold a lock on the folder, which ends with this process however that ends; whether it could be had."""
    handle = -1
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        is_mine = True
    except OSError:
        # Somebody has it, or it is gone or no folder, or this file system knows no locks.
        is_mine = False
    try:
        yield is_mine
    finally:
        if handle >= 0:
            os.close(handle)


def _clear(leftover: Path) -> None:
    """Remove the folder of a run that was killed; one whose run goes on, or that is no folder, stays."""
    with _locked(leftover) as is_mine:
        if is_mine:
            for old in leftover.glob("*" + _OLD):
                # Killed between its two steps: what was there before comes back.
                final = leftover.parent / old.name.removesuffix(_OLD)
                if not final.exists():
                    os.replace(old, final)
            shutil.rmtree(leftover, ignore_errors=True)


def write(
    batches: Iterable[Batch],
    out: Path,
    *,
    ids_are_numbers: bool = True,
    has_points: bool = False,
    lineage: Mapping[str, Any] | None = None,
    remarks: Sequence[Remark] = (),
) -> int:
    """Write features as the ending of ``out`` says, whole or not at all. Returns how many there are.

    ``ids_are_numbers`` says whether all tasks and annotations have whole numbers as ids, ``has_points`` whether there
    are points among the features, which a Shapefile cannot hold. ``lineage`` goes into the
    file where the format has a place for it, else into a file beside it. ``remarks`` become a layer of a GeoPackage;
    they are looked at after the last batch.
    """
    check_ending(out)
    lineage = dict(lineage or {})
    counted = _Counted(batches)
    with whole_or_not_at_all(out) as path:
        match out.suffix.lower():
            case ".geojson" | ".json":
                with FeatureLines(path, lineage=lineage) as file:
                    for batch in counted:
                        file.write(batch)
            case ".geojsonl" | ".ndjson":
                _write_lines(counted, path)
            case ".parquet":
                _write_parquet(counted, path, ids_are_numbers, lineage)
            case ending:
                _write_gdal(counted, path, ids_are_numbers, lineage, has_points=has_points)
                if ending == ".gpkg":
                    _finish_geopackage(path, counted.labels, remarks, has_points=has_points)
        if lineage and out.suffix.lower() in (".geojsonl", ".ndjson", ".fgb", ".shp"):
            path.with_name(path.name + ".lineage.json").write_text(json.dumps(lineage, indent=2), encoding="utf-8")
    return counted.features


class _Counted:
    """Batches that are counted as they pass."""

    def __init__(self, batches: Iterable[Batch]) -> None:
        self._batches = batches
        self.features = 0
        self.labels: dict[str, None] = {}

    def __iter__(self) -> Iterator[Batch]:
        for batch in self._batches:
            if len(batch):
                self.features += len(batch)
                self.labels.update(dict.fromkeys(batch.columns["label"]))
                yield batch


# GeoJSON --------------------------------------------------------------------------------------------------------------


class FeatureLines:
    """A GeoJSON file that takes features batch by batch."""

    def __init__(self, path: Path, *, lineage: Mapping[str, Any] | None = None) -> None:
        self._file = path.open("wb")
        self._lineage = lineage
        self._box: NDArray[np.float64] | None = None

    def __enter__(self) -> FeatureLines:
        self._file.write(b'{"type":"FeatureCollection",\n"features":[')
        return self

    def write(self, batch: Batch) -> None:
        """Add features."""
        if not len(batch):
            return
        boxes = _boxes(batch.outlines)
        self._file.write(b"\n" if self._box is None else b",\n")
        self._file.write(_features(batch, boxes, between=",\n"))
        self._box = _around(boxes if self._box is None else np.vstack((self._box, boxes)))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._file.write(b"\n]")
            if self._box is not None:
                self._file.write(b',\n"bbox":' + msgspec.json.encode(self._box.tolist()))
            if self._lineage:
                # RFC 7946, section 6.1, lets a file have members of its own.
                self._file.write(b',\n"lineage":' + msgspec.json.encode(self._lineage))
            self._file.write(b"}\n")
        self._file.close()


def _write_lines(batches: Iterable[Batch], path: Path) -> None:
    with path.open("wb") as file:
        for batch in batches:
            file.write(_features(batch, _boxes(batch.outlines), between="\n") + b"\n")


def _features(batch: Batch, boxes: NDArray[np.float64], *, between: str) -> bytes:
    """Features as GeoJSON text, with the shortest numbers that read back as the same: no more decimals."""
    count = len(batch)
    # A feature is a row of these texts.
    sides: list[list[str]] = [['{"type":"Feature","bbox":['] * count, _number_texts(boxes, _BOX_ENDS)]
    before = '],"properties":{'
    columns = [(f'"{name}":', batch.columns[name], FIELDS[name]) for name in FIELDS]
    at = 0
    while at < len(columns):
        name, column, kind = columns[at]
        at += 1
        if isinstance(column, Coded):
            texts = [before + name + text for text in _texts(column.values, kind)]
            while at < len(columns) and isinstance(more := columns[at][1], Coded) and more.codes is column.codes:
                name, _, kind = columns[at]
                texts = [f"{text},{name}{also}" for text, also in zip(texts, _texts(more.values, kind), strict=True)]
                at += 1
            sides.append([texts[code] for code in column.codes.tolist()])
        else:
            sides += [[before + name] * count, _texts(column, kind)]
        before = ","
    sides += [['},"geometry":'] * count, _geometry_texts(batch.outlines), ["}" + between] * count]
    texts = [""] * (count * len(sides))
    for number, side in enumerate(sides):
        texts[number :: len(sides)] = side
    return "".join(texts).removesuffix(between).encode()


def _texts(values: Sequence[Any], kind: str) -> list[str]:
    """Each value as JSON."""
    if not len(values):
        return []
    if kind in ("real", "flag"):
        return msgspec.json.encode(values).decode()[1:-1].split(",")
    if kind == "text" and None not in values:
        # In JSON a quotation mark within a text has a backslash before it: these three stand between texts alone.
        return [f'"{text}"' for text in msgspec.json.encode(values).decode()[2:-2].split('","')]
    encode = msgspec.json.Encoder().encode
    return [encode(value).decode() for value in values]


def _geometry_texts(outlines: Outlines) -> list[str]:
    """Each outline as a GeoJSON geometry."""
    texts = [""] * len(outlines)
    rings = outlines.rings
    ends = np.full((len(rings.points), 2), _END_OF_POINT)
    ends[:, 0] = _COMMA
    ends[rings.starts + rings.lengths - 1, 1] = _END_OF_RING
    for at, text in zip(outlines.ring_at.tolist(), _number_texts(rings.points, ends), strict=True):
        texts[at] = '{"type":"Polygon","coordinates":[[[' + text + "}"
    for at, text in zip(outlines.other_at.tolist(), shapely.to_geojson(outlines.others), strict=True):
        texts[at] = text
    return texts


def _words(texts: Iterable[str]) -> NDArray[np.uint32]:
    """Texts of at most four characters, as one number each."""
    return np.frombuffer(b"".join(text.encode().ljust(4, b"\0") for text in texts), np.uint32)


_COMMA, _END_OF_POINT, _END_OF_RING, _END = _words((",", "],[", "]]]\n", "\n"))
_BOX_ENDS = np.array([_COMMA, _COMMA, _COMMA, _END])
_DEGREES = _words([str(number) for number in range(181)] + [f"-{number}" for number in range(181)])
_THREE = _words([f".{number:03}" for number in range(1000)])
_LAST_THREE = _words(["." + (f"{number:03}".rstrip("0") or "0") for number in range(1000)])
_LAST_FOUR = _words([f"{number:04}".rstrip("0") for number in range(10_000)])


def _number_texts(degrees: NDArray[np.float64], ends: NDArray[np.uint32]) -> list[str]:
    """Degrees on the grid of seven decimals, from −180 to 180, as text with ``ends`` after each; cut at line ends.

    ``degrees`` are (M, K), ``ends`` (M, K) or (K,) of `_words`.
    """
    steps = np.rint(np.abs(degrees) * 10.0**DECIMALS).astype(np.uint32)
    whole = steps // 10_000_000
    steps -= whole * 10_000_000
    three = steps // 10_000
    four = steps - three * 10_000
    words = np.empty((*degrees.shape, 4), np.uint32)
    words[..., 0] = _DEGREES[whole + 181 * (degrees < 0)]
    words[..., 1] = np.where(four == 0, _LAST_THREE[three], _THREE[three])
    words[..., 2] = _LAST_FOUR[four]
    words[..., 3] = ends
    return words.tobytes().translate(None, b"\0").decode().split("\n")[:-1]


def _boxes(outlines: Outlines) -> NDArray[np.float64]:
    """West, south, east, north of each shape, (N, 4); west is the greater where the antimeridian lies between."""
    boxes = np.empty((len(outlines), 4))
    boxes[outlines.ring_at] = outlines.rings.bounds
    boxes[outlines.other_at] = np.round(shapely.bounds(outlines.others), DECIMALS)
    for number in np.flatnonzero((boxes[:, 0] <= -180) & (boxes[:, 2] >= 180)).tolist():
        parts = shapely.bounds(shapely.get_parts(outlines.shapes[number]))
        if len(parts) > 1:
            boxes[number] = _around(np.round(parts, DECIMALS))
    return boxes


def _around(boxes: NDArray[np.float64]) -> NDArray[np.float64]:
    """The box around boxes, (4,); across the antimeridian where one of them is, or where they meet there."""
    west, south = boxes[:, :2].min(axis=0)
    east, north = boxes[:, 2:].max(axis=0)
    across = boxes[:, 0] > boxes[:, 2]
    if across.any() or (west <= -180 and east >= 180):
        lefts, rights = boxes[across | (boxes[:, 0] >= 0), 0], boxes[across | (boxes[:, 2] <= 0), 2]
        astride = ~across & (boxes[:, 0] < 0) & (boxes[:, 2] > 0)
        is_narrow = len(lefts) and len(rights) and not astride.any()
        west, east = (lefts.min(), rights.max()) if is_narrow else (-180.0, 180.0)
    return np.array([west, south, east, north])


# Tables ---------------------------------------------------------------------------------------------------------------


def _schema(ids_are_numbers: bool) -> pyarrow.Schema:
    import pyarrow as pa

    kinds = {"text": pa.string(), "real": pa.float64(), "flag": pa.bool_()}
    ids = pa.list_(pa.int64() if ids_are_numbers else pa.string())
    return pa.schema(
        [
            (name, pa.list_(pa.int64()) if name == "annotators" else kinds.get(kind, ids))
            for name, kind in FIELDS.items()
        ]
    )


def _write_parquet(batches: Iterable[Batch], path: Path, ids_are_numbers: bool, lineage: Mapping[str, Any]) -> None:
    """GeoParquet 1.1: WKB, zstd, and a box beside each shape so that readers can skip."""
    import pyarrow as pa
    import pyproj
    from pyarrow import parquet

    sides = ("xmin", "ymin", "xmax", "ymax")
    box_type = pa.struct([(side, pa.float64()) for side in sides])
    attributes = _schema(ids_are_numbers)
    schema = attributes.append(pa.field("geometry", pa.binary())).append(pa.field("bbox", box_type))
    box: NDArray[np.float64] | None = None
    types: set[str] = set()
    with parquet.ParquetWriter(path, schema, compression="zstd") as writer:
        for batch in batches:
            boxes = shapely.bounds(batch.geometry)
            columns = [pa.array(batch.columns[name], type=attributes.field(name).type) for name in attributes.names]
            columns.append(pa.array(shapely.to_wkb(batch.geometry, byte_order=1), type=pa.binary()))
            columns.append(pa.StructArray.from_arrays([pa.array(side) for side in boxes.T], fields=list(box_type)))
            writer.write_table(pa.table(columns, schema=schema))
            around = np.concatenate((boxes[:, :2].min(axis=0), boxes[:, 2:].max(axis=0)))
            box = around if box is None else np.concatenate((np.minimum(box, around)[:2], np.maximum(box, around)[2:]))
            types.update(_TYPES[kind] for kind in np.unique(shapely.get_type_id(batch.geometry)).tolist())
        geometry = {
            "encoding": "WKB",
            "geometry_types": sorted(types),
            "crs": pyproj.CRS("EPSG:4326").to_json_dict(),
            "orientation": "counterclockwise",
            "covering": {"bbox": {side: ["bbox", side] for side in sides}},
            **({"bbox": box.tolist()} if box is not None else {}),
        }
        metadata = {"version": "1.1.0", "primary_column": "geometry", "columns": {"geometry": geometry}}
        writer.add_key_value_metadata({"geo": json.dumps(metadata)})
        if lineage:
            writer.add_key_value_metadata({"geoprelabel:lineage": json.dumps(lineage)})


def _write_gdal(
    batches: Iterable[Batch], path: Path, ids_are_numbers: bool, lineage: Mapping[str, Any], *, has_points: bool
) -> None:
    """GeoPackage, FlatGeobuf and Shapefile: multipolygons throughout, lists as JSON text.

    Points are in a layer of their own in a GeoPackage, and among the others in a FlatGeobuf.
    """
    import pyarrow as pa

    ending = path.suffix.lower()
    schema = _gdal_schema(ids_are_numbers, is_shapefile=ending == ".shp")
    if ending == ".gpkg":
        metadata = {"lineage": json.dumps(lineage)} if lineage else None
        aside = path.with_name("points.arrow")
        with pa.ipc.new_stream(aside, schema) as points:
            areas = _areas_with(batches, schema, lambda batch: points.write_batch(_record(batch, schema)))
            _write_layer(areas, schema, path, path.stem, "MultiPolygon", metadata)
        if has_points:
            with pa.ipc.open_stream(aside) as stream:
                _write_layer(stream, schema, path, path.stem + POINTS_SUFFIX, "Point", metadata)
        aside.unlink()
    else:
        kind = "Unknown" if has_points and ending == ".fgb" else "MultiPolygon"
        _write_layer((_record(batch, schema) for batch in batches), schema, path, path.stem, kind)


def _areas_with(
    batches: Iterable[Batch], schema: pyarrow.Schema, take_points: Callable[[Batch], None]
) -> Iterator[pyarrow.RecordBatch]:
    """The batches without their points, which are handed on."""
    for batch in batches:
        is_point = shapely.get_type_id(batch.geometry) == shapely.GeometryType.POINT
        if is_point.any():
            take_points(batch.only(is_point))
            batch = batch.only(~is_point)
        yield _record(batch, schema)


def _gdal_schema(ids_are_numbers: bool, *, is_shapefile: bool) -> pyarrow.Schema:
    import pyarrow as pa

    fields = []
    for field in _schema(ids_are_numbers):
        kind = pa.string() if pa.types.is_list(field.type) else field.type
        if is_shapefile and pa.types.is_boolean(kind):
            kind = pa.int16()
        fields.append(pa.field(_SHAPEFILE_NAMES.get(field.name, field.name) if is_shapefile else field.name, kind))
    geometry = pa.field("geom", pa.binary(), metadata={"ARROW:extension:name": "geoarrow.wkb"})
    return pa.schema([*fields, geometry])


def _record(batch: Batch, schema: pyarrow.Schema) -> pyarrow.RecordBatch:
    """A batch as GDAL takes it."""
    import pyarrow as pa

    # A Shapefile has no flags, and texts of few bytes.
    is_shapefile = pa.types.is_integer(schema.field(list(FIELDS).index("edited")).type)
    arrays = []
    for name, field in zip(FIELDS, schema, strict=False):
        values: Sequence[Any] = batch.columns[name]
        if FIELDS[name] == "ids":
            values = [json.dumps(item, separators=(",", ":")) for item in values]
        if is_shapefile and FIELDS[name] == "flag":
            values = [None if item is None else int(item) for item in values]
        if is_shapefile and FIELDS[name] in ("ids", "text"):
            values = [None if text is None else _cut(text, _SHAPEFILE_CHARS) for text in values]
        arrays.append(pa.array(values, type=field.type))
    arrays.append(pa.array(shapely.to_wkb(_multi(batch.geometry), byte_order=1), type=pa.binary()))
    return pa.record_batch(arrays, schema=schema)


def _write_layer(
    records: Iterable[pyarrow.RecordBatch],
    schema: pyarrow.Schema,
    path: Path,
    layer: str,
    kind: str,
    metadata: Mapping[str, str] | None = None,
) -> None:
    import pyarrow as pa
    import pyogrio

    # GDAL meets an exception of ours in the middle of a stream with one of its own; ours tells more.
    failure: list[BaseException] = []

    def watched() -> Iterator[pyarrow.RecordBatch]:
        try:
            yield from records
        except BaseException as error:
            failure.append(error)
            raise

    try:
        pyogrio.write_arrow(
            pa.RecordBatchReader.from_batches(schema, watched()),
            path,
            layer=layer,
            driver={".gpkg": "GPKG", ".fgb": "FlatGeobuf", ".shp": "ESRI Shapefile"}[path.suffix.lower()],
            geometry_name="geom",
            geometry_type=kind,
            crs="EPSG:4326",
            encoding="UTF-8" if path.suffix.lower() == ".shp" else None,
            layer_metadata=metadata,
            # The newest that QGIS of the last years, and GDAL from 2.4 on, reads and writes without a warning.
            dataset_options={"VERSION": "1.2"} if path.suffix.lower() == ".gpkg" else None,
        )
    except Exception:
        if failure:
            raise failure[0] from None
        raise


def _multi(geometry: NDArray[np.object_]) -> NDArray[np.object_]:
    """Every polygon as a multipolygon, points as they are."""
    is_area = shapely.get_type_id(geometry) != shapely.GeometryType.POINT
    shapes = geometry.copy()
    if is_area.any():
        parts, owner = shapely.get_parts(geometry[is_area], return_index=True)
        shapes[is_area] = shapely.multipolygons(parts, indices=owner)
    return shapes


def _cut(text: str, size: int) -> str:
    """The text in at most that many bytes of UTF-8."""
    return text.encode()[:size].decode(errors="ignore")


# GeoPackage -----------------------------------------------------------------------------------------------------------


def _finish_geopackage(path: Path, labels: Iterable[str], remarks: Sequence[Remark], *, has_points: bool) -> None:
    """Add what a desktop check starts from: a style by label, the places to look at, and what was written."""
    import geopandas
    import pyogrio

    placed = [remark for remark in remarks if remark.geometry is not None]
    listed = {
        "reason": [remark.reason for remark in placed],
        "task": [remark.task for remark in placed],
        "region": [remark.region for remark in placed],
    }
    # Points throughout: QGIS has one kind of geometry a layer, and shows none of a layer of unknown kind that is empty.
    places = shapely.point_on_surface(np.array([remark.geometry for remark in placed], dtype=object))
    frame = geopandas.GeoDataFrame(listed, geometry=places, crs="EPSG:4326").astype({name: "str" for name in listed})
    pyogrio.write_dataframe(frame, path, layer=FINDINGS_LAYER, geometry_type="Point", append=False)
    with contextlib.closing(sqlite3.connect(path)) as database, database:
        database.execute(
            "CREATE TABLE layer_styles (id INTEGER PRIMARY KEY AUTOINCREMENT NOT NULL, f_table_catalog TEXT(256),"
            " f_table_schema TEXT(256), f_table_name TEXT(256), f_geometry_column TEXT(256), styleName TEXT(30),"
            " styleQML TEXT, styleSLD TEXT, useAsDefault BOOLEAN, description TEXT, owner TEXT(30), ui TEXT(30),"
            " update_time DATETIME DEFAULT (strftime('%Y-%m-%dT%H:%M:%fZ', 'now')))"
        )
        database.executemany(
            "INSERT INTO layer_styles (f_table_catalog, f_table_schema, f_table_name, f_geometry_column, styleName,"
            " styleQML, styleSLD, useAsDefault, description, owner) VALUES ('', '', ?, 'geom', ?, ?, '', 1, ?, '')",
            [
                (path.stem, "by label", _style(labels), "GeoPrelabel: one colour a label"),
                (FINDINGS_LAYER, "findings", _findings_style(), "GeoPrelabel: places to look at"),
                *(
                    [
                        (
                            path.stem + POINTS_SUFFIX,
                            "by label",
                            _style(labels, "marker"),
                            "GeoPrelabel: one colour a label",
                        )
                    ]
                    if has_points
                    else []
                ),
            ],
        )
        database.execute(
            f"CREATE TABLE {EXPORTED_TABLE} (id TEXT PRIMARY KEY NOT NULL, label TEXT, digest TEXT, layer TEXT)"
        )
        for layer in [path.stem, *([path.stem + POINTS_SUFFIX] if has_points else [])]:
            rows = database.execute(f"SELECT id, label, geom FROM {quoted(layer)}")
            database.executemany(
                f"INSERT OR IGNORE INTO {EXPORTED_TABLE} VALUES (?, ?, ?, ?)",
                ((identity, label, geometry_digest(blob), layer) for identity, label, blob in rows),
            )
        database.executemany(
            "INSERT INTO gpkg_contents (table_name, data_type, identifier, description, srs_id)"
            " VALUES (?, 'attributes', ?, ?, 0)",
            [
                ("layer_styles", "layer_styles", "styles of the layers, as QGIS keeps them"),
                (EXPORTED_TABLE, EXPORTED_TABLE, "what GeoPrelabel wrote; leave it as it is"),
            ],
        )


def quoted(name: str) -> str:
    """The name of a table or column as SQL takes any."""
    return '"' + name.replace('"', '""') + '"'


def wkb_in(blob: bytes) -> bytes:
    """The WKB in a GeoPackage's geometry. Raises ExportError where it is none."""
    # GeoPackage 1.3, section 2.1.3: "GP", version, flags, srs_id, an envelope of a size that the flags tell.
    if len(blob) < 8 or blob[:2] != b"GP":
        raise ExportError("a geometry of the GeoPackage cannot be read")
    envelope = {0: 0, 1: 32, 2: 48, 3: 48, 4: 64}.get(blob[3] >> 1 & 7, 0)
    return blob[8 + envelope :]


def geometry_digest(blob: bytes | None) -> str:
    """Changes with the coordinates of a GeoPackage's geometry."""
    with contextlib.suppress(ExportError):
        blob = wkb_in(blob or b"")
    return hashlib.sha256(blob or b"").hexdigest()[:32]


def _style(labels: Iterable[str], kind: str = "fill") -> str:
    """A QGIS style (QML) that gives each label a colour."""
    categories, symbols = "", ""
    # The empty one takes all that the others do not: without it, a label that is new on the desktop would not be seen.
    for number, label in enumerate([*sorted(set(labels) - {""}), ""]):
        value, shown = quoteattr(label), quoteattr(label or "no label, or another")
        categories += f'<category render="true" symbol="{number}" type="string" value={value} label={shown}/>'
        symbols += _symbol(number, kind, _PALETTE[number % len(_PALETTE)] if label else _NO_LABEL)
    return _qml(
        '<renderer-v2 type="categorizedSymbol" attr="label" symbollevels="0" forceraster="0" enableorderby="0">'
        f"<categories>{categories}</categories><symbols>{symbols}</symbols></renderer-v2>"
    )


def _findings_style() -> str:
    symbol = _symbol(0, "marker", _PALETTE[0])
    return _qml(
        '<renderer-v2 type="singleSymbol" symbollevels="0" forceraster="0" enableorderby="0">'
        f"<symbols>{symbol}</symbols></renderer-v2>"
    )


def _symbol(number: int, kind: str, colour: str) -> str:
    layer = {"fill": "SimpleFill", "marker": "SimpleMarker"}[kind]
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    fill = f"{red},{green},{blue},{70 if kind == 'fill' else 255}"
    options = {"color": fill, "outline_color": f"{red},{green},{blue},255", "outline_width": "0.46", "style": "solid"}
    if kind == "marker":
        options |= {"name": "circle", "size": "3"}
    listed = "".join(f'<Option type="QString" name="{name}" value="{value}"/>' for name, value in options.items())
    # What QGIS read before 3.26; newer ones look no further than the options.
    old = "".join(f'<prop k="{name}" v="{value}"/>' for name, value in options.items())
    return (
        f'<symbol name="{number}" type="{kind}" alpha="1" clip_to_extent="1" force_rhr="0">'
        f'<layer class="{layer}" enabled="1" locked="0" pass="0"><Option type="Map">{listed}</Option>{old}</layer>'
        "</symbol>"
    )


def _qml(renderer: str) -> str:
    return (
        "<!DOCTYPE qgis PUBLIC 'http://mrcc.com/qgis.dtd' 'SYSTEM'>\n"
        f'<qgis version="3.28.0" styleCategories="Symbology">{renderer}</qgis>\n'
    )


# Text and reading -----------------------------------------------------------------------------------------------------


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    with whole_or_not_at_all(path) as part:
        part.write_text(text, encoding="utf-8", newline="")


def read_frame(path: Path) -> GeoDataFrame:
    """Features of any vector file that is known by its ending. Raises ExportError."""
    import geopandas
    import pyogrio

    if not path.exists():
        raise ExportError(f"{path} is not there")
    try:
        if path.suffix.lower() == ".parquet":
            return geopandas.read_parquet(path)
        if path.suffix.lower() in (".geojsonl", ".ndjson"):
            return pyogrio.read_dataframe(f"GeoJSONSeq:{path}")
        layers = [name for name, kind in pyogrio.list_layers(path) if kind and name != FINDINGS_LAYER]
        frame = pyogrio.read_dataframe(path, layer=layers[0] if layers else None)
        if layers and layers[0] + POINTS_SUFFIX in layers:
            points = pyogrio.read_dataframe(path, layer=layers[0] + POINTS_SUFFIX)
            return geopandas.GeoDataFrame({name: [*frame[name], *points[name]] for name in frame}, crs=frame.crs)
        return frame
    except Exception as error:  # each driver raises its own
        raise ExportError(f"{path} cannot be read as vector data: {error}") from error
