"""Token weights against gradients taken one by one, and what their users are refused."""

from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from bitwright.calibration.output_gradients import channel_groups, load_output_gradients, output_gradients
from bitwright.demo import demo_model
from bitwright.errors import ResourceError, StructureError
from bitwright.model.checkpoint import open_checkpoint
from bitwright.model.sites import Site
from bitwright.progress import no_progress

NAME = "model.layers.2.mlp.down_proj"
WINDOWS = torch.randint(2048, (2, 8), generator=torch.Generator().manual_seed(0))


def site_of(name: str) -> Site:
    return Site(
        name=name, parameter=f"{name}.weight", index=None, out_features=256, in_features=768, transposed=False,
        kind="linear",
    )  # fmt: skip


def measure(num_groups: int = 4, name: str = NAME) -> torch.Tensor:
    found = output_gradients(
        open_checkpoint(demo_model()), [site_of(name)], WINDOWS, num_groups=num_groups, device="cpu",
        trust_remote_code=False, progress=no_progress,
    )  # fmt: skip
    return found[name]


def expected(num_groups: int) -> torch.Tensor:
    """By adding a zero that wants a gradient to the output of the module."""
    model: Any = AutoModelForCausalLM.from_pretrained(demo_model(), dtype=torch.float32)
    weights = []
    for ids in WINDOWS:
        added = torch.zeros(1, len(ids), 256, requires_grad=True)
        hook = model.get_submodule(NAME).register_forward_hook(lambda _module, _args, out, added=added: out + added)
        logits = model(input_ids=ids[None]).logits[0, :-1]
        loss = torch.nn.functional.cross_entropy(logits, ids[1:])
        squares = torch.autograd.grad(loss, added)[0][0].square()
        hook.remove()
        weights.append(torch.stack([part.mean(-1) for part in squares.chunk(num_groups, dim=-1)]))
    joined = torch.cat(weights, dim=-1)
    return joined / joined.mean(-1, keepdim=True)


@pytest.mark.parametrize("num_groups", [1, 4])
def test_they_are_the_mean_square_gradients_of_the_output_per_token_and_group(num_groups: int) -> None:
    found = measure(num_groups)
    assert found.shape == (num_groups, WINDOWS.numel())
    torch.testing.assert_close(found, expected(num_groups), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found.mean(-1), torch.ones(num_groups))


def test_a_site_whose_module_is_never_called_is_named() -> None:
    with pytest.raises(StructureError, match=r"model\.layers: its module is not called once for every token.*gptq"):
        measure(name="model.layers")


def test_too_little_memory_is_said_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1_000_000))
    with pytest.raises(ResourceError, match=r"whole model.*Use gptq"):
        measure()


@given(st.integers(1, 100), st.integers(1, 12))
def test_groups_of_channels_cover_every_channel_once(num_channels: int, num_groups: int) -> None:
    groups = channel_groups(num_channels, num_groups)
    assert groups[0].start == 0
    assert groups[-1].stop == num_channels
    assert all(first.stop == second.start for first, second in pairwise(groups))
    sizes = {group.stop - group.start for group in groups}
    assert len(groups) == min(num_channels, num_groups)
    assert max(sizes) - min(sizes) <= 1


def test_sites_that_a_file_lacks_are_left_out(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2, 3)}, tmp_path / "guided.safetensors")
    assert list(load_output_gradients(tmp_path / "guided.safetensors", ["a", "b"])) == ["a"]
