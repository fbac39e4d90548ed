"""Every score against its definition on the whole model."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from bitwright.errors import RunError
from bitwright.model.checkpoint import open_checkpoint
from bitwright.model.sites import Site
from bitwright.model.stream import StreamedModel
from bitwright.numerics.metrics import kl_divergence
from bitwright.preparation import model_sites
from bitwright.recipe import Recipe
from bitwright.schemes import Scheme
from bitwright.search.choices import open_bench
from bitwright.search.correlation import ALL, rank_correlation
from bitwright.search.differentiable import DifferentiableModel, sample_labels
from bitwright.search.rounding import Rounder
from bitwright.search.scores_trace import random_signs
from bitwright.search.sensitivity import (
    SIXTEEN_BIT,
    Sensitivity,
    Task,
    measure_sensitivities,
    measure_sensitivity,
)

SCHEMES = tuple(map(Scheme.parse, ("W2A16-g32", "W4A16-g32", "W8A16-channel")))
TWO_BITS, FOUR_BITS, EIGHT_BITS = map(str, SCHEMES)
WINDOWS = torch.randint(2, 320, (3, 24), generator=torch.Generator().manual_seed(0))
FIRST, SECOND = "model.layers.0.mlp.down_proj", "model.layers.1.self_attn.v_proj"
CHEAP = ("weight_sqnr", "output_sqnr", "hessian", "trace", "fisher", "output_gradient", "window_gradient")
ROUNDING = 1e-3
"""Float32 sums of a few thousand terms in another order, relative to their result."""


@pytest.fixture(scope="module")
def streamed(tiny_llama_dir: Path) -> StreamedModel:
    return StreamedModel(open_checkpoint(tiny_llama_dir))


@pytest.fixture
def whole(tiny_llama_dir: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_llama_dir, dtype=torch.float32).requires_grad_(False)


@pytest.fixture(scope="module")
def cheap(streamed: StreamedModel, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Sensitivity]:
    return measure(streamed, tmp_path_factory.mktemp("cheap"), scores=CHEAP)


def measure(model: StreamedModel, folder: Path, **options: Any) -> dict[str, Sensitivity]:
    given = {"schemes": SCHEMES, **options}
    return measure_sensitivities(model, model_sites(model), WINDOWS, folder=folder, **given)


def site_called(model: StreamedModel, name: str) -> Site:
    return next(site for site in model_sites(model) if site.name == name)


def inputs_of(whole: Any, name: str) -> Tensor:
    """What enters a site: [N·T, I]."""
    seen: list[Tensor] = []
    hook = whole.get_submodule(name).register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    whole(input_ids=WINDOWS)
    hook.remove()
    return seen[0].flatten(0, 1)


def rounded(model: StreamedModel, whole: Any, name: str, scheme: str) -> Tensor:
    sites = model_sites(model)
    rounder = Rounder(model.skeleton, sites, SCHEMES, Recipe())
    weight = whole.get_submodule(name).weight
    return rounder.round(site_called(model, name), scheme, weight, inputs_of(whole, name).square().mean(0))


def sampled_gradients(whole: Any, name: str, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Inputs [T, I] and output gradients [T, O] of a site for each window, by one backward pass of the whole model."""
    found: list[tuple[Tensor, Tensor]] = []
    for index, ids in enumerate(WINDOWS):
        kept: list[Tensor] = []

        def on_call(_module: Any, args: Any, out: Tensor, kept: list[Tensor] = kept) -> Tensor:
            kept.extend([args[0][0].detach(), out.requires_grad_(True)])
            return out

        hook = whole.get_submodule(name).register_forward_hook(on_call)
        log_p = whole(input_ids=ids[None]).logits[0].log_softmax(-1)
        hook.remove()
        labels = sample_labels(log_p.detach(), seed, index)
        total = log_p.gather(1, labels[:, None]).sum()
        found.append((kept[0], torch.autograd.grad(total, kept[1])[0][0]))
    return found


@pytest.mark.parametrize("name", [FIRST, SECOND])
@pytest.mark.parametrize("scheme", [TWO_BITS, EIGHT_BITS])
def test_scores_of_sums_are_what_they_say(
    name: str, scheme: str, streamed: StreamedModel, whole: Any, cheap: dict[str, Sensitivity]
) -> None:
    weight, x = whole.get_submodule(name).weight, inputs_of(whole, name)
    error = rounded(streamed, whole, name, scheme) - weight
    noise, signal = (x @ error.T).square().sum(), (x @ weight.T).square().sum()
    expected = {
        "weight_sqnr": error.square().sum() / weight.square().sum(),
        "output_sqnr": noise / signal,
        "hessian": noise / WINDOWS.numel(),
    }
    for score, value in expected.items():
        assert cheap[score].values[name][scheme] == pytest.approx(float(value), rel=ROUNDING), score


@pytest.mark.parametrize("name", [FIRST, SECOND])
@pytest.mark.parametrize("scheme", [TWO_BITS, EIGHT_BITS])
def test_scores_of_gradients_are_those_of_a_backward_pass_of_the_whole_model(
    name: str, scheme: str, streamed: StreamedModel, whole: Any, cheap: dict[str, Sensitivity]
) -> None:
    error = rounded(streamed, whole, name, scheme) - whole.get_submodule(name).weight
    pairs = sampled_gradients(whole, name)
    expected = {
        "output_gradient": sum(((x @ error.T) * g).sum(1).square().sum() for x, g in pairs),
        "fisher": sum(((g.T @ x) * error).square().sum() for x, g in pairs),
        "window_gradient": sum(((g.T @ x) * error).sum().square() for x, g in pairs),
    }
    # The sum over a window's weights may nearly cancel: rounding is relative to its terms.
    terms = sum(((g.T @ x) * error).abs().sum().square() for x, g in pairs)
    for score, value in expected.items():
        allowed = ROUNDING * float(value) + (1e-6 * float(terms) if score == "window_gradient" else 0.0)
        found = cheap[score].values[name][scheme] * 2 * WINDOWS.numel()
        assert found == pytest.approx(float(value), abs=allowed), score


def test_the_trace_is_that_of_differences_of_gradients(
    streamed: StreamedModel, whole: Any, cheap: dict[str, Sensitivity]
) -> None:
    whole.double()
    parameters = {site.parameter: whole.get_parameter(site.parameter) for site in model_sites(streamed)}
    step, name = 1e-4, FIRST

    def gradient(ids: Tensor, signs: dict[str, Tensor], move: float) -> Tensor:
        moved = {key: (value + move * signs[key]).requires_grad_(True) for key, value in parameters.items()}
        call = {"input_ids": ids[None], "labels": ids[None]}
        loss = torch.func.functional_call(whole, moved, (), call).loss
        return torch.autograd.grad(loss, moved[f"{name}.weight"])[0]

    parts = []
    for probe, ids in enumerate(WINDOWS):
        signs = random_signs(parameters, 0, probe)
        product = (gradient(ids, signs, step) - gradient(ids, signs, -step)) / (2 * step)
        parts.append(float((product * signs[f"{name}.weight"]).sum()))
    error = rounded(streamed, whole.float(), name, TWO_BITS) - whole.get_submodule(name).weight

    expected = sum(parts) / len(parts) / 2 * float(error.square().mean())

    assert cheap["trace"].values[name][TWO_BITS] == pytest.approx(expected, rel=10 * ROUNDING)


def divergence(whole: Any, weights: dict[str, Tensor]) -> float:
    original = whole(input_ids=WINDOWS).logits[:, :-1].flatten(0, 1)
    for name, weight in weights.items():
        whole.get_submodule(name).weight.copy_(weight)
    return float(kl_divergence(original, whole(input_ids=WINDOWS).logits[:, :-1].flatten(0, 1)).mean())


def test_measured_is_the_divergence_with_one_site_or_several_rounded(
    streamed: StreamedModel, whole: Any, tmp_path: Path
) -> None:
    alone = measure(streamed, tmp_path, scores=["measured"])["measured"].values[SECOND][TWO_BITS]
    choices = [{FIRST: FOUR_BITS, SECOND: TWO_BITS}, {SECOND: TWO_BITS, FIRST: None}, {}]
    with open_bench(streamed, model_sites(streamed), WINDOWS, schemes=SCHEMES, folder=tmp_path / "bench") as bench:
        both, again, nothing = bench.divergences(choices)
        assert bench.divergences(choices[:1]) == [both]
    weights = {FIRST: rounded(streamed, whole, FIRST, FOUR_BITS), SECOND: rounded(streamed, whole, SECOND, TWO_BITS)}

    assert alone == pytest.approx(divergence(whole, {SECOND: weights[SECOND]}), rel=ROUNDING)
    assert again == alone
    assert nothing == 0.0
    whole.get_submodule(SECOND).weight.copy_(
        streamed.skeleton.checkpoint.read([f"{SECOND}.weight"])[f"{SECOND}.weight"]
    )
    assert both == pytest.approx(divergence(whole, weights), rel=ROUNDING)
    assert list((tmp_path / "bench").iterdir()) == []


def test_what_comes_before_the_changed_block_is_not_run_again(
    streamed: StreamedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run: list[int] = []
    original = DifferentiableModel.run_block

    def counting(self: DifferentiableModel, block: Any, index: int, hidden: Tensor) -> Tensor:
        run.append(index)
        return original(self, block, index, hidden)

    with open_bench(streamed, model_sites(streamed), WINDOWS, schemes=SCHEMES, folder=tmp_path) as bench:
        monkeypatch.setattr(DifferentiableModel, "run_block", counting)
        bench.divergences([{SECOND: TWO_BITS}])
    assert set(run) == {1}


def test_rounded_inputs_score_by_what_they_do_to_outputs(streamed: StreamedModel, whole: Any, tmp_path: Path) -> None:
    scheme = "W8A4-channel"
    scores = ("output_sqnr", "hessian", "output_gradient", "measured")
    found = measure(streamed, tmp_path, scores=scores, target="inputs", schemes=[Scheme.parse(scheme)])
    weight = whole.get_submodule(FIRST).weight

    def error(x: Tensor) -> Tensor:
        scale = x.abs().amax(1, keepdim=True) / 7
        return ((x / scale).round() * scale - x) @ weight.T

    x = inputs_of(whole, FIRST)
    products = sum((error(rows) * g).sum(1).square().sum() for rows, g in sampled_gradients(whole, FIRST))
    hook = whole.get_submodule(FIRST).register_forward_hook(
        lambda _m, args, out: out + error(args[0].flatten(0, 1)).view_as(out)
    )
    changed = whole(input_ids=WINDOWS).logits[:, :-1].flatten(0, 1)
    hook.remove()
    expected = {
        "output_sqnr": error(x).square().sum() / (x @ weight.T).square().sum(),
        "hessian": error(x).square().sum() / WINDOWS.numel(),
        "output_gradient": products / 2 / WINDOWS.numel(),
        "measured": kl_divergence(whole(input_ids=WINDOWS).logits[:, :-1].flatten(0, 1), changed).mean(),
    }
    for score, value in expected.items():
        assert found[score].values[FIRST][scheme] == pytest.approx(float(value), rel=10 * ROUNDING), score


def test_the_cache_is_measured_where_keys_and_values_leave(streamed: StreamedModel, whole: Any, tmp_path: Path) -> None:
    eight, two = "W8A8-channel-actasym", "W8A2-channel-actasym"
    schemes = [Scheme.parse(name) for name in (eight, two)]
    found = measure(streamed, tmp_path, scores=["measured"], target="cache", schemes=schemes)["measured"]
    places = [f"model.layers.{block}.self_attn.{which}_cache" for block in (0, 1) for which in "kv"]
    assert list(found.values) == places

    def round_output(_module: Any, _args: Any, out: Tensor) -> Tensor:
        low, high = out.amin(-1, keepdim=True).clamp(max=0), out.amax(-1, keepdim=True).clamp(min=0)
        scale = (high - low) / 3
        zero = (-low / scale).round()
        return scale * ((out / scale + zero).round().clamp(0, 3) - zero)

    original = whole(input_ids=WINDOWS).logits[:, :-1].flatten(0, 1)
    whole.get_submodule(SECOND).register_forward_hook(round_output)
    changed = whole(input_ids=WINDOWS).logits[:, :-1].flatten(0, 1)
    expected = float(kl_divergence(original, changed).mean())
    assert found.values[places[3]][two] == pytest.approx(expected, rel=10 * ROUNDING)
    assert all(row[eight] < row[two] for row in found.values.values())


def test_a_task_is_evaluated_on_the_model_with_one_site_rounded(
    streamed: StreamedModel, whole: Any, tmp_path: Path
) -> None:
    def evaluate(model: StreamedModel) -> float:
        return float(model.logits(WINDOWS[:1]).square().mean())

    found = measure_sensitivity(
        streamed, [site_called(streamed, SECOND)], WINDOWS, score="task", folder=tmp_path, schemes=SCHEMES[:1],
        task=Task(name="power", evaluate=evaluate),
    )  # fmt: skip
    before = float(whole(input_ids=WINDOWS[:1]).logits.square().mean())
    whole.get_submodule(SECOND).weight.copy_(rounded(streamed, whole, SECOND, TWO_BITS))
    after = float(whole(input_ids=WINDOWS[:1]).logits.square().mean())
    assert found.values[SECOND][TWO_BITS] == pytest.approx(before - after, abs=ROUNDING * abs(before - after) + 1e-6)


def test_more_bits_harm_less_and_sixteen_harm_nothing(cheap: dict[str, Sensitivity]) -> None:
    for score in ("weight_sqnr", "output_sqnr", "hessian", "fisher"):
        for site, row in cheap[score].values.items():
            assert row[TWO_BITS] > row[FOUR_BITS] > row[EIGHT_BITS] > row[SIXTEEN_BIT] == 0.0, (score, site)
    assert cheap["hessian"].value(FIRST, None) == 0.0


def test_a_score_goes_to_json_and_back(cheap: dict[str, Sensitivity]) -> None:
    for score in cheap.values():
        assert Sensitivity.from_json(json.loads(json.dumps(score.to_json()))) == score
    with pytest.raises(RunError, match="not a sensitivity"):
        Sensitivity.from_json({"score": "hessian"})


def test_correlation_is_of_ranks_over_all_pairs_and_per_scheme(cheap: dict[str, Sensitivity]) -> None:
    score = cheap["fisher"]
    squared = {site: {s: value**2 for s, value in row.items()} for site, row in score.values.items()}
    negated = {site: {s: -value for s, value in row.items()} for site, row in score.values.items()}
    flat = {site: dict.fromkeys(row, 1.0) for site, row in score.values.items()}

    def other(values: Any) -> Sensitivity:
        return Sensitivity.from_json({**score.to_json(), "values": values})

    groups = {ALL, *score.schemes}
    assert rank_correlation(other(squared), score) == pytest.approx(dict.fromkeys(groups, 1.0))
    assert rank_correlation(other(negated), score) == pytest.approx(dict.fromkeys(groups, -1.0))
    assert rank_correlation(other(flat), score) == dict.fromkeys(groups)
