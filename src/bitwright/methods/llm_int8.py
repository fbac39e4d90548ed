"""LLM.int8: the few input channels that hold outliers stay in 16 bit, with their weights; all others are quantized.

A channel counts as an outlier if any calibration token exceeds the threshold in magnitude. Its column of the weight is
kept as floats and multiplied by the inputs as they are; to the codes it looks as if those inputs were always 0, so that
the scales of a token, or a calibrated range, are those of the ordinary channels.

Shapes: I in features, k columns that stay floats.
"""

from bitwright.methods.invariance import output_of
from bitwright.methods.scaling import observe_planned
from bitwright.methods.stage import BlockStage
from bitwright.numerics.metrics import relative_error
from bitwright.recipe import Recipe, SitePlan


def llm_int8(stage: BlockStage) -> None:
    """Say which columns of every site stay floats; see `Transform.apply`.

    Reference:
        Dettmers et al., LLM.int8(), arXiv:2208.07339. Differs: the columns are found on calibration text, not per call.
    """
    before = output_of(stage)
    for group in observe_planned(stage):
        assert group.seen.peak is not None
        index = (group.seen.peak > stage.recipe.llm_int8.threshold).nonzero().flatten()
        if index.numel():
            stage.float_columns.update(dict.fromkeys(group.names, index))
        stage.notes.append(
            {
                "transform": "llm_int8",
                "sites": list(group.names),
                "float_columns": index.tolist(),
                "peak": float(group.seen.peak.max()),
                "invariance": relative_error(before, output_of(stage, group.names)) if index.numel() else 0.0,
            }
        )


def refuses(_site: str, plan: SitePlan, recipe: Recipe) -> str | None:
    """Why a site must not be asked for: only quantized inputs gain; transformed inputs have no outlier channels."""
    if plan.scheme is None:
        return None
    if plan.scheme.activations is None:
        return "its inputs stay in 16 bit, where outliers do no harm. Use a scheme such as W8A8."
    if recipe.awq.explicit and "awq" in recipe.transforms:
        return "columns that stay floats do not go with inputs that are divided at inference. Set awq.explicit: false."
    return None
