"""Hessians per group of output channels: against GPTQ on each group by itself, and whole runs."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bitwright import pipeline
from bitwright.calibration.collect import SiteStats
from bitwright.demo import demo_model
from bitwright.methods.gptq import gptq
from bitwright.methods.guided import by_rows
from bitwright.methods.solvers import SOLVERS, Problem
from bitwright.numerics.granularity import Granularity
from bitwright.numerics.grid import AnyGrid, Grid
from bitwright.numerics.integer import IntegerFormat
from bitwright.numerics.ranges import fit_grid
from bitwright.options import GptqOptions
from bitwright.pipeline import quantize
from bitwright.recipe import Calibration, Recipe
from bitwright.schemes import Scheme
from bitwright.walk import Walk

NUM_ROWS, NUM_COLUMNS, NUM_TOKENS = 12, 20, 80
UINT3 = IntegerFormat(bits=3, symmetric=False)
GROUPS = Granularity(kind="group", group_size=8)
TILES = Granularity(kind="block", group_size=8, block_rows=5)  # cut by groups of rows
HALVES = [slice(0, 7), slice(7, NUM_ROWS)]


def weight_of() -> Tensor:
    return torch.randn(NUM_ROWS, NUM_COLUMNS, generator=torch.Generator().manual_seed(0))


def inputs() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    shared = torch.randn(NUM_TOKENS, 4, generator=generator) @ torch.randn(4, NUM_COLUMNS, generator=generator)
    return shared + 0.3 * torch.randn(NUM_TOKENS, NUM_COLUMNS, generator=generator)


def stats_of(x: Tensor, weights: dict[str, Tensor], batches: int = 1) -> SiteStats:
    stats = SiteStats()
    for rows in x.chunk(batches):
        stats.add(rows, with_gram=True, weights=weights)
    return stats


@pytest.mark.parametrize("granularity", [Granularity(kind="tensor"), GROUPS, TILES], ids=lambda g: g.kind)
def test_each_group_of_rows_is_solved_with_its_own_hessian(granularity: Granularity) -> None:
    weight, grid = weight_of(), fit_grid(weight_of(), UINT3, granularity)
    hessians = [2 / 40 * part.T.double() @ part.double() for part in inputs().split(40)]
    found = by_rows(weight, list(zip(HALVES, hessians, strict=True)), [grid], lambda w, h, grids: gptq(w, h, grids[0]))
    for rows, hessian in zip(HALVES, hessians, strict=True):
        assert torch.equal(found.codes[rows], gptq(weight, hessian, grid).codes[rows])
    assert torch.equal(found.grid.dequantize(found.codes), grid.dequantize(found.codes))
    assert not torch.equal(found.codes, gptq(weight, hessians[0], grid).codes)


def test_refitted_scales_stay_with_their_rows() -> None:
    weight, grid = weight_of(), fit_grid(weight_of(), UINT3, GROUPS)
    hessians = [2 / 40 * part.T.double() @ part.double() for part in inputs().split(40)]

    def refit(current: Tensor, _first: int, _end: int) -> AnyGrid:
        return fit_grid(current, UINT3, Granularity(kind="channel"))

    sweep = partial(gptq, act_order=False, refit=refit)
    found = by_rows(weight, list(zip(HALVES, hessians, strict=True)), [grid], lambda w, h, grids: sweep(w, h, grids[0]))
    for rows, hessian in zip(HALVES, hessians, strict=True):
        alone = sweep(weight[rows], hessian, grid.rows(rows.start, rows.stop))
        assert torch.equal(found.rows(rows.start, rows.stop).dequantize(), alone.dequantize())
    assert isinstance(found.grid, Grid)
    assert not torch.equal(found.grid.scale, grid.scale)


def test_collected_hessians_weigh_every_token_of_every_group() -> None:
    x, weights = inputs(), {"q": torch.rand(3, NUM_TOKENS), "k": torch.rand(2, NUM_TOKENS)}
    stats = stats_of(x, weights, batches=3)
    for site, by_group in weights.items():
        hessians = stats.guided_hessians(site)
        assert hessians is not None
        for hessian, w in zip(hessians, by_group, strict=True):
            expected = 2 / NUM_TOKENS * (x.double().T * w.double()) @ x.double()
            bound = NUM_TOKENS * 2.0**-23 * 2 / NUM_TOKENS * (x.abs().T * w) @ x.abs()
            assert bool(((hessian - expected).abs() <= bound).all())
            assert torch.equal(hessian, hessian.T)


def test_constant_gradients_are_gptq_bit_for_bit_also_in_a_stack() -> None:
    stats = stats_of(inputs(), {"q": torch.ones(3, NUM_TOKENS), "k": torch.ones(2, NUM_TOKENS)})
    weight, grid = weight_of(), fit_grid(weight_of(), UINT3, GROUPS)
    problem = Problem(
        stats=stats,
        recipe=Recipe(),
        refit=lambda *_: grid,
        fit=lambda _: grid,
        rows={"q": slice(0, 7), "k": slice(7, NUM_ROWS)},
    )
    assert [rows for rows, _ in problem.guided_hessians] == [
        slice(0, 2), slice(2, 4), slice(4, 7), slice(7, 9), slice(9, 12)
    ]  # fmt: skip
    results = []
    for method in ("gptq", "guided"):
        solve = SOLVERS[method].solve
        assert solve is not None
        results.append(solve(weight, grid, problem).codes)
    assert torch.equal(results[0], results[1])


def recipe_of(method: str, asymmetry: float = 0.5) -> Recipe:
    return Recipe(
        scheme=Scheme.parse("W3A16-g128"), method=method, gptq=GptqOptions(asymmetry=asymmetry, guided_groups=2),
        calibration=Calibration(text="stdlib", num_samples=8, seqlen=64), max_kl=100.0,
    )  # fmt: skip


def result_of(recipe: Recipe, out: Path) -> str:
    return str(quantize(demo_model(), recipe, out).results["result_hash"])


def test_runs_without_asymmetry_are_those_of_gptq(tmp_path: Path) -> None:
    expected = result_of(recipe_of("gptq"), tmp_path / "gptq")
    assert result_of(recipe_of("gptaq", asymmetry=0.0), tmp_path / "none") == expected
    assert result_of(recipe_of("gptaq"), tmp_path / "half") != expected


@pytest.mark.parametrize("method", ["gptaq", "guided", "guided_gptaq"])
def test_a_killed_run_ends_bit_identical(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = result_of(recipe_of(method), tmp_path / "whole")
    block, measure, measured = Walk._block, pipeline.output_gradients, []

    def killed(self: Walk, index: int, streams: object) -> object:
        if index == 2:
            raise KeyboardInterrupt
        return block(self, index, streams)  # type: ignore[arg-type]

    def counted(*args: Any, **kwargs: Any) -> dict[str, Tensor]:
        measured.append(args)
        return measure(*args, **kwargs)

    monkeypatch.setattr(pipeline, "output_gradients", counted)
    monkeypatch.setattr(Walk, "_block", killed)
    with pytest.raises(KeyboardInterrupt):
        quantize(demo_model(), recipe_of(method), tmp_path / "killed")
    monkeypatch.setattr(Walk, "_block", block)
    resumed = quantize(demo_model(), recipe_of(method), tmp_path / "killed")
    assert resumed.resumed_blocks == 2
    assert resumed.results["result_hash"] == expected
    assert len(measured) == (method != "gptaq"), "a resumed run finds the gradients of the first start"
