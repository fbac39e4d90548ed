"""What is kept of a sensitivity that was killed, and what is refused before any work."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from bitwright.errors import RecipeError, ShapeError, UnknownName
from bitwright.model.checkpoint import open_checkpoint
from bitwright.model.stream import StreamedModel
from bitwright.preparation import model_sites
from bitwright.schemes import Scheme
from bitwright.search.question import Task
from bitwright.search.rounding import Rounder
from bitwright.search.sensitivity import Sensitivity, measure_sensitivities, measure_sensitivity

SCHEMES = tuple(map(Scheme.parse, ("W2A16-g32", "W4A16-g32", "W8A16-channel")))
TWO_BITS = str(SCHEMES[0])
WINDOWS = torch.randint(2, 320, (3, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def streamed(tiny_llama_dir: Path) -> StreamedModel:
    return StreamedModel(open_checkpoint(tiny_llama_dir))


def measure(model: StreamedModel, folder: Path, **options: Any) -> dict[str, Sensitivity]:
    given = {"schemes": SCHEMES, **options}
    return measure_sensitivities(model, model_sites(model), WINDOWS, folder=folder, **given)


@pytest.mark.parametrize("scores", [("output_sqnr", "fisher"), ("measured",), ("trace",)])
def test_a_killed_run_repeats_no_finished_site_and_ends_alike(
    scores: tuple[str, ...], streamed: StreamedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(what: str, done: int, total: int) -> None:
        if what in ("scores", "measured", "trace") and done == 1 and done < total:
            raise KeyboardInterrupt

    expected = measure(streamed, tmp_path / "whole", scores=scores)
    with pytest.raises(KeyboardInterrupt):
        measure(streamed, tmp_path / "killed", scores=scores, progress=killed)
    finished = [line for file in (tmp_path / "killed").rglob("*.jsonl") for line in file.read_text().splitlines()]
    assert finished
    assert not list((tmp_path / "killed").rglob("*.bin"))

    assert measure(streamed, tmp_path / "killed", scores=scores) == expected
    lines = [line for file in (tmp_path / "killed").rglob("*.jsonl") for line in file.read_text().splitlines()]
    wanted = [line for file in (tmp_path / "whole").rglob("*.jsonl") for line in file.read_text().splitlines()]
    assert sorted(lines) == sorted(wanted)

    def refuse(*_: object) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(Rounder, "round", refuse)
    assert measure(streamed, tmp_path / "killed", scores=scores) == expected


def test_a_menu_may_grow_without_measuring_the_old_schemes_again(streamed: StreamedModel, tmp_path: Path) -> None:
    few = measure(streamed, tmp_path, scores=["hessian"], schemes=SCHEMES[:2])["hessian"]
    more = measure(streamed, tmp_path, scores=["hessian"])["hessian"]
    assert all(more.values[site][scheme] == row[scheme] for site, row in few.values.items() for scheme in few.schemes)
    columns = [line for file in tmp_path.rglob("*.jsonl") for line in file.read_text().splitlines()]
    assert sum(TWO_BITS in line for line in columns) == len(few.values)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"scores": ["fischer"]}, UnknownName, "Did you mean 'fisher'"),
        ({"scores": ["trace"], "target": "inputs"}, RecipeError, "not for inputs. Use output_sqnr"),
        ({"scores": ["hessian"], "target": "cache"}, RecipeError, "not for cache. Use measured"),
        ({"scores": ["task"]}, RecipeError, "needs a task"),
        ({"scores": ["hessian"], "schemes": [Scheme.parse("W4A16-g128")]}, ShapeError, "group_size 128"),
        ({"scores": ["measured"], "target": "inputs"}, RecipeError, "leaves activations in 16 bit"),
        (
            {"scores": ["measured"], "target": "inputs", "schemes": [Scheme.parse("W8A8-static")]},
            RecipeError, "Use dynamic ones",
        ),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_before_any_work(
    options: dict[str, Any], error: type[Exception], message: str, streamed: StreamedModel, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        measure(streamed, tmp_path / "scores", **options)
    assert not (tmp_path / "scores").exists()


def test_a_model_without_a_named_cache_is_refused(tmp_path: Path) -> None:
    config = GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=1, n_head=2)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    model = StreamedModel(open_checkpoint(tmp_path / "gpt2"))
    with pytest.raises(RecipeError, match="no sites called k_proj or v_proj"):
        measure_sensitivity(model, model_sites(model), WINDOWS % 64, score="measured", folder=tmp_path, target="cache")


def test_a_trace_of_more_probes_is_measured_again(streamed: StreamedModel, tmp_path: Path) -> None:
    one, three = (measure(streamed, tmp_path, scores=["trace"], num_probes=n)["trace"] for n in (1, 3))
    assert one.values != three.values
    assert measure(streamed, tmp_path / "fresh", scores=["trace"], num_probes=3)["trace"].values == three.values


def test_a_task_is_evaluated_again_in_another_dtype(streamed: StreamedModel, tmp_path: Path) -> None:
    dtypes: list[torch.dtype] = []

    def evaluate(model: StreamedModel) -> float:
        dtypes.append(model.dtype)
        return 0.0

    half = StreamedModel(streamed.skeleton.checkpoint, dtype=torch.bfloat16)
    for model in (streamed, half, half):
        measure_sensitivity(
            model, model_sites(model)[:1], WINDOWS, score="task", folder=tmp_path, schemes=SCHEMES[:1],
            task=Task(name="none", evaluate=evaluate),
        )  # fmt: skip
    assert dtypes == [torch.float32] * 2 + [torch.bfloat16] * 2
