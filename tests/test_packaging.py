"""The locks are complete and install as they are meant to, and a wheel holds what the program needs."""

from __future__ import annotations

import ast
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

REPOSITORY = Path(__file__).resolve().parent.parent


def requirements(name: str) -> dict[str, Requirement]:
    """Requirements of a file by normalised name; comments, options and hints of where each came from left out."""
    lines = (line.split(" #")[0].strip() for line in (REPOSITORY / name).read_text(encoding="utf-8").splitlines())
    parsed = [Requirement(line) for line in lines if line and not line.startswith(("#", "-"))]
    return {canonicalize_name(requirement.name): requirement for requirement in parsed}


@pytest.mark.parametrize("name", ["requirements", "requirements-dev", "requirements-label-studio"])
def test_each_lock_pins_what_is_asked_for(name: str) -> None:
    locked = requirements(f"{name}.txt")
    assert all(re.fullmatch(r"==[^*]+", str(requirement.specifier)) for requirement in locked.values())
    for package, wanted in requirements(f"{name}.in").items():
        version = str(locked[package].specifier).removeprefix("==")
        assert wanted.specifier.contains(version, prereleases=True), f"run `make lock`: {package} {version}"


def test_the_lock_leaves_the_choice_of_torch_build_to_pip() -> None:
    locked = requirements("requirements.txt")
    assert "torch" in locked
    assert not [name for name in locked if name.startswith(("nvidia-", "cuda-")) or name in ("triton", "torchvision")]


def test_the_lock_holds_everything_its_packages_need_but_what_we_override() -> None:
    """As installed here: every dependency of a locked package is locked in a version that it accepts."""
    overridden = {("label-studio-ml", name) for name in ("flask", "jinja2", "werkzeug", "itsdangerous", "attr")}
    locked = requirements("requirements.txt")
    for name in sorted(locked):
        marker = locked[name].marker
        if marker is not None and not marker.evaluate():
            continue
        for text in importlib.metadata.requires(name) or ():
            needed = Requirement(text)
            package = canonicalize_name(needed.name)
            if needed.marker is not None and not needed.marker.evaluate({"extra": ""}):
                continue
            if (name, package) in overridden or (name == "torch" and package not in locked):
                continue
            assert package in locked, f"{name} needs {needed}"
            version = str(locked[package].specifier).removeprefix("==")
            assert needed.specifier.contains(version, prereleases=True), (
                f"{name} needs {needed}, the lock has {version}"
            )


@pytest.mark.parametrize("folder", ["backend", "demo"])
def test_every_package_that_we_import_is_asked_for_by_name(folder: str) -> None:
    asked = set(requirements("requirements.in"))
    distributions = importlib.metadata.packages_distributions()
    missing = set()
    for path in (REPOSITORY / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names = {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = {str(node.module).split(".")[0]}
            else:
                continue
            for name in names - set(sys.stdlib_module_names) - {"backend", "demo"}:
                if not {canonicalize_name(d) for d in distributions.get(name, [name])} & asked:
                    missing.add(f"{name} ({path.name})")
    assert not missing


def test_a_wheel_holds_the_code_the_weights_and_the_label_configs(tmp_path: Path) -> None:
    # Built from a copy: setuptools leaves folders behind, and takes up what earlier builds left.
    source = tmp_path / "source"
    for folder in ("backend", "configs", "demo", "model_weights"):
        shutil.copytree(REPOSITORY / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("LICENSE", "README.md", "pyproject.toml", "requirements.in"):
        shutil.copy(REPOSITORY / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-input"]
    done = subprocess.run(
        [*command, "--wheel-dir", str(tmp_path), str(source)], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("geoprelabel-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(tmp_path / "installed")
        entry_points = archive.read(next(n for n in names if n.endswith("entry_points.txt"))).decode()
    assert "geoprelabel = backend.cli:main" in entry_points
    wanted = [path for folder in ("backend", "demo") for path in (REPOSITORY / folder).glob("*.py")]
    wanted += [*(REPOSITORY / "configs").glob("*.xml"), *(REPOSITORY / "model_weights").glob("*.safetensors")]
    assert {str(path.relative_to(REPOSITORY)) for path in wanted} <= names
    assert not [name for name in names if name.startswith(("tests/", "benchmarks/"))]
    # As installed, away from the repository: everything that the model is loaded from is there.
    loaded = subprocess.run(
        [sys.executable, "-c", "from backend.compact import CompactSegmenter as C; print(C.load().version)"],
        capture_output=True, text=True, timeout=120, check=False, cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "installed"), "PYTHONSAFEPATH": "1"},
    )  # fmt: skip
    assert loaded.returncode == 0, loaded.stderr
    assert loaded.stdout.startswith("compact-")
