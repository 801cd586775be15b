"""Pages of docs/ that are made from the code: ``python -m docs.reference.generate``; ``--check`` writes nothing.

The command line from its own help, settings from `Settings`, routes from the server, and the picture of the layers from
the table in docs/architecture.md. A test holds the files to what this makes.
"""

from __future__ import annotations

import argparse
import ast
import html
import inspect
import re
import sys
import typing
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import typer
from pydantic import AliasChoices, SecretStr

from backend import openapi
from backend import settings as settings_module
from backend.cli import app
from backend.settings import Settings

DOCS = Path(__file__).resolve().parent.parent
_KINDS = {int: " N", float: " X", Path: " PATH"}
MADE = "<!-- Made by docs/reference/generate.py: run `make reference`, do not edit. -->"


def pages() -> dict[Path, str]:
    """Each file with what must stand in it."""
    architecture = (DOCS / "architecture.md").read_text(encoding="utf-8")
    return {
        DOCS / "reference" / "cli.md": commands_page(),
        DOCS / "reference" / "settings.md": settings_page(),
        DOCS / "reference" / "routes.md": routes_page(),
        DOCS / "images" / "layers.svg": layers_picture(layers(architecture)),
    }


# Commands


def commands_page() -> str:
    """Every command with its arguments and options."""
    root = typer.main.get_command(app)
    lines = [
        "# Commands",
        "",
        MADE,
        "",
        (
            "`geoprelabel COMMAND --help` says the same. Exit codes: 0 done, 1 failed (one sentence says why), 2 used"
            " wrongly. `--json` prints results for scripts; `geoprelabel --debug COMMAND` shows the traceback of an"
            " error. An interrupted command can be run again, and goes on where it stopped."
        ),
        "",
    ]
    for name, command in _commands(root, "geoprelabel"):
        lines += _command(name, command)
    return "\n".join(lines)


def _commands(group: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    for name, command in sorted(group.commands.items()):
        if hasattr(command, "commands"):
            yield from _commands(command, f"{prefix} {name}")
        elif not command.hidden:
            yield f"{prefix} {name}", command


def _command(name: str, command: Any) -> list[str]:
    about, _, example = inspect.cleandoc(command.help or "").partition("Example:")
    if not example:
        raise ValueError(f"{name}: its help has no example")
    lines = [f"## {name}", "", *_wrapped(about), "", "```sh", " ".join(example.split()), "```", ""]
    rows = [_parameter(parameter) for parameter in command.params if not parameter.hidden]
    if rows:
        lines += ["| | default | |", "|---|---|---|", *rows, ""]
    return lines


def _wrapped(text: str) -> list[str]:
    return "\n\n".join(" ".join(part.split()) for part in text.strip().split("\n\n")).splitlines()


def _parameter(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        shown = f"`{parameter.name.upper()}{'…' if parameter.nargs == -1 else ''}`"
    else:
        kind = "" if parameter.is_flag else _KINDS.get(_bare(parameter), " TEXT")
        shown = ", ".join(f"`{option}{kind}`" for option in [*parameter.opts, *parameter.secondary_opts])
    given = parameter.default
    default = "" if given is None or given is False or given == "" else f"`{given}`"
    if parameter.secondary_opts:
        default = f"`{parameter.opts[0] if parameter.default else parameter.secondary_opts[0]}`"
    about = (parameter.help or "").rstrip(".") + _range(parameter.min, parameter.max)
    return f"| {shown} | {'needed' if parameter.required else default} | {_cell(about)} |"


def _bare(parameter: Any) -> Any:
    kinds = set(typing.get_args(parameter.type_descriptor.annotation)) - {type(None)}
    return kinds.pop() if len(kinds) == 1 else parameter.type_descriptor.annotation


def _range(low: float | None, high: float | None) -> str:
    if low is None and high is None:
        return ""
    return f" ({f'{low} to {high}' if None not in (low, high) else f'from {low}' if high is None else f'up to {high}'})"


def _cell(text: str) -> str:
    return html.escape(re.sub(r"\s+", " ", text.replace("``", "`")), quote=False).replace("|", "\\|").strip()


# Settings


def settings_page() -> str:
    """Every environment variable that is read."""
    lines = [
        "# Settings",
        "",
        MADE,
        "",
        (
            "Environment variables, read once at start. An empty one counts as not set. Of several names the first"
            " counts. **Secrets** can be named with `_FILE` behind them instead: the path of a file that holds them."
        ),
        "",
        "| variable | default | |",
        "|---|---|---|",
    ]
    said = said_of_settings()
    for name, field in Settings.model_fields.items():
        if not said.get(name):
            raise ValueError(f"backend/settings.py says nothing about {name}")
        variables = ", ".join(f"`{variable}`" for variable in names_of(name))
        default = field.default
        if isinstance(default, SecretStr):
            shown = "secret"
        elif isinstance(default, bool):
            shown = f"`{int(default)}`"
        else:
            shown = "" if default in (None, "", ()) else f"`{default}`"
        lines.append(f"| {variables} | {shown} | {_cell(said[name])} |")
    return "\n".join([*lines, ""])


def names_of(field: str) -> list[str]:
    """The environment variables of a setting, the one that counts first in front."""
    alias = Settings.model_fields[field].validation_alias
    if isinstance(alias, AliasChoices):
        return [str(choice) for choice in alias.choices]
    return [str(alias)]


def said_of_settings() -> dict[str, str]:
    """The sentence below each field."""
    tree = ast.parse(inspect.getsource(settings_module))
    body = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Settings").body
    said: dict[str, str] = {}
    for field, below in pairwise(body):
        if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
            said[ast.unparse(field.target)] = str(below.value.value)
    return said


# Routes


def routes_page() -> str:
    """Every route of the server, from its OpenAPI description."""
    described = openapi.document()
    lines = ["# Routes", "", MADE, "", "The server's own description of them is at `/openapi.json`.", ""]
    lines += ["| route | | answers |", "|---|---|---|"]
    for path, methods in described["paths"].items():
        for method, operation in methods.items():
            if method == "parameters":
                continue
            answers = ", ".join(sorted(operation["responses"]))
            about = operation.get("summary") or operation.get("description", "")
            lines.append(f"| `{method.upper()} {path}` | {_cell(about)} | {answers} |")
    return "\n".join([*lines, ""])


# Layers


def layers(architecture: str) -> dict[int, dict[str, str]]:
    """What docs/architecture.md says of each layer's modules."""
    found: dict[int, dict[str, str]] = {}
    for number, module, owns in re.findall(r"^\| (\d+) \| `(\w+)` \| (.*) \|$", architecture, re.MULTILINE):
        found.setdefault(int(number), {})[module] = owns
    return found


def layers_picture(table: dict[int, dict[str, str]], *, width: int = 900) -> str:
    """The layers as a drawing, the highest on top: what is above may import what is below, never the other way."""
    box_height, gap, left, right = 26, 6, 40, width - 12
    drawn: list[str] = []
    y = 12
    for number in sorted(table, reverse=True):
        top = y
        x, y = left + 8, y + 8
        for module, owns in table[number].items():
            box = 16 + 7.3 * len(module)
            if x + box > right - 8:
                x, y = left + 8, y + box_height + gap
            title = html.escape(owns.replace("`", ""))
            drawn.append(
                f'<g><title>{title}</title><rect class="m" x="{x:g}" y="{y}" width="{box:g}" height="{box_height}"'
                f' rx="4"/><text x="{x + box / 2:g}" y="{y + 17}" text-anchor="middle">{module}</text></g>'
            )
            x += box + gap
        y += box_height + 8
        drawn.insert(
            0, f'<rect class="l" x="{left}" y="{top}" width="{right - left}" height="{y - top}" rx="6"/>'
            f'<text class="n" x="{left - 10}" y="{(top + y) / 2 + 5:g}" text-anchor="end">{number}</text>'
        )  # fmt: skip
        y += gap
    style = (
        "text{font:12px ui-monospace,monospace;fill:#1d2b33}.n{font-weight:bold;fill:#57707d}"
        ".l{fill:#eef3f5;stroke:#c6d3d9}.m{fill:#fff;stroke:#7f9aa8}"
    )
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {y + 6}" role="img" aria-label="Layers of the'
        f' backend package; each imports only from below">'
    )
    return "\n".join([head, f"<style>{style}</style>", *drawn, "</svg>", ""])


def main() -> int:
    """Write the pages, or with --check say which are stale; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 where a page is stale")
    check = parser.parse_args().check
    stale = [path for path, text in pages().items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    for path in stale:
        print(f"{'stale' if check else 'written'}: {path.relative_to(DOCS.parent)}")
        if not check:
            path.write_text(pages()[path], encoding="utf-8")
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
