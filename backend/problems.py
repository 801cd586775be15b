"""The last things that went wrong, kept for the person who can mend them.

Label Studio shows an annotator next to nothing of an error, so each is written to ``DATA_DIR/problems.jsonl``, where
all server processes and the training process find it, and shown on ``/status``.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections import deque
from dataclasses import asdict, dataclass
from pathlib import Path

log = logging.getLogger(__name__)

_MAX_BYTES = 512 * 1024


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that went wrong."""

    when: float
    """Seconds since 1970."""

    where: str
    """Route or command, and what it was about: ``predict, project 3, task 17``."""

    message: str
    """The sentence, remedy included."""


class Problems:
    """A bounded list on disk that several processes append to."""

    def __init__(self, folder: Path) -> None:
        """Nothing is written before the first problem."""
        self._path = folder / "problems.jsonl"

    def add(self, where: str, error: BaseException | str) -> None:
        """Keep one more. Never raises: a full disk must not turn one failed task into a failed batch."""
        message = str(error) or type(error).__name__
        log.warning("%s: %s", where, message)
        problem = Problem(time.time(), where, message[:2000])
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            if self._path.exists() and self._path.stat().st_size > _MAX_BYTES:
                os.replace(self._path, self._path.with_suffix(".old.jsonl"))
            # One short write to a file opened for appending: processes do not cut into each other's lines.
            with open(self._path, "a", encoding="utf-8", errors="replace") as file:
                file.write(json.dumps(asdict(problem), ensure_ascii=False) + "\n")
        except OSError as cannot:
            log.error("problems cannot be written to %s: %s", self._path, cannot)

    def recent(self, count: int = 50) -> list[Problem]:
        """The newest first."""
        try:
            with open(self._path, encoding="utf-8", errors="replace") as file:
                lines = deque(file, maxlen=count)
        except OSError:
            return []
        found = []
        for line in reversed(lines):
            try:
                found.append(Problem(**json.loads(line)))
            except (ValueError, TypeError, RecursionError):
                continue
        return found
