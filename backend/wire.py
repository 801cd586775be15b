"""JSON as it comes over the wire from anybody: bounded, and without what later code cannot be expected to survive."""

from __future__ import annotations

import json
import re
from typing import Any, NoReturn

import numpy as np

from .errors import BadRequest

MAX_DEPTH = 100
"""Levels of nested arrays and objects; Label Studio's own messages have about ten."""

# Every alternative is possessive and an unclosed text ends with the body: no input makes this slower than its length.
_TEXT = re.compile(rb'"(?:[^"\\]++|\\.?+)*+"?+', re.DOTALL)
_MAYBE_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_SURROGATE = re.compile("[\ud800-\udfff]")


def read_json(content: bytes) -> Any:
    """What a JSON text in UTF-8 says, with half surrogates replaced by U+FFFD. Raises BadRequest.

    NaN and infinities are no JSON. A number such as 1e400 is, and comes out as infinity: whoever computes with numbers
    checks them.
    """
    depth = _depth(content)
    if depth > MAX_DEPTH:
        raise BadRequest(f"the body is nested {depth} levels deep, the limit is {MAX_DEPTH}")
    try:
        value = json.loads(content.decode("utf-8"), parse_constant=_refuse)
    except ValueError as error:
        raise BadRequest(f"the body is not JSON: {str(error)[:200]}") from error
    # Texts with half a surrogate pair cannot be hashed, stored or sent on.
    return _whole_texts(value) if _MAYBE_SURROGATE.search(content) else value


def _depth(content: bytes) -> int:
    """How many brackets are open at once at most, those in texts aside."""
    letters = np.frombuffer(_TEXT.sub(b"", content), np.uint8)
    opens = ((letters == ord("[")) | (letters == ord("{"))).astype(np.int32)
    closes = ((letters == ord("]")) | (letters == ord("}"))).astype(np.int32)
    return int(np.cumsum(opens - closes).max(initial=0))


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not a JSON number")


def _whole_texts(value: Any) -> Any:
    if isinstance(value, str):
        return _SURROGATE.sub("\ufffd", value)
    if isinstance(value, list):
        return [_whole_texts(item) for item in value]
    if isinstance(value, dict):
        return {_whole_texts(name): _whole_texts(item) for name, item in value.items()}
    return value
