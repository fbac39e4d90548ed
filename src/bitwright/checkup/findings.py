"""What a check-up says: findings in words, with the figures that they rest on.

error     the checkpoint is not what it should be: it loads wrongly or not at all, or computes something else
warning   it may be meant, but it costs, or an engine may trip over it
note      what a reader of the figures must know; nothing is wrong
"""

from dataclasses import asdict, dataclass
from typing import Any, Literal

Severity = Literal["error", "warning", "note"]
Kind = Literal[
    "missing-site", "missing-tensor", "extra-tensor", "wrong-shape", "unreadable", "nan-scale", "zero-scale",
    "not-finite", "unquantized-site", "group-order", "swapped-scales", "scale-factor", "wrong-scales",
    "clipped-zero-point", "wrong-zero-point", "saturated", "transposed", "permuted", "weight-loss", "changed-tensor",
    "activation-outliers", "divergence", "folded-transform", "changed-basis", "replaced",
]  # fmt: skip
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One thing that was found.

    Attributes:
        severity: see above.
        kind: which fault; docs/diagnose.md lists them.
        site: where: a module, a tensor, a block, or `model`.
        what: what is the matter, in words.
        evidence: the numbers that say so.
        remedy: what to do.
        explained: share of the model's divergence that goes when the original's weight stands in; None where that was
            not measured.
    """

    severity: Severity
    kind: Kind
    site: str
    what: str
    evidence: str
    remedy: str
    explained: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class SiteFigures:
    """How well one quantized weight holds the original's.

    Attributes:
        site: module.
        block: number of its decoder block; None outside the blocks.
        bits: per code.
        weight_sqnr_db: of the weight, in the space of the codes; None where nothing differs.
        expected_weight_sqnr_db: what rounding the original to nearest in the same format gives.
        output_sqnr_db: of the site's outputs on the inputs that the original has there; None where no token came by.
        expected_output_sqnr_db: that of rounding to nearest.
        input_sqnr_db: of the outputs when only the inputs are quantized; None where they are not.
        saturated: share of the codes at the ends of the range.
        folded: the original was scaled along proven edges before it was compared.
    """

    site: str
    block: int | None
    bits: float
    weight_sqnr_db: float | None
    expected_weight_sqnr_db: float | None
    output_sqnr_db: float | None
    expected_output_sqnr_db: float | None
    input_sqnr_db: float | None
    saturated: float
    folded: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockDepth:
    """How far a decoder block takes the quantized model from the original.

    Attributes:
        block: its name.
        hidden_sqnr_db: of the hidden state after it, each model on its own path; None where nothing differs.
        update_sqnr_db: of what the block adds to the hidden state, both on the original's; None where nothing differs.
    """

    block: str
    hidden_sqnr_db: float | None
    update_sqnr_db: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkup:
    """What `bitwright diagnose` found.

    Attributes:
        original: the unquantized model.
        quantized: the model directory that was examined.
        text: what the models were run on; None for random tokens.
        num_windows: of that text.
        seqlen: tokens per window.
        num_quantized: weights stored as codes, readable or not.
        kl: mean KL divergence from the original in nats per token; with the original's weights where the checkpoint
            holds none that can be read.
        findings: the worst first.
        sites: of every quantized weight that could be compared.
        depth: block by block.
    """

    original: str
    quantized: str
    text: str | None
    num_windows: int
    seqlen: int
    num_quantized: int
    kl: float
    findings: tuple[Finding, ...]
    sites: tuple[SiteFigures, ...]
    depth: tuple[BlockDepth, ...]

    @property
    def num_errors(self) -> int:
        """How many findings are errors."""
        return sum(finding.severity == "error" for finding in self.findings)

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self)


def worst_first(findings: list[Finding]) -> tuple[Finding, ...]:
    """Sort by severity, then by what they explain of the divergence; what makes a model unusable explains all."""

    def key(finding: Finding) -> tuple[int, float]:
        return SEVERITIES.index(finding.severity), -(0.0 if finding.explained is None else finding.explained)

    return tuple(sorted(findings, key=key))
