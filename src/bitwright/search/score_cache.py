"""Scores on disk: a kill repeats no finished row, and the ranks of a parallel run meet here.

Every rank appends JSON lines `{"row": name, "values": {column: number}}` to a file of its own and reads the files of
all. No process group is needed, only a folder that all can see; a later run may have another number of ranks.
"""

import fcntl
import math
import os
import time
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitwright.errors import RecipeError, RunError, VerificationError
from bitwright.records import append_jsonl, read_jsonl

POLL_SECONDS = 0.2
PATIENCE_SECONDS = 3600.0
"""How long no rank may finish anything before the others give up; one site of a large model may take minutes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Share:
    """Which part of the work is this process's: every item whose index leaves `rank` when divided by `num_ranks`."""

    rank: int = 0
    num_ranks: int = 1

    @staticmethod
    def of_environment() -> "Share":
        """Read RANK and WORLD_SIZE as torchrun sets them; one rank where they are not set.

        Raises:
            RecipeError: they are no numbers, or the rank is not below the world size.
        """
        rank, size = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
        if not (rank.isdecimal() and size.isdecimal() and int(rank) < int(size)):
            raise RecipeError(f"RANK={rank} WORLD_SIZE={size}: not a rank of a world. Start all ranks with torchrun.")
        return Share(rank=int(rank), num_ranks=int(size))

    def has(self, index: int) -> bool:
        """Whether item `index` is this rank's."""
        return index % self.num_ranks == self.rank

    @contextmanager
    def locked(self, folder: Path) -> Generator[None, None, None]:
        """Hold this rank's place in a folder; the lock dies with the process.

        Raises:
            RunError: another process works there as the same rank.
        """
        with (folder / f".lock-{self.rank}").open("w") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise RunError(
                    f"{folder}: another process is measuring here as rank {self.rank}. Wait for it, or choose another "
                    "folder."
                ) from None
            yield


class ScoreCache:
    """The rows of one table, as far as any rank has measured them.

    Args:
        folder: shared by all ranks.
        name: of the table; part of the file names.
        rank: of this process.
    """

    def __init__(self, folder: Path, name: str, rank: int) -> None:
        self.folder, self.name = folder, name
        self._own = folder / f"{name}.rank{rank}.jsonl"
        self.rows: dict[str, dict[str, float]] = {}
        self.refresh()

    def refresh(self) -> None:
        """Read what all ranks have written; a line torn by a crash does not count."""
        for path in sorted(self.folder.glob(f"{self.name}.rank*.jsonl")):
            for record in read_jsonl(path):
                self._put(path, record)

    def missing(self, row: str, columns: Iterable[str]) -> tuple[str, ...]:
        """Columns of a row that nobody has measured."""
        known = self.rows.get(row, {})
        return tuple(column for column in columns if column not in known)

    def add(self, row: str, values: dict[str, float]) -> None:
        """Store a finished row, or more columns of one; it is on disk when this returns.

        Raises:
            VerificationError: a value is not finite.
        """
        for column, value in values.items():
            if not math.isfinite(value):
                raise VerificationError(f"{row}: its {self.name} in {column} is {value}. Check the model and the text.")
        if values:
            append_jsonl(self._own, {"row": row, "values": values})
            self.rows.setdefault(row, {}).update(values)

    def wait(self, rows: Iterable[str], columns: Iterable[str], report: Callable[[int, int], None]) -> None:
        """Return when every row has every column, which the other ranks see to.

        Raises:
            RunError: nothing came for PATIENCE_SECONDS.
        """
        wanted, needed = list(rows), list(columns)
        since, last = time.monotonic(), -1
        while True:
            done = sum(not self.missing(row, needed) for row in wanted)
            report(done, len(wanted))
            if done == len(wanted):
                return
            if done != last:
                since, last = time.monotonic(), done
            elif time.monotonic() - since > PATIENCE_SECONDS:
                raise RunError(
                    f"{self.folder}: {len(wanted) - done} rows of {self.name} are missing and no rank has written any "
                    f"for {PATIENCE_SECONDS:.0f} s. Start all ranks again: finished rows are kept."
                )
            time.sleep(POLL_SECONDS)
            self.refresh()

    def _put(self, path: Path, record: dict[str, Any]) -> None:
        row, values = record.get("row"), record.get("values")
        if not isinstance(row, str) or not isinstance(values, dict):
            raise RunError(f"{path}: holds a line that is no score. Remove the file and measure again.")
        self.rows.setdefault(row, {}).update(values)
