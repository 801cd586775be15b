"""The pictures of the model card: where the weights fail, and whether the scores of pre-labels can be believed.

    python benchmarks/card.py DATA [--match 19_386694 19_386695] [--limit 16] [--objects 60] [--out DIR]

Writes ``failures.jpg``, the tiles with the worst pre-labels and the objects that came out worst after three clicks, and
``reliability.svg``, the scores of all pre-labels beside the share of them that matches an object at IoU .5.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import cv2
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from backend.compact import CompactSegmenter
from benchmarks import _judging as judging
from benchmarks._judging import Backend, Clicked, Matched, Reliability, Ring

TILE_PX, OBJECT_PX = 300, 150
TILES, OBJECTS = 6, 12
CLICKS = 3
WIDTH = 3 * TILE_PX

Colour = tuple[int, int, int]
WHITE: Colour = (255, 255, 255)
BLACK: Colour = (0, 0, 0)
# Blue, green, red, as OpenCV has them.
RED: Colour = (40, 40, 255)
GREEN: Colour = (80, 230, 80)
ORANGE: Colour = (0, 140, 255)
FATE_COLOURS: Mapping[str, Colour] = {
    "missed": RED, "merged": (255, 60, 255), "split": (255, 170, 60), "poor outline": (60, 220, 255), "right": GREEN,
    "false alarm": ORANGE,
}  # fmt: skip


def main() -> None:
    parser = judging.parser(__doc__, limit=16, limited="tiles whose pre-labels are judged")
    parser.add_argument("--objects", type=int, default=60, help="objects that are clicked")
    parser.add_argument("--out", type=Path, default=judging.REPOSITORY / "model_weights")
    arguments = parser.parse_args()
    if arguments.data is None:
        print("card: not drawn; it needs a folder of labelled tiles (see --help)")
        return
    tiles = judging.labelled_tiles(arguments.data, arguments.match)
    if not tiles:
        parser.error(f"no labelled images in {arguments.data}")
    with Backend(arguments.data, arguments.label, segmenter=CompactSegmenter.load(arguments.weights)) as backend:
        judged = tiles[: arguments.limit]
        of_all_scores = [judging.matched(tile, backend.pre_labels(tile, min_score=0.0)) for tile in judged]
        served = [judging.matched(tile, backend.pre_labels(tile)) for tile in judged]
        targets = judging.whole_objects(tiles, arguments.objects)
        clicked = [judging.click_through(backend, target, most=CLICKS) for target in targets]
        sheet = failures(served, clicked, backend)
        diagram = reliability_svg(judging.reliability(of_all_scores), backend.version)
    arguments.out.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(arguments.out / "failures.jpg"), sheet, [cv2.IMWRITE_JPEG_QUALITY, 80])
    (arguments.out / "reliability.svg").write_text(diagram, encoding="utf-8")
    for name in ("failures.jpg", "reliability.svg"):
        print(f"{arguments.out / name}: {(arguments.out / name).stat().st_size / 1000:.0f} kB")


def failures(served: Sequence[Matched], clicked: Sequence[Clicked], backend: Backend) -> np.ndarray:
    """One picture of the worst tiles above the worst objects, with what the colours mean."""
    worst_tiles = sorted((one for one in served if one.truths), key=share_right)[:TILES]
    worst_objects = sorted(clicked, key=lambda one: one.after(CLICKS))[:OBJECTS]
    rows = [
        lettered("Pre-labels (thin) and objects not found (thick):", list(FATE_COLOURS.items())),
        *in_rows([tile_picture(one) for one in worst_tiles], TILE_PX),
        lettered(f"After {CLICKS} clicks, worst objects:", [("truth", WHITE), ("answer", ORANGE),
                 ("click on it", GREEN), ("click off it", RED)]),
        *in_rows([object_picture(one, backend) for one in worst_objects], OBJECT_PX),
    ]  # fmt: skip
    return np.vstack(rows)


def share_right(one: Matched) -> float:
    """F1 of a tile."""
    return 2 * len(one.pairs) / (len(one.pre_labels) + len(one.truths))


def tile_picture(one: Matched) -> np.ndarray:
    picture, scale = shown(cv2.imread(str(one.tile.image)), TILE_PX)
    object_fates, pre_label_fates = one.fates()
    for pre_label, fate in zip(one.pre_labels, pre_label_fates, strict=True):
        outline(picture, pre_label.ring, scale, FATE_COLOURS[fate])
    for truth, fate in zip(one.truths, object_fates, strict=True):
        for ring in truth.rings:
            if fate != "found":
                outline(picture, ring, scale, FATE_COLOURS[fate], 2)
    return captioned(picture, f"F1 {share_right(one):.2f}")


def object_picture(clicked: Clicked, backend: Backend) -> np.ndarray:
    tile, truth = clicked.target.tile, clicked.target.truth
    x0, y0, x1, y1 = truth.bounds_xyxy
    side = max(x1 - x0, y1 - y0, 24) * 1.8
    left = int(np.clip((x0 + x1 - side) / 2, 0, max(tile.image_hw[1] - side, 0)))
    top = int(np.clip((y0 + y1 - side) / 2, 0, max(tile.image_hw[0] - side, 0)))
    pixels = cv2.imread(str(tile.image))[top : top + round(side), left : left + round(side)]
    picture, scale = shown(pixels, OBJECT_PX)
    mask = backend.clicked(tile, clicked.clicks).astype(np.uint8)
    contours, _ = cv2.findContours(mask, cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
    for contour in contours:
        outline(picture, contour[:, 0] + 0.5 - (left, top), scale, ORANGE)
    for ring in truth.rings:
        outline(picture, ring - (left, top), scale, WHITE)
    for click in clicked.clicks:
        at = ((click.column + 0.5 - left) * scale, (click.row + 0.5 - top) * scale)
        colour = GREEN if click.is_on else RED
        cv2.circle(picture, (round(at[0]), round(at[1])), 4, BLACK, -1, cv2.LINE_AA)
        cv2.circle(picture, (round(at[0]), round(at[1])), 3, colour, -1, cv2.LINE_AA)
    return captioned(picture, f"IoU {clicked.after(CLICKS):.2f}")


def shown(pixels: np.ndarray, side: int) -> tuple[np.ndarray, float]:
    """Pixels enlarged or shrunk into a square, and how much."""
    scale = side / max(pixels.shape[:2])
    small = cv2.resize(pixels, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC)
    picture = np.zeros((side, side, 3), np.uint8)
    picture[: small.shape[0], : small.shape[1]] = small[:side, :side]
    return picture, scale


def outline(picture: np.ndarray, ring: Ring, scale: float, colour: Colour, width: int = 1) -> None:
    points = np.round((ring * scale - 0.5) * 16).astype(np.int32)
    cv2.polylines(picture, [points], True, colour, width, cv2.LINE_AA, shift=4)


def captioned(picture: np.ndarray, words: str) -> np.ndarray:
    for colour, width in ((BLACK, 3), (WHITE, 1)):
        cv2.putText(picture, words, (5, 15), cv2.FONT_HERSHEY_SIMPLEX, 0.42, colour, width, cv2.LINE_AA)
    return picture


def lettered(words: str, legend: Sequence[tuple[str, Colour]]) -> np.ndarray:
    """A strip with words, the last ones in their colours."""
    strip, x = np.full((26, WIDTH, 3), 40, np.uint8), 6
    for text, colour in [(words, WHITE), *legend]:
        cv2.putText(strip, text, (x, 17), cv2.FONT_HERSHEY_SIMPLEX, 0.45, colour, 1, cv2.LINE_AA)
        x += cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, 0.45, 1)[0][0] + 18
    return strip


def in_rows(pictures: Sequence[np.ndarray], side: int) -> list[np.ndarray]:
    each = WIDTH // side
    blank = np.zeros((side, side, 3), np.uint8)
    filled = [*pictures, *[blank] * (-len(pictures) % each)]
    return [np.hstack(filled[start : start + each]) for start in range(0, len(filled), each)]


def reliability_svg(measured: Reliability, version: str) -> str:
    """Share right by score, a bar each tenth with its number of polygons, beside the line of perfect scores."""
    left, top, side = 56, 40, 320
    bars = []
    for number, (count, share) in enumerate(zip(measured.counts, measured.shares, strict=True)):
        x, height = left + number * side / 10, share * side
        if count:
            bars.append(
                f'<rect x="{x + 2:.1f}" y="{top + side - height:.1f}" width="{side / 10 - 4:.1f}" '
                f'height="{height:.1f}" fill="#4a7ebb"/>'
            )
        bars.append(f'<text x="{x + side / 20:.1f}" y="{top + side + 32}" class="count">{count}</text>')
    ticks = "".join(
        f'<text x="{left + share * side}" y="{top + side + 16}">{share:g}</text>'
        f'<text x="{left - 14}" y="{top + side - share * side + 4}">{share:g}</text>'
        for share in (0, 0.2, 0.4, 0.6, 0.8, 1)
    )
    return f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {left + side + 24} {top + side + 66}" width="460">
<style>text{{font:11px sans-serif;text-anchor:middle;fill:#222}}.count{{font-size:9px;fill:#777}}</style>
<rect width="100%" height="100%" fill="#fff"/>
<text x="{left + side / 2}" y="16">Pre-labels of {version}: share right by score</text>
<text x="{left + side / 2}" y="31">{sum(measured.counts)} polygons, calibration error {measured.error:.3f}</text>
<rect x="{left}" y="{top}" width="{side}" height="{side}" fill="none" stroke="#bbb"/>
{"".join(bars)}
<line x1="{left}" y1="{top + side}" x2="{left + side}" y2="{top}" stroke="#c33" stroke-dasharray="4 3"/>
{ticks}
<text x="{left + side / 2}" y="{top + side + 50}">score (below: polygons in each tenth)</text>
<text transform="translate(14 {top + side / 2}) rotate(-90)">share that matches an object at IoU 0.5</text>
</svg>
"""


if __name__ == "__main__":
    main()
