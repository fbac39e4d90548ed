"""The page of the methods benchmark: a table per budget, and the answers that the rows give, lost ones included."""

import math
from collections.abc import Sequence
from typing import Any

Row = dict[str, Any]
OURS = "bitwright"
SAME_METHOD = {
    "rtn": "rtn", "gptq": "gptq", "awq": "awq", "hqq": "hqq", "smoothquant": "smoothquant",
    "smoothquant+gptq": "smoothquant-gptq", "signround": "signround",
}  # fmt: skip
"""Our method -> how the same method of a peer is called, before what says its variant (-asym, -v2 …)."""
TIMED = ("gptq", "awq")
UNFINISHED = (
    "\nNot all cells were measured: this page shows those that were finished. The same command without --known goes on."
)
TOLERANCE = 0.005
"""Bits per weight that are still the same size."""
MARGINS = {"W3A16-g128": 0.10, "W3A16-g64": 0.10, "W2A16-g64": 0.10}
"""Where our best row is to be lower than the peers' best, and by how much."""


def page(circumstances: Row, rows: Sequence[Row]) -> str:
    """Return the page as Markdown."""
    c = circumstances
    parts = [
        f"# Methods on {c['name']}, {c['date']}",
        "",
        f"`python benchmarks/methods.py --name {c['name']} --samples {c['samples']} --seqlen {c['seqlen']} "
        f"--windows {c['windows']} --threads {c['threads']}{' --alone' if c['alone'] else ''}` on {c['machine']}. "
        f"Calibration: {c['samples']} windows of {c['seqlen']} tokens of {c['calibration']} (seed {c['seed']}), the "
        f"same ids for everybody. Judged on {c['windows']} windows of {c['text']}: KL divergence from the original in "
        "nats per token ± standard error over windows. Bits per weight count scales and zero points as stored. Every "
        "cell is a process of its own. "
        f"Ours computed in {c['dtype']}, peers in the checkpoint's dtype. Seconds and memory are of quantization, from "
        "the opened model and the token ids on: peers' without saving, ours without following the gate's text. MB are "
        "the growth of the process's resident memory and, in parentheses, its peak, most of which is libraries.",
        *([f"\n{c['note']}"] if c.get("note") else []),
        *([UNFINISHED] if c["known"] else []),
        "",
        "## Answers",
        "",
        *(f"- {answer}" for answer in answers(rows)),
    ]
    for budget in dict.fromkeys(row["budget"] for row in rows):
        parts += ["", f"## {budget}", "", *table([row for row in rows if row["budget"] == budget])]
    failed = [row for row in rows if "error" in row]
    if failed:
        parts += ["", "## What could not be measured", ""]
        parts += [f"- {r['by']} {r['method']} {r['scheme']}: {' '.join(r['error'].split())}" for r in failed]
    return "\n".join(parts) + "\n"


def table(rows: Sequence[Row]) -> list[str]:
    """The measured rows of a budget, lowest divergence first."""
    measured = sorted(measured_of(rows), key=lambda row: row["kl_mean"])
    lines = [
        "| by | method | scheme | bits | KL | behind the best, s.e. | perplexity | seconds | MB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in measured:
        behind = "" if row is measured[0] else f"{paired(row, measured[0]):.1f}"
        by = f"**{row['by']}**" if row["by"] == OURS else row["by"]
        lines.append(
            f"| {by} | {row['method']} | {row['scheme']} | {row['bits_per_weight']:.3f} | {row['kl_mean']:.5f} ± "
            f"{row['kl_stderr']:.5f} | {behind} | {row['perplexity']:.3f} | {row['seconds']:.1f} | "
            f"{grown(row) / 1e6:.0f} ({row['peak_memory_bytes'] / 1e6:.0f}) |"
        )
    return lines


def answers(rows: Sequence[Row]) -> list[str]:
    """What the rows say to: best at every budget? as good as the same method of others? half the time and memory?"""
    found: list[str] = []
    for budget in dict.fromkeys(row["budget"] for row in rows):
        here = measured_of(row for row in rows if row["budget"] == budget)
        ours = [row for row in here if row["by"] == OURS]
        theirs = [row for row in here if row["by"] != OURS]
        if ours and theirs:
            found += [best_answer(budget, ours, theirs), *same_answers(budget, ours, theirs)]
            found += [cost_answer(budget, method, ours, theirs) for method in TIMED if has_pair(method, ours, theirs)]
    return found


def best_answer(budget: str, ours: Sequence[Row], theirs: Sequence[Row]) -> str:
    """Our lowest row against theirs; one with more bits than any of the other side's is in the table only."""
    most = max(row["bits_per_weight"] for row in ours)
    rivals = [row for row in theirs if row["bits_per_weight"] <= most + TOLERANCE]
    if not rivals:
        return f"{budget}: no peer has as few bits"
    size = max(row["bits_per_weight"] for row in rivals)
    fair = [row for row in ours if row["bits_per_weight"] <= size + TOLERANCE] or ours
    mine, other = (min(side, key=lambda row: row["kl_mean"]) for side in (fair, rivals))
    gain = 1 - mine["kl_mean"] / other["kl_mean"]
    reached = gain >= MARGINS.get(budget, 0.0)
    return (
        f"{budget}, lowest KL: {describe(mine)} against {describe(other)}: {100 * abs(gain):.0f} % "
        f"{'lower' if gain >= 0 else 'HIGHER'} ({abs(paired(mine, other)):.1f} s.e.)"
        f"{'' if reached else '. NOT REACHED'}"
    )


def same_answers(budget: str, ours: Sequence[Row], theirs: Sequence[Row]) -> list[str]:
    """Each of our methods against the same of the peers, on grids with zero points and without."""
    found: list[str] = []
    for mine in ours:
        for other in theirs:
            if not is_same(mine, other):
                continue
            distance = paired(mine, other)
            verdict = "better" if distance < -2 else "as good" if distance <= 2 else "WORSE"
            found.append(
                f"{budget}, same method: {describe(mine)} against {describe(other)}: {verdict} ({distance:+.1f} s.e.)"
            )
    return found


def cost_answer(budget: str, method: str, ours: Sequence[Row], theirs: Sequence[Row]) -> str:
    """Our time and memory against those of the fastest and of the smallest peer with the same method."""
    mine = next(row for row in ours if row["method"] == method)
    same = [row for row in theirs if is_same(mine, row)]
    fastest = min(same, key=lambda row: row["seconds"])
    smallest = min(same, key=grown)
    return (
        f"{budget}, cost of {method}: {mine['seconds'] / fastest['seconds']:.2f} of the time of the fastest "
        f"({mine['seconds']:.1f} s, {fastest['by']} {fastest['seconds']:.1f} s), "
        f"{grown(mine) / grown(smallest):.2f} of the growth in memory of the smallest "
        f"({grown(mine) / 1e6:.0f} MB, {smallest['by']} {grown(smallest) / 1e6:.0f} MB), "
        f"{mine['peak_memory_bytes'] / smallest['peak_memory_bytes']:.2f} of its peak with all libraries"
    )


def grown(row: Row) -> int:
    """How many bytes the process grew while it quantized."""
    return row["peak_memory_bytes"] - row["memory_before_bytes"]


def has_pair(method: str, ours: Sequence[Row], theirs: Sequence[Row]) -> bool:
    """Whether a method of ours was measured, and the same of a peer."""
    return any(row["method"] == method and any(is_same(row, other) for other in theirs) for row in ours)


def is_same(mine: Row, other: Row) -> bool:
    """Whether a peer's row has the method and the kind of grid of ours."""
    name = SAME_METHOD.get(mine["method"])
    if name is None or other["scheme"] != mine["budget"]:
        return False
    if name == "hqq":
        return other["method"] == name
    is_asymmetric = mine["scheme"].endswith("-asym")
    base = other["method"].removesuffix("-asym")
    return (base == name or (name == "signround" and base.startswith("signround"))) and is_asymmetric == (
        other["method"] != base
    )


def measured_of(rows: Any) -> list[Row]:
    """The rows that have figures."""
    return [row for row in rows if "kl_mean" in row]


def paired(a: Row, b: Row) -> float:
    """How far a's divergence is above b's, in standard errors of the difference over windows."""
    differences = [x - y for x, y in zip(a["window_kl"], b["window_kl"], strict=True)]
    mean = math.fsum(differences) / len(differences)
    variance = math.fsum((d - mean) ** 2 for d in differences) / (len(differences) - 1)
    if variance == 0:
        return math.copysign(math.inf, mean) if mean else 0.0
    return mean / math.sqrt(variance / len(differences))


def describe(row: Row) -> str:
    """A row in a sentence."""
    return f"{row['by']} {row['method']} {row['scheme']} ({row['bits_per_weight']:.2f} bits, KL {row['kl_mean']:.5f})"
