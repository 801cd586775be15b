"""The page for people at /status: plain HTML that needs no network and no script."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

_STYLE = """
:root{color-scheme:light dark;--line:#8884;--ok:#1a7f37;--bad:#c62828}
body{font:16px/1.5 system-ui,sans-serif;margin:0 auto;max-width:72rem;padding:1rem;overflow-wrap:anywhere}
h1{font-size:1.4rem;margin:.2rem 0}h2{font-size:1.1rem;margin:1.6rem 0 .4rem}
table{border-collapse:collapse;width:100%}
th,td{text-align:left;padding:.3rem .6rem;border-bottom:1px solid var(--line);vertical-align:top}
th{overflow-wrap:normal}table:not(.listed) td:first-child{overflow-wrap:normal;width:9rem}
svg{display:block;width:100%;max-width:32rem;height:auto;margin:.6rem 0;overflow:visible;font-size:12px}
svg text{fill:currentColor}.grid{stroke:var(--line)}polyline{fill:none;stroke:currentColor;stroke-width:2}
circle{fill:currentColor}
.v0{color:#1f77b4}.v1{color:#e07b00}.v2{color:#2e9e44}.v3{color:#d04a4a}.v4{color:#9a6dd0}.v5{color:#8c8c4a}
.ok{color:var(--ok)}.bad{color:var(--bad)}.quiet{opacity:.7}progress{width:8rem}
@media(prefers-color-scheme:dark){:root{--ok:#3fb950;--bad:#ff7b72}}
@media(min-width:44rem){table:not(.listed) td:first-child{width:15rem}}
@media(max-width:62rem){.listed tr{display:block;padding:.5rem 0;border-bottom:1px solid var(--line)}
.listed tr.head,.listed td:empty{display:none}.listed td{display:flex;gap:.6rem;padding:.1rem 0;border:0}
.listed td:before{content:attr(data-of);flex:0 0 7.6rem;opacity:.7}}
"""


LOW_DISK_MB = 1024
"""Less room than this on the disk of the data folder is shown in red."""


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
        + "<h2>What annotators made of pre-labels</h2>"
        + _acceptance(facts["acceptance"])
        + "<h2>Annotations to look at</h2>"
        + _findings(facts["findings"], facts["finding_counts"])
        + "<h2>Last problems</h2>"
        + _problems(facts["problems"])
        + "<h2>Queues, caches, disk</h2>"
        + _load(facts)
        + "</html>"
    )


def _load(facts: Mapping[str, Any]) -> str:
    queues, embeddings, images, free_mb = (facts[n] for n in ("queues", "embeddings_mb", "images_mb", "disk_free_mb"))
    behind = "<span class=bad>not all events could be written down; Label Studio is asked for what is missing</span>"
    low = " class=bad" if free_mb is not None and free_mb < LOW_DISK_MB else ""
    rows = [
        ("In line for the model", str(queues["device"])),
        ("Tiles of batches in line", str(queues["tiles"])),
        ("Annotations to check", str(queues["checks"])),
        ("Embeddings in memory", f"{embeddings['memory']} of {embeddings['memory_limit']} MB"),
        ("Embeddings on disk", f"{embeddings['disk']} of {embeddings['disk_limit']} MB"),
        ("Images in memory", f"{images['memory']} of {images['memory_limit']} MB"),
        ("Room on the disk", "not known" if free_mb is None else f"<span{low}>{free_mb} MB</span>"),
        ("Journal", behind if facts["is_journal_behind"] else "complete"),
    ]
    return "<p class=quiet>Queues and memory are those of the server process that answered.</p>" + _table(None, rows)


def _untrained(labels: Mapping[str, Sequence[str]]) -> str:
    if not labels:
        return ""
    rows = [(_project(project), escape(", ".join(names))) for project, names in labels.items()]
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
            (_project(project), f"<span{mark}>{escape(run['state'])}</span> {bar}", escape(run["message"]),
             _ago(run["finished"] or run["started"]), _span(run["duration_s"]), str(run["changes_since"]))
        )  # fmt: skip
    return _table(("Project", "State", "Message", "When", "Took", "Changes since"), rows)


def _versions(versions: Sequence[Mapping[str, Any]]) -> str:
    if not versions:
        return "<p class=quiet>Only the shipped model.</p>"
    rows = [
        (_project(v["project"]), ("<b class=ok>live</b> " if v["live"] else "") + escape(v["name"]),
         escape(v["created"][:16].replace("T", " ")), escape(v["note"]))
        for v in versions
    ]  # fmt: skip
    return _table(("Project", "Version", "Made (UTC)", "Note"), rows)


def _acceptance(projects: Mapping[str, Mapping[str, Any]]) -> str:
    if not projects:
        return "<p class=quiet>Nothing yet. Submitted annotations are compared with the pre-labels they began from.</p>"
    head = ("Version", "Annotations", "Pre-labels", "Unchanged", "Edited", "Deleted", "Added by click", "By hand",
            "Edit distance", "Moved by")  # fmt: skip
    parts = [
        "<p class=quiet>Unchanged: submitted as it was predicted. Edit distance: mean of 1 &minus; IoU of the outlines"
        " that were kept with what was predicted, those left as they were included. Moved by: mean distance of edited"
        " outlines (PoLiS).</p>"
    ]
    for project, facts in projects.items():
        styles = {v["name"]: f"v{number % 6}" for number, v in enumerate(facts["versions"])}
        rows = [
            (f"<b class={styles[v['name']]}>&#9679;</b> {escape(v['name'])}", str(v["annotations"]),
             str(v["predicted"]), f"{v['unchanged']} ({_percent(v['unchanged_rate'])})", str(v["edited"]),
             str(v["deleted"]), str(v["clicked"]), str(v["drawn"]), _number(v["edit_distance"]), _apart(v))
            for v in reversed(facts["versions"])
        ]  # fmt: skip
        parts.append(
            f"<h3>Project {_project(project)}</h3>"
            + _curves("Pre-labels submitted unchanged", facts, "unchanged_rate", 1.0, styles)
            + _curves("Edit distance", facts, "edit_distance", None, styles)
            + _table(head, rows)
        )
    return "".join(parts)


def _curves(title: str, facts: Mapping[str, Any], figure: str, top: float | None, styles: Mapping[str, str]) -> str:
    """A figure of each version over time, as an SVG picture that needs no script; nothing where it was never known."""
    points = [point for point in facts["curve"] if point[figure] is not None]
    if not points:
        return ""
    top = top or max(0.1, *(point[figure] for point in points))
    first, last = points[0]["from"], max(points[-1]["from"], points[0]["from"] + facts["span_s"])
    width, height, left, above = 320, 100, 44, 22

    def place(point: Mapping[str, Any]) -> tuple[float, float]:
        x = left + (point["from"] - first) / (last - first) * width
        return round(x, 1), round(above + height - min(point[figure] / top, 1.0) * height, 1)

    drawn = [f"<text x=0 y=12>{escape(title)}</text>"]
    for share in (0.0, 0.5, 1.0):
        y = round(above + height * (1 - share), 1)
        drawn.append(f"<line class=grid x1={left} x2={left + width} y1={y} y2={y} />")
        drawn.append(f"<text x={left - 6} y={y + 4} text-anchor=end>{_percent(share * top)}</text>")
    for when, anchor, x in ((first, "start", left), (points[-1]["from"], "end", left + width)):
        if anchor == "start" or len({point["from"] for point in points}) > 1:
            day = time.strftime("%Y-%m-%d %H:%M", time.gmtime(when))
            drawn.append(f"<text x={x} y={above + height + 16} text-anchor={anchor}>{day} UTC</text>")
    for name, style in styles.items():
        own = [point for point in points if point["version"] == name]
        line = " ".join("{},{}".format(*place(point)) for point in own)
        drawn.append(f"<polyline class={style} points='{line}' />" if len(own) > 1 else "")
        for point in own:
            x_px, y_px = place(point)
            note = f"{name}: {_percent(point[figure])}, {point['predicted']} pre-labels"
            drawn.append(f"<circle class={style} cx={x_px} cy={y_px} r=3.5><title>{escape(note)}</title></circle>")
    box = f"0 0 {left + width + 4} {above + height + 24}"
    return f"<svg viewBox='{box}' role=img aria-label='{escape(title)} by version over time'>{''.join(drawn)}</svg>"


def _percent(share: float | None) -> str:
    return "&ndash;" if share is None else f"{100 * share:.0f}&nbsp;%"


def _number(value: float | None) -> str:
    return "&ndash;" if value is None else f"{value:.3f}"


def _apart(version: Mapping[str, Any]) -> str:
    if version["polis_m"] is not None:
        return f"{version['polis_m']:.2f}&nbsp;m"
    return "&ndash;" if version["polis_px"] is None else f"{version['polis_px']:.1f}&nbsp;px"


def _findings(findings: Sequence[Mapping[str, Any]], counts: Mapping[str, int]) -> str:
    if not findings:
        return "<p class=quiet>None. Annotations are checked each time they are saved.</p>"
    rows = [
        (_ago(f["when"]), _project(f["project"]), _linked(str(f["task"]), f["url"]), str(f["annotation"]),
         escape(f["region"]), escape(f["reason"]), escape(f["message"]))
        for f in findings
    ]  # fmt: skip
    summary = ", ".join(f"{count} × {reason}" for reason, count in sorted(counts.items(), key=lambda item: -item[1]))
    head = ("When", "Project", "Task", "Annotation", "Region", "Reason", "What, and the way out")
    return f"<p class=quiet>{escape(summary)}</p>" + _table(head, rows)


def _project(key: str) -> str:
    """Its number, as Label Studio shows it; the key, which tells it from one of another Label Studio, as a hint."""
    return f'<span title="{escape(key)}">{escape(key.split(".")[0])}</span>'


def _linked(text: str, url: str | None) -> str:
    return f"<a href='{escape(url)}'>{escape(text)}</a>" if url else escape(text)


def _problems(problems: Sequence[Mapping[str, Any]]) -> str:
    if not problems:
        return "<p class=quiet>None.</p>"
    rows = [(_ago(p["when"]), escape(p["where"]), escape(p["message"])) for p in problems]
    return _table(("When", "Where", "What, and the way out"), rows)


def _table(head: Sequence[str] | None, rows: Sequence[Sequence[str]]) -> str:
    if head is None:
        return "<table>" + "".join("<tr>" + "".join(f"<td>{cell}" for cell in row) for row in rows) + "</table>"
    # On a phone each row stands by itself, and each cell says what it is of.
    top = "<tr class=head>" + "".join(f"<th>{cell}" for cell in head)
    cells = (
        "".join(f"<td data-of='{of}'>" + (cell and f"<div>{cell}</div>") for of, cell in zip(head, row, strict=True))
        for row in rows
    )
    body = (f"<tr>{of_row}" for of_row in cells)
    return "<table class=listed>" + top + "".join(body) + "</table>"


def _ago(when: float) -> str:
    return f"{_span(time.time() - when)} ago" if when else ""


def _span(seconds: float) -> str:
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"
