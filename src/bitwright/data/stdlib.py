"""A corpus that every Python installation carries: the standard library's own sources.

It trains and demonstrates the embedded demo model, so that `bitwright demo` and the tests need no download. Whole files
belong to one split, chosen by a hash of their path, so that a file is never both calibration and evaluation text.
"""

import hashlib
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path

HELD_OUT_PERCENT = 6
CALIBRATION_PERCENT = 8
MIN_CHARACTERS = 2_000
TABLE_FOLDERS = ("encodings", "site-packages", "dist-packages", "lib2to3", "config-")


def stdlib_documents(split: str, *, with_tests: bool = False) -> Iterator[tuple[str, str]]:
    """Yield `(path, text)` of the running Python's own source files, in a fixed order.

    Args:
        split: "heldout"; "train", all other files; or "calibration", a small part of "train".
        with_tests: also yield CPython's test suite (only in "train"; some installations lack it).
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    for name in sorted(_source_files(root)):
        is_test = name.startswith("test/") or "/test" in name
        if is_test and not with_tests:
            continue
        if not _belongs(split, 100 if is_test else _bucket(name)):
            continue
        try:
            text = (root / name).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # a few test files are deliberately not UTF-8
        if len(text) >= MIN_CHARACTERS:
            yield name, text


def _source_files(root: Path) -> Iterator[str]:
    """Yield the paths of Python files below `root`, without descending into tables and installed packages."""
    for folder, subfolders, files in os.walk(root):
        if folder == str(root):
            subfolders[:] = [each for each in subfolders if not each.startswith(TABLE_FOLDERS)]
        place = Path(folder).relative_to(root)
        yield from ((place / file).as_posix() for file in files if file.endswith(".py"))


def _belongs(split: str, bucket: int) -> bool:
    if split == "heldout":
        return bucket < HELD_OUT_PERCENT
    last = HELD_OUT_PERCENT + CALIBRATION_PERCENT if split == "calibration" else 101
    return HELD_OUT_PERCENT <= bucket < last


def _bucket(name: str) -> int:
    return hashlib.sha256(name.encode()).digest()[0] * 100 // 256
