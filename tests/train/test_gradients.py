"""Quantized gradients: the codes by themselves, then two gloo processes that run every scenario once.

This file is also what the two processes run: `python test_gradients.py RANK FOLDER`.
"""

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from bitwright.errors import CheckpointError, RecipeError
from bitwright.train.gradient_codes import GradientOptions, Layout, decode, encode, from_bytes, to_bytes
from bitwright.train.gradients import GradientTraffic, register

NUM_RANKS = 2
SIZES = (0, 1, 5, 130)
CPU = torch.device("cpu")
Result = dict[str, Any]

# --- codes -----------------------------------------------------------------------------------------------------------


def layout_and_values(num_ranks: int = 4, block: int = 16) -> tuple[Layout, Tensor]:
    layout = Layout(SIZES, num_ranks=num_ranks, block=block, device=CPU)
    return layout, layout.to_blocks([layout.rows(torch.randn(size)) for size in SIZES])


def test_layout_is_a_bijection() -> None:
    layout = Layout(SIZES, num_ranks=4, block=16, device=CPU)
    gradients = [torch.randn(size) for size in SIZES]
    pieces = layout.to_pieces(layout.to_blocks([layout.rows(gradient) for gradient in gradients]))
    for gradient, piece in zip(gradients, pieces, strict=True):
        assert torch.equal(piece.reshape(-1)[: gradient.numel()], gradient)
    assert int((~layout.is_padding).sum()) == sum(SIZES)


@pytest.mark.parametrize("bits", [8, 4, 1])
def test_bytes_bring_back_codes_and_scales(bits: int) -> None:
    layout, values = layout_and_values()
    codes, scale = encode(values, layout.counts, GradientOptions(bits=bits), None)
    payload = to_bytes(codes, scale, bits, layout)
    returned, returned_scale = from_bytes(payload, bits, layout)
    assert torch.equal(returned_scale, scale)
    for one, other in zip(layout.to_pieces(returned), layout.to_pieces(codes), strict=True):
        assert torch.equal(one, other)
    num_words = -(-layout.num_elements // 32)
    num_code_bytes = {8: layout.num_elements, 4: -(-layout.num_elements // 2), 1: 4 * num_words}[bits]
    assert payload.shape == (4, 4 * layout.num_blocks + num_code_bytes)
    assert payload.dtype == torch.uint8


@pytest.mark.parametrize("bits", [8, 4])
def test_rounding_is_wrong_by_half_a_step_at_most(bits: int) -> None:
    layout, values = layout_and_values()
    values[0, -1] *= 1e-30
    codes, scale = encode(values, layout.counts, GradientOptions(bits=bits), None)
    error = (decode(codes, scale, bits) - values).abs()
    # The quotient and the product each round once, to 2^-24 of at most qmax steps.
    assert bool((error <= scale.unsqueeze(-1) * (0.5 + 2**bits * 2**-24)).all())


def test_one_bit_is_the_sign_at_the_mean_magnitude() -> None:
    layout, values = layout_and_values()
    codes, scale = encode(values, layout.counts, GradientOptions(bits=1), None)
    real = (~layout.is_padding).sum(-1)
    magnitude = values.abs().sum(-1, dtype=torch.float64) / real.clamp(min=1)
    torch.testing.assert_close(scale.double(), magnitude, rtol=2**-23, atol=0)
    lost = (values - decode(codes, scale, 1)).masked_fill(layout.is_padding, 0.0)
    assert bool((lost.square().sum(-1) <= values.square().sum(-1) * (1 + 2**-20)).all())


@pytest.mark.parametrize("bits", [8, 4, 1])
def test_stochastic_rounding_is_right_on_average(bits: int) -> None:
    options = GradientOptions(bits=bits, stochastic=True, error_feedback=False)
    num_draws = 4000
    row = torch.randn(1, 1, 16)
    values = row.expand(num_draws, 1, 16)
    noise = torch.rand(values.shape, generator=torch.Generator().manual_seed(1))
    codes, scale = encode(values, torch.full((num_draws, 1), 16), options, noise)
    mean = decode(codes, scale, bits).double().mean(0)
    spacing = float(scale[0]) * (2 if bits == 1 else 1)
    assert bool(((mean - row[0]).abs() <= 5 * spacing / 2 / num_draws**0.5).all())


@pytest.mark.parametrize("bits", [8, 4, 1])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_block_that_is_not_finite_stays_so_alone(bits: int, bad: float) -> None:
    layout, values = layout_and_values()
    values[1, 2, 3] = bad
    codes, scale = encode(values, layout.counts, GradientOptions(bits=bits), None)
    restored = decode(*from_bytes(to_bytes(codes, scale, bits, layout), bits, layout), bits)
    assert bool(restored[1, 2].isnan().all())
    restored[1, 2] = 0
    assert bool(restored.isfinite().all())


@pytest.mark.parametrize("bits", [8, 4, 1])
def test_zeros_stay_zeros(bits: int) -> None:
    layout, values = layout_and_values()
    codes, scale = encode(torch.zeros_like(values), layout.counts, GradientOptions(bits=bits), None)
    assert not decode(codes, scale, bits).any()


def test_options_are_checked() -> None:
    with pytest.raises(RecipeError, match="bits must be 8, 4 or 1, not 2"):
        GradientOptions(bits=2)
    with pytest.raises(RecipeError, match="block must be at least 1"):
        GradientOptions(block=0)
    with pytest.raises(RecipeError, match="warm_up_steps must be 0 or more"):
        GradientOptions(warm_up_steps=-1)
    with pytest.raises(RecipeError, match="diverges"):
        GradientOptions(bits=1, stochastic=True)


# --- what two processes do -------------------------------------------------------------------------------------------


class Net(nn.Module):
    """Odd sizes, a scalar, an empty parameter, and one that gets no gradient; called last to first."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.last = nn.Linear(33, 3, dtype=dtype)
        self.first = nn.Linear(7, 33, dtype=dtype)
        self.gain = nn.Parameter(torch.ones((), dtype=dtype))
        self.empty = nn.Parameter(torch.zeros(0, dtype=dtype))
        self.frozen = nn.Parameter(torch.ones(2, dtype=dtype), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x))) * self.gain + self.empty.sum()


class Fixed(nn.Module):
    """Its loss is Σ w · g, so that g is the gradient."""

    def __init__(self, *sizes: int) -> None:
        super().__init__()
        self.weights = nn.ParameterList([nn.Parameter(torch.zeros(size)) for size in sizes])

    def forward(self, gradients: Sequence[Tensor | None]) -> Tensor:
        products = [(w * g).sum() for w, g in zip(self.weights, gradients, strict=True) if g is not None]
        return torch.stack(products).sum()


def parallel(model: nn.Module, options: GradientOptions | None, **more: Any) -> tuple[Any, GradientTraffic | None]:
    wrapped = DistributedDataParallel(model, bucket_cap_mb=0.0005, **more)
    return wrapped, None if options is None else register(wrapped, options)


def batch(rank: int, step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 * step + rank)
    x = torch.randn(6, 7, generator=generator)
    return x, x[:, :3].sin()


def train(wrapped: Any, rank: int, steps: range, optimizer: torch.optim.Optimizer) -> None:
    for step in steps:
        x, y = batch(rank, step)
        optimizer.zero_grad()
        (wrapped(x) - y).square().mean().backward()
        optimizer.step()


def state_of(wrapped: Any) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in wrapped.module.named_parameters()}


def run_training(rank: int, options: GradientOptions | None, num_steps: int = 5) -> Result:
    wrapped, traffic = parallel(Net(), options)
    train(wrapped, rank, range(num_steps), torch.optim.SGD(wrapped.parameters(), lr=0.1, momentum=0.9))
    return {"weights": state_of(wrapped), "share": traffic and traffic.share}


def run_resumed(rank: int, options: GradientOptions) -> Result:
    wrapped, traffic = parallel(Net(), options)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)
    train(wrapped, rank, range(3), optimizer)
    assert traffic is not None
    kept, weights, file = traffic.state_dict(), state_of(wrapped), Path(f"residuals-{options.bits}-{rank}.safetensors")
    traffic.save(file)
    again, resumed = parallel(Net(), options)
    again.module.load_state_dict(weights)
    assert resumed is not None
    resumed.load(file)
    train(wrapped, rank, range(3, 6), optimizer)
    train(again, rank, range(3, 6), torch.optim.SGD(again.parameters(), lr=0.1))
    return {"through": state_of(wrapped), "resumed": state_of(again), "counts": (traffic.sent_bytes,
            resumed.sent_bytes, traffic.num_steps, resumed.num_steps), "messages": refusals(rank, kept)}  # fmt: skip


def refusals(rank: int, kept: dict[str, Any]) -> list[str]:
    options = GradientOptions(**kept["options"])
    attempts: list[tuple[nn.Module, GradientOptions, dict[str, Any]]] = [
        (Net(), options, {**kept, "rank": 1 - rank}),
        (Net(), GradientOptions(bits=8), kept),
        (Fixed(3), options, kept),
    ]
    messages: list[str] = []
    for model, other, state in attempts:
        _, traffic = parallel(model, other)
        assert traffic is not None
        try:
            traffic.load_state_dict(state)
        except CheckpointError as error:
            messages.append(str(error))
    return messages


def run_feedback(rank: int, options: GradientOptions, *, used_every: int = 1) -> Result:
    """All ranks use the first weight in one of so many steps alone, and the others in all."""
    sizes = (70, 5, 1)
    wrapped, traffic = parallel(Fixed(*sizes), options, find_unused_parameters=used_every > 1)
    wanted = [torch.zeros(size, dtype=torch.float64) for size in sizes]
    sent = [torch.zeros(size, dtype=torch.float64) for size in sizes]
    generator = torch.Generator().manual_seed(rank)
    for step in range(8):
        gradients: list[Tensor | None] = [torch.randn(size, generator=generator) for size in sizes]
        if step % used_every:
            gradients[0] = None
        wrapped.zero_grad()
        wrapped(gradients).backward()
        for i, weight in enumerate(wrapped.module.weights):
            if (gradient := gradients[i]) is not None:
                wanted[i] += gradient.double()
                sent[i] += weight.grad.double()
    assert traffic is not None
    return {"wanted": wanted, "sent": sent, "residuals": traffic.state_dict()["residuals"]}


def run_not_finite(rank: int, options: GradientOptions) -> Result:
    wrapped, traffic = parallel(Fixed(64, 64), options)
    assert traffic is not None
    found: list[list[Tensor]] = []
    for step in range(3):
        gradients = [torch.linspace(-1, 1, 64) * (1 + step), torch.linspace(2, 3, 64)]
        if step == 1 and rank == 1:
            gradients[0][40] = torch.inf
        wrapped.zero_grad()
        wrapped(gradients).backward()
        found.append([weight.grad.clone() for weight in wrapped.module.weights])
    residuals = traffic.state_dict()["residuals"]
    return {"gradients": found, "finite": all(bool(r.isfinite().all()) for k in residuals.values() for r in k.values())}


def run_accumulated(rank: int) -> Result:
    gradients: list[Tensor] = []
    num_steps: list[int] = []
    for options in (None, GradientOptions(bits=8)):
        wrapped, traffic = parallel(Net(), options)
        with wrapped.no_sync():
            wrapped(batch(rank, 0)[0]).square().mean().backward()
        wrapped(batch(rank, 1)[0]).square().mean().backward()
        gradients.append(wrapped.module.first.weight.grad.clone())
        num_steps.append(traffic.num_steps if traffic else 0)
    return {"dense": gradients[0], "sent": gradients[1], "num_steps": num_steps[1]}


def run_half(rank: int, dtype: torch.dtype) -> Result:
    wrapped, traffic = parallel(Net(dtype), GradientOptions(bits=8), gradient_as_bucket_view=True)
    own = Net(dtype)
    for _ in range(2):  # the second step runs in rebuilt buckets
        for model in (wrapped, own):
            model.zero_grad()
            model(batch(rank, 0)[0].to(dtype)).float().square().mean().backward()
    assert traffic is not None
    return {"sent": wrapped.module.first.weight.grad, "own": own.first.weight.grad, "share": traffic.share}


def run_alone(rank: int) -> Result:
    groups = [dist.new_group([r]) for r in range(NUM_RANKS)]
    wrapped, traffic = parallel(Net(), GradientOptions(bits=1), process_group=groups[rank])
    own = Net()
    for model in (wrapped, own):
        model(batch(rank, 0)[0]).square().mean().backward()
    assert traffic is not None
    return {"sent": wrapped.module.first.weight.grad, "own": own.first.weight.grad,
            "counts": (traffic.sent_bytes, traffic.dense_bytes, traffic.share, traffic.num_steps)}  # fmt: skip


def run_traffic(rank: int, options: GradientOptions) -> Result:
    wrapped, traffic = parallel(Fixed(200 * 256, 256), options)
    for _ in range(2):
        wrapped([torch.randn(200 * 256), torch.randn(256)]).backward()
    assert traffic is not None
    return {"sent": traffic.sent_bytes, "dense": traffic.dense_bytes, "share": traffic.share}


def run_convex(rank: int, options: GradientOptions | None) -> float:
    """Loss of ½‖w - t‖² for the mean t of the ranks' targets, relative to that of the start.

    One element in 16 is 40 times as large as the others. Its sign travels at the mean magnitude of its block, of which
    it is most: without feedback it moves about 16 times too slowly, for ever.
    """
    generator = torch.Generator().manual_seed(0)
    targets = torch.randn(NUM_RANKS, 64, generator=generator) * 0.1
    targets[:, ::16] += 4
    model = Fixed(64)
    wrapped, _ = parallel(model, options)
    for _ in range(250):
        wrapped.zero_grad()
        wrapped([model.weights[0].detach() - targets[rank]]).backward()
        with torch.no_grad():
            model.weights[0] -= 0.02 * model.weights[0].grad
    mean = targets.mean(0)
    return float((model.weights[0].detach() - mean).square().sum() / mean.square().sum())


SCENARIOS: dict[str, Callable[[int], Any]] = {
    **{f"train-{bits}": lambda rank, bits=bits: run_training(rank, GradientOptions(bits=bits)) for bits in (8, 4, 1)},
    "train-dense": lambda rank: run_training(rank, None),
    "train-warm": lambda rank: run_training(rank, GradientOptions(bits=1, warm_up_steps=5)),
    "train-stochastic": lambda rank: run_training(rank, GradientOptions(bits=4, stochastic=True)),
    "resume-stochastic": lambda rank: run_resumed(rank, GradientOptions(bits=4, stochastic=True, block=32)),
    "resume-1": lambda rank: run_resumed(rank, GradientOptions(bits=1, block=32)),
    **{
        f"feedback-{bits}": lambda rank, bits=bits: run_feedback(rank, GradientOptions(bits=bits, block=16))
        for bits in (8, 4, 1)
    },
    "feedback-unused": lambda rank: run_feedback(rank, GradientOptions(bits=4, block=16), used_every=2),
    **{
        f"not-finite-{bits}": lambda rank, bits=bits: run_not_finite(rank, GradientOptions(bits=bits, block=16))
        for bits in (8, 1)
    },
    "accumulated": run_accumulated,
    "half-float16": lambda rank: run_half(rank, torch.float16),
    "half-bfloat16": lambda rank: run_half(rank, torch.bfloat16),
    "alone": run_alone,
    **{f"traffic-{bits}": lambda rank, bits=bits: run_traffic(rank, GradientOptions(bits=bits)) for bits in (8, 4, 1)},
    "convex-dense": lambda rank: run_convex(rank, None),
    "convex-8": lambda rank: run_convex(rank, GradientOptions(bits=8, block=16)),
    "convex-1": lambda rank: run_convex(rank, GradientOptions(bits=1, block=16)),
    "convex-1-forgetful": lambda rank: run_convex(rank, GradientOptions(bits=1, block=16, error_feedback=False)),
}


def work(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=NUM_RANKS)
    torch.save({name: scenario(rank) for name, scenario in SCENARIOS.items()}, folder / f"{rank}.pt")
    dist.destroy_process_group()


# --- what they found -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[Result]:
    folder = tmp_path_factory.mktemp("ranks")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(folder)],
            env=environment,
            cwd=folder,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(NUM_RANKS)
    ]
    errors = [process.communicate(timeout=120)[1] for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], "\n".join(errors)
    return [torch.load(folder / f"{rank}.pt") for rank in range(NUM_RANKS)]


@pytest.mark.parametrize("how", ["8", "4", "1", "stochastic", "warm"])
def test_ranks_stay_equal(found: list[Result], how: str) -> None:
    one, other = (result[f"train-{how}"]["weights"] for result in found)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_warm_up_is_dense_training(found: list[Result]) -> None:
    warm, dense = (found[0][f"train-{how}"] for how in ("warm", "dense"))
    assert all(torch.equal(warm["weights"][name], dense["weights"][name]) for name in dense["weights"])
    assert warm["share"] == 1


@pytest.mark.parametrize("how", ["stochastic", "1"])
def test_resumed_training_is_identical(found: list[Result], how: str) -> None:
    for result in found:
        run = result[f"resume-{how}"]
        assert all(torch.equal(run["through"][name], run["resumed"][name]) for name in run["through"])
        sent, sent_resumed, steps, steps_resumed = run["counts"]
        assert steps == steps_resumed == 6
        # The first step after a restart runs in DDP's first buckets: the last word of each differs, of two phases.
        assert abs(sent - sent_resumed) <= 2 * 4 * len(run["through"])


def test_foreign_residuals_are_refused(found: list[Result]) -> None:
    rank, options, model = found[0]["resume-1"]["messages"]
    assert "of rank 1, not 0" in rank
    assert "of options" in options
    assert "fits no parameter" in model


@pytest.mark.parametrize("how", ["8", "4", "1", "unused"])
def test_what_was_sent_is_what_was_wanted_less_the_residual(found: list[Result], how: str) -> None:
    runs = [result[f"feedback-{how}"] for result in found]
    for i, wanted in enumerate(zip(*(run["wanted"] for run in runs), strict=True)):
        size = wanted[0].numel()
        own = torch.stack([run["residuals"]["own"][f"weights.{i}"] for run in runs]).mean(0)
        mean = torch.cat([run["residuals"]["mean"][f"weights.{i}"] for run in runs])
        residual = (own + mean).double().flatten()[:size]
        assert bool(residual.abs().max() > 0) or size == 1
        # Eight steps of a few float32 operations on values below 32.
        torch.testing.assert_close(
            runs[0]["sent"][i], torch.stack(wanted).mean(0) - residual, rtol=0, atol=8 * 4 * 32 * 2**-24
        )


@pytest.mark.parametrize("bits", [8, 1])
def test_infinity_is_seen_by_all_and_forgotten(found: list[Result], bits: int) -> None:
    for result in found:
        before, struck, after = result[f"not-finite-{bits}"]["gradients"]
        # Rank 1 owns elements 32 to 63 of each parameter, whose block of 16 is hit.
        assert bool(struck[0][32:48].isnan().all())
        assert bool(struck[0][:32].isfinite().all())
        assert bool(struck[0][48:].isfinite().all())
        assert bool(struck[1].isfinite().all())
        assert all(bool(gradient.isfinite().all()) for gradient in (*before, *after))
        assert result[f"not-finite-{bits}"]["finite"]


def test_accumulated_gradients_are_sent_once(found: list[Result]) -> None:
    run = found[0]["accumulated"]
    assert run["num_steps"] == 1
    # Half a step of each rank's gradient (averaged) and half a step of the mean.
    local = 4 * float(run["dense"].abs().max())
    assert float((run["sent"] - run["dense"]).abs().max()) <= local / 127


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_gradients(found: list[Result], dtype: str) -> None:
    runs = [result[f"half-{dtype}"] for result in found]
    owns = [run["own"].float() for run in runs]
    assert runs[0]["sent"].dtype == getattr(torch, dtype)
    assert torch.equal(runs[0]["sent"], runs[1]["sent"])
    # Two phases, each half a step and a residual of half a step; then one rounding to the dtype.
    largest = max(float(own.abs().max()) for own in owns)
    tolerance = largest * (2.5 / 127 + torch.finfo(runs[0]["sent"].dtype).eps)
    assert float((runs[0]["sent"].float() - sum(owns) / 2).abs().max()) <= tolerance
    assert runs[0]["share"] > 0.5  # of gradients that are two bytes each


def test_one_process_sends_nothing(found: list[Result]) -> None:
    for result in found:
        run = result["alone"]
        assert torch.equal(run["sent"], run["own"])
        assert run["counts"] == (0, 0, None, 1)


@pytest.mark.parametrize(("bits", "limit"), [(8, 0.27), (4, 0.14), (1, 0.05)])
def test_bytes_on_the_wire(found: list[Result], bits: int, limit: float) -> None:
    num_elements, num_blocks, num_steps = 201 * 256, 101, 2  # shares of 25,600 and 128 elements
    num_share_bytes = num_elements // NUM_RANKS * bits // 8 + 4 * num_blocks
    for result in found:
        run = result[f"traffic-{bits}"]
        assert run["dense"] == num_steps * num_elements * 4  # 2 (W - 1)/W = 1
        assert run["sent"] == num_steps * 2 * num_share_bytes
        assert run["share"] <= limit


def test_feedback_is_what_makes_one_bit_converge(found: list[Result]) -> None:
    loss = {name.removeprefix("convex-"): found[0][name] for name in found[0] if name.startswith("convex")}
    assert loss["dense"] < 1e-3
    assert loss["8"] < 2 * loss["dense"]
    assert loss["1"] < 0.05
    assert loss["1-forgetful"] > 10 * loss["1"]


if __name__ == "__main__":
    work(int(sys.argv[1]), Path(sys.argv[2]))
