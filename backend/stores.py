"""Where tiles are kept: a folder of this machine, or a bucket of an object store that speaks S3.

Keys and endpoint come from the environment that GDAL reads scenes with (``AWS_ACCESS_KEY_ID``, ``AWS_PROFILE``,
``AWS_S3_ENDPOINT``, ``AWS_HTTPS``, ``AWS_REGION``), never from a request or a task.
"""

from __future__ import annotations

import functools
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

from .errors import BadScene

PART = ".ingest-"
"""How the names of files begin that are not yet whole."""

CONTENT_TYPES = {"jpg": "image/jpeg", "png": "image/png", "webp": "image/webp", "json": "application/json"}

_BUCKET = re.compile(r"s3://([a-z0-9][a-z0-9._-]{1,62})((?:/[^/?#]+)*)/?")


class Store(Protocol):
    """Named contents. What is read was put there whole; it can be handed to another process."""

    def names(self, folder: str) -> set[str]:
        """Names in a folder and below, seen from it; none where there is no such folder."""

    def get(self, name: str, *, max_bytes: int = 2**30) -> bytes | None:
        """The content, None where there is none. Raises BadScene above ``max_bytes``."""

    def put(self, name: str, content: bytes) -> None:
        """Whole or not at all, in the place of what had the name."""

    def remove(self, name: str) -> None:
        """Nothing happens where there is none."""


def store_at(address: str | Path) -> Store:
    """The store of that address: ``s3://bucket/prefix``, else a folder. Raises BadScene."""
    text = str(address)
    if "://" not in text:
        return Folder(Path(address))
    found = _BUCKET.fullmatch(text)
    if not found:
        raise BadScene(
            f"tiles are uploaded to s3://bucket/prefix, got {text.split('?')[0][:100]!r}"
            " (other stores: by their S3 endpoint in AWS_S3_ENDPOINT)"
        )
    return Bucket(found.group(1) + found.group(2))


@dataclass(frozen=True, slots=True)
class Folder:
    """A folder of this machine."""

    path: Path

    def names(self, folder: str) -> set[str]:
        root = self.path / folder
        there = {path.relative_to(root).as_posix() for path in root.rglob("*.*")} if root.is_dir() else set()
        # What a killed run was writing.
        parts = {name for name in there if name.rpartition("/")[2].startswith(PART)}
        for name in parts:
            (root / name).unlink(missing_ok=True)
        return there - parts

    def get(self, name: str, *, max_bytes: int = 2**30) -> bytes | None:
        path = self.path / name
        if not path.is_file():
            return None
        if path.stat().st_size > max_bytes:
            raise BadScene(f"{path} is larger than {max_bytes / 2**20:g} MB")
        return path.read_bytes()

    def put(self, name: str, content: bytes) -> None:
        path = self.path / name
        try:
            with whole(path) as part:
                part.write_bytes(content)
        except FileNotFoundError:
            path.parent.mkdir(parents=True, exist_ok=True)
            with whole(path) as part:
                part.write_bytes(content)

    def remove(self, name: str) -> None:
        (self.path / name).unlink(missing_ok=True)


@dataclass(frozen=True, slots=True)
class Bucket:
    """A bucket, or what lies under a prefix in it."""

    root: str
    """Bucket and prefix, without a slash at the end."""

    def names(self, folder: str) -> set[str]:
        from pyarrow import fs

        at = f"{self.root}/{folder}"
        with self._said():
            infos = self._files.get_file_info(fs.FileSelector(at, recursive=True, allow_not_found=True))
        return {info.path.removeprefix(f"{at}/") for info in infos if info.is_file}

    def get(self, name: str, *, max_bytes: int = 2**30) -> bytes | None:
        with self._said():
            try:
                with self._files.open_input_stream(f"{self.root}/{name}") as file:
                    content: bytes = file.read(max_bytes + 1)
            except FileNotFoundError:
                return None
        if len(content) > max_bytes:
            raise BadScene(f"s3://{self.root}/{name} is larger than {max_bytes / 2**20:g} MB")
        return content

    def put(self, name: str, content: bytes) -> None:
        kind = CONTENT_TYPES.get(name.rpartition(".")[2], "application/octet-stream")
        metadata = {"Content-Type": kind, "Cache-Control": "public, max-age=3600"}
        with self._said(), self._files.open_output_stream(f"{self.root}/{name}", metadata=metadata) as file:
            file.write(content)

    def remove(self, name: str) -> None:
        with self._said():
            try:
                self._files.delete_file(f"{self.root}/{name}")
            except FileNotFoundError:
                return

    @property
    def _files(self) -> Any:
        return _s3(self.root.partition("/")[0])

    @contextmanager
    def _said(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            reason = " ".join(str(error).split())[:300]
            raise BadScene(
                f"s3://{self.root}: {reason}; look at the bucket's name and at AWS_ACCESS_KEY_ID, AWS_PROFILE,"
                " AWS_REGION, AWS_S3_ENDPOINT"
            ) from error


@functools.lru_cache(maxsize=8)
def _s3(bucket: str) -> Any:
    from pyarrow import fs
    from rasterio._env import get_gdal_config

    endpoint = get_gdal_config("AWS_S3_ENDPOINT")
    scheme = "https" if get_gdal_config("AWS_HTTPS") in (None, True, "YES", "ON") else "http"
    found = re.fullmatch(r"(?:(https?)://)?(.+)", endpoint or "")
    if found:
        scheme, endpoint = found.group(1) or scheme, found.group(2).rstrip("/")
    region = get_gdal_config("AWS_REGION") or get_gdal_config("AWS_DEFAULT_REGION")
    try:
        region = region or (None if endpoint else fs.resolve_s3_region(bucket))
        # Delayed, a small object takes one request and not three.
        return fs.S3FileSystem(endpoint_override=endpoint, scheme=scheme, region=region, allow_delayed_open=True)
    except OSError as error:
        raise BadScene(f"s3://{bucket}: {' '.join(str(error).split())[:300]}") from error


# Files ----------------------------------------------------------------------------------------------------------------


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Where to write what takes its name when all of it is written; nothing is left of what failed."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=PART, suffix=".part")
    os.close(handle)
    try:
        yield Path(name)
        # mkstemp makes files that only their owner reads; the web server may be another user.
        os.chmod(name, 0o644)
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)


@contextmanager
def whole_text(path: Path) -> Iterator[IO[str]]:
    """The same for text."""
    with whole(path) as part, part.open("w", encoding="utf-8") as file:
        yield file
