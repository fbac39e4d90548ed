"""A corpus that every Python installation carries: the standard library's own sources.

It trains and demonstrates the embedded demo model, so that `bitwright demo` and the tests need no download. Whole files
belong to one split, chosen by a hash of their path, so that a file is never both calibration and evaluation text.
"""

import hashlib
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
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        top = name.split("/")[0]
        is_test = top == "test" or "/test" in name
        if top.startswith(TABLE_FOLDERS) or (is_test and not with_tests):
            continue
        if not _belongs(split, 100 if is_test else _bucket(name)):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # a few test files are deliberately not UTF-8
        if len(text) >= MIN_CHARACTERS:
            yield name, text


def _belongs(split: str, bucket: int) -> bool:
    if split == "heldout":
        return bucket < HELD_OUT_PERCENT
    last = HELD_OUT_PERCENT + CALIBRATION_PERCENT if split == "calibration" else 101
    return HELD_OUT_PERCENT <= bucket < last


def _bucket(name: str) -> int:
    return hashlib.sha256(name.encode()).digest()[0] * 100 // 256
