"""Annotations → features: what people accepted on tiles becomes whole objects on Earth, in a file that any GIS reads.

Tiles of one scene are brought into one frame of pixels, there the parts of objects that tiles cut are joined, and only
what is whole goes to lon/lat. Nothing is left out silently: the report counts every reason.

The way goes twice over the outlines, so that a million of them need no more memory than a few numbers each: they are
read page by page and laid down in a file (`spool`); then objects are joined and written batch by batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import shapely

from . import labelstudio
from .collect import ON_INVALID, DrawnScene, ExportOptions, Place, Reader, Store, Tally, settled
from .datasets import FileNames, Picture, SceneFeatures, check_name, write_dataset
from .earth import Lineage, checked_lineage, lineage_record, versions
from .edits import Edits
from .errors import ExportError
from .features import DesktopEdits, features_of
from .formats import Remark, check_ending, write, write_text
from .labelstudio import LabelConfig
from .report import ExportReport, report_page
from .sketch import ImageOf, Sketch
from .spool import Spool

__all__ = ["ON_INVALID", "ExportOptions", "ExportReport", "export"]


def export(
    tasks: Iterable[Mapping[str, Any]],
    out: Path,
    *,
    options: ExportOptions | None = None,
    label_config: str | None = None,
    report_path: Path | None = None,
    image_of: ImageOf | None = None,
    edits: Edits | None = None,
) -> ExportReport:
    """Write the annotations of Label Studio's JSON tasks as features in EPSG:4326; the ending of ``out`` says how.

    ``label_config`` is the project's, where known: it tells prompts from regions. ``report_path`` takes the report as
    an HTML page, with the tiles as ``image_of`` fetches them. ``edits`` made in a desktop GIS count more
    than annotations. The file appears whole or not at all. Raises ExportError where no task has both a place and an
    annotation, where an outline is invalid and ``on_invalid`` is ``error``, and where a CRS cannot be left exactly.
    """
    options = options or ExportOptions()
    if options.format:
        check_name(options.format, out)
    else:
        check_ending(out)
    config = labelstudio.parse_config(label_config) if label_config else None
    made_at = datetime.now(UTC).isoformat(timespec="seconds")
    out.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        stack.enter_context(settled())
        rings, shapes, regions, makings, joined = (stack.enter_context(Spool(out.parent)) for _ in range(5))
        store = Store(rings, shapes, regions, makings, joined)
        tally = Tally(sketch=Sketch() if report_path is not None else None)
        edits, pointless = edits or Edits(), _pointless(options.format or out.suffix.lower())
        if pointless:
            if lost := len(edits.added) - len(edits.of_outlines().added):
                tally.dropped[pointless] += lost
            edits = edits.of_outlines()
        reader = Reader(options, config, store, tally, pointless=pointless)
        for task in tasks:
            reader.read(task)
        scenes = reader.finish()
        if not scenes:
            raise ExportError(_why_nothing(tally))
        for scene in scenes:
            scene.lineage = checked_lineage(scene.anchor, scene.area(), allow_ballpark=options.allow_ballpark)
        lineages = _ways_out([scene.lineage for scene in scenes if scene.lineage])
        pending = DesktopEdits(edits, scenes)
        record = lineage_record(lineages, made_at=made_at)
        written = _write(scenes, store, out, options, config, tally, record, pending)
    pending.finish(tally)
    report = ExportReport(
        out=out,
        tasks=tally.tasks,
        annotations=tally.annotations,
        regions=tally.regions,
        features=written,
        merged=tally.merged,
        duplicates=tally.duplicates,
        repaired=tally.repaired,
        dropped=dict(tally.dropped),
        refused=dict(tally.refused),
        findings=tally.findings,
        crs=lineages,
        versions=versions(),
        conflicts=tally.conflicts,
        conflict_count=tally.conflict_count,
        labels=dict(tally.labels),
        label_area_m2={label: round(area, 3) for label, area in tally.label_area_m2.items()},
        chosen=dict(tally.chosen),
        edits=dict(pending.counts),
        made_at=made_at,
    )
    if report_path is not None:
        write_text(report_path, report_page(report, tally.sketch, image_of=image_of))
    return report


def _pointless(kind: str) -> str:
    """Why a dataset, or a file of that ending, has no points; empty where it has."""
    named = {".shp": "a Shapefile of outlines", "coco": "COCO", "yolo": "YOLO"}.get(kind)
    return f"point, for which {named} has no place" if named else ""


def _ways_out(lineages: Iterable[Lineage]) -> list[Lineage]:
    """Each way out of a CRS once, in order: scenes far apart may leave one CRS by different operations."""
    found: dict[tuple[str, str], Lineage] = {}
    for lineage in lineages:
        found.setdefault((lineage.crs, lineage.definition), lineage)
    return list(found.values())


def _why_nothing(tally: Tally) -> str:
    if not tally.tasks:
        return "there is no task to export"
    if tally.refused:
        reason, count = tally.refused.most_common(1)[0]
        return f"none of {tally.tasks} tasks can be exported; {count} because {reason}"
    return f"none of {tally.tasks} tasks has a submitted annotation; submit some in Label Studio first"


def _write(
    scenes: Sequence[DrawnScene],
    store: Store,
    out: Path,
    options: ExportOptions,
    config: LabelConfig | None,
    tally: Tally,
    lineage: Mapping[str, Any],
    edits: DesktopEdits,
) -> int:
    """Write the features of all scenes. Returns how many there are."""
    # What came over the wire may hold half characters, which no file can.
    texts = [text.encode(errors="replace").decode() for text in store.texts]
    remarks = [_remark(place) for place in tally.places]
    by_scene = (features_of(scene, store, texts, options, tally, remarks, edits) for scene in scenes)
    if not options.format:
        batches = (batch for features in by_scene for batch, _ in features)
        return write(
            batches,
            out,
            ids_are_numbers=store.ids_are_numbers,
            has_points=any(rows["is_point"].any() for scene in scenes for rows in scene.outlines)
            or any(isinstance(edit.geometry, shapely.Point) for edit in edits.read.added.values()),
            lineage=lineage,
            remarks=remarks,
        )
    names = FileNames()
    labels = _all_labels(scenes, texts, config, edits.read)
    listed = (
        SceneFeatures(
            scene.name,
            [Picture(view, task, address, names.of(address, task)) for view, (address, task) in scene.pictures()],
            ((batch, outlines_px.shapes) for batch, outlines_px in features),
        )
        for scene, features in zip(scenes, by_scene, strict=True)
    )
    return write_dataset(options.format, listed, out, labels=labels, made_at=str(lineage["made_at"]))


def _all_labels(
    scenes: Sequence[DrawnScene], texts: Sequence[str], config: LabelConfig | None, edits: Edits
) -> list[str]:
    """The labels of the label config in its order, then others that were used, by name.

    So that their numbers stay when annotations come and go.
    """
    known = [label.value for tag in config.tags for label in tag.labels] if config is not None else []
    numbers = {number for scene in scenes for rows in scene.outlines for number in np.unique(rows["label"]).tolist()}
    drawn_on_desktop = {edit.label for edit in (*edits.changed.values(), *edits.added.values())}
    return list(dict.fromkeys([*known, *sorted({*(texts[number] for number in numbers), *drawn_on_desktop})]))


def _remark(place: Place) -> Remark:
    """A finding where it lies on Earth: the outline, or the middle of the tile where nothing is left of that."""
    width, height = place.tile.size
    shape = place.shape_px or shapely.Point(width / 2, height / 2)
    lonlat = shapely.transform(shape, place.tile.px_to_lonlat)
    return Remark(lonlat, place.reason, str(place.task), place.region)
