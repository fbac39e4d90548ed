"""Rotate the residual stream so that outlier channels spread over all channels: folded into the weights beforehand.

A model computes the same function when its residual stream is turned by an orthogonal matrix and all that reads or
writes it is turned with it (`rotation_plan`). Outliers of a few channels become a little of every channel, so that
inputs and weights need fewer levels:

    R1   the residual stream             folded: random Hadamard matrices, the best of some seeds, or learned
    R2   values → outputs, per head      folded
    R4   inputs of down projections      at inference (`online_hadamard`), where inputs are quantized; likewise of all
                                         other weights that R1 and R2 do not reach

What is folded costs nothing at inference and holds in any layout. R3, which turns queries and keys after the position
embedding, changes only what a quantized cache of keys would hold: it comes with such a cache. QuaRot also rotates at
inference across the heads that enter output projections; here turned heads count as reached, since on top of R2 that
gained nothing where it was measured, and it costs at every token.

The model that is written has the dtype of the original, into which every weight is rounded once.

Reference: QuaRot, arXiv:2404.00456; SpinQuant, arXiv:2405.16406. Differs: which weights are turned is found and proven
by running the blocks, not read off a table of architectures; seeds are compared on calibration text.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from bitwright.methods.model_task import ModelChange, ModelTask
from bitwright.methods.online_hadamard import block_size, rotate_inputs
from bitwright.methods.rotation_learning import learn, require_memory
from bitwright.methods.rotation_plan import rotated
from bitwright.methods.rotation_proof import Rotation, RotationPlan, plan_rotation, random_rotation
from bitwright.methods.rotation_rounding import Rounding
from bitwright.methods.rotation_search import rounding_error, sample_blocks
from bitwright.methods.stage import BlockStage
from bitwright.model.directory import complete_directory
from bitwright.model.edits import named_tensors
from bitwright.model.sites import block_sites
from bitwright.model.stream import StreamedModel
from bitwright.model.tensor_file import save_tensors_atomic
from bitwright.numerics.inputs import InputTransform
from bitwright.numerics.linalg import wide_dtype
from bitwright.recipe import Plan, Recipe
from bitwright.records import write_json_atomic

FOLDER = "rotation"
"""Inside the model directory: what was done, and the frame, which must not be taken for weights."""
FRAME, NOTES = "frame.safetensors", "notes.json"
PROOF_WINDOWS, PROOF_TOKENS = 2, 64


def rotate_model(task: ModelTask) -> ModelChange:
    """Write a model directory of the rotated model.

    Raises:
        StructureError: a part of the model cannot be rotated, and why; nothing is written.
        RecipeError: blocks of the size asked for do not fit.
        ResourceError: learning does not fit into memory.
    """
    skeleton, options = task.model.skeleton, task.recipe.rotation
    model = task.model
    if model.dtype != torch.float32:
        model = StreamedModel(
            skeleton.checkpoint, device=str(model.device), trust_remote_code=skeleton.trust_remote_code
        )
    if options.kind == "learned":
        require_memory(model)
    ids = task.calibration[:PROOF_WINDOWS, :PROOF_TOKENS]
    plan = plan_rotation(model, ids, task.progress)
    rotation, notes = _choose(task, model, plan)
    temporary = task.out.with_name(f"{task.out.name}-unfinished")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    _write(model, plan, rotation, temporary, task)
    (temporary / FOLDER).mkdir()
    save_tensors_atomic(temporary / FOLDER / FRAME, {"residual": rotation.residual.float().cpu().contiguous()})
    notes |= {
        "what": _described(options.kind, plan),
        "head_rotations": sum(len(roles.heads) for roles in plan.blocks),
        "reached": sorted(plan.reached),
    }
    write_json_atomic(temporary / FOLDER / NOTES, notes)
    temporary.replace(task.out)
    return read_rotation(task.out)


def read_rotation(directory: Path) -> ModelChange:
    """Return what `rotate_model` did, from its directory."""
    frame = load_file(directory / FOLDER / FRAME)["residual"]
    notes = json.loads((directory / FOLDER / NOTES).read_text(encoding="utf-8"))
    del notes["reached"]
    return ModelChange(frame=frame, notes=notes)


def rotate_rest(stage: BlockStage) -> None:
    """Rotate at inference the inputs that no folded rotation reaches, of sites whose inputs are quantized."""
    if not stage.recipe.rotation.online:
        return
    notes = stage.model.skeleton.checkpoint.path / FOLDER / NOTES
    reached = set(json.loads(notes.read_text(encoding="utf-8"))["reached"])
    sites = stage.sites
    groups = [
        tuple(name for name in group.sites if _goes_online(stage.plan, name, sites[name].parameter, reached))
        for group in stage.structure.groups
    ]
    rotate_inputs(stage, groups, transform="rotation")


def rotates_online(recipe: Recipe) -> bool:
    """Whether some inputs are rotated at inference, which only bitwright's own layout holds."""
    schemes = [recipe.scheme, *(rule.scheme for rule in recipe.rules)]
    return recipe.rotation.online and any(s is not None and s.activations is not None for s in schemes)


def _described(kind: str, plan: RotationPlan) -> str:
    return f"residual stream of width {plan.width} and heads rotated, {kind}, folded into the weights"


def _goes_online(plan: Plan, site: str, parameter: str, reached: set[str] | frozenset[str]) -> bool:
    scheme = plan.sites[site].scheme
    return scheme is not None and scheme.activations is not None and parameter not in reached


def _choose(task: ModelTask, model: StreamedModel, plan: RotationPlan) -> tuple[Rotation, dict[str, Any]]:
    """Return the best of some random rotations, improved by learning where that is asked for, and notes."""
    options = task.recipe.rotation
    rounding = Rounding(
        plan=task.plan, fake_quantize=task.fake_quantize, input_quantizer=task.input_quantizer,
        online=_online(task, model, plan) if options.online else {},
    )  # fmt: skip
    errors: list[float] = []
    best = random_rotation(plan, 0, options.block)
    if options.seeds > 1:
        sampled = sample_blocks(model, plan, task.calibration, task.progress)
        for seed in range(options.seeds):
            candidate = random_rotation(plan, seed, options.block)
            errors.append(rounding_error(model, sampled, candidate, rounding))
            best = candidate if errors[-1] == min(errors) else best
            task.progress("rotation: seeds", seed + 1, options.seeds)
    notes: dict[str, Any] = {"rotation": options.kind, "seed_errors": errors}
    if options.kind == "learned":
        learned = learn(
            model, plan, best, rounding, task.calibration,
            steps=options.steps, block=options.block, progress=task.progress,
        )  # fmt: skip
        best = learned.rotation
        notes |= {"loss_before": learned.loss_before, "loss": learned.loss, "best_step": learned.best_step}
    return best, notes


def _online(task: ModelTask, model: StreamedModel, plan: RotationPlan) -> dict[str, InputTransform]:
    """The input transforms that `rotate_rest` will find."""
    found: dict[str, InputTransform] = {}
    for name in model.block_names:
        for site in block_sites(model.skeleton.model.get_submodule(name), name):
            if _goes_online(task.plan, site.name, site.parameter, plan.reached):
                found[site.name] = InputTransform(hadamard=block_size(site, task.recipe))
    return found


def _write(model: StreamedModel, plan: RotationPlan, rotation: Rotation, target: Path, task: ModelTask) -> None:
    """Write shards, one per block and one for the rest, and what completes the directory."""
    skeleton, checkpoint = model.skeleton, model.skeleton.checkpoint
    turn = rotation.to(model.device, wide_dtype(model.device))
    num_shards = model.num_blocks + 1
    rest = set(checkpoint.stored)
    for index, name in enumerate(model.block_names):
        with model.block(index) as block:
            changed = rotated(named_tensors(block, name), plan.blocks[index], turn.residual, turn.heads[index])
        stored = checkpoint.read_stored(skeleton.stored_names(name))
        for parameter, value in changed.items():
            stored |= skeleton.stored_tensors(parameter, value)
        rest -= stored.keys()
        save_tensors_atomic(target / _shard(index, num_shards), stored)
        task.progress("rotation: write", index + 1, num_shards)
    save_tensors_atomic(target / _shard(model.num_blocks, num_shards), _outside(model, plan, turn.residual, rest))
    complete_directory(checkpoint, target, _untied(checkpoint.config))
    task.progress("rotation: write", num_shards, num_shards)


def _outside(model: StreamedModel, plan: RotationPlan, residual: Tensor, rest: set[str]) -> dict[str, Tensor]:
    """The stored tensors outside the blocks; a head that was tied to the embedding gets one of its own."""
    skeleton = model.skeleton
    stored = skeleton.checkpoint.read_stored(rest)
    with model.outside():
        whole = skeleton.model
        tensors = {name: p.detach() for name, p in whole.named_parameters(remove_duplicate=False) if not p.is_meta}
        tied = {id(tensors[name]): name for name in skeleton.sources if name in tensors}
        for parameter, value in rotated(tensors, plan.outside, residual).items():
            if parameter in skeleton.sources:
                stored |= skeleton.stored_tensors(parameter, value)
            else:
                dtype = skeleton.stored_dtype(_same_tensor(tensors, parameter, list(tied.values())))
                stored[parameter] = value.to("cpu", dtype).contiguous()
    return stored


def _same_tensor(tensors: dict[str, Tensor], parameter: str, names: list[str]) -> str:
    """The parameter that another one is tied to."""
    return next(name for name in names if tensors[name].data_ptr() == tensors[parameter].data_ptr())


def _untied(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration of a model whose head has a weight of its own."""
    text = config.get("text_config")
    nested = {"text_config": {**text, "tie_word_embeddings": False}} if isinstance(text, dict) else {}
    return {**config, **nested, "tie_word_embeddings": False}


def _shard(index: int, num_shards: int) -> str:
    return f"model-{index + 1:05d}-of-{num_shards:05d}.safetensors"
