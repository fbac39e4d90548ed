"""AWQ: the scales it tries, its loss, and where it folds."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch

from bitwright import pipeline
from bitwright.errors import VerificationError
from bitwright.methods import scaling
from bitwright.methods.awq import awq, awq_scale
from bitwright.methods.scaling import fold_all, parent_of, scalable_groups, sites_loss
from bitwright.methods.stage import BlockStage
from bitwright.numerics.inputs import InputTransform
from bitwright.recipe import Recipe

OpenStage = Callable[..., AbstractContextManager[BlockStage]]


def recipe(scheme: str = "W3A16-g16", **options: Any) -> Recipe:
    return Recipe.from_mapping({"scheme": scheme, "method": "rtn", "transforms": ["awq"], **options})


def test_exponent_zero_is_no_scaling() -> None:
    assert torch.equal(awq_scale(torch.rand(9) + 0.1, None, 0.0), torch.ones(9))


def test_scales_follow_the_inputs_and_are_normalised() -> None:
    x = torch.tensor([1.0, 4.0, 16.0, 0.0])
    assert torch.allclose(awq_scale(x, None, 0.5), torch.tensor([0.5, 1.0, 2.0, 0.5]))
    duo = awq_scale(x, torch.tensor([0.5, 0.5, 0.25, 0.5]), 0.5)
    assert bool(torch.isfinite(duo).all() and (duo > 0).all())
    assert float(duo.max() * duo[:3].min()) == pytest.approx(1.0)
    assert bool((awq_scale(torch.zeros(3), None, 0.5) > 0).all())


@pytest.mark.parametrize("architecture", ["llama", "opt", "mixtral"])
@pytest.mark.parametrize("scheme", ["W3A16-g16", "W4A8-g16"])
def test_the_loss_is_never_above_that_of_the_identity(architecture: str, scheme: str, open_stage: OpenStage) -> None:
    with open_stage(architecture, recipe(scheme), outliers=16.0) as stage:
        awq(stage)
    assert stage.notes
    assert all(note["loss"] <= note["identity_loss"] for note in stage.notes)
    assert any(note["loss"] < note["identity_loss"] for note in stage.notes)


def test_one_exponent_is_the_identity_bit_for_bit(open_stage: OpenStage) -> None:
    options = {"grid": 1, "duo": False}
    with open_stage("llama", recipe(awq=options)) as stage:
        before = {name: value.detach().clone() for name, value in stage.block.named_parameters()}
        awq(stage)
        assert all(torch.equal(before[name], value) for name, value in stage.block.named_parameters())
    assert stage.edited == set()
    assert stage.input_transforms == {}


def test_a_folded_scale_gives_the_loss_that_was_promised(open_stage: OpenStage) -> None:
    """After folding, rounding the weights as they are leaves the error that the search found for the scale."""
    with open_stage("llama", recipe(), outliers=16.0) as stage:
        (groups,) = scalable_groups(stage)
        down = next(group for group in groups if group.names[0].endswith("down_proj"))
        awq(stage)
        note = next(note for note in stage.notes if note["sites"] == list(down.names))
        assert note["exponent"] > 0 or note["duo"]
        (groups,) = scalable_groups(stage)
        again = next(group for group in groups if group.names == down.names)
        (found,) = sites_loss(stage, again)(None)
    assert found == pytest.approx(note["loss"], rel=1e-3)  # a few weights lie between two codes


def test_parents(open_stage: OpenStage) -> None:
    with open_stage("llama", recipe()) as stage:
        (groups,) = scalable_groups(stage)
        parents = {group.names[0].rpartition(".")[2]: parent_of(stage, group.sites) for group in groups}
    assert parents["q_proj"] == "self_attn"
    assert parents["gate_proj"] == "mlp"


def test_grouped_heads_share_channels(open_stage: OpenStage) -> None:
    with open_stage("llama", recipe()) as stage:
        (groups,) = scalable_groups(stage)
        out = next(group for group in groups if group.names[0].endswith("o_proj"))
    assert out.edge is not None
    assert out.edge.repeat == 2
    columns = torch.arange(32.0)
    channels = out.per_channel(columns, reduce="mean")
    assert torch.equal(channels[:8], columns[:8] + 4)  # heads of 8 channels, each read twice
    assert torch.equal(out.per_column(channels)[:8], out.per_column(channels)[8:16])
    assert torch.equal(out.per_channel(columns, reduce="amax")[:8], columns[8:16])


def test_a_scale_that_changes_the_function_is_an_error(open_stage: OpenStage, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_stage("llama", recipe()) as stage:
        (groups,) = scalable_groups(stage)
        monkeypatch.setattr(type(stage), "fold", lambda _stage, _edge, _scale: _damage(stage))
        with pytest.raises(
            VerificationError, match=r"layers\.0: scaling moved its output by .*Leave the transform out"
        ):
            fold_all(stage, [(groups[0], torch.full((32,), 2.0))])


def _damage(stage: BlockStage) -> None:
    stage.block.get_parameter("mlp.down_proj.weight").detach().mul_(1.01)


def test_explicit_scales_reach_sites_without_an_edge(open_stage: OpenStage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gemma normalises what attention returns; take all edges away and everything is divided at inference."""
    with open_stage("gemma2", recipe(awq={"explicit": True}), outliers=16.0) as stage:
        monkeypatch.setattr(scaling, "_scales_rows_freely", lambda _stage, edge: edge.kind == "norm")
        awq(stage)
        assert stage.input_transforms
        for name, transform in stage.input_transforms.items():
            assert transform.scale is not None
            assert transform.scale.shape == (stage.sites[name].in_features,)


def test_explicit_scales_that_change_the_function_are_refused(
    open_stage: OpenStage, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_stage("gemma2", recipe(awq={"explicit": True}), outliers=16.0) as stage:
        monkeypatch.setattr(scaling, "_scales_rows_freely", lambda _stage, edge: edge.kind == "norm")
        monkeypatch.setattr(InputTransform, "to_weight", lambda _self, weight: weight)  # the weights forget the scale
        with pytest.raises(VerificationError, match="scaling moved its output"):
            awq(stage)


def test_explicit_needs_our_layout(tiny_llama_dir: Path, tmp_path: Path, tiny_text: str) -> None:
    (tmp_path / "text.txt").write_text(tiny_text)
    calibration = {"text": str(tmp_path / "text.txt"), "num_samples": 4, "seqlen": 64}
    for explicit, layout in ((False, "compressed-tensors"), (True, "bitwright")):
        out = tmp_path / str(explicit)
        pipeline.quantize(tiny_llama_dir, recipe("W4A16-g32", awq={"explicit": explicit}, calibration=calibration), out)
        assert f'"quant_method": "{layout}"' in (out / "4-model" / "config.json").read_text()
