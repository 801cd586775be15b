"""The page for people at /status: plain HTML that needs no network and no script."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

_STYLE = """
:root{color-scheme:light dark;--line:#8884;--ok:#1a7f37;--bad:#c62828}
body{font:16px/1.5 system-ui,sans-serif;margin:0 auto;max-width:60rem;padding:1rem}
h1{font-size:1.4rem;margin:.2rem 0}h2{font-size:1.1rem;margin:1.6rem 0 .4rem}
table{border-collapse:collapse;width:100%;display:block;overflow-x:auto}
th,td{text-align:left;padding:.3rem .6rem;border-bottom:1px solid var(--line);vertical-align:top}
.ok{color:var(--ok)}.bad{color:var(--bad)}.quiet{opacity:.7}progress{width:8rem}
"""


def render(facts: Mapping[str, Any]) -> str:
    """The whole page, from what `Service.status` says."""
    ready = facts["ready"]
    rows = [
        ("State", f"<b class={'ok' if ready else 'bad'}>{'ready' if ready else 'loading the model'}</b>"),
        ("Model", escape(str(facts["model_version"] or "…"))),
        ("Label Studio", escape(facts["label_studio"] or "not set (LABEL_STUDIO_URL)")),
        (
            "Token",
            "set" if facts["has_token"] else "<span class=bad>not set (LABEL_STUDIO_API_KEY): no training</span>",
        ),
        ("Up for", _span(facts["uptime_s"])),
        ("Waiting predictions", str(facts["waiting"])),
    ]
    return (
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>GeoPrelabel</title><style>{_STYLE}</style><h1>GeoPrelabel</h1>"
        + _table(None, rows)
        + _untrained(facts["untrained_labels"])
        + "<h2>Training</h2>"
        + _training(facts["training"])
        + "<h2>Model versions</h2>"
        + _versions(facts["versions"])
        + "<h2>Annotations to look at</h2>"
        + _findings(facts["findings"], facts["finding_counts"])
        + "<h2>Last problems</h2>"
        + _problems(facts["problems"])
        + "</html>"
    )


def _untrained(labels: Mapping[str, Sequence[str]]) -> str:
    if not labels:
        return ""
    rows = [(escape(project), escape(", ".join(names))) for project, names in labels.items()]
    return (
        "<h2>Labels that nothing knows yet</h2><p class=quiet>Clicks and boxes work; pre-labels come once annotations"
        " of them have trained a model.</p>" + _table(("Project", "Labels"), rows)
    )


def _training(runs: Mapping[str, Mapping[str, Any]]) -> str:
    if not runs:
        return "<p class=quiet>No training yet. It starts by itself after enough accepted annotations.</p>"
    rows = []
    for project, run in runs.items():
        bar = f"<progress value={run['progress']:.2f}></progress>" if run["state"] in ("waiting", "training") else ""
        mark = " class=bad" if run["state"] == "failed" else ""
        rows.append(
            (escape(project), f"<span{mark}>{escape(run['state'])}</span> {bar}", escape(run["message"]),
             _ago(run["finished"] or run["started"]), str(run["changes_since"]))
        )  # fmt: skip
    return _table(("Project", "State", "", "When", "Changes since"), rows)


def _versions(versions: Sequence[Mapping[str, Any]]) -> str:
    if not versions:
        return "<p class=quiet>Only the shipped model.</p>"
    rows = [
        (escape(v["project"]), ("<b class=ok>live</b> " if v["live"] else "") + escape(v["name"]),
         escape(v["created"][:16].replace("T", " ")), escape(v["note"]))
        for v in versions
    ]  # fmt: skip
    return _table(("Project", "Version", "Made (UTC)", "Note"), rows)


def _findings(findings: Sequence[Mapping[str, Any]], counts: Mapping[str, int]) -> str:
    if not findings:
        return "<p class=quiet>None. Annotations are checked each time they are saved.</p>"
    rows = [
        (_ago(f["when"]), escape(f["project"].split(".")[0]), _linked(str(f["task"]), f["url"]), str(f["annotation"]),
         escape(f["region"]), escape(f["reason"]), escape(f["message"]))
        for f in findings
    ]  # fmt: skip
    summary = ", ".join(f"{count} × {reason}" for reason, count in sorted(counts.items(), key=lambda item: -item[1]))
    head = ("When", "Project", "Task", "Annotation", "Region", "Reason", "What, and the way out")
    return f"<p class=quiet>{escape(summary)}</p>" + _table(head, rows)


def _linked(text: str, url: str | None) -> str:
    return f"<a href='{escape(url)}'>{escape(text)}</a>" if url else escape(text)


def _problems(problems: Sequence[Mapping[str, Any]]) -> str:
    if not problems:
        return "<p class=quiet>None.</p>"
    rows = [(_ago(p["when"]), escape(p["where"]), escape(p["message"])) for p in problems]
    return _table(("When", "Where", "What, and the way out"), rows)


def _table(head: Sequence[str] | None, rows: Sequence[Sequence[str]]) -> str:
    top = "<tr>" + "".join(f"<th>{cell}" for cell in head) if head else ""
    return "<table>" + top + "".join("<tr>" + "".join(f"<td>{cell}" for cell in row) for row in rows) + "</table>"


def _ago(when: float) -> str:
    return f"{_span(time.time() - when)} ago" if when else ""


def _span(seconds: float) -> str:
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"
