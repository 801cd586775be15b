"""Label Studio's own SDK as the judge of the JSON that we send.

The SDK pins its own numpy and OpenCV, so it lives in a virtual environment of its own. ``SdkJudge`` starts that
environment's Python on this very file and talks to it in JSON lines: ``{"config": …, "prediction": …}`` there, the
list of errors back.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PYTHON_VARIABLE = "GEOPRELABEL_LS_PYTHON"
VENV_VARIABLE = "GEOPRELABEL_LS_VENV"
DEFAULT_VENV = Path(__file__).parent.parent / ".venv-label-studio"


def sdk_python() -> Path:
    """The Python that has label-studio-sdk, whether or not it is there."""
    venv = Path(os.environ.get(VENV_VARIABLE) or DEFAULT_VENV)
    return Path(os.environ.get(PYTHON_VARIABLE) or venv / "bin" / "python")


class SdkJudge:
    """One long-lived process that validates predictions."""

    def __init__(self, python: Path) -> None:
        """Start the process. Raises RuntimeError where the SDK cannot be imported."""
        self._process = subprocess.Popen(
            [str(python), __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
        )
        reason = self._ask_line()
        if reason != "ready":
            self.close()
            raise RuntimeError(f"{python} cannot judge: {reason}")

    def errors(self, config: str, prediction: Any) -> list[str]:
        """What Label Studio's validator says against a prediction under a label config. NaN raises ValueError."""
        assert self._process.stdin
        self._process.stdin.write(json.dumps({"config": config, "prediction": prediction}, allow_nan=False) + "\n")
        self._process.stdin.flush()
        return list(self._ask_line())

    def close(self) -> None:
        """End the process."""
        self._process.communicate()

    def _ask_line(self) -> Any:
        assert self._process.stdout
        line = self._process.stdout.readline()
        return json.loads(line) if line else "the process ended"


@contextlib.contextmanager
def sdk_judge() -> Iterator[SdkJudge]:
    """A judge; skips the test, with the reason, where there is no SDK."""
    import pytest

    python = sdk_python()
    if not python.exists():
        pytest.skip(f"no label-studio-sdk: {python} is missing (set {PYTHON_VARIABLE} to a Python that has it)")
    judge = SdkJudge(python)
    try:
        yield judge
    finally:
        judge.close()


def _judge_lines() -> None:
    # What the SDK prints must not get among the answers.
    answers, sys.stdout = sys.stdout, sys.stderr

    def answer(value: Any) -> None:
        answers.write(json.dumps(value) + "\n")
        answers.flush()

    try:
        from label_studio_sdk.label_interface import LabelInterface
    except Exception as error:
        answer(f"{type(error).__name__}: {error}")
        return
    answer("ready")
    interfaces: dict[str, Any] = {}
    for line in sys.stdin:
        question = json.loads(line)
        try:
            config = question["config"]
            interfaces[config] = interfaces.get(config) or LabelInterface(config)
            answer(interfaces[config].validate_prediction(question["prediction"], return_errors=True))
        except Exception as error:
            answer([f"the validator failed: {type(error).__name__}: {error}"])


if __name__ == "__main__":
    _judge_lines()
