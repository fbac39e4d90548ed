"""What a transform is, and the table of those that exist: changes of a model that leave its function as it is.

Block transforms work on one block before it is quantized, on a `BlockStage`. Model transforms (rotations of the
residual stream) work on the whole model beforehand: they write a model directory that takes the original's place.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bitwright.methods import llm_int8, smoothquant
from bitwright.methods.awq import awq
from bitwright.methods.model_task import ModelChange, ModelTask
from bitwright.methods.online_hadamard import rotate_all_inputs
from bitwright.methods.rotation import read_rotation, rotate_model, rotate_rest, rotates_online
from bitwright.methods.stage import BlockStage
from bitwright.recipe import Recipe, SitePlan
from bitwright.registry import Registry


@dataclass(frozen=True, kw_only=True, slots=True)
class Transform:
    """Changes a model so that quantization hurts less.

    Attributes:
        about: what it does, in a few words.
        apply: works on one block; leaves notes for the records.
        apply_model: writes a whole model directory, before any block is quantized.
        read_change: reads back what `apply_model` wrote into its directory, for a resumed run.
        refuses: (site name, plan, recipe) -> why it makes no sense for a site, or None.
        needs_own_layout: whether a recipe leads to results that only bitwright's own layout holds.
        needs_text: whether a calibration text is required.
    """

    about: str
    apply: Callable[[BlockStage], None] | None = None
    apply_model: Callable[[ModelTask], ModelChange] | None = None
    read_change: Callable[[Path], ModelChange] | None = None
    refuses: Callable[[str, SitePlan, Recipe], str | None] = lambda _site, _plan, _recipe: None
    needs_own_layout: Callable[[Recipe], bool] = lambda _: False
    needs_text: bool = True


TRANSFORMS: Registry[Transform] = Registry("transform")
TRANSFORMS.register(
    "hadamard",
    Transform(
        about="rotates the inputs of every site at inference",
        apply=rotate_all_inputs, needs_own_layout=lambda _: True, needs_text=False,
    ),
)  # fmt: skip
TRANSFORMS.register(
    "awq",
    Transform(
        about="scales channels so that columns with large inputs lose less",
        apply=awq, needs_own_layout=lambda recipe: recipe.awq.explicit,
    ),
)  # fmt: skip
TRANSFORMS.register(
    "smoothquant",
    Transform(
        about="moves the range of inputs into the weights", apply=smoothquant.smoothquant, refuses=smoothquant.refuses
    ),
)
TRANSFORMS.register(
    "llm_int8",
    Transform(
        about="keeps columns with outlying inputs as floats",
        apply=llm_int8.llm_int8, refuses=llm_int8.refuses, needs_own_layout=lambda _: True,
    ),
)  # fmt: skip
TRANSFORMS.register(
    "rotation",
    Transform(
        about="rotates the residual stream and the heads of values; the rest online",
        apply=rotate_rest, apply_model=rotate_model, read_change=read_rotation, needs_own_layout=rotates_online,
    ),
)  # fmt: skip
