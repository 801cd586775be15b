"""What Dask's workers do in tests in place of a model; imported by schedulers and workers, so it brings in little."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from backend.cluster import Refused


def doubled(task: Mapping[str, Any]) -> dict[str, Any]:
    """Twice the task's ``n``, unless its ``kind`` is another; noted in ``log``, while that has fewer than ``gate``.

    By how many are noted, not by ``n``: a worker need not take tasks in their order.
    """
    while "gate" in task and int(Path(task["gate"]).read_text() or 0) <= _lines(task["log"]):
        time.sleep(0.02)
    if "log" in task:
        with open(task["log"], "a") as log:
            log.write(f"{task['n']}\n")
    match task.get("kind"):
        case "broken":
            raise ValueError("no image")
        case "deadly":
            os.kill(os.getpid(), signal.SIGKILL)
        case "deadly once" if not Path(task["mark"]).exists():
            Path(task["mark"]).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        case "hides":
            raise Refused("another model")
    return {"result": [{"id": str(task["n"])}], "twice": 2 * task["n"]}


def _lines(file: str) -> int:
    return len(Path(file).read_text().split()) if Path(file).exists() else 0


def set_environment(values: Mapping[str, str]) -> None:
    os.environ.update(values)
