"""The same job on an accelerator: runs where there is one."""

from pathlib import Path

import pytest
import torch

from bitwright.pipeline import evaluate, quantize
from bitwright.recipe import Calibration, Recipe
from bitwright.schemes import Scheme

NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")


@NEEDS_CUDA
@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_a_gpu_run_loses_as_much_as_a_cpu_run(
    method: str, tiny_llama_dir: Path, tiny_text: str, tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text(tiny_text)
    calibration = Calibration(text=str(text), num_samples=8, seqlen=64)
    recipe = Recipe(scheme=Scheme.parse("W4A16-g32"), method=method, calibration=calibration, max_kl=20.0)
    losses = [
        quantize(tiny_llama_dir, recipe, tmp_path / device, device=device).results["kl_mean"]
        for device in ("cpu", "cuda")
    ]
    # Rounding may flip single codes between devices; the loss of all of them together may not change by a tenth.
    assert losses[1] == pytest.approx(losses[0], rel=0.1)


@NEEDS_CUDA
def test_evaluation_agrees_between_devices(tiny_llama_dir: Path, tiny_text: str, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(tiny_text)
    scores = [
        evaluate(tiny_llama_dir, str(text), seqlen=64, max_windows=8, device=device)[0].perplexity
        for device in ("cpu", "cuda")
    ]
    assert scores[1] == pytest.approx(scores[0], rel=1e-4)
