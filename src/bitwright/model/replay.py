"""Parts of a block that need not run again: what they put out is kept from one pass over a text to the next.

Sites are calibrated in the order of their use, and every step runs the block from its start: the attention that feeds
the MLP would be computed once for each step of the MLP and once more to go on. But a module none of whose weights will
change any more, fed by weights that will not change any more, puts out the same again. Its output is as large as a
hidden state and lies in a file beside them; bits are what they would have been.

Most modules end in a product (attention in the output projection, the MLP in the down projection). Once only its
weight may still change, its input is kept, and the product is all that is left of the module. That it ends so is seen
on a batch that runs in full. On an accelerator, which computes faster than disks read, only outputs are kept.

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
        keep_inputs: also keep the inputs of last products.
        file: how the names of its files begin.
    """

    def __init__(
        self,
        block: nn.Module,
        prefix: str,
        sites: Iterable[Site],
        folder: Path,
        num_windows: int,
        *,
        keep_inputs: bool = True,
        file: str = "replay",
    ) -> None:
        self._block, self._folder, self._file, self._num_windows = block, folder, file, num_windows
        self._left = {site.name: site.parameter[len(prefix) + 1 :] for site in sites}  # not finished
        self._weights = set(self._left.values())
        self._keep_inputs = keep_inputs
        self._outputs: dict[str, _Kept] = {}
        self._lasts: dict[str, _LastProduct] = {}
        self._num_files = 0

    def finish(self, sites: Iterable[str]) -> None:
        """Weights of these sites will not change any more, nor will those of any site used before them."""
        for name in sites:
            self._left.pop(name, None)

    @contextmanager
    def batch(self, start: int) -> Generator[None, None, None]:
        """Run the block on the windows from `start` on: finished parts answer from the file, or fill it."""
        patched: list[nn.Module] = []

        def patch(module: nn.Module, call: Callable[..., Any], *args: Any) -> None:
            module.forward = partial(call, module.forward, start, *args, iter((True,)))
            patched.append(module)

        try:
            for path, module in self._parts(self._block, ""):
                left = self._left_inside(path)
                last = self._lasts.get(path)
                if len(left) == 1 and self._keep_inputs and last is None:
                    product = module.get_submodule(left[0][len(path) :].rpartition(".")[0])
                    if type(product) is nn.Linear:
                        last = self._lasts[path] = _LastProduct(product, self._new_store())
                if left and last is not None:
                    patch(last.product, last.keep_input)
                elif not left:
                    if path not in self._outputs:
                        self._outputs[path] = _Kept(self._new_store())
                    patch(module, self._outputs[path].call, last, bool(self._left))
            yield
        finally:
            for module in patched:
                del module.forward

    def _left_inside(self, path: str) -> list[str]:
        return [weight for weight in self._left.values() if weight.startswith(path)]

    def _parts(self, module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
        """The outermost modules that hold weights of sites, at most one of them unfinished; not single products."""
        for name, child in cast(Iterable[tuple[str, nn.Module]], module.named_children()):
            inside = f"{path}{name}."
            if not any(weight.startswith(inside) for weight in self._weights) or not any(child.children()):
                continue
            is_product = sum(weight.startswith(inside) for weight in self._weights) == 1
            allowed = 1 if self._keep_inputs and not is_product else 0
            if len(self._left_inside(inside)) > allowed or "forward" in vars(child):
                yield from self._parts(child, inside)
            else:
                yield inside, child

    def _new_store(self) -> "_Store":
        self._num_files += 1
        return _Store(self._folder / f"{self._file}-{self._num_files - 1}.bin", self._num_windows)


class _Store:
    """Tensors [B, T, D], one for each batch, by their first window."""

    def __init__(self, path: Path, num_windows: int) -> None:
        self._path, self._num_windows = path, num_windows
        self._file: Activations | None = None
        self._sizes: dict[int, int] = {}  # first window of a batch -> B

    def __contains__(self, start: int) -> bool:
        return start in self._sizes

    def read(self, start: int, device: torch.device) -> Tensor:
        assert self._file is not None
        return self._file.read(start, start + self._sizes[start], device)

    def write(self, start: int, hidden: Tensor) -> None:
        """Store what has the shape of a hidden state; anything else is left out and computed again."""
        if hidden.ndim != 3 or start + hidden.shape[0] > self._num_windows:
            return
        if self._file is None:
            shape = (self._num_windows, int(hidden.shape[1]), int(hidden.shape[2]))
            self._file = Activations(self._path, shape, hidden.dtype)
        if hidden.shape[1:] == self._file.shape[1:]:
            self._file.write(start, hidden)
            self._sizes[start] = hidden.shape[0]


class _LastProduct:
    """The product that a module may end in, and its inputs, batch by batch.

    Attributes:
        is_last: whether the module puts out what the product does; None while no batch has shown it.
    """

    def __init__(self, product: nn.Module, store: _Store) -> None:
        self.product, self.store = product, store
        self.is_last: bool | None = None

    def keep_input(self, forward: Callable[..., Any], start: int, first: Iterator[bool], x: Tensor) -> Tensor:
        """Stand in for the product's `forward`."""
        if next(first, False) and start not in self.store:
            self.store.write(start, x)
        return forward(x)

    def watch(self, run: Callable[[], Any]) -> Any:
        """Run the module in full and see whether it puts out what the product does."""
        made: list[Tensor] = []
        forward = self.product.forward

        def record(x: Tensor) -> Tensor:
            made.append(forward(x))
            return made[-1]

        self.product.forward = record
        try:
            out = run()
        finally:
            del self.product.forward
        self.is_last = len(made) == 1 and _hidden_of(out) is made[0]
        return out


class _Kept:
    """What one module put out, batch by batch."""

    def __init__(self, store: _Store) -> None:
        self._store = store
        self._rest: tuple[None, ...] | None = None  # what is beside the hidden state in a tuple; None without one

    def call(
        self,
        forward: Callable[..., Any],
        start: int,
        last: _LastProduct | None,
        runs_again: bool,
        first: Iterator[bool],
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Stand in for the module's `forward`; a second call within one batch is not the one that was kept."""
        if not next(first, False):
            return forward(*args, **kwargs)
        device = next((each.device for each in (*args, *kwargs.values()) if isinstance(each, Tensor)), None)
        device = device or torch.device("cpu")
        if start in self._store:
            hidden = self._store.read(start, device)
            return hidden if self._rest is None else (hidden, *self._rest)
        if last is not None and last.is_last and start in last.store:
            hidden = last.product(last.store.read(start, device))
            out = hidden if self._rest is None else (hidden, *self._rest)
        elif last is not None and last.is_last is None and start in last.store:
            out = last.watch(partial(forward, *args, **kwargs))
        else:
            out = forward(*args, **kwargs)
        if runs_again:
            self._keep(start, out)
        return out

    def _keep(self, start: int, out: Any) -> None:
        hidden = _hidden_of(out)
        if hidden is not None:
            self._rest = out[1:] if isinstance(out, tuple) else None
            self._store.write(start, hidden)


def _hidden_of(out: Any) -> Tensor | None:
    """The hidden state that a module put out, alone or first in a tuple of nothing else; None if there is more."""
    hidden, rest = (out[0], out[1:]) if isinstance(out, tuple) and out else (out, ())
    return hidden if isinstance(hidden, Tensor) and all(each is None for each in rest) else None
