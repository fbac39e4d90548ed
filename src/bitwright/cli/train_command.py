"""`bitwright train lora|qlora|qat|distill`: the commands, and what they print."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.table import Table

from bitwright.cli.console import ProgressBars, fail, listed, print_json, show
from bitwright.cli.shared_options import AsJson, FreshRun, MaxKl, Model, Quiet, RecipeFile, RemoteCode
from bitwright.cli.speed_command import MeasureSpeed, add_speed
from bitwright.train.options import FOR_ADAPTERS, FOR_DISTILLATION, FOR_QAT, OPTIMIZERS, SCHEDULES, TrainingOptions

if TYPE_CHECKING:
    from bitwright.training_run import TrainingResult
    from bitwright.training_text import TrainingText

train = typer.Typer(no_args_is_help=True, help="Fine-tune a model, or train its quantized weights.")

Data = Annotated[
    str,
    typer.Option(
        help="Text to train on: file, JSONL, hub:NAME[:CONFIG[:SPLIT]], stdlib, or self (the model writes it)."
    ),
]
Out = Annotated[Path, typer.Option(help="Run directory; the same command goes on with an interrupted run.")]
Heldout = Annotated[str | None, typer.Option(help="Text to judge by; windows of --data unless given.")]
Seqlen = Annotated[int, typer.Option(min=2, help="Tokens per window.")]
Windows = Annotated[int | None, typer.Option(min=1, help="At most so many windows to train on.")]
Steps = Annotated[int, typer.Option(help="Optimizer steps.")]
Batch = Annotated[int, typer.Option(help="Windows per step and process.")]
Accumulation = Annotated[int, typer.Option(help="Batches per step.")]
Rate = Annotated[float, typer.Option("--learning-rate", "--lr", help="The highest of the schedule.")]
Optimizer = Annotated[str, typer.Option(help="adamw, or adamw8bit: states in 8 bit (bitsandbytes).")]
Schedule = Annotated[str, typer.Option(help="cosine, linear, or constant_with_warmup.")]
Warmup = Annotated[float, typer.Option(help="Fraction of the steps over which the rate rises.")]
MaxGradNorm = Annotated[float, typer.Option(help="Gradients are scaled down to this norm.")]
Decay = Annotated[float, typer.Option(help="Weight decay of AdamW.")]
Precision = Annotated[str, typer.Option(help="float32, or bfloat16 (autocast).")]
Checkpointing = Annotated[bool, typer.Option(help="Recompute activations in the backward pass.")]
SaveEvery = Annotated[int, typer.Option(help="Steps between checkpoints.")]
Tensorboard = Annotated[bool, typer.Option("--tensorboard", help="Also log for TensorBoard.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of windows, their order and dropout.")]
Rank = Annotated[int, typer.Option(help="Rank of the adapters.")]
Alpha = Annotated[float, typer.Option(help="Strength of the adapters.")]
Dropout = Annotated[float, typer.Option(help="Share of an adapter's inputs dropped in training.")]
RankStabilised = Annotated[bool, typer.Option("--rslora", help="Divide alpha by the root of the rank.")]
Targets = Annotated[
    list[str] | None, typer.Option(help="Patterns of layers, separated by commas; all of the blocks unless given.")
]
GradientBits = Annotated[int | None, typer.Option(help="Under torchrun: send gradients in 8, 4 or 1 bits.")]
Shard = Annotated[bool, typer.Option("--shard", help="Under torchrun: share one model (FSDP2) instead of copying it.")]
Device = Annotated[str, typer.Option(help="Where to train: cpu, mps, or cuda (choose one by CUDA_VISIBLE_DEVICES).")]
Dtype = Annotated[str, typer.Option(help="Compute type of the frozen base: float32, bfloat16 or float16.")]
Method = Annotated[str | None, typer.Option(help="Where training starts: gptq unless the recipe says.")]
Start = Annotated[str, typer.Option(help="method: its codes; original: the weights on its grids.")]
Mode = Annotated[str, typer.Option(help="Grids: auto, minmax, learned, fixed, or scales (only they are trained).")]
FreezeAfter = Annotated[float, typer.Option(help="Fraction of the steps after which grids no longer move.")]
GridRate = Annotated[float, typer.Option(help="Factor on the learning rate for scales and zero points.")]
RestRate = Annotated[float, typer.Option(help="Factor on the learning rate for what stays in 16 bit.")]
StepRate = Annotated[
    float, typer.Option("--learning-rate", "--lr", help="The highest of the schedule, in steps of a weight's grid.")
]
Rest = Annotated[bool, typer.Option("--train-rest", help="Also train what stays in 16 bit.")]
CacheBits = Annotated[int | None, typer.Option(help="Also quantize the KV cache, in training alone; 2 to 8.")]
Labels = Annotated[float, typer.Option(help="Share of the text's own next tokens in the loss.")]
Temperature = Annotated[float, typer.Option(help="Of the teacher's and the student's distributions.")]


@train.command()
def lora(
    model: Model, data: Data, out: Out, heldout: Heldout = None, rank: Rank = 16, alpha: Alpha = 32.0,
    dropout: Dropout = 0.0, rslora: RankStabilised = False, targets: Targets = None, seqlen: Seqlen = 256,
    windows: Windows = None, steps: Steps = FOR_ADAPTERS.steps, batch: Batch = 8, accumulation: Accumulation = 1,
    learning_rate: Rate = FOR_ADAPTERS.learning_rate, schedule: Schedule = "cosine", warmup: Warmup = 0.05,
    optimizer: Optimizer = "adamw", weight_decay: Decay = 0.0, max_grad_norm: MaxGradNorm = 1.0,
    precision: Precision = "float32", checkpointing: Checkpointing = False, save_every: SaveEvery = 50,
    tensorboard: Tensorboard = False,
    gradient_bits: GradientBits = None, shard: Shard = False, seed: Seed = 0, device: Device = "cpu",
    dtype: Dtype = "float32", fresh: FreshRun = False, quiet: Quiet = False, as_json: AsJson = False,
    trust_remote_code: RemoteCode = False,
) -> None:  # fmt: skip
    """Fine-tune with low-rank adapters beside the frozen weights; leaves an adapter in PEFT's format."""
    given = dict(locals())
    _adapter(given, scheme=None, start_at_error=False, by_group=False)


@train.command()
def qlora(
    model: Model, data: Data, out: Out, scheme: Annotated[str, typer.Option(help="Of the frozen base.")] = "nf4-b64-dq",
    heldout: Heldout = None, rank: Rank = 16, alpha: Alpha = 32.0, dropout: Dropout = 0.0,
    rslora: RankStabilised = False, targets: Targets = None,
    start_at_error: Annotated[
        bool, typer.Option("--start-at-error", help="The adapter starts at what the base lacks (LoftQ).")
    ] = False,
    by_group: Annotated[
        bool, typer.Option("--by-group", help="Adapters that fold into zero points (QA-LoRA); a -floatzero scheme.")
    ] = False,
    seqlen: Seqlen = 256, windows: Windows = None, steps: Steps = FOR_ADAPTERS.steps, batch: Batch = 8,
    accumulation: Accumulation = 1, learning_rate: Rate = FOR_ADAPTERS.learning_rate, schedule: Schedule = "cosine",
    warmup: Warmup = 0.05, optimizer: Optimizer = "adamw", weight_decay: Decay = 0.0, max_grad_norm: MaxGradNorm = 1.0,
    precision: Precision = "float32", checkpointing: Checkpointing = False, save_every: SaveEvery = 50,
    tensorboard: Tensorboard = False, gradient_bits: GradientBits = None, seed: Seed = 0, device: Device = "cpu",
    dtype: Dtype = "float32", fresh: FreshRun = False, quiet: Quiet = False, as_json: AsJson = False,
    trust_remote_code: RemoteCode = False,
) -> None:  # fmt: skip
    """Fine-tune with adapters over a quantized base, which stays packed in memory."""
    given = dict(locals())
    from bitwright.schemes import Scheme

    _adapter(given, scheme=Scheme.parse(scheme), start_at_error=start_at_error, by_group=by_group)


@train.command()
def qat(
    model: Model, data: Data, out: Out,
    scheme: Annotated[str | None, typer.Option(help="W4A16-g128 …; see bitwright formats.")] = None,
    recipe: RecipeFile = None, method: Method = None, start: Start = "method", mode: Mode = "auto",
    loss: Annotated[str, typer.Option(help="kl follows the original model, cross_entropy the text.")] = "kl",
    temperature: Temperature = 1.0, labels: Labels = 0.0, freeze_after: FreezeAfter = 0.8, grid_rate: GridRate = 0.1,
    rest_rate: RestRate = 0.1, train_rest: Rest = False, cache_bits: CacheBits = None, max_kl: MaxKl = None,
    heldout: Heldout = None, seqlen: Seqlen = 256, windows: Windows = None, steps: Steps = FOR_QAT.steps,
    batch: Batch = 8, accumulation: Accumulation = 1, learning_rate: StepRate = FOR_QAT.learning_rate,
    schedule: Schedule = "cosine", warmup: Warmup = 0.05, optimizer: Optimizer = "adamw",
    weight_decay: Decay = 0.0, max_grad_norm: MaxGradNorm = 1.0, precision: Precision = "float32",
    checkpointing: Checkpointing = False, save_every: SaveEvery = 50, tensorboard: Tensorboard = False,
    gradient_bits: GradientBits = None, seed: Seed = 0, device: Device = "cpu", measure_speed: MeasureSpeed = False,
    fresh: FreshRun = False, quiet: Quiet = False, as_json: AsJson = False, trust_remote_code: RemoteCode = False,
) -> None:  # fmt: skip
    """Train quantized weights, from what a method has made of them towards the original model."""
    given = dict(locals())
    from bitwright.qat_run import QatTask, train_quantized
    from bitwright.recipe_builder import build_recipe
    from bitwright.train.qat import MODES, QatOptions

    wished = build_recipe(recipe, {"scheme": scheme, "method": method, "max_kl": max_kl}, {})
    task = QatTask(
        recipe=wished, text=_text(given), training=_options(given),
        qat=QatOptions(mode=_one_of("--mode", mode, MODES), freeze_after=freeze_after),
        start=_one_of("--start", start, ("method", "original")),
        loss=_one_of("--loss", loss, ("kl", "cross_entropy")), temperature=temperature, labels=labels,
        grid_rate=grid_rate, rest_rate=rest_rate, train_rest=train_rest, cache_bits=cache_bits,
        device=device, gradient_bits=gradient_bits,
    )  # fmt: skip
    with ProgressBars(quiet=quiet or as_json) as progress:
        found = train_quantized(model, task, out, fresh=fresh, trust_remote_code=trust_remote_code, progress=progress)
    if not as_json:
        _print(found.results, found.run, quiet=quiet, as_json=False)
    speeds = add_speed(
        found.run, measure_speed and _speaks(), device=device, trust_remote_code=trust_remote_code,
        quiet=quiet or as_json,
    )  # fmt: skip
    if as_json:
        _print({**found.results, **speeds}, found.run, quiet=quiet, as_json=True)
    if found.failure is not None:
        fail(f"{found.quantized}: {found.failure}", 1)


@train.command()
def distill(
    model: Model, teacher: Annotated[str, typer.Option(help="Model directory or hub id to learn from.")], data: Data,
    out: Out, temperature: Temperature = 1.0,
    top_k: Annotated[
        int | None, typer.Option(help="Keep so many of the teacher's logits per token on disk; runs it unless given.")
    ] = None,
    labels: Labels = 0.0,
    features: Annotated[float, typer.Option(help="Weight of the distance between hidden states.")] = 0.0,
    heldout: Heldout = None, seqlen: Seqlen = 256, windows: Windows = None,
    steps: Steps = FOR_DISTILLATION.steps, batch: Batch = 8, accumulation: Accumulation = 1,
    learning_rate: Rate = FOR_DISTILLATION.learning_rate, schedule: Schedule = "cosine", warmup: Warmup = 0.05,
    optimizer: Optimizer = "adamw", weight_decay: Decay = 0.0, max_grad_norm: MaxGradNorm = 1.0,
    precision: Precision = "float32", checkpointing: Checkpointing = False, save_every: SaveEvery = 50,
    tensorboard: Tensorboard = False, gradient_bits: GradientBits = None, shard: Shard = False, seed: Seed = 0,
    device: Device = "cpu", fresh: FreshRun = False, quiet: Quiet = False, as_json: AsJson = False,
    trust_remote_code: RemoteCode = False,
) -> None:  # fmt: skip
    """Train all weights of a model towards a teacher of the same vocabulary; leaves a model directory."""
    given = dict(locals())
    from bitwright.distill_run import DistillTask, distill_model

    task = DistillTask(
        teacher=teacher, text=_text(given), training=_options(given), temperature=temperature, top_k=top_k,
        labels=labels, features=features, device=device, gradient_bits=gradient_bits, shard=shard,
    )  # fmt: skip
    with ProgressBars(quiet=quiet or as_json) as progress:
        found = distill_model(model, task, out, fresh=fresh, trust_remote_code=trust_remote_code, progress=progress)
    _print(found.results, found.run, quiet=quiet, as_json=as_json)
    _fail_if_worse(found)


def _adapter(given: dict[str, Any], *, scheme: Any, start_at_error: bool, by_group: bool) -> None:
    from bitwright.adapter_run import AdapterTask, train_adapter
    from bitwright.train.lora import LoraConfig
    from bitwright.train.target_layers import ALL_TARGETS

    config = LoraConfig(
        rank=given["rank"], alpha=given["alpha"], dropout=given["dropout"], rslora=given["rslora"],
        targets=tuple(listed(given["targets"])) or ALL_TARGETS,
    )  # fmt: skip
    task = AdapterTask(
        text=_text(given), training=_options(given), lora=config, scheme=scheme, start_at_error=start_at_error,
        by_group=by_group, dtype=given["dtype"], device=given["device"], gradient_bits=given["gradient_bits"],
        shard=given.get("shard", False),
    )  # fmt: skip
    with ProgressBars(quiet=given["quiet"] or given["as_json"]) as progress:
        found = train_adapter(
            given["model"], task, given["out"], fresh=given["fresh"], trust_remote_code=given["trust_remote_code"],
            progress=progress,
        )  # fmt: skip
    _print(found.results, found.run, quiet=given["quiet"], as_json=given["as_json"])
    _fail_if_worse(found)


def _fail_if_worse(found: "TrainingResult") -> None:
    if found.failure is not None:
        fail(f"{found.run}: {found.failure}", 1)


def _text(given: dict[str, Any]) -> "TrainingText":
    from bitwright.training_text import TrainingText

    return TrainingText(
        data=given["data"], heldout=given["heldout"], seqlen=given["seqlen"], windows=given["windows"],
        seed=given["seed"],
    )  # fmt: skip


def _options(given: dict[str, Any]) -> TrainingOptions:
    names = (
        "steps", "batch", "accumulation", "learning_rate", "weight_decay", "checkpointing", "save_every", "seed",
        "tensorboard", "warmup", "max_grad_norm",
    )  # fmt: skip
    precision = _one_of("--precision", given["precision"], ("float32", "bfloat16"))
    optimizer = _one_of("--optimizer", given["optimizer"], OPTIMIZERS)
    schedule = _one_of("--schedule", given["schedule"], SCHEDULES)
    return TrainingOptions(
        precision=precision, optimizer=optimizer, schedule=schedule, **{name: given[name] for name in names}
    )


def _one_of(option: str, value: str, known: tuple[str, ...]) -> Any:
    from bitwright.errors import RecipeError, did_you_mean

    if value not in known:
        raise RecipeError(f"{option} {value}: unknown.{did_you_mean(value, known)}")
    return value


def _speaks() -> bool:
    """Whether this process is the one of several that prints."""
    return int(os.environ.get("RANK", "0")) == 0


def _print(results: dict[str, Any], run: Path, *, quiet: bool, as_json: bool) -> None:
    if not _speaks():
        return
    if as_json:
        print_json({"run": str(run), **results})
        return
    if quiet:
        return
    table = Table(box=box.SIMPLE, show_header=False)
    for name, value in results.items():
        if isinstance(value, int | float | str) and not isinstance(value, bool):
            text = f"{value:.6g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else value
            table.add_row(name.replace("_", " "), text)
    show(table, f"{run}")
