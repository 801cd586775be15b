"""Whole: small JSON files that are written whole or not at all, by any number of threads and processes."""

from __future__ import annotations

import json
import os
import secrets
from pathlib import Path
from typing import Any


def write_json(path: Path, value: Any) -> None:
    """Put ``value`` in the place of what a file held; its folder is made where there is none.

    Who reads meanwhile finds the one or the other. A process that is killed leaves ``.<name>.…`` beside it at most.
    Raises OSError, and what `json.dumps` raises.
    """
    text = json.dumps(value)
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{secrets.token_hex(6)}")
    try:
        scratch.write_text(text, encoding="utf-8")
        os.replace(scratch, path)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise
