"""Image files that are more, less or other than they say; each fetched by the real server."""

from __future__ import annotations

import gzip
import io
import socket
import struct
import threading
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator

import numpy as np
import PIL.Image
import pytest

from tests.small_server import Answer, SmallServer

from .conftest import PATIENCE_S, PNG, Backend, Friend, png


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def saved(kind: str, size: tuple[int, int], mode: str = "L", **options: object) -> bytes:
    file = io.BytesIO()
    PIL.Image.new(mode, size).save(file, kind, **options)
    return file.getvalue()


def png_saying(columns: int, rows: int, rest: bytes = b"") -> bytes:
    header = struct.pack(">IIBBBBB", columns, rows, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + (rest or chunk(b"IDAT", zlib.compress(b"\0" * 9)) + chunk(b"IEND", b""))
    )


def png_of_zeros() -> bytes:
    """2,000 × 2,000 pixels allowed, and 200 MB of rows for them."""
    deflate = zlib.compressobj()
    packed = b"".join([*(deflate.compress(bytes(2**20)) for _ in range(200)), deflate.flush()])
    return png_saying(2000, 2000, chunk(b"IDAT", packed) + chunk(b"IEND", b""))


def png_with_text_bomb() -> bytes:
    packed = zlib.compress(bytes(30 * 2**20))
    texts = b"".join(chunk(b"zTXt", b"k%d\0\0" % n + packed) for n in range(20))
    return PNG[:33] + texts + PNG[33:]


def png_with_profile_bomb() -> bytes:
    return PNG[:33] + chunk(b"iCCP", b"p\0\0" + zlib.compress(bytes(100 * 2**20))) + PNG[33:]


def tiff(tags: list[tuple[int, int, int, int]]) -> bytes:
    """A little-endian TIFF of one directory: tag, type, count, value."""
    entries = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    return b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", len(tags)) + entries + struct.pack("<I", 0)


def animation(kind: str) -> bytes:
    """40 frames that are tiny as files and 3 MB each as pixels."""
    frames = [PIL.Image.new("RGB", (1000, 1000), (n % 2 * 9, 0, 0)) for n in range(40)]
    file = io.BytesIO()
    frames[0].save(
        file, kind, save_all=True, append_images=frames[1:], duration=1, **({"method": 0} if kind == "WEBP" else {})
    )
    return file.getvalue()


def zip_and_jpeg() -> bytes:
    file = io.BytesIO(saved("JPEG", (64, 64), "RGB"))
    file.seek(0, io.SEEK_END)
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr("../../../tmp/owned", "x")
    return file.getvalue()


VRT = b"""<VRTDataset rasterXSize="64" rasterYSize="64"><VRTRasterBand dataType="Byte" band="1"><SimpleSource>
<SourceFilename relativeToVRT="0">%s</SourceFilename><SourceBand>1</SourceBand></SimpleSource></VRTRasterBand>
</VRTDataset>"""
WMS = b"""<GDAL_WMS><Service name="TMS"><ServerUrl>%s/${z}/${x}/${y}.png</ServerUrl></Service><DataWindow>
<UpperLeftX>0</UpperLeftX><UpperLeftY>0</UpperLeftY><LowerRightX>1</LowerRightX><LowerRightY>1</LowerRightY><SizeX>64</SizeX>
<SizeY>64</SizeY></DataWindow><BandsCount>3</BandsCount></GDAL_WMS>"""
SVG = (
    b"<svg xmlns='http://www.w3.org/2000/svg' xmlns:xlink='http://www.w3.org/1999/xlink'><image xlink:href='%s'/></svg>"
)

REFUSED: dict[str, Callable[[bytes], bytes]] = {
    "too many pixels": lambda bait: png((2100, 2100)),
    "100,000 × 100,000 pixels": lambda bait: png_saying(100_000, 100_000),
    "2^31 × 2^31 pixels": lambda bait: png_saying(2**31 - 1, 2**31 - 1),
    "no pixels": lambda bait: png_saying(0, 0),
    "one pixel high and a billion wide": lambda bait: png_saying(10**9, 1),
    "bmp of negative size": lambda bait: (
        b"BM" + bytes(8) + struct.pack("<III", 54, 40, 2**31) + struct.pack("<iHHIIiiII", -(2**31), 1, 24, *[0] * 6)
    ),
    "gif of 65535 × 65535": lambda bait: b"GIF89a\xff\xff\xff\xff\0\0\0,\0\0\0\0\xff\xff\xff\xff\0\2\0;",
    "webp of 16383 × 16383": lambda bait: (
        b"RIFF" + struct.pack("<I", 22) + b"WEBPVP8L" + struct.pack("<I", 10) + b"\x2f\xff\xff\xff\x0f" + bytes(5)
    ),
    "tiff of 2^31 columns": lambda bait: tiff(
        [(256, 4, 1, 2**31 - 1), (257, 4, 1, 2**31 - 1), (258, 3, 1, 8), (262, 3, 1, 1), (273, 4, 1, 8), (279, 4, 1, 8)]
    ),
    "tiff whose strips lie outside": lambda bait: tiff(
        [
            (256, 4, 1, 64),
            (257, 4, 1, 64),
            (258, 3, 1, 8),
            (259, 3, 1, 5),
            (262, 3, 1, 1),
            (273, 4, 1, 2**32 - 9),
            (279, 4, 1, 2**32 - 1),
        ]
    ),
    "tiff with a billion strips": lambda bait: tiff(
        [(256, 4, 1, 64), (257, 4, 1, 64), (258, 3, 1, 8), (262, 3, 1, 1), (273, 4, 10**9, 8), (279, 4, 10**9, 8)]
    ),
    "tiff that is its own next directory": lambda bait: (
        b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", 0) + struct.pack("<I", 8)
    ),
    "gzip of an image": lambda bait: gzip.compress(PNG),
    "html": lambda bait: b"<!doctype html><img src='%s'>" % bait,
    "html that begins like an image": lambda bait: b"\x89PNG\r\n\x1a\n<script src='%s'></script>" % bait,
    "svg": lambda bait: SVG % bait,
    "svg with an entity": lambda bait: (
        b"<?xml version='1.0'?><!DOCTYPE svg [<!ENTITY x SYSTEM 'file:///etc/passwd'>]>" + SVG % bait
    ),
    "vrt": lambda bait: VRT % bait,
    "vrt of a file": lambda bait: VRT % b"/etc/passwd",
    "vrt over vsicurl": lambda bait: VRT % (b"/vsicurl/" + bait),
    "wms": lambda bait: WMS % bait,
    "gdal's other xml": lambda bait: (
        b"<GDALTileIndexDataset><IndexDataset>%s</IndexDataset></GDALTileIndexDataset>" % bait
    ),
    "mapserver wcs": lambda bait: (
        b"<WCS_GDAL><ServiceURL>%s</ServiceURL><CoverageName>a</CoverageName></WCS_GDAL>" % bait
    ),
    "postscript": lambda bait: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n(/etc/passwd) (r) file\n",
    "pdf": lambda bait: b"%PDF-1.7\n1 0 obj<</Type/Catalog/OpenAction<</S/URI/URI(" + bait + b")>>>>endobj",
    "imagemagick": lambda bait: (
        b"push graphic-context\nviewbox 0 0 64 64\nimage over 0,0 0,0 '" + bait + b"'\npop graphic-context"
    ),
    "a playlist": lambda bait: b"#EXTM3U\n#EXTINF:1,\n" + bait,
    "a pickle": lambda bait: b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x04true\x85R.",
    "yaml": lambda bait: b"!!python/object/apply:os.system ['true']",
    "fits": lambda bait: b"SIMPLE  =                    T".ljust(2880),
    "hdf5": lambda bait: b"\x89HDF\r\n\x1a\n" + bytes(200),
    "jpeg 2000": lambda bait: b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(200),
    "icon": lambda bait: b"\0\0\1\0\1\0" + bytes(200),
    "psd": lambda bait: b"8BPS\0\1" + bytes(200),
    "fli": lambda bait: struct.pack("<IHHHHHH", 200, 0xAF11, 1, 64, 64, 8, 3) + bytes(200),
    "a quarter of a png": lambda bait: noise("PNG")[:3000],
    "a quarter of a jpeg": lambda bait: noise("JPEG")[:1000],
    "a quarter of a webp": lambda bait: noise("WEBP")[:1000],
    "a quarter of a tiff": lambda bait: noise("TIFF")[:1000],
    "only a signature": lambda bait: PNG[:8],
    "nothing": lambda bait: b"",
    "one byte": lambda bait: b"\0",
}
SEEN: dict[str, Callable[[], bytes]] = {
    "png with rows of 200 MB": png_of_zeros,
    "png with 600 MB of texts": png_with_text_bomb,
    "png with a profile of 100 MB": png_with_profile_bomb,
    "an animated gif of 40 large frames": lambda: animation("GIF"),
    "an animated webp of 40 large frames": lambda: animation("WEBP"),
    "an animated png of 40 large frames": lambda: animation("PNG"),
    "jpeg that is a zip": zip_and_jpeg,
    "jpeg that is html": lambda: saved("JPEG", (64, 64), "RGB", comment=b"<script>alert(1)</script>"),
    "png with a tail": lambda: PNG + b"<script>" + bytes(10**6),
    "tiff with 3 million zeros in a few bytes": lambda: saved("TIFF", (1900, 1900), compression="tiff_lzw"),
    "webp of one colour": lambda: saved("WEBP", (1999, 1999), "RGB", lossless=True),
}


def noise(kind: str) -> bytes:
    file = io.BytesIO()
    PIL.Image.fromarray(np.random.default_rng(1).integers(0, 255, (64, 64, 3), np.uint8)).save(file, kind)
    return file.getvalue()


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_sound_image_is_a_sentence(backend: Backend, friend: Friend, bait: SmallServer, name: str):
    content = REFUSED[name](bait.url.encode() + b"/a.png")
    before_s = time.monotonic()
    answer = backend.predict(
        friend.put(f"bad/{abs(hash(name))}.tif", Answer(200, content, {"Content-Type": "image/png"}))
    )
    assert answer.status in (403, 422), answer.body
    assert len(answer.body) < 1000
    assert time.monotonic() - before_s < PATIENCE_S


@pytest.mark.parametrize("name", SEEN)
def test_a_file_that_unfolds_does_so_within_bounds(backend: Backend, friend: Friend, name: str):
    before_mb, before_s = backend.memory_mb(), time.monotonic()
    answer = backend.predict(
        friend.put(f"large/{abs(hash(name))}", Answer(200, SEEN[name](), {"Content-Type": "image/png"}))
    )
    assert answer.status in (200, 403, 422), answer.body
    assert backend.memory_mb() - before_mb < 250
    assert time.monotonic() - before_s < PATIENCE_S


@pytest.mark.parametrize(
    "answer",
    [
        Answer(200, gzip.compress(bytes(50 * 2**20)), {"Content-Encoding": "gzip"}),
        Answer(200, zlib.compress(bytes(50 * 2**20)), {"Content-Encoding": "deflate"}),
        Answer(200, gzip.compress(PNG), {"Content-Encoding": "gzip, gzip, br, zstd"}),
        Answer(200, bytes(5 * 2**20)),
        Answer(200, bytes(5 * 2**20), promised=-1),
        Answer(200, PNG, promised=10**15),
        Answer(200, PNG[:30], promised=len(PNG)),
        Answer(200, PNG, {"Content-Length": "-5"}),
        Answer(200, PNG, {"Transfer-Encoding": "chunked"}),
        Answer(200, PNG, {f"X-{n}": "x" * 8000 for n in range(99)}),
        Answer(206, PNG),
        Answer(204),
        Answer(304),
        Answer(401, b"", {"WWW-Authenticate": "Basic"}),
        Answer(407, b"", {"Proxy-Authenticate": "Basic"}),
        Answer(503, b"", {"Retry-After": "999999"}),
        Answer(302, b"", {"Location": ""}),
    ],
    ids=range(17),
)
def test_answers_that_lie_are_left(backend: Backend, friend: Friend, answer: Answer):
    before_mb, before_s = backend.memory_mb(), time.monotonic()
    reply = backend.predict(friend.put(f"lies/{id(answer)}", answer))
    assert reply.status in (403, 422), reply.body
    assert backend.memory_mb() - before_mb < 100
    assert time.monotonic() - before_s < PATIENCE_S


@pytest.fixture
def dripping(friend: Friend) -> Iterator[Callable[[bytes, bytes], str]]:
    """Makes the friend's server, for one connection, send a beginning at once and then drip."""
    stop = threading.Event()
    sockets: list[socket.socket] = []

    def start(head: bytes, drop: bytes) -> str:
        listener = socket.create_server(("127.0.0.1", 0))
        sockets.append(listener)

        def serve() -> None:
            wire, _ = listener.accept()
            sockets.append(wire)
            wire.recv(65536)
            try:
                wire.sendall(head)
                for _ in range(100):
                    if stop.wait(0.3):
                        break
                    wire.sendall(drop)
                else:
                    wire.close()
            except OSError:
                pass

        threading.Thread(target=serve, daemon=True).start()
        return f"http://127.0.0.1:{listener.getsockname()[1]}/drip.png"

    yield start
    stop.set()
    for wire in sockets:
        wire.close()


@pytest.mark.parametrize(
    ("head", "drop"),
    [
        (b"\x16\x03\x03\x40\x00", b"\x02"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n", b"\x89"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\nx\r\n"),
        (b"HTTP/1.1 200 OK\r\nX-", b"a"),
        (b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 100 Continue\r\n\r\n"),
        (b"", b"H"),
        (b"", b""),
    ],
)
def test_a_server_that_drips_is_given_up_in_time(
    friend: Friend, dripping: Callable[..., str], head: bytes, drop: bytes
):
    # In this process: the port that drips is a new one each time, and the server under attack knows only one.
    from backend import images
    from backend.errors import BadImage
    from backend.settings import Settings

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(images, "_READ_TIMEOUT_S", 0.8)
        patch.setattr(images, "_CONNECT_TIMEOUT_S", 0.8)
        patch.setattr(images, "_FETCH_TIMEOUT_S", 1.2)
        store = images.ImageStore(Settings(image_hosts="127.0.0.1", label_studio_url=""), None)
        before_s = time.monotonic()
        url = dripping(head, drop).replace("http:", "https:" if head.startswith(b"\x16") else "http:")
        with pytest.raises(BadImage):
            store.fetch(url)
        assert time.monotonic() - before_s < 20
        store.close()
