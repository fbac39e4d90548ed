"""Tables for people: what each command prints when it is not asked for JSON."""

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table

if TYPE_CHECKING:
    from bitwright.catalogue import CatalogueRow
    from bitwright.demo import DemoRow
    from bitwright.evaluation.score import Score
    from bitwright.inspection import Inspection
    from bitwright.pipeline import QuantizeResult
    from bitwright.preflight import Estimate

SHOWN_GROUPS = 12


def size(num_bytes: float) -> str:
    """A size in decimal units."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= factor:
            return f"{num_bytes / factor:.2f} {unit}"
    return f"{num_bytes:.0f} B"


def estimate_line(needed: "Estimate") -> str:
    """What a run will need, in one line."""
    return (
        f"pre-flight passed: {needed.quantized_bits_per_weight:.3f} bits per weight, model {size(needed.model_bytes)}, "
        f"work files {size(needed.work_bytes)}, about {size(needed.memory_bytes)} of memory"
    )


def run_table(result: "QuantizeResult") -> Table:
    """What a quantization did and what it lost."""
    r = result.results
    table = _facts(str(result.run))
    table.add_row("gate", "failed" if result.failure else "passed")
    table.add_row("size", f"{size(r['original_size_bytes'])} → {size(r['size_bytes'])}")
    table.add_row(
        "bits per weight", f"{r['bits_per_weight']:.3f} over {r['num_quantized']} sites; {r['num_kept']} kept in 16 bit"
    )
    table.add_row("if entropy coded", f"{r['ideal_bits_per_weight']:.3f} bits per weight")
    table.add_row("stored as", ", ".join(r["layouts"]))
    table.add_row("bits per parameter", f"{r['model_bits_per_parameter']:.3f}, embeddings, norms and head included")
    table.add_row(
        "KL divergence", f"{_with_error(r['kl_mean'], r['kl_stderr'], 5)} nats/token, 99 %: {r['kl_p99']:.3f}"
    )
    table.add_row("same top-1", f"{r['same_top1']:.2%} of {r['gate_tokens']} tokens no method has seen")
    table.add_row("perplexity there", f"{r['reference_perplexity']:.3f} → {r['perplexity']:.3f}")
    table.add_row("time, peak memory", f"{r['seconds']:.1f} s, {size(r['peak_memory_bytes'])}")
    if result.resumed_blocks:
        table.add_row("resumed", f"after {result.resumed_blocks} blocks")
    return table


def score_table(score: "Score", circumstances: dict[str, Any]) -> Table:
    """Perplexity and divergence with all that belongs to them."""
    table = _facts(str(circumstances["model"]))
    table.add_row("text", f"{circumstances['text']}, {score.num_windows} windows of {circumstances['seqlen']} tokens")
    table.add_row("perplexity", _with_error(score.perplexity, score.perplexity_stderr, 4))
    if score.kl_mean is not None:
        table.add_row("reference", str(circumstances["reference"]))
        table.add_row("KL divergence", f"{_with_error(score.kl_mean, score.kl_stderr, 6)} nats/token")
        table.add_row("KL 99 %, 99.9 %", f"{score.kl_p99:.4f}, {score.kl_p999:.4f}")
        table.add_row("same top-1", f"{score.same_top1:.3%}")
    return table


def inspection_tables(found: "Inspection") -> list[Table]:
    """Structure and scheme weights of a model."""
    facts = _facts(found.model)
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(found.counts().items()))
    facts.add_row(
        "architecture", f"{found.architecture}, {found.num_parameters:,} parameters, {size(found.size_bytes)}"
    )
    facts.add_row("blocks", f"{len(found.structure.blocks)} at {found.structure.blocks_path}")
    facts.add_row("sites", kinds)
    facts.add_row("head", "tied to the embedding" if found.structure.tied_head else "its own weight")
    if found.unused_tensors:
        facts.add_row("unused tensors", f"{len(found.unused_tensors)}, first {found.unused_tensors[0]}")
    return [facts, *_block_tables(found), _scheme_table(found)]


def _block_tables(found: "Inspection") -> list[Table]:
    """One table per kind of block."""
    tables: list[Table] = []
    number = Counter(block.signature for block in found.structure.blocks)
    seen: set[str] = set()
    for block in found.structure.blocks:
        if block.signature in seen:
            continue
        seen.add(block.signature)
        table = Table(
            title=f"{block.name} ({number[block.signature]} blocks like it)", box=box.SIMPLE, title_justify="left"
        )
        for column in ("sites that share an input", "shape", "scaled by (proven edge)"):
            table.add_column(column, overflow="fold")
        sites = {site.name: site for site in block.sites}
        for group in block.groups[:SHOWN_GROUPS]:
            edges = [edge for edge in block.edges if set(edge.consumers) == set(group.sites)]
            names = ", ".join(name.removeprefix(block.name + ".") for name in group.sites)
            shapes = ", ".join(f"{sites[name].out_features}×{sites[name].in_features}" for name in group.sites)
            table.add_row(
                names, shapes, ", ".join(edge.producer.removeprefix(block.name + ".") for edge in edges) or "–"
            )
        if len(block.groups) > SHOWN_GROUPS:
            table.add_row(f"… {len(block.groups) - SHOWN_GROUPS} more groups (see --json)", "", "")
        tables.append(table)
    return tables


def _scheme_table(found: "Inspection") -> Table:
    table = Table(title="what common schemes would weigh", box=box.SIMPLE, title_justify="left")
    for column in ("scheme", "size", "bits per weight", ""):
        table.add_column(column, overflow="fold")
    for scheme in found.schemes:
        if scheme.size_bytes is None or scheme.bits_per_weight is None:
            table.add_row(scheme.scheme, "–", "–", scheme.note)
        else:
            table.add_row(scheme.scheme, size(scheme.size_bytes), f"{scheme.bits_per_weight:.3f}", scheme.note)
    return table


def formats_table(rows: "Sequence[CatalogueRow]") -> Table:
    """Every family of schemes."""
    caption = (
        "bpw: bits per weight with scales, for a 4096×4096 weight. Granularities: t tensor, c channel, g<n> groups, "
        "b<n> blocks; the default first. CT: compressed-tensors, own: bitwright. docs/formats.md explains the options."
    )
    table = Table(box=box.SIMPLE_HEAD, caption=caption, caption_justify="left")
    for column in ("--scheme", "bits", "levels", "range", "bpw", "granularity", "inputs", "exports", "what", "source"):
        table.add_column(column, overflow="fold", no_wrap=column not in ("what", "source"))
    for row in rows:
        default, *others = row.granularities
        letters = " ".join(other[0] for other in others)
        exports = "CT, own" if len(row.exports) > 1 else "own"
        table.add_row(
            row.scheme, f"{row.bits:g}", str(row.levels), row.range, f"{row.bits_per_weight:.3f}",
            f"{default} {letters}", row.activations, exports, row.about, row.reference,
        )  # fmt: skip
    return table


def demo_table(rows: "Sequence[DemoRow]") -> Table:
    """The demo's comparison."""
    caption = "bits per weight of the quantized sites; KL in nats per token; s to quantize"
    table = Table(box=box.SIMPLE_HEAD, caption=caption, caption_justify="left")
    for column in ("", "bits", "size", "perplexity", "KL", "same top-1", "s"):
        table.add_column(column, justify="left" if not column else "right", no_wrap=True)
    for row in rows:
        table.add_row(
            row.name, f"{row.bits_per_weight:.3f}", size(row.size_bytes),
            _with_error(row.perplexity, row.perplexity_stderr, 2), f"{row.kl_mean:.5f}", f"{row.same_top1:.2%}",
            f"{row.seconds:.1f}",
        )  # fmt: skip
    return table


def doctor_table(found: dict[str, Any]) -> Table:
    """Versions, devices and what is missing."""
    table = _facts("bitwright doctor")
    for name, value in found["environment"].items():
        table.add_row(name, str(value))
    for name, version in found["packages"].items():
        table.add_row(name, version)
    for name, remedy in found["missing"].items():
        table.add_row(f"{name} (absent)", remedy)
    return table


def _with_error(value: float, stderr: float | None, digits: int) -> str:
    """A figure with its standard error, where there is one."""
    return f"{value:.{digits}f}" + ("" if stderr is None else f" ± {stderr:.{digits}f}")


def _facts(title: str) -> Table:
    table = Table(title=title, box=box.SIMPLE, show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    return table
