"""Datasets: features as those who train models take them, tile by tile: COCO, YOLO-seg folders, STAC with labels.

The same features as in all other formats, drawn back onto each annotated tile: an object that three tiles show is one
feature, with one id, on three images. Images stay where they are; files name them by their address.
"""

from __future__ import annotations

import csv
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote, urlsplit

import numpy as np
import shapely
from numpy.typing import NDArray
from shapely import Polygon, STRtree
from shapely.geometry.base import BaseGeometry

from . import vectorize
from .errors import ExportError
from .formats import Batch, FeatureLines, whole_or_not_at_all
from .seams import View

KINDS = ("coco", "yolo", "stac")

_LEAST_PX = 4.0
"""Square pixels of an object on a tile below which only the tile that shows most of it keeps it."""

_COLLECTION = "labels"
_LABEL_EXTENSION = "https://stac-extensions.github.io/label/v1.0.1/schema.json"


@dataclass(frozen=True, slots=True, eq=False)
class Picture:
    """An annotated tile."""

    view: View
    task: Any
    address: str
    """Of its image."""

    name: str
    """Of its image's file: not two are equal."""


@dataclass(frozen=True, slots=True, eq=False)
class SceneFeatures:
    """What is on one scene."""

    name: str
    pictures: Sequence[Picture]
    batches: Iterable[tuple[Batch, NDArray[np.object_]]]
    """Features, and their shapes in the pixels that the pictures' views have in common."""


class FileNames:
    """Names for images, made of their addresses; not two are equal, whatever the case."""

    def __init__(self) -> None:
        self._taken: set[str] = set()

    def of(self, address: str, task: Any) -> str:
        """A name that no other image got."""
        name = _plain(PurePosixPath(unquote(urlsplit(address).path)).name) or f"{_plain(str(task)) or 'image'}.jpg"
        stem, dot, ending = name.rpartition(".")
        stem, dot, ending = (stem, dot, ending) if stem else (name, "", "")
        # Two images whose names differ in the ending alone would share a label file.
        numbered = (f"{stem}_{number}" for number in range(2, 1_000_000))
        for tried in chain((stem, f"{_plain(str(task))}_{stem}"), numbered):
            if tried.casefold() not in self._taken:
                self._taken.add(tried.casefold())
                return tried + dot + ending
        raise ExportError(f"there are too many images of the name {name}")


def _plain(name: str) -> str:
    """The name without anything that a file system or a shell takes for something else."""
    return re.sub(r"[^\w.-]", "_", name, flags=re.ASCII).lstrip(".-")[:120]


def write_dataset(kind: str, scenes: Iterable[SceneFeatures], out: Path, *, labels: Sequence[str], made_at: str) -> int:
    """Write a dataset of that kind, whole or not at all. Returns how many features are in it.

    ``out`` is a file for COCO and a folder otherwise. ``labels`` are all there may be, in the order of their numbers.
    """
    check_name(kind, out)
    with whole_or_not_at_all(out) as path:
        match kind:
            case "coco":
                return _write_coco(scenes, path, labels, made_at)
            case "yolo":
                return _write_yolo(scenes, path, labels)
            case _:
                return _write_stac(scenes, path, labels, made_at)


def check_name(kind: str, out: Path) -> None:
    """Raises ExportError where a dataset of that kind cannot have the name, or what is there is something else."""
    if kind not in KINDS:
        raise ExportError(f"format must be one of {', '.join(KINDS)}, got {kind!r}")
    if kind == "coco" and out.suffix.lower() != ".json":
        raise ExportError(f"{out.name}: COCO is one .json file")
    if kind != "coco" and out.exists():
        marker = {"yolo": "data.yaml", "stac": "collection.json"}[kind]
        # The folder is replaced as a whole; one that holds other things must not be lost.
        if not out.is_dir() or (any(out.iterdir()) and not (out / marker).exists()):
            raise ExportError(f"{out} is there and no {kind} dataset; name a folder that is not there yet")


@dataclass(frozen=True, slots=True, eq=False)
class _Shown:
    """A feature on a picture."""

    feature: int
    """In its batch."""

    picture: Picture
    polygons: list[Polygon]
    """In pixels of the picture, clipped to it."""


def _shown(pictures: Sequence[Picture], tree: STRtree, shapes_px: NDArray[np.object_]) -> Iterator[_Shown]:
    """Each feature on each picture that shows enough of it."""
    feature, at = tree.query(shapes_px, predicate="intersects")
    order = np.lexsort((at, feature))
    feature, at = feature[order], at[order]
    views = [pictures[number].view for number in at.tolist()]
    if not views:
        return
    matrix = np.linalg.inv(np.array([view.matrix for view in views]))
    offset = np.array([view.offset for view in views])
    shapes = shapes_px[feature]
    points, owner = shapely.get_coordinates(shapes, return_index=True)
    points = np.einsum("ni,nij->nj", points - offset[owner], matrix[owner])
    boxes = shapely.box(0, 0, *np.array([view.tile.size for view in views], np.float64).T)
    clipped = shapely.intersection(shapely.set_coordinates(shapes.copy(), points), boxes)
    areas = shapely.area(clipped)
    most = np.zeros(len(shapes_px))
    np.maximum.at(most, feature, areas)
    enough = (areas >= np.minimum(_LEAST_PX, most[feature])) & (areas > 0)
    for number in np.flatnonzero(enough).tolist():
        polygons = vectorize.repair(clipped[number])
        if polygons:
            yield _Shown(int(feature[number]), pictures[int(at[number])], polygons)


def _tree(pictures: Sequence[Picture]) -> STRtree:
    return STRtree([picture.view.outline for picture in pictures])


# COCO -----------------------------------------------------------------------------------------------------------------


def _write_coco(scenes: Iterable[SceneFeatures], path: Path, labels: Sequence[str], made_at: str) -> int:
    features, images, annotations = 0, 0, 0
    category = {label: number for number, label in enumerate(labels, 1)}
    with ExitStack() as stack:
        listed = stack.enter_context((path.parent / "images.part").open("w+", encoding="utf-8"))
        file = stack.enter_context(path.open("w", encoding="utf-8"))
        file.write('{"annotations":[')
        for scene in scenes:
            numbers = {}
            for picture in scene.pictures:
                images += 1
                numbers[id(picture)] = images
                listed.write("," * (images > 1) + "\n" + json.dumps(_coco_image(images, picture, scene.name)))
            tree = _tree(scene.pictures)
            for batch, shapes_px in scene.batches:
                features += len(batch)
                for shown in _shown(scene.pictures, tree, shapes_px):
                    annotations += 1
                    entry = _coco_annotation(shown, batch)
                    entry |= {"id": annotations, "image_id": numbers[id(shown.picture)]}
                    entry["category_id"] = category[entry["attributes"]["label"]]
                    file.write("," * (annotations > 1) + "\n" + json.dumps(entry))
        file.write('\n],\n"images":[')
        listed.seek(0)
        while chunk := listed.read(1 << 20):
            file.write(chunk)
        categories = [{"id": number, "name": label, "supercategory": ""} for label, number in category.items()]
        info = {"description": "annotations exported by GeoPrelabel", "version": "1.0", "date_created": made_at}
        file.write(f'\n],\n"categories":{json.dumps(categories)},\n"info":{json.dumps(info)},\n"licenses":[]}}\n')
    (path.parent / "images.part").unlink()
    return features


def _coco_image(number: int, picture: Picture, scene: str) -> dict[str, Any]:
    width, height = picture.view.tile.size
    return {
        "id": number,
        "file_name": picture.name,
        "width": width,
        "height": height,
        "coco_url": picture.address,
        "task": picture.task,
        "scene": scene,
    }


def _coco_annotation(shown: _Shown, batch: Batch) -> dict[str, Any]:
    left, top, right, bottom = shapely.total_bounds(np.array(shown.polygons, dtype=object)).tolist()
    attributes = {name: values[shown.feature] for name, values in batch.columns.items()}
    segmentation: Any
    if any(polygon.interiors for polygon in shown.polygons):
        width, height = shown.picture.view.tile.size
        segmentation = {
            "size": [height, width],
            "counts": run_lengths(vectorize.rasterize(shown.polygons, height, width)),
        }
    else:
        rings = [np.round(shapely.get_coordinates(polygon)[:-1], 3) for polygon in shown.polygons]
        segmentation = [ring.ravel().tolist() for ring in rings]
    return {
        "segmentation": segmentation,
        "area": round(sum(polygon.area for polygon in shown.polygons), 3),
        "bbox": [round(value, 3) for value in (left, top, right - left, bottom - top)],
        "iscrowd": 0,
        "feature_id": attributes["id"],
        "attributes": attributes,
    }


def run_lengths(mask: NDArray[np.bool_]) -> list[int]:
    """COCO's uncompressed code of a mask (H, W): lengths of runs down the columns, in turn unset and set."""
    flat = mask.T.ravel()
    edges = np.flatnonzero(np.diff(flat, prepend=False)) if flat.size else np.empty(0, np.int64)
    lengths: list[int] = np.diff(edges, prepend=0, append=flat.size).tolist()
    return lengths


# YOLO -----------------------------------------------------------------------------------------------------------------


def _write_yolo(scenes: Iterable[SceneFeatures], path: Path, labels: Sequence[str]) -> int:
    """``labels/NAME.txt`` with a line for each part of each object: class, then x and y as shares of the image."""
    (path / "labels").mkdir(parents=True)
    number = {label: position for position, label in enumerate(labels)}
    features = 0
    with (
        (path / "images.csv").open("w", encoding="utf-8", newline="") as images_file,
        (path / "features.csv").open("w", encoding="utf-8", newline="") as features_file,
    ):
        images, listed = csv.writer(images_file), csv.writer(features_file)
        images.writerow(["image", "address", "task", "width", "height"])
        listed.writerow(["image", "line", "id"])
        for scene in scenes:
            lines: Counter[str] = Counter()
            for picture in scene.pictures:
                images.writerow([picture.name, picture.address, picture.task, *picture.view.tile.size])
                # An image without objects has an empty file: it is annotated, and there is nothing on it.
                _label_file(path, picture).touch()
            tree = _tree(scene.pictures)
            for batch, shapes_px in scene.batches:
                features += len(batch)
                texts: dict[str, list[str]] = {}
                for shown in _shown(scene.pictures, tree, shapes_px):
                    picture = shown.picture
                    for polygon in shown.polygons:
                        # YOLO's outlines are single rings: a hole hangs on a bridge.
                        ring = vectorize.bridge(polygon) / np.array(picture.view.tile.size)
                        shares = " ".join(f"{value:.6f}" for value in np.clip(ring, 0, 1).ravel().tolist())
                        label = number[batch.columns["label"][shown.feature]]
                        texts.setdefault(picture.name, []).append(f"{label} {shares}\n")
                        lines[picture.name] += 1
                        listed.writerow([picture.name, lines[picture.name], batch.columns["id"][shown.feature]])
                for name, written in texts.items():
                    with (path / "labels" / Path(name).with_suffix(".txt").name).open("a", encoding="utf-8") as file:
                        file.writelines(written)
    names = "".join(f"  {position}: {json.dumps(label)}\n" for position, label in enumerate(labels))
    (path / "data.yaml").write_text(f"path: .\ntrain: images\nval: images\nnames:\n{names}", encoding="utf-8")
    return features


def _label_file(path: Path, picture: Picture) -> Path:
    return path / "labels" / Path(picture.name).with_suffix(".txt").name


# STAC -----------------------------------------------------------------------------------------------------------------


def _write_stac(scenes: Iterable[SceneFeatures], path: Path, labels: Sequence[str], made_at: str) -> int:
    """A collection with one label item for each scene, its features as GeoJSON, and an item for each tile."""
    path.mkdir(parents=True)
    features = 0
    hrefs: list[str] = []
    boxes: list[tuple[float, ...]] = []
    names = FileNames()
    for scene in scenes:
        name = names.of(scene.name or "scene", "scene")
        folder = path / name
        (folder / "tiles").mkdir(parents=True)
        counts, updated = _write_stac_labels(scene, folder / "labels.geojson")
        tiles = [picture.view.tile for picture in scene.pictures]
        places = np.array([shapely.transform(tile.outline_px(), tile.px_to_lonlat) for tile in tiles], dtype=object)
        hull = shapely.convex_hull(shapely.union_all(places))
        item = _label_item(scene, name, hull, updated or made_at, labels, counts)
        item["links"] += _write_stac_tiles(scene, name, places, folder / "tiles", made_at)
        _write_json(folder / f"{name}.json", item)
        features += counts.total()
        hrefs.append(f"./{name}/{name}.json")
        boxes.append(tuple(item["bbox"]))
    _write_json(path / "collection.json", _stac_collection(hrefs, boxes, made_at))
    return features


def _write_stac_labels(scene: SceneFeatures, path: Path) -> tuple[Counter[str], str]:
    """Write a scene's features. Returns how many there are of each label, and when the last was changed."""
    counts: Counter[str] = Counter()
    updated = ""
    with FeatureLines(path) as file:
        for batch, _ in scene.batches:
            file.write(batch)
            counts.update(batch.columns["label"])
            updated = max([updated, *filter(None, batch.columns["updated"])])
    return counts, updated


def _write_stac_tiles(
    scene: SceneFeatures, name: str, places: NDArray[np.object_], folder: Path, made_at: str
) -> list[dict[str, str]]:
    """Write an item for each tile. Returns links to them."""
    links = []
    for picture, place in zip(scene.pictures, places, strict=True):
        stem = Path(picture.name).stem
        asset = {"image": {"href": picture.address or picture.name, "roles": ["data"]}}
        item = _item(f"{name}-{stem}", place, made_at, asset, depth=2)
        item["properties"] |= {"gsd": picture.view.tile.gsd_m} if picture.view.tile.gsd_m else {}
        _write_json(folder / f"{stem}.json", item)
        links.append({"rel": "source", "href": f"./tiles/{stem}.json", "type": "application/geo+json"})
    return links


def _label_item(
    scene: SceneFeatures, name: str, hull: BaseGeometry, when: str, labels: Sequence[str], counts: Mapping[str, int]
) -> dict[str, Any]:
    """The item of a scene's labels, as the label extension has it."""
    href = {"href": "./labels.geojson", "type": "application/geo+json", "roles": ["labels", "labels-vector"]}
    item = _item(name, hull, when, {"labels": href}, depth=1)
    item["stac_extensions"] = [_LABEL_EXTENSION]
    listed = [{"name": label, "count": counts[label]} for label in labels if counts[label]]
    item["properties"] |= {
        "label:properties": ["label"],
        "label:classes": [{"name": "label", "classes": list(labels)}],
        "label:description": f"Outlines on {scene.name or 'the scene'}, accepted or drawn in Label Studio",
        "label:type": "vector",
        "label:tasks": ["segmentation"],
        "label:methods": ["manual"],
        "label:overviews": [{"property_key": "label", "counts": listed}],
    }
    return item


def _stac_collection(hrefs: Sequence[str], boxes: Sequence[tuple[float, ...]], made_at: str) -> dict[str, Any]:
    """The collection of label items with those boxes."""
    around = shapely.total_bounds(shapely.box(*np.array(boxes).T)).tolist() if boxes else [-180, -90, 180, 90]
    return {
        "type": "Collection",
        "stac_version": "1.0.0",
        "stac_extensions": [],
        "id": _COLLECTION,
        "description": "Annotations exported by GeoPrelabel",
        "license": "proprietary",
        "extent": {"spatial": {"bbox": [around]}, "temporal": {"interval": [[made_at, None]]}},
        "links": [
            {"rel": "root", "href": "./collection.json", "type": "application/json"},
            *({"rel": "item", "href": href, "type": "application/geo+json"} for href in hrefs),
        ],
    }


def _item(identity: str, place: BaseGeometry, when: str, assets: Mapping[str, Any], *, depth: int) -> dict[str, Any]:
    up = "../" * depth
    return {
        "type": "Feature",
        "stac_version": "1.0.0",
        "stac_extensions": [],
        "id": identity,
        "geometry": json.loads(shapely.to_geojson(shapely.orient_polygons(place))),
        "bbox": list(place.bounds),
        "properties": {"datetime": when},
        "collection": _COLLECTION,
        "links": [
            {"rel": rel, "href": f"{up}collection.json", "type": "application/json"}
            for rel in ("root", "parent", "collection")
        ],
        "assets": dict(assets),
    }


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1), encoding="utf-8")
