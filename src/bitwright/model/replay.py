"""Parts of a block that need not run again: what they put out is kept from one pass over a text to the next.

Sites are calibrated in the order of their use, and every step runs the block from its start: the attention that feeds
the MLP would be computed once for each step of the MLP and once more to go on. But a module none of whose weights will
change any more, fed by weights that will not change any more, puts out the same again. Its output is as large as a
hidden state and lies in a file beside them; bits are what they would have been.

Shapes: B windows of a batch, T tokens, D hidden size.
"""

from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from bitwright.model.activations import Activations
from bitwright.model.sites import Site


class Replay:
    """The finished parts of one block.

    Args:
        block: in memory; its modules' `forward` is replaced while a batch runs.
        prefix: its name in the full model.
        sites: of the block; those that are not quantized should be finished at once.
        folder: where outputs are kept; a block takes over the files of the one before it.
        num_windows: of the text.
    """

    def __init__(self, block: nn.Module, prefix: str, sites: Iterable[Site], folder: Path, num_windows: int) -> None:
        self._block, self._folder, self._num_windows = block, folder, num_windows
        self._left = {site.name: site.parameter[len(prefix) + 1 :] for site in sites}  # not finished
        self._weights = set(self._left.values())
        self._kept: dict[str, _Kept] = {}

    def finish(self, sites: Iterable[str]) -> None:
        """Weights of these sites will not change any more, nor will those of any site used before them."""
        for name in sites:
            self._left.pop(name, None)

    @contextmanager
    def batch(self, start: int) -> Generator[None, None, None]:
        """Run the block on the windows from `start` on: finished parts answer from the file, or fill it."""
        patched: list[nn.Module] = []
        try:
            for path, module in self._parts(self._block, ""):
                kept = self._kept.setdefault(path, _Kept(self._folder / f"replay-{len(self._kept)}.bin"))
                module.forward = partial(kept.call, module.forward, start, self._num_windows, iter((True,)))
                patched.append(module)
            yield
        finally:
            for module in patched:
                del module.forward

    def _parts(self, module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
        """The outermost modules that hold weights of sites, all finished; not single products, which are cheap."""
        for name, child in cast(Iterable[tuple[str, nn.Module]], module.named_children()):
            inside = f"{path}{name}."
            if not any(weight.startswith(inside) for weight in self._weights) or not any(child.children()):
                continue
            if any(weight.startswith(inside) for weight in self._left.values()) or "forward" in vars(child):
                yield from self._parts(child, inside)
            else:
                yield inside, child


class _Kept:
    """What one module put out, batch by batch."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._store: Activations | None = None
        self._sizes: dict[int, int] = {}  # first window of a batch -> B
        self._rest: tuple[None, ...] | None = None  # what is beside the hidden state in a tuple; None without one

    def call(
        self,
        forward: Callable[..., Any],
        start: int,
        num_windows: int,
        first: Iterator[bool],
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Stand in for the module's `forward`; a second call within one batch is not the one that was kept."""
        if not next(first, False):
            return forward(*args, **kwargs)
        if self._store is not None and start in self._sizes:
            device = next((each.device for each in (*args, *kwargs.values()) if isinstance(each, Tensor)), None)
            hidden = self._store.read(start, start + self._sizes[start], device or torch.device("cpu"))
            return hidden if self._rest is None else (hidden, *self._rest)
        out = forward(*args, **kwargs)
        self._keep(start, num_windows, out)
        return out

    def _keep(self, start: int, num_windows: int, out: Any) -> None:
        hidden, rest = (out[0], out[1:]) if isinstance(out, tuple) and out else (out, None)
        if not isinstance(hidden, Tensor) or hidden.ndim != 3 or any(each is not None for each in rest or ()):
            return  # not a hidden state: it runs again
        if self._store is None:
            shape = (num_windows, int(hidden.shape[1]), int(hidden.shape[2]))
            self._store, self._rest = Activations(self._path, shape, hidden.dtype), rest
        if hidden.shape[1:] == self._store.shape[1:] and start + hidden.shape[0] <= num_windows:
            self._store.write(start, hidden)
            self._sizes[start] = hidden.shape[0]
