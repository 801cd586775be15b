"""Whether the caches keep to their limits: thousands of tiles through one backend, and a look after each.

    python benchmarks/soak.py [--tiles 2000]

A segmenter that costs next to nothing makes embeddings of half a megabyte, for the caches to fill up with; everything
else is what is served. Prints one JSON line: the most that each cache ever held, its limit, and the memory of the
process after the first tenth and at the end.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import cv2
import numpy as np

from backend.segmenter import Embedding
from backend.service import PredictRequest, Service
from backend.settings import Settings
from tests.fakes import BrightSegmenter, bright_image

CONFIG = (Path(__file__).resolve().parent.parent / "configs" / "buildings.xml").read_text()
MEMORY_MB, DISK_MB = 16, 32


class Bulky(BrightSegmenter):
    """Embeddings that are large for their images."""

    def embed(self, image_rgb: np.ndarray) -> Embedding:
        plain = super().embed(image_rgb)
        return Embedding({**plain.features, "ballast": np.zeros(2**18, np.float16)}, plain.image_hw, plain.version)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiles", type=int, default=2000)
    arguments = parser.parse_args()
    most = {"memory": 0, "disk": 0, "images": 0}
    resident: list[float] = []
    done = threading.Event()
    with tempfile.TemporaryDirectory() as folder:
        settings = Settings(data_dir=Path(folder), embedding_cache_mb=MEMORY_MB, embedding_disk_mb=DISK_MB)
        service = Service(settings, segmenter=Bulky())
        service.predictor.start()
        kept = service.predictor.embeddings

        def look() -> None:
            most["memory"] = max(most["memory"], kept.memory.nbytes)
            most["disk"] = max(most["disk"], kept.disk.nbytes)
            most["images"] = max(most["images"], service.images._kept_bytes)

        def watch() -> None:
            while not done.wait(0.02):
                look()

        def one(number: int) -> None:
            found, _ = service.predict(PredictRequest.from_json(asked(number)))
            assert len(found[0]["result"]) == 1, number
            look()
            if number % max(1, arguments.tiles // 10) == 0:
                resident.append(resident_mb())

        watcher = threading.Thread(target=watch)
        watcher.start()
        begun = time.perf_counter()
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(one, range(arguments.tiles)))
        taken = time.perf_counter() - begun
        done.set()
        watcher.join()
        service.close()
    limits = {"memory": MEMORY_MB, "disk": DISK_MB, "images": 128}
    report: dict[str, Any] = {f"{name}_mb_most": round(value / 2**20, 2) for name, value in most.items()}
    over = [name for name, value in most.items() if value > limits[name] * 2**20]
    report |= {
        "limits_mb": limits,
        "over": over,
        "tiles_a_second": round(arguments.tiles / taken, 1),
        "resident_mb_after_a_tenth": round(resident[min(1, len(resident) - 1)], 1),
        "resident_mb_at_the_end": round(resident[-1], 1),
    }
    print(json.dumps({"tiles": arguments.tiles, **report}))


def asked(number: int) -> dict[str, Any]:
    """A click for every other tile, pre-labels for the rest; each tile is another image."""
    x, y = 8 + number % 90, 8 + number // 90 % 90
    image = bright_image((x, y, x + 20, y + 20), size=(128, 128))
    image[-1, -1] = number % 29
    png = cv2.imencode(".png", image)[1].tobytes()
    prompt = {"id": f"k{number}", "type": "keypoint", "from_name": "click", "to_name": "image",
              "value": {"x": (x + 10) / 1.28, "y": (y + 10) / 1.28, "width": 0.3}}  # fmt: skip
    task = {"id": number, "data": {"image": "data:image/png;base64," + base64.b64encode(png).decode()}}
    context = {"result": [prompt]} if number % 2 else None
    return {"tasks": [task], "project": "1.1", "label_config": CONFIG, "params": {"context": context}}


def resident_mb() -> float:
    """Memory of this process now; 0 where the system does not say so in /proc."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return 0.0
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


if __name__ == "__main__":
    main()
