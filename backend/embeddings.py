"""Embeddings of images that were seen before: in memory, and on disk where all server processes find them.

An embedding is named by what went into it: the image's bytes, the weights, the scale at which they saw it, and our own
version. So nothing here grows stale, and what no longer fits goes by last use. On disk each is one safetensors file in
``DATA_DIR/embeddings``, written whole or not at all, with a check sum: what cannot be read is a miss, and removed.
Nothing here raises; an embedding that is not kept is made again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import threading
import zlib
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import filelock
import numpy as np
import safetensors
import safetensors.numpy
from numpy.typing import NDArray

from . import __version__
from .segmenter import Embedding

log = logging.getLogger(__name__)

_LOCK_S = 5.0
"""How long one process waits for another that is tidying up, in seconds. Then the embedding is not kept."""


@dataclass(frozen=True, slots=True)
class EmbeddingKey:
    """All that an embedding depends on."""

    image: str
    """SHA-256 of the image's file."""

    weights: str
    """Version of the weights that make embeddings."""

    scale: float = 1.0
    """How much the image was enlarged."""

    def __str__(self) -> str:
        return f"{__version__}/{self.weights}/{self.image}/{self.scale:g}"


class EmbeddingCache:
    """The embeddings used last, bounded by the memory they take. May be shared by threads."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._bytes = 0
        self._items: OrderedDict[EmbeddingKey, Embedding] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: EmbeddingKey) -> Embedding | None:
        """The embedding of that name, or None."""
        with self._lock:
            found = self._items.get(key)
            if found is not None:
                self._items.move_to_end(key)
            return found

    def put(self, key: EmbeddingKey, embedding: Embedding) -> None:
        """Keep an embedding, at the cost of those not used for longest; one larger than the whole cache is not kept."""
        with self._lock:
            old = self._items.pop(key, None)
            self._bytes -= old.nbytes if old else 0
            if embedding.nbytes > self._max_bytes:
                return
            while self._bytes + embedding.nbytes > self._max_bytes:
                _, dropped = self._items.popitem(last=False)
                self._bytes -= dropped.nbytes
            self._items[key] = embedding
            self._bytes += embedding.nbytes

    @property
    def nbytes(self) -> int:
        """Memory in use, in bytes."""
        return self._bytes


class EmbeddingFiles:
    """Embeddings in a folder that processes share, bounded by the bytes of its files; ``max_bytes`` 0 keeps none."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.folder = folder
        self.max_bytes = max_bytes
        self._lock = filelock.FileLock(folder / ".lock", timeout=_LOCK_S)
        self._has_failed = False

    def __contains__(self, key: EmbeddingKey) -> bool:
        return self.max_bytes > 0 and self._path(key).is_file()

    def get(self, key: EmbeddingKey) -> Embedding | None:
        """The embedding of that name, or None; a damaged one is removed."""
        if self.max_bytes <= 0:
            return None
        path = self._path(key)
        try:
            if not path.is_file():
                return None
            with safetensors.safe_open(str(path), "np") as file:
                notes = file.metadata() or {}
                features = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            if notes.get("key") != str(key) or notes.get("sum") != _sum(features):
                raise ValueError("its content is not what was written")
            height, width = json.loads(notes["image_hw"])
            embedding = Embedding(features, (int(height), int(width)), notes["version"])
            os.utime(path)
        except FileNotFoundError:
            return None  # another process removed it meanwhile
        except (OSError, safetensors.SafetensorError, ValueError, KeyError, TypeError) as error:
            log.warning("the kept embedding %s is damaged (%s); it is made again", path, error)
            _remove(path)
            return None
        return embedding

    def put(self, key: EmbeddingKey, embedding: Embedding) -> None:
        """Keep an embedding, at the cost of those not used for longest."""
        if not 0 < embedding.nbytes < self.max_bytes:
            return
        path = self._path(key)
        scratch = self.folder / f".{path.stem}.{os.getpid()}.{threading.get_ident()}"
        features = {name: np.ascontiguousarray(array) for name, array in embedding.features.items()}
        notes = {
            "key": str(key),
            "version": embedding.version,
            "image_hw": json.dumps(embedding.image_hw),
            "sum": _sum(features),
        }
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            content = safetensors.numpy.save(features, notes)
            with self._lock:
                # Room is made first, so that not even for a moment there is more than allowed.
                if not self._make_room(len(content)):
                    return
                scratch.write_bytes(content)
                os.replace(scratch, path)
            self._has_failed = False
        except (OSError, filelock.Timeout) as error:
            _remove(scratch)
            if not self._has_failed:
                log.warning(
                    "embeddings cannot be kept in %s (%s); they are made again where needed", self.folder, error
                )
            self._has_failed = True

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(size for _, size, _ in self._files())

    def _make_room(self, needed: int) -> bool:
        """Remove what was used longest ago until so many bytes more fit."""
        files = sorted(self._files())
        total = sum(size for _, size, _ in files)
        for _, size, path in files:
            # Only who holds the lock writes: what is half written is of a process that was killed.
            if total + needed > self.max_bytes or path.name.startswith("."):
                _remove(path)
                total -= size
        return total + needed <= self.max_bytes

    def _files(self) -> list[tuple[float, int, Path]]:
        """Time of last use, size in bytes, and path of each file."""
        found = []
        try:
            with os.scandir(self.folder) as entries:
                for entry in entries:
                    if entry.name == ".lock":
                        continue
                    try:
                        status = entry.stat(follow_symlinks=False)
                    except FileNotFoundError:
                        continue
                    found.append((status.st_mtime, status.st_size, Path(entry.path)))
        except FileNotFoundError:
            pass
        return found

    def _path(self, key: EmbeddingKey) -> Path:
        return self.folder / f"{hashlib.sha256(str(key).encode()).hexdigest()[:40]}.safetensors"


class Embeddings:
    """Both caches as one: memory first, then disk."""

    def __init__(self, folder: Path, *, memory_bytes: int, disk_bytes: int) -> None:
        self.memory = EmbeddingCache(memory_bytes)
        self.disk = EmbeddingFiles(folder, disk_bytes)

    def __contains__(self, key: EmbeddingKey) -> bool:
        """Whether it is kept where it stays longest: on disk, or in memory where none are kept on disk."""
        return key in self.disk if self.disk.max_bytes else self.memory.get(key) is not None

    def get(self, key: EmbeddingKey) -> Embedding | None:
        """The embedding of that name, or None."""
        found = self.memory.get(key)
        if found is None and (found := self.disk.get(key)) is not None:
            self.memory.put(key, found)
        return found

    def put(self, key: EmbeddingKey, embedding: Embedding) -> None:
        """Keep an embedding in memory and on disk."""
        self.memory.put(key, embedding)
        self.disk.put(key, embedding)


def _sum(features: dict[str, NDArray[np.generic]]) -> str:
    """Tells whether the arrays are those that were written; against accidents, not against people."""
    total = 0
    for name in sorted(features):
        array = features[name]
        total = zlib.crc32(f"{name}{array.dtype.str}{array.shape}".encode(), total)
        total = zlib.crc32(np.ascontiguousarray(array).data, total)
    return f"{total:08x}"


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        log.warning("%s cannot be removed: %s", path, error)
