"""Quantization-aware training as a run: from post-training quantization to trained codes, with one gate and one report.

The run directory has, beside run.json and 5-records.jsonl:
    0-text/       what the model has written, where it trains on that
    0-base/       what post-training quantization makes of the same recipe, a run of its own: where training starts
    4-quantized/  the trained codes, a run of its own, which evaluates, exports and reports like any other
"""

import math
import time
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from bitwright.errors import RecipeError, TrainingDiverged, VerificationError
from bitwright.evaluation.score import Score
from bitwright.methods.solvers import TRAINED_ELSEWHERE
from bitwright.model.checkpoint import open_checkpoint
from bitwright.model.dense_copy import write_dense_copy
from bitwright.model.sites import stacked_patterns
from bitwright.pipeline import Trained, open_model, quantize
from bitwright.preparation import Decision, decide
from bitwright.process_memory import PeakMemory
from bitwright.progress import Progress, no_progress
from bitwright.recipe import Recipe
from bitwright.records import append_jsonl, read_jsonl
from bitwright.runs import TRAINED_CODES, RunDirectory
from bitwright.schemes import Scheme
from bitwright.train.distillation import check_labels, towards
from bitwright.train.engine import Curve, fit, next_token_loss
from bitwright.train.fake_inputs import FakeKeyValue, add_fake_cache, cached_projections
from bitwright.train.fake_weights import check_mode, inside_cells, mean_step
from bitwright.train.given_sites import write_given_sites
from bitwright.train.heldout import score_in_memory
from bitwright.train.objective import Objective
from bitwright.train.options import FOR_QAT, TrainingOptions
from bitwright.train.processes import Processes
from bitwright.train.qat import QatLinear, QatOptions, convert, freeze_grids, grid_parameters, linear_of, prepare
from bitwright.training_run import (
    BASE,
    TRAINING,
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

SITES, DENSE = "sites", "dense"
INSIDE = 0.98
"""How far weights start from the level of their code: the rest of the way keeps it for a while."""
Loss = Literal["kl", "cross_entropy"]


@dataclass(frozen=True, kw_only=True, slots=True)
class QatTask:
    """What to train.

    Attributes:
        recipe: schemes by site, and the method that training starts from; its calibration text is replaced.
        text: to train on and to judge by.
        training: how long and how fast; the learning rate counts in steps of a weight's grid (`mean_step`), so
            that one rate serves every site, format and model.
        qat: how quantizers behave.
        start: `method` starts at the codes of the recipe's method, near the original weights within the cells of
            these codes; `original` at the weights themselves on that method's grids.
        loss: kl follows the original model (distillation), cross_entropy the text.
        temperature: of kl.
        labels: share of the text's own next tokens in kl, from 0 to below 1.
        grid_rate: factor on the learning rate for scales and zero points, which counts in their own sizes.
        rest_rate: factor on the learning rate for what stays in 16 bit, in absolute units.
        train_rest: also train embeddings, norms and whatever else stays in 16 bit.
        cache_bits: also quantize the KV cache in training, to so many bits; None for not.
        cache_group: tokens (keys) or channels (values) that share a scale there.
        device: where to train.
        gradient_bits: of gradients between processes; None for dense ones.
    """

    recipe: Recipe
    text: TrainingText
    training: TrainingOptions = FOR_QAT
    qat: QatOptions = field(default_factory=QatOptions)
    start: Literal["method", "original"] = "method"
    loss: Loss = "kl"
    temperature: float = 1.0
    labels: float = 0.0
    grid_rate: float = 0.1
    rest_rate: float = 0.1
    train_rest: bool = False
    cache_bits: int | None = None
    cache_group: int = 32
    device: str = "cpu"
    gradient_bits: int | None = None

    def __post_init__(self) -> None:
        if self.recipe.transforms or self.recipe.all_repairs:
            raise RecipeError(
                "train qat: starts from the model's own weights, which transforms and repairs change. "
                "Name a solver alone."
            )
        for name in ("temperature", "grid_rate", "rest_rate"):
            value = getattr(self, name)
            if not (value > 0 and math.isfinite(value)):
                raise RecipeError(f"{name} must be a finite number above 0, got {value}.")
        if self.cache_bits is not None:
            FakeKeyValue(bits=self.cache_bits, group=self.cache_group)
        check_labels(self.labels)
        if self.labels and self.loss != "kl":
            raise RecipeError("labels are a share of the loss kl. Leave them or cross_entropy out.")


@dataclass(frozen=True, kw_only=True, slots=True)
class QatResult(TrainingResult):
    """A finished training, and the run of its codes."""

    quantized: Path


def train_quantized(
    model: str | Path,
    task: QatTask,
    out: str | Path,
    *,
    fresh: bool = False,
    trust_remote_code: bool = False,
    progress: Progress = no_progress,
) -> QatResult:
    """Train a model's quantized weights into a run directory; the same call goes on with an interrupted run.

    Raises:
        BitwrightError: see `errors`; TrainingDiverged where the loss is not finite.
    """
    run, processes = begin(out, task)
    text = task.text.draw(model, trust_remote_code=trust_remote_code)
    recipe = replace(task.recipe, calibration=text.calibration)
    streamed = open_model(model, device="cpu", dtype="float32", trust_remote_code=trust_remote_code)
    decided = decide(streamed, recipe)
    _check_trainable(streamed.skeleton.model, task, decided)
    asked = {
        "model": str(model), "model_hash": streamed.skeleton.checkpoint.audit(), "data_hash": text.identity,
        "recipe": recipe.to_mapping(), "task": task_identity(replace(task, recipe=Recipe())),
    }  # fmt: skip

    def work() -> None:
        _Work(model, task, recipe, decided, run, processes, trust_remote_code, progress).carry_out(text)

    found = carry_out(run, asked, work, processes, fresh=fresh)
    return QatResult(run=run.path, results=found.results, failure=found.failure, quantized=run.path / TRAINED_CODES)


def _schemes(decided: Decision) -> dict[str, Scheme]:
    """The scheme of every site that is quantized."""
    entries = {site.name: decided.plan.sites[site.name].effective for site in decided.sites}
    return {name: scheme for name, scheme in entries.items() if scheme is not None}


def _check_trainable(model: nn.Module, task: QatTask, decided: Decision) -> None:
    """Refuse, before any work, what could not be trained after it.

    Raises:
        RecipeError: experts that no linear layer computes alone, or a mode that a format cannot have.
        StructureError: a weight that no `nn.Linear` holds, or a cache of no known projections.
    """
    schemes = _schemes(decided)
    stacked = [site for site in decided.sites if site.index is not None and site.name in schemes]
    if stacked:
        patterns = ", ".join(f"'{pattern}'" for pattern in stacked_patterns(stacked))
        raise RecipeError(
            f"{stacked[0].name}: a slice of one 3-D parameter, whose codes cannot be trained. Keep these experts in 16 "
            f"bit by `ignore: [lm_head, {patterns}]` in a --recipe, or quantize without training."
        )
    for name, scheme in schemes.items():
        linear_of(model, name)
        if task.qat.mode != "auto":
            check_mode(task.qat.mode, scheme)
    if task.cache_bits is not None:
        cached_projections(model)


class _Work:
    """The steps of one training."""

    def __init__(
        self, model: str | Path, task: QatTask, recipe: Recipe, decided: Decision, run: RunDirectory,
        processes: Processes, trust_remote_code: bool, progress: Progress,
    ) -> None:  # fmt: skip
        self.source, self.task, self.recipe, self.decided, self.run = model, task, recipe, decided, run
        self.processes, self.trust_remote_code, self.progress = processes, trust_remote_code, progress
        self.schemes = _schemes(decided)

    def carry_out(self, text: DrawnText) -> None:
        """Post-training quantization, training, and the run of the trained codes."""
        begun, memory = time.perf_counter(), PeakMemory()
        windows, heldout = read_text(text, self.run, self.processes, self.progress)
        if self.processes.is_main:
            self._quantize(self.recipe, self.run.path / BASE, None)
        self.processes.wait()
        teacher = load_in_memory(
            open_checkpoint(self.source).path, self.processes.device, torch.float32,
            trust_remote_code=self.trust_remote_code,
        ).requires_grad_(False)  # fmt: skip
        student = deepcopy(teacher)
        rates = self._prepare(student)
        before = score_in_memory(student, heldout, reference=teacher)
        curve = self._fit(student, teacher, windows, rates)
        if not self.processes.is_main:
            return
        after = self._score_trained(student, heldout, teacher)
        trained = self._leave(student)
        rules = tuple(
            rule if rule.scheme is None else replace(rule, method=TRAINED_ELSEWHERE) for rule in self.recipe.rules
        )
        recipe = replace(self.recipe, method=TRAINED_ELSEWHERE, transforms=(), repairs=(), rules=rules)
        quantized = self._quantize(recipe, self.run.path / TRAINED_CODES, trained)
        original = score_in_memory(teacher, heldout)
        results = {
            "kind": "qat",
            "scheme": str(self.recipe.scheme),
            "data": self.task.text.data,
            "loss": self.task.loss,
            "temperature": self.task.temperature,
            "labels": self.task.labels,
            "start": self.task.start,
            "cache_bits": self.task.cache_bits,
            "perplexity_original": original.perplexity,
            "perplexity_before": before.perplexity,
            "perplexity": after.perplexity,
            "perplexity_stderr": after.perplexity_stderr,
            "kl_before": before.kl_mean,
            "kl_mean": after.kl_mean,
            "gate_kl_before": _results_of(self.run.path / BASE)["kl_mean"],
            "gate_kl": quantized["kl_mean"],
            "heldout_tokens": after.num_tokens,
            "bits_per_weight": quantized["bits_per_weight"],
            "memory": curve.memory,
            "gradient_share": self.processes.gradient_share,
            "peak_memory_bytes": memory.since_bytes,
            "seconds": time.perf_counter() - begun,
            "losses": list(curve.losses),
        }
        write_training_records(self.run, results)
        inner = RunDirectory(self.run.path / TRAINED_CODES)
        if not any(record["kind"] == "training" for record in read_jsonl(inner.records)):
            append_jsonl(inner.records, *(r for r in read_jsonl(self.run.records) if r["kind"] != "environment"))
        info = inner.info
        assert info is not None
        share = 1.0 if self.task.loss == "cross_entropy" else self.task.labels
        worse = worsening(before, after, text_share=share, start=self.run.path / BASE)
        self.run.finish(results, failure=info.get("failure") or worse)

    def _score_trained(self, student: nn.Module, heldout: Tensor, teacher: nn.Module) -> Score:
        """Score what the last step has left, which no loss has looked at."""
        try:
            return score_in_memory(student, heldout, reference=teacher)
        except VerificationError:
            raise TrainingDiverged(
                f"step {self.task.training.steps}, the last, left weights or inputs to quantize that are not finite. "
                "Use a lower --learning-rate."
            ) from None

    def _quantize(self, recipe: Recipe, out: Path, trained: Trained | None) -> dict[str, Any]:
        return quantize(
            self.source, recipe, out, trained=trained, device=self.task.device,
            trust_remote_code=self.trust_remote_code, progress=self.progress,
        ).results  # fmt: skip

    def _prepare(self, student: nn.Module) -> dict[str, float]:
        """Put quantizers around the sites of a model, at what the base run has found; return the rates of it all."""
        streamed = open_model(self.source, device="cpu", dtype="float32", trust_remote_code=self.trust_remote_code)
        found = open_checkpoint(RunDirectory(self.run.path / BASE).model)
        parameters = {site.name: site.parameter for site in self.decided.sites}
        stored = {name: streamed.skeleton.sources[parameters[name]][0] for name in self.schemes}
        packed = {name: found.read_packed(stored[name]) for name in self.schemes}
        if self.task.start == "method":
            with torch.no_grad():
                for name, site in packed.items():
                    weight = student.get_parameter(parameters[name])
                    weight.copy_(inside_cells(weight, site.weight, INSIDE))
        student.requires_grad_(self.task.train_rest)
        prepared = prepare(
            student, self.schemes, {name: site.weight.grid for name, site in packed.items()}, self.task.qat,
            inputs={name: site.inputs for name, site in packed.items() if site.inputs is not None},
            dtype=streamed.skeleton.checkpoint.dense_dtype,
        )  # fmt: skip
        rates = self._rates(student, prepared)
        if self.task.cache_bits is not None:
            add_fake_cache(student, self.task.cache_bits, self.task.cache_group)
        return rates

    def _rates(self, student: nn.Module, prepared: dict[str, QatLinear]) -> dict[str, float]:
        """Return the factor on the learning rate of every parameter, at the start of the training."""
        grids = {id(parameter) for parameter in grid_parameters(student)}
        weights = {f"{name}.weight": module for name, module in prepared.items()}
        rates: dict[str, float] = {}
        for name, parameter in student.named_parameters():
            if id(parameter) in grids:
                rates[name] = self.task.grid_rate * float(parameter.detach().abs().mean())
            elif name in weights:
                rates[name] = mean_step(weights[name].fake_weight.grid(parameter.detach()), len(parameter))
            else:
                rates[name] = self.task.rest_rate
        return rates

    def _fit(self, student: nn.Module, teacher: nn.Module, windows: Tensor, rates: dict[str, float]) -> Curve:
        last = self.task.qat.freeze_after * self.task.training.steps
        buffers = [
            name for name, _ in student.named_buffers() if any(name.startswith(f"{site}.") for site in self.schemes)
        ]

        def after_step(done: int) -> None:
            if self.task.qat.freeze_after < 1 and done >= last:
                freeze_grids(student)

        return fit(
            student, windows, self.task.training, self.run.work / TRAINING, objective=self._objective(teacher),
            rate=rates.__getitem__, buffers=buffers, after_step=after_step,
            processes=self.processes, progress=self.progress,
        )  # fmt: skip

    def _objective(self, teacher: nn.Module) -> Objective:
        if self.task.loss == "cross_entropy":
            return next_token_loss
        return towards(teacher, self.task.temperature, labels=self.task.labels)

    def _leave(self, student: nn.Module) -> Trained:
        """Write the trained codes and the dense rest; a resumed run writes the same again."""
        sites, dense = self.run.work / SITES, self.run.work / DENSE
        write_given_sites(sites, {name: site.to("cpu") for name, site in convert(student).items()}, self.schemes)
        streamed = open_model(self.source, device="cpu", dtype="float32", trust_remote_code=self.trust_remote_code)
        values = {name: parameter.detach().cpu() for name, parameter in student.named_parameters()}
        if not dense.exists():
            write_dense_copy(streamed.skeleton, values, dense)
        return Trained(model=dense, sites=sites)


def _results_of(run: Path) -> dict[str, Any]:
    info = RunDirectory(run).info
    assert info is not None
    return info["results"]
