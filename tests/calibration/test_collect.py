"""Statistics of a site's inputs, compared with the inputs themselves."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from bitwright.calibration.collect import SiteStats, Teacher, collect
from bitwright.errors import DataError, VerificationError
from bitwright.model.sites import Site, block_sites
from bitwright.numerics.formats import FORMATS
from bitwright.numerics.granularity import Granularity
from bitwright.numerics.inputs import InputQuantizer, InputTransform
from bitwright.schemes import ActivationScheme, Scheme

WIDTH, INNER = 24, 40
GROUPS = [("b.q", "b.k", "b.v"), ("b.o",), ("b.up",), ("b.down",)]


class Block(nn.Module):
    """q, k, v → o, then up → down, with residuals; counts its whole runs."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("q", "k", "v", "o"):
            self.add_module(name, nn.Linear(WIDTH, WIDTH, bias=False))
        self.up, self.down = nn.Linear(WIDTH, INNER), nn.Linear(INNER, WIDTH)
        self.num_finished = 0

    def forward(self, x: Tensor) -> Tensor:
        parts: dict[str, Any] = dict(self.named_children())
        x = x + parts["o"](parts["q"](x) * parts["k"](x).tanh() + parts["v"](x))
        x = x + self.down(self.up(x).relu())
        self.num_finished += 1
        return x


class Captured:
    """The inputs that modules were called with, all calls together as float64 rows [T, I]."""

    def __init__(self, block: nn.Module, names: Iterable[str]) -> None:
        self._rows: dict[str, list[Tensor]] = {name: [] for name in names}
        for name in self._rows:
            block.get_submodule(name).register_forward_pre_hook(self._hook(name))

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def keep(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            self._rows[name].append(args[0].detach().reshape(-1, args[0].shape[-1]).double())

        return keep

    def __getitem__(self, name: str) -> Tensor:
        return torch.cat(self._rows[name])


def batches(x: Tensor, sizes: list[int]) -> list[Tensor]:
    return list(x.split(sizes))


def run(
    block: nn.Module,
    inputs: list[Tensor],
    groups: list[tuple[str, ...]],
    *,
    with_gram: bool = True,
    prefix: str = "b",
    sites: list[Site] | None = None,
) -> dict[str, SiteStats]:
    def calls() -> Iterator[Callable[[], object]]:
        for x in inputs:
            yield lambda x=x: block(x)

    with torch.no_grad():
        return collect(block, sites or block_sites(block, prefix), groups, calls, with_gram=with_gram)


def gram_bound(x: Tensor) -> Tensor:
    """Float32 products over T rows: T units of roundoff of Σ |x_i x_j|."""
    return x.shape[0] * 2.0**-24 * (x.abs().T @ x.abs())


def hessian_of(stats: SiteStats) -> Tensor:
    assert stats.hessian is not None
    return stats.hessian


def test_hessian_is_that_of_the_captured_inputs() -> None:
    block = Block()
    captured = Captured(block, ["q", "o", "up", "down"])
    stats = run(block, batches(torch.randn(7, 16, WIDTH), [3, 4]), GROUPS)
    for name in ("q", "o", "up", "down"):
        x, found = captured[name], stats[f"b.{name}"]
        assert found.num_tokens == x.shape[0] == 7 * 16
        hessian = hessian_of(found)
        assert hessian.dtype == torch.float64
        assert torch.equal(hessian, hessian.T)
        expected = 2 / x.shape[0] * x.T @ x
        assert bool(((hessian - expected).abs() <= 2 / x.shape[0] * gram_bound(x)).all())
        assert found.mean_square is not None
        torch.testing.assert_close(found.mean_square.double(), x.square().mean(0), rtol=x.shape[0] * 2.0**-24, atol=0)


def test_without_gram_only_moments_are_kept() -> None:
    block = Block()
    captured = Captured(block, ["down"])
    stats = run(block, batches(torch.randn(7, 16, WIDTH), [3, 4]), GROUPS, with_gram=False)["b.down"]
    assert stats.gram is None
    assert stats.hessian is None
    assert stats.mean_square is not None
    x = captured["down"]
    torch.testing.assert_close(stats.mean_square.double(), x.square().mean(0), rtol=4 * 2.0**-24, atol=0)


@pytest.mark.parametrize("sizes", [[1] * 8, [5, 3], [8]])
def test_the_split_into_batches_does_not_matter(sizes: list[int]) -> None:
    block, x = Block(), torch.randn(8, 16, WIDTH)
    whole, split = run(block, [x], GROUPS), run(block, batches(x, sizes), GROUPS)
    captured = Captured(block, ["q", "o", "up", "down"])
    run(block, [x], GROUPS)
    for name in ("q", "o", "up", "down"):
        a, b = whole[f"b.{name}"], split[f"b.{name}"]
        assert a.num_tokens == b.num_tokens == 8 * 16
        # Each route errs by the bound; so do the inputs themselves, which products of other shapes computed.
        bound = 4 * 2 / a.num_tokens * gram_bound(captured[name])
        assert bool(((hessian_of(a) - hessian_of(b)).abs() <= bound).all())


def test_sites_of_a_group_share_one_object() -> None:
    stats = run(Block(), [torch.randn(2, 5, WIDTH)], GROUPS)
    assert stats["b.q"] is stats["b.k"] is stats["b.v"]
    assert len({id(each) for each in stats.values()}) == len(GROUPS)
    assert stats["b.q"].num_tokens == 10, "counted once for the group, not once for each site"


def test_only_the_wanted_sites_are_collected() -> None:
    assert run(Block(), [torch.randn(2, 5, WIDTH)], [("b.up",)]).keys() == {"b.up"}


def test_stopping_early_changes_no_value() -> None:
    """Once every wanted site has been called the rest of the block is skipped; later batches still count."""
    block, inputs = Block(), batches(torch.randn(6, 16, WIDTH), [2, 2, 2])
    complete = run(block, inputs, GROUPS)
    assert block.num_finished == 0, "the last product of the last wanted site need not run either"
    for group in GROUPS:
        alone = run(block, inputs, [group])[group[0]]
        assert alone.num_tokens == complete[group[0]].num_tokens == 6 * 16
        assert torch.equal(hessian_of(alone), hessian_of(complete[group[0]]))
    assert block.num_finished == 0
    uncut = Captured(block, ["o"])
    for x in inputs:
        block(x)
    assert block.num_finished == len(inputs)
    x = uncut["o"]
    stopped = hessian_of(run(block, inputs, [("b.o",)])["b.o"])
    assert bool(((stopped - 2 / x.shape[0] * x.T @ x).abs() <= 2 / x.shape[0] * gram_bound(x)).all())


def test_an_error_in_the_block_is_not_swallowed() -> None:
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        run(Block(), [torch.randn(2, 5, WIDTH + 1)], GROUPS)


def test_no_text_means_no_statistics() -> None:
    stats = run(Block(), [], GROUPS)["b.up"]
    assert (stats.num_tokens, stats.hessian, stats.mean_square) == (0, None, None)


def mixtral_layer() -> Any:
    config = transformers.MixtralConfig(
        vocab_size=50, hidden_size=WIDTH, intermediate_size=INNER, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    model: Any = transformers.AutoModelForCausalLM.from_config(config, experts_implementation="eager")
    with torch.no_grad():
        model.model.layers[0].mlp.gate.weight.normal_()  # decisive, so that experts differ in what they get
    return model.model.layers[0].mlp.eval()


def expert_stats(layer: Any, inputs: list[Tensor]) -> tuple[dict[str, SiteStats], Tensor, Tensor]:
    """Statistics of the experts' first product, the tokens, and the experts that the router itself chose for each."""
    chosen: list[Tensor] = []
    hook = layer.gate.register_forward_hook(lambda _module, _args, out: chosen.append(out[2]))
    sites = block_sites(layer, "b")
    names = [site.name for site in sites if site.parameter == "b.experts.gate_up_proj"]
    stats = run(layer, inputs, [(name,) for name in names], sites=sites)
    hook.remove()
    return {name: stats[name] for name in names}, torch.cat([x.reshape(-1, WIDTH) for x in inputs]), torch.cat(chosen)


def test_experts_count_the_tokens_that_the_router_sent() -> None:
    stats, tokens, chosen = expert_stats(mixtral_layer(), batches(torch.randn(6, 16, WIDTH), [4, 2]))
    counts = [each.num_tokens for each in stats.values()]
    assert counts == torch.bincount(chosen.flatten(), minlength=4).tolist()
    assert sum(counts) == 2 * len(tokens)
    assert len(set(counts)) > 1, "all experts alike: the test could not tell them apart"
    for expert, each in enumerate(stats.values()):
        x = tokens[(chosen == expert).any(dim=1)].double()
        expected = 2 / len(x) * x.T @ x
        assert len(x) > WIDTH
        assert bool(((hessian_of(each) - expected).abs() <= 2 / len(x) * gram_bound(x)).all())


def test_experts_that_no_token_reached_have_no_statistics() -> None:
    stats, _, chosen = expert_stats(mixtral_layer(), [torch.randn(1, 1, WIDTH)])
    reached = set(chosen.flatten().tolist())
    assert len(reached) == 2
    for expert, each in enumerate(stats.values()):
        assert each.num_tokens == (1 if expert in reached else 0)
        assert (each.hessian is None) == (each.mean_square is None) == (expert not in reached)


def test_a_rarely_used_expert_trusts_its_correlations_less() -> None:
    """T/I of the off-diagonal, for experts only: other sites with few tokens keep their whole Hessian."""
    x = torch.randn(6, WIDTH)
    routed, plain = SiteStats(is_routed=True), SiteStats()
    routed.add(x, with_gram=True)
    plain.add(x, with_gram=True)
    off_diagonal = ~torch.eye(WIDTH, dtype=torch.bool)
    torch.testing.assert_close(
        hessian_of(routed)[off_diagonal], hessian_of(plain)[off_diagonal] * 6 / WIDTH, rtol=1e-15, atol=0
    )
    assert torch.equal(hessian_of(routed).diagonal(), hessian_of(plain).diagonal())
    assert torch.equal(hessian_of(routed), hessian_of(routed)), "reading it does not change it"


# Ranges of the inputs

STATIC, PERCENTILE, GROUPED, NVFP4 = (
    scheme.activations
    for scheme in map(
        Scheme.parse, ("W8A8-static-minmax", "W8A8-static-percentile", "W8A8-static-minmax-actg8", "nvfp4")
    )
    if scheme.activations is not None
)


def calibrated_run(
    block: nn.Module, inputs: list[Tensor], calibrated: dict[str, ActivationScheme], *, with_gram: bool = True
) -> dict[str, SiteStats]:
    calls = [lambda x=x: block(x) for x in inputs]
    with torch.no_grad():
        sites = block_sites(block, "b")
        return collect(block, sites, GROUPS, lambda: calls, with_gram=with_gram, calibrated=calibrated)


@pytest.mark.parametrize("with_gram", [True, False])
def test_ranges_are_those_of_the_captured_inputs(with_gram: bool) -> None:
    block = Block()
    captured = Captured(block, ["q", "down"])
    inputs = batches(torch.randn(7, 16, WIDTH), [3, 4])
    stats = calibrated_run(block, inputs, {"b.k": STATIC, "b.down": GROUPED}, with_gram=with_gram)
    low, high = stats["b.k"].observers[STATIC].range(STATIC.format)
    assert (float(low), float(high)) == (float(captured["q"].min()), float(captured["q"].max()))
    low, high = stats["b.down"].observers[GROUPED].range(GROUPED.format)
    groups = captured["down"].reshape(-1, INNER // 8, 8)
    assert torch.equal(low, groups.amin((0, 2)).clamp(max=0))
    assert torch.equal(high, groups.amax((0, 2)).clamp(min=0))


def test_each_way_of_quantizing_is_observed_once_for_a_group() -> None:
    """q and v want the same range, k another; nobody asks for those of the other groups."""
    wanted = {"b.q": STATIC, "b.k": PERCENTILE, "b.v": STATIC}
    stats = calibrated_run(Block(), [torch.randn(2, 16, WIDTH)], wanted)
    assert stats["b.q"].observers is stats["b.v"].observers
    assert set(stats["b.q"].observers) == {STATIC, PERCENTILE}
    ranges = [observer.range(STATIC.format) for observer in stats["b.q"].observers.values()]
    assert float(ranges[0][1]) != float(ranges[1][1])
    assert not stats["b.up"].observers
    assert not run(Block(), [torch.randn(2, 5, WIDTH)], GROUPS)["b.q"].observers


def test_a_level_above_run_time_scales_is_one_number() -> None:
    """The scales of NVFP4 are found per group at run time; what is calibrated is the largest input of all."""
    block = Block()
    captured = Captured(block, ["up"])
    stats = calibrated_run(block, [torch.randn(2, 16, WIDTH)], {"b.up": NVFP4})
    low, high = stats["b.up"].observers[NVFP4].range(NVFP4.format)
    assert low.shape == high.shape == (1,)
    assert float(torch.maximum(-low, high)) == float(captured["up"].abs().max())


def test_sites_that_no_token_reached_have_no_range() -> None:
    stats = calibrated_run(Block(), [], {"b.up": STATIC})
    with pytest.raises(DataError, match="saw no activations"):
        stats["b.up"].observers[STATIC].range(STATIC.format)


def test_inputs_without_a_range_name_their_site() -> None:
    x = torch.randn(2, 16, WIDTH)
    x[1, 3, 5] = torch.inf
    with pytest.raises(VerificationError, match=r"^b\.q: activations hold NaN or Inf"):
        calibrated_run(Block(), [x], {"b.k": STATIC})


def test_cross_is_that_of_the_same_tokens_in_the_teacher() -> None:
    """Both runs stop as soon as every wanted site was seen; transforms apply to both, quantizers to the student."""
    block, teacher = Block(), Block()
    captured, undrifted = Captured(block, ["o", "down"]), Captured(teacher, ["o", "down"])
    x = torch.randn(6, 8, WIDTH)
    drifted = x + 0.1 * torch.randn(6, 8, WIDTH)

    def calls(of: nn.Module, inputs: Tensor) -> Callable[[], Iterator[Callable[[], object]]]:
        return lambda: (lambda part=part: of(part) for part in inputs.split(4))

    scale = torch.rand(INNER) + 0.5
    quantizer = InputQuantizer(format=FORMATS["int8"], granularity=Granularity(kind="token"))  # type: ignore[arg-type]
    with torch.no_grad():
        stats = collect(
            block, block_sites(block, "b"), [("b.o",), ("b.down",)], calls(block, drifted), with_gram=True,
            teacher=Teacher(block=teacher, run_batches=calls(teacher, x)),
            transforms={"b.down": InputTransform(scale=scale)}, quantizers={"b.down": quantizer},
        )  # fmt: skip
    assert (block.num_finished, teacher.num_finished) == (0, 0)
    for name in ("o", "down"):
        floats, target = captured[name], undrifted[name]
        inputs = floats
        if name == "down":
            floats, target = floats / scale, target / scale
            inputs = quantizer.quantize(floats.float()).dequantize().double()
        found = stats[f"b.{name}"]
        bound = 48 * 2.0**-22 * (target.abs() + floats.abs() + inputs.abs()).T @ inputs.abs()
        assert found.cross is not None
        assert bool(((found.cross - (target - floats).T @ inputs).abs() <= bound).all())
        half = found.drift(0.5)
        assert half is not None
        trust = 1 - inputs.shape[1] / 48  # least squares fit as much of 48 tokens of noise
        expected = trust * 2 / 48 * ((floats - inputs) + 0.5 * (target - floats)).T @ inputs
        assert bool(((half - expected).abs() <= 2 / 48 * bound).all())
        assert (found.drift(0.0) is None) == (name == "o")
        assert bool(((hessian_of(found) - 2 / 48 * inputs.T @ inputs).abs() <= 2 / 48 * 2 * gram_bound(inputs)).all())
        found.num_tokens = inputs.shape[1]
        assert found.drift(0.5) is None, "as many tokens as inputs can explain anything"


def test_experts_have_neither_cross_nor_weights() -> None:
    """Routers may send them other tokens."""
    stats = SiteStats(is_routed=True)
    stats.add(torch.randn(5, WIDTH), with_gram=True)
    assert (stats.cross, stats.drift(1.0), stats.guided) == (None, None, None)


def test_a_site_that_is_called_twice_for_a_token_cannot_be_weighted() -> None:
    stats, weights = SiteStats(), {"b.q": torch.ones(2, 5)}
    stats.add(torch.randn(5, WIDTH), with_gram=False, weights=weights)
    with pytest.raises(VerificationError, match=r"b\.q: called more than once for a token.*Use gptq"):
        stats.add(torch.randn(5, WIDTH), with_gram=False, weights=weights)


def test_columns_that_are_left_out_are_left_out_of_every_sum() -> None:
    columns = torch.tensor([1, 5])
    stats = SiteStats(float_columns=columns)
    x = torch.randn(9, WIDTH)
    stats.add(x, with_gram=True, target=torch.randn(9, WIDTH), weights={"b.q": torch.rand(2, 9)})
    assert stats.guided is not None
    for sums in (stats.gram, stats.cross, *stats.guided["b.q"]):
        assert sums is not None
        assert bool((sums[columns] == 0).all() and (sums[:, columns] == 0).all() and sums.any())
