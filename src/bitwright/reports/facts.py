"""What a finished run recorded, read once and checked: run.json and 5-records.jsonl as typed facts.

Both files are plain text that people open and sometimes edit; see `entries` for what is made of each entry. What only
some runs have (trials, repairs, samples of text …) is in `findings`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from bitwright.errors import RunError
from bitwright.reports.channels import ChannelFact, read_channels
from bitwright.reports.entries import Figure, Records, figure, mapping_or_empty, read_entry
from bitwright.reports.findings import Findings, read_findings
from bitwright.runs import RUN_FILE, open_run, quantized_run


@dataclass(frozen=True, kw_only=True, slots=True)
class Results:
    """The headline figures of run.json, in the units their names say; divergences in nats per token."""

    kl_mean: Figure
    kl_stderr: Figure
    kl_p99: Figure
    kl_p999: Figure
    same_top1: Figure
    perplexity: Figure
    reference_perplexity: Figure
    gate_tokens: Figure
    bits_per_weight: Figure
    ideal_bits_per_weight: Figure
    model_bits_per_parameter: Figure
    size_bytes: Figure
    original_size_bytes: Figure
    num_quantized: Figure
    num_kept: Figure
    quantized_weights: Figure
    num_parameters: Figure
    seconds: Figure
    peak_memory_bytes: Figure


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockFact:
    """One decoder block: how long it took and the signal to noise of the hidden state that leaves it."""

    block: str
    seconds: Figure
    hidden_sqnr_db: Figure


@dataclass(frozen=True, kw_only=True, slots=True)
class SiteFact:
    """One quantized site, as `walk.SiteResult` describes it."""

    block: str
    site: str
    scheme: str
    method: str
    bits_per_weight: Figure
    ideal_bits_per_weight: Figure
    num_weights: Figure
    weight_sqnr_db: Figure
    output_sqnr_db: Figure
    saturated: Figure
    num_tokens: Figure
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class KeptFact:
    """One site left in 16 bit, and why."""

    site: str
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class TransformFact:
    """What one transform did to one block, or to the whole model where `block` is empty.

    Attributes:
        what: in a few words.
        invariance: relative movement of the block's output.
        invariance_kl: divergence of the whole model from the original, nats per token.
    """

    transform: str
    block: str
    what: str
    invariance: Figure
    invariance_kl: Figure


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationFact:
    """One evaluation appended to the run later; the divergences are None without a reference."""

    text: str
    reference: str
    dtype: str
    device: str
    seqlen: Figure
    num_windows: Figure
    num_tokens: Figure
    perplexity: Figure
    perplexity_stderr: Figure
    kl_mean: Figure
    kl_stderr: Figure
    kl_p99: Figure
    kl_p999: Figure
    same_top1: Figure


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportFact:
    """One export and how far the engine's result was from ours; None where it was not verified."""

    to: str
    out: str
    engine: str
    weights_compared: Figure
    max_logit_difference: Figure
    logit_bound: Figure


@dataclass(frozen=True, kw_only=True, slots=True)
class Facts:
    """All that the report says, before it is put into words.

    Attributes:
        path: the run directory; of quantization-aware training that of its codes.
        failure: why the run failed its gate; None if it passed.
        asked: model, recipe and hashes from run.json, as written.
        task: what a training was asked for; empty where there was none.
        context: device, dtype, seed and environment from the records; empty if none was recorded.
        recorded: the headline figures as the records have them; None if they have none.
        channels: how loud the input channels of each group of sites are; empty where nothing was calibrated.
        findings: what only some runs have.
    """

    path: Path
    failure: str | None
    asked: Mapping[str, Any]
    task: Mapping[str, Any]
    context: Mapping[str, Any]
    results: Results
    recorded: Results | None
    blocks: tuple[BlockFact, ...]
    sites: tuple[SiteFact, ...]
    kept: tuple[KeptFact, ...]
    transforms: tuple[TransformFact, ...]
    evaluations: tuple[EvaluationFact, ...]
    exports: tuple[ExportFact, ...]
    channels: tuple[ChannelFact, ...]
    findings: Findings

    @property
    def recipe(self) -> Mapping[str, Any]:
        """The recipe as plain data; empty if run.json holds none."""
        return mapping_or_empty(self.asked.get("recipe"))

    @property
    def max_kl(self) -> Figure:
        """The gate in nats per token."""
        return figure(self.recipe, "max_kl", f"{self.path / RUN_FILE}: recipe")

    @property
    def is_only_trained(self) -> bool:
        """Whether the run trained or merged something and quantized nothing."""
        return self.recorded is None and (self.findings.training is not None or bool(self.findings.merges))

    @property
    def figure(self) -> str:
        """The figure that ranks sites: the error of their output where it was measured, else of their weights."""
        has_output = any(site.output_sqnr_db is not None for site in self.sites)
        return "output_sqnr_db" if has_output else "weight_sqnr_db"


def read_facts(path: Path) -> Facts:
    """Read a finished run.

    Raises:
        RunError: no finished run there, or an entry that is not what bitwright writes.
    """
    whole = mapping_or_empty(mapping_or_empty(open_run(path).info).get("asked"))
    path = quantized_run(path)
    run = open_run(path)
    info = mapping_or_empty(run.info)
    task = _task(whole)
    where = f"{path / RUN_FILE}: results"
    if not isinstance(info.get("results"), dict):
        raise RunError(f"{where}: missing. The file was changed by hand or is of another version; run again.")
    records = Records(run)
    recorded = records.read(Results, "quantize")
    failure = info.get("failure")
    return Facts(
        path=path,
        failure=None if failure is None else str(failure),
        asked=mapping_or_empty(info.get("asked")),
        task=task,
        context=records.first("context") or _environment(records),
        results=read_entry(Results, cast(dict[str, Any], info["results"]), where),
        recorded=recorded[0] if recorded else None,
        blocks=records.read(BlockFact, "block"),
        sites=records.read(SiteFact, "site"),
        kept=records.read(KeptFact, "kept"),
        transforms=records.read(TransformFact, "transform"),
        evaluations=records.read(EvaluationFact, "evaluate"),
        exports=records.read(ExportFact, "export"),
        channels=read_channels(run),
        findings=read_findings(records, task),
    )


def _task(asked: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a training was asked for, and what it was to start from."""
    task, method = mapping_or_empty(asked.get("task")), mapping_or_empty(asked.get("recipe")).get("method")
    return {**task, "method_before_training": method} if task and method else task


def _environment(records: Records) -> Mapping[str, Any]:
    """The context of a run that recorded its environment alone."""
    found = {key: value for key, value in records.first("environment").items() if key != "kind"}
    return {"environment": found} if found else {}
