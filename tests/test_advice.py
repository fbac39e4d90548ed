"""Advice is right about sizes, says what it does not know, and names commands that exist."""

import json
import shlex
from pathlib import Path

import pytest
import torch
import typer
from transformers import GptOssConfig, LlamaConfig, MixtralConfig
from typer.testing import CliRunner

from bitwright.advice import Advice, advise
from bitwright.advice_answers import Answer, duration, method_for
from bitwright.budget import Budget, parse_size
from bitwright.cli.advise_command import advise as command
from bitwright.errors import CheckpointError, RecipeError, UnknownName
from bitwright.methods.composition import compose
from bitwright.mixture import Search
from bitwright.model.checkpoint import open_checkpoint
from bitwright.model.stream import StreamedModel
from bitwright.pipeline import quantize
from bitwright.recipe_builder import build_recipe
from bitwright.search.scenarios import MENU, SCENARIOS

CONFIGS = Path(__file__).parent / "data" / "configs"


@pytest.mark.parametrize("scenario", SCENARIOS.names)
def test_every_scenario_answers_for_seven_billion(scenario: str) -> None:
    found = advise(CONFIGS / "llama-2-7b.json", scenario=scenario)
    assert [option.scheme for option in found.options] == [None, *MENU]
    assert found.scheme is not None
    first = "train qlora MODEL --data TEXT" if scenario == "finetune" else "quantize MODEL"
    assert found.commands[0].startswith(f"bitwright {first} --scheme {found.scheme} ")
    assert all(answer.reason for answer in found.answers)
    assert any(line.startswith("bitwright search ") for line in found.commands) == (scenario in ("cloud", "edge"))
    lost = next(answer for answer in found.answers if answer.question == "What will be lost?")
    assert lost.answer == "not known without weights"
    assert all(option.sqnr_db is None for option in found.options)
    if found.hardware is None:
        assert all(option.fits is None and option.speed is None for option in found.options)


def test_thirteen_billion_in_4_bits_is_what_the_founding_text_says() -> None:
    found = advise(CONFIGS / "llama-2-13b.json", scenario="edge")
    sizes = {option.scheme: option.size_bytes for option in found.options}
    assert round((sizes[None] or 0) / 1e9) == 26
    assert round((sizes["W4A16-g128"] or 0) / 1e9) == 7


def test_the_search_has_the_memory_of_the_scheme_that_was_chosen() -> None:
    """Not the memory of the device, in which 16 bit would fit and nothing would be left to search."""
    found = advise(CONFIGS / "llama-2-7b.json", scenario="cloud")
    chosen = next(option for option in found.options if option.scheme == found.scheme)
    assert chosen.memory is not None
    (search,) = (line for line in found.commands if line.startswith("bitwright search "))
    words = shlex.split(search)
    limit = parse_size(words[words.index("--fit") + 1], "--fit")
    assert chosen.memory.total_bytes <= limit < chosen.memory.total_bytes + 1e7


def test_seventy_billion_fits_one_device_only_in_4_bits() -> None:
    found = advise(CONFIGS / "llama-2-70b.json", scenario="cloud", batch=4)
    fits = {option.scheme: option.fits for option in found.options}
    assert (fits[None], fits["fp8"], fits["W4A16-g128"]) == (False, False, True)
    assert found.scheme == "W4A16-g128"
    none = advise(CONFIGS / "llama-2-70b.json", scenario="cloud", hardware="t4")
    assert none.scheme is None
    assert none.commands == ()


def test_the_device_decides_between_weights_and_activations() -> None:
    many = advise(CONFIGS / "llama-2-7b.json", scenario="cloud", hardware="h200", batch=16, prompt=3584)
    assert many.scheme == "fp8"
    one = advise(CONFIGS / "llama-2-7b.json", scenario="edge")
    assert one.scheme == "W4A16-g128"


def test_with_weights_the_noise_of_schemes_is_measured(tiny_llama_dir: Path) -> None:
    found = advise(tiny_llama_dir, scenario="mobile", hardware="apple-m2-max", context=64)
    noise = {option.scheme: option.sqnr_db for option in found.options}
    eight, fine, three = noise["W8A16-channel"], noise["W4A16-g32"], noise["ternary"]
    assert eight is not None
    assert fine is not None
    assert three is not None
    assert eight > fine > three
    assert noise[None] is None
    assert str(tiny_llama_dir) in shlex.split(found.commands[0])
    unfit = next(option for option in found.options if option.scheme == "W4A16-g128")
    assert unfit.size_bytes is None
    assert "group_size 128" in unfit.note


@pytest.mark.parametrize("scheme", MENU)
@pytest.mark.parametrize("data", ["none", "some", "lots"])
def test_methods_exist_and_need_text_only_where_there_is_some(scheme: str, data: str) -> None:
    method, reason = method_for(scheme, data)  # type: ignore[arg-type]
    compose(method)
    assert reason
    assert data != "none" or method == "rtn"


MOE = {
    "vocab_size": 512, "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "num_local_experts": 8, "num_experts_per_tok": 2, "max_position_embeddings": 4096,
}  # fmt: skip


def test_a_mixture_of_experts(tmp_path: Path) -> None:
    MixtralConfig(**MOE).save_pretrained(tmp_path)
    found = advise(tmp_path, scenario="cloud")
    assert found.num_active_parameters < found.num_parameters
    assert found.scheme in ("W8A16-channel", "W4A16-g128")
    assert any(
        "through 2 of 8 experts in a layer, and a step of 16 through 7.92 of them" in note for note in found.notes
    )
    (refused,) = (note for note in found.notes if "not possible" in note)
    assert refused.startswith(
        "W8A8, fp8, nf4-b64-dq, ternary: not possible. model.layers.0.mlp.experts.gate_up_proj[0]:"
    )
    both = next(answer for answer in found.answers if "W8A8" in answer.question)
    assert both.answer == "weights alone"
    assert both.reason.startswith("W8A8 is not possible: model.layers.0.mlp.experts")


def test_a_model_that_no_layout_holds(tmp_path: Path) -> None:
    """The experts of gpt-oss are stored as [in, out]."""
    GptOssConfig(**MOE, layer_types=["full_attention"] * 2, rope_parameters={"rope_type": "default"}).save_pretrained(
        tmp_path
    )
    found = advise(tmp_path, scenario="mobile")
    assert (found.scheme, found.commands) == (None, ())
    which = next(answer for answer in found.answers if answer.question == "Which scheme?")
    assert which.answer == "none is possible"
    assert "gate_up_proj[0]: stored as [in, out]" in which.reason


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.04567, "45.7 ms"), (0.9994, "999 ms"), (6.726, "6.73 s"), (1234.5, "1,234 s")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_the_command_prints_json_and_tables() -> None:
    app = typer.Typer()
    app.command()(command)
    arguments = [str(CONFIGS / "llama-2-7b.json"), "--scenario", "edge", "--max-loss", "0.05"]
    result = CliRunner().invoke(app, [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["scheme"] == "W4A16-g128"
    assert "--max-kl 0.05" in found["commands"][0]
    shown = CliRunner().invoke(app, arguments)
    assert "> W4A16-g128" in shown.stdout


def test_bad_input_is_one_line() -> None:
    config = CONFIGS / "llama-2-7b.json"
    with pytest.raises(UnknownName, match="unknown scenario 'clod'"):
        advise(config, scenario="clod")
    with pytest.raises(UnknownName, match="unknown hardware"):
        advise(config, scenario="edge", hardware="h1000")
    with pytest.raises(RecipeError, match="--kv-bits"):
        advise(config, scenario="edge", kv_bits=0)


def test_a_model_that_is_quantized_already_is_refused(tiny_llama_dir: Path, tmp_path: Path) -> None:
    recipe = build_recipe(None, {"scheme": "W4A16-g32", "method": "rtn", "max_kl": 100.0}, {"seqlen": 64}, ignore=())
    run = quantize(tiny_llama_dir, recipe, tmp_path / "run").run
    for packed in (run, run / "4-model"):
        with pytest.raises(CheckpointError, match=r"already quantized\. Give the original\.$"):
            advise(packed, scenario="edge")
    with pytest.raises(CheckpointError, match=r"already quantized\. Give the original\.$"):
        Search(
            StreamedModel(open_checkpoint(run)), torch.zeros(1, 8, dtype=torch.long), recipe, Budget(average_bits=4.0),
            tmp_path / "search",
        )  # fmt: skip


def _small(folder: Path, *, hidden_size: int = 576, heads: int = 9) -> Path:
    """SmolLM2-135M by its shapes: 128 does not divide its rows, and 64 does."""
    LlamaConfig(
        hidden_size=hidden_size, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=heads,
        num_key_value_heads=heads // 3, vocab_size=49152, tie_word_embeddings=True, max_position_embeddings=8192,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def _answer(found: Advice, question: str) -> Answer:
    return next(answer for answer in found.answers if answer.question.startswith(question))


def test_groups_that_do_not_divide_the_rows_give_way_to_smaller_ones(tmp_path: Path) -> None:
    found = advise(_small(tmp_path), scenario="iot")
    sizes = {option.scheme: option.size_bytes for option in found.options}
    assert found.scheme == "W4A16-g64"
    assert _answer(found, "Which scheme?").reason.startswith("these shapes do not allow W4A16-g128, usual here")
    assert sizes["W4A16-g128"] is None
    assert sizes["W3A16-g128"] is None
    assert sizes["W3A16-g64"] is not None


def test_where_no_candidate_is_possible_a_smaller_scheme_is_named(tmp_path: Path) -> None:
    """Rows of 12 are shorter than any group."""
    found = advise(_small(tmp_path, hidden_size=12, heads=3), scenario="iot")
    assert found.scheme == "ternary"
    assert all(option.size_bytes is None for option in found.options if option.scheme and "-g" in option.scheme)
    assert _answer(found, "Weights alone").reason.startswith("W4A16 is not possible: model.layers.0.")


@pytest.mark.parametrize("scenario", ["cloud", "edge"])
def test_a_device_that_is_set_is_not_asked_for(scenario: str, tmp_path: Path) -> None:
    found = advise(_small(tmp_path), scenario=scenario)
    assert found.hardware is not None
    assert "a step of" in _answer(found, "Weights alone").reason
    assert not any("name a device" in answer.reason for answer in found.answers)
