"""A segmenter that a test can predict: what is bright is an object."""

from __future__ import annotations

import hashlib
import threading
from pathlib import Path

import cv2
import numpy as np

from backend.errors import BadPrompt
from backend.segmenter import DenseMaps, Embedding, Masks, Prompts


class BrightSegmenter:
    """Finds bright patches. Not a mock: it holds the whole contract of `Segmenter`, in a way tests can work out."""

    labels = ("building",)

    def __init__(self, version: str = "bright-1", *, wait_for: threading.Event | None = None) -> None:
        self.version = version
        self.base_version = "bright-base"
        self.embedded = 0
        self._wait_for = wait_for

    def with_heads(self, path: Path) -> BrightSegmenter:
        return BrightSegmenter(f"bright-{hashlib.sha256(path.read_bytes()).hexdigest()[:8]}")

    def embed(self, image_rgb: np.ndarray) -> Embedding:
        if self._wait_for is not None:
            self._wait_for.wait(30)
        self.embedded += 1
        grey = cv2.GaussianBlur(image_rgb.mean(axis=2).astype(np.float32) / 255, (0, 0), 0.5)
        return Embedding({"grey": grey}, image_rgb.shape[:2], self.base_version)

    def segment(self, embedding: Embedding, prompts: Prompts) -> Masks:
        if prompts.is_empty:
            raise BadPrompt("no click on an object and no box")
        grey = np.asarray(embedding.features["grey"], np.float32)
        _, parts = cv2.connectedComponents((grey > 0.5).astype(np.uint8), connectivity=4)
        wanted = np.zeros(grey.shape, bool)
        if prompts.box_xyxy is not None:
            x0, y0, x1, y1 = prompts.box_xyxy.round().astype(int)
            wanted[y0:y1, x0:x1] = grey[y0:y1, x0:x1] > 0.5
        for (x, y), keep in zip(prompts.points_xy, prompts.is_foreground, strict=True):
            part = parts[min(int(y), grey.shape[0] - 1), min(int(x), grey.shape[1] - 1)]
            if part:
                wanted = wanted | (parts == part) if keep else wanted & (parts != part)
        near = cv2.dilate(wanted.astype(np.uint8), np.ones((3, 3), np.uint8)).astype(bool)
        return Masks(np.where(near, grey, 0)[None].astype(np.float32), np.array([0.9], np.float32))

    def dense(self, embedding: Embedding, *, window_xyxy: tuple[int, int, int, int] | None = None) -> DenseMaps:
        left, top, right, bottom = window_xyxy or (0, 0, *embedding.image_hw[::-1])
        grey = np.asarray(embedding.features["grey"], np.float32)[top:bottom, left:right]
        return DenseMaps(self.labels, grey[None], np.zeros((1, *grey.shape), np.float32))


def bright_image(*boxes_xyxy: tuple[int, int, int, int], size: tuple[int, int] = (256, 256)) -> np.ndarray:
    """A dark RGB image with bright boxes on it; ``size`` is columns and rows."""
    image = np.full((size[1], size[0], 3), 30, np.uint8)
    for x0, y0, x1, y1 in boxes_xyxy:
        image[y0:y1, x0:x1] = 230
    return image
