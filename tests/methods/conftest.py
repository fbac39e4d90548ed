"""Stages of tiny random blocks, for tests of transforms: one block of a model in memory, and text that enters."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from bitwright.group_solver import GroupSolver
from bitwright.methods.stage import BlockStage
from bitwright.model.activations import Activations
from bitwright.model.checkpoint import open_checkpoint
from bitwright.model.probe import propose, prove
from bitwright.model.sites import block_sites
from bitwright.model.stream import StreamedModel
from bitwright.recipe import Recipe, resolve

OpenStage = Callable[..., AbstractContextManager[BlockStage]]
VOCABULARY, WINDOWS, TOKENS = 97, 16, 64

SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": TOKENS, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
MHA = {key: value for key, value in SMALL.items() if key != "num_key_value_heads"}
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", SMALL),
    "qwen2": ("Qwen2Config", SMALL),
    "opt": ("OPTConfig", MHA | {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "gemma2": ("Gemma2Config", SMALL | {"head_dim": 8}),
    "mixtral": ("MixtralConfig", SMALL | {"num_local_experts": 4, "num_experts_per_tok": 2}),
}


def _saved(name: str, folder: Path, outliers: float) -> Path:
    """Save an architecture with random weights that all matter; `outliers` multiplies three channels of each norm."""
    class_name, settings = ARCHITECTURES[name]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, class_name)(**settings)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
            if parameter.ndim == 1 and parameter.numel() == settings["hidden_size"]:
                parameter[3::12] *= outliers
    model.save_pretrained(folder)
    return folder


@contextmanager
def _stage(folder: Path, recipe: Recipe, work: Path) -> Iterator[BlockStage]:
    """Hold the first block of a model, proven, with random tokens that enter it."""
    model = StreamedModel(open_checkpoint(folder))
    name = model.block_names[0]
    sites = block_sites(model.skeleton.model.get_submodule(name), name)
    plan = resolve(recipe, sites)
    solver = GroupSolver(model.skeleton, recipe, plan, work / "fisher.safetensors")
    ids = torch.randint(3, VOCABULARY, (WINDOWS, TOKENS), generator=torch.Generator().manual_seed(0))
    with model.outside():
        hidden = model.enter(ids)
    inputs = Activations(work / "hidden.bin", (WINDOWS, TOKENS, hidden.shape[-1]), torch.float32)
    inputs.write(0, hidden)
    with model.block(0) as block:
        run = partial(model.run_block, block, 0, hidden)
        structure = prove(block, name, run, propose(block, name, run), torch.Generator().manual_seed(0))
        yield BlockStage(
            model=model, index=0, name=name, block=block, structure=structure, plan=plan, recipe=recipe,
            fake_quantize=solver.fake_quantize, input_quantizer=solver.input_quantizer, probe=run, inputs=inputs,
        )  # fmt: skip


@pytest.fixture
def open_stage(tmp_path: Path) -> OpenStage:
    """Opens the first block of a tiny random model: (architecture, recipe, outliers) -> context manager of a stage."""

    def opened(name: str, recipe: Recipe, outliers: float = 1.0) -> AbstractContextManager[BlockStage]:
        return _stage(_saved(name, tmp_path / f"{name}-{outliers}", outliers), recipe, tmp_path)

    return opened
