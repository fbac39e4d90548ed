"""Distillation: the student is to give every token the probabilities that the unquantized teacher gives it.

The loss is KL(teacher || student) at a temperature τ, times τ² so that its gradients keep their size (Hinton et al.,
arXiv:1503.02531). The teacher runs beside the student (`kl_loss`), or once before training (`teacher_targets`), which
keeps for each token the K largest log-probabilities and puts all other tokens of the vocabulary into one bucket, the
tail. The loss on K + 1 buckets never exceeds that on the whole vocabulary, is 0 for equal models, and equals it for
K = V. Bucket by bucket both sides are exact, also at τ ≠ 1, where the tail's sum of p^(1/τ) does not follow from its
probability: it is summed while the whole distribution is there, for each temperature that is asked for.

    targets.json                     what was asked for, of which windows and which teacher
    shard-00000.safetensors          indices int32 [n, T, K], log_probs float32 [n, T, K] at τ = 1, descending, and
                                     log_tails float32 [n, T, S], log Σ p^(1/τ) over the tail

Legend: N windows, n of them in a shard, T tokens per window, V vocabulary, K kept, S temperatures, D hidden size.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn import functional

from bitwright.errors import CheckpointError, DataError, RecipeError, ShapeError
from bitwright.model.tensor_file import save_tensors_atomic
from bitwright.progress import Progress, no_progress
from bitwright.records import write_json_atomic
from bitwright.train.objective import Objective

INDEX = "targets.json"
SHARD_WINDOWS = 16
"""Windows per file: what a killed run has to do again, at most."""
_SAMPLE = 16  # weights of each parameter that go into a teacher's fingerprint


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherTargets:
    """What a teacher said about windows of text, on disk.

    Attributes:
        folder: where.
        num_windows: N.
        top_k: K.
        temperatures: those that can be read.
    """

    folder: Path
    num_windows: int
    top_k: int
    temperatures: tuple[float, ...]

    def read(self, window: int, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        """Return the targets of one window at a temperature.

        Returns:
            indices [T, K] int64 of the most probable tokens, and log-probabilities [T, K + 1] float32, the last that
            of the tail (-Inf where K = V).
        Raises:
            RecipeError: a temperature that was not asked for when the targets were made.
            DataError: no such window.
            CheckpointError: a file is damaged.
        """
        if temperature not in self.temperatures:
            known = ", ".join(map(str, self.temperatures))
            raise RecipeError(
                f"{self.folder}: no targets for temperature {temperature}, only for {known}. Make them with it."
            )
        if not 0 <= window < self.num_windows:
            raise DataError(f"{self.folder}: window {window} of {self.num_windows} does not exist.")
        shard, row = divmod(window, SHARD_WINDOWS)
        path = _shard(self.folder, shard)
        try:
            with safe_open(path, framework="pt") as handle:  # pyright: ignore[reportUnknownVariableType]
                parts = [cast(Tensor, handle.get_slice(n)[row]) for n in ("indices", "log_probs", "log_tails")]
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path}: cannot be read ({error}). Delete the folder and make it again.") from None
        indices, log_probs, log_tails = parts
        tail = log_tails[..., self.temperatures.index(temperature)].unsqueeze(-1)
        return indices.long(), torch.cat([log_probs / temperature, tail], dim=-1).log_softmax(-1)


@torch.no_grad()
def teacher_targets(
    teacher: nn.Module,
    windows: Tensor,
    folder: Path,
    top_k: int,
    progress: Progress = no_progress,
    *,
    temperatures: Sequence[float] = (1.0,),
) -> TeacherTargets:
    """Write what a teacher says about every token of some windows; shards that exist are not made again.

    Takes 8 K + 4 S bytes per token.

    Args:
        teacher: a causal language model of transformers, in evaluation mode.
        windows: [N, T] int64 token ids.
        folder: is made where it is missing; one of another teacher, text or option is refused.
        top_k: K, 1 to V.
        progress: called per window.
        temperatures: those that the loss will use.
    Raises:
        RecipeError: K or a temperature is out of range; the teacher is in training mode.
        DataError: no windows, or the folder holds other targets.
        ResourceError: the disk is full.
    """
    if windows.ndim != 2 or windows.numel() == 0:
        raise DataError(f"teacher targets: windows must be [N, T] and not empty, not {list(windows.shape)}.")
    if teacher.training:
        raise RecipeError("teacher targets: the teacher is in training mode. Call its eval() first.")
    if top_k < 1 or not temperatures or min(temperatures) <= 0:
        raise RecipeError(f"teacher targets: top_k {top_k} and temperatures {list(temperatures)} must be positive.")
    targets = TeacherTargets(
        folder=folder, num_windows=len(windows), top_k=top_k, temperatures=tuple(map(float, temperatures))
    )
    _claim(targets, teacher, windows)
    for shard, start in enumerate(range(0, len(windows), SHARD_WINDOWS)):
        chunk = windows[start : start + SHARD_WINDOWS]
        path = _shard(folder, shard)
        if path.exists():
            progress("teacher", start + len(chunk), len(windows))
        else:
            said: list[dict[str, Tensor]] = []
            for number, window in enumerate(chunk, start):
                said.append(_targets(_logits(teacher, window), top_k, targets.temperatures))
                progress("teacher", number + 1, len(windows))
            save_tensors_atomic(path, {name: torch.stack([each[name] for each in said]).cpu() for name in said[0]})
    return targets


def distillation_loss(
    student_logits: Tensor,
    indices: Tensor,
    log_probs: Tensor,
    temperature: float = 1.0,
    *,
    mask: Tensor | None = None,
) -> Tensor:
    """Return τ² · KL(teacher || student) over K tokens and the tail, the mean over all positions.

    Args:
        student_logits: [..., V].
        indices: [..., K] tokens of the first K buckets.
        log_probs: [..., K + 1], the teacher's at this temperature, the tail last, as `TeacherTargets.read` gives them.
        temperature: τ > 0.
        mask: [...] positions that count; None for all.
    Raises:
        ShapeError: shapes that do not belong together.
    """
    vocabulary, top_k = student_logits.shape[-1], indices.shape[-1]
    expected = (*student_logits.shape[:-1], top_k + 1)
    if tuple(log_probs.shape) != expected or indices.shape[:-1] != student_logits.shape[:-1] or top_k > vocabulary:
        raise ShapeError(
            f"distillation: logits {list(student_logits.shape)}, indices {list(indices.shape)} and log-probabilities "
            f"{list(log_probs.shape)} do not fit; expected {list(expected)} of the last."
        )
    scaled = _wide(student_logits) / temperature
    total = scaled.logsumexp(-1, keepdim=True)
    student = scaled.gather(-1, indices) - total
    if top_k < vocabulary:
        rest = scaled.scatter(-1, indices, float("-inf")).logsumexp(-1, keepdim=True)
        student = torch.cat([student, rest - total], dim=-1)
    teacher = log_probs[..., : student.shape[-1]].to(student)
    return _mean(_divergence(teacher, student), mask) * temperature**2


def kl_loss(
    student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0, *, mask: Tensor | None = None
) -> Tensor:
    """Return τ² · KL(teacher || student) over the whole vocabulary, the mean over all positions.

    Args:
        student_logits: [..., V].
        teacher_logits: [..., V]; no gradient flows into them.
        temperature: τ > 0.
        mask: [...] positions that count; None for all.
    Raises:
        ShapeError: different shapes.
    """
    if student_logits.shape != teacher_logits.shape:
        raise ShapeError(
            f"distillation: student {list(student_logits.shape)} and teacher {list(teacher_logits.shape)} differ."
        )
    student = (_wide(student_logits) / temperature).log_softmax(-1)
    teacher = (_wide(teacher_logits.detach()) / temperature).log_softmax(-1)
    return _mean(_divergence(teacher, student), mask) * temperature**2


def towards(teacher: nn.Module, temperature: float, *, features: float = 0.0, labels: float = 0.0) -> Objective:
    """Return the objective of following a teacher that runs beside the student.

    Args:
        teacher: in memory, without gradients.
        temperature: of both distributions.
        features: weight of `feature_loss` over the hidden states of all depths; needs as many and as wide ones.
        labels: share of the text's own next tokens in the loss; see `with_labels`.
    """
    hidden = features > 0

    def objective(model: nn.Module, ids: Tensor, _index: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = teacher(input_ids=ids, use_cache=False, output_hidden_states=hidden)
        found = model(input_ids=ids, use_cache=False, output_hidden_states=hidden)
        logits = found.logits[:, :-1]
        loss = with_labels(kl_loss(logits, wanted.logits[:, :-1], temperature), logits, ids, labels)
        return loss + features * feature_loss(found.hidden_states, wanted.hidden_states) if hidden else loss

    return objective


def with_labels(loss: Tensor, logits: Tensor, ids: Tensor, share: float) -> Tensor:
    """Return a teacher's loss mixed with the cross-entropy of the text's own next tokens (Hinton's hard targets).

    Args:
        loss: [] of following the teacher.
        logits: [B, T - 1, V] of the student.
        ids: [B, T] token ids of the text.
        share: of the cross-entropy, 0 to 1.
    """
    if not share:
        return loss
    text = functional.cross_entropy(_wide(logits).flatten(0, 1), ids[:, 1:].flatten())
    return (1 - share) * loss + share * text


def check_labels(share: float) -> None:
    """Refuse a share of labels that leaves nothing of the teacher.

    Raises:
        RecipeError: it is not from 0 to below 1.
    """
    if not 0 <= share < 1:
        raise RecipeError(
            f"labels must be from 0 to below 1, got {share}. Use less, or train on the text alone: qat --loss "
            "cross_entropy, or lora."
        )


def feature_loss(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Return the mean over depths of the squared error of hidden states, in units of the teacher's mean square.

    Hidden states grow with depth: without the unit only the last blocks would count.

    Args:
        student: [..., D] of each depth.
        teacher: of the same depths; no gradient flows into them.
    Raises:
        ShapeError: different depths or shapes, or none.
    """
    if not student or [x.shape for x in student] != [x.shape for x in teacher]:
        raise ShapeError(f"feature loss: {len(student)} and {len(teacher)} hidden states must be alike, and some.")
    losses: list[Tensor] = []
    for ours, theirs in zip(student, teacher, strict=True):
        target = _wide(theirs.detach())
        losses.append(functional.mse_loss(_wide(ours), target) / target.square().mean())
    return torch.stack(losses).mean()


def _divergence(teacher: Tensor, student: Tensor) -> Tensor:
    """Return Σ p (log p - log q) [...]; buckets of probability 0 count nothing."""
    # Masked before the difference: Inf - Inf would be NaN in the gradient as well.
    possible = teacher > float("-inf")
    difference = torch.where(possible, teacher, 0.0) - torch.where(possible, student, 0.0)
    return (teacher.exp() * difference).sum(-1)


def _mean(values: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return values.mean()
    weights = mask.to(values)
    return (values * weights).sum() / weights.sum().clamp(min=1)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _logits(teacher: nn.Module, window: Tensor) -> Tensor:
    """Return the teacher's logits [T, V] in float32."""
    device = next(teacher.parameters()).device
    output: Any = teacher(input_ids=window.unsqueeze(0).to(device), use_cache=False)
    return cast(Tensor, output.logits)[0].float()


def _targets(logits: Tensor, top_k: int, temperatures: tuple[float, ...]) -> dict[str, Tensor]:
    """Return what is stored of the logits [T, V] of one window."""
    if top_k > logits.shape[-1]:
        raise RecipeError(f"teacher targets: top_k {top_k} exceeds the vocabulary of {logits.shape[-1]}.")
    log_probs = logits.log_softmax(-1)
    top, indices = log_probs.topk(top_k, dim=-1)
    rest = log_probs.scatter(-1, indices, float("-inf"))
    tails = torch.stack([(rest / temperature).logsumexp(-1) for temperature in temperatures], dim=-1)
    return {"indices": indices.to(torch.int32), "log_probs": top, "log_tails": tails}


def _claim(targets: TeacherTargets, teacher: nn.Module, windows: Tensor) -> None:
    """Write down what the folder is for, or compare with what is written there."""
    about = {
        "num_windows": targets.num_windows,
        "top_k": targets.top_k,
        "temperatures": list(targets.temperatures),
        "windows": hashlib.sha256(windows.cpu().contiguous().numpy().tobytes()).hexdigest(),
        "teacher": _fingerprint(teacher),
    }
    path = targets.folder / INDEX
    targets.folder.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        write_json_atomic(path, about)
        return
    try:
        found: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}). Delete the folder and make it again.") from None
    differing = sorted(name for name, value in about.items() if found.get(name) != value)
    if differing:
        raise DataError(f"{targets.folder}: holds targets with other {', '.join(differing)}. Use another folder.")


def _fingerprint(teacher: nn.Module) -> str:
    """Return a hash of names, shapes and the first numbers of all parameters: enough to tell models apart."""
    digest = hashlib.sha256()
    for name, parameter in teacher.named_parameters():
        first = parameter.detach().flatten()[:_SAMPLE].double().cpu()
        digest.update(f"{name} {list(parameter.shape)}".encode() + first.numpy().tobytes())
    return digest.hexdigest()


def _shard(folder: Path, number: int) -> Path:
    return folder / f"shard-{number:05d}.safetensors"
