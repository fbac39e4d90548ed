"""Names to implementations: one line registers a format, a method or an exporter."""

from collections.abc import Iterator
from typing import Generic, TypeVar

from bitwright.errors import UnknownName, did_you_mean

T = TypeVar("T")


class Registry(Generic[T]):
    """A table of named implementations; unknown names are errors with a suggestion."""

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self._entries: dict[str, T] = {}

    def register(self, name: str, entry: T) -> T:
        """Add an entry; a name can be registered once."""
        if name in self._entries:
            raise ValueError(f"{self._kind} '{name}' is registered twice")
        self._entries[name] = entry
        return entry

    def __getitem__(self, name: str) -> T:
        try:
            return self._entries[name]
        except KeyError:
            raise UnknownName(f"unknown {self._kind} '{name}'.{did_you_mean(name, self._entries)}") from None

    @property
    def names(self) -> tuple[str, ...]:
        """Every name, in alphabetical order."""
        return tuple(sorted(self._entries))

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._entries))

    def __contains__(self, name: object) -> bool:
        return name in self._entries
