"""Where tiles and trained weights are kept: a folder, or a bucket of Amazon's, Google's or Microsoft's object store.

Keys and endpoint come from the environment that GDAL reads scenes with (`_SECRETS`), never from a request or a task.
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

_BUCKET = re.compile(r"(s3|gs|az)://([a-z0-9][a-z0-9._-]{1,62})((?:/[^/?#]+)*)/?")
_SECRETS = {
    "s3": "AWS_ACCESS_KEY_ID, AWS_PROFILE, AWS_REGION, AWS_S3_ENDPOINT",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS",
    "az": "AZURE_STORAGE_CONNECTION_STRING, or AZURE_STORAGE_ACCOUNT with AZURE_STORAGE_ACCESS_KEY",
}


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
    """The store of that address: ``s3://bucket/prefix``, ``gs://…``, ``az://…``, else a folder. Raises BadScene."""
    text = str(address)
    if "://" not in text:
        return Folder(Path(address))
    found = _BUCKET.fullmatch(text)
    if not found:
        raise BadScene(
            f"files are uploaded to s3://bucket/prefix, gs://… or az://…, got {text.split('?')[0][:100]!r}"
            " (other stores: by their S3 endpoint in AWS_S3_ENDPOINT)"
        )
    scheme, bucket, prefix = found.groups()
    return Bucket(bucket + prefix, scheme)


def label_studio_address(address: str) -> str:
    """How Label Studio spells the address of what lies in a bucket."""
    return re.sub(r"^az://", "azure-blob://", address)


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

    scheme: str = "s3"
    """``s3``, ``gs`` or ``az``."""

    def names(self, folder: str) -> set[str]:
        from pyarrow import fs

        at = f"{self.root}/{folder}".rstrip("/")
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
            raise BadScene(f"{self.scheme}://{self.root}/{name} is larger than {max_bytes / 2**20:g} MB")
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
        return _files_of(self.scheme, self.root.partition("/")[0])

    @contextmanager
    def _said(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            reason = " ".join(str(error).split())[:300]
            raise BadScene(
                f"{self.scheme}://{self.root}: {reason}; look at the bucket's name and at {_SECRETS[self.scheme]}"
            ) from error


@functools.lru_cache(maxsize=8)
def _files_of(scheme: str, bucket: str) -> Any:
    """Apache Arrow's file system for a bucket."""
    try:
        match scheme:
            case "gs":
                return _google()
            case "az":
                return _azure()
            case _:
                return _s3(bucket)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise BadScene(f"{scheme}://{bucket}: {reason}; look at {_SECRETS[scheme]}") from error
    except ImportError as error:
        raise BadScene(
            f"{scheme}://{bucket}: this pyarrow was built without that store; pip install pyarrow"
        ) from error


def _s3(bucket: str) -> Any:
    from pyarrow import fs

    scheme, endpoint = _endpoint(_setting("AWS_S3_ENDPOINT"))
    if not scheme:
        scheme = "https" if _setting("AWS_HTTPS").upper() in ("", "YES", "ON", "TRUE") else "http"
    region: str | None = _setting("AWS_REGION") or _setting("AWS_DEFAULT_REGION") or None
    if not region and not endpoint:
        region = fs.resolve_s3_region(bucket)
    # Delayed, a small object takes one request and not three.
    return fs.S3FileSystem(endpoint_override=endpoint, scheme=scheme, region=region, allow_delayed_open=True)


def _google() -> Any:
    from pyarrow import fs

    # GDAL's names. Without a key Google's own rules find one, as they do for GDAL.
    scheme, endpoint = _endpoint(_setting("CPL_GS_ENDPOINT"))
    is_anonymous = _setting("GS_NO_SIGN_REQUEST").upper() in ("YES", "ON", "TRUE")
    return fs.GcsFileSystem(anonymous=is_anonymous, scheme=scheme or "https", endpoint_override=endpoint)


def _azure() -> Any:
    from pyarrow import fs

    said = dict(
        part.strip().partition("=")[::2] for part in _setting("AZURE_STORAGE_CONNECTION_STRING").split(";") if part
    )
    account = said.get("AccountName") or _setting("AZURE_STORAGE_ACCOUNT")
    if not account:
        raise ValueError("no storage account is named")
    key = said.get("AccountKey") or _setting("AZURE_STORAGE_ACCESS_KEY")
    token = said.get("SharedAccessSignature") or _setting("AZURE_STORAGE_SAS_TOKEN")
    scheme, authority = _endpoint(said.get("BlobEndpoint", ""))
    return fs.AzureFileSystem(
        account, account_key=key or None, sas_token=None if key else token or None,
        # The emulator's address has the account behind it, and so has Arrow's for what is no name of Azure's.
        blob_storage_authority=authority and authority.partition("/")[0], blob_storage_scheme=scheme,
        dfs_storage_authority=authority and authority.partition("/")[0], dfs_storage_scheme=scheme,
    )  # fmt: skip


def _setting(name: str) -> str:
    """What GDAL is told, by the environment or in the program."""
    from rasterio._env import get_gdal_config

    value = get_gdal_config(name)
    if isinstance(value, bool):
        return "YES" if value else "NO"
    return "" if value is None else str(value)


def _endpoint(text: str) -> tuple[str | None, str | None]:
    """Scheme and the rest of an address, each None where it does not say."""
    found = re.fullmatch(r"(?:(https?)://)?(.+?)/?", text)
    return (found.group(1), found.group(2)) if found else (None, None)


# Files ----------------------------------------------------------------------------------------------------------------


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Where to write what takes its name when all of it is written; nothing is left of what failed."""
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=PART, suffix=".part")
    except OSError as error:
        error.filename = str(path)  # what the person asked for, not a name that they never saw
        raise
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
