"""Formats: batches of features to files and back, whole or not at all; the ending of the name says which.

All take the same features with the same attributes (``FIELDS``) and are written batch by batch, so that memory does not
grow with the file. What each format cannot hold is said in ``docs/export.md``.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import sqlite3
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any
from xml.sax.saxutils import quoteattr

import numpy as np
import shapely
from numpy.typing import NDArray
from shapely.geometry.base import BaseGeometry

from .earth import DECIMALS
from .errors import ExportError

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
EXPORTED_TABLE = "geoprelabel_exported"
"""In a GeoPackage: what was written, so that changes made in a desktop GIS can be told."""

_SHAPEFILE_NAMES = {"annotations": "annots", "model_version": "model_vers", "lead_time_s": "lead_s"}
_SHAPEFILE_CHARS = 254
_PALETTE = ("#e4572e", "#17bebb", "#ffc914", "#76b041", "#8e6cc3", "#2e86ab", "#d81159", "#9c6644", "#5f6b6d")


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Some features."""

    geometry: NDArray[np.object_]
    """Polygons and multipolygons in EPSG:4326 as RFC 7946 wants them, (N,)."""

    columns: Mapping[str, Sequence[Any]]
    """The attributes that ``FIELDS`` names, each of N values."""

    def __len__(self) -> int:
        return len(self.geometry)


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

    Nothing appears there before, whatever happens.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=out.parent, prefix=".export-"))
    try:
        yield folder / out.name
        # Several files make a Shapefile; the one that is asked for comes last.
        for part in sorted(folder.iterdir(), key=lambda part: part.name == out.name):
            final = out.parent / part.name
            if final.is_dir() and part.is_dir():
                # A folder cannot be replaced in one step; the old one steps aside.
                os.replace(final, folder / (part.name + ".old"))
            os.replace(part, final)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write(
    batches: Iterable[Batch],
    out: Path,
    *,
    ids_are_numbers: bool = True,
    lineage: Mapping[str, Any] | None = None,
    remarks: Sequence[Remark] = (),
) -> int:
    """Write features as the ending of ``out`` says, whole or not at all. Returns how many there are.

    ``ids_are_numbers`` says whether all tasks and annotations have whole numbers as ids. ``lineage`` goes into the
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
                _write_gdal(counted, path, ids_are_numbers, lineage)
                if ending == ".gpkg":
                    _finish_geopackage(path, counted.labels, remarks)
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
        self._file = path.open("w", encoding="utf-8", newline="\n")
        self._lineage = lineage
        self._box: NDArray[np.float64] | None = None

    def __enter__(self) -> FeatureLines:
        self._file.write('{"type":"FeatureCollection",\n"features":[')
        return self

    def write(self, batch: Batch) -> None:
        """Add features."""
        if not len(batch):
            return
        boxes = _boxes(batch.geometry)
        self._file.write("\n" if self._box is None else ",\n")
        self._file.write(",\n".join(_features(batch, boxes)))
        self._box = _around(boxes if self._box is None else np.vstack((self._box, boxes)))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._file.write("\n]")
            if self._box is not None:
                self._file.write(f',\n"bbox":{json.dumps(self._box.tolist())}')
            if self._lineage:
                # RFC 7946, section 6.1, lets a file have members of its own.
                self._file.write(f',\n"lineage":{json.dumps(self._lineage)}')
            self._file.write("}\n")
        self._file.close()


def _write_lines(batches: Iterable[Batch], path: Path) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for batch in batches:
            for text in _features(batch, _boxes(batch.geometry)):
                file.write(text + "\n")


def _features(batch: Batch, boxes: NDArray[np.float64]) -> Iterator[str]:
    """Each feature as GeoJSON text. GEOS writes the shortest numbers that read back as the same: no more decimals."""
    names = list(FIELDS)
    rows = [dict(zip(names, row, strict=True)) for row in zip(*(batch.columns[name] for name in names), strict=True)]
    # Encoded in one go, which is much faster than one by one. Within a text a quotation mark has a backslash before it,
    # so that this seam occurs between rows only.
    seam = '},{"id":'
    texts = json.dumps(rows, ensure_ascii=False, allow_nan=False, separators=(",", ":"))[1:-1].split(seam)
    opened = ["", *[seam[2:]] * (len(texts) - 1)]
    closed = [*["}"] * (len(texts) - 1), ""]
    geometry = shapely.to_geojson(batch.geometry)
    for shape, box, start, text, end in zip(geometry, boxes.tolist(), opened, texts, closed, strict=True):
        yield f'{{"type":"Feature","bbox":{box},"properties":{start}{text}{end},"geometry":{shape}}}'


def _boxes(geometry: NDArray[np.object_]) -> NDArray[np.float64]:
    """West, south, east, north of each shape, (N, 4); west is the greater where the antimeridian lies between."""
    boxes = np.round(shapely.bounds(geometry), DECIMALS)
    for number in np.flatnonzero((boxes[:, 0] <= -180) & (boxes[:, 2] >= 180)).tolist():
        parts = shapely.bounds(shapely.get_parts(geometry[number]))
        if len(parts) > 1:
            boxes[number] = _around(np.round(parts, DECIMALS))
    return np.asarray(boxes)


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
            types.update(
                "MultiPolygon" if kind == 6 else "Polygon" for kind in np.unique(shapely.get_type_id(batch.geometry))
            )
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


def _write_gdal(batches: Iterable[Batch], path: Path, ids_are_numbers: bool, lineage: Mapping[str, Any]) -> None:
    """GeoPackage, FlatGeobuf and Shapefile: multipolygons throughout, lists as JSON text."""
    import pyarrow as pa
    import pyogrio

    is_shapefile = path.suffix.lower() == ".shp"
    fields = []
    for field in _schema(ids_are_numbers):
        kind = pa.string() if pa.types.is_list(field.type) else field.type
        if is_shapefile and pa.types.is_boolean(kind):
            kind = pa.int16()
        fields.append(pa.field(_SHAPEFILE_NAMES.get(field.name, field.name) if is_shapefile else field.name, kind))
    schema = pa.schema([*fields, pa.field("geom", pa.binary(), metadata={"ARROW:extension:name": "geoarrow.wkb"})])

    def value(name: str, listed: Sequence[Any]) -> Sequence[Any]:
        texts: list[Any] = list(listed)
        if FIELDS[name] == "ids":
            texts = [json.dumps(item, separators=(",", ":")) for item in listed]
        if is_shapefile and FIELDS[name] == "flag":
            return [None if item is None else int(item) for item in listed]
        if is_shapefile and FIELDS[name] in ("ids", "text"):
            return [None if text is None else _cut(text, _SHAPEFILE_CHARS) for text in texts]
        return texts

    def records() -> Iterator[pyarrow.RecordBatch]:
        for batch in batches:
            arrays = [
                pa.array(value(name, batch.columns[name]), type=field.type)
                for name, field in zip(FIELDS, fields, strict=True)
            ]
            arrays.append(pa.array(shapely.to_wkb(_multi(batch.geometry), byte_order=1), type=pa.binary()))
            yield pa.record_batch(arrays, schema=schema)

    metadata = {"lineage": json.dumps(lineage)} if lineage and path.suffix.lower() == ".gpkg" else None
    # GDAL meets an exception of ours in the middle of a stream with one of its own; ours tells more.
    failure: list[BaseException] = []

    def watched() -> Iterator[pyarrow.RecordBatch]:
        try:
            yield from records()
        except BaseException as error:
            failure.append(error)
            raise

    try:
        pyogrio.write_arrow(
            pa.RecordBatchReader.from_batches(schema, watched()),
            path,
            layer=path.stem,
            driver={".gpkg": "GPKG", ".fgb": "FlatGeobuf", ".shp": "ESRI Shapefile"}[path.suffix.lower()],
            geometry_name="geom",
            geometry_type="MultiPolygon",
            crs="EPSG:4326",
            encoding="UTF-8" if is_shapefile else None,
            layer_metadata=metadata,
        )
    except Exception:
        if failure:
            raise failure[0] from None
        raise


def _multi(geometry: NDArray[np.object_]) -> NDArray[np.object_]:
    """Every shape as a multipolygon."""
    parts, owner = shapely.get_parts(geometry, return_index=True)
    return np.asarray(shapely.multipolygons(parts, indices=owner))


def _cut(text: str, size: int) -> str:
    """The text in at most that many bytes of UTF-8."""
    return text.encode()[:size].decode(errors="ignore")


# GeoPackage -----------------------------------------------------------------------------------------------------------


def _finish_geopackage(path: Path, labels: Iterable[str], remarks: Sequence[Remark]) -> None:
    """Add what a desktop check starts from: a style by label, the places to look at, and what was written."""
    import geopandas
    import pyogrio

    placed = [remark for remark in remarks if remark.geometry is not None]
    listed = {
        "reason": [remark.reason for remark in placed],
        "task": [remark.task for remark in placed],
        "region": [remark.region for remark in placed],
    }
    frame = geopandas.GeoDataFrame(
        listed, geometry=np.array([remark.geometry for remark in placed], dtype=object), crs="EPSG:4326"
    ).astype({name: "str" for name in listed})
    pyogrio.write_dataframe(frame, path, layer=FINDINGS_LAYER, geometry_type="Unknown", append=False)
    with contextlib.closing(sqlite3.connect(path)) as database, database:
        database.execute(
            "CREATE TABLE layer_styles (id INTEGER PRIMARY KEY AUTOINCREMENT NOT NULL, f_table_catalog TEXT(256),"
            " f_table_schema TEXT(256), f_table_name TEXT(256), f_geometry_column TEXT(256), styleName TEXT(30),"
            " styleQML TEXT, styleSLD TEXT, useAsDefault BOOLEAN, description TEXT, owner TEXT(30), ui TEXT(30),"
            " update_time DATETIME DEFAULT CURRENT_TIMESTAMP)"
        )
        database.executemany(
            "INSERT INTO layer_styles (f_table_catalog, f_table_schema, f_table_name, f_geometry_column, styleName,"
            " styleQML, styleSLD, useAsDefault, description, owner) VALUES ('', '', ?, 'geom', ?, ?, '', 1, ?, '')",
            [
                (path.stem, "by label", _style(labels), "GeoPrelabel: one colour a label"),
                (FINDINGS_LAYER, "findings", _findings_style(), "GeoPrelabel: places to look at"),
            ],
        )
        database.execute(f"CREATE TABLE {EXPORTED_TABLE} (id TEXT PRIMARY KEY NOT NULL, label TEXT, digest TEXT)")
        rows = database.execute(f"SELECT id, label, geom FROM {_quoted(path.stem)}")
        database.executemany(
            f"INSERT OR IGNORE INTO {EXPORTED_TABLE} VALUES (?, ?, ?)",
            ((identity, label, geometry_digest(blob)) for identity, label, blob in rows),
        )
        database.executemany(
            "INSERT INTO gpkg_contents (table_name, data_type, identifier, description, srs_id)"
            " VALUES (?, 'attributes', ?, ?, 0)",
            [
                ("layer_styles", "layer_styles", "styles of the layers, as QGIS keeps them"),
                (EXPORTED_TABLE, EXPORTED_TABLE, "what GeoPrelabel wrote; leave it as it is"),
            ],
        )


def _quoted(name: str) -> str:
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


def _style(labels: Iterable[str]) -> str:
    """A QGIS style (QML) that gives each label a colour."""
    categories, symbols = "", ""
    for number, label in enumerate(sorted(labels)):
        value, shown = quoteattr(label), quoteattr(label or "no label")
        categories += f'<category render="true" symbol="{number}" type="string" value={value} label={shown}/>'
        symbols += _symbol(number, "fill", "SimpleFill", _PALETTE[number % len(_PALETTE)])
    return _qml(
        '<renderer-v2 type="categorizedSymbol" attr="label" symbollevels="0" forceraster="0" enableorderby="0">'
        f"<categories>{categories}</categories><symbols>{symbols}</symbols></renderer-v2>"
    )


def _findings_style() -> str:
    # Points and polygons in one layer: a marker at the middle of either.
    symbol = _symbol(0, "marker", "SimpleMarker", _PALETTE[0])
    return _qml(
        '<renderer-v2 type="singleSymbol" symbollevels="0" forceraster="0" enableorderby="0">'
        f"<symbols>{symbol}</symbols></renderer-v2>"
    )


def _symbol(number: int, kind: str, layer: str, colour: str) -> str:
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    fill = f"{red},{green},{blue},{70 if kind == 'fill' else 255}"
    options = {"color": fill, "outline_color": f"{red},{green},{blue},255", "outline_width": "0.46", "style": "solid"}
    if kind == "marker":
        options |= {"name": "circle", "size": "3"}
    listed = "".join(f'<Option type="QString" name="{name}" value="{value}"/>' for name, value in options.items())
    return (
        f'<symbol name="{number}" type="{kind}" alpha="1" clip_to_extent="1" force_rhr="0">'
        f'<layer class="{layer}" enabled="1" locked="0" pass="0"><Option type="Map">{listed}</Option></layer></symbol>'
    )


def _qml(renderer: str) -> str:
    return (
        "<!DOCTYPE qgis PUBLIC 'http://mrcc.com/qgis.dtd' 'SYSTEM'>\n"
        f'<qgis version="3.28.0" styleCategories="Symbology">{renderer}</qgis>\n'
    )


# Text and reading -----------------------------------------------------------------------------------------------------


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".part")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(name, 0o644)
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)


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
        return pyogrio.read_dataframe(path, layer=layers[0] if layers else None)
    except Exception as error:  # each driver raises its own
        raise ExportError(f"{path} cannot be read as vector data: {error}") from error
