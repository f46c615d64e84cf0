"""A value computed over a growing list, cached so that one more entry costs one step."""

from collections.abc import Callable, Sequence
from operator import is_
from typing import Generic, TypeVar

Entry = TypeVar("Entry")
Value = TypeVar("Value")


class Running(Generic[Entry, Value]):
    """The value that `extend` computes over a list of entries in order, beginning with `start()`.

    Entries are compared by identity, and cached values must never be changed in place. The last two
    values are kept, so that the previous one is still there when the last entry is taken back.
    """

    def __init__(
        self, start: Callable[[], Value], extend: Callable[[Value, Sequence[Entry]], Value]
    ) -> None:
        self._start = start
        self._extend = extend
        self._kept: list[tuple[list[Entry], Value]] = []

    def over(self, entries: Sequence[Entry]) -> Value:
        """The value over `entries`, extended from the longest prefix of them that is cached."""
        for known, value in reversed(self._kept):
            if len(known) <= len(entries) and all(map(is_, known, entries)):
                if len(known) == len(entries):
                    return value
                longer = self._extend(value, entries[len(known) :])
                self._kept = [(known, value), (list(entries), longer)]
                return longer
        value = self._extend(self._start(), entries)
        self._kept = [(list(entries), value)]
        return value
