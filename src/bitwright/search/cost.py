"""What an assignment costs: bytes in memory, seconds and joules per token, by a roofline.

A product takes as long as the slower of two things: moving its operands at the bandwidth of the memory, and computing
at the rate of the arithmetic that its kernel uses. Both are peaks, so times are lower bounds: real engines reach a part
of them, and the order of two assignments is worth more than either figure. A scheme that the device has no kernel for
is decoded first, to the model's own 16 (or 32) bits. Then its bytes count in these, in memory (unless the device keeps
codes there) and on the way.

Everything is a sum over sites, which is what lets `allocate` choose among assignments exactly.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from bitwright.errors import RecipeError
from bitwright.model.sites import Site
from bitwright.schemes import Scheme
from bitwright.search.hardware import Arithmetic, Hardware
from bitwright.search.model_shape import ModelShape
from bitwright.search.stored_size import site_bytes

_WORKSPACE_COPIES = 2
"""Alive at once of what a block computes: what an operator reads and what it writes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """How a model is used.

    Attributes:
        context: tokens of prompt and answer together, which the cache holds at the end.
        batch: sequences at once.
        prompt: tokens before the first answer; half of the context unless given.
        kv_bits: of a number in the cache, scales included.
        chunk: tokens of the prompt that an engine takes at once.
    Raises:
        RecipeError: numbers that cannot be.
    """

    context: int = 4096
    batch: int = 1
    prompt: int | None = None
    kv_bits: float = 16.0
    chunk: int = 2048

    def __post_init__(self) -> None:
        for option, value in (("--context", self.context), ("--prompt", self.prompt), ("--batch", self.batch)):
            if value is not None and value < 1:
                raise RecipeError(f"{option} must be at least 1, got {value}.")
        if not 0 < self.kv_bits <= 32:
            raise RecipeError(f"--kv-bits must be above 0 and at most 32, got {self.kv_bits:g}.")
        if self.prompt is not None and self.prompt >= self.context:
            raise RecipeError(
                f"--prompt {self.prompt} leaves no room for an answer in a context of {self.context}. Shorten it."
            )

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the prompt."""
        return self.context // 2 if self.prompt is None else self.prompt


@dataclass(frozen=True, kw_only=True, slots=True)
class Memory:
    """Bytes on a device: weights as they lie there, the full cache, and what a step computes with."""

    weight_bytes: int
    cache_bytes: int
    workspace_bytes: int

    @property
    def total_bytes(self) -> int:
        """All of it."""
        return self.weight_bytes + self.cache_bytes + self.workspace_bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class Speed:
    """Lower bounds of time and energy.

    Attributes:
        decode_s: of one step, which gives every sequence of the batch one token, with a cache half full.
        prefill_s: of the prompts of the batch; None where the device's rate is not published.
        energy_j_per_token: of the device at its rated watts while it decodes; None where these are not published.
        bound: what a step of decoding waits for most: memory or arithmetic.
        decoded_sites: quantized sites that have no kernel.
    """

    decode_s: float
    prefill_s: float | None
    energy_j_per_token: float | None
    bound: str
    decoded_sites: int


def memory(
    shape: ModelShape, assignment: Mapping[str, Scheme | None], work: Workload, hardware: Hardware | None
) -> Memory:
    """Return what a model needs at the end of the context.

    Without `hardware`, or where that keeps codes, it runs as `nn.linear` does: weights stay packed, and one at a time
    is decoded. Room for the largest is counted whatever the assignment, so that what a choice costs remains a sum over
    sites.
    """
    weights = sum(tensor.num_bytes for tensor in shape.kept)
    weights += sum(resident_bytes(shape, site, assignment.get(site.name), hardware) for site in shape.sites)
    tokens = min(work.chunk, max(1, work.prompt_tokens)) * work.batch
    numbers = tokens * (shape.hidden_size + shape.widest) * _WORKSPACE_COPIES
    logits = work.batch * shape.vocab_size * 4
    one_decoded = _decoded_bytes(shape) if hardware is None or hardware.stays_packed else 0
    return Memory(
        weight_bytes=weights,
        cache_bytes=cache_bytes(shape, work.context, work.batch, work.kv_bits),
        workspace_bytes=numbers * shape.dtype.itemsize + logits + one_decoded,
    )


def _decoded_bytes(shape: ModelShape) -> int:
    """The largest weight while it is multiplied: dense, and its codes, of which each takes a byte."""
    return max(site.out_features * site.in_features for site in shape.sites) * (shape.dtype.itemsize + 1)


def cache_bytes(shape: ModelShape, context: int, batch: int, kv_bits: float) -> int:
    """Bytes of keys and values of so many tokens."""
    values = sum(
        cache.values_per_token * (context if cache.window is None else min(context, cache.window))
        for cache in shape.caches
    )
    return int(values * batch * kv_bits / 8)


def resident_bytes(shape: ModelShape, site: Site, scheme: Scheme | None, hardware: Hardware | None) -> int:
    """Bytes of a site in the memory of a device, where it lies as it is multiplied."""
    if hardware is not None and not hardware.stays_packed and _is_decoded(site, scheme, hardware):
        return _dense_bytes(shape, site)
    rank = shape.ranks.get(site.name, 0)
    return site_bytes(site, scheme, shape.site_dtypes[site.name], shape.dtype, rank=rank)


def _dense_bytes(shape: ModelShape, site: Site) -> int:
    return site.out_features * site.in_features * shape.dtype.itemsize


def site_seconds(
    shape: ModelShape, site: Site, scheme: Scheme | None, hardware: Hardware, *, tokens: int
) -> tuple[float, float | None]:
    """Return the seconds that a site's product of so many tokens waits for memory, and for arithmetic.

    An expert counts with the share of tokens that reach it, and its bytes with the chance that any does, as if the
    router chose evenly; together, a layer moves the expected number of distinct experts. Arithmetic is None where its
    rate is not published.
    """
    share = shape.share(site)
    reached, woken = tokens * share, 1.0 - (1.0 - share) ** tokens
    is_decoded = _is_decoded(site, scheme, hardware)
    moved = woken * (_dense_bytes(shape, site) if is_decoded else resident_bytes(shape, site, scheme, hardware))
    moved += reached * (site.in_features + site.out_features) * shape.dtype.itemsize
    rate = hardware.ops_per_s(_arithmetic(shape, site, scheme, hardware))
    operations = 2.0 * reached * site.in_features * site.out_features
    return moved / hardware.bytes_per_s, None if rate is None else operations / rate


def site_latency(shape: ModelShape, site: Site, scheme: Scheme | None, hardware: Hardware, *, tokens: int) -> float:
    """Return the seconds that a site adds to a step of so many tokens; by memory alone where no rate is published."""
    moving, computing = site_seconds(shape, site, scheme, hardware, tokens=tokens)
    return max(moving, computing or 0.0)


def speed(shape: ModelShape, assignment: Mapping[str, Scheme | None], work: Workload, hardware: Hardware) -> Speed:
    """Return the lower bounds of a step of decoding and of the prompts."""
    decode = _step(shape, assignment, hardware, tokens=work.batch, logits=work.batch)
    cached = cache_bytes(shape, max(1, work.context // 2), work.batch, work.kv_bits) / hardware.bytes_per_s
    seconds = decode.seconds + cached
    prompt = work.prompt_tokens * work.batch
    prefill: float | None = None
    if hardware.ops_per_s(_dense(shape)) is not None and prompt:
        prefill = _step(shape, assignment, hardware, tokens=prompt, logits=work.batch).seconds
        prefill += _attention_seconds(shape, work, hardware)
    return Speed(
        decode_s=seconds,
        prefill_s=prefill,
        energy_j_per_token=None if hardware.watts is None else hardware.watts * seconds / work.batch,
        bound="memory" if decode.moving + cached >= decode.computing else "arithmetic",
        decoded_sites=sum(_is_decoded(site, assignment.get(site.name), hardware) for site in shape.sites),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Step:
    """Seconds of all products, and of those that wait for memory and for arithmetic."""

    seconds: float
    moving: float
    computing: float


def _step(
    shape: ModelShape, assignment: Mapping[str, Scheme | None], hardware: Hardware, *, tokens: int, logits: int
) -> _Step:
    parts = [site_seconds(shape, site, assignment.get(site.name), hardware, tokens=tokens) for site in shape.sites]
    rate = hardware.ops_per_s(_dense(shape))
    head = (
        shape.head_bytes / hardware.bytes_per_s,
        None if rate is None else 2.0 * logits * shape.head_weights / rate,
    )
    known = [(moving, computing or 0.0) for moving, computing in (*parts, head)]
    return _Step(
        seconds=sum(max(pair) for pair in known),
        moving=sum(moving for moving, computing in known if moving >= computing),
        computing=sum(computing for moving, computing in known if moving < computing),
    )


def _attention_seconds(shape: ModelShape, work: Workload, hardware: Hardware) -> float:
    """Scores and sums of values of the prompt, each token against half of it; on keys of all heads, grouped or not."""
    rate = hardware.ops_per_s(_dense(shape))
    if rate is None:
        return 0.0
    operations = 0.0
    for cache in shape.caches:
        seen = work.prompt_tokens / 2 if cache.window is None else min(work.prompt_tokens / 2, cache.window)
        operations += 4.0 * work.batch * work.prompt_tokens * seen * shape.attention_width
    return operations / rate


def _is_decoded(site: Site, scheme: Scheme | None, hardware: Hardware) -> bool:
    return scheme is not None and hardware.kernel(scheme, site.kind) is None


def _arithmetic(shape: ModelShape, site: Site, scheme: Scheme | None, hardware: Hardware) -> Arithmetic:
    kernel = hardware.kernel(scheme, site.kind)
    return _dense(shape) if kernel is None else kernel.arithmetic


def _dense(shape: ModelShape) -> Arithmetic:
    return "float32" if shape.dtype == torch.float32 else "bf16"
