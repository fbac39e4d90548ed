"""A streamed model that can also be run backwards, block by block, and what its forward pass leaves for that.

The hidden states that enter every block are kept in files. With them a block can be run again by itself, with
gradients, given the gradient of its output: a backward pass over a model of which one block is in memory.

Shapes: N windows, T tokens, D hidden size, V vocabulary, I in features.
"""

from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from bitwright.evaluation.streamed import enter_all
from bitwright.model.activations import Activations, batch_slices
from bitwright.model.sites import Site, SiteCalls, block_sites
from bitwright.model.stream import StreamedModel
from bitwright.numerics.linalg import wide_dtype
from bitwright.progress import Progress


class DifferentiableModel(StreamedModel):
    """A streamed model in float32, whose head can be differentiated.

    Float32 whatever the model is stored in: what 8 bits cost would drown in the rounding of bfloat16 products.
    """

    @staticmethod
    def of(model: StreamedModel) -> "DifferentiableModel":
        """Open the checkpoint of a model once more."""
        skeleton = model.skeleton
        return DifferentiableModel(
            skeleton.checkpoint, device=str(model.device), trust_remote_code=skeleton.trust_remote_code
        )

    def leave_with_gradient(self, input_ids: Tensor, hidden: Tensor) -> Tensor:
        """Return the logits [B, T, V] as `leave` does, with a graph that leads back to `hidden` [B, T, D].

        Needs `outside()`, and that the model has been entered before.
        """
        relays = self._relays(bool(self._returns_tuple))
        relays[0].injected = hidden
        model = self.skeleton.model
        original = model.get_submodule(self.blocks_path)
        model.set_submodule(self.blocks_path, nn.ModuleList(relays))
        try:
            return cast(Tensor, model(input_ids=input_ids.to(self.device), use_cache=False).logits)
        finally:
            model.set_submodule(self.blocks_path, original)


class Prefix:
    """What one forward pass over the calibration text leaves.

    Attributes:
        windows: [N, T] token ids.
        folder: holds the files of hidden states.
        entries: hidden states [N, T, D] that enter each block, and last those that leave the last one.
        mean_squares: site -> [I] float32, E[x²] of its inputs, on the CPU; sites that no token reached are left out.
    """

    def __init__(self, model: DifferentiableModel, windows: Tensor, folder: Path, progress: Progress) -> None:
        self.windows, self.folder = windows, folder
        self.entries = [enter_all(model, windows, folder / "entry-0.bin")]
        self.mean_squares: dict[str, Tensor] = {}
        for index, name in enumerate(model.block_names):
            source = self.entries[-1]
            target = Activations(folder / f"entry-{index + 1}.bin", source.shape, source.dtype)
            with model.block(index) as block:
                sums = _Squares(block_sites(block, name))
                for start, end in batch_slices(*windows.shape):
                    with SiteCalls(block, sums.sites, sums.add):
                        target.write(start, model.run_block(block, index, source.read(start, end, model.device)))
            self.mean_squares.update(sums.means())
            self.entries.append(target)
            progress("forward", index + 1, model.num_blocks)


class _Squares:
    """Sums of squares of the inputs of each site."""

    def __init__(self, sites: list[Site]) -> None:
        self.sites = sites
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def add(self, site: Site, x: Tensor) -> None:
        rows = x.reshape(-1, x.shape[-1])
        square = rows.float().square().sum(0, dtype=wide_dtype(rows.device))
        self._sums[site.name] = square + self._sums[site.name] if site.name in self._sums else square
        self._counts[site.name] = self._counts.get(site.name, 0) + rows.shape[0]

    def means(self) -> dict[str, Tensor]:
        counts = self._counts
        return {name: (total / counts[name]).float().cpu() for name, total in self._sums.items() if counts[name]}


def sampled_label_gradients(
    model: DifferentiableModel, prefix: Prefix, path: Path, *, seed: int, progress: Progress
) -> Activations:
    """Return the gradients [N, T, D] of the log-likelihood of sampled labels at the last block's output.

    Every position of a window gets one label from the model's own prediction; the log-likelihoods of a window are
    summed. Labels depend on the seed and the window alone.
    """
    last = prefix.entries[-1]
    gradients = Activations(path, last.shape, last.dtype)
    with model.outside():
        for index in range(len(last)):
            hidden = last.read(index, index + 1, model.device).requires_grad_(True)
            with torch.enable_grad():
                logits = model.leave_with_gradient(prefix.windows[index : index + 1], hidden)
                log_p = torch.log_softmax(logits[0].float(), dim=-1)
                chosen = log_p.gather(1, sample_labels(log_p.detach(), seed, index).unsqueeze(1)).sum()
            gradients.write(index, torch.autograd.grad(chosen, hidden)[0])
            progress("head", index + 1, len(last))
    return gradients


def sample_labels(log_p: Tensor, seed: int, window: int) -> Tensor:
    """Draw one token for each row of log-probabilities [T, V]: [T] int64, on their device."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + window)
    return torch.multinomial(log_p.exp().cpu(), 1, generator=generator)[:, 0].to(log_p.device)
