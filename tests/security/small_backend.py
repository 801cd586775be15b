"""The backend's real server under watch: ``python -m tests.security.small_backend``, told by a JSON file."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path

from backend import images
from backend.jobs import Jobs
from backend.server import serve
from backend.settings import Settings
from tests.fakes import BrightSegmenter
from tests.security.watch import answer_names, watch


def main() -> None:
    told = json.loads(Path(sys.argv[1]).read_text())
    settings = Settings.from_environment()
    # Shorter than in earnest, so that servers which hang cost the suite little.
    images._READ_TIMEOUT_S, images._FETCH_TIMEOUT_S, images._CONNECT_TIMEOUT_S = 1.0, 1.5, 0.5
    logging.basicConfig(level=logging.INFO)
    # Real trainings are other tests' matter.
    Jobs._start = lambda self, project: True  # type: ignore[method-assign]
    answer_names(told["names"])
    watch(Path(told["log"]), ports=told["ports"], secrets=told["secrets"])
    serve(settings, segmenter=BrightSegmenter())


if __name__ == "__main__":
    main()
