"""Run a model one decoder block at a time, so that memory is one block and its activations.

The decoder blocks are replaced by relays. Running the model with relays in place gives what enters the first block and
the arguments that every block is called with (masks, position embeddings); running it with a hidden state injected
gives the logits. Nothing here knows an architecture: whatever a model does before, between and after its blocks is the
model's own code.
"""

from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from bitwright.errors import StructureError
from bitwright.model.checkpoint import Checkpoint
from bitwright.model.freed import return_freed_memory
from bitwright.model.products import QuantizedProducts
from bitwright.model.sites import Site, StorageKey, block_sites, find_blocks, storage_key, weight_view
from bitwright.model.skeleton import Skeleton
from bitwright.numerics.inputs import QuantizedSite


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockCall:
    """The arguments of one decoder block besides the hidden state."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class _Entered(Exception):
    """Raised by the last relay: every call is known, and the head, whose logits are what is largest, need not run."""


class Relay(nn.Module):
    """Stands in for a decoder block: records its call and passes the hidden state on, or stops the model there."""

    def __init__(self, block: nn.Module, index: int, called: list[int], *, returns_tuple: bool, stops: bool) -> None:
        super().__init__()
        object.__setattr__(self, "block", block)
        self.index, self.called = index, called  # one list for all relays of a forward: who was called, in turn
        self.returns_tuple, self.stops = returns_tuple, stops
        self.call: BlockCall | None = None
        self.received: Tensor | None = None
        self.injected: Tensor | None = None

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["block"], name)  # model code reads attributes such as attention_type

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Record the call; return the hidden state, or the injected one, in the form the model expects."""
        rest = dict(kwargs)
        hidden = cast(Tensor, args[0] if args else rest.pop("hidden_states"))
        self.called.append(self.index)
        self.received = hidden
        self.call = BlockCall(args=args[1:], kwargs=rest)
        if self.stops:
            raise _Entered
        passed = hidden if self.injected is None else self.injected
        return (passed,) if self.returns_tuple else passed


class StreamedModel:
    """A causal language model of which at most one decoder block is in memory.

    Shapes: B windows, T tokens, D hidden size, V vocabulary.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        trust_remote_code: bool = False,
    ) -> None:
        self.skeleton = Skeleton(checkpoint, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
        self.blocks_path, self.block_names = find_blocks(self.skeleton.model)
        self.device, self.dtype = torch.device(device), dtype
        self._calls: dict[tuple[int, int], list[BlockCall]] = {}
        self._returns_tuple: bool | None = None
        self._products: dict[StorageKey, QuantizedSite] = {}

    @property
    def num_blocks(self) -> int:
        """How many decoder blocks there are."""
        return len(self.block_names)

    @contextmanager
    def outside(self) -> Generator[None, None, None]:
        """Hold everything but the blocks (embeddings, final norm, head) in memory."""
        self.skeleton.load_outside(self.blocks_path)
        try:
            yield
        finally:
            self.skeleton.free_outside(self.blocks_path)
            return_freed_memory()

    @contextmanager
    def block(self, index: int) -> Generator[nn.Module, None, None]:
        """Hold decoder block `index` in memory."""
        name = self.block_names[index]
        self.skeleton.load(name)
        block = self.skeleton.model.get_submodule(name)
        try:
            if not self.skeleton.checkpoint.is_dense_equivalent:
                for site, quantized in self._stored_sites(block, name):
                    self.run_on_codes(block, site, name, quantized)
            yield block
        finally:
            self._products.clear()
            self.skeleton.free(name)
            return_freed_memory()

    def run_on_codes(self, block: nn.Module, site: Site, prefix: str, quantized: QuantizedSite) -> None:
        """From now until the block is freed, compute a site's products as it does: on codes if it quantizes inputs."""
        if not quantized.is_dense_equivalent:
            self._products[storage_key(weight_view(block, site, prefix))] = quantized.to(self.device)

    def _stored_sites(self, block: nn.Module, prefix: str) -> Iterator[tuple[Site, QuantizedSite]]:
        """The sites of a block as a quantized checkpoint holds them."""
        quantized = set(self.skeleton.checkpoint.packed_names())
        for site in block_sites(block, prefix):
            pieces = [name for name, index, _, _ in self.skeleton.stored_pieces(site.parameter) if index == site.index]
            if len(pieces) == 1 and pieces[0] in quantized:
                yield site, self.skeleton.checkpoint.read_packed(pieces[0])

    def enter(self, input_ids: Tensor) -> Tensor:
        """Return the hidden state [B, T, D] that enters the first block; needs `outside()`.

        Also learns how the blocks are called for this batch shape.

        Raises:
            StructureError: the model changes the hidden state between blocks, calls them otherwise than once in their
            order, or with token-dependent arguments.
        """
        if self._returns_tuple is None:
            self._returns_tuple = self._learn_returns_tuple(input_ids[:1])
        relays = self._relays(self._returns_tuple)
        relays[-1].stops = True
        with suppress(_Entered):
            self._forward(relays, input_ids)
        first = relays[0].received
        assert first is not None
        self._remember(tuple(input_ids.shape), [cast(BlockCall, relay.call) for relay in relays])
        return first

    def run_block(self, block: nn.Module, index: int, hidden: Tensor) -> Tensor:
        """Return the output [B, T, D] of block `index` for the hidden state [B, T, D]."""
        with torch.no_grad(), QuantizedProducts(self._products) if self._products else nullcontext():
            return self.call_block(block, index, hidden)

    def call_block(
        self, block: nn.Module, index: int, hidden: Tensor, weights: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """Return the output [B, T, D] of block `index`, with gradients where they are wanted, on float weights.

        Args:
            block: in memory; may also be a copy of the block.
            index: which block; says how it is called.
            hidden: [B, T, D]; at the first of its batch shape what is outside the blocks is loaded once more.
            weights: parameter name inside the block -> tensor to use in its place.
        """
        call = self._calls_of(hidden.shape[0], hidden.shape[1])[index]
        out = functional_call(block, dict(weights or {}), (hidden, *call.args), call.kwargs)
        return cast(Tensor, out[0] if isinstance(out, tuple) else out)

    def logits(self, input_ids: Tensor) -> Tensor:
        """Return the logits [B, T, V] (float32), loading one block after the other."""
        with self.outside():
            hidden = self.enter(input_ids)
        for index in range(self.num_blocks):
            with self.block(index) as block:
                hidden = self.run_block(block, index, hidden)
        with self.outside():
            return self.leave(input_ids, hidden)

    def leave(self, input_ids: Tensor, hidden: Tensor) -> Tensor:
        """Return the logits [B, T, V] (float32) for the last block's output; needs `outside()`."""
        relays = self._relays(bool(self._returns_tuple))
        relays[0].injected = hidden
        return self._forward(relays, input_ids).float()

    def _calls_of(self, num_windows: int, seqlen: int) -> list[BlockCall]:
        """How the blocks are called for a batch shape: which tokens it has does not matter (see `_remember`)."""
        if (num_windows, seqlen) not in self._calls:
            with self.outside():
                self.enter(torch.zeros(num_windows, seqlen, dtype=torch.int64))
        return self._calls[(num_windows, seqlen)]

    def _learn_returns_tuple(self, input_ids: Tensor) -> bool:
        """Try both kinds of block output: with the wrong one the model fails or loses the hidden state on the way."""
        name = type(self.skeleton.model).__name__
        for returns_tuple in (False, True):
            relays = self._relays(returns_tuple)
            with suppress(IndexError, ValueError, RuntimeError, AttributeError, TypeError):
                logits = self._forward(relays, input_ids)
                received = [relay.received for relay in relays if relay.received is not None]
                if logits.shape[:2] == input_ids.shape and all(each is received[0] for each in received):
                    if relays[0].called != list(range(len(relays))):
                        raise StructureError(
                            f"{name}: its decoder blocks are not called once, in their order; "
                            "this architecture cannot be streamed yet."
                        )
                    return returns_tuple
        raise StructureError(
            f"{name}: the hidden state is changed between decoder blocks; this architecture cannot be streamed yet."
        )

    def _relays(self, returns_tuple: bool) -> list[Relay]:
        blocks = cast(nn.ModuleList, self.skeleton.model.get_submodule(self.blocks_path))
        called: list[int] = []
        return [
            Relay(block, index, called, returns_tuple=returns_tuple, stops=False) for index, block in enumerate(blocks)
        ]

    def _forward(self, relays: list[Relay], input_ids: Tensor) -> Tensor:
        """Run the model with relays in the blocks' place and return the logits."""
        model = self.skeleton.model
        original = model.get_submodule(self.blocks_path)
        model.set_submodule(self.blocks_path, nn.ModuleList(relays))
        try:
            with torch.no_grad():
                return cast(Tensor, model(input_ids=input_ids.to(self.device), use_cache=False).logits)
        finally:
            model.set_submodule(self.blocks_path, original)

    def _remember(self, shape: tuple[int, ...], calls: list[BlockCall]) -> None:
        key = (shape[0], shape[1])
        known = self._calls.setdefault(key, calls)
        if known is not calls and not all(_same(a, b) for a, b in zip(known, calls, strict=True)):
            raise StructureError(
                f"{type(self.skeleton.model).__name__}: decoder blocks receive arguments that depend on the tokens; "
                "this architecture cannot be streamed yet."
            )


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, BlockCall) and isinstance(b, BlockCall):
        return _same(a.args, b.args) and _same(a.kwargs, b.kwargs)
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a is b or torch.equal(a, b)
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, (bool, int, float, str)):
        return a == b
    return type(a) is type(b)  # None, a cache, a configuration
