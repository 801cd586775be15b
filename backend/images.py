"""Task images: fetched only from where they may come, decoded as a browser shows them, kept a while.

A task's image address is written by whoever made the task, so it is not trusted: no file is read but a tile of ours or
one under the local files folder, and no host is asked but Label Studio, those in GEOPRELABEL_IMAGE_HOSTS, and public
ones. The connection goes to the very address that was checked, so a name that changes its answer in between gains
nothing; for the same reason no proxy is used.
"""

from __future__ import annotations

import base64
import binascii
import functools
import hashlib
import io
import ipaddress
import logging
import re
import socket
import ssl
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from contextlib import suppress
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import httpcore
import httpx
import numpy as np
import PIL.Image
from numpy.typing import NDArray

from .client import Elsewhere, FileTooLarge, LabelStudio
from .errors import BadImage, BadScene, ImageRefused, LabelStudioDenied, LabelStudioError
from .flight import SingleFlight
from .settings import Settings
from .stores import store_at
from .tiles import SceneTiles

log = logging.getLogger(__name__)

_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
"""What browsers show, and TIFF. Pillow's other readers are left out: some of them run programs."""

_STORAGE_SCHEMES = ("s3", "gs", "azure-blob")
_DATA_PATH = r"/data/upload/|/data/local-files/?(?=$|\?)|/storage-data/uploaded/"
_RESOLVE_PATH = r"/(?:tasks|projects)/\d+/(?:resolve|presign)/"
"""Where Label Studio hands out files for a token. Its other routes are never asked with one on a task's behalf."""

_TILE_PATH = re.compile(r"/tiles/([^/]+)/([^/]+|\d+/\d+/\d+\.\w+)$")
_XYZ_NAME = re.compile(r"\d{1,2}/\d{1,10}/\d{1,10}\.\w{3,4}")
_TILE_NAME = re.compile(r"[\w][\w.+@ -]{0,199}")
_LOOPBACK_HOSTS = ("localhost", "127.0.0.1", "::1")
_REDIRECT_STATUSES = frozenset({301, 302, 303, 307, 308})
_REDIRECTS_MAX = 3
_CONNECT_TIMEOUT_S = 5.0
_READ_TIMEOUT_S = 15.0
_FETCH_TIMEOUT_S = 60.0
_KEPT_S = 300.0
"""How long a decoded image counts as fresh; tiles and local files are looked at each time."""

_deadline_s: ContextVar[float] = ContextVar("deadline_s", default=float("inf"))
"""When the fetch that this thread is at has to be over, in monotonic seconds."""

_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_GLOBAL_UNICAST = ipaddress.ip_network("2000::/3")
_EXIF_ORIENTATION = 0x0112
_UPRIGHT = {
    2: PIL.Image.Transpose.FLIP_LEFT_RIGHT,
    3: PIL.Image.Transpose.ROTATE_180,
    4: PIL.Image.Transpose.FLIP_TOP_BOTTOM,
    5: PIL.Image.Transpose.TRANSPOSE,
    6: PIL.Image.Transpose.ROTATE_270,
    7: PIL.Image.Transpose.TRANSVERSE,
    8: PIL.Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True, slots=True, eq=False)
class Image:
    """An image as the annotator sees it."""

    rgb: NDArray[np.uint8]
    """Red, green, blue, (H, W, 3), 0…255; read-only, as it is shared."""

    key: str
    """SHA-256 of the file, in hex."""


@dataclass(frozen=True, slots=True)
class _Kept:
    image: Image
    stamp: tuple[int, ...]
    """What tells whether a file on disk is still the same; empty for all else."""

    until_s: float


class ImageStore:
    """Fetches and decodes task images; keeps the last ones. May be shared by threads.

    ``cache_mb`` is the memory for decoded images, in MB (2^20 bytes).
    """

    def __init__(self, settings: Settings, label_studio: LabelStudio | None, *, cache_mb: float = 128.0) -> None:
        self._label_studio = label_studio
        self._local_files = settings.local_files_document_root
        self._tiles_dir = settings.tiles_dir
        self._scene_tiles = SceneTiles(settings.scenes_dir)
        self._tile_hosts = _tile_hosts(settings)
        self._buckets = settings.image_buckets
        self._max_bytes = settings.image_max_mb * 2**20
        self._max_pixels = settings.image_max_megapixels * 1_000_000
        at = urlsplit(label_studio.url if label_studio else settings.label_studio_url)
        prefix = re.escape(at.path.rstrip("/"))
        self._data_path = re.compile(f"(?:{prefix})?(?:{_DATA_PATH})")
        self._handed_out = re.compile(f"(?:{prefix})?(?:{_DATA_PATH}|{_RESOLVE_PATH})")
        self._label_studio_hosts = frozenset({at.hostname} - {None})
        self._image_hosts = frozenset(settings.image_hosts)
        self._web = _Web([*settings.image_hosts, *([_host_port(at.geturl())] if at.hostname else [])], self._max_bytes)
        self._cache_bytes = int(cache_mb * 2**20)
        self._kept: OrderedDict[tuple[str, int | None], _Kept] = OrderedDict()
        self._kept_bytes = 0
        self._flights: SingleFlight[Image] = SingleFlight()
        self.on_asked: Callable[[bool], None] = lambda is_kept: None
        """Told of each image that is asked for whether it was kept."""
        self._lock = threading.Lock()
        # Pillow warns above its own limit; ours is checked before any pixel is decoded.
        if PIL.Image.MAX_IMAGE_PIXELS is not None:
            PIL.Image.MAX_IMAGE_PIXELS = max(PIL.Image.MAX_IMAGE_PIXELS, self._max_pixels)

    def fetch(self, url: str, *, task_id: int | None = None) -> Image:
        """The image behind a task's address. ``task_id`` is needed for ``s3://``, ``gs://`` and ``azure-blob://``.

        Raises ImageRefused for what is not fetched (with what to set to have it fetched), BadImage for what cannot be
        fetched or decoded, LabelStudioDenied where Label Studio does not take the token. Errors are not kept.
        """
        if not isinstance(url, str) or not url:
            raise BadImage(f"a task's image must be an address, got {url!r:.80}")
        if not isinstance(task_id, int) or isinstance(task_id, bool) or not 0 <= task_id < 2**63:
            task_id = None
        # A storage address means another file in another project; every other address means the same for all tasks.
        name = url if len(url) < 2048 else hashlib.sha256(url.encode("utf-8", "surrogatepass")).hexdigest()
        key = (name, task_id if url.partition(":")[0].lower() in _STORAGE_SCHEMES else None)
        path = self._local_path(url)
        stamp = _stamp(path)
        with self._lock:
            kept = self._kept.get(key)
            if kept and kept.stamp == stamp and time.monotonic() < kept.until_s:
                self._kept.move_to_end(key)
                self.on_asked(True)
                return kept.image
        self.on_asked(False)

        def load() -> Image:
            image = self._load(url, path, task_id)
            with self._lock:
                self._keep(key, _Kept(image, stamp, time.monotonic() + _KEPT_S))
            return image

        return self._flights.do(key, load)

    @property
    def nbytes(self) -> int:
        """Memory that kept images take, in bytes."""
        return self._kept_bytes

    @property
    def limit_mb(self) -> int:
        """Memory that kept images may take, in MB."""
        return self._cache_bytes // 2**20

    def close(self) -> None:
        """Let go of all connections and kept images."""
        self._web.close()
        self._scene_tiles.close()
        with self._lock:
            self._kept.clear()
            self._kept_bytes = 0

    def _keep(self, key: tuple[str, int | None], kept: _Kept) -> None:
        old = self._kept.pop(key, None)
        self._kept_bytes -= old.image.rgb.nbytes if old else 0
        if kept.image.rgb.nbytes > self._cache_bytes:
            return
        self._kept[key] = kept
        self._kept_bytes += kept.image.rgb.nbytes
        while self._kept_bytes > self._cache_bytes:
            _, oldest = self._kept.popitem(last=False)
            self._kept_bytes -= oldest.image.rgb.nbytes

    def _load(self, url: str, path: Path | None, task_id: int | None) -> Image:
        content = (self._made(path) or self._read_file(path, url)) if path else self._bytes(url, task_id)
        shown = shown_url(url)
        rgb = decode(content, name=shown, max_pixels=self._max_pixels)
        return Image(rgb=rgb, key=hashlib.sha256(content).hexdigest())

    def _bytes(self, url: str, task_id: int | None) -> bytes:
        scheme = url.partition(":")[0].lower() if re.match(r"[A-Za-z][A-Za-z0-9+.-]*:", url) else ""
        if scheme == "data":
            return self._data_bytes(url)
        _refuse_tricks(url)
        if scheme == "s3" and (bucket := next((one for one in self._buckets if url.startswith(f"{one}/")), "")):
            return self._from_bucket(bucket, url)
        if scheme in _STORAGE_SCHEMES:
            if task_id is None:
                raise BadImage(f"{shown_url(url)}: a storage address can be resolved for a stored task only, by its id")
            return self._from_label_studio(url, resolve_for=task_id)
        if not scheme:
            if self._handed_out.match(url):
                return self._from_label_studio(_plain_path(url))
            raise ImageRefused(
                f"{shown_url(url)}: not an address that images are fetched from (http, https, s3, gs, azure-blob, data,"
                " or a /data/… path of Label Studio)"
            )
        if scheme not in ("http", "https"):
            raise ImageRefused(f"{shown_url(url)}: {scheme}: is not fetched; serve the image over http or https")
        path = self._label_studio_path(url)
        return self._from_label_studio(path) if path else self._web.get(url)

    def _label_studio_path(self, url: str) -> str | None:
        """Path and query of a file that Label Studio hands out for a token; None for any other address."""
        try:
            parts = urlsplit(url)
        except ValueError as error:
            raise ImageRefused(f"{shown_url(url)}: not an address") from error
        target = parts.path + (f"?{parts.query}" if parts.query else "")
        if self._label_studio is None or not self._handed_out.match(target):
            return None
        return _plain_path(target) if self._is_label_studios(url) else None

    def _is_label_studios(self, url: str) -> bool:
        """Whether an address with one of Label Studio's file paths means Label Studio.

        It writes its own idea of its address, which from inside a container is not where it answers. The path alone
        counts then, and it is asked where LABEL_STUDIO_URL says.
        """
        if self._label_studio is not None and self._label_studio.owns(url):
            return True
        host = urlsplit(url).hostname or ""
        if not self._image_hosts.isdisjoint({host, _host_port(url)}):
            return False
        return host in self._label_studio_hosts or host in _LOOPBACK_HOSTS

    def _from_label_studio(self, address: str, *, resolve_for: int | None = None) -> bytes:
        shown = shown_url(address)
        if self._label_studio is None:
            raise BadImage(f"{shown}: only Label Studio has this image; set LABEL_STUDIO_URL and LABEL_STUDIO_API_KEY")
        try:
            if resolve_for is None:
                got = self._label_studio.get_file(address, self._max_bytes)
            else:
                got = self._label_studio.resolve(resolve_for, address, max_bytes=self._max_bytes)
        except LabelStudioDenied:
            raise
        except FileTooLarge as error:
            raise _too_large(shown, self._max_bytes) from error
        except LabelStudioError as error:
            raise BadImage(f"{shown} cannot be fetched: {error}") from error
        return self._web.get(got.url) if isinstance(got, Elsewhere) else got

    def _from_bucket(self, bucket: str, url: str) -> bytes:
        """By the operator's own keys: only what lies in the buckets that they named."""
        try:
            content = store_at(bucket).get(url.removeprefix(f"{bucket}/"), max_bytes=self._max_bytes)
        except BadScene as error:
            raise BadImage(f"{shown_url(url)} cannot be fetched: {error}") from error
        if content is None:
            raise BadImage(f"{shown_url(url)}: no such object in the bucket")
        return content

    def _data_bytes(self, url: str) -> bytes:
        found = re.match(r"data:image/[\w.+-]+(?:;[\w.+-]+=[\w.+-]+)*;base64,", url[:200], re.IGNORECASE)
        if not found:
            raise ImageRefused(f"{shown_url(url)}: of data: addresses only data:image/…;base64, is read")
        if (len(url) - found.end()) * 3 // 4 > self._max_bytes:
            raise _too_large(shown_url(url), self._max_bytes)
        try:
            return base64.b64decode("".join(unquote(url[found.end() :]).split()), validate=True)
        except (binascii.Error, ValueError) as error:
            raise BadImage(f"{shown_url(url)}: not valid base64") from error

    # Files of this machine

    def _local_path(self, url: str) -> Path | None:
        """The file on this machine that the address stands for, or None. Raises ImageRefused where it leads outside."""
        if not re.match(r"/(?!/)|https?:", url, re.IGNORECASE):
            return None
        _refuse_tricks(url)
        try:
            parts = urlsplit(url)
            host = _host_port(url)
        except ValueError as error:
            raise ImageRefused(f"{shown_url(url)}: not an address") from error
        if parts.scheme and host in self._tile_hosts and (found := _TILE_PATH.search(parts.path)):
            return self._tile_path(unquote(found.group(1)), unquote(found.group(2)), url)
        is_document = self._data_path.match(parts.path) and parts.path.rstrip("/").endswith("/local-files")
        if self._local_files and is_document and (not parts.scheme or self._is_label_studios(url)):
            return self._document(url, parts.query)
        return None

    def _tile_path(self, scene: str, name: str, url: str) -> Path:
        is_name = _TILE_NAME.fullmatch(name) or _XYZ_NAME.fullmatch(name)
        if not (_TILE_NAME.fullmatch(scene) and is_name) or ".." in (scene, name):
            raise ImageRefused(f"{shown_url(url)}: not the name of a tile")
        path = (self._tiles_dir / scene / name).resolve()
        if not path.is_relative_to(self._tiles_dir.resolve()):
            raise ImageRefused(f"{shown_url(url)}: leads out of the tiles folder {self._tiles_dir}")
        if not _is_file(path) and self._scene_tiles.etag(scene, name) is None:
            raise BadImage(f"{shown_url(url)}: no such tile in {self._tiles_dir}; is GEOPRELABEL_DATA_DIR right?")
        return path

    def _made(self, path: Path) -> bytes | None:
        """A tile that is made when it is asked for; None for a file that is there."""
        if _is_file(path) or not path.is_relative_to(self._tiles_dir.resolve()):
            return None
        scene, _, name = path.relative_to(self._tiles_dir.resolve()).as_posix().partition("/")
        try:
            return self._scene_tiles.image(scene, name)
        except BadScene as error:
            raise BadImage(str(error)) from error

    def _document(self, url: str, query: str) -> Path | None:
        assert self._local_files is not None
        name = parse_qs(query, keep_blank_values=True).get("d", [""])[0].replace("\\", "/").lstrip("/")
        root = self._local_files.resolve()
        path = (root / name).resolve()
        if path.is_relative_to(root) and _is_file(path):
            return path
        # The folder may be Label Studio's alone; it has its own rules for what lies where.
        if self._label_studio is not None:
            return None
        raise BadImage(f"{shown_url(url)}: no file {name!r} under LOCAL_FILES_DOCUMENT_ROOT {self._local_files}")

    def _read_file(self, path: Path, url: str) -> bytes:
        try:
            with path.open("rb") as file:
                content = file.read(self._max_bytes + 1)
        except OSError as error:
            raise BadImage(f"{shown_url(url)} cannot be read: {error.strerror or type(error).__name__}") from error
        if len(content) > self._max_bytes:
            raise _too_large(shown_url(url), self._max_bytes)
        return content


@functools.cache
def _tls() -> ssl.SSLContext:
    return httpx.create_ssl_context()


class _Web:
    """HTTP to hosts that images may come from, by the address that was checked."""

    def __init__(self, trusted_hosts: Iterable[str], max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._pool = httpcore.ConnectionPool(
            ssl_context=_tls(),
            max_connections=32,
            keepalive_expiry=30.0,
            network_backend=_CheckedAddresses(trusted_hosts),
        )

    def close(self) -> None:
        self._pool.close()

    def get(self, url: str) -> bytes:
        """The body at that address. Raises ImageRefused or BadImage; follows three redirects, each checked anew."""
        shown = shown_url(url)
        deadline = _deadline_s.set(time.monotonic() + _FETCH_TIMEOUT_S)
        try:
            for _ in range(_REDIRECTS_MAX + 1):
                location, content = self._once(url)
                if not location:
                    return content
                url = str(httpx.URL(url).join(location))
        except (httpcore.NetworkError, httpcore.TimeoutException, httpcore.ProtocolError, httpcore.ProxyError) as error:
            reason = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
            raise BadImage(f"{shown} cannot be fetched ({reason[:200]})") from error
        except (httpx.InvalidURL, httpcore.UnsupportedProtocol, UnicodeError) as error:
            raise ImageRefused(f"{shown_url(url)}: not an address that can be fetched") from error
        finally:
            _deadline_s.reset(deadline)
        raise BadImage(f"{shown}: more than {_REDIRECTS_MAX} redirects")

    def _once(self, url: str) -> tuple[str, bytes]:
        """Where a redirect leads, or else the body."""
        shown, target = shown_url(url), httpx.URL(url)
        if target.scheme not in ("http", "https") or not target.host:
            raise ImageRefused(f"{shown}: images are fetched over http and https only")
        if target.userinfo:
            raise ImageRefused(f"{shown}: addresses with a user and a password are not fetched")
        headers = [
            (b"Host", target.netloc),
            (b"User-Agent", b"geoprelabel"),
            (b"Accept", b"image/*, */*;q=0.5"),
            # What is counted is what comes: a small body cannot unfold into a large one.
            (b"Accept-Encoding", b"identity"),
        ]
        timeout = {"connect": _CONNECT_TIMEOUT_S, **dict.fromkeys(("read", "write", "pool"), _READ_TIMEOUT_S)}
        origin_url = httpcore.URL(
            scheme=target.raw_scheme, host=target.raw_host, port=target.port, target=target.raw_path
        )
        with self._pool.stream("GET", origin_url, headers=headers, extensions={"timeout": timeout}) as response:
            answered = {name.lower(): value for name, value in response.headers}
            if response.status in _REDIRECT_STATUSES and answered.get(b"location"):
                return answered[b"location"].decode("latin-1"), b""
            if response.status != 200:
                raise BadImage(f"{shown} cannot be fetched: the server answered {response.status}")
            length = answered.get(b"content-length", b"")
            if length.isdigit() and int(length) > self._max_bytes:
                raise _too_large(shown, self._max_bytes)
            parts, size = [], 0
            for part in response.iter_stream():
                size += len(part)
                if size > self._max_bytes:
                    raise _too_large(shown, self._max_bytes)
                parts.append(part)
            return "", b"".join(parts)


class _CheckedAddresses(httpcore.NetworkBackend):
    """Opens connections to public addresses, and to any address of the hosts that were named."""

    def __init__(self, trusted_hosts: Iterable[str]) -> None:
        self._trusted = frozenset(host.lower() for host in trusted_hosts)
        self._tcp = httpcore.SyncBackend()

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.NetworkStream:
        failed: Exception | None = None
        for address in self._addresses(host, port):
            try:
                stream = self._tcp.connect_tcp(address, port, _left_s(timeout), local_address, socket_options)
                return _TimedStream(stream)
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as error:
                failed = error
        raise failed or httpcore.ConnectError(f"{host} has no address")

    def connect_unix_socket(
        self, path: str, timeout: float | None = None, socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None
    ) -> httpcore.NetworkStream:
        raise httpcore.ConnectError("images are not fetched from sockets")

    def sleep(self, seconds: float) -> None:
        self._tcp.sleep(seconds)

    def _addresses(self, host: str, port: int) -> list[str]:
        """Addresses of a host, to connect to. Raises ImageRefused where one of them is not public."""
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            raise httpcore.ConnectError(f"no address for the name {host[:100]}") from error
        addresses = list(dict.fromkeys(str(info[4][0]) for info in found))
        bare = host.lower().strip("[]")
        if self._trusted.isdisjoint({bare, f"{bare}:{port}", f"[{bare}]", f"[{bare}]:{port}"}):
            for address in addresses:
                if not is_public(address):
                    raise ImageRefused(
                        f"{host[:100]}:{port} is at {address}, which is not a public address; if images are to come"
                        f" from there, set GEOPRELABEL_IMAGE_HOSTS={host[:100]}:{port}"
                    )
        return addresses


class _TimedStream(httpcore.NetworkStream):
    """A connection whose reads and writes all end with the fetch's time, however little each of them brings."""

    def __init__(self, stream: httpcore.NetworkStream) -> None:
        self._stream = stream

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self._stream.read(max_bytes, _left_s(timeout))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._stream.write(buffer, _left_s(timeout))

    def close(self) -> None:
        self._stream.close()

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.NetworkStream:
        # A handshake is many reads, and its timeout is for each of them; TLS takes the socket itself away.
        with self._stream.get_extra_info("socket").dup() as twin:

            def hang_up() -> None:
                with suppress(OSError):
                    twin.shutdown(socket.SHUT_RDWR)

            limit = threading.Timer(_left_s(timeout), hang_up)
            limit.start()
            try:
                return _TimedStream(self._stream.start_tls(ssl_context, server_hostname, timeout))
            finally:
                limit.cancel()

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)


def _left_s(timeout: float | None) -> float:
    """The timeout, or what is left of the fetch's time, in seconds. Raises ReadTimeout where nothing is."""
    left_s = _deadline_s.get() - time.monotonic()
    if left_s <= 0:
        raise httpcore.ReadTimeout(f"not there after {_FETCH_TIMEOUT_S:g} s")
    return min(left_s, _READ_TIMEOUT_S if timeout is None else timeout)


def is_public(address: str) -> bool:
    """Whether an IP address belongs to the internet at large: not private, loopback, link-local, shared or reserved."""
    try:
        ip = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    if isinstance(ip, ipaddress.IPv6Address):
        # An IPv4 address can ride inside an IPv6 one, and the packets go there.
        inner = [ip.ipv4_mapped, ip.sixtofour, *(ip.teredo or ())]
        if ip in _NAT64:
            inner.append(ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF))
        riding = [one for one in inner if one is not None]
        if riding:
            return all(is_public(str(one)) for one in riding)
        if ip not in _GLOBAL_UNICAST:
            return False
    return ip.is_global and not ip.is_multicast


def decode(content: bytes, *, name: str, max_pixels: int) -> NDArray[np.uint8]:
    """Pixels of an image file as a browser shows them, (H, W, 3), read-only.

    Turned upright by EXIF; transparent parts over white; 16 bits scaled to 8; of an animation the first frame. Raises
    ImageRefused above ``max_pixels`` (read from the header), BadImage where it cannot be decoded. ``name`` is for the
    message.
    """
    try:
        with PIL.Image.open(io.BytesIO(content), formats=_FORMATS) as image:
            columns, rows = image.size
            if columns * rows > max_pixels:
                raise ImageRefused(
                    f"{name} has {columns} × {rows} pixels, more than {max_pixels / 1e6:g} megapixels;"
                    " cut it into tiles (geoprelabel ingest), or raise GEOPRELABEL_IMAGE_MAX_MEGAPIXELS"
                )
            image.load()
            upright = _UPRIGHT.get(_orientation(image))
            rgb = _rgb(image, name)
            if upright is not None:
                rgb = rgb.transpose(upright)
            pixels: NDArray[np.uint8] = np.array(rgb, dtype=np.uint8)
    except BadImage:
        raise
    except PIL.UnidentifiedImageError as error:
        raise BadImage(f"{name} is not an image that can be read: {_begins(content)}") from error
    except (PIL.Image.DecompressionBombError, PIL.Image.DecompressionBombWarning) as error:
        raise ImageRefused(f"{name} has far more than {max_pixels / 1e6:g} megapixels") from error
    except Exception as error:
        # Damaged files make Pillow raise nearly anything, struct.error and KeyError included.
        raise BadImage(f"{name} cannot be decoded ({type(error).__name__}: {str(error)[:160]})") from error
    pixels.setflags(write=False)
    return pixels


def shown_url(url: str) -> str:
    """An address as it may be shown: without user, password, query and fragment, at most 200 characters."""
    if url[:5].lower() == "data:":
        return f"{url[:30].partition(',')[0]},… ({len(url)} characters)"
    path, _, query = url.partition("#")[0].partition("?")
    shown = re.sub(r"(?<=//)[^/@]*@", "", path)
    # Which file is meant stands in the query there, and is no secret.
    if path.rstrip("/").endswith("/data/local-files") and (named := parse_qs(query).get("d")):
        shown += f"?d={named[0]}"
    return "".join(letter if letter.isprintable() else "?" for letter in shown[:200])


def _rgb(image: PIL.Image.Image, name: str) -> PIL.Image.Image:
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        wide = np.asarray(image).astype(np.uint32)
        # As browsers do: 65535 is white. Pillow's own conversion cuts off at 255.
        return PIL.Image.fromarray(((np.clip(wide, 0, 65535) + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise BadImage(f"{name} holds 32-bit samples; cut it into 8-bit tiles (geoprelabel ingest)")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        seen = image.convert("RGBA")
        white = PIL.Image.new("RGBA", seen.size, (255, 255, 255, 255))
        return PIL.Image.alpha_composite(white, seen).convert("RGB")
    return image.convert("RGB")


def _orientation(image: PIL.Image.Image) -> int:
    try:
        return int(image.getexif().get(_EXIF_ORIENTATION, 1))
    except Exception:
        # Browsers show an image whose EXIF block is damaged, as it lies in the file.
        log.debug("damaged EXIF block", exc_info=True)
        return 1


def _begins(content: bytes) -> str:
    head = content[:200].lstrip().lower()
    if not content:
        return "it is empty"
    if head.startswith((b"<!doctype html", b"<html")):
        return "a web page came instead (a login, perhaps)"
    if b"<svg" in head or head.startswith(b"<?xml"):
        return "it is XML or SVG; convert it to PNG"
    return f"it begins with {content[:8]!r}"


def _refuse_tricks(url: str) -> None:
    """Raise ImageRefused for addresses that say one thing to one reader and another to the next."""
    shown = shown_url(url)
    if len(url) > 8192:
        raise ImageRefused(f"{shown}: longer than 8192 characters")
    if "\\" in url or any(ord(letter) < 0x20 or ord(letter) == 0x7F for letter in url):
        raise ImageRefused(f"{shown}: backslashes and control characters do not belong in an address")
    # Unfolded twice, as each of two servers may do once.
    once = unquote(url)
    for text in (url, once, unquote(once)):
        if "\0" in text or ".." in re.split(r"[/\\?&=]", text):
            raise ImageRefused(f"{shown}: addresses with '..' are not followed")


def _plain_path(path: str) -> str:
    """The path and query of one of Label Studio's files. Raises ImageRefused where an encoded slash hides in it."""
    if re.search(r"%(?:2f|5c|25|00)", path.partition("?")[0], re.IGNORECASE):
        raise ImageRefused(f"{shown_url(path)}: encoded slashes do not belong in Label Studio's paths")
    return path


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:
        # A name too long for the file system, say.
        return False


def _stamp(path: Path | None) -> tuple[int, ...]:
    if path is None:
        return ()
    try:
        status = path.stat()
    except OSError:
        return ()
    return status.st_mtime_ns, status.st_size, status.st_ino


def _host_port(url: str) -> str:
    """Small-letter host and port, the scheme's own where none is given. Raises ValueError where the port is none."""
    parts = urlsplit(url)
    return f"{(parts.hostname or '').lower()}:{parts.port or (443 if parts.scheme == 'https' else 80)}"


def _tile_hosts(settings: Settings) -> frozenset[str]:
    hosts = {f"{host}:{settings.port}" for host in _LOOPBACK_HOSTS}
    return frozenset(hosts | {_host_port(settings.public_url)} if settings.public_url else hosts)


def _too_large(shown: str, max_bytes: int) -> ImageRefused:
    return ImageRefused(f"{shown} is larger than {max_bytes / 2**20:g} MB; raise GEOPRELABEL_IMAGE_MAX_MB to take it")
