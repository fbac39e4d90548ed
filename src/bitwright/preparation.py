"""Everything that is decided and checked before a run touches the disk: fail here, cheaply, or not at all."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer

from bitwright.calibration.self_text import generate_windows
from bitwright.data.corpora import load_corpus
from bitwright.data.windows import hash_tokens, sample_windows, split_windows, tokenise
from bitwright.errors import CheckpointError, DataError, RecipeError, RunError
from bitwright.exporters.layout_choice import choose_layouts
from bitwright.methods.composition import check_composition, needs_own_layout, needs_text, require_known
from bitwright.methods.solvers import has_own_tables
from bitwright.model.checkpoint import Checkpoint, open_checkpoint
from bitwright.model.layouts import own
from bitwright.model.layouts.stored import COMPRESSED_TENSORS
from bitwright.model.sites import Site, block_sites
from bitwright.model.stream import StreamedModel
from bitwright.preflight import Estimate, check, estimate
from bitwright.progress import Progress
from bitwright.recipe import Layout, Plan, Recipe, resolve
from bitwright.records import deciding_versions
from bitwright.runs import RunDirectory

GATE_TOKENS = 2048
GATE_TEXT_WITHOUT_CALIBRATION = "stdlib:heldout"
SELF = "self"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, kw_only=True, slots=True)
class Decision:
    """What a recipe means for one model, by its shapes alone; `layouts` says how each quantized site is stored."""

    sites: tuple[Site, ...]
    plan: Plan
    layouts: dict[str, str]


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """A quantization that has passed every check that can be made before it starts.

    Attributes:
        layouts: how each quantized site is stored.
        calibration: token windows [N, T]; N = 0 for a data-free run.
        gate: token windows [K, T] that no method sees, for the loss of the whole model.
        fingerprint: of all that determines the result; a run directory belongs to one.
    """

    model: StreamedModel
    recipe: Recipe
    sites: tuple[Site, ...]
    plan: Plan
    layouts: dict[str, str]
    calibration: Tensor
    gate: Tensor
    needed: Estimate
    model_hash: str
    data_hash: str
    fingerprint: str


def open_model(source: str | Path, *, device: str, dtype: str, trust_remote_code: bool) -> StreamedModel:
    """Open a model for streaming.

    Raises:
        CheckpointError: it cannot be read or built.
        RecipeError: unknown dtype or a device that is not there.
    """
    if dtype not in DTYPES:
        raise RecipeError(f"--dtype {dtype}: unknown. Use {', '.join(DTYPES)}.")
    check_device(device)
    return StreamedModel(
        open_checkpoint(source), device=device, dtype=DTYPES[dtype], trust_remote_code=trust_remote_code
    )


def check_device(device: str) -> None:
    """Raises RecipeError for a device that is not there, or holds no numbers."""
    try:
        if torch.empty(1, device=device).is_meta:
            raise RuntimeError("it holds no numbers")
    except (RuntimeError, AssertionError) as error:
        raise RecipeError(f"--device {device}: not available ({str(error).splitlines()[0]}). Use cpu.") from None


def open_original(run: RunDirectory, given: str | None, *, device: str, trust_remote_code: bool) -> StreamedModel:
    """Open the model that a finished run was made of: the one given, else where the run found it.

    Raises:
        RunError: it is another model.
        CheckpointError: it cannot be read.
    """
    info = run.info
    assert info is not None
    source = given or str(info["asked"]["model"])
    opened = open_model(source, device=device, dtype="float32", trust_remote_code=trust_remote_code)
    if opened.skeleton.checkpoint.audit() != info["asked"]["model_hash"]:
        raise RunError(f"{source}: not the model that {run.path} was made of. Give it with --original.")
    return opened


def load_tokenizer(checkpoint: Checkpoint, *, trust_remote_code: bool) -> Any:
    """Load the tokenizer beside the weights."""
    try:
        return AutoTokenizer.from_pretrained(checkpoint.path, trust_remote_code=trust_remote_code)
    except (ValueError, OSError, KeyError, ImportError, AttributeError, TypeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"{checkpoint.path}: no usable tokenizer ({reason}).") from None


def model_sites(model: StreamedModel) -> tuple[Site, ...]:
    """All weight sites of all decoder blocks, in order."""
    blocks = [(name, model.skeleton.model.get_submodule(name)) for name in model.block_names]
    return tuple(site for name, block in blocks for site in block_sites(block, name))


def max_length(model: StreamedModel) -> int | None:
    """The longest window the model was made for; None if its configuration does not say."""
    value = getattr(model.skeleton.model.config.get_text_config(), "max_position_embeddings", None)
    return None if value is None else int(value)


def text_windows(model: StreamedModel, text: str, seqlen: int, *, trust_remote_code: bool) -> Tensor:
    """All windows [N, T] of a text."""
    check_seqlen(model, seqlen)
    tokenizer = load_tokenizer(model.skeleton.checkpoint, trust_remote_code=trust_remote_code)
    windows = split_windows(tokenise(tokenizer, load_corpus(text).documents), seqlen=seqlen, source=text)
    check_vocabulary(model, windows)
    return windows


def text_sample(
    model: StreamedModel, text: str, seqlen: int, *, num_samples: int, seed: int, trust_remote_code: bool
) -> Tensor:
    """Some windows [N, T] of a text, chosen by a seed."""
    check_seqlen(model, seqlen)
    tokenizer = load_tokenizer(model.skeleton.checkpoint, trust_remote_code=trust_remote_code)
    tokens = tokenise(tokenizer, load_corpus(text).documents)
    windows = sample_windows(tokens, num_samples=num_samples, seqlen=seqlen, seed=seed, source=text)
    check_vocabulary(model, windows)
    return windows


def check_seqlen(model: StreamedModel, seqlen: int) -> None:
    """Raises DataError for windows longer than the model's positions, or too short to predict anything."""
    if seqlen < 2:
        raise DataError(f"--seqlen {seqlen}: a window that predicts a token has at least 2. Use 2 or more.")
    longest = max_length(model)
    if longest is not None and seqlen > longest:
        raise DataError(f"--seqlen {seqlen}: the model has {longest} positions. Use {longest} or less.")


def prepare(
    source: str | Path,
    recipe: Recipe,
    run: RunDirectory,
    *,
    fresh: bool,
    device: str,
    dtype: str,
    trust_remote_code: bool,
    progress: Progress,
    trained: str = "",
) -> Job:
    """Decide everything and check everything; nothing is written.

    Args:
        trained: hash of what training has found, where that is to be written.
    Raises:
        BitwrightError: whatever is wrong with model, recipe, text, machine or run directory.
    """
    require_known(recipe)
    run.check_place()
    model = open_model(source, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    model.skeleton.checkpoint.require_original()
    decided = decide(model, recipe)
    sites, plan, layouts = decided.sites, decided.plan, decided.layouts
    check_seqlen(model, recipe.calibration.seqlen)
    model_hash = model.skeleton.checkpoint.audit(_byte_progress(model.skeleton.checkpoint, progress))
    num_gate = num_gate_windows(recipe.calibration.seqlen)
    num_windows = recipe.calibration.num_samples if recipe.calibration.text else 0
    seqlen = recipe.calibration.seqlen
    needed = estimate(
        model, sites, plan, num_windows, num_gate, seqlen,
        transforms=recipe.transforms, guided_groups=recipe.gptq.guided_groups, rank=recipe.low_rank.rank,
        auto_blocks=recipe.auto.sample,
    )  # fmt: skip
    check(needed, run.path)
    calibration, gate = _texts(model, recipe, num_windows, num_gate, device, trust_remote_code, progress)
    data_hash = hash_tokens(torch.cat([calibration, gate]))
    parts = [recipe.hash(), model_hash, data_hash, trained, dtype, torch.device(device).type]
    fingerprint = hashlib.sha256(" ".join([*parts, *deciding_versions().values()]).encode()).hexdigest()
    run.check(fingerprint, fresh=fresh)
    return Job(
        model=model, recipe=recipe, sites=sites, plan=plan, layouts=layouts, calibration=calibration, gate=gate,
        needed=needed, model_hash=model_hash, data_hash=data_hash, fingerprint=fingerprint,
    )  # fmt: skip


def num_gate_windows(seqlen: int) -> int:
    """How many windows, drawn after those to calibrate on, judge a run."""
    return max(2, GATE_TOKENS // seqlen)


def decide(model: StreamedModel, recipe: Recipe) -> Decision:
    """Resolve a recipe for a model and check whatever its shapes tell, without reading a weight.

    Raises:
        RecipeError, ShapeError, CheckpointError: why this recipe cannot be carried out on this model.
    """
    sites = model_sites(model)
    plan = resolve(recipe, sites)
    if not plan.quantized:
        raise RecipeError("the recipe leaves every site in 16 bit. Remove an ignore pattern or rule.")
    check_composition(recipe, plan)
    layouts = choose_layouts(
        sites,
        plan.sites,
        _layout(recipe),
        dtype=model.skeleton.checkpoint.dense_dtype,
        stored={site.name: model.skeleton.stored_dtype(site.parameter) for site in sites},
    )
    _check_places(model, [site for site in sites if plan.sites[site.name].scheme is not None], layouts)
    _check_importance(recipe, plan)
    _check_calibration(recipe, plan)
    return Decision(sites=sites, plan=plan, layouts=layouts)


def _check_places(model: StreamedModel, sites: list[Site], layouts: Mapping[str, str]) -> None:
    """Refuse sites whose codes the checkpoint, or a layer that loads them packed, has no place for."""
    skeleton = model.skeleton
    for site in sites:
        pieces = [piece for piece in skeleton.stored_pieces(site.parameter) if piece[1] == site.index]
        if layouts[site.name] != own.NAME or site.index is not None:
            continue
        module = skeleton.model.get_submodule(site.parameter.rpartition(".")[0])
        if len(pieces) != 1 or type(module) is not nn.Linear:
            raise CheckpointError(
                f"{site.name}: a {type(module).__name__} stored in {len(pieces)} tensors, which bitwright's layout "
                "cannot hold. Ignore it, or use a scheme that compressed-tensors holds."
            )


def _layout(recipe: Recipe) -> Layout:
    """The layout to ask for: bitwright's own where a part of the recipe needs it."""
    part = needs_own_layout(recipe)
    if part is None:
        return recipe.layout
    if recipe.layout == COMPRESSED_TENSORS:
        raise RecipeError(f"{part}: its result cannot be held by compressed-tensors. Use layout bitwright or auto.")
    return "bitwright"


def _check_importance(recipe: Recipe, plan: Plan) -> None:
    for name, entry in plan.sites.items():
        if recipe.importance == "fisher" and entry.scheme and not has_own_tables(entry.scheme.weights.format):
            raise RecipeError(
                f"{name}: importance fisher weighs the tables of kmeans schemes, not {entry.scheme}. Use inputs."
            )


def _check_calibration(recipe: Recipe, plan: Plan) -> None:
    if recipe.calibration.text is not None:
        return
    give = "Give --calibration FILE, hub:NAME or self"
    needing = needs_text(recipe, plan)
    if needing is not None:
        raise RecipeError(f"method {needing} needs calibration text. {give}, or --method rtn.")
    if recipe.importance == "fisher":
        raise RecipeError(f"importance fisher needs calibration text. {give}.")
    for name, entry in plan.sites.items():
        acts = None if entry.scheme is None else entry.scheme.activations
        if acts is not None and acts.observer is not None:
            raise RecipeError(
                f"{name}: scheme {entry.scheme} calibrates its activations, which needs text. {give}, or a scheme "
                "with dynamic or 16-bit activations (-dynamic, -a16)."
            )


def _texts(
    model: StreamedModel,
    recipe: Recipe,
    num_windows: int,
    num_gate: int,
    device: str,
    trust_remote_code: bool,
    progress: Progress,
) -> tuple[Tensor, Tensor]:
    """Calibration and gate windows: disjoint pieces of one text, or of what the model writes itself."""
    wanted = recipe.calibration
    total = num_windows + num_gate
    checkpoint = model.skeleton.checkpoint
    if wanted.text == SELF:
        windows = generate_windows(
            checkpoint,
            total,
            wanted.seqlen,
            seed=wanted.seed,
            device=device,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
    else:
        tokenizer = load_tokenizer(checkpoint, trust_remote_code=trust_remote_code)
        text = wanted.text or GATE_TEXT_WITHOUT_CALIBRATION
        tokens = tokenise(tokenizer, load_corpus(text).documents)
        windows = sample_windows(tokens, num_samples=total, seqlen=wanted.seqlen, seed=wanted.seed, source=text)
    check_vocabulary(model, windows)
    return windows[:num_windows].contiguous(), windows[num_windows:].contiguous()


def vocabulary_size(model: StreamedModel) -> int:
    """How many tokens the model knows."""
    return int(model.skeleton.model.config.get_text_config().vocab_size)


def check_vocabulary(model: StreamedModel, windows: Tensor) -> None:
    """Raises CheckpointError for tokens that the model does not know."""
    size = vocabulary_size(model)
    largest = int(windows.max())
    if largest >= size:
        raise CheckpointError(
            f"{model.skeleton.checkpoint.path}: the tokenizer makes token {largest}, the model knows {size}. "
            "Tokenizer and weights do not belong together."
        )


def _byte_progress(checkpoint: Checkpoint, progress: Progress) -> Any:
    done = 0

    def add(num_bytes: int) -> None:
        nonlocal done
        done += num_bytes
        progress("check", done // 2**20, max(1, checkpoint.num_bytes // 2**20))

    return add
