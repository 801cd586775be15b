"""What the operator names on the command line → scenes to open: files, object stores, web addresses, lists, STAC items.

Addresses come from the command line alone, or from a file that it names; never from a request. They may hold secrets
(a presigned address's query), so what is shown or recorded is the name without them.
"""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urljoin, urlsplit

from .errors import BadScene

_FILE_SYSTEMS = {
    "s3": "/vsis3/",
    "gs": "/vsigs/",
    "az": "/vsiaz/",
    "http": "/vsicurl/http://",
    "https": "/vsicurl/https://",
}
_REMOTE = re.compile(r"^(?:[a-z0-9+.-]+://|/vsi(?!mem|zip|tar|gzip|7z|rar))", re.IGNORECASE)
_SCHEME = re.compile(r"^([a-z0-9]+)://", re.IGNORECASE)
_SHOWN_ASSETS = ("visual", "rendered_preview", "image", "ortho", "data", "analytic")
_IN_ARCHIVES = (".tif", ".tiff", ".jp2", ".img")
_MAX_ITEM_BYTES = 32 * 2**20


@dataclass(frozen=True, slots=True)
class Source:
    """One scene: a raster, or several that make a mosaic."""

    name: str
    """Of the folder of its tiles: letters, digits, ``.``, ``_`` and ``-``."""

    addresses: tuple[str, ...]
    """What GDAL opens."""

    @property
    def shown(self) -> str:
        """For people: never with a query or a password."""
        return shown(self.addresses[0]) if len(self.addresses) == 1 else f"mosaic {self.name}"


def sources(named: Sequence[str | Path], *, mosaic: str = "", asset: str = "") -> list[Source]:
    """The scenes that were named. With ``mosaic`` all of them are one scene of that name.

    A name is a path, an address (``https://``, ``s3://``, ``gs://``, ``az://``, GDAL's ``/vsi…``), a STAC item or
    collection of items (``.json``, ``.geojson``) whose ``asset`` is taken, or a list of such names (``.txt``, one a
    line). Raises BadScene.
    """
    if not named:
        raise BadScene("no scene was named; give the path of a georeferenced raster")
    found = [pair for name in named for pair in _expanded(str(name), asset)]
    if mosaic:
        return [Source(scene_names([mosaic])[0], tuple(address for _, address in found))]
    names = scene_names([title for title, _ in found])
    return [Source(name, (address,)) for name, (_, address) in zip(names, found, strict=True)]


def scene_names(sources: Sequence[str]) -> list[str]:
    """A name for each source, of letters, digits, ``.``, ``_`` and ``-``; no two alike."""
    names: list[str] = []
    taken: set[str] = set()
    for source in sources:
        last = re.split(r"[/\\]", source.split("?")[0].rstrip("/\\"))[-1]
        stem = re.sub(r"\.[A-Za-z][A-Za-z0-9]{0,4}$", "", last)
        base = re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip(".-")[:80] or "scene"
        name, number = base, 1
        while name.casefold() in taken:
            number += 1
            name = f"{base}-{number}"
        taken.add(name.casefold())
        names.append(name)
    return names


def is_remote(address: str) -> bool:
    """Whether the address is not on this machine."""
    return bool(_REMOTE.match(address))


def shown(address: str) -> str:
    """The address for people and records: without a query, which may be a signature, and without a password."""
    if not is_remote(address):
        return address
    return re.sub(r"//[^/@]*@", "//", address.removeprefix("/vsicurl/").split("?")[0] or address)


def gdal_address(name: str) -> str:
    """An address as GDAL's virtual file systems spell it; all else as it is."""
    found = _SCHEME.match(name)
    system = _FILE_SYSTEMS.get(found.group(1).lower()) if found else None
    return system + name[found.end() :] if found and system else name


def _expanded(name: str, asset: str, *, base: str = "", depth: int = 0) -> Iterator[tuple[str, str]]:
    """Title and address of each scene that a name stands for."""
    path = urlsplit(name).path if is_remote(name) else name
    ending = path.rpartition(".")[2].casefold()
    if ending == "txt" and not is_remote(name):
        if depth:
            raise BadScene(f"{name}: a list of scenes names other lists; name the scenes themselves")
        lines = (line.strip() for line in _text(name).splitlines())
        listed = [line for line in lines if line and not line.startswith("#")]
        if not listed:
            raise BadScene(f"{name} is a list of scenes and names none")
        for line in listed:
            # As in any playlist, paths are meant from the list's own folder.
            beside = line if is_remote(line) or Path(line).is_absolute() else str(Path(name).parent / line)
            yield from _expanded(beside, asset, depth=depth + 1)
    elif ending == "zip" and not is_remote(name) and not name.startswith("/vsi"):
        for inner in _in_zip(name):
            yield f"{Path(name).stem}-{Path(inner).stem}", f"/vsizip/{Path(name).absolute()}/{inner}"
    elif ending in ("json", "geojson") and (content := _stac(name)) is not None:
        for item in content:
            yield str(item.get("id") or name), _asset_address(item, asset, name)
    elif Path(name).is_dir() and ending not in ("safe", "zarr", "gdb", "sen3"):
        raise BadScene(
            f"{name} is a folder; name the rasters in it, such as {name.rstrip('/')}/*.tif, or a .txt list of them"
        )
    else:
        yield name, gdal_address(name)


def _stac(name: str) -> list[Mapping[str, Any]] | None:
    """The items of a STAC item or item collection; None for JSON of another kind (GDAL reads some)."""
    try:
        content = json.loads(_text(name))
    except ValueError as error:
        raise BadScene(f"{shown(name)} is not JSON: {error}") from error
    items = content.get("features") if isinstance(content, dict) else None
    if isinstance(items, list):
        found: list[Mapping[str, Any]] = [
            item for item in items if isinstance(item, dict) and isinstance(item.get("assets"), dict)
        ]
        if len(found) != len(items) or not items:
            raise BadScene(
                f"{shown(name)} is no collection of STAC items: its features need assets; a scene is a raster, and"
                " polygons go with one: --aoi or --prelabels"
            )
        return found
    if isinstance(content, dict) and isinstance(content.get("assets"), dict):
        if content.get("type") != "Feature":
            raise BadScene(f"{shown(name)} is a STAC {content.get('type')}, not an item; name its items")
        return [content]
    return None


def _asset_address(item: Mapping[str, Any], wanted: str, name: str) -> str:
    """The address of an item's asset, as GDAL spells it. Raises BadScene with those there are."""
    assets = {key: value for key, value in item["assets"].items() if isinstance(value, Mapping) and value.get("href")}
    images = [
        key
        for key, value in assets.items()
        if str(value.get("type", "")).startswith(("image/tiff", "image/jp2", "image/vnd.stac.geotiff"))
    ]
    choice = wanted or next((key for key in _SHOWN_ASSETS if key in assets), images[0] if len(images) == 1 else "")
    if choice not in assets:
        asked = f"has no asset {wanted!r}" if wanted else "has several assets"
        raise BadScene(
            f"STAC item {item.get('id')} {asked}; choose with --asset: {', '.join(sorted(assets)) or 'none'}"
        )
    href = str(assets[choice]["href"])
    if is_remote(name):
        href = urljoin(name, href)
        if (urlsplit(href).scheme or "").casefold() not in _FILE_SYSTEMS:
            raise BadScene(f"STAC item {item.get('id')}: a remote item cannot name {href[:80]!r}; save it here first")
    elif not is_remote(href):
        href = str(Path(name).parent / href.removeprefix("file://"))
    return gdal_address(href)


def _in_zip(name: str) -> list[str]:
    try:
        with zipfile.ZipFile(name) as file:
            found = sorted(inner for inner in file.namelist() if inner.casefold().endswith(_IN_ARCHIVES))
    except (OSError, zipfile.BadZipFile) as error:
        raise BadScene(f"{name} cannot be read: {error}") from error
    if not found:
        raise BadScene(f"{name} holds no {' '.join(_IN_ARCHIVES)}; name what it holds as /vsizip/{name}/…")
    return found


def _text(name: str) -> str:
    try:
        if not is_remote(name):
            return Path(name).read_text(encoding="utf-8")
        if not name.casefold().startswith(("http://", "https://")):
            raise BadScene(f"{shown(name)}: STAC items are read from files and https alone; save it here first")
        import httpx

        with httpx.stream("GET", name, follow_redirects=True, timeout=30) as answer:
            answer.raise_for_status()
            body = b""
            for chunk in answer.iter_bytes():
                body += chunk
                if len(body) > _MAX_ITEM_BYTES:
                    raise BadScene(f"{shown(name)} is larger than {_MAX_ITEM_BYTES // 2**20} MB; that is no STAC item")
        return body.decode()
    except (OSError, UnicodeDecodeError) as error:
        raise BadScene(f"{shown(name)} cannot be read: {error}") from error
    except Exception as error:
        if type(error).__module__.startswith("httpx"):
            raise BadScene(f"{shown(name)} cannot be fetched: {type(error).__name__}") from error
        raise
