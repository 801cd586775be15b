"""The dashboard, the alert rules and the manual speak of figures that the server really has."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import yaml

from backend.journal import Journal
from backend.registry import Registry
from backend.server import create_app
from backend.service import Service
from backend.settings import Settings
from tests.fakes import BrightSegmenter
from tests.small_label_studio import SmallLabelStudio

REPOSITORY = Path(__file__).resolve().parent.parent
PROJECT = "1.5"


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, set[str]]:
    """Each name that /metrics has, samples and families, with its labels."""
    settings = Settings(data_dir=tmp_path_factory.mktemp("data"))
    service = Service(settings, segmenter=BrightSegmenter())
    client = create_app(settings, service).test_client()
    client.get("/health")
    text = client.get("/metrics").get_data(as_text=True)
    service.close()
    found: dict[str, set[str]] = {name: set() for name in re.findall(r"^# TYPE (\S+) ", text, re.MULTILINE)}
    for name, labels in re.findall(r"^(geoprelabel_\w+)(?:\{(.*)\})? \S+$", text, re.MULTILINE):
        found.setdefault(name, set()).update(re.findall(r'(\w+)="', labels))
    # Those that have no labels before something happened, or a project is there.
    for name, labels in LATER.items():
        assert name in found, name
        found[name] |= labels
    return found


TRAINING = ("running", "failed", "progress", "duration_seconds", "finished_timestamp_seconds", "changes")
LATER = {
    "geoprelabel_tasks_total": {"kind", "outcome"},
    "geoprelabel_findings_total": {"reason"},
    "geoprelabel_open_findings": {"reason"},
    "geoprelabel_model_version_info": {"project", "version", "live"},
    "geoprelabel_prelabels": {"project", "version", "outcome"},
    "geoprelabel_edit_distance": {"project", "version"},
    **{f"geoprelabel_training_{name}": {"project"} for name in TRAINING},
}


def expressions() -> Iterator[tuple[str, str]]:
    dashboard = json.loads((REPOSITORY / "ops" / "grafana-dashboard.json").read_text())
    for panel in dashboard["panels"]:
        for target in panel.get("targets", ()):
            yield f"panel {panel['title']}", target["expr"]
    for rule in rules():
        yield f"alert {rule['alert']}", rule["expr"]


def rules() -> list[dict[str, Any]]:
    text = (REPOSITORY / "ops" / "prometheus-alerts.yml").read_text()
    return [rule for group in yaml.safe_load(text)["groups"] for rule in group["rules"]]


@pytest.mark.parametrize(("where", "expression"), list(expressions()), ids=[where for where, _ in expressions()])
def test_each_expression_asks_for_what_there_is(exported: dict[str, set[str]], where: str, expression: str):
    named = re.findall(r"(geoprelabel_\w+)(?:\{([^}]*)\})?", expression)
    assert named or "up{" in expression
    known = set()
    for name, matchers in named:
        assert name in exported, f"{where}: {name}"
        family = re.sub(r"_(bucket|count|sum)$", "", name)
        known |= exported[name] | exported.get(family, set())
        assert set(re.findall(r"(\w+)\s*[!=]", matchers)) <= known
    for grouped in re.findall(r"by \(([^)]*)\)", expression):
        assert {label.strip() for label in grouped.split(",")} <= known, where
    assert expression.count("(") == expression.count(")")


def test_prometheus_reads_every_rule_and_query(tmp_path: Path):
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("no promtool: apt-get install prometheus")
    # As rules, since promtool checks those without a server. What Grafana fills in is some time.
    queries = [re.sub(r"\$__\w+", "5m", expression) for where, expression in expressions() if where.startswith("panel")]
    recorded = [{"record": f"panel:{number}", "expr": query} for number, query in enumerate(queries)]
    (tmp_path / "panels.yml").write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": recorded}]}))
    files = [str(REPOSITORY / "ops" / "prometheus-alerts.yml"), str(tmp_path / "panels.yml")]
    done = subprocess.run([promtool, "check", "rules", *files], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_names_keep_to_the_conventions(exported: dict[str, set[str]]):
    for name in exported:
        assert re.fullmatch(r"geoprelabel_[a-z0-9_]+", name)
        assert not re.search(r"_(ms|mb|millis\w*|minutes|kb)$", name)
    assert {"pid"}.isdisjoint(set().union(*exported.values()))


def test_panels_lie_beside_each_other():
    dashboard = json.loads((REPOSITORY / "ops" / "grafana-dashboard.json").read_text())
    taken = set()
    for panel in dashboard["panels"]:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken
        assert max(x for x, _ in cells) < 24
        taken |= cells
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])


def test_the_manual_explains_each_figure_and_each_alert(exported: dict[str, set[str]]):
    text = (REPOSITORY / "docs" / "operations.md").read_text(encoding="utf-8")
    families = {re.sub(r"_(bucket|count|sum|created)$", "", name) for name in exported}
    missing = {name for name in families if f"`{name}" not in text}
    assert not missing
    assert not {rule["alert"] for rule in rules() if f"`{rule['alert']}`" not in text}
    told = set(re.findall(r"`(geoprelabel_[a-z_]+)", text))
    assert told <= set(exported) | families


def commands(name: str) -> str:
    """The commands of the manual behind that mark."""
    text = (REPOSITORY / "docs" / "operations.md").read_text(encoding="utf-8")
    return text.split(f"<!-- {name} -->\n```bash\n")[1].split("```")[0]


def test_what_the_manual_backs_up_it_restores_elsewhere(tmp_path: Path):
    data, backup, other = tmp_path / "data", tmp_path / "backup", tmp_path / "other"
    for folder in (data / "tiles" / "town", data / "embeddings", backup):
        folder.mkdir(parents=True)
    (data / "tiles" / "town" / "a.jpg").write_bytes(b"tile")
    (data / "embeddings" / "x.safetensors").write_bytes(b"made again")
    heads = tmp_path / "heads"
    heads.write_bytes(b"weights")
    settings = Settings(data_dir=data)
    Registry(settings).publish(PROJECT, "v1", heads, parent="", metrics={}, tags={}, promote=True)
    with SmallLabelStudio(2) as studio, closing(Journal(settings)) as journal:
        journal.reconcile(PROJECT, list(studio.tasks.values()))
        for name, folder in (("backup", data), ("restore", other)):
            environment = {**os.environ, "DATA": str(folder), "BACKUP": str(backup),
                           "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}  # fmt: skip
            script = ["bash", "-euo", "pipefail", "-c", commands(name)]
            done = subprocess.run(script, env=environment, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
    restored = Settings(data_dir=other)
    version = Registry(restored).champions()[PROJECT]
    version.check()
    assert (version.name, version.heads_path.is_relative_to(other)) == ("v1", True)
    with closing(Journal(restored)) as journal:
        assert len(list(journal.tasks(PROJECT))) == 2
    assert (other / "tiles" / "town" / "a.jpg").read_bytes() == b"tile"
    assert not (other / "embeddings").exists()
