"""Which of more things than can be kept are kept: the newest, some of every label, and a sample of all the others."""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Collection, Iterator
from typing import Any, Generic, TypeVar

Item = TypeVar("Item")


class Sample(Generic[Item]):
    """At most ``most`` of the items that are added; memory for so many, and not for all of them.

    Half are the newest. A quarter is shared among the labels, the newest that have each, so that none is forgotten
    once others are drawn. The rest are those of all others whose key has the smallest hashes (bottom-k sketch: Cohen
    and Kaplan, "Summarizing data using bottom-k sketches", 2007): spread evenly, and mostly the same ones when new
    items come.
    """

    def __init__(self, most: int, labels: Collection[str]) -> None:
        self._most = most
        self._newest = _Best[Item](most - most // 2)
        self._with_label = {label: _Best[Item](max(1, most // 4 // len(labels))) for label in labels}
        self._spread = _Best[Item](most)
        self.added = 0

    def add(self, item: Item, *, key: str, age: Any, labels: Collection[str]) -> None:
        """Take an item into account. Of two ages the greater is the newer; labels not announced do not count."""
        self._newest.add(age, self.added, item)
        for label in self._with_label.keys() & set(labels):
            self._with_label[label].add(age, self.added, item)
        self._spread.add(-int.from_bytes(hashlib.sha256(key.encode()).digest()[:8]), self.added, item)
        self.added += 1

    def items(self) -> list[Item]:
        """What is kept, as it came."""
        kept: dict[int, Item] = {}
        for best in (*self._with_label.values(), self._newest, self._spread):
            for number, item in best.best_first():
                if len(kept) < self._most:
                    kept[number] = item
        return [kept[number] for number in sorted(kept)]


class _Best(Generic[Item]):
    """The items of highest rank; of the same rank, the later ones."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._heap: list[tuple[Any, int, Item]] = []

    def add(self, rank: Any, number: int, item: Item) -> None:
        entry = rank, number, item
        if len(self._heap) < self._most:
            heapq.heappush(self._heap, entry)
        else:
            heapq.heappushpop(self._heap, entry)

    def best_first(self) -> Iterator[tuple[int, Item]]:
        return ((number, item) for _, number, item in sorted(self._heap, reverse=True))
