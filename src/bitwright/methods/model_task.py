"""What a transform of the whole model is given, and what it gives back."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from bitwright.calibration.collect import SiteStats
from bitwright.methods.stage import FakeQuantize
from bitwright.model.sites import Site
from bitwright.model.stream import StreamedModel
from bitwright.numerics.inputs import InputQuantizer
from bitwright.progress import Progress
from bitwright.recipe import Plan, Recipe

InputQuantizerOf = Callable[[Site, SiteStats], InputQuantizer | None]


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelTask:
    """What a transform of the whole model is given.

    Attributes:
        model: the original.
        plan: what is to become of each site.
        recipe: the user's wishes.
        calibration: [N, T] tokens; N = 0 without text.
        out: directory to write, which does not exist; a killed run leaves none.
        progress: called with (what, done, total).
        input_quantizer: how the inputs of a site become codes, calibrated on these statistics; None if they do not.
        fake_quantize: what rounding to nearest makes of a weight.
    """

    model: StreamedModel
    plan: Plan
    recipe: Recipe
    calibration: Tensor
    out: Path
    progress: Progress
    input_quantizer: InputQuantizerOf
    fake_quantize: FakeQuantize


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelChange:
    """What a transform of the whole model did.

    Attributes:
        frame: [D, D] orthogonal: hidden states of the new model are those of the original times it; None if equal.
        notes: for the records.
    """

    frame: Tensor | None
    notes: dict[str, Any]
