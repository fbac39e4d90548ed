"""How transformers rounds the inputs of products in a compressed-tensors checkpoint, to compare logits with it.

Its modules do not compute on codes: they round inputs to what codes can say, and multiply floats. The formulas differ
from those of kernels in details that change codes: a symmetric scale is absmax / ((2^bits - 1) / 2) and not absmax /
(2^(bits-1) - 1), every operation is rounded to the dtype of the inputs, zero points are added before rounding, and one
scale serves all tokens where the inputs have no batch dimension. A model that is to be compared with theirs must round
the same way. Nothing else uses these formulas.

Reference: compressed-tensors 0.20, `compute_dynamic_scales_and_zp`, `calculate_qparams`, `fake_quantize`.

Legend: B windows, T tokens, I in features, G groups of g columns.
"""

from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from bitwright.model.checkpoint import Checkpoint
from bitwright.model.sites import Site, StorageKey, storage_key, weight_view
from bitwright.model.stream import StreamedModel
from bitwright.numerics.block_scales import FixedFp8Scale
from bitwright.numerics.formats import LevelFormat
from bitwright.numerics.inputs import InputQuantizer, QuantizedSite
from bitwright.numerics.integer import IntegerFormat
from bitwright.numerics.minifloat import E2M3, E4M3

SMALLEST_EXPONENT, LARGEST_EXPONENT = -127, 128


def engine_inputs(x: Tensor, inputs: InputQuantizer) -> Tensor:
    """Return inputs x [..., I] as the engine's modules round them, in the dtype of x."""
    format = inputs.format
    size = inputs.granularity.group_size
    values = x if size is None else x.unflatten(-1, (-1, size))
    if isinstance(inputs.scale, FixedFp8Scale):
        rounded = _nvfp4(values, format, inputs.scale.bound.global_scale)
    elif inputs.scale.name == "e8m0":
        rounded = _mx(values, format)
    elif isinstance(format, IntegerFormat):
        rounded = _integers(values, format, inputs)
    else:
        scale = _static_scale(x, inputs)
        if scale is None:
            scale = _not_zero(_largest(values, inputs) / format.max_value)
        rounded = format.snap((values / scale).float(), None).to(x.dtype) * scale
    return rounded.to(x.dtype).reshape(x.shape)


def _integers(values: Tensor, format: IntegerFormat, inputs: InputQuantizer) -> Tensor:
    low, high = -(2 ** (format.bits - 1)), 2 ** (format.bits - 1) - 1
    zero_point = torch.zeros((), dtype=values.dtype)
    scale = _static_scale(values, inputs)
    if scale is not None:
        if inputs.static is not None and inputs.static.zero_point is not None:
            zero_point = (inputs.static.zero_point.reshape(1) + low).to(values.dtype)
    elif format.symmetric:
        scale = _not_zero(_largest(values, inputs) / ((high - low) / 2))
    else:
        smallest, largest = _ends(values, inputs)
        unsafe = (largest - smallest) / (high - low)
        # Only zeros have no range; their zero point is 0.
        zero_point = (low - smallest / unsafe).clamp(low, high).nan_to_num(0.0).round()
        scale = _not_zero(unsafe)
    codes = (values / scale + zero_point).clamp(low, high).round()
    return (codes - zero_point) * scale


def _mx(values: Tensor, format: LevelFormat) -> Tensor:
    mantissa, exponent = torch.frexp(values.abs().amax(-1, keepdim=True).float())  # mantissa in [0.5, 1)
    # The mantissa is rounded to FP4's one bit, for FP8 as well, or to FP6's three, and may carry into the exponent.
    bits = E2M3.mantissa_bits if format.bits == E2M3.bits else 1
    exponent = exponent - 1 + (mantissa >= 1 - 2.0 ** -(bits + 2)).int() - int(torch.tensor(format.max_value).log2())
    scale = torch.exp2(exponent.clamp(SMALLEST_EXPONENT, LARGEST_EXPONENT).float())
    return format.snap(values / scale, None) * scale


def _nvfp4(values: Tensor, format: LevelFormat, global_scale: Tensor) -> Tensor:
    step = values.abs().amax(-1, keepdim=True) / format.max_value
    stored = (global_scale * step).clamp(max=E4M3.max_value).to(torch.float8_e4m3fn).float()
    scale = _not_zero(stored) / global_scale
    return format.snap(values / scale, None) * scale


def _largest(values: Tensor, inputs: InputQuantizer) -> Tensor:
    smallest, largest = _ends(values, inputs)
    return torch.maximum(-smallest, largest)


def _ends(values: Tensor, inputs: InputQuantizer) -> tuple[Tensor, Tensor]:
    """Smallest and largest value that share a scale, 0 included."""
    kind = inputs.granularity.kind
    # Tokens are told apart by the first two dimensions, whether or not the second one is the tokens.
    shared = tuple(range(2, values.ndim)) if kind == "token" else (-1,) if kind == "group" else ()
    shared = shared or tuple(range(values.ndim))
    return values.amin(shared, keepdim=True).clamp(max=0), values.amax(shared, keepdim=True).clamp(min=0)


def _static_scale(values: Tensor, inputs: InputQuantizer) -> Tensor | None:
    return None if inputs.static is None else inputs.static.scale.reshape(1).to(values.dtype)


def _not_zero(scale: Tensor) -> Tensor:
    """Where a scale rounds to 0, values are 0 or so small that any scale makes them 0."""
    return torch.where(scale == 0, 1.0, scale)


class _EngineProducts(TorchFunctionMode):
    """Replaces `functional.linear(x, weight)` for weights known by their memory by the product of rounded inputs."""

    def __init__(self, inputs: Mapping[StorageKey, InputQuantizer]) -> None:
        super().__init__()
        self._inputs = inputs

    def __torch_function__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        del types
        kwargs = kwargs or {}
        if func is functional.linear:
            given = dict(zip(("input", "weight", "bias"), args, strict=False)) | kwargs
            weight = given["weight"]
            inputs = self._inputs.get(storage_key(weight)) if isinstance(weight, Tensor) else None
            if inputs is not None:
                return func(engine_inputs(given["input"], inputs), weight, given.get("bias"))
        return func(*args, **kwargs)


class EngineModel(StreamedModel):
    """Computes, block by block, what transformers computes from a compressed-tensors checkpoint.

    Args:
        rounds_inputs: False leaves the inputs of products as they are: what an engine that ignores them computes.
    """

    def __init__(
        self, checkpoint: Checkpoint, *, dtype: torch.dtype, trust_remote_code: bool, rounds_inputs: bool
    ) -> None:
        super().__init__(checkpoint, dtype=dtype, trust_remote_code=trust_remote_code)
        self._rounds_inputs = rounds_inputs
        self._inputs: dict[StorageKey, InputQuantizer] = {}

    @contextmanager
    def block(self, index: int) -> Generator[nn.Module, None, None]:
        """Hold decoder block `index` in memory."""
        with super().block(index) as block:
            yield block
        self._inputs.clear()

    def run_on_codes(self, block: nn.Module, site: Site, prefix: str, quantized: QuantizedSite) -> None:
        """From now until the block is freed, round the inputs of a site as the engine does."""
        if self._rounds_inputs and quantized.inputs is not None:
            self._inputs[storage_key(weight_view(block, site, prefix))] = quantized.inputs

    def run_block(self, block: nn.Module, index: int, hidden: Tensor) -> Tensor:
        """Return the output [B, T, D] of block `index` for the hidden state [B, T, D]."""
        with _EngineProducts(self._inputs):
            return super().run_block(block, index, hidden)
