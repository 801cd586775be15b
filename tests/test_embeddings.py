"""Embeddings in memory and on disk: found again as they were, never more than allowed, damaged ones are none."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backend.embeddings import EmbeddingCache, EmbeddingFiles, EmbeddingKey, Embeddings
from backend.segmenter import Embedding, Prompts


def an_embedding(seed: int = 0, side: int = 16) -> Embedding:
    random = np.random.default_rng(seed)
    features = {
        "half": random.normal(size=(4, side, side)).astype(np.float16),
        "rgb": random.integers(0, 256, (3, side, side), np.uint8),
        "scale_xy": np.array([1.5, 1.5]),
    }
    return Embedding(features, (side, side + 1), "weights-1")


def a_key(number: int) -> EmbeddingKey:
    return EmbeddingKey(f"{number:064x}", "weights-1")


FILE_BYTES = 2100
"""What one of `an_embedding` takes on disk, roughly and at most 2.5 kB."""


def same(one: Embedding, other: Embedding | None) -> bool:
    assert other is not None
    return (one.image_hw, one.version, one.features.keys()) == (
        other.image_hw,
        other.version,
        other.features.keys(),
    ) and all(
        array.dtype == other.features[name].dtype and np.array_equal(array, other.features[name])
        for name, array in one.features.items()
    )


def test_what_one_process_keeps_another_finds_as_it_was(tmp_path: Path):
    EmbeddingFiles(tmp_path / "e", 2**20).put(a_key(1), an_embedding())
    other = EmbeddingFiles(tmp_path / "e", 2**20)
    assert same(an_embedding(), other.get(a_key(1)))
    assert other.get(a_key(2)) is None


@pytest.mark.parametrize(
    "key", [EmbeddingKey("a", "weights-2"), EmbeddingKey("b", "weights-1"), EmbeddingKey("a", "weights-1", 1.5)]
)
def test_other_weights_images_and_scales_are_other_embeddings(tmp_path: Path, key: EmbeddingKey):
    files = EmbeddingFiles(tmp_path, 2**20)
    files.put(EmbeddingKey("a", "weights-1"), an_embedding())
    assert files.get(key) is None
    assert key not in files


def cut(content: bytes) -> bytes:
    return content[:-100]


def flipped(content: bytes) -> bytes:
    return content[:-50] + bytes([content[-50] ^ 1]) + content[-49:]


@pytest.mark.parametrize("damage", [cut, flipped, lambda content: b"", lambda content: b"\xff" * len(content)])
def test_a_damaged_file_is_a_miss_and_removed(tmp_path: Path, damage, caplog: pytest.LogCaptureFixture):
    files = EmbeddingFiles(tmp_path, 2**20)
    files.put(a_key(1), an_embedding())
    (path,) = tmp_path.glob("*.safetensors")
    path.write_bytes(damage(path.read_bytes()))
    assert files.get(a_key(1)) is None
    assert not path.exists()
    assert "damaged" in caplog.text


def test_a_file_under_a_wrong_name_is_a_miss(tmp_path: Path):
    files = EmbeddingFiles(tmp_path, 2**20)
    files.put(a_key(1), an_embedding())
    (path,) = tmp_path.glob("*.safetensors")
    path.rename(files._path(a_key(2)))
    assert files.get(a_key(2)) is None


def test_the_folder_never_holds_more_than_allowed_and_what_was_used_last_stays(tmp_path: Path):
    files = EmbeddingFiles(tmp_path, 5 * FILE_BYTES)
    for number in range(12):
        files.put(a_key(number), an_embedding(number))
        assert files.nbytes <= 5 * FILE_BYTES
        if number:
            # File systems note times coarsely: say by hand which was used last.
            os.utime(files._path(a_key(number)), (number, number))
            files.get(a_key(0))
    assert a_key(0) in files
    assert a_key(11) in files
    assert a_key(1) not in files


def test_several_writers_keep_to_the_limit_together(tmp_path: Path):
    most = 6 * FILE_BYTES
    seen: list[int] = []
    done = threading.Event()

    def write(first: int) -> None:
        files = EmbeddingFiles(tmp_path, most)  # its own lock, as another process has
        for number in range(first, first + 25):
            files.put(a_key(number), an_embedding(number))
            files.get(a_key(number - 3))

    def watch() -> None:
        while not done.is_set():
            seen.append(EmbeddingFiles(tmp_path, most).nbytes)
            time.sleep(0.001)

    threads = [threading.Thread(target=write, args=(1000 * i,)) for i in range(3)]
    watcher = threading.Thread(target=watch)
    for thread in (watcher, *threads):
        thread.start()
    for thread in threads:
        thread.join()
    done.set()
    watcher.join()
    assert max(seen) <= most
    assert not list(tmp_path.glob(".*.[0-9]*"))


def test_a_killed_writers_leavings_are_cleared_away(tmp_path: Path):
    left = tmp_path / ".0123.99.1"
    left.write_bytes(b"half")
    EmbeddingFiles(tmp_path, 2**20).put(a_key(1), an_embedding())
    assert not left.exists()


def test_nothing_is_kept_where_nothing_is_allowed_or_it_is_too_large(tmp_path: Path):
    for most in (0, 100):
        files = EmbeddingFiles(tmp_path / "e", most)
        files.put(a_key(1), an_embedding())
        assert files.get(a_key(1)) is None
    assert not list(tmp_path.glob("e/*.safetensors"))


def test_a_folder_that_cannot_be_written_costs_nothing_but_the_cache(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    (tmp_path / "e").write_text("a file in the folder's place")
    files = EmbeddingFiles(tmp_path / "e", 2**20)
    for number in range(3):
        files.put(a_key(number), an_embedding())
        assert files.get(a_key(number)) is None
    assert caplog.text.count("cannot be kept") == 1


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.integers(0, 6), st.integers(1, 24)), max_size=40), st.integers(0, 8000))
def test_memory_never_holds_more_than_allowed(puts: list[tuple[int, int]], most: int):
    cache = EmbeddingCache(most)
    for number, side in puts:
        embedding = an_embedding(number, side)
        cache.put(a_key(number), embedding)
        assert cache.nbytes <= most
        assert cache.nbytes == sum(kept.nbytes for kept in cache._items.values())
        assert (cache.get(a_key(number)) is embedding) == (embedding.nbytes <= most)


def test_memory_is_filled_from_disk(tmp_path: Path):
    Embeddings(tmp_path, memory_bytes=2**20, disk_bytes=2**20).put(a_key(1), an_embedding())
    fresh = Embeddings(tmp_path, memory_bytes=2**20, disk_bytes=2**20)
    assert fresh.get(a_key(1)) is fresh.memory.get(a_key(1)) is not None


def test_halved_features_and_the_way_over_the_disk_leave_the_masks_as_they_are(tmp_path: Path, one_torch_thread: None):
    import torch

    from backend.compact import CompactSegmenter

    random = np.random.default_rng(3)
    image = np.full((192, 192, 3), (90, 110, 70), np.uint8)
    for x, y in ((20, 30), (90, 40), (60, 120)):
        image[y : y + 40, x : x + 50] = (190, 150, 140)
    image = np.clip(image + random.normal(0, 6, image.shape), 0, 255).astype(np.uint8)
    segmenter = CompactSegmenter.load()
    embedding = segmenter.embed(image)
    with torch.inference_mode():
        rgb = torch.from_numpy(image)[None].permute(0, 3, 1, 2).float()
        coarse, fine = segmenter._net.features(rgb.contiguous(memory_format=torch.channels_last))
    whole = Embedding(
        {**embedding.features, "coarse": coarse[0].numpy(), "fine": fine[0].numpy()},
        embedding.image_hw,
        embedding.version,
    )
    assert embedding.features["coarse"].dtype == np.float16
    files = EmbeddingFiles(tmp_path, 2**24)
    files.put(a_key(1), embedding)
    kept = files.get(a_key(1))
    assert kept is not None
    for x, y in ((45, 50), (115, 60), (85, 140)):
        prompts = Prompts(np.array([(x, y)], float), np.array([True]))
        exact, halved, read = (segmenter.segment(e, prompts).probabilities[0] > 0.5 for e in (whole, embedding, kept))
        assert exact.any()
        assert (exact & halved).sum() >= 0.995 * (exact | halved).sum()
        assert np.array_equal(halved, read)
