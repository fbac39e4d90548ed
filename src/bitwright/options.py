"""The knobs of every method, as a recipe holds them. Defaults are what measured best; see the recipes that ship."""

import math
from dataclasses import dataclass
from typing import Literal

from bitwright.errors import RecipeError

Preset = Literal["light", "default", "best"]
Start = Literal["gptq", "rtn"]
PRESET_ITERATIONS: dict[Preset, int] = {"light": 50, "default": 200, "best": 1000}


@dataclass(frozen=True, kw_only=True, slots=True)
class GptqOptions:
    """GPTQ and its relatives.

    Attributes:
        damp: fraction of the Hessian's mean diagonal added to it.
        block: columns per lazy update; changes speed, never the result.
        act_order: visit columns by descending diagonal, with grids fixed beforehand.
        asymmetry: gptaq: weight of the term that makes up for what the quantized prefix has done to the inputs.
        guided_groups: guided: groups of output channels that have a Hessian of their own.
    """

    damp: float = 0.01
    block: int = 128
    act_order: bool = True
    asymmetry: float = 0.5
    guided_groups: int = 4

    def __post_init__(self) -> None:
        _check(self.damp > 0 and math.isfinite(self.damp), "gptq.damp", self.damp, "a finite number above 0")
        _check(self.block >= 1, "gptq.block", self.block, "at least 1")
        _check(0 <= self.asymmetry <= 1, "gptq.asymmetry", self.asymmetry, "from 0 to 1")
        _check(self.guided_groups >= 1, "gptq.guided_groups", self.guided_groups, "at least 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class AwqOptions:
    """AWQ.

    Attributes:
        grid: how many exponents from 0 to 1 are tried.
        duo: also try scales that weigh inputs against weights.
        explicit: where no edge leads to a site, divide its inputs at inference (own layout only).
        tokens: of the calibration text on which the outputs of attention and MLP are compared.
    """

    grid: int = 20
    duo: bool = True
    explicit: bool = False
    tokens: int = 4096

    def __post_init__(self) -> None:
        _check(self.grid >= 1, "awq.grid", self.grid, "at least 1")
        _check(self.tokens >= 1, "awq.tokens", self.tokens, "at least 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class SmoothQuantOptions:
    """SmoothQuant: `alpha` moves difficulty from inputs (0: none of it) to weights (1: all); None searches it."""

    alpha: float | None = None

    def __post_init__(self) -> None:
        good = self.alpha is None or 0 <= self.alpha <= 1
        _check(good, "smoothquant.alpha", self.alpha, "from 0 to 1, or left out to be searched")


@dataclass(frozen=True, kw_only=True, slots=True)
class RotationOptions:
    """Rotations.

    Attributes:
        kind: hadamard draws random Hadamard matrices, learned improves the best of them by gradients.
        seeds: how many are tried.
        steps: of learning.
        online: also rotate the inputs of sites that no rotation can be folded into, at inference (own layout).
        block: size of the blocks of a block Hadamard (32 for MX formats); None rotates whole rows.
    """

    kind: Literal["hadamard", "learned"] = "hadamard"
    seeds: int = 4
    steps: int = 100
    online: bool = True
    block: int | None = None

    def __post_init__(self) -> None:
        _check(self.seeds >= 1, "rotation.seeds", self.seeds, "at least 1")
        _check(self.steps >= 0, "rotation.steps", self.steps, "at least 0")
        _check(self.block is None or self.block >= 2, "rotation.block", self.block, "at least 2")


@dataclass(frozen=True, kw_only=True, slots=True)
class LlmInt8Options:
    """LLM.int8: inputs whose magnitude exceeds `threshold` on calibration text stay in 16 bit, with their weights."""

    threshold: float = 6.0

    def __post_init__(self) -> None:
        _check(self.threshold > 0, "llm_int8.threshold", self.threshold, "above 0")


@dataclass(frozen=True, kw_only=True, slots=True)
class HqqOptions:
    """HQQ: exponent of the norm that is minimised, strength of the half-quadratic penalty and its growth."""

    p: float = 0.7
    beta: float = 10.0
    kappa: float = 1.01
    iterations: int = 20

    def __post_init__(self) -> None:
        _check(0 < self.p <= 1, "hqq.p", self.p, "above 0 and at most 1")
        _check(self.beta > 0, "hqq.beta", self.beta, "above 0")
        _check(self.kappa >= 1, "hqq.kappa", self.kappa, "at least 1")
        _check(self.iterations >= 0, "hqq.iterations", self.iterations, "at least 0")


@dataclass(frozen=True, kw_only=True, slots=True)
class SignRoundOptions:
    """Learned rounding.

    Attributes:
        preset: light takes 50 iterations, default 200, best 1000.
        iterations: steps of signed gradient descent per block, in place of the preset's.
        first_step: size of the first step; None takes 1 / iterations, or twice that at 3 bits and below from 1000 on.
        batch: windows per step.
        drop: share of the largest output errors that the loss leaves out (SignRound V2).
        importance: start on ranges searched under mean square inputs (SignRound V2), not on ranges that cover all.
        start: whose codes to start from.
        autocast: compute the block's products in bfloat16 while training; None: in place of float32, where the device
            has instructions for them. Losses that decide are measured without.
    """

    preset: Preset = "default"
    iterations: int | None = None
    first_step: float | None = None
    batch: int = 8
    drop: float = 0.001
    importance: bool = True
    start: Start = "gptq"
    autocast: bool | None = None

    def __post_init__(self) -> None:
        good = self.iterations is None or self.iterations >= 0
        _check(good, "signround.iterations", self.iterations, "at least 0")
        good = self.first_step is None or 0 < self.first_step <= 1
        _check(good, "signround.first_step", self.first_step, "above 0 and at most 1")
        _check(self.batch >= 1, "signround.batch", self.batch, "at least 1")
        _check(0 <= self.drop < 0.5, "signround.drop", self.drop, "from 0 to 0.5")

    @property
    def num_iterations(self) -> int:
        """Steps per block."""
        return PRESET_ITERATIONS[self.preset] if self.iterations is None else self.iterations


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockApOptions:
    """Block-wise training of weights, scales and zero points (EfficientQAT's Block-AP).

    Attributes:
        epochs: passes over the calibration windows.
        batch: windows per step.
        weight_travel: how far a weight can move in all, in steps of its grid.
        scale_travel: how far scales (relative to themselves) and zero points (in codes) can.
        start: whose codes to start from.
        autocast: as for learned rounding.
    """

    epochs: int = 8
    batch: int = 4
    weight_travel: float = 1.0
    scale_travel: float = 0.1
    start: Start = "gptq"
    autocast: bool | None = None

    def __post_init__(self) -> None:
        _check(self.epochs >= 0, "block_ap.epochs", self.epochs, "at least 0")
        _check(self.batch >= 1, "block_ap.batch", self.batch, "at least 1")
        _check(self.weight_travel >= 0, "block_ap.weight_travel", self.weight_travel, "at least 0")
        _check(self.scale_travel >= 0, "block_ap.scale_travel", self.scale_travel, "at least 0")


@dataclass(frozen=True, kw_only=True, slots=True)
class LowRankOptions:
    """Low-rank compensation: `rank` numbers per row and per column of a weight, beside its codes."""

    rank: int = 32

    def __post_init__(self) -> None:
        _check(self.rank >= 1, "low_rank.rank", self.rank, "at least 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class AutoOptions:
    """The data-driven choice.

    Attributes:
        sample: blocks on which the candidates are tried.
        candidates: compositions; None for those that suit the scheme (`chooser.default_candidates`).
    """

    sample: int = 3
    candidates: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        _check(self.sample >= 1, "auto.sample", self.sample, "at least 1")
        _check(self.candidates != (), "auto.candidates", self.candidates, "at least one")


def _check(holds: bool, key: str, value: object, wanted: str) -> None:
    if not holds:
        raise RecipeError(f"{key} must be {wanted}, got {value!r}.")
