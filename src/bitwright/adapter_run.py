"""Fine-tuning with adapters as a run: LoRA over the model itself, QLoRA over a quantized copy of it.

The run directory has, beside run.json and 5-records.jsonl:
    0-text/      what the model has written, where it trains on that
    0-base/      QLoRA: the quantized base, a run directory of its own
    4-adapter/   the adapter in PEFT's format
    4-sites/     instead of it where adapters fold into zero points (`by_group`): packed layers as given sites, folded,
                 and the adapters as they were trained
"""

import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from torch import nn

from bitwright.errors import RecipeError
from bitwright.model.layouts.stored import module_of
from bitwright.model.sites import Site, modules_of, stacked_patterns
from bitwright.model.stream import StreamedModel
from bitwright.model.tensor_file import save_tensors_atomic
from bitwright.nn.linear import QuantizedLinear
from bitwright.pipeline import quantize
from bitwright.preparation import DTYPES, decide, model_sites, open_model
from bitwright.process_memory import PeakMemory
from bitwright.progress import Progress, no_progress
from bitwright.recipe import HEAD_NAME, Calibration, Recipe
from bitwright.runs import RunDirectory, model_directory
from bitwright.schemes import Scheme
from bitwright.search.model_shape import shape_of_model
from bitwright.train.adapter_files import base_hash, save_adapters
from bitwright.train.engine import fit
from bitwright.train.given_sites import write_given_sites
from bitwright.train.group_adapter import add_group_adapters, fold_adapters, require_foldable
from bitwright.train.heldout import score_in_memory
from bitwright.train.lora import Adapter, LoraConfig, LoraLinear, adapters_of, add_adapters, trainable_ledger
from bitwright.train.low_rank_start import start_at_error
from bitwright.train.memory_ledger import Batch, MemoryLedger, predict_memory
from bitwright.train.options import FOR_ADAPTERS, TrainingOptions
from bitwright.train.packed_base import packed_schemes
from bitwright.train.processes import Processes
from bitwright.train.target_layers import select, stacked_experts
from bitwright.training_run import (
    BASE,
    TRAINING,
    UNGATED,
    TrainingResult,
    begin,
    carry_out,
    load_in_memory,
    read_text,
    task_identity,
    worsening,
    write_training_records,
)
from bitwright.training_text import DrawnText, TrainingText

ADAPTER, SITES = "4-adapter", "4-sites"
GROUP_ADAPTERS = "adapters.safetensors"
"""In the folder of given sites: <layer>.lora_a [r, G] and <layer>.lora_b [O, r]."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterTask:
    """What to train.

    Attributes:
        text: to train on and to judge by.
        training: how long and how fast.
        lora: rank, strength and places.
        scheme: of the frozen base; None leaves it as it is (LoRA).
        start_at_error: the adapter starts at what the quantized base lacks (LoftQ).
        by_group: adapters that fold into the zero points of the base (QA-LoRA); needs a `-floatzero` scheme.
        dtype: in which the model computes.
        device: where.
        gradient_bits: of gradients between processes; None for dense ones.
        shard: several processes share one model (FSDP2); each has a copy of it otherwise.
    """

    text: TrainingText
    training: TrainingOptions = FOR_ADAPTERS
    lora: LoraConfig = field(default_factory=LoraConfig)
    scheme: Scheme | None = None
    start_at_error: bool = False
    by_group: bool = False
    dtype: str = "float32"
    device: str = "cpu"
    gradient_bits: int | None = None
    shard: bool = False

    def __post_init__(self) -> None:
        if self.scheme is None and (self.start_at_error or self.by_group):
            raise RecipeError("an adapter that starts at the error of its base, or folds into it, needs a --scheme.")
        if self.start_at_error and self.by_group:
            raise RecipeError("a group adapter cannot hold the error of a base. Leave one of the two options out.")
        if self.by_group and self.scheme is not None:
            require_foldable(self.scheme)
        if self.shard and self.scheme is not None:
            raise RecipeError("--shard: packed weights cannot be shared out. Leave --shard or --scheme out.")
        if self.dtype not in DTYPES:
            raise RecipeError(f"--dtype {self.dtype}: unknown. Use {', '.join(DTYPES)}.")


def train_adapter(
    model: str | Path,
    task: AdapterTask,
    out: str | Path,
    *,
    fresh: bool = False,
    trust_remote_code: bool = False,
    progress: Progress = no_progress,
) -> TrainingResult:
    """Fine-tune a model with adapters into a run directory; the same call goes on with an interrupted run.

    Raises:
        BitwrightError: see `errors`; TrainingDiverged where the loss is not finite.
    """
    run, processes = begin(out, task, shard=task.shard)
    streamed = open_model(model_directory(model), device="cpu", dtype="float32", trust_remote_code=trust_remote_code)
    checkpoint = streamed.skeleton.checkpoint
    select(streamed.skeleton.model, task.lora.targets)
    text = task.text.draw(checkpoint.path, trust_remote_code=trust_remote_code)
    asked = {
        "model": str(model), "model_hash": checkpoint.audit(), "data_hash": text.identity, "task": task_identity(task),
    }  # fmt: skip

    def work() -> None:
        _train(streamed, task, run, text, processes, trust_remote_code, progress)

    return carry_out(run, asked, work, processes, fresh=fresh)


def base_recipe(task: AdapterTask, sites: Iterable[Site]) -> Recipe:
    """How the base is quantized: to the nearest level, into the layout that loads as layers which stay packed.

    Experts that are slices of one parameter, which it cannot hold, stay in 16 bit.
    """
    assert task.scheme is not None
    return Recipe(
        scheme=task.scheme, method="rtn", ignore=(HEAD_NAME, *stacked_patterns(sites)), layout="bitwright",
        max_kl=UNGATED, calibration=Calibration(seqlen=task.text.seqlen),
    )  # fmt: skip


def load_base(model: Path, task: AdapterTask, folder: Path, *, trust_remote_code: bool) -> nn.Module:
    """Load what is adapted: the model itself, or its quantized copy in `folder`."""
    source = model if task.scheme is None else RunDirectory(folder).model
    return load_in_memory(source, task.device, DTYPES[task.dtype], trust_remote_code=trust_remote_code)


def _predicted(streamed: StreamedModel, task: AdapterTask) -> MemoryLedger:
    """What training will hold, before anything is loaded."""
    shape, dtype = shape_of_model(streamed), DTYPES[task.dtype]
    schemes: Mapping[str, Scheme | None] = _stored_schemes(streamed)
    if task.scheme is not None:
        plan = decide(streamed, base_recipe(task, model_sites(streamed))).plan
        schemes = {name: entry.effective for name, entry in plan.sites.items()}
    packed = {name for name, scheme in schemes.items() if scheme is not None}
    batch = Batch(num_sequences=task.training.batch, seqlen=task.text.seqlen, checkpointing=task.training.checkpointing)
    return predict_memory(
        shape.in_dtype(dtype, packed=packed), schemes, task.lora, batch, by_group=task.by_group,
        optimizer=task.training.optimizer,
    )  # fmt: skip


def _stored_schemes(streamed: StreamedModel) -> dict[str, Scheme]:
    """The schemes of the sites that the model itself stores packed."""
    found = packed_schemes(streamed.skeleton.checkpoint)
    modules = {site.name: module_of(streamed.skeleton.sources[site.parameter][0]) for site in model_sites(streamed)}
    return {site: found[module] for site, module in modules.items() if module in found}


def _train(
    streamed: StreamedModel, task: AdapterTask, run: RunDirectory, text: DrawnText, processes: Processes,
    trust_remote_code: bool, progress: Progress,
) -> None:  # fmt: skip
    begun, memory = time.perf_counter(), PeakMemory()
    windows, heldout = read_text(text, run, processes, progress)
    model, task = streamed.skeleton.checkpoint.path, replace(task, device=processes.device)
    if processes.is_main and task.scheme is not None:
        quantize(
            model, base_recipe(task, model_sites(streamed)), run.path / BASE, device=task.device,
            trust_remote_code=trust_remote_code, progress=progress,
        )  # fmt: skip
    processes.wait()
    loaded = load_base(model, task, run.path / BASE, trust_remote_code=trust_remote_code)
    torch.manual_seed(task.training.seed)  # adapters start at random
    adapters: Mapping[str, Adapter] = (
        add_group_adapters(loaded, task.lora) if task.by_group else add_adapters(loaded, task.lora)
    )
    before = score_in_memory(loaded, heldout)
    if task.start_at_error:
        _start_at_error(adapters, model, trust_remote_code)
    folder = run.work / TRAINING
    curve = fit(loaded, windows, task.training, folder, processes=processes, progress=progress)
    if not processes.is_main:
        return
    after = score_in_memory(loaded, heldout)
    ledger = trainable_ledger(loaded)
    if task.by_group:
        _leave_folded(loaded, run.path / SITES)
    else:
        save_adapters(loaded, run.path / ADAPTER, base=str(model), base_hash=base_hash(loaded))
    results = {
        "kind": "qlora" if task.scheme else "lora",
        "scheme": None if task.scheme is None else str(task.scheme),
        "data": task.text.data,
        "rank": task.lora.rank,
        "perplexity_before": before.perplexity,
        "perplexity": after.perplexity,
        "perplexity_stderr": after.perplexity_stderr,
        "heldout_tokens": after.num_tokens,
        "trainable": ledger.total.num_trainable,
        "parameters": ledger.total.num_total,
        "experts_without_adapter": len(stacked_experts(loaded)),
        "memory": curve.memory,
        "predicted_memory": asdict(_predicted(streamed, task)),
        "gradient_share": processes.gradient_share,
        "peak_memory_bytes": memory.since_bytes,
        "seconds": time.perf_counter() - begun,
        "losses": list(curve.losses),
    }
    write_training_records(run, results)
    run.finish(results, failure=worsening(before, after))


def _leave_folded(model: nn.Module, folder: Path) -> None:
    """Fold group adapters, in place, and write what is packed then, and the adapters beside it."""
    trained = {
        f"{name}.{leaf}": parameter.detach().cpu().contiguous()
        for name, adapter in adapters_of(model).items()
        for leaf, parameter in adapter.named_parameters(recurse=False)
    }
    fold_adapters(model)
    packed = {name: layer for name, layer in modules_of(model).items() if isinstance(layer, QuantizedLinear)}
    sites = {name: layer.site().to("cpu") for name, layer in packed.items()}
    write_given_sites(folder, sites, {name: layer.scheme for name, layer in packed.items()})
    save_tensors_atomic(folder / GROUP_ADAPTERS, trained)


def _start_at_error(adapters: Mapping[str, Adapter], model: Path, trust_remote_code: bool) -> None:
    streamed = open_model(model, device="cpu", dtype="float32", trust_remote_code=trust_remote_code)
    parameters = {site.name: site.parameter for site in model_sites(streamed)}
    for block in range(streamed.num_blocks):
        with streamed.block(block):
            for name, adapter in adapters.items():
                if name.startswith(streamed.block_names[block] + ".") and isinstance(adapter, LoraLinear):
                    start_at_error(adapter, streamed.skeleton.model.get_parameter(parameters[name]).detach())
