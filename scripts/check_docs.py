"""Check the documentation against what is there: every relative link resolves, every command in the README parses.

    python scripts/check_docs.py

Prints one line per flaw; the exit code is 1 if there is any.
"""

import re
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
HEADING = re.compile(r"^#+ +(.+)$", re.MULTILINE)
COMMAND = re.compile(r"^\s*(?:\$ )?bitwright (.+)$", re.MULTILINE)


def documents() -> list[Path]:
    return [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]


def anchors(text: str) -> set[str]:
    """The anchors GitHub gives a document's headings."""
    headings = HEADING.findall(FENCE.sub("", text))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def broken_links(path: Path) -> list[str]:
    text = path.read_text(encoding="utf-8")
    flaws: list[str] = []
    for link in LINK.findall(FENCE.sub("", text)):
        if re.match(r"[a-z]+:", link):
            continue
        file, _, anchor = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        if not target.exists():
            flaws.append(f"{path.relative_to(ROOT)}: link to {link}, which does not exist")
        elif anchor and target.suffix == ".md" and anchor not in anchors(target.read_text(encoding="utf-8")):
            flaws.append(f"{path.relative_to(ROOT)}: link to {link}, which has no such heading")
    return flaws


def command_lines(text: str) -> list[list[str]]:
    """The arguments of each `bitwright ...` line in a code block, without comments and the brackets of options."""
    blocks = re.sub(r"\\\n\s*", "", "\n".join(FENCE.findall(text)))
    lines: list[list[str]] = []
    for line in COMMAND.findall(blocks):
        plain = re.split(r"\s{3,}|\s[|>;]\s", line.strip())[0]
        lines.append(shlex.split(re.sub(r"[\[\]]", "", plain), comments=True))
    return lines


def unparsable(arguments: list[str]) -> str | None:
    # --help is honoured before any value is checked, and after every option's name is.
    program = Path(sys.executable).with_name("bitwright")
    result = subprocess.run([program, *arguments, "--help"], capture_output=True, text=True, check=False)
    if result.returncode == 0:
        return None
    return f"README.md: bitwright {shlex.join(arguments)}: {' '.join(result.stderr.split())}"


def main() -> int:
    flaws = [flaw for path in documents() for flaw in broken_links(path)]
    commands = command_lines((ROOT / "README.md").read_text(encoding="utf-8"))
    flaws += [flaw for arguments in commands if (flaw := unparsable(arguments))]
    print(*flaws, f"{len(documents())} documents, {len(commands)} commands, {len(flaws)} flaws", sep="\n")
    return 1 if flaws else 0


if __name__ == "__main__":
    sys.exit(main())
