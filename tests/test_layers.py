"""The house rules of docs/architecture.md, read from its table and held against the imports of backend/."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
BACKEND = REPOSITORY / "backend"
ARCHITECTURE = REPOSITORY / "docs" / "architecture.md"

MODULES = sorted(path.stem for path in BACKEND.glob("*.py") if path.stem != "__init__")
MAY_IMPORT_TORCH = {"compact", "sam", "training"}
HEAVY = {
    "cv2",
    "distributed",
    "geopandas",
    "label_studio_ml",
    "mlflow",
    "pandas",
    "pyarrow",
    "pyogrio",
    "segment_anything",
    "sqlalchemy",
    "torch",
    "torchvision",
}


def layers() -> dict[str, int]:
    """Layer of each module: a row of the table starts with its layer's number, then names its modules."""
    found: dict[str, int] = {}
    for number, names in re.findall(r"^\| (\d+) \| ([^|]+) \|", ARCHITECTURE.read_text(encoding="utf-8"), re.MULTILINE):
        for name in re.findall(r"`(\w+)`", names):
            assert name not in found, f"docs/architecture.md names {name} twice"
            found[name] = int(number)
    return found


def imported_modules(name: str, source: str) -> set[str]:
    """Modules of backend that a source file imports, at its top or within a function."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            if node.level == 1:
                found |= {node.module.split(".")[0]} if node.module else {alias.name for alias in node.names}
            elif node.module == "backend":
                found |= {alias.name for alias in node.names}
            elif node.level == 0 and (node.module or "").startswith("backend."):
                found.add(str(node.module).split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("backend.")}
    return (found & set(MODULES)) - {name}


def imported_packages(source: str) -> set[str]:
    """Top-level names of what a source file imports from elsewhere, at its top or within a function."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(str(node.module).split(".")[0])
    return found


def run_python(code: str) -> str:
    # Isolated from the tests' own imports, and writing no byte code.
    done = subprocess.run(
        [sys.executable, "-B", "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_table_names_every_module_and_no_other() -> None:
    named = set(layers())
    assert set(MODULES) - named == set(), "give each a row in docs/architecture.md"
    assert named - set(MODULES) == set(), "docs/architecture.md names modules that are not there"


@pytest.mark.parametrize("name", MODULES)
def test_a_module_imports_only_from_layers_below_its_own(name: str) -> None:
    layer = layers()
    source = (BACKEND / f"{name}.py").read_text(encoding="utf-8")
    not_below = {other for other in imported_modules(name, source) if layer[other] >= layer[name]}
    assert not not_below, f"{name} (layer {layer[name]}) imports {[f'{n} ({layer[n]})' for n in sorted(not_below)]}"


@pytest.mark.parametrize("name", sorted(set(MODULES) - MAY_IMPORT_TORCH))
def test_only_the_segmenters_and_training_import_torch(name: str) -> None:
    assert "torch" not in imported_packages((BACKEND / f"{name}.py").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", MODULES)
def test_the_package_knows_nothing_of_demo_tests_and_benchmarks(name: str) -> None:
    outside = {"benchmarks", "demo", "model_weights", "tests"}
    assert not imported_packages((BACKEND / f"{name}.py").read_text(encoding="utf-8")) & outside


@pytest.mark.parametrize("name", MODULES)
def test_only_settings_reads_the_environment(name: str) -> None:
    if name == "settings":
        return
    tree = ast.parse((BACKEND / f"{name}.py").read_text(encoding="utf-8"))
    reads = [
        f"line {node.lineno}: {ast.unparse(node)}"
        for node in ast.walk(tree)
        if (isinstance(node, ast.Call) and ast.unparse(node.func) in {"os.getenv", "os.environ.get"})
        or (
            isinstance(node, ast.Subscript)
            and isinstance(node.ctx, ast.Load)
            and ast.unparse(node.value) == "os.environ"
        )
    ]
    assert not reads


@pytest.mark.parametrize("name", ["settings", "server", "cli"])
def test_importing_the_server_loads_no_model_engine_or_registry(name: str) -> None:
    loaded = json.loads(run_python(f"import sys, json, backend.{name}; print(json.dumps(sorted(sys.modules)))"))
    assert not HEAVY & {module.split(".")[0] for module in loaded}


def test_importing_our_modules_connects_starts_and_writes_nothing() -> None:
    # Torch and its like do such things when first imported, so they come before the watch begins.
    seen = run_python(
        f"""
import contextlib, importlib, os, sys
with contextlib.suppress(ImportError):
    import torch, cv2, label_studio_ml.model, rasterio, pyproj, flask, gunicorn.app.base, httpx, typer, rich.progress
seen = []

def watch(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.bind", "subprocess.Popen", "os.mkdir", "os.remove"):
        seen.append(f"{{event}} {{arguments}}")
    elif event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        seen.append(f"{{event}} {{arguments}}")
    elif event == "open" and str(arguments[0]).endswith(".safetensors"):
        seen.append(f"{{event}} {{arguments}}")

sys.addaudithook(watch)
for name in {[m for m in MODULES if m != "__main__"]!r}:
    importlib.import_module("backend." + name)
print("\\n".join(seen))
"""
    )
    assert seen.strip() == ""


def test_a_forbidden_import_is_found_wherever_it_stands() -> None:
    source = "def f():\n    from .server import serve\n    import torch.nn\n"
    assert imported_modules("tile", source) == {"server"}
    assert imported_packages(source) == {"torch"}
    assert imported_modules("tile", "from backend import service\nimport backend.client\n") == {"client", "service"}
