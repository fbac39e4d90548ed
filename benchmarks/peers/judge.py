"""Score what a peer made: its decoded weights, with this project's evaluator, against the original model."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from bitwright.errors import CheckpointError
from bitwright.evaluation.score import Scorer
from bitwright.evaluation.streamed import final_hidden, score_heads
from bitwright.model.checkpoint import open_checkpoint
from bitwright.model.stream import StreamedModel
from bitwright.numerics.inputs import InputQuantizer
from bitwright.preparation import open_model
from bitwright.progress import no_progress
from bitwright.schemes import Scheme

INPUTS = {"int8-per-token": "W8A8"}
"""What peer.json calls the quantization of inputs -> the scheme of ours with the same inputs."""


class QuantizedInputs(TorchFunctionMode):
    """While active, whatever enters a linear product becomes codes and floats again first."""

    def __init__(self, quantizer: InputQuantizer) -> None:
        super().__init__()
        self.quantizer = quantizer

    def __torch_function__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        del types
        if func is functional.linear:
            x, *rest = args
            rows = x.reshape(-1, x.shape[-1])
            args = (self.quantizer.quantize(rows).dequantize().to(x.dtype).view_as(x), *rest)
        return func(*args, **kwargs or {})


class QuantizedInputsModel(StreamedModel):
    """A model of decoded weights whose decoder blocks quantize the inputs of their linear products."""

    def __init__(self, folder: Path, scheme: str) -> None:
        super().__init__(open_checkpoint(folder), dtype=torch.float32)
        chosen = Scheme.parse(scheme).activations
        assert chosen is not None
        self.quantizer = InputQuantizer(format=chosen.format, granularity=chosen.granularity)

    def run_block(self, block: nn.Module, index: int, hidden: Tensor) -> Tensor:
        """As the base class does, on quantized inputs."""
        with QuantizedInputs(self.quantizer):
            return super().run_block(block, index, hidden)


class Judge:
    """Scores decoded models on windows [N, T] by their KL divergence from one original.

    Args:
        model_dir: the original, which runs over the windows once.
        windows: what is judged on.
        work: a folder for hidden states.
    """

    def __init__(self, model_dir: Path, windows: Tensor, work: Path) -> None:
        self.windows, self.work = windows, work
        self.reference = open_model(model_dir, device="cpu", dtype="float32", trust_remote_code=False)
        self.expected = final_hidden(self.reference, windows, work / "judged-reference.bin", no_progress, "reference")

    def score(self, cell_dir: Path) -> Scorer:
        """Score the decoded model in `cell_dir`.

        Raises:
            CheckpointError: peer.json asks for inputs that are not known here.
        """
        inputs = json.loads((cell_dir / "peer.json").read_text(encoding="utf-8"))["inputs"]
        if inputs is not None and inputs not in INPUTS:
            raise CheckpointError(f"{cell_dir}: inputs {inputs!r} are unknown. Use {', '.join(INPUTS)}.")
        made = (
            open_model(cell_dir, device="cpu", dtype="float32", trust_remote_code=False)
            if inputs is None
            else QuantizedInputsModel(cell_dir, INPUTS[inputs])
        )
        hidden = final_hidden(made, self.windows, self.work / "judged-peer.bin", no_progress, "evaluate")
        scorer = score_heads(made, hidden, self.windows, self.reference, self.expected)
        hidden.delete()
        return scorer
