"""How long work reports how far it has come."""

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""Called with (what, done, total)."""


def no_progress(what: str, done: int, total: int) -> None:
    """Say nothing."""
