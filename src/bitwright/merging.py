"""Merging: what an adapter learned goes into the weights, and the loss is measured on what then lies on the disk.

    dense        W + B A in 16 bit: a model directory like the original's; loses the rounding of the sum
    requantize   the same, quantized again with GPTQ: a run directory; loses what quantization loses
    fold         group adapters only: into the zero points, codes and scales stay; a run directory; loses nothing

W is by default what the adapter was trained on: for QLoRA that is the dequantized base, whose errors the adapter has
learned to make up for. In the original weights there is no error to make up for, so that the sum is another model than
the one that was trained.

Each way ends with the divergence of what was written, read again, from the model in memory with its adapter.

Legend: W [O, I], A [r, I] and B [O, r] as in `train.lora`.
"""

import math
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from bitwright.adapter_run import ADAPTER, GROUP_ADAPTERS, SITES
from bitwright.data.overlap import require_disjoint
from bitwright.data.windows import hash_tokens
from bitwright.errors import CheckpointError, DataError, RecipeError, RunError
from bitwright.evaluation.score import Score, Scorer
from bitwright.evaluation.streamed import final_hidden
from bitwright.methods.solvers import TRAINED_ELSEWHERE
from bitwright.model.checkpoint import open_checkpoint
from bitwright.model.dense_copy import write_dense_copy
from bitwright.model.sites import stacked_patterns
from bitwright.outcome import gate_failure
from bitwright.pipeline import Trained, quantize
from bitwright.preparation import DTYPES, SELF, model_sites, open_model
from bitwright.progress import Progress, no_progress
from bitwright.recipe import HEAD_NAME, Calibration, Recipe
from bitwright.records import append_jsonl, read_jsonl, write_json_atomic
from bitwright.runs import RUN_FILE, RunDirectory, model_directory
from bitwright.schemes import Scheme
from bitwright.train.adapter_files import CONFIG, base_hash, load_adapters, read_adapters
from bitwright.train.group_adapter import add_group_adapters
from bitwright.train.lora import LoraConfig
from bitwright.train.merged_weights import onto_base, onto_original
from bitwright.train.packed_base import packed_schemes
from bitwright.training_run import BASE, UNGATED, load_in_memory
from bitwright.training_text import TrainingText

RECORD = "merge.json"
"""In the model directory of a dense merge: the record that a run has among its records."""
"""A fold is judged against the adapter, not against the original, from which training was meant to move away."""
How = Literal["dense", "requantize", "fold"]
Into = Literal["base", "original"]


@dataclass(frozen=True, kw_only=True, slots=True)
class MergeTask:
    """How to merge.

    Attributes:
        how: see the module.
        into: the weights that B A is added to: those the adapter was trained on, or the original's.
        base: model of a bare PEFT directory: directory, hub id, or run of bitwright quantize. Of a training run, where
            its model lies now.
        scheme: of a requantized result; None for that of the base.
        calibration: text to requantize on; None for the one that was trained on.
        text: to judge by; None for the run's own held-out windows.
        seqlen: tokens per window, for a bare PEFT directory.
        max_kl: nats per token above which the merge has failed.
        device: where to compute.
    """

    how: How
    into: Into = "base"
    base: str | None = None
    scheme: Scheme | None = None
    calibration: str | None = None
    text: str | None = None
    seqlen: int | None = None
    max_kl: float = Recipe().max_kl
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.how != "requantize" and (self.scheme is not None or self.calibration is not None):
            raise RecipeError(
                f"--how {self.how} chooses no codes. Leave --scheme and --calibration out, or requantize."
            )
        if self.how == "fold" and self.into == "original":
            raise RecipeError("--how fold keeps the codes of the base. Leave --into out, or merge dense.")
        if not (self.max_kl > 0 and math.isfinite(self.max_kl)):
            raise RecipeError(f"--max-kl {self.max_kl}: must be a finite number above 0.")


@dataclass(frozen=True, kw_only=True, slots=True)
class MergeResult:
    """A finished merge: what was written, its record, and why it failed its gate."""

    out: Path
    record: dict[str, Any]
    failure: str | None


def merge(
    adapter: str | Path,
    task: MergeTask,
    out: str | Path,
    *,
    trust_remote_code: bool = False,
    progress: Progress = no_progress,
) -> MergeResult:
    """Merge the adapter of a training run, or of a bare PEFT directory, and measure what was lost.

    Args:
        adapter: run of `bitwright train lora` or `qlora`, or a directory that peft wrote.
        task: how.
        out: a model directory (dense) or a run directory; an interrupted run goes on.
    Raises:
        BitwrightError: see `errors`. A loss above the gate does not raise: the result stays and is marked.
    """
    begun, target = time.perf_counter(), Path(out)
    _check_out(target, task.how)
    source = _find(Path(adapter), task)
    heldout = source.draw(trust_remote_code)
    work = _Merge(source, task, target, heldout, trust_remote_code, progress)
    result, failure = work.write()
    before, after = work.compare(result)
    failure = failure or gate_failure(cast(float, after.kl_mean), task.max_kl)
    record: dict[str, Any] = {
        "kind": "merge", "how": task.how, "into": task.into, "adapter": str(adapter), "base": str(source.base),
        "original": str(source.original), "scheme": None if work.scheme is None else str(work.scheme),
        "perplexity_before": before.perplexity, "perplexity": after.perplexity,
        "perplexity_stderr": after.perplexity_stderr,
        **{key: value for key, value in asdict(after).items() if key.startswith(("kl", "same"))},
        "heldout_tokens": after.num_tokens, "heldout_hash": hash_tokens(heldout), "dtype": source.dtype,
        "max_kl": task.max_kl, "failure": failure, "seconds": time.perf_counter() - begun,
    }  # fmt: skip
    if task.how == "dense":
        write_json_atomic(result / RECORD, record)
        if target.exists():
            target.rmdir()
        result.replace(target)
    else:
        append_jsonl(RunDirectory(target).records, record)
        RunDirectory(target).judge(failure)
    return MergeResult(out=target, record=record, failure=failure)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Source:
    """An adapter and what is known of it.

    Attributes:
        given: the run, or the bare adapter.
        folder: of the adapter in PEFT's format, or of given sites (`group` is then its configuration).
        base: directory of the model that it was trained on.
        original: the unquantized model behind the base; the base itself where that is packed and nothing says which.
        scheme: of the base; None for a dense one.
        data_hash: of all windows of its text; None where nobody wrote it down, or for another text.
    """

    given: Path
    folder: Path
    base: Path
    original: Path
    scheme: Scheme | None
    group: LoraConfig | None
    dtype: str
    text: TrainingText
    data_hash: str | None

    def draw(self, trust_remote_code: bool) -> Tensor:
        """Return the windows to judge by."""
        text = self.text.draw(self.original, trust_remote_code=trust_remote_code)
        if self.data_hash not in (None, text.identity):
            raise DataError(
                f"{self.text.data}: is not the text of the training any more, so held-out windows are unknown. Put it "
                "back, or give --text."
            )
        return text.read(self.given, "cpu", no_progress)[1]

    def load(self, device: str, trust_remote_code: bool) -> nn.Module:
        """Load the base with its adapters."""
        model = load_in_memory(self.base, device, DTYPES[self.dtype], trust_remote_code=trust_remote_code)
        if self.group is not None:
            trained = load_file(self.folder / GROUP_ADAPTERS)
            with torch.no_grad():
                for name, adapter in add_group_adapters(model, self.group).items():
                    adapter.lora_a.copy_(trained[f"{name}.lora_a"])
                    adapter.lora_b.copy_(trained[f"{name}.lora_b"])
            return model
        if read_adapters(self.folder).base_hash not in (None, base_hash(model)):
            raise CheckpointError(
                f"{self.folder}: was trained on other weights than those of {self.base}, or in another dtype. Give its "
                "training run, or the base that it was trained on."
            )
        load_adapters(model, self.folder, check_base=False)
        return model


class _Merge:
    """The steps of one merge."""

    def __init__(
        self, source: _Source, task: MergeTask, out: Path, heldout: Tensor, trust_remote_code: bool, progress: Progress
    ) -> None:
        self.source, self.task, self.out, self.heldout = source, task, out, heldout
        self.trust_remote_code, self.progress = trust_remote_code, progress
        self.scheme = None if task.how == "dense" else task.scheme or source.scheme
        if task.how != "dense" and self.scheme is None:
            raise RecipeError(f"{source.base}: is not quantized, so it has no scheme to quantize in. Give --scheme.")
        if task.into == "original" and source.original == source.base and source.scheme is not None:
            raise RecipeError(f"{source.base}: packed, and nothing says what it was made from. Leave --into out.")
        self.adapted = source.load(task.device, trust_remote_code)
        self.place: dict[str, Any] = {"device": task.device, "trust_remote_code": trust_remote_code}

    def write(self) -> tuple[Path, str | None]:
        """Write the result; return its model directory, and why quantization failed its own gate."""
        if self.task.how == "dense":
            # Under its own name only when it has been compared; what a killed merge has left is written again.
            partial = self.out.absolute().with_name(f".{self.out.name}-dense")
            shutil.rmtree(partial, ignore_errors=True)
            self._write_dense(partial)
            return partial, None
        if self.task.how == "fold":
            sites = model_sites(open_model(self.source.original, dtype="float32", **self.place))
            kept = (HEAD_NAME, *stacked_patterns(sites))
            recipe = replace(self._recipe(TRAINED_ELSEWHERE, UNGATED), ignore=kept)
            trained = Trained(model=self.source.original, sites=self.source.folder)
            quantize(self.source.original, recipe, self.out, trained=trained, progress=self.progress, **self.place)
            return RunDirectory(self.out).model, None
        recipe = self._calibrated(self._recipe("gptq", self.task.max_kl))
        # Its name is always the same, so that a killed merge is taken up; a finished one leaves no dense model behind.
        merged = self.out.absolute().with_name(f".{self.out.name}-merged")
        shutil.rmtree(merged, ignore_errors=True)
        try:
            self._write_dense(merged)
            result = quantize(merged, recipe, self.out, progress=self.progress, **self.place)
        finally:
            shutil.rmtree(merged, ignore_errors=True)
        return RunDirectory(self.out).model, result.failure

    def compare(self, result: Path) -> tuple[Score, Score]:
        """Score the model with its adapter, and what was written with the divergence from it."""
        before, after = Scorer(), Scorer()
        with torch.no_grad(), self._read_again(result) as logits_of:
            for index in range(len(self.heldout)):
                ids = self.heldout[index : index + 1].long()
                expected = self._logits(self.adapted, ids)
                before.add(ids[0], expected)
                after.add(ids[0], logits_of(index), expected)
                self.progress("compare", index + 1, len(self.heldout))
        return before.result(), after.result()

    @contextmanager
    def _read_again(self, result: Path) -> Generator[Callable[[int], Tensor], None, None]:
        """Give the logits [T, V] of held-out windows, by their numbers, of what lies on the disk."""
        windows, dtype = self.heldout.long(), self.source.dtype
        if self.task.how == "fold":
            # Read block by block, weights are rounded to the dtype of the files, which training does not do.
            whole = load_in_memory(result, self.task.device, DTYPES[dtype], trust_remote_code=self.trust_remote_code)
            yield lambda index: self._logits(whole, windows[index : index + 1])
            return
        model = open_model(result, dtype=dtype, **self.place)
        with tempfile.TemporaryDirectory(prefix="bitwright-") as work:
            hidden = final_hidden(model, windows, Path(work) / "hidden.bin", self.progress, "read again")
            with model.outside():
                yield lambda index: model.leave(
                    windows[index : index + 1], hidden.read(index, index + 1, model.device)
                )[0]

    def _logits(self, model: nn.Module, ids: Tensor) -> Tensor:
        return cast(Tensor, model(input_ids=ids.to(self.task.device), use_cache=False).logits)[0]

    def _recipe(self, method: str, max_kl: float) -> Recipe:
        assert self.scheme is not None
        layout = "bitwright" if method == TRAINED_ELSEWHERE else "auto"
        calibration = Calibration(seqlen=self.source.text.seqlen)
        return Recipe(scheme=self.scheme, method=method, layout=layout, max_kl=max_kl, calibration=calibration)

    def _calibrated(self, recipe: Recipe) -> Recipe:
        """Calibrate on what was trained on, or on another text, which held-out windows must not be part of."""
        text, original, asked = self.source.text, self.source.original, self.task.calibration
        if asked is not None:
            text = replace(text, data=asked, heldout=None)
        drawn = text.draw(original, trust_remote_code=self.trust_remote_code)
        if asked is not None and asked != SELF:
            windows, _ = drawn.read(self.source.given, self.task.device, self.progress)
            require_disjoint(windows, self.heldout, calibration_source=asked, evaluation_source="the held-out text")
        return replace(recipe, calibration=drawn.calibration)

    def _write_dense(self, target: Path) -> None:
        original = open_model(
            self.source.original, device="cpu", dtype="float32", trust_remote_code=self.trust_remote_code
        )
        add = onto_base if self.task.into == "base" else onto_original
        write_dense_copy(original.skeleton, add(self.adapted, original), target)


def _check_out(out: Path, how: How) -> None:
    """Raises RunError for a place that is not free; an unfinished run is, since the same merge goes on with it."""
    if how == "dense":
        taken = out.exists() and (not out.is_dir() or any(out.iterdir()))
    else:
        RunDirectory(out).check_place()
        run = RunDirectory(out)
        taken = run.is_complete and any(record["kind"] == "merge" for record in read_jsonl(run.records))
    if taken:
        raise RunError(f"{out}: exists. Choose another --out.")


def _find(adapter: Path, task: MergeTask) -> _Source:
    """Find out what was given, and whether it can be merged so; reads no weights but those of a hash."""
    if (adapter / RUN_FILE).is_file():
        return _from_run(adapter, task)
    if not (adapter / CONFIG).is_file():
        raise RunError(
            f"{adapter}: neither a run of bitwright train lora or qlora nor the directory of a PEFT adapter."
        )
    if task.how == "fold":
        raise _not_foldable(adapter)
    if task.base is None:
        raise RecipeError(f"{adapter}: a bare adapter. Give the model that it was trained on as --base.")
    if task.text is None or task.text == SELF:
        raise RecipeError(
            f"{adapter}: a bare adapter, trained on a text that nobody wrote down. Give --text to judge by."
        )
    original, base, scheme = _behind(task.base)
    text = TrainingText(data=task.text) if task.seqlen is None else TrainingText(data=task.text, seqlen=task.seqlen)
    return _Source(
        given=adapter, folder=adapter, base=base, original=original, scheme=scheme, group=None, dtype="float32",
        text=text, data_hash=None,
    )  # fmt: skip


def _from_run(path: Path, task: MergeTask) -> _Source:
    run = RunDirectory(path)
    info = run.info
    assert info is not None
    asked = info["asked"]
    trained: dict[str, Any] = asked.get("task", {})
    if "lora" not in trained:
        raise RunError(f"{path}: not a run of bitwright train lora or qlora, so there is no adapter to merge.")
    if not run.is_complete:
        raise RunError(f"{path}: the training is not finished. Give the same bitwright train command again.")
    if task.seqlen is not None:
        raise RecipeError(f"{path}: its windows are cut already. Leave --seqlen out.")
    if task.how == "fold" and not trained["by_group"]:
        raise _not_foldable(path)
    model = task.base or asked["model"]
    if open_checkpoint(model_directory(model)).audit() != asked["model_hash"]:
        raise CheckpointError(f"{model}: holds other weights than the model that {path} adapts. Give that as --base.")
    text = TrainingText(**trained["text"])
    original, base, scheme = _behind(model)
    if trained["scheme"] is not None:
        base, scheme = RunDirectory(path / BASE).model, Scheme.parse(trained["scheme"])
    lora: dict[str, Any] = {**trained["lora"], "targets": tuple(trained["lora"]["targets"])}
    return _Source(
        given=path, folder=path / (SITES if trained["by_group"] else ADAPTER), base=base, original=original,
        scheme=scheme, group=LoraConfig(**lora) if trained["by_group"] else None, dtype=trained["dtype"],
        text=text if task.text is None else replace(text, heldout=task.text),
        data_hash=asked["data_hash"] if task.text is None else None,
    )  # fmt: skip


def _behind(model: str) -> tuple[Path, Path, Scheme | None]:
    """Return the model behind a base, or the base itself where that is not known; its own directory; and its scheme."""
    base = open_checkpoint(model_directory(model))
    if not base.is_packed:
        return base.path, base.path, None
    schemes = packed_schemes(base)
    if not schemes:
        raise CheckpointError(
            f"{model}: packed in another layout than bitwright's and bitsandbytes', which no adapter merges into. "
            "Train over a base that was quantized with --layout bitwright."
        )
    info = RunDirectory(base.path.absolute().parent).info
    if info is None or "recipe" not in info["asked"]:
        return base.path, base.path, Counter(schemes.values()).most_common(1)[0][0]
    original = open_checkpoint(info["asked"]["model"]).path
    return original, base.path, Recipe.from_mapping(info["asked"]["recipe"]).scheme


def _not_foldable(adapter: Path) -> RecipeError:
    return RecipeError(
        f"{adapter}: a plain adapter does not fold into zero points. Merge dense or requantize, or train one with "
        "--by-group on a -floatzero scheme."
    )
