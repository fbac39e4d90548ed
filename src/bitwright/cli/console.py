"""How the command line talks: progress with time left on stderr, results on stdout, errors in one line."""

import json
import sys
from collections.abc import Sequence
from types import TracebackType
from typing import Any, NoReturn

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

SPEED_PERIOD_SECONDS = 3600.0
"""A step of which parts take minutes has a time left too."""


class ProgressBars:
    """One bar with time left per step. Call it with (what, done, total)."""

    def __init__(self, *, quiet: bool) -> None:
        console = Console(stderr=True)
        self._quiet = quiet or not console.is_terminal  # elsewhere bars are noise around the one line of an error
        self._progress = Progress(
            TextColumn("{task.description:>10}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            speed_estimate_period=SPEED_PERIOD_SECONDS,
        )
        self._tasks: dict[str, TaskID] = {}
        self._showing = False

    def __enter__(self) -> "ProgressBars":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._showing:
            self._progress.stop()

    def __call__(self, what: str, done: int, total: int) -> None:
        """Report that `done` of `total` parts of a step are finished."""
        if self._quiet:
            return
        if not self._showing:
            self._progress.start()
            self._showing = True
        task = self._tasks.get(what)
        if task is None:
            task = self._tasks[what] = self._progress.add_task(what, total=total)
        self._progress.update(task, completed=done, total=total, visible=done < total)


def fail(message: str, status: int) -> NoReturn:
    """Print one line to stderr and leave with an exit code."""
    print(f"bitwright: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(status)


def wide_console(width: int | None) -> Console:
    """The terminal, or a pipe of so many columns, which has no width of its own."""
    console = Console()
    return console if width is None or console.is_terminal else Console(width=width)


def show(*things: Any, width: int | None = None) -> None:
    """Print texts and tables; `width` columns where the output has no width of its own."""
    console = wide_console(width)
    for thing in things:
        console.print(thing, soft_wrap=isinstance(thing, str), highlight=False)


def print_json(value: Any) -> None:
    """Print a result as JSON."""
    print(json.dumps(value, indent=1))


def listed(given: Sequence[str] | None) -> list[str]:
    """The parts of options that hold several, separated by commas."""
    return [part.strip() for each in given or () for part in each.split(",") if part.strip()]
