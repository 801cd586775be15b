"""Report: what came of an export, for a program and as an HTML page for a person."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from .earth import Lineage
from .sketch import ImageOf, Map, Sketch, repair_pictures


@dataclass(frozen=True, slots=True)
class Conflict:
    """Ground that two features of different labels claim."""

    ids: tuple[str, str]
    labels: tuple[str, str]

    tasks: tuple[Any, ...]
    """Tasks that either was drawn on."""

    overlap: float
    """Share of the smaller one that both cover."""

    lonlat: tuple[float, float]
    """A point on the ground that both cover."""


@dataclass(frozen=True, slots=True)
class ExportReport:
    """What came of it."""

    out: Path
    tasks: int
    annotations: int
    regions: int
    """Outlines that were read."""

    features: int
    merged: int
    """Features that were joined from several tiles."""

    duplicates: int
    """Outlines left out because a neighbouring tile shows the same object."""

    repaired: int
    dropped: dict[str, int]
    """Why results of annotations were left out, and how often."""

    refused: dict[str, int]
    """Why whole tasks were left out, and how often."""

    findings: list[str]
    """The first repairs and drops, each with its task."""

    crs: list[Lineage]
    versions: dict[str, str]

    conflicts: list[Conflict] = field(default_factory=list)
    """The first places where features of different labels cover the same ground."""

    conflict_count: int = 0
    """All such places."""

    labels: dict[str, int] = field(default_factory=dict)
    """Features of each label."""

    label_area_m2: dict[str, float] = field(default_factory=dict)
    """Their area."""

    chosen: dict[str, int] = field(default_factory=dict)
    """Which annotations count, in words, and how often."""

    edits: dict[str, int] = field(default_factory=dict)
    """Features that a desktop GIS changed, deleted or added."""

    made_at: str = ""
    """When, in UTC (ISO 8601)."""

    def sentence(self) -> str:
        """For a person."""
        parts = [f"{self.features} features from {self.regions} outlines on {self.tasks} tasks in {self.out}"]
        parts += [f"{self.merged} joined across tiles"] if self.merged else []
        parts += [f"{self.duplicates} duplicates left out"] if self.duplicates else []
        parts += [f"{self.repaired} repaired"] if self.repaired else []
        parts += [f"{count} x {reason}" for reason, count in {**self.dropped, **self.refused}.items()]
        return "; ".join(parts)


# Page -----------------------------------------------------------------------------------------------------------------

_STYLE = """
:root{color-scheme:light dark;--ink:#1c2024;--soft:#5f6b76;--line:#d9dee3;--ground:#fff;--card:#f6f8fa;--accent:#0b6bcb;
--warn:#8a5a00;--warn-ground:#fff6e0;--bad:#c2362f;--good:#14804a}
@media (prefers-color-scheme:dark){:root{--ink:#e6e9ec;--soft:#9aa6b2;--line:#333b43;--ground:#14181c;--card:#1c2228;
--accent:#6cb2ff;--warn:#f2c661;--warn-ground:#2e2715;--bad:#ff8a80;--good:#63d297}}
*{box-sizing:border-box}
body{font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;color:var(--ink);background:var(--ground);
margin:0 auto;max-width:68rem;padding:2.5rem 1.5rem 4rem;font-variant-numeric:tabular-nums}
header p,.quiet,figcaption,caption{color:var(--soft)}
h1{font-size:1.75rem;line-height:1.2;letter-spacing:-.01em;margin:0 0 .35rem;overflow-wrap:anywhere}
h2{font-size:1.2rem;margin:2.75rem 0 .75rem;padding-top:1.1rem;border-top:1px solid var(--line)}
h3{font-size:1rem;margin:1.5rem 0 .4rem}
p{margin:.4rem 0;max-width:48rem}
.eyebrow{font-size:.8rem;letter-spacing:.08em;text-transform:uppercase;margin:0 0 .4rem}
.figures{display:grid;grid-template-columns:repeat(auto-fit,minmax(11.5rem,1fr));gap:.75rem;
margin:1.75rem 0 0;padding:0}
.figures div{background:var(--card);border:1px solid var(--line);border-radius:.6rem;padding:.75rem .9rem}
.figures dt{font-size:.82rem;color:var(--soft);line-height:1.3}
.figures dd{margin:0 0 .1rem;font-size:1.55rem;font-weight:650;letter-spacing:-.01em;line-height:1.25}
.figures div{display:flex;flex-direction:column-reverse;justify-content:flex-end}
.figures .main{border-color:var(--accent)}.figures .alert dd{color:var(--warn)}
figure{margin:1rem 0}
figcaption{font-size:.88rem;margin-top:.45rem}
svg.map{display:block;width:100%;height:auto;background:var(--card);border:1px solid var(--line);border-radius:.6rem}
.tiles{fill:none;stroke:var(--soft);stroke-opacity:.55;stroke-width:.8;stroke-dasharray:3 3}
.casing{fill:none;stroke:#000;stroke-opacity:.55;stroke-width:2.8;stroke-linejoin:round}
.dots{stroke-linecap:round}.dots.casing{stroke-width:8.5}
.scale rect{fill:var(--ground);fill-opacity:.8}
.scale path{fill:none;stroke:var(--ink);stroke-width:1.6}
.scale text{font-size:13px;fill:var(--ink)}
.legend{display:flex;flex-wrap:wrap;gap:.35rem 1.1rem;list-style:none;margin:.6rem 0 0;padding:0;font-size:.92rem}
.swatch{display:inline-block;width:.8em;height:.8em;border-radius:.2em;border:1px solid #0006;margin-right:.45em;
vertical-align:-.05em}
.scroll{overflow-x:auto}
table{border-collapse:collapse;min-width:min(100%,34rem);font-size:.94rem}.repairs,.wide{width:100%}
caption{text-align:left;font-size:.88rem;padding-bottom:.4rem}
th,td{text-align:left;vertical-align:top;padding:.5rem .9rem .5rem 0;border-bottom:1px solid var(--line);
overflow-wrap:anywhere}
thead th{font-size:.82rem;color:var(--soft);font-weight:600;white-space:nowrap;overflow-wrap:normal}
tbody th{font-weight:600}td.number,th.number{text-align:right;white-space:nowrap}
td.number:last-child,th.number:last-child{padding-right:0}
.repairs td{padding-top:.8rem;padding-bottom:.8rem}.repairs td.shape{width:11rem;min-width:9rem}
svg.outline{display:block;width:100%;max-width:11rem;background:var(--card);border:1px solid var(--line);
border-radius:.5rem}
.before{fill:var(--bad);fill-opacity:.16;stroke:var(--bad);stroke-width:1.8;fill-rule:evenodd;stroke-linejoin:round}
.after{fill:var(--good);fill-opacity:.2;stroke:var(--good);stroke-width:1.8;fill-rule:evenodd;stroke-linejoin:round}
.ghost{fill:none;stroke:var(--bad);stroke-opacity:.5;stroke-width:1;stroke-dasharray:4 3}
.vertices{fill:none;stroke:var(--ink);stroke-width:4.5;stroke-linecap:round}
dl.facts{display:grid;grid-template-columns:max-content 1fr;gap:.3rem 1.4rem;margin:.5rem 0;font-size:.94rem}
dl.facts dt{color:var(--soft)}dl.facts dd{margin:0;overflow-wrap:anywhere}
.note{background:var(--warn-ground);border-left:3px solid var(--warn);border-radius:.3rem;padding:.5rem .85rem;
margin:.6rem 0;font-size:.94rem;max-width:none}
details{margin:.6rem 0}summary{cursor:pointer;color:var(--accent)}
pre,code{font:.84rem/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
pre{background:var(--card);border:1px solid var(--line);border-radius:.4rem;padding:.7rem .9rem;white-space:pre-wrap;
overflow-wrap:anywhere}
ul.lines{padding-left:1.2rem;font-size:.94rem}ul.lines li{margin:.2rem 0;overflow-wrap:anywhere}
footer{margin-top:3rem;padding-top:1rem;border-top:1px solid var(--line);font-size:.85rem;color:var(--soft)}
@media (max-width:40rem){dl.facts{grid-template-columns:1fr;gap:0}dl.facts dd{margin-bottom:.5rem}}
@media print{:root{color-scheme:light}body{max-width:none;padding:0;font-size:10.5pt}
h2{break-after:avoid}figure,tr,.figures div{break-inside:avoid}summary{color:inherit}
details::details-content{content-visibility:visible;display:block}*{print-color-adjust:exact}}
"""

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
"""The page says itself that it needs nothing from anywhere, and a browser holds it to that."""


def report_page(report: ExportReport, sketch: Sketch | None = None, *, image_of: ImageOf | None = None) -> str:
    """The report as one HTML page that needs no network, no script and no other file.

    ``sketch`` has what the pictures show; ``image_of`` fetches images of tasks, which the map lays under the features.
    """
    title = escape(report.out.name)
    when = f" · {escape(_time(report.made_at))}" if report.made_at else ""
    return (
        '<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title} – export report</title>\n<style>{_STYLE}</style>\n<body>\n"
        f'<header><p class="eyebrow">Export report{when}</p><h1>{title}</h1>'
        f"<p>{escape(_opening(report))}</p></header>\n"
        + "\n".join(
            (
                _figures(report),
                _maps(sketch, image_of),
                _labels(report, sketch),
                _which_annotations(report),
                _left_out(report),
                _repairs(report, sketch),
                _conflicts(report),
                _places(report.crs),
                _versions(report.versions),
            )
        )
        + f"\n<footer>Written by GeoPrelabel for <code>{escape(str(report.out))}</code></footer>\n</body>\n</html>\n"
    )


def _opening(report: ExportReport) -> str:
    lost = sum(report.refused.values()) + sum(report.dropped.values())
    verdict = "Nothing was left out."
    if lost:
        verdict = f"{_count(lost, 'thing')} {'was' if lost == 1 else 'were'} left out, for reasons given below."
    return (
        f"{_count(report.features, 'feature')} from {_count(report.regions, 'outline')} that were drawn on"
        f" {_count(report.tasks, 'task')}, in longitude and latitude (EPSG:4326). {verdict}"
    )


def _figures(report: ExportReport) -> str:
    conflicts = max(report.conflict_count, len(report.conflicts))
    figures = [
        ("features", report.features, "main"),
        ("outlines read", report.regions, ""),
        ("annotations", report.annotations, ""),
        ("tasks", report.tasks, ""),
        ("joined across tiles", report.merged, ""),
        ("duplicates left out", report.duplicates, ""),
        ("outlines repaired", report.repaired, "alert" if report.repaired else ""),
        ("results left out", sum(report.dropped.values()), ""),
        ("tasks left out", sum(report.refused.values()), "alert" if report.refused else ""),
        ("conflicts", conflicts, "alert" if conflicts else ""),
    ]
    cards = "".join(
        f'<div class="{kind}"><dt>{name}</dt><dd>{_number(value)}</dd></div>' for name, value, kind in figures
    )
    return f'<dl class="figures">{cards}</dl>'


def _maps(sketch: Sketch | None, image_of: ImageOf | None) -> str:
    if sketch is None:
        return ""
    maps, more = sketch.maps(image_of)
    if not maps:
        return ""
    legend = "".join(
        f'<li><span class="swatch" style="background:{colour}"></span>{escape(label or "(no label)")}</li>'
        for label, colour in sketch.colours().items()
    )
    figures = "".join(f"<figure>{drawn.svg}<figcaption>{_caption(drawn)}</figcaption></figure>" for drawn in maps)
    rest = f'<p class="quiet">{_count(more, "more place")} with fewer features not drawn.</p>' if more else ""
    return f'<section id="map"><h2>Map</h2><ul class="legend">{legend}</ul>{figures}{rest}</section>'


def _caption(drawn: Map) -> str:
    lon, lat = drawn.centre_lonlat
    place = f"{_lat(round(lat, 4))}, {_lon(round(lon, 4))}"
    ground = f"images of {drawn.images} tiles" if drawn.images else "footprints of tiles (dashed)"
    how = "; one dot for each feature, as there are too many for outlines" if drawn.is_dots else ""
    return f"{_count(drawn.features, 'feature')} around {place}, north up, over {ground}{how}."


def _labels(report: ExportReport, sketch: Sketch | None) -> str:
    if not report.labels:
        return ""
    colours = sketch.colours() if sketch else {}
    rows = []
    for label, count in sorted(report.labels.items(), key=lambda item: -item[1]):
        area_m2 = report.label_area_m2.get(label)
        mark = f'<span class="swatch" style="background:{colours[label]}"></span>' if label in colours else ""
        rows.append(
            (f"{mark}{escape(label or '(no label)')}", _number(count), _area(area_m2) if area_m2 is not None else "")
        )
    return _section("labels", "Labels", _table(("Label", "Features", "Area"), rows, numbers=(1, 2)))


def _which_annotations(report: ExportReport) -> str:
    if not report.chosen:
        return ""
    return _section("annotations", "Which annotations count", _tallies(report.chosen, "How it was chosen"))


def _left_out(report: ExportReport) -> str:
    parts = []
    if report.refused:
        parts.append("<h3>Tasks</h3>" + _tallies(report.refused, "Reason"))
    if report.dropped:
        parts.append("<h3>Results of annotations</h3>" + _tallies(report.dropped, "Reason"))
    if report.duplicates:
        parts.append(
            f"<p>{_count(report.duplicates, 'outline')} of objects that a neighbouring tile shows as well, or better,"
            " count once.</p>"
        )
    return _section("left-out", "Left out", "".join(parts) or "<p>Nothing.</p>")


def _repairs(report: ExportReport, sketch: Sketch | None) -> str:
    repairs = sketch.repairs if sketch else ()
    if not repairs and not report.findings:
        return _section("repairs", "Repairs", "<p>Every outline was valid as it was drawn.</p>")
    content = ""
    if repairs:
        rows = []
        for repair in repairs:
            before, after = repair_pictures(repair)
            what = f"<b>{escape(repair.reason)}</b><br>task {escape(str(repair.task))}"
            what += f"<br><code>{escape(repair.region)}</code>" if repair.region else ""
            rows.append(
                f'<tr><td>{what}</td><td class="number">{_change(repair.area_change)}</td>'
                f'<td class="shape">{before}</td><td class="shape">{after}</td></tr>'
            )
        content = (
            f'<div class="scroll"><table class="repairs"><caption>The {len(rows)} of {_number(report.repaired)} that'
            ' changed their area most.</caption><thead><tr><th scope="col">What</th>'
            '<th scope="col" class="number">Area change</th><th scope="col">As drawn</th>'
            '<th scope="col">As exported</th>'
            f"</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
        )
    if report.findings:
        lines = "".join(f"<li>{escape(line)}</li>" for line in report.findings)
        content += (
            f"<details{'' if repairs else ' open'}><summary>The first {len(report.findings)} repairs and losses in"
            f' words</summary><ul class="lines">{lines}</ul></details>'
        )
    return _section("repairs", "Repairs", content)


def _conflicts(report: ExportReport) -> str:
    total = max(report.conflict_count, len(report.conflicts))
    if not total:
        return _section("conflicts", "Conflicts", "<p>No two labels claim the same ground.</p>")
    rows = [
        (
            escape(" / ".join(label or "(no label)" for label in conflict.labels)),
            f"{conflict.overlap:.0%}",
            escape(", ".join(str(task) for task in conflict.tasks)),
            f"{conflict.lonlat[1]:.6f}, {conflict.lonlat[0]:.6f}",
            "<br>".join(f"<code>{escape(name)}</code>" for name in conflict.ids),
        )
        for conflict in report.conflicts
    ]
    caption = (
        f"The first {len(rows)} of {_number(total)} places where two features of different labels cover the same"
        " ground; the share is that of the smaller one."
    )
    head = ("Labels", "Shared", "Tasks", "Latitude, longitude", "Features")
    return _section("conflicts", "Conflicts", _table(head, rows, numbers=(1,), caption=caption))


def _places(lineages: Sequence[Lineage]) -> str:
    return _section(
        "crs", "How places became longitude and latitude", "".join(_lineage(lineage) for lineage in lineages)
    )


def _lineage(lineage: Lineage) -> str:
    facts = [("Operation", escape(lineage.operation))]
    stated = "not stated" if lineage.accuracy_m is None else _metres(lineage.accuracy_m)
    facts.append(("Accuracy, as PROJ states it", stated))
    if lineage.frame and lineage.frame_accuracy_m is not None:
        tied = _metres(lineage.frame_accuracy_m)
        facts.append(("Tied to the frame", f"{escape(lineage.frame)}, {tied}"))
    facts.append(("Best operation known", "yes" if lineage.is_best else "no"))
    facts.append(("Grids used", escape(", ".join(lineage.grids)) or "none needed"))
    if lineage.missing_grids:
        facts.append(("Grids not installed", escape(", ".join(lineage.missing_grids))))
    if lineage.area:
        west, south, east, north = lineage.area
        facts.append(("Area of interest", f"{_lon(west)} to {_lon(east)}, {_lat(south)} to {_lat(north)}"))
    notes = "".join(f'<p class="note">{escape(text)}</p>' for text in lineage.warnings)
    short = lineage.crs if len(lineage.crs) < 60 else lineage.crs[:59] + "…"
    name = f"{short} – {lineage.horizontal}" if lineage.horizontal else short
    return (
        f"<h3>{escape(name)}</h3>{notes}{_facts(facts)}"
        f"<details><summary>PROJ pipeline</summary><pre>{escape(lineage.definition)}</pre></details>"
    )


def _versions(versions: Mapping[str, str]) -> str:
    return _section("versions", "Versions", _facts((escape(name), escape(text)) for name, text in versions.items()))


# Pieces ---------------------------------------------------------------------------------------------------------------


def _section(name: str, title: str, content: str) -> str:
    return f'<section id="{name}"><h2>{title}</h2>{content}</section>'


def _tallies(counts: Mapping[str, int], head: str) -> str:
    rows = [(escape(reason), _number(count)) for reason, count in sorted(counts.items(), key=lambda item: -item[1])]
    return _table((head, "Count"), rows, numbers=(1,))


def _table(
    head: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: Sequence[int] = (), caption: str = ""
) -> str:
    """A table of cells that are HTML already; ``numbers`` are columns to align right."""
    kinds = [' class="number"' if column in numbers else "" for column in range(len(head))]
    top = "".join(f'<th scope="col"{kind}>{name}</th>' for name, kind in zip(head, kinds, strict=True))
    body = "".join(
        "<tr>" + "".join(f"<td{kind}>{cell}</td>" for cell, kind in zip(row, kinds, strict=True)) + "</tr>"
        for row in rows
    )
    title = f"<caption>{caption}</caption>" if caption else ""
    return f'<div class="scroll"><table>{title}<thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def _facts(facts: Iterable[tuple[str, str]]) -> str:
    return '<dl class="facts">' + "".join(f"<dt>{name}</dt><dd>{text}</dd>" for name, text in facts) + "</dl>"


def _number(value: int) -> str:
    return f"{value:,}"


def _count(value: int, noun: str) -> str:
    return f"{value:,} {noun}{'' if value == 1 else 's'}"


def _lon(degrees: float) -> str:
    return f"{abs(degrees):.7g}° {'E' if degrees >= 0 else 'W'}"


def _lat(degrees: float) -> str:
    return f"{abs(degrees):.7g}° {'N' if degrees >= 0 else 'S'}"


def _time(iso: str) -> str:
    return iso.replace("T", " ").replace("+00:00", " UTC")


def _area(area_m2: float) -> str:
    if area_m2 >= 1e6:
        return f"{area_m2 / 1e6:,.2f} km²"
    return f"{area_m2 / 1e4:,.2f} ha" if area_m2 >= 1e4 else f"{area_m2:,.1f} m²"


def _metres(value_m: float) -> str:
    return "exact" if value_m == 0 else f"within {value_m:.2g} m"


def _change(share: float) -> str:
    if math.isnan(share):
        return "unknown"
    return "none" if abs(share) < 0.0005 else f"{share:+.1%}".replace("-", "−")
