"""The recorded requests and annotated tasks in ``tests/golden``, as Label Studio 1.23.2 sends and exports them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "golden"


def names(prefix: str = "") -> list[str]:
    """The recordings whose name starts so: ``predict_``, ``interactive_``, ``webhook_``, ``task_`` …"""
    return sorted(path.stem for path in FOLDER.glob(f"{prefix}*.json"))


def load(name: str) -> dict[str, Any]:
    """A request as ``method``, ``path``, ``headers`` and ``body`` (None where it has none); a task as exported."""
    recording: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    return recording
