"""A model in memory, as it is trained, scored on text that it is not trained on."""

from typing import cast

import torch
from torch import Tensor, nn

from bitwright.evaluation.score import Score, Scorer

TOKENS_PER_BATCH = 2048


@torch.no_grad()
def score_in_memory(model: nn.Module, windows: Tensor, *, reference: nn.Module | None = None) -> Score:
    """Perplexity on windows [N, T], and the divergence from a reference where one is given.

    The model is put into evaluation mode for it, and back into the mode that it was in.
    """
    device = next(model.parameters()).device
    models = [model] if reference is None else [model, reference]
    modes = [each.training for each in models]
    for each in models:
        each.eval()
    scorer = Scorer()
    for batch in windows.split(max(1, TOKENS_PER_BATCH // windows.shape[1])):
        ids = batch.to(device).long()
        logits = [cast(Tensor, each(input_ids=ids, use_cache=False).logits) for each in models]
        for index in range(len(batch)):
            scorer.add(batch[index].long(), logits[0][index], logits[1][index] if reference is not None else None)
    for each, mode in zip(models, modes, strict=True):
        each.train(mode)
    return scorer.result()
