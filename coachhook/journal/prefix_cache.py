"""A value over a growing list, kept so that one entry more costs one step."""

from collections.abc import Callable, Sequence
from operator import is_
from typing import Generic, TypeVar

Entry = TypeVar("Entry")
Value = TypeVar("Value")


class Running(Generic[Entry, Value]):
    """What `extend` makes of a list of entries, one after another, from `start()`.

    Entries are told apart by identity, and values must never be changed in place. The last two
    values are kept: when the last entry is taken back, the value before it is still there.
    """

    def __init__(
        self, start: Callable[[], Value], extend: Callable[[Value, Sequence[Entry]], Value]
    ) -> None:
        self._start = start
        self._extend = extend
        self._kept: list[tuple[list[Entry], Value]] = []

    def over(self, entries: Sequence[Entry]) -> Value:
        """The value over `entries`, from the longest beginning of them that is kept."""
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
