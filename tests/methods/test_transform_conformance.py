"""What every transform of blocks must satisfy; an entry of `TRANSFORMS` is tested here without another line.

Those that also write another model are not: their work on a block only makes sense on that model.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import Tensor

from bitwright.methods.stage import BlockStage
from bitwright.methods.transforms import TRANSFORMS
from bitwright.model.products import ReplacedProducts
from bitwright.model.sites import storage_key, weight_view
from bitwright.recipe import Recipe

OpenStage = Callable[..., AbstractContextManager[BlockStage]]

EPS = torch.finfo(torch.float32).eps
ROUNDINGS = 128  # of the block's largest output: every weight and a few sums round once more
BLOCK_TRANSFORMS = [name for name in TRANSFORMS if TRANSFORMS[name].apply and not TRANSFORMS[name].apply_model]
ARCHITECTURES = ["llama", "qwen2", "opt", "gemma2", "mixtral"]
SCHEME = "W8A8-dynamic-token"


def recipe(name: str, **options: Any) -> Recipe:
    wished = {"awq": {"explicit": name == "awq"}, "llm_int8": {"threshold": 1.0}} | options
    return Recipe.from_mapping({"scheme": SCHEME, "method": "rtn", "transforms": [name], **wished})


def output(stage: BlockStage) -> Tensor:
    """What the block computes where inputs are transformed as at inference and weights hold the inverse."""

    def product(name: str) -> Any:
        transform, site = stage.input_transforms[name], stage.sites[name]
        weight = transform.to_weight(stage.weight(site))

        def multiply(x: Tensor, added: Tensor | None) -> Tensor:
            return torch.nn.functional.linear(transform.apply(x), weight, added)

        return multiply

    sites = [stage.sites[name] for name in stage.input_transforms]
    memory = {storage_key(weight_view(stage.block, site, stage.name)): product(site.name) for site in sites}
    with ReplacedProducts(memory):
        return stage.probe()


def apply(stage: BlockStage, name: str) -> None:
    transform = TRANSFORMS[name].apply
    assert transform is not None
    transform(stage)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", BLOCK_TRANSFORMS)
def test_the_block_computes_what_it_did(name: str, architecture: str, open_stage: OpenStage) -> None:
    with open_stage(architecture, recipe(name), outliers=16.0) as stage:
        before = output(stage)
        apply(stage, name)
        moved = float((output(stage) - before).abs().max())
    assert moved <= ROUNDINGS * EPS * float(before.abs().max())


@pytest.mark.parametrize("name", BLOCK_TRANSFORMS)
def test_what_has_changed_is_said_and_nothing_else_has(name: str, open_stage: OpenStage) -> None:
    with open_stage("qwen2", recipe(name), outliers=16.0) as stage:
        before = {key: value.detach().clone() for key, value in stage.block.named_parameters()}
        apply(stage, name)
        after = dict(stage.block.named_parameters())
        changed = {f"{stage.name}.{key}" for key in before if not torch.equal(before[key], after[key])}
    assert changed <= stage.edited
    assert set(stage.input_transforms) | set(stage.float_columns) <= set(stage.sites)
    assert not set(stage.input_transforms) & set(stage.float_columns)


@pytest.mark.parametrize("name", BLOCK_TRANSFORMS)
def test_the_same_again(name: str, open_stage: OpenStage) -> None:
    """A resumed run must choose the same."""
    found: list[tuple[dict[str, Tensor], object]] = []
    for _ in range(2):
        with open_stage("llama", recipe(name), outliers=16.0) as stage:
            apply(stage, name)
            found.append(({k: v.detach().clone() for k, v in stage.block.named_parameters()}, stage.notes))
    (first, first_notes), (second, second_notes) = found
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert first_notes == second_notes


@pytest.mark.parametrize("name", BLOCK_TRANSFORMS)
def test_sites_of_one_input_get_one_transform(name: str, open_stage: OpenStage) -> None:
    with open_stage("mixtral", recipe(name), outliers=16.0) as stage:
        apply(stage, name)
        for group in stage.structure.groups:
            planned = [site for site in group.sites if stage.planned(site) is not None]
            assert len({id(stage.float_columns.get(site)) for site in planned}) <= 1
            assert len({str(stage.input_transforms.get(site)) for site in planned}) <= 1
