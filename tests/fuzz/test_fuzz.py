"""Each fuzzer for a short while, from a corpus that is kept; `make fuzz` gives it longer."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
CORPUS = Path(__file__).parent / "corpus"
SECONDS = float(os.environ.get("GEOPRELABEL_FUZZ_S", "0")) or 2.0


@pytest.mark.parametrize("name", ["config", "rle", "ring", "tile", "json"])
def test_no_input_breaks_a_reader(tmp_path: Path, name: str):
    if importlib.util.find_spec("atheris") is None:
        pytest.skip("no atheris: there is a wheel of it for Linux on x86-64 only")
    found = tmp_path / "found"
    found.mkdir()
    limits = [f"-max_total_time={SECONDS:.0f}", "-timeout=20", "-rss_limit_mb=2000", "-max_len=4096", "-seed=1"]
    folders = [str(found), str(CORPUS / name)]
    done = subprocess.run(
        [sys.executable, "-m", "tests.fuzz.harness", name, *folders, *limits, f"-artifact_prefix={tmp_path}/"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=SECONDS + 120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert "DONE" in done.stderr
