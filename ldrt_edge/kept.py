"""Values worth keeping, within a bound of bytes: the least recently used go first."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

K = TypeVar("K")
V = TypeVar("V")


class Kept(Generic[K, V]):
    """Values by key, at most `most_bytes` of them together; `size` tells a value's bytes."""

    def __init__(self, most_bytes: int, size: Callable[[V], int]) -> None:
        self.most_bytes, self.bytes = most_bytes, 0
        self._size = size
        self._values: OrderedDict[K, V] = OrderedDict()

    def get(self, key: K) -> V | None:
        """A value, which is now the last used one; None where there is none."""
        value = self._values.get(key)
        if value is not None:
            self._values.move_to_end(key)
        return value

    def put(self, key: K, value: V) -> None:
        """Keep a value as the last used one, unless it alone is more than may be kept."""
        self.take(key)
        if self._size(value) > self.most_bytes:
            return
        self._values[key] = value
        self.bytes += self._size(value)
        while self.bytes > self.most_bytes:
            self.take(next(iter(self._values)))

    def take(self, key: K) -> V | None:
        """Give a value away; None where there is none."""
        value = self._values.pop(key, None)
        if value is not None:
            self.bytes -= self._size(value)
        return value

    def clear(self) -> None:
        """Keep nothing."""
        self._values.clear()
        self.bytes = 0

    def __iter__(self) -> Iterator[K]:
        """The keys, the least recently used first."""
        return iter(list(self._values))
