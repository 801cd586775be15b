"""What was drawn on a scene → features in longitude and latitude: each object once, with all that is said of it."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import shapely
from numpy.typing import NDArray

from .annotations import Making
from .collect import BATCH_OUTLINES, MAX_FINDINGS, OUTLINE, DrawnScene, ExportOptions, Store, Tally, any_edit
from .earth import Area
from .edits import Edit, Edits
from .formats import FIELDS, Batch, Coded, Remark
from .ground import lonlat_outlines, outline_areas_m2
from .report import Conflict
from .rings import IntArray, Outlines, runs
from .seams import Pieces, WholeObjects, near_pairs, whole_objects
from .tile import Tile

_MAX_CONFLICTS = 200

_MIN_CONFLICT = 0.5
"""Share of the smaller of two features of different labels that must lie on the other to be called a conflict."""


def features_of(
    scene: DrawnScene,
    store: Store,
    texts: Sequence[str],
    options: ExportOptions,
    tally: Tally,
    remarks: list[Remark],
    edits: DesktopEdits,
) -> Iterator[tuple[Batch, Outlines]]:
    """The features of a scene with their outlines in its frame; after the last one its conflicts are in the tally."""
    rows = np.concatenate([*scene.outlines, np.empty(0, OUTLINE)])
    scene.outlines.clear()
    watches = bool(edits.read) or len(np.unique(rows["label"])) > 1
    features = _Features(scene, rows, store, texts, edits, watch_conflicts=watches)
    batches = (features.batch(objects, tally) for objects in _whole_objects(scene, rows, store, options, tally))
    for batch, outlines_px in chain(batches, (features.drawn_on_desktop() for _ in range(1))):
        if not len(batch):
            continue
        yield batch, outlines_px
        labels = Coded.of(batch.columns["label"])
        if tally.sketch is not None:
            tally.sketch.add_features(batch.geometry, labels)
        counts = np.bincount(labels.codes, minlength=len(labels.values)).tolist()
        areas = np.nan_to_num(np.array(batch.columns["area_m2"], np.float64))
        sums = np.bincount(labels.codes, areas, minlength=len(labels.values)).tolist()
        for label, count, area_m2 in zip(labels.values, counts, sums, strict=True):
            tally.labels[label] += count
            tally.label_area_m2[label] += area_m2
    features.find_conflicts(tally, remarks)


def _whole_objects(
    scene: DrawnScene, rows: NDArray[Any], store: Store, options: ExportOptions, tally: Tally
) -> Iterator[WholeObjects]:
    """Objects of the scene, each once, in batches."""
    if not options.merge_seams:
        for start in range(0, len(rows), BATCH_OUTLINES):
            yield WholeObjects.alone(np.arange(start, min(start + BATCH_OUTLINES, len(rows))))
        return
    # Points and outlines of one label are not joined.
    kind = rows["label"].astype(np.int64) * 2 + rows["is_point"]
    if options.annotations_from == "all":
        # Two people's outlines of one thing are two features; each one's own are joined.
        annotators: dict[int | None, int] = {None: 0}
        by = [
            annotators.setdefault(store.making(number).annotator, len(annotators))
            for number in range(len(store.makings))
        ]
        kind = kind * len(annotators) + np.array(by, np.int64)[rows["annotation"]]
    pieces = Pieces(
        boxes=rows["box"],
        label=kind,
        task=rows["task"].astype(np.int64),
        view=rows["view"].astype(np.int64),
        is_whole=rows["is_whole"],
        is_sliver=rows["is_sliver"],
        views=scene.views,
        fetch=lambda numbers: store.fetch(rows[numbers]),
    )
    for objects in whole_objects(pieces, simplify_px=options.simplify_px):
        tally.merged += int((objects.outlines > 1).sum())
        tally.duplicates += int((np.diff(objects.starts) - objects.outlines).sum())
        yield objects


class _Features:
    """Objects of one scene → batches of features."""

    def __init__(
        self,
        scene: DrawnScene,
        rows: NDArray[Any],
        store: Store,
        texts: Sequence[str],
        edits: DesktopEdits,
        *,
        watch_conflicts: bool,
    ) -> None:
        self._scene = scene
        self._rows = rows
        self._store = store
        self._edits = edits
        self._watches = watch_conflicts
        self._labels: dict[str, int] = {}
        self._written: list[NDArray[Any]] = []
        self._first = len(store.joined)
        self._maker = _Maker(scene.name, scene.anchor, scene.area(), texts, store.ids_are_numbers)

    def batch(self, objects: WholeObjects, tally: Tally) -> tuple[Batch, Outlines]:
        """Features as they are to be written, and their outlines in the scene's frame."""
        material, batch = self._maker.made(self._material(objects))
        outlines_px = material.outlines_px
        if lost := len(objects) - len(batch):
            tally.dropped["smaller than the coordinates can tell"] += lost
        if self._edits.read:
            listed = {name: list(values) for name, values in batch.columns.items()}
            geometry, shapes_px = batch.geometry, outlines_px.shapes
            kept = self._edits.apply(self._scene, listed, geometry, shapes_px)
            outlines, outlines_px = Outlines.of(geometry[kept]), Outlines.of(shapes_px[kept])
            columns: dict[str, Sequence[Any]] = {name: [values[i] for i in kept] for name, values in listed.items()}
            batch = Batch(outlines, columns | {"area_m2": _areas_m2(outlines)})
        self._keep(outlines_px, batch.columns)
        return batch, outlines_px

    def _material(self, objects: WholeObjects) -> _Material:
        """What is known of objects."""
        rows = self._rows[objects.members]
        used, by = np.unique(rows["annotation"], return_inverse=True)
        makings, regions = self._store.makings.read(used.astype(np.int64)), self._store.regions.read(rows["number"])
        return _Material(self._outlines(objects), rows, objects.starts, makings, by, regions)

    def _outlines(self, objects: WholeObjects) -> Outlines:
        """Outlines of objects, in the scene's frame."""
        kept = np.flatnonzero(objects.piece >= 0)
        found = self._store.fetch(self._rows[objects.piece[kept]])
        if not objects.joined:
            return found
        joined = np.full(len(objects.joined), None, dtype=object)
        joined[:] = list(objects.joined.values())
        at = np.concatenate((kept[found.other_at], np.array(list(objects.joined), np.int64)))
        order = np.argsort(at)
        return Outlines(
            found.rings, kept[found.ring_at], np.concatenate((found.others, joined))[order], at[order]
        )  # fmt: skip

    def drawn_on_desktop(self) -> tuple[Batch, Outlines]:
        """Features that a desktop GIS added to the scene."""
        added = self._edits.added_to(self._scene)
        outlines = Outlines.of(edit.geometry for _, edit in added)
        outlines_px = Outlines.of(self._scene.from_lonlat(edit.geometry) for _, edit in added)
        unknown: dict[str, list[Any]] = {
            name: [[] if kind == "ids" else None for _ in added] for name, kind in FIELDS.items()
        }
        columns = unknown | {
            "id": [identity for identity, _ in added],
            "label": [edit.label for _, edit in added],
            "area_m2": _areas_m2(outlines),
            "scene": [self._scene.name] * len(added),
            "edited": [True] * len(added),
        }
        self._keep(outlines_px, columns)
        return Batch(outlines, columns), outlines_px

    def _keep(self, outlines_px: Outlines, columns: Mapping[str, Any]) -> None:
        """Remember what was written, since it may conflict with what comes."""
        if not self._watches or not len(outlines_px):
            return
        shapes = outlines_px.shapes
        numbers = np.flatnonzero(_is_area(shapes))
        ids, tasks, labels = ([columns[name][i] for i in numbers.tolist()] for name in ("id", "tasks", "label"))
        shapes = shapes[numbers]
        kept = np.zeros(len(shapes), np.dtype([("box", np.float64, 4), ("label", np.int32)]))
        kept["box"] = shapely.bounds(shapes)
        kept["label"] = [self._labels.setdefault(label, len(self._labels)) for label in labels]
        self._written.append(kept)
        about = zip(ids, tasks, labels, shapely.to_wkb(shapes), strict=True)
        self._store.joined.append(json.dumps(listed).encode() + b"\0" + wkb for *listed, wkb in about)

    def find_conflicts(self, tally: Tally, remarks: list[Remark]) -> None:
        """Features of different labels on the same ground, block by block."""
        if not self._written:
            return
        written = np.concatenate(self._written)
        for pairs in near_pairs(written["box"], 0.0):
            label = written["label"][pairs]
            pairs = pairs[label[:, 0] != label[:, 1]]
            if not len(pairs):
                continue
            numbers, where = np.unique(pairs, return_inverse=True)
            kept = [blob.split(b"\0", 1) for blob in self._store.joined.read(numbers + self._first)]
            shapes = shapely.from_wkb(np.array([wkb for _, wkb in kept], dtype=object))
            a, b = shapes[where.reshape(pairs.shape)].T
            smaller = np.minimum(shapely.area(a), shapely.area(b))
            touching = np.flatnonzero(shapely.intersects(a, b))
            share = np.zeros(len(pairs))
            common = shapely.intersection(a[touching], b[touching])
            share[touching] = shapely.area(common) / smaller[touching]
            for at, place in zip(touching.tolist(), common, strict=True):
                if share[at] < _MIN_CONFLICT:
                    continue
                tally.conflict_count += 1
                if len(tally.conflicts) >= _MAX_CONFLICTS:
                    continue
                about = [json.loads(kept[k][0]) for k in where.reshape(pairs.shape)[at].tolist()]
                lonlat = self._scene.anchor.px_to_lonlat(shapely.get_coordinates(place.representative_point()))[0]
                first, second = about[0][2], about[1][2]
                conflict = Conflict(
                    ids=(about[0][0], about[1][0]),
                    labels=(first, second),
                    tasks=tuple(_distinct([*about[0][1], *about[1][1]])),
                    overlap=round(float(share[at]), 3),
                    lonlat=(round(float(lonlat[0]), 7), round(float(lonlat[1]), 7)),
                )
                tally.conflicts.append(conflict)
                reason = f"{first} and {second} cover the same ground ({share[at]:.0%} of the smaller)"
                tasks = ", ".join(map(str, conflict.tasks))
                remarks.append(Remark(shapely.Point(conflict.lonlat), reason, tasks, ", ".join(conflict.ids)))


@dataclass(frozen=True, slots=True, eq=False)
class _Material:
    """Some objects, and all that is known of them."""

    outlines_px: Outlines
    """In the scene's frame, N."""

    rows: NDArray[Any]
    """Records of the outlines that they were made of, object by object, (M,)."""

    starts: IntArray
    """Where the records of each begin, and the end, (N + 1,)."""

    makings: Sequence[bytes]
    by: IntArray
    """Which of the makings each record is of, (M,)."""

    regions: Sequence[bytes]
    """Of each record."""

    def __len__(self) -> int:
        return len(self.outlines_px)

    def take(self, numbers: IntArray) -> _Material:
        """The objects of those numbers, which rise."""
        sizes = np.diff(self.starts)[numbers]
        kept = runs(self.starts[:-1][numbers], sizes)
        starts = np.concatenate(([0], np.cumsum(sizes)))
        regions = [self.regions[at] for at in kept.tolist()]
        return _Material(self.outlines_px.take(numbers), self.rows[kept], starts, self.makings, self.by[kept], regions)


@dataclass(frozen=True, slots=True, eq=False)
class _Maker:
    """Makes features of one scene."""

    scene: str
    anchor: Tile
    area: Area | None
    texts: Sequence[str]
    ids_are_numbers: bool

    def made(self, material: _Material) -> tuple[_Material, Batch]:
        """The objects of which something is left on the grid of coordinates, and their features."""
        outlines = lonlat_outlines(material.outlines_px, self.anchor, self.area)
        lost = outlines.other_at[shapely.is_missing(outlines.others)]
        if len(lost):
            left = np.setdiff1d(np.arange(len(material)), lost)
            material, outlines = material.take(left), outlines.take(left)
        return material, Batch(outlines, self._columns(material) | {"area_m2": _areas_m2(outlines)})

    def _columns(self, material: _Material) -> dict[str, Sequence[Any]]:
        """All attributes but the area."""
        texts, rows, by, regions = self.texts, material.rows, material.by, material.regions
        firsts = material.starts[:-1]
        makings = [Making(*values) for values in _json_lists(material.makings)]
        # What is the same for many features, as of one annotation, is put together once.
        annotations, versions, edits = (column.tolist() for column in (by, rows["version"], rows["edited"]))
        known: dict[tuple[Any, ...], int] = {}
        shared: list[dict[str, Any]] = []

        def shared_by(span: slice) -> int:
            key = (tuple(annotations[span]), tuple(versions[span]), tuple(edits[span]))
            if key not in known:
                known[key] = len(shared)
                shared.append(self._shared([makings[number] for number in dict.fromkeys(key[0])], *key[1:]))
            return known[key]

        kind = ((by * (len(texts) + 1) + rows["version"] + 1) * 3 + rows["edited"] + 1)[firsts]
        _, some, which = np.unique(kind, return_index=True, return_inverse=True)
        codes = np.array([shared_by(slice(at, at + 1)) for at in firsts[some].tolist()], np.int64)[which]
        is_scored = ~np.isnan(rows["score"])
        scores: list[float | None] = [None] * len(material)
        for at in np.flatnonzero(is_scored[firsts]).tolist():
            scores[at] = float(rows["score"][firsts[at]])
        used_labels, labels = np.unique(rows["label"][firsts], return_inverse=True)
        heads = [f"{self.scene}\n{texts[number]}\n".encode(errors="replace") for number in used_labels.tolist()]
        of_task = [f"{making.task}/".encode(errors="replace") for making in makings]
        begins = [head + task for head in heads for task in of_task]
        begin = (labels * len(of_task) + by[firsts]).tolist()
        hashed = [begins[number] + regions[first] for number, first in zip(begin, firsts.tolist(), strict=True)]
        # Most features are made of one region, and for the others that is where to start.
        starts, head_of, known_scores = material.starts.tolist(), labels.tolist(), np.cumsum(is_scored).tolist()
        has_more = np.diff(material.starts) > 1
        for at in np.flatnonzero(has_more | np.array([b"\0" in text for text in hashed], bool)).tolist():
            span = slice(starts[at], starts[at + 1])
            listed = zip(annotations[span], regions[span], strict=True)
            lines = [of_task[number] + region for number, joined in listed for region in joined.split(b"\0")]
            hashed[at] = heads[head_of[at]] + b"\n".join(sorted(lines))
            if span.stop - span.start > 1:
                codes[at] = shared_by(span)
                if scores[at] is not None or known_scores[span.stop - 1] > known_scores[span.start]:
                    scores[at] = _mean(rows["score"][span], rows["area_px"][span])
        names = self._shared([], (), ())
        return {
            "id": _stable_ids(hashed),
            "label": Coded([texts[number] for number in used_labels.tolist()], labels),
            "score": scores,
            **{name: Coded([values[name] for values in shared], codes) for name in names},
        }

    def _shared(self, makings: Sequence[Making], versions: Iterable[int], edits: Iterable[int]) -> dict[str, Any]:
        """What the outlines that make a feature say of it together: their annotations, and their own numbers."""
        named = {self.texts[number] for number in versions if number >= 0}
        return {
            **self._made(makings),
            "scene": self.scene,
            "model_version": ", ".join(sorted(filter(None, named))) or None,
            "edited": any_edit([None if edited < 0 else edited > 0 for edited in edits]),
        }

    def _made(self, makings: Sequence[Making]) -> dict[str, Any]:
        """What several annotations together say of a feature."""
        leads = [making.lead_time_s for making in makings if making.lead_time_s is not None]
        return {
            "annotators": _distinct(making.annotator for making in makings),
            "tasks": self._ids(making.task for making in makings),
            "annotations": self._ids(making.annotation for making in makings),
            "lead_time_s": sum(leads) if leads else None,
            "created": min((making.created for making in makings if making.created), default=None),
            "updated": max((making.updated for making in makings if making.updated), default=None),
        }

    def _ids(self, values: Iterable[Any]) -> list[Any]:
        found = _distinct(values)
        return found if self.ids_are_numbers else [str(value) for value in found]


class DesktopEdits:
    """What was changed in a desktop GIS and waits for its feature."""

    def __init__(self, read: Edits, scenes: Sequence[DrawnScene]) -> None:
        self.read = read
        self.counts: Counter[str] = Counter()
        self._changed = dict(read.changed)
        self._deleted = set(read.deleted)
        self._added: dict[int, list[tuple[str, Edit]]] = {}
        for identity, edit in read.added.items():
            near = next((scene for scene in scenes if scene.shows(edit.geometry)), scenes[0])
            self._added.setdefault(id(near), []).append((identity, edit))

    def apply(
        self,
        scene: DrawnScene,
        columns: dict[str, list[Any]],
        geometry: NDArray[np.object_],
        shapes_px: NDArray[np.object_],
    ) -> list[int]:
        """Put changed outlines and labels in place of the annotated ones. Returns which features were not deleted."""
        kept = []
        for number, identity in enumerate(columns["id"]):
            if identity in self._deleted:
                self._deleted.discard(identity)
                self.counts["deleted"] += 1
                continue
            kept.append(number)
            edit = self._changed.pop(identity, None)
            if edit is not None:
                self.counts["changed"] += 1
                geometry[number], shapes_px[number] = edit.geometry, scene.from_lonlat(edit.geometry)
                columns["label"][number], columns["edited"][number] = edit.label, True
        return kept

    def added_to(self, scene: DrawnScene) -> list[tuple[str, Edit]]:
        """Features that were drawn on the scene, with their ids."""
        added = self._added.pop(id(scene), [])
        self.counts["added"] += len(added)
        return added

    def finish(self, tally: Tally) -> None:
        """Count the edits that found nothing to change."""
        lost = len(self._changed) + len(self._deleted)
        if lost:
            tally.dropped["desktop edit of a feature that is no longer there"] += lost
        for reason in self.read.unreadable:
            tally.dropped["desktop edit that cannot be read"] += 1
            if len(tally.findings) < MAX_FINDINGS:
                tally.findings.append(reason)


def _areas_m2(outlines: Outlines) -> list[float | None]:
    """Area of each; None for points."""
    areas: list[float | None] = outline_areas_m2(outlines).tolist()
    for at in outlines.other_at[~_is_area(outlines.others)].tolist():
        areas[at] = None
    return areas


def _is_area(shapes: NDArray[np.object_]) -> NDArray[np.bool_]:
    return np.asarray(shapely.get_type_id(shapes) != shapely.GeometryType.POINT)


def _json_lists(texts: Sequence[bytes]) -> list[list[Any]]:
    """Many JSON lists, read in one go."""
    found: list[list[Any]] = json.loads(b"[" + b",".join(texts) + b"]")
    return found


def _mean(scores: NDArray[np.float64], areas_px: NDArray[np.float64]) -> float | None:
    """The mean, by area, of those that are known; None where none is. Points count the same."""
    known = [(score, area or 1.0) for score, area in zip(scores.tolist(), areas_px.tolist(), strict=True)]
    known = [(score, weight) for score, weight in known if score == score]
    total = sum(weight for _, weight in known)
    return sum(score * weight for score, weight in known) / total if known else None


def _distinct(values: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(value for value in values if value is not None))


def _stable_ids(texts: Sequence[bytes]) -> list[str]:
    """The same for the same scene, label and regions, however those were moved since."""
    return [hashlib.sha256(text).hexdigest()[:16] for text in texts]
