"""Samples of more tiles than can be kept: the newest, every label, the rest evenly, and the same again."""

from __future__ import annotations

import random

import pytest

from backend.sampling import Sample

Tile = tuple[int, frozenset[str]]
LABELS = ("building", "road")


def kept(tiles: list[Tile], most: int, *, ages: dict[int, int] | None = None) -> list[int]:
    sample: Sample[Tile] = Sample(most, LABELS)
    for tile in tiles:
        number, labels = tile
        sample.add(tile, key=str(number), age=(ages or {}).get(number, number), labels=labels)
    return [number for number, _ in sample.items()]


def plain(count: int, *, labels: frozenset[str] = frozenset({"building"})) -> list[Tile]:
    return [(number, labels) for number in range(count)]


@pytest.mark.parametrize("count", [0, 1, 40])
def test_what_fits_is_kept_whole_and_in_order(count: int) -> None:
    assert kept(plain(count), 40) == list(range(count))


def test_the_newest_half_is_that_which_was_saved_last_not_that_which_came_last() -> None:
    numbers = list(range(1000))
    random.Random(0).shuffle(numbers)
    ages = dict(enumerate(numbers))
    newest = {number for number, age in ages.items() if age >= 1000 - 50}
    found = kept(plain(1000), 100, ages=ages)
    assert len(found) == 100
    assert newest <= set(found)


def test_a_label_that_only_old_tiles_have_is_not_forgotten() -> None:
    tiles = [(number, frozenset({"road"} if number < 30 else {"building"})) for number in range(1000)]
    found = kept(tiles, 80)
    # A quarter for two labels; by chance a thirtieth of the rest.
    assert sum(number < 30 for number in found) >= 10


def test_the_rest_is_spread_evenly_over_what_is_older() -> None:
    found = [number for number in kept(plain(10_000, labels=frozenset()), 1000) if number < 9_500]
    assert len(found) == 500
    quarters = [sum(start <= number < start + 2375 for number in found) for start in range(0, 9_500, 2375)]
    assert min(quarters) > 80


def test_new_tiles_hardly_change_what_is_kept_of_the_old_ones() -> None:
    before, after = kept(plain(5000), 400), kept(plain(5020), 400)
    assert kept(plain(5000), 400) == before
    assert set(range(5000, 5020)) <= set(after)
    old = {number for number in before if number < 4800}
    assert len(old & set(after)) > 0.9 * len(old)


def test_more_labels_than_places_keep_to_the_limit() -> None:
    labels = [f"class {number}" for number in range(50)]
    sample: Sample[int] = Sample(8, labels)
    for number, label in enumerate(labels):
        sample.add(number, key=label, age=number, labels={label})
    assert len(sample.items()) == 8
    assert sample.added == 50
