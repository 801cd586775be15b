"""What the benchmarks of quality share: labelled tiles, the backend as Label Studio asks it, and every definition.

Nothing is predicted here but by `Service.predict`, on the JSON that Label Studio posts: whatever changes in how the
server answers is judged as it is served. Only HTTP and the fetching of images over it are left out.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import math
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import cv2
import numpy as np
from shapely import LinearRing, Polygon
from shapely.geometry import shape
from shapely.ops import polygonize

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from backend.compact import CompactSegmenter
from backend.evaluation import MATCH_IOU, Overlaps
from backend.judging import Click, clicked_through
from backend.judging import deepest as deepest
from backend.judging import iou as iou
from backend.segmenter import Segmenter
from backend.service import PredictRequest, Service
from backend.settings import Settings

REPOSITORY = Path(__file__).resolve().parent.parent

Mask = np.ndarray
Ring = np.ndarray
Json = dict[str, Any]

MIN_AREA_PX = 150.0
"""Smaller objects are not judged, in square pixels."""

SIDES_PX = (12, 20, 32, 50, 100, math.inf)
"""Classes of size: an object belongs by the root of its area, in pixels."""

SEED = 7

CONFIG = """<View><Image name="image" value="$image"/>
<PolygonLabels name="polygon" toName="image" model_score_threshold="{least}">{labels}</PolygonLabels>
<KeyPointLabels name="point" toName="image" smart="true">{labels}</KeyPointLabels>
<RectangleLabels name="box" toName="image" smart="true">{labels}</RectangleLabels></View>"""


def parser(doc: str, *, limit: int, limited: str) -> argparse.ArgumentParser:
    """What the benchmarks of quality are asked alike: which tiles, how many, what label, which weights."""
    asked = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("data", type=Path, nargs="?")
    asked.add_argument("--match", nargs="+", default=[""], help="only images whose name starts with one of these")
    asked.add_argument("--label", default="building")
    asked.add_argument("--limit", type=int, default=limit, help=limited)
    asked.add_argument("--weights", type=Path, help="another weights file than the shipped one")
    return asked


def add_figures(asked: argparse.ArgumentParser) -> None:
    """What those are asked that write figures of pre-labels."""
    asked.add_argument(
        "--min-score", type=float, help="least score of a pre-label; as the environment says if not given"
    )
    asked.add_argument("--json", type=Path, metavar="OUT", help="write everything that is measured")


# --- Labelled tiles ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Truth:
    """An object as somebody outlined it."""

    crop: Mask
    left: int
    top: int
    """Its mask, and the first column and row of it."""

    area_px: float
    bounds_xyxy: tuple[float, float, float, float]
    is_whole: bool
    """Not cut by the edge of the tile."""

    parts: tuple[Polygon, ...] = ()
    """Its outline; none where only a mask is known."""

    @property
    def rings(self) -> list[Ring]:
        """All rings of the outline, each closed."""
        return [_points(ring) for part in self.parts for ring in (part.exterior, *part.interiors)]

    @property
    def window(self) -> tuple[slice, slice]:
        """Rows and columns of the tile that the crop lies on."""
        height, width = self.crop.shape
        return slice(self.top, self.top + height), slice(self.left, self.left + width)

    def mask(self, image_hw: tuple[int, int]) -> Mask:
        whole = np.zeros(image_hw, bool)
        whole[self.window] = self.crop
        return whole

    @property
    def clicks_by_hand(self) -> int:
        """One for each vertex and one to close each ring."""
        return sum(len(ring) for ring in self.rings)


@dataclass(frozen=True)
class Tile:
    """An image whose objects are all outlined."""

    image: Path
    number: int
    """From 1, as the id of its task."""

    image_hw: tuple[int, int]
    truths: tuple[Truth, ...]

    @property
    def judged(self) -> list[Truth]:
        """The objects that pre-labels are compared with."""
        return [truth for truth in self.truths if truth.crop.sum() >= MIN_AREA_PX]


@dataclass(frozen=True)
class Target:
    """A whole object to outline by clicks or a box."""

    tile: Tile
    truth: Truth


def labelled_tiles(folder: Path, match: Sequence[str] = ("",)) -> list[Tile]:
    """Tiles of a folder with ``images/`` and ``labels/px/*.geojson`` (or ``labels/*.geojson``), in name order.

    Only those whose name starts with one of ``match``.
    """
    labels = folder / "labels" / "px"
    labels = labels if labels.is_dir() else folder / "labels"
    tiles: list[Tile] = []
    for file in sorted(labels.glob("*.geojson")):
        images = [path for path in sorted((folder / "images").glob(f"{file.stem}.*")) if _is_image(path)]
        if not images or not images[0].name.startswith(tuple(match)):
            continue
        height, width = cv2.imread(str(images[0])).shape[:2]
        truths = [_truth(feature, height, width) for feature in json.loads(file.read_text())["features"]]
        tiles.append(Tile(images[0], len(tiles) + 1, (height, width), tuple(t for t in truths if t.crop.any())))
    return tiles


def _is_image(path: Path) -> bool:
    return path.suffix in (".jpg", ".png")


def _truth(feature: Mapping[str, Any], height: int, width: int) -> Truth:
    outline = shape(feature["geometry"])
    parts = [part for part in getattr(outline, "geoms", [outline]) if isinstance(part, Polygon)]
    mask = np.zeros((height, width), bool)
    for part in parts:
        mask |= rasterized([_points(ring) for ring in (part.exterior, *part.interiors)], (height, width))
    crop, left, top = _cropped(mask)
    is_whole = not feature["properties"].get("touches_edge")
    return Truth(crop, left, top, outline.area, outline.bounds, is_whole, tuple(parts))


def _points(ring: LinearRing) -> Ring:
    return np.asarray(ring.coords)[:, :2]


def _cropped(mask: Mask) -> tuple[Mask, int, int]:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        return np.zeros((0, 0), bool), 0, 0
    left, top = int(columns[0]), int(rows[0])
    return mask[top : rows[-1] + 1, left : columns[-1] + 1].copy(), left, top


def held_out_tiles(data: Path, out: Path, *, side_px: int = 1024) -> dict[tuple[str, str], list[Tile]]:
    """What training watches itself on, by data folder and class, cut to tiles of that side at most; ``out`` gets them.

    The split is that of ``sheets`` in model_weights/train.py. Classes other than building and field are left out: their
    truth is patches of a mask, or lines of one width, and ``calibrate.py`` judges their pre-labels.
    """
    spec = importlib.util.spec_from_file_location("train", REPOSITORY / "model_weights" / "train.py")
    assert spec is not None
    assert spec.loader is not None
    train = importlib.util.module_from_spec(spec)
    sys.modules["train"] = train
    spec.loader.exec_module(train)
    found: dict[tuple[str, str], list[Tile]] = {}
    for number, sheet in enumerate(train.sheets(data)):
        for index, label in enumerate(train.LABELS):
            if (
                not (sheet.held_out and sheet.prompted)
                or label not in ("building", "field")
                or index not in sheet.known
            ):
                continue
            tiles = found.setdefault((sheet.group, label), [])
            for rows in _parts(sheet.rgb.shape[0], side_px):
                for columns in _parts(sheet.rgb.shape[1], side_px):
                    image = out / sheet.group / "images" / f"{label}-{number}-{rows.start}-{columns.start}.png"
                    image.parent.mkdir(parents=True, exist_ok=True)
                    cv2.imwrite(str(image), np.ascontiguousarray(sheet.rgb[rows, columns, ::-1]))
                    truths = _drawn_truths(sheet.instances[rows, columns], sheet.classes == index)
                    hw = (rows.stop - rows.start, columns.stop - columns.start)
                    tiles.append(Tile(image, len(tiles) + 1, hw, tuple(truths)))
    return found


def _parts(length: int, side_px: int) -> list[slice]:
    edges = np.linspace(0, length, math.ceil(length / side_px) + 1).round().astype(int).tolist()
    return [slice(a, b) for a, b in itertools.pairwise(edges)]


def _drawn_truths(instances: np.ndarray, is_wanted: np.ndarray) -> Iterator[Truth]:
    height, width = instances.shape
    for number in np.unique(instances):
        if is_wanted[number]:
            crop, left, top = _cropped(instances == number)
            x1, y1 = left + crop.shape[1], top + crop.shape[0]
            is_whole = left > 0 and top > 0 and x1 < width and y1 < height
            yield Truth(crop, left, top, float(crop.sum()), (left, top, x1, y1), is_whole)


def whole_objects(tiles: Sequence[Tile], limit: int) -> list[Target]:
    """At most so many whole objects of `MIN_AREA_PX` and more, drawn at random, the same ones each time."""
    found = [Target(tile, truth) for tile in tiles for truth in tile.truths if truth.is_whole]
    found = [target for target in found if target.truth.area_px >= MIN_AREA_PX]
    random.Random(SEED).shuffle(found)
    return found[:limit]


# --- The backend, asked as Label Studio asks it -----------------------------------------------------------------------


@dataclass(frozen=True)
class PreLabel:
    """A polygon that is served without being asked for."""

    ring: Ring
    """In pixel corners, (N, 2)."""

    score: float | None


class Outliner(Protocol):
    """Answers prompts with the mask of an object."""

    def clicked(self, tile: Tile, clicks: Sequence[Click]) -> Mask: ...

    def boxed(self, tile: Tile, box_xyxy: tuple[float, float, float, float]) -> Mask: ...


_BOXED_FROM = 10_000_000
"""Task numbers of boxes begin here."""


class Backend:
    """A whole backend in this process, with one set of weights, on the images of one folder."""

    def __init__(
        self,
        folder: Path,
        label: str,
        *,
        labels: Sequence[str] = ("building", "road", "water"),
        segmenter: Segmenter | None = None,
        min_score: float | None = None,
    ) -> None:
        """``labels`` are those of the project, ``label`` is judged; with ``min_score`` None settings say it."""
        self.label = label
        self._scratch = tempfile.TemporaryDirectory(prefix="geoprelabel-benchmark-")
        self.settings = Settings.from_environment(
            data_dir=Path(self._scratch.name), local_files_document_root=folder, label_studio_url=""
        )
        self.min_score = self.settings.model_score_threshold if min_score is None else min_score
        self._names = "".join(f'<Label value="{name}"/>' for name in dict.fromkeys([label, *labels]))
        self._folder = folder
        self._service = Service(self.settings, segmenter=segmenter or CompactSegmenter.load())
        self._service.start()
        self._service.predictor.wait(300)
        self.version = self._service.predictor.base_version()

    def __enter__(self) -> Backend:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._service.close()
        self._scratch.cleanup()

    @property
    def knows(self) -> bool:
        """Whether the weights have a class for the label."""
        model = self._service.predictor.model("0")
        return self.label.casefold() in {known.casefold() for known in model.segmenter.labels}

    def pre_labels(self, tile: Tile, *, min_score: float | None = None) -> list[PreLabel]:
        """What is served when the task is opened, of the label; with another least score if one is given."""
        return self.scored_pre_labels(tile, min_score=min_score)[0]

    def scored_pre_labels(self, tile: Tile, *, min_score: float | None = None) -> tuple[list[PreLabel], float | None]:
        """The same, and the score of the task that Label Studio sorts by."""
        height, width = tile.image_hw
        answer = self._answer(tile, None, self.min_score if min_score is None else min_score)
        return [
            PreLabel(np.asarray(region["value"]["points"], float) * (width / 100, height / 100), region.get("score"))
            for region in answer["result"]
            if region["value"].get("points") and (region["value"].get("polygonlabels") or [""])[0] in ("", self.label)
        ], answer.get("score")

    def clicked(self, tile: Tile, clicks: Sequence[Click]) -> Mask:
        height, width = tile.image_hw
        prompts = [
            self._prompt("point", "keypointlabels", tile, number, {
                "x": (click.column + 0.5) * 100 / width, "y": (click.row + 0.5) * 100 / height, "width": 0.3,
            }, is_positive=click.is_on)
            for number, click in enumerate(clicks)
        ]  # fmt: skip
        return self._mask(tile, prompts)

    def boxed(self, tile: Tile, box_xyxy: tuple[float, float, float, float]) -> Mask:
        height, width = tile.image_hw
        x0, y0, x1, y1 = box_xyxy
        value = {"x": x0 * 100 / width, "y": y0 * 100 / height, "width": (x1 - x0) * 100 / width,
                 "height": (y1 - y0) * 100 / height, "rotation": 0}  # fmt: skip
        return self._mask(tile, [self._prompt("box", "rectanglelabels", tile, 0, value)])

    def _prompt(self, tag: str, kind: str, tile: Tile, number: int, value: Json, **more: Any) -> Json:
        height, width = tile.image_hw
        return {
            "id": f"prompt{number:04d}", "from_name": tag, "to_name": "image", "type": kind, "origin": "manual",
            "original_width": width, "original_height": height, "image_rotation": 0, **more,
            "value": {**value, kind: [self.label]},
        }  # fmt: skip

    def _mask(self, tile: Tile, prompts: Sequence[Json]) -> Mask:
        height, width = tile.image_hw
        rings = [
            np.asarray(region["value"]["points"], float) * (width / 100, height / 100)
            for region in self._answer(tile, prompts)["result"]
            if region["value"].get("points")
        ]
        return union_of(rings, tile.image_hw)

    def _answer(self, tile: Tile, prompts: Sequence[Json] | None, min_score: float = 0.0) -> Json:
        name = tile.image.relative_to(self._folder).as_posix()
        is_box = bool(prompts) and prompts[0]["type"] == "rectanglelabels"
        # A task of its own: clicks that follow a box on one task refine it, and here the two are measured apart.
        number = _BOXED_FROM + tile.number if is_box else tile.number
        task = {"id": number, "data": {"image": f"/data/local-files/?d={name}"}}
        context = None if prompts is None else {"result": prompts}
        config = CONFIG.format(labels=self._names, least=min_score)
        (answer,), _ = self._service.predict(PredictRequest([task], "0", config, context))
        if not answer:
            said = [problem.message for problem in self._service.problems.recent()]
            raise RuntimeError(f"{tile.image.name} was not answered: {'; '.join(said) or 'no reason given'}")
        found: Json = answer
        return found


# --- Masks and outlines -----------------------------------------------------------------------------------------------


def rasterized(rings: Sequence[Ring], image_hw: tuple[int, int]) -> Mask:
    """Rings in pixel corners filled even-odd, to a sixteenth of a pixel."""
    canvas = np.zeros(image_hw, np.uint8)
    fixed = [np.round(ring * 16 - 8).astype(np.int32) for ring in rings if len(ring) >= 3]
    if fixed:
        cv2.fillPoly(canvas, fixed, 1, shift=4)
    return canvas.astype(bool)


def union_of(rings: Sequence[Ring], image_hw: tuple[int, int]) -> Mask:
    """What the rings cover together."""
    covered = np.zeros(image_hw, bool)
    for ring in rings:
        covered |= rasterized([ring], image_hw)
    return covered


def is_valid(ring: Ring) -> bool:
    """Whether a ring is simple, but for bridges to holes: edges that are walked there and back."""
    if len(ring) < 3 or not np.isfinite(ring).all():
        return False
    corners = [tuple(point) for point in ring.tolist()]
    walked = {(a, b) for a, b in zip(corners, [*corners[1:], corners[0]], strict=True) if a != b}
    once = [(a, b) for a, b in walked if (b, a) not in walked]
    if len(once) == len(walked):
        return Polygon(ring).is_valid
    faces = sorted(polygonize(once), key=lambda face: Polygon(face.exterior).area)
    if not faces:
        return False
    shell = Polygon(faces[-1].exterior)
    return Polygon(shell.exterior, [face.exterior for face in faces[:-1] if shell.contains(face)]).is_valid


# --- Clicks and boxes -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Clicked:
    """How an object came out, click by click."""

    target: Target
    ious: list[float]
    seconds: list[float]
    clicks: list[Click]

    def after(self, clicks: int) -> float:
        """IoU after so many clicks, or after the last one."""
        return self.ious[min(clicks, len(self.ious)) - 1]

    def needed(self, least: float, most: int) -> int:
        """Clicks to that IoU; ``most`` where it was not reached."""
        return next((number for number, value in enumerate(self.ious, 1) if value >= least), most)


def click_through(outliner: Outliner, target: Target, *, most: int = 20, enough: float = 0.9) -> Clicked:
    """The simulated annotator of `backend.judging` on an object; it ends at an IoU of ``enough``."""
    seconds: list[float] = []

    def answer(clicks: Sequence[Click]) -> Mask:
        mask, took = timed(lambda: outliner.clicked(target.tile, clicks))
        seconds.append(took)
        return mask

    done = clicked_through(answer, target.truth.mask(target.tile.image_hw), most=most, enough=enough)
    return Clicked(target, [value for _, value in done], seconds, [click for click, _ in done])


def click_figures(series: Sequence[Clicked], most: int) -> dict[str, float]:
    """Mean IoU after 1, 3 and 5 clicks; NoC@85 is the mean number of clicks to IoU .85, at most ``most``."""
    later = [seconds for one in series for seconds in one.seconds[1:]]
    return {
        "objects": len(series),
        **{f"iou@{clicks}": statistics.mean(one.after(clicks) for one in series) for clicks in (1, 3, 5)},
        **{f"NoC@{share}": statistics.mean(one.needed(share / 100, most) for one in series) for share in (80, 85, 90)},
        "first_click_s": statistics.median(one.seconds[0] for one in series),
        "later_click_s": statistics.median(later) if later else math.nan,
    }


def jittered_boxes(targets: Sequence[Target]) -> Iterator[tuple[float, float, float, float]]:
    """The bounds of each object, each side moved by up to 5 % of the width or height."""
    rng = random.Random(SEED)
    for target in targets:
        height, width = target.tile.image_hw
        x0, y0, x1, y1 = target.truth.bounds_xyxy
        left, top, right, bottom = (
            at + rng.uniform(-0.05, 0.05) * span
            for at, span in ((x0, x1 - x0), (y0, y1 - y0), (x1, x1 - x0), (y1, y1 - y0))
        )
        yield max(0, left), max(0, top), min(width, right), min(height, bottom)


def side_class(area_px: float) -> str:
    """The class of size that an area belongs to, in words; the least one where it is smaller still."""
    side = math.sqrt(max(area_px, MIN_AREA_PX))
    for least, beyond in itertools.pairwise(SIDES_PX):
        if side < beyond:
            return f"{least}+ px" if beyond == math.inf else f"{least}-{beyond} px"
    raise AssertionError


SIDE_CLASSES = [side_class(least**2) for least in SIDES_PX[:-1]]


# --- Pre-labels -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Matched:
    """Pre-labels of a tile beside its objects."""

    tile: Tile
    pre_labels: list[PreLabel]
    truths: list[Truth]
    overlaps: Overlaps
    """In pixels."""

    pairs: list[tuple[int, int, float]]
    """Pre-label, object and IoU, one to one, the best first."""

    shared_px: int
    """Pixels that all pre-labels and all objects have in common, and ..."""
    covered_px: int
    """... that either of them covers."""

    def fates(self) -> tuple[list[str], list[str]]:
        """What became of each object and of each pre-label, see `Overlaps.fates`."""
        return self.overlaps.fates(self.pairs)


def matched(
    tile: Tile, pre_labels: Sequence[PreLabel], *, least: float = MATCH_IOU, truths: Sequence[Truth] | None = None
) -> Matched:
    """Pair pre-labels and objects (those that are judged) one to one at that IoU, the best pair first."""
    truths = tile.judged if truths is None else truths
    masks = [rasterized([pre_label.ring], tile.image_hw) for pre_label in pre_labels]
    all_predicted, all_true = np.zeros(tile.image_hw, bool), np.zeros(tile.image_hw, bool)
    listed: list[tuple[int, int, int]] = []
    for i, mask in enumerate(masks):
        all_predicted |= mask
        for j, truth in enumerate(truths):
            if shared := np.count_nonzero(mask[truth.window] & truth.crop):
                listed.append((i, j, shared))
    for truth in truths:
        all_true[truth.window] |= truth.crop
    numbers = np.array(listed, int).reshape(-1, 3)
    overlaps = Overlaps(
        numbers[:, 0], numbers[:, 1], numbers[:, 2].astype(float),
        np.array([np.count_nonzero(mask) for mask in masks], float),
        np.array([truth.crop.sum() for truth in truths], float),
    )  # fmt: skip
    return Matched(
        tile, list(pre_labels), list(truths), overlaps, overlaps.pairs(least),
        int((all_predicted & all_true).sum()), int((all_predicted | all_true).sum()),
    )  # fmt: skip


def auto_figures(tiles: Sequence[Matched]) -> dict[str, float]:
    """Precision, recall, F1 at `MATCH_IOU`, and how the polygons look."""
    hits = sum(len(one.pairs) for one in tiles)
    rings = [pre_label.ring for one in tiles for pre_label in one.pre_labels]
    objects = sum(len(one.truths) for one in tiles)
    precision, recall = hits / max(len(rings), 1), hits / max(objects, 1)
    return {
        "tiles": len(tiles),
        "polygons": len(rings),
        "objects": objects,
        "precision": precision,
        "recall": recall,
        "F1@0.5": 2 * precision * recall / max(precision + recall, 1e-9),
        "matched_iou": statistics.mean(value for one in tiles for *_, value in one.pairs) if hits else 0.0,
        "pixel_iou": sum(one.shared_px for one in tiles) / max(sum(one.covered_px for one in tiles), 1),
        "invalid": sum(not is_valid(ring) for ring in rings),
        "vertices_per_polygon": sum(map(len, rings)) / max(len(rings), 1),
    }


def ordering(tiles: Sequence[tuple[Matched, float | None]]) -> dict[str, float]:
    """Whether the tiles that Label Studio sorts by their tasks' scores are sorted by how much there is to mend.

    Rank correlation (Spearman) of the score with the true F1 of each tile, and of the number of wrong and missing
    outlines; the mean of both scores; and of all wrong and missing outlines, the share on the half of the tiles that
    come first.
    """
    from scipy.stats import spearmanr

    scored = [(one, score) for one, score in tiles if score is not None]
    if len(scored) < 3:
        return {"tiles": len(scored)}
    counts = [(len(one.pairs), len(one.pre_labels) + len(one.truths)) for one, _ in scored]
    f1 = np.array([2 * hits / both if both else 1.0 for hits, both in counts])
    faults = np.array([both - 2 * hits for hits, both in counts])
    scores = np.array([score for _, score in scored])
    first = np.argsort(scores, kind="stable")[: len(scores) // 2]
    return {
        "tiles": len(scored), "rank correlation with F1": float(spearmanr(scores, f1).statistic),
        "with faults": float(spearmanr(scores, -faults).statistic), "mean score": float(scores.mean()),
        "mean F1": float(f1.mean()), "faults in first half": float(faults[first].sum() / max(faults.sum(), 1)),
    }  # fmt: skip


@dataclass(frozen=True)
class Reliability:
    """Whether a score of .8 is right four times in five."""

    counts: list[int]
    scores: list[float]
    """Mean score of each bin, 0 where it is empty."""

    shares: list[float]
    """Share of each bin that matches an object, 0 where it is empty."""

    error: float
    """Expected calibration error: mean distance of score and share, each polygon counted once."""


def reliability(tiles: Sequence[Matched], bins: int = 10) -> Reliability:
    """Scores of pre-labels beside the share that matches an object, in bins of equal width."""
    scores = np.array([p.score if p.score is not None else np.nan for one in tiles for p in one.pre_labels])
    hits = np.concatenate(
        [np.isin(np.arange(len(one.pre_labels)), [i for i, *_ in one.pairs]) for one in tiles] or [np.zeros(0, bool)]
    )
    scores, hits = scores[np.isfinite(scores)], hits[np.isfinite(scores)]
    at = np.minimum((scores * bins).astype(int), bins - 1)
    counts = np.bincount(at, minlength=bins)
    means = np.bincount(at, scores, bins) / np.maximum(counts, 1)
    shares = np.bincount(at, hits, bins) / np.maximum(counts, 1)
    error = float((np.abs(means - shares) * counts).sum() / max(counts.sum(), 1))
    return Reliability(counts.tolist(), means.tolist(), shares.tolist(), error)


def timed(call: Callable[[], Any]) -> tuple[Any, float]:
    begun = time.perf_counter()
    result = call()
    return result, time.perf_counter() - begun


def rounded(value: Any) -> Any:
    """The same with every float to four places; what is not a number becomes null."""
    if isinstance(value, float):
        return round(value, 4) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: rounded(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(inner) for inner in value]
    return value
