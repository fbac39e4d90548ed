"""Quantized gradients for data-parallel training, as a communication hook of DistributedDataParallel.

The mean of the gradients over W ranks is found in two phases, each of which sends codes:

    1. every rank cuts its gradient into W shares, rounds them, and sends each to its owner     all_to_all
    2. the owner averages in float32, rounds the mean, and sends it to everybody                 all_gather

Each phase sends (W - 1)/W of the compressed gradient per rank, so that the traffic does not grow with W; sending
everything to everybody would be cheaper to write, and cost W/2 times as much. Sums are never rounded to codes on the
way, as they would be in a ring. Every rank decodes the same bytes: the parameters of all ranks stay equal, bit for bit.

Error feedback: what a phase could not send is added to what it has to send in the next step. So all of a gradient
arrives, only later: the sum of what was sent is the sum of what was to be sent, less the last residual. Each rank keeps
one residual for its own gradient and one for the share of the mean that it owns, by the parameter's name: DDP arranges
its buckets anew after the first step. That the sums agree is what counts for an optimizer that is linear in the
gradient. Adam divides by the size of past gradients, to which a residual counts as well: with 1 bit it may do no better
than without feedback.

A gradient that is 0 everywhere sends no residual, which waits for the next step: DDP throws away what arrives for a
parameter that no rank has used (`find_unused_parameters`), and zeros are all that the hook sees of one.

A gradient that is not finite makes its whole block NaN on every rank, so that a trainer sees it; the residual of the
block stays what it was.

Reference:
    1-bit SGD with error feedback: Seide et al., Interspeech 2014. Why it converges: arXiv:1901.09847. The two phases,
    each with a residual, are those of 1-bit Adam, arXiv:2102.02888, section 4; here without its frozen variance.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from bitwright.errors import CheckpointError
from bitwright.model.tensor_file import save_tensors_atomic
from bitwright.train.gradient_codes import GradientOptions, Layout, decode, encode, from_bytes, to_bytes

OWN, MEAN = "own", "mean"
_FACTS = "state"
"""In the header of a file: all of the state but the residuals."""


class GradientTraffic:
    """The state of the hook: what was sent, and the residuals of error feedback.

    Attributes:
        sent_bytes: that this rank really sent: codes and scales, and dense gradients while warming up.
        dense_bytes: that a ring all-reduce of the same gradients would have sent, 2 (W - 1)/W of their bytes.
        num_steps: synchronised backward passes.
    """

    def __init__(self, names: Mapping[Tensor, str], options: GradientOptions, group: dist.ProcessGroup) -> None:
        self.options = options
        self.rank = dist.get_rank(group)
        self.num_ranks = dist.get_world_size(group)
        self.sent_bytes = 0
        self.dense_bytes = 0
        self.num_steps = 0
        self._group = group
        self._names = dict(names)
        self._layouts: dict[tuple[str, ...], Layout] = {}
        # Per phase and parameter: [W, length] for the own gradient, [1, length] for the owned share of the mean.
        self._residuals: dict[str, dict[str, Tensor]] = {OWN: {}, MEAN: {}}

    @property
    def share(self) -> float | None:
        """Bytes sent for every byte of dense gradients; None while nothing had to be sent."""
        return self.sent_bytes / self.dense_bytes if self.dense_bytes else None

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs: counts and residuals (not copied). It differs from rank to rank."""
        return {
            "options": asdict(self.options),
            "rank": self.rank,
            "num_ranks": self.num_ranks,
            "num_steps": self.num_steps,
            "sent_bytes": self.sent_bytes,
            "dense_bytes": self.dense_bytes,
            "residuals": {phase: dict(kept) for phase, kept in self._residuals.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from the `state_dict` of the same rank.

        Raises:
            CheckpointError: it is of another rank, another number of ranks, other options or another model.
        """
        own = {"options": asdict(self.options), "rank": self.rank, "num_ranks": self.num_ranks}
        for key, value in own.items():
            if state[key] != value:
                raise CheckpointError(
                    f"gradients: the saved residuals are of {key} {state[key]}, not {value}. Resume with what the run "
                    "was started with, or start without them."
                )
        parameters = {name: parameter for parameter, name in self._names.items()}
        residuals: dict[str, dict[str, Tensor]] = {OWN: {}, MEAN: {}}
        for phase, kept in state["residuals"].items():
            num_rows = self.num_ranks if phase == OWN else 1
            for name, residual in kept.items():
                length = -(-parameters[name].numel() // self.num_ranks) if name in parameters else None
                if tuple(residual.shape) != (num_rows, length):
                    raise CheckpointError(
                        f"gradients: the saved residual {list(residual.shape)} of '{name}' fits no parameter of this "
                        "model. Resume with the model the run was started with."
                    )
                residuals[phase][name] = residual.to(parameters[name].device, torch.float32, copy=True)
        self._residuals = residuals
        self.num_steps = state["num_steps"]
        self.sent_bytes = state["sent_bytes"]
        self.dense_bytes = state["dense_bytes"]

    def save(self, file: Path) -> None:
        """Write the `state_dict` of this rank.

        Raises:
            ResourceError: the disk is full.
        """
        state = self.state_dict()
        residuals: Mapping[str, Mapping[str, Tensor]] = state.pop("residuals")
        tensors = {f"{phase}/{name}": kept.cpu() for phase, each in residuals.items() for name, kept in each.items()}
        save_tensors_atomic(file, tensors, {_FACTS: json.dumps(state)})

    def load(self, file: Path) -> None:
        """Continue from what `save` wrote in the same rank.

        Raises:
            CheckpointError: it is damaged, or as `load_state_dict`.
        """
        residuals: dict[str, dict[str, Tensor]] = {OWN: {}, MEAN: {}}
        try:
            with safe_open(file, framework="pt") as handle:  # pyright: ignore[reportUnknownVariableType]
                state = json.loads(handle.metadata()[_FACTS])
                for key in handle.keys():  # noqa: SIM118  the handle is no mapping
                    phase, _, name = cast(str, key).partition("/")
                    residuals[phase][name] = cast(Tensor, handle.get_tensor(key))
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{file}: cannot be read ({error}). Start with --fresh.") from None
        self.load_state_dict({**state, "residuals": residuals})

    def reduce(self, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        """Replace the gradients of a bucket by their mean over ranks."""
        buffer = bucket.buffer()
        if self.num_ranks == 1 or buffer.numel() == 0:
            return _finished(buffer)
        num_dense_bytes = 2 * (self.num_ranks - 1) * buffer.numel() * buffer.element_size() // self.num_ranks
        self.dense_bytes += num_dense_bytes
        if self.num_steps < self.options.warm_up_steps:
            self.sent_bytes += num_dense_bytes
            return allreduce_hook(self._group, bucket)
        self._average(bucket.gradients(), [self._names[parameter] for parameter in bucket.parameters()])
        return _finished(buffer)

    def _average(self, gradients: Sequence[Tensor], names: Sequence[str]) -> None:
        """Both phases, in place. They wait for each other: only so do all ranks start collectives in one order."""
        layout = self._layout(names, gradients)
        bits = self.options.bits
        payload = self._compress(OWN, layout, names, [layout.rows(gradient) for gradient in gradients])
        received = torch.empty_like(payload)
        dist.all_to_all_single(received, payload, group=self._group)
        mean = decode(*from_bytes(received, bits, layout), bits).mean(0, keepdim=True)

        share = self._compress(MEAN, layout, names, layout.to_pieces(mean))
        gathered = share.new_empty(self.num_ranks, share.shape[1])
        dist.all_gather(list(gathered.split(1)), share, group=self._group)
        self.sent_bytes += 2 * (self.num_ranks - 1) * share.shape[1]
        means = layout.to_pieces(decode(*from_bytes(gathered, bits, layout), bits))
        for gradient, rows in zip(gradients, means, strict=True):
            gradient.copy_(rows.reshape(-1)[: gradient.numel()].view_as(gradient))

    def _compress(self, phase: str, layout: Layout, names: Sequence[str], pieces: Sequence[Tensor]) -> Tensor:
        """Return the payload of pieces and the phase's residual, and keep what it does not carry."""
        options, kept = self.options, self._residuals[phase]
        rows = slice(None) if phase == OWN else slice(self.rank, self.rank + 1)
        values = layout.to_blocks(pieces)
        used = [piece.any() for piece in pieces]
        residual = None
        if options.error_feedback:
            for name, piece in zip(names, pieces, strict=True):
                if name not in kept:
                    kept[name] = torch.zeros_like(piece)
            residual = layout.to_blocks([kept[name] * is_used for name, is_used in zip(names, used, strict=True)])
            values += residual
        # A sign has no 0: what was decoded into the padding must not count as a value to send.
        values.masked_fill_(layout.is_padding[rows], 0.0)
        noise = self._noise(phase, layout, names, values) if options.stochastic else None
        codes, scale = encode(values, layout.counts[rows], options, noise)
        if residual is not None:
            lost = values - decode(codes, scale, options.bits)
            lost = torch.where(torch.isfinite(scale).unsqueeze(-1), lost, residual)
            for name, piece, is_used in zip(names, layout.to_pieces(lost), used, strict=True):
                kept[name].copy_(torch.where(is_used, piece, kept[name]))
        return to_bytes(codes, scale, options.bits, layout)

    def _noise(self, phase: str, layout: Layout, names: Sequence[str], values: Tensor) -> Tensor:
        """Uniform numbers like values, drawn for each parameter by itself, so that buckets do not matter."""
        drawn: list[Tensor] = []
        for name, number in zip(names, layout.blocks_per_parameter, strict=True):
            digest = hashlib.sha256(f"{self.options.seed} {self.num_steps} {self.rank} {phase} {name}".encode())
            generator = torch.Generator(values.device).manual_seed(int.from_bytes(digest.digest()[:4], "little"))
            shape = (values.shape[0], number, layout.block)
            drawn.append(torch.rand(shape, generator=generator, device=values.device))
        return torch.cat(drawn, dim=1)

    def _layout(self, names: Sequence[str], gradients: Sequence[Tensor]) -> Layout:
        key = tuple(names)
        if key not in self._layouts:
            self._layouts[key] = Layout(
                [gradient.numel() for gradient in gradients],
                num_ranks=self.num_ranks,
                block=self.options.block,
                device=gradients[0].device,
            )
        return self._layouts[key]


def register(model: DistributedDataParallel, options: GradientOptions) -> GradientTraffic:
    """Make a data-parallel model send quantized gradients; once per model, before the first step.

    Returns:
        Counts of bytes, and the residuals, to be saved with the optimizer.
    """
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.module.named_parameters()}
    group = model.process_group
    assert group is not None  # DDP fills in the default group.
    traffic = GradientTraffic(names, options, group)
    model.register_comm_hook(traffic, _hook)
    return traffic


def _hook(traffic: GradientTraffic, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    reduced = traffic.reduce(bucket)
    if bucket.is_last():
        traffic.num_steps += 1
    return reduced


def _finished(buffer: Tensor) -> torch.futures.Future[Tensor]:
    devices: list[int | str | torch.device] | None = None if buffer.device.type == "cpu" else [buffer.device]
    future: torch.futures.Future[Tensor] = torch.futures.Future(devices=devices)
    future.set_result(buffer)
    return future
