"""What is fetched, what is refused, and what the pixels are."""

from __future__ import annotations

import base64
import hashlib
import io
import socket
import struct
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image as Pillow

from backend.client import LabelStudio
from backend.errors import BadImage, ImageRefused, LabelStudioDenied
from backend.images import ImageStore, decode, is_public, shown_url
from backend.settings import Settings
from demo.label_studio import LabelStudioServer
from tests.small_server import Answer, Asked, SmallServer, as_json

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def file_of(image: Pillow.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png_of(size: tuple[int, int] = (8, 6), colour: tuple[int, int, int] = RED) -> bytes:
    return file_of(Pillow.new("RGB", size, colour))


def pixels_of(content: bytes, max_pixels: int = 1_000_000) -> np.ndarray:
    return decode(content, name="test image", max_pixels=max_pixels)


PNG = png_of()


@pytest.fixture
def make_store(tmp_path: Path) -> Iterator[Callable[..., ImageStore]]:
    made: list[ImageStore] = []

    def make(label_studio: LabelStudio | None = None, *, cache_mb: float = 16, **fields: Any) -> ImageStore:
        given = {"data_dir": tmp_path / "data", "port": 9090, "label_studio_url": "", **fields}
        made.append(ImageStore(Settings.from_environment(**given), label_studio, cache_mb=cache_mb))
        return made[-1]

    yield make
    for store in made:
        store.close()


@pytest.fixture
def web() -> Iterator[SmallServer]:
    """A host on this machine with a picture on every path."""
    with SmallServer(lambda asked: Answer(200, PNG, {"Content-Type": "image/png"})) as server:
        yield server


@pytest.fixture
def nowhere(make_store: Callable[..., ImageStore], monkeypatch: pytest.MonkeyPatch) -> ImageStore:
    """A store for which no name has an address."""
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: [])
    return make_store()


# Pixels


def test_the_pixels_are_those_of_the_file() -> None:
    expected = np.arange(6 * 8 * 3, dtype=np.uint8).reshape(6, 8, 3)
    rgb = pixels_of(file_of(Pillow.fromarray(expected)))
    assert rgb.dtype == np.uint8
    assert np.array_equal(rgb, expected)
    assert not rgb.flags.writeable


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_what_browsers_show_can_be_read(kind: str) -> None:
    rgb = pixels_of(file_of(Pillow.new("RGB", (16, 16), (200, 30, 60)), kind))
    assert rgb.shape == (16, 16, 3)
    assert np.abs(rgb.astype(int) - (200, 30, 60)).max() <= 8


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_turns_the_image_upright(kind: str, orientation: int) -> None:
    upright = np.zeros((32, 48, 3), np.uint8)
    upright[:16, :16] = RED
    upright[:16, 32:] = GREEN
    upright[16:, :16] = BLUE
    # How a camera held that way would have stored it: the inverse of EXIF's own table.
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright),
        7: np.rot90(upright, 2).transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Pillow.Exif()
    exif[0x0112] = orientation
    options: dict[str, Any] = {"exif": exif}
    if kind == "JPEG":
        options |= {"quality": 100, "subsampling": 0}
    if kind == "WEBP":
        options |= {"lossless": True}
    rgb = pixels_of(file_of(Pillow.fromarray(np.ascontiguousarray(stored)), kind, **options))
    assert rgb.shape == upright.shape
    assert np.abs(rgb.astype(int) - upright).max() <= 8


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_a_damaged_exif_block_is_passed_over() -> None:
    content = file_of(Pillow.new("RGB", (8, 8), RED), "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xffrubbish")
    assert pixels_of(content).shape == (8, 8, 3)


def test_sixteen_bits_are_scaled_not_cut_off() -> None:
    grey = np.array([[0, 255, 257, 32896, 65535]], np.uint16)
    assert pixels_of(file_of(Pillow.fromarray(grey)))[0, :, 0].tolist() == [0, 1, 1, 128, 255]


def test_sixteen_bit_colour_is_read() -> None:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    row = b"\0" + struct.pack(">6H", 65535, 0, 32896, 0, 65535, 257)
    header = struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(row)) + chunk(b"IEND", b"")
    assert pixels_of(content)[0].tolist() == [[255, 0, 128], [0, 255, 1]]


def test_transparent_parts_are_white() -> None:
    rgba = Pillow.new("RGBA", (2, 1), (255, 0, 0, 255))
    rgba.putpixel((1, 0), (0, 0, 0, 0))
    assert pixels_of(file_of(rgba))[0].tolist() == [list(RED), list(WHITE)]
    palette = Pillow.new("P", (2, 1), 0)
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.putpixel((1, 0), 1)
    assert pixels_of(file_of(palette))[0].tolist() == [list(RED), list(BLUE)]
    assert pixels_of(file_of(palette, transparency=1))[0].tolist() == [list(RED), list(WHITE)]
    assert pixels_of(file_of(Pillow.new("LA", (1, 1), (0, 0))))[0, 0].tolist() == list(WHITE)


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr"])
def test_other_modes_become_rgb(mode: str) -> None:
    kind = "PNG" if mode in ("1", "L", "P") else "JPEG"
    rgb = pixels_of(file_of(Pillow.new("RGB", (8, 8), WHITE).convert(mode), kind))
    assert rgb.shape == (8, 8, 3)
    assert rgb.min() >= 250


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP"])
def test_of_an_animation_the_first_frame_is_taken(kind: str) -> None:
    frames = [Pillow.new("RGB", (8, 8), colour) for colour in (RED, BLUE)]
    content = file_of(frames[0], kind, save_all=True, append_images=frames[1:], duration=100)
    assert np.abs(pixels_of(content).astype(int) - RED).max() <= 8


def test_float_samples_are_refused_with_the_way_out() -> None:
    with pytest.raises(BadImage, match="geoprelabel ingest"):
        pixels_of(file_of(Pillow.fromarray(np.zeros((4, 4), np.float32)), "TIFF"))


def test_size_is_read_from_the_header_before_decoding() -> None:
    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + header
    bomb = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk)) + b"\0\0\0\0IDAT"
    with pytest.raises(ImageRefused, match="megapixels"):
        pixels_of(bomb)
    with pytest.raises(ImageRefused, match=r"100 × 100 pixels, more than 0.005 megapixels.*IMAGE_MAX_MEGAPIXELS"):
        pixels_of(png_of((100, 100)), max_pixels=5_000)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "TIFF"])
def test_a_truncated_file_is_a_bad_image(kind: str) -> None:
    noise = np.random.default_rng(7).integers(0, 256, (64, 64, 3), np.uint8)
    content = file_of(Pillow.fromarray(noise), kind)
    with pytest.raises(BadImage, match="test image"):
        pixels_of(content[: len(content) * 2 // 3])


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "it is empty"),
        (b"<!DOCTYPE html><title>Login</title>", "web page"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "SVG"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "begins with"),
        (b"%PDF-1.7", "begins with"),
    ],
)
def test_what_is_no_image_is_named(content: bytes, told: str) -> None:
    with pytest.raises(BadImage, match=told):
        pixels_of(content)


@settings(deadline=None, max_examples=150)
@given(st.data())
@pytest.mark.filterwarnings("ignore")
def test_damaged_files_never_raise_anything_else(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(["JPEG", "PNG", "GIF", "TIFF", "WEBP"]))
    content = bytearray(file_of(Pillow.radial_gradient("L").resize((24, 24)).convert("RGB"), kind))
    for _ in range(data.draw(st.integers(1, 8))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    try:
        rgb = pixels_of(bytes(content))
    except BadImage:
        return
    assert rgb.ndim == 3
    assert rgb.shape[2] == 3


# Our own tiles and local files


def test_our_tiles_are_read_from_the_folder(make_store: Callable[..., ImageStore], tmp_path: Path) -> None:
    tile = tmp_path / "data" / "tiles" / "Bane pa-1" / "r0003_c0007.jpg"
    tile.parent.mkdir(parents=True)
    tile.write_bytes(PNG)
    store = make_store(public_url="https://gpu.example.org/geo", port=9191)
    for url in (
        "http://localhost:9191/tiles/Bane%20pa-1/r0003_c0007.jpg",
        "http://127.0.0.1:9191/tiles/Bane%20pa-1/r0003_c0007.jpg",
        "https://gpu.example.org/geo/tiles/Bane%20pa-1/r0003_c0007.jpg?v=2",
        "https://GPU.example.org:443/geo/tiles/Bane%20pa-1/r0003_c0007.jpg",
    ):
        image = store.fetch(url)
        assert image.rgb.shape == (6, 8, 3)
        assert image.key == hashlib.sha256(PNG).hexdigest()


def test_a_tile_made_anew_is_seen(make_store: Callable[..., ImageStore], tmp_path: Path) -> None:
    tile = tmp_path / "data" / "tiles" / "s" / "t.png"
    tile.parent.mkdir(parents=True)
    tile.write_bytes(png_of(colour=RED))
    store = make_store()
    assert store.fetch("http://localhost:9090/tiles/s/t.png").rgb[0, 0].tolist() == list(RED)
    tile.unlink()
    tile.write_bytes(png_of((9, 9), colour=BLUE))
    assert store.fetch("http://localhost:9090/tiles/s/t.png").rgb[0, 0].tolist() == list(BLUE)


@pytest.mark.parametrize(
    "path",
    [
        "/tiles/../secret.png",
        "/tiles/s/..%2f..%2fsecret.png",
        "/tiles/%2e%2e/secret.png",
        "/tiles/%252e%252e/secret.png",
        "/tiles/s/..\\..\\secret.png",
        "/tiles/s/.hidden.png",
        "/tiles/s/a%00.png",
        "/tiles/s/link.png",
        "/tiles/s\n/t.png",
    ],
)
def test_no_tile_address_leads_out_of_the_folder(
    path: str, make_store: Callable[..., ImageStore], tmp_path: Path
) -> None:
    scene = tmp_path / "data" / "tiles" / "s"
    scene.mkdir(parents=True)
    for secret in (tmp_path / "data" / "secret.png", tmp_path / "secret.png", scene / ".hidden.png"):
        secret.write_bytes(PNG)
    (scene / "link.png").symlink_to(tmp_path / "secret.png")
    with pytest.raises(ImageRefused):
        make_store().fetch(f"http://localhost:9090{path}")


def test_a_missing_tile_is_a_bad_image(make_store: Callable[..., ImageStore]) -> None:
    with pytest.raises(BadImage, match="GEOPRELABEL_DATA_DIR"):
        make_store().fetch("http://localhost:9090/tiles/s/t.png")


def test_local_files_are_read_below_their_folder_only(make_store: Callable[..., ImageStore], tmp_path: Path) -> None:
    root = tmp_path / "files"
    (root / "a b").mkdir(parents=True)
    (root / "a b" / "ä.png").write_bytes(PNG)
    (tmp_path / "secret.png").write_bytes(PNG)
    (root / "link.png").symlink_to(tmp_path / "secret.png")
    store = make_store(local_files_document_root=root)
    assert store.fetch("/data/local-files/?d=a%20b/%C3%A4.png").rgb.shape == (6, 8, 3)
    assert store.fetch("http://localhost:8080/data/local-files/?d=a%20b/ä.png").rgb.shape == (6, 8, 3)
    assert store.fetch("/data/local-files/?d=/a%20b/ä.png").rgb.shape == (6, 8, 3)
    outside = ("../secret.png", "..%2Fsecret.png", "%2e%2e/secret.png", "a/..%5c../secret.png", "link.png")
    for name in (*outside, "a b", ""):
        with pytest.raises(BadImage):
            store.fetch(f"/data/local-files/?d={name}")


def test_a_file_that_is_not_ours_is_asked_of_label_studio(
    make_store: Callable[..., ImageStore], tmp_path: Path, web: SmallServer
) -> None:
    with LabelStudio(web.url, "token") as label_studio:
        store = make_store(label_studio, local_files_document_root=tmp_path)
        assert store.fetch("/data/local-files/?d=theirs/a.png").rgb.shape == (6, 8, 3)
    assert web.asked[0].target == "/data/local-files/?d=theirs/a.png"


# data: addresses


def test_data_addresses_are_read(make_store: Callable[..., ImageStore]) -> None:
    encoded = base64.b64encode(PNG).decode()
    for start, body in (("data:", encoded), ("DATA:", f"{encoded[:20]}%0A{encoded[20:]}")):
        assert make_store().fetch(f"{start}image/png;base64,{body}").rgb.shape == (6, 8, 3)
    assert make_store().fetch(f"data:image/png;charset=utf-8;base64,{encoded}").rgb.shape == (6, 8, 3)


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("data:text/html;base64,PGI+", ImageRefused),
        ("data:image/svg+xml,<svg/>", ImageRefused),
        ("data:image/png;base64,****", BadImage),
        ("data:image/png;base64,", BadImage),
        ("data:image/png;base64," + "A" * (3 * 2**20), ImageRefused),
    ],
)
def test_other_data_addresses_are_not(
    url: str, expected: type[BadImage], make_store: Callable[..., ImageStore]
) -> None:
    with pytest.raises(expected) as refused:
        make_store(image_max_mb=1).fetch(url)
    assert len(str(refused.value)) < 300


# Hosts


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "10.1.2.3",
        "172.16.0.1",
        "192.168.1.1",
        "169.254.169.254",
        "100.64.0.1",
        "0.0.0.0",
        "224.0.0.1",
        "255.255.255.255",
        "::1",
        "::",
        "fe80::1%eth0",
        "fc00::1",
        "fec0::1",
        "ff02::1",
        "::ffff:127.0.0.1",
        "::ffff:169.254.169.254",
        "::127.0.0.1",
        "64:ff9b::7f00:1",
        "64:ff9b:1::7f00:1",
        "2002:7f00:1::",
        "fd00:ec2::254",
        "not an address",
    ],
)
def test_addresses_that_are_not_public(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize("address", ["8.8.8.8", "2606:4700::6810:84e5", "::ffff:8.8.8.8", "64:ff9b::808:808"])
def test_addresses_that_are_public(address: str) -> None:
    assert is_public(address)


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "localhost", "127.1", "2130706433", "0x7f.0.0.1", "[::1]", "[::ffff:127.0.0.1]", "localhost."]
)
def test_this_machine_is_not_asked(host: str, make_store: Callable[..., ImageStore], web: SmallServer) -> None:
    with pytest.raises(BadImage) as refused:
        make_store().fetch(f"http://{host}:{web.port}/a.png")
    assert web.asked == []
    if host in ("127.0.0.1", "localhost"):
        assert isinstance(refused.value, ImageRefused)
        assert f"GEOPRELABEL_IMAGE_HOSTS={host}:{web.port}" in str(refused.value)


def test_named_hosts_are_asked(make_store: Callable[..., ImageStore], web: SmallServer) -> None:
    assert make_store(image_hosts=("127.0.0.1",)).fetch(f"{web.url}/a.png").rgb.shape == (6, 8, 3)
    by_port = make_store(image_hosts=f"LOCALHOST:{web.port}")
    assert by_port.fetch(f"http://localhost:{web.port}/a.png").rgb.shape == (6, 8, 3)
    with pytest.raises(ImageRefused):
        make_store(image_hosts=("127.0.0.1:1",)).fetch(f"{web.url}/a.png")


def test_the_address_that_was_checked_is_the_one_asked(
    make_store: Callable[..., ImageStore], web: SmallServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name that is public when looked up first and this machine's own when looked up again."""
    looked_up: list[str] = []
    real = socket.getaddrinfo

    def rebinding(host: Any, port: Any, *args: Any, **kwargs: Any) -> Any:
        if host != "rebind.example.org":
            return real(host, port, *args, **kwargs)
        looked_up.append(host)
        address = "192.0.2.1" if len(looked_up) == 1 else "127.0.0.1"
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))]

    monkeypatch.setattr("backend.images.is_public", lambda address: address == "192.0.2.1")
    monkeypatch.setattr("backend.images._CONNECT_TIMEOUT_S", 0.2)
    monkeypatch.setattr(socket, "getaddrinfo", rebinding)
    with pytest.raises(BadImage):
        make_store().fetch(f"http://rebind.example.org:{web.port}/a.png")
    assert len(looked_up) == 1
    assert web.asked == []


def test_a_name_with_a_public_and_a_private_address_is_refused(
    make_store: Callable[..., ImageStore], web: SmallServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, web.port)) for address in ("8.8.8.8", "127.0.0.1")]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: both)
    with pytest.raises(ImageRefused, match=r"127\.0\.0\.1, which is not a public address"):
        make_store().fetch(f"http://two.example.org:{web.port}/a.png")


def test_each_redirect_is_checked(make_store: Callable[..., ImageStore], web: SmallServer) -> None:
    targets = {
        "/named": f"http://localhost:{web.port}/a.png",
        "/private": f"http://127.0.0.2:{web.port}/a.png",
        "/metadata": "http://169.254.169.254/latest/meta-data/",
        "/file": "file:///etc/passwd",
        "/user": f"http://user:hush@localhost:{web.port}/a.png",
        "/again": "/again",
        "/bad": "http://[/",
    }

    def answer(asked: Asked) -> Answer:
        return Answer(302, headers={"Location": targets[asked.path]})

    with SmallServer(answer) as server:
        store = make_store(image_hosts=("127.0.0.1", "localhost"))
        assert store.fetch(f"{server.url}/named").rgb.shape == (6, 8, 3)
        with pytest.raises(BadImage):
            store.fetch(f"{server.url}/bad")
        for path in ("/private", "/metadata", "/file", "/user"):
            with pytest.raises(ImageRefused) as refused:
                store.fetch(f"{server.url}{path}")
            assert "hush" not in str(refused.value)
        with pytest.raises(BadImage, match="more than 3 redirects"):
            store.fetch(f"{server.url}/again")
        assert [asked.path for asked in server.asked].count("/again") == 4
    assert len(web.asked) == 1


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc/passwd",
        "FILE:/etc/passwd",
        "/etc/passwd",
        "//host/share/a.png",
        "\\\\host\\share\\a.png",
        "/vsicurl/http://169.254.169.254/a.tif",
        "/vsis3/bucket/a.tif",
        "C:\\a.png",
        "gopher://host/a",
        "ftp://host/a.png",
        "a.png",
        "../a.png",
        "javascript:alert(1)",
        "http:///a.png",
        "http://user:hush@example.org/a.png",
        "http://example.org/../a.png",
        "http://exa\nmple.org/a.png",
        "http://example.org:99999/a.png",
        "http://[::1/a.png",
        "http://" + "a" * 9000,
        "/data/upload/../../api/current-user/token",
        "/data/upload/%2e%2e/%2e%2e/api/current-user/token",
        "/data/upload/..%2f..%2fapi/current-user/token",
        "/data/upload/%252e%252e%252fapi",
        "/api/current-user/token",
        "/api/x/data/upload/a.png",
        "/data/uploads/a.png",
    ],
)
def test_everything_else_is_refused_with_the_token_at_home(
    url: str, make_store: Callable[..., ImageStore], web: SmallServer
) -> None:
    with LabelStudio(web.url, "token") as label_studio, pytest.raises(ImageRefused) as refused:
        make_store(label_studio).fetch(url)
    assert web.asked == []
    assert "hush" not in str(refused.value)
    assert len(str(refused.value)) < 500


@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(max_size=60) | st.from_regex(r"(https?|s3|file)://[^ ]{0,20}(\?[^ ]{0,10})?", fullmatch=True))
def test_any_text_is_refused_in_a_sentence(nowhere: ImageStore, text: str) -> None:
    with pytest.raises(BadImage):
        nowhere.fetch(text)


@pytest.mark.parametrize("url", [None, 7, {"a": 1}, ["http://x"], ""])
def test_what_is_no_address_is_a_bad_image(url: Any, make_store: Callable[..., ImageStore]) -> None:
    with pytest.raises(BadImage):
        make_store().fetch(url)


# What comes back


def test_an_answer_that_is_too_large_is_left(make_store: Callable[..., ImageStore]) -> None:
    def answer(asked: Asked) -> Answer:
        return Answer(200, b"\0" * 3 * 2**20, promised=None if asked.path == "/told" else -1)

    with SmallServer(answer) as server:
        store = make_store(image_hosts=("127.0.0.1",), image_max_mb=1)
        for path in ("/told", "/untold"):
            with pytest.raises(ImageRefused, match=r"larger than 1 MB.*GEOPRELABEL_IMAGE_MAX_MB"):
                store.fetch(server.url + path)


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (Answer(404, b"no"), "answered 404"),
        (Answer(500, b"no"), "answered 500"),
        (Answer(206, PNG), "answered 206"),
        (Answer(200, PNG[:40], promised=len(PNG)), "cannot be fetched"),
        (Answer(200, PNG[:48]), "cannot be decoded"),
        (Answer(200, b"<html>"), "web page"),
        (Answer(302, b""), "answered 302"),
    ],
)
def test_bad_answers_name_the_address_without_its_secrets(
    answer: Answer, told: str, make_store: Callable[..., ImageStore]
) -> None:
    with SmallServer(lambda asked: answer) as server, pytest.raises(BadImage, match=told) as failed:
        make_store(image_hosts=("127.0.0.1",)).fetch(f"{server.url}/a.png?X-Amz-Signature=hush#hush")
    assert f"{server.url}/a.png" in str(failed.value)
    assert "hush" not in str(failed.value)


def test_a_server_that_hangs_is_given_up(
    make_store: Callable[..., ImageStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("backend.images._READ_TIMEOUT_S", 0.1)

    def answer(asked: Asked) -> Answer:
        time.sleep(0.4)
        return Answer(200, PNG)

    with SmallServer(answer) as server, pytest.raises(BadImage, match="ReadTimeout"):
        make_store(image_hosts=("127.0.0.1",)).fetch(f"{server.url}/a.png")


def test_no_cookie_and_no_token_goes_to_other_hosts(make_store: Callable[..., ImageStore], web: SmallServer) -> None:
    with SmallServer(lambda asked: as_json({})) as studio, LabelStudio(studio.url, "token") as label_studio:
        make_store(label_studio, image_hosts=("127.0.0.1",)).fetch(f"{web.url}/data/upload/1/a.png")
        assert studio.asked == []
    assert not {"authorization", "cookie"} & {name.lower() for name in web.asked[0].headers}


# Label Studio


def test_label_studios_files_are_asked_with_the_token(make_store: Callable[..., ImageStore], web: SmallServer) -> None:
    with LabelStudio(web.url, "token") as label_studio:
        store = make_store(label_studio, label_studio_url=web.url)
        for n, url in enumerate(
            (
                "/data/upload/1/a.png",
                f"{web.url}/data/upload/1/b.png",
                # As Label Studio names itself where it runs in another container.
                "http://localhost:8080/data/upload/1/c.png",
                "/tasks/3/resolve/?fileuri=czM6Ly9hL2I=",
            ),
            start=1,
        ):
            store.fetch(url)
            assert len(web.asked) == n
            assert web.asked[-1].headers["Authorization"] == "Token token"
        store.fetch(f"{web.url}/static/a.png")
        assert "Authorization" not in web.asked[-1].headers


def test_storage_addresses_are_resolved_and_followed_without_the_token(
    make_store: Callable[..., ImageStore], web: SmallServer
) -> None:
    target = f"{web.url}/signed.png?X-Amz-Signature=hush"
    with (
        SmallServer(lambda asked: Answer(303, headers={"Location": target})) as studio,
        LabelStudio(studio.url, "token") as label_studio,
    ):
        store = make_store(label_studio, image_hosts=(f"127.0.0.1:{web.port}",))
        assert store.fetch("s3://bucket/käy.png", task_id=5).rgb.shape == (6, 8, 3)
        asked = httpx.URL(studio.asked[0].target)
        assert asked.path == "/tasks/5/resolve/"
        assert base64.urlsafe_b64decode(asked.params["fileuri"]).decode() == "s3://bucket/käy.png"
        assert web.asked[0].target == "/signed.png?X-Amz-Signature=hush"
        assert "Authorization" not in web.asked[0].headers
        # Signed links lead into private networks only where that host was named.
        with pytest.raises(ImageRefused) as refused:
            make_store(label_studio).fetch("s3://bucket/key.png", task_id=5)
        assert "hush" not in str(refused.value)
        with pytest.raises(BadImage, match="by its id"):
            store.fetch("s3://bucket/key.png")


def test_the_same_storage_address_in_two_tasks_is_fetched_twice(
    make_store: Callable[..., ImageStore], web: SmallServer
) -> None:
    with LabelStudio(web.url, "token") as label_studio:
        store = make_store(label_studio)
        for task_id in (1, 2, 1):
            store.fetch("s3://bucket/key.png", task_id=task_id)
    assert [asked.path for asked in web.asked] == ["/tasks/1/resolve/", "/tasks/2/resolve/"]


def test_label_studios_refusals_become_sentences(make_store: Callable[..., ImageStore]) -> None:
    with (
        SmallServer(lambda asked: as_json({"detail": "no"}, int(asked.path[-3:]))) as studio,
        LabelStudio(studio.url, "token") as label_studio,
    ):
        store = make_store(label_studio)
        with pytest.raises(BadImage, match="cannot be fetched"):
            store.fetch("/data/upload/404")
        with pytest.raises(LabelStudioDenied):
            store.fetch("/data/upload/401")
    with pytest.raises(BadImage, match="set LABEL_STUDIO_URL"):
        make_store().fetch("/data/upload/404")


def test_a_file_of_label_studios_that_is_too_large(make_store: Callable[..., ImageStore]) -> None:
    with (
        SmallServer(lambda asked: Answer(200, bytes(2 * 2**20))) as studio,
        LabelStudio(studio.url, "token") as label_studio,
        pytest.raises(ImageRefused, match="larger than 1 MB"),
    ):
        make_store(label_studio, image_max_mb=1).fetch("/data/upload/1/a.png")


@pytest.mark.label_studio
def test_uploads_of_a_real_label_studio(make_store: Callable[..., ImageStore], label_studio: LabelStudioServer) -> None:
    choices = '<Choices name="c" toName="image"><Choice value="a"/></Choices>'
    with LabelStudio(label_studio.url, label_studio.token) as client:
        project_id = client.create_project("images", f'<View><Image name="image" value="$image"/>{choices}</View>')[
            "id"
        ]
        headers = {"Authorization": f"Token {label_studio.token}"}
        url = f"{label_studio.url}/api/projects/{project_id}/import"
        httpx.post(url, files={"file": ("a.png", PNG)}, headers=headers).raise_for_status()
        [task] = client.tasks(project_id)
        image = make_store(client).fetch(task["data"]["image"], task_id=task["id"])
    assert image.key == hashlib.sha256(PNG).hexdigest()
    assert image.rgb[0, 0].tolist() == list(RED)


# The cache


def test_an_image_is_fetched_once(make_store: Callable[..., ImageStore], web: SmallServer) -> None:
    store = make_store(image_hosts=("127.0.0.1",))
    assert store.fetch(f"{web.url}/a.png") is store.fetch(f"{web.url}/a.png")
    assert len(web.asked) == 1


def test_ten_threads_fetch_once(make_store: Callable[..., ImageStore]) -> None:
    release = threading.Event()

    def answer(asked: Asked) -> Answer:
        release.wait(10)
        return Answer(200, PNG)

    with SmallServer(answer) as server:
        store, got = make_store(image_hosts=("127.0.0.1",)), []
        threads = [threading.Thread(target=lambda: got.append(store.fetch(f"{server.url}/a.png"))) for _ in range(10)]
        for thread in threads:
            thread.start()
        time.sleep(0.1)
        release.set()
        for thread in threads:
            thread.join(10)
        assert len(got) == 10
        assert len({id(image) for image in got}) == 1
        assert len(server.asked) == 1


def test_errors_are_not_kept(make_store: Callable[..., ImageStore]) -> None:
    answers = [Answer(500, b""), Answer(200, b"rubbish"), Answer(200, PNG)]
    with SmallServer(lambda asked: answers.pop(0)) as server:
        store = make_store(image_hosts=("127.0.0.1",))
        for _ in range(2):
            with pytest.raises(BadImage):
                store.fetch(f"{server.url}/a.png")
        assert store.fetch(f"{server.url}/a.png").rgb.shape == (6, 8, 3)


def test_the_oldest_images_go_first(make_store: Callable[..., ImageStore]) -> None:
    with SmallServer(lambda asked: Answer(200, png_of((512, 512)))) as server:
        # Each decoded image takes 0.75 MB: two fit.
        store = make_store(image_hosts=("127.0.0.1",), cache_mb=1.6)
        for name in "abacab":
            store.fetch(f"{server.url}/{name}")
        assert [asked.path for asked in server.asked] == ["/a", "/b", "/c", "/b"]
        assert store._kept_bytes <= 1.6 * 2**20


def test_an_image_larger_than_the_cache_is_still_given(make_store: Callable[..., ImageStore], web: SmallServer) -> None:
    store = make_store(image_hosts=("127.0.0.1",), cache_mb=0)
    for _ in range(2):
        assert store.fetch(f"{web.url}/a.png").rgb.shape == (6, 8, 3)
    assert len(web.asked) == 2
    assert store._kept_bytes == 0


def test_a_kept_image_grows_old(
    make_store: Callable[..., ImageStore], web: SmallServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("backend.images._KEPT_S", 0.0)
    store = make_store(image_hosts=("127.0.0.1",))
    for _ in range(2):
        store.fetch(f"{web.url}/a.png")
    assert len(web.asked) == 2


@given(st.text(max_size=300))
def test_shown_addresses_are_short_and_printable(text: str) -> None:
    shown = shown_url(text)
    assert len(shown) <= 200
    assert shown.isprintable()
    assert "hush" not in shown_url(f"http://hush:hush@host/a?hush={text}#hush")
