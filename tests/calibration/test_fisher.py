"""Fisher information against gradients taken one by one, and what its users are refused."""

from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM

from bitwright.calibration.fisher import fisher_information
from bitwright.demo import demo_model
from bitwright.errors import RecipeError, ResourceError
from bitwright.model.checkpoint import open_checkpoint
from bitwright.pipeline import quantize
from bitwright.progress import no_progress
from bitwright.recipe import Calibration, Recipe
from bitwright.schemes import Scheme

NAME = "model.layers.1.mlp.down_proj.weight"


def measure(windows: torch.Tensor) -> torch.Tensor:
    checkpoint = open_checkpoint(demo_model())
    return fisher_information(checkpoint, [NAME], windows, device="cpu", trust_remote_code=False, progress=no_progress)[
        NAME
    ]


def test_it_is_the_mean_square_of_the_gradients_of_the_windows() -> None:
    windows = torch.randint(2048, (2, 8), generator=torch.Generator().manual_seed(0))
    model = AutoModelForCausalLM.from_pretrained(demo_model(), dtype=torch.float32)
    parameter = model.get_parameter(NAME)
    squares = []
    for ids in windows:
        logits = model(input_ids=ids[None]).logits[0, :-1]
        loss = torch.nn.functional.cross_entropy(logits, ids[1:])
        squares.append(torch.autograd.grad(loss, parameter)[0].square())

    found = measure(windows)

    torch.testing.assert_close(found, torch.stack(squares).mean(0), rtol=1e-3, atol=1e-6 * float(found.max()))


def test_too_little_memory_is_said_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1_000_000))
    with pytest.raises(ResourceError, match=r"whole model.*importance: inputs"):
        measure(torch.zeros(1, 4, dtype=torch.int64))


@pytest.mark.parametrize(
    ("scheme", "text", "message"),
    [("W4A16", "stdlib", "weighs the tables of kmeans schemes"), ("kmeans4", None, "needs calibration text")],
)
def test_what_it_cannot_weigh_is_refused(scheme: str, text: str | None, message: str, tmp_path: Path) -> None:
    recipe = Recipe(scheme=Scheme.parse(scheme), method="rtn", importance="fisher", calibration=Calibration(text=text))
    with pytest.raises(RecipeError, match=message):
        quantize(demo_model(), recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_tables_weighted_by_it_differ_and_their_run_resumes_to_the_same(tmp_path: Path) -> None:
    def run(importance: str, out: str) -> str:
        calibration = Calibration(text="stdlib", num_samples=2, seqlen=64)
        recipe = Recipe(
            scheme=Scheme.parse("kmeans2-tensor"), method="rtn", importance=importance, calibration=calibration,
            max_kl=100.0,
        )  # fmt: skip
        return quantize(demo_model(), recipe, tmp_path / out).results["result_hash"]

    assert run("fisher", "a") == run("fisher", "b") != run("inputs", "c")
