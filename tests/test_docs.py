"""The docs build, stay what the code says, and show what is there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image

from docs.reference import generate, licences

REPOSITORY = Path(__file__).resolve().parent.parent
DOCS = REPOSITORY / "docs"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as `make docs` does."""
    pytest.importorskip("material", reason="no mkdocs-material: pip install mkdocs-material")
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-B", "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(folder)],
        cwd=REPOSITORY, capture_output=True, text=True, timeout=120, check=False, env={"NO_MKDOCS_2_WARNING": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_the_site_builds_without_a_broken_link_and_holds_every_page(site: Path) -> None:
    for page in DOCS.rglob("*.md"):
        assert (site / page.relative_to(DOCS)).with_suffix(".html").exists(), page


def test_the_pages_fetch_nothing_from_elsewhere(site: Path) -> None:
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        fetched = re.findall(r"<(?:script|img|iframe|source)[^>]*\ssrc=[\"']?(https?:[^\"'\s>]+)", text)
        fetched += [tag for tag in re.findall(r"<link[^>]*>", text) if "http" in tag and "canonical" not in tag]
        assert not fetched, page.name


def test_no_program_of_docs_is_published(site: Path) -> None:
    assert not list(site.rglob("*.py"))


@pytest.mark.parametrize("path", list(generate.pages()), ids=lambda path: path.name)
def test_what_is_made_from_the_code_is_up_to_date(path: Path) -> None:
    assert path.read_text(encoding="utf-8") == generate.pages()[path], "run `make reference`"


def test_every_command_and_setting_is_in_the_reference() -> None:
    commands = (DOCS / "reference" / "cli.md").read_text(encoding="utf-8")
    for name in ("serve", "ingest", "push", "predict", "train", "export", "models rollback", "weights get", "doctor"):
        assert f"\n## geoprelabel {name}\n" in commands
    settings = (DOCS / "reference" / "settings.md").read_text(encoding="utf-8")
    for field in generate.Settings.model_fields:
        assert f"`{generate.names_of(field)[0]}`" in settings


def test_the_picture_of_the_layers_shows_every_module_once() -> None:
    picture = (DOCS / "images" / "layers.svg").read_text(encoding="utf-8")
    shown = re.findall(r">(\w+)</text></g>", picture)
    modules = {path.stem for path in (REPOSITORY / "backend").glob("*.py")} - {"__init__"}
    assert sorted(shown) == sorted(modules)
    assert "images/layers.svg" in (DOCS / "architecture.md").read_text(encoding="utf-8")


def test_readmes_settings_exist() -> None:
    known = {name for field in generate.Settings.model_fields for name in generate.names_of(field)}
    table = (REPOSITORY / "README.md").read_text(encoding="utf-8").split("## Settings")[1].split("\n## ")[0]
    named = {name for row in re.findall(r"^\| (.*?) \|", table, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)}
    assert len(named) > 30
    assert {name.removesuffix("_FILE") for name in named} <= known


BESIDE_THE_SITE = [
    REPOSITORY / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "model_weights/README.md")
]


@pytest.mark.parametrize("page", BESIDE_THE_SITE, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_what_the_other_pages_name_is_there(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#\s]+)", text):
        assert target.startswith(("http://", "https://")) or (page.parent / target).exists(), target
    for named in re.findall(r"`((?:docs|benchmarks|configs|k8s|model_weights|tests)/[\w./-]+\.\w+)`", text):
        assert (REPOSITORY / named).exists(), named


def test_commands_in_the_docs_exist() -> None:
    """Every `geoprelabel …` and `make …` in a code block is one."""
    commands = set(re.findall(r"^## geoprelabel (\w+)", (DOCS / "reference" / "cli.md").read_text(), re.MULTILINE))
    makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([\w-]+):", makefile, re.MULTILINE))
    for page in [*DOCS.rglob("*.md"), REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md"]:
        for block in re.findall(r"```(?:sh|bash)?\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
            for line in block.splitlines():
                for word in re.findall(r"\bgeoprelabel ([a-z]+)\b", line.split(" #")[0]):
                    assert word in commands, f"{page.name}: geoprelabel {word}"
                for word in re.findall(r"^make ([\w-]+)", line):
                    assert word in targets, f"{page.name}: make {word}"


def test_options_in_the_docs_exist() -> None:
    reference = (DOCS / "reference" / "cli.md").read_text(encoding="utf-8")
    options: dict[str, set[str]] = {}
    for section in reference.split("\n## geoprelabel ")[1:]:
        options.setdefault(section.split()[0], {"--help", "--debug", "--version"}).update(
            re.findall(r"`(--[\w-]+)", section)
        )
    for page in [*DOCS.rglob("*.md"), REPOSITORY / "README.md"]:
        for command, rest in re.findall(r"geoprelabel ([a-z]+)([^`\n#|]*)", page.read_text(encoding="utf-8")):
            for option in re.findall(r" (--[a-z][\w-]*)", rest) if command in options else []:
                assert option in options[command], f"{page.name}: geoprelabel {command} {option}"


def test_pictures_are_small_and_used() -> None:
    used = " ".join(page.read_text(encoding="utf-8") for page in DOCS.rglob("*.md"))
    for path in (DOCS / "images").iterdir():
        assert f"images/{path.name}" in used
        if path.suffix == ".jpg":
            assert path.stat().st_size <= 150_000
            with Image.open(path) as picture:
                picture.load()


def test_every_package_has_a_licence_that_is_permissive_or_explained() -> None:
    page = (DOCS / "reference" / "licences.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([\w.-]+) \| (\S+) \| (.+?) \| (.*?) ?\|$", page, re.MULTILINE)
    rows = [row for row in rows if row[0] not in ("package", "---")]
    assert {name: version for name, version, _, _ in rows} == licences.locked(), "run `make licences`"
    for name, _, licence, word in rows:
        assert licences.is_permissive(licence) or word, f"{name}: {licence}"


@pytest.mark.parametrize("licence", ["GPL-3.0-only", "GNU Affero General Public License v3", "SSPL-1.0", "Proprietary"])
def test_a_licence_that_asks_for_more_would_be_noticed(licence: str) -> None:
    assert not licences.is_permissive(licence)


def test_ci_builds_the_docs() -> None:
    assert "make docs" in (REPOSITORY / ".ci" / "run").read_text(encoding="utf-8")
    assert yaml.safe_load((REPOSITORY / "mkdocs.yml").read_text(encoding="utf-8"))["theme"]["font"] is False
