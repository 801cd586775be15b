"""docs/reference/licences.md: the licence of every package that is installed with this one: ``make licences``.

Exit code 1 where one of them asks for more than naming its authors, unless a word below says why it may stay.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent.parent
PAGE = Path(__file__).with_suffix(".md")
EXTRAS = ("psycopg", "psycopg-binary", "boto3", "botocore", "jmespath", "s3transfer")
"""What the container image holds beside the lock: the extras ``postgres`` and ``s3``."""

PERMISSIVE = {
    *("apache", "mit", "bsd", "isc", "iscl", "psf", "python", "software", "foundation", "hpnd", "zlib", "cc", "bsl"),
    *("llvm", "exception", "cmu", "license", "clause", "and", "or", "with", "the", "of", "new", "revised"),
}
"""All words that a permissive licence's name, or several of them, is made of."""

# What the packages' own records leave out, and why what is not merely permissive may stay.
KNOWN = {
    "async-timeout": "Apache-2.0",
    "segment-anything": "Apache-2.0",
}
WORDS = {
    "certifi": "a list of certificates, used as it is",
    "psycopg": "a library, used as it is; in the image and the extra `postgres` only",
    "psycopg-binary": "a library, used as it is; in the image and the extra `postgres` only",
}


def locked() -> dict[str, str]:
    """Version of each package of the lock, and of the extras."""
    pinned = r"^([a-z0-9._-]+)==(\S+)"
    runtime = dict(re.findall(pinned, (REPOSITORY / "requirements.txt").read_text(encoding="utf-8"), re.MULTILINE))
    others = dict(re.findall(pinned, (REPOSITORY / "requirements-dev.txt").read_text(encoding="utf-8"), re.MULTILINE))
    return runtime | {name: others[name] for name in EXTRAS}


def is_permissive(licence: str) -> bool:
    """Whether nothing is asked for but naming the authors."""
    return set(re.findall(r"[a-z]{2,}", licence.lower())) <= PERMISSIVE


def main() -> int:
    """Write the page; the exit code."""
    versions = locked()
    command = [str(Path(sys.executable).parent / "pip-licenses"), "--format=json", "--with-system", "--packages"]
    done = subprocess.run([*command, *versions], capture_output=True, text=True, check=True)
    installed = {re.sub(r"[._-]+", "-", row["Name"]).lower(): row["License"] for row in json.loads(done.stdout)}
    lines = [
        "# Licences",
        "",
        "<!-- Made by docs/reference/licences.py: run `make licences`, do not edit. -->",
        "",
        "GeoPrelabel is under Apache-2.0. This is what its packages say of themselves: those of the lock",
        "(`requirements.txt`) and of the container image's extras. The shipped weights' sources are in",
        "`model_weights/README.md`; a CUDA build of torch brings NVIDIA's libraries under NVIDIA's terms.",
        "",
        "| package | version | licence | |",
        "|---|---|---|---|",
    ]
    refused = []
    for name, version in sorted(versions.items()):
        licence = KNOWN.get(name) or installed.get(name, "not installed here")
        lines.append(f"| {name} | {version} | {licence} | {WORDS.get(name, '')} |")
        if not is_permissive(licence) and name not in WORDS:
            refused.append(f"{name} {version}: {licence}")
    PAGE.write_text("\n".join([*lines, ""]), encoding="utf-8")
    for one in refused:
        print(f"neither permissive nor explained in docs/reference/licences.py: {one}", file=sys.stderr)
    return int(bool(refused))


if __name__ == "__main__":
    sys.exit(main())
