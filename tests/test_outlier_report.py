"""The outlier analysis: planted outliers are found exactly, remedies are advised where they gain, and only there."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from bitwright import outlier_report
from bitwright.calibration.activity import ActivityStats
from bitwright.calibration.losses import INPUT_FORMATS, WEIGHT_FORMATS, FormatLoss, OutputBench
from bitwright.demo import demo_model
from bitwright.errors import CheckpointError
from bitwright.model.checkpoint import open_checkpoint
from bitwright.model.stream import StreamedModel
from bitwright.outlier_report import SiteActivity, analyse
from bitwright.pipeline import quantize
from bitwright.preparation import text_windows
from bitwright.progress import no_progress
from bitwright.recipe import Calibration, Recipe, Scheme
from bitwright.testbed import plant_outliers

BASE: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "tie_word_embeddings": False, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
MHA = {key: value for key, value in BASE.items() if key != "num_key_value_heads"}


def stream(folder: Path) -> StreamedModel:
    return StreamedModel(open_checkpoint(folder))


@pytest.fixture(scope="module")
def windows(tiny_text: str, tmp_path_factory: pytest.TempPathFactory) -> Tensor:
    """A little text in the demo model's tokens."""
    file = tmp_path_factory.mktemp("texts") / "text.txt"
    file.write_text(tiny_text[:8000])
    return text_windows(stream(demo_model()), str(file), 128, trust_remote_code=False)[:8]


def run(folder: Path, windows: Tensor) -> dict[str, SiteActivity]:
    """Analyse the demo model or its like; entries by their first site."""
    return {entry.sites[0]: entry for entry in analyse(stream(folder), windows, no_progress)}


@pytest.fixture(scope="module")
def plain(windows: Tensor) -> dict[str, SiteActivity]:
    return run(demo_model(), windows)


@pytest.fixture(scope="module")
def bed(
    windows: Tensor, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, SiteActivity], dict[str, set[int]]]:
    """The analysis of the planted demo model, and the columns planted by first site."""
    found = plant_outliers(demo_model(), tmp_path_factory.mktemp("beds") / "demo")
    return run(Path(found.path), windows), {edge.consumers[0]: set(edge.columns) for edge in found.edges}


def outliers(entry: SiteActivity) -> set[int]:
    assert entry.statistics is not None
    return {channel.index for channel in entry.statistics.outlier_channels}


def advised(entry: SiteActivity) -> set[str]:
    return {text.split(":")[0] for text in entry.advice}


def losses(entry: SiteActivity) -> dict[tuple[str, str], FormatLoss]:
    return {(loss.format, loss.granularity): loss for loss in (*entry.inputs, *entry.weights)}


def level(sqnr_db: float | None) -> float:
    assert sqnr_db is not None
    return sqnr_db


def test_every_site_is_in_one_entry(plain: dict[str, SiteActivity]) -> None:
    names = [name for entry in plain.values() for name in entry.sites]
    assert len(names) == len(set(names)) == 7 * 4
    assert [len(entry.sites) for entry in plain.values()] == [3, 1, 2, 1] * 4
    for entry in plain.values():
        assert (entry.num_tokens, entry.num_sampled) == (8 * 128, 512)
        assert [(loss.format, loss.granularity) for loss in entry.inputs] == [(f, g.kind) for f, g in INPUT_FORMATS]
        assert len(entry.weights) == len(WEIGHT_FORMATS)
        assert entry.advice
    assert plain["model.layers.2.mlp.down_proj"].producers == ("model.layers.2.mlp.up_proj",)


def test_the_result_is_plain_data(plain: dict[str, SiteActivity]) -> None:
    entry = plain["model.layers.0.self_attn.q_proj"]
    text = json.dumps(entry.to_json(), allow_nan=False)
    assert json.loads(text)["statistics"]["rms"] == entry.statistics.rms  # type: ignore[union-attr]


def test_planted_channels_are_found_exactly(
    plain: dict[str, SiteActivity], bed: tuple[dict[str, SiteActivity], dict[str, set[int]]]
) -> None:
    found, planted = bed
    assert len(planted) == 2 * 4
    for name, entry in found.items():
        columns = planted.get(name, set())
        assert outliers(entry) == outliers(plain[name]) | columns, name
        assert not outliers(plain[name]) & columns, name


def test_smoothing_is_advised_for_planted_groups_and_for_no_others(
    plain: dict[str, SiteActivity], bed: tuple[dict[str, SiteActivity], dict[str, set[int]]]
) -> None:
    found, planted = bed
    assert {name for name, entry in found.items() if "smooth" in advised(entry)} == set(planted)
    assert not any("smooth" in advised(entry) for entry in plain.values())
    for name in planted:
        (text,) = [text for text in found[name].advice if text.startswith("smooth")]
        assert f"over {found[name].producers[0]} " in text
        assert "keep" not in advised(found[name]), "smoothing gains as much and costs nothing at run time"


def test_planted_outliers_cost_the_outputs_what_they_do_not_cost_the_tensor(
    plain: dict[str, SiteActivity], bed: tuple[dict[str, SiteActivity], dict[str, set[int]]]
) -> None:
    found, planted = bed
    for name in planted:
        before, after = losses(plain[name])["int8", "token"], losses(found[name])["int8", "token"]
        assert level(before.output_sqnr_db) - level(after.output_sqnr_db) > 15, name
        assert level(before.sqnr_db) - level(after.sqnr_db) < 15, name
        # Weights over powers of two round as before except where the column shares a scale: never better by a bit.
        assert level(losses(found[name])["fp8-e4m3", "token"].output_sqnr_db) == pytest.approx(
            level(losses(plain[name])["fp8-e4m3", "token"].output_sqnr_db), abs=3
        )
        assert "fp8" in advised(found[name])


def test_what_was_not_planted_measures_as_before(
    plain: dict[str, SiteActivity], bed: tuple[dict[str, SiteActivity], dict[str, set[int]]]
) -> None:
    """The function is the same, so the inputs of all other groups are, bit for bit."""
    found, planted = bed
    for name in plain.keys() - planted.keys():
        assert found[name] == plain[name]


def test_predictions_hold_where_inputs_are_spread(plain: dict[str, SiteActivity]) -> None:
    """Behind a norm an 8-bit step is small beside the inputs: s²/12 holds to a fraction of a decibel."""
    for name, entry in plain.items():
        if name.endswith(("q_proj", "gate_proj")):
            for key in (("int8", "tensor"), ("uint8", "tensor"), ("int8", "token")):
                loss = losses(entry)[key]
                assert loss.sqnr_db == pytest.approx(loss.predicted_db, abs=0.5), (name, key)


def test_advice_follows_the_measured_gains(plain: dict[str, SiteActivity]) -> None:
    for name, entry in plain.items():
        db = {key: level(loss.output_sqnr_db) for key, loss in losses(entry).items()}
        per_tensor, per_token = db["int8", "tensor"], db["int8", "token"]
        expected = per_tensor < outlier_report.ENOUGH_DB and per_token - per_tensor >= outlier_report.CHEAP_GAIN_DB
        assert ("per-token" in advised(entry)) == expected, name
        assert ("none" in advised(entry)) == (len(entry.advice) == 1 and not expected), name


def saved(folder: Path, config: str, settings: dict[str, Any]) -> tuple[Any, Path]:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(getattr(transformers, config)(**settings), dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn_like(parameter) / parameter.shape[-1] ** 0.5)
    model.save_pretrained(folder)
    return model, folder


def test_statistics_and_losses_are_those_of_the_whole_model(tmp_path: Path) -> None:
    model, folder = saved(tmp_path, "LlamaConfig", BASE)
    windows = torch.randint(3, 96, (3, 40))
    inputs: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(lambda _, args, name=name: inputs.__setitem__(name, args[0].detach()))
    with torch.no_grad():
        model(input_ids=windows)
    for entry in analyse(stream(folder), windows, no_progress):
        stats = ActivityStats.empty(entry.in_features)
        for name in entry.sites:
            assert torch.equal(inputs[name], inputs[entry.sites[0]])
        x = inputs[entry.sites[0]]
        stats.observe(x)
        assert entry.num_tokens == entry.num_sampled == 120
        assert entry.statistics is not None
        # Batches of one window here and three there: products in another order, a few roundings apart.
        for figure in ("rms", "kurtosis", "fraction_negative", "one_sidedness", "dynamic_range_db"):
            assert getattr(entry.statistics, figure) == pytest.approx(getattr(stats, figure), rel=1e-4), figure
        bench = OutputBench(x.flatten(0, 1), [model.get_submodule(name).weight.detach() for name in entry.sites])
        expected = [bench.input_loss(f, g, float(x.min()), float(x.max())) for f, g in INPUT_FORMATS]
        expected += [bench.weight_loss(f, g) for f, g in WEIGHT_FORMATS]
        for ours, theirs in zip((*entry.inputs, *entry.weights), expected, strict=True):
            assert ours.output_sqnr_db == pytest.approx(theirs.output_sqnr_db, abs=0.01)
            assert ours.sqnr_db == pytest.approx(theirs.sqnr_db, abs=0.01)


def test_inputs_behind_a_relu_want_a_zero_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, folder = saved(tmp_path, "OPTConfig", MHA | {"ffn_dim": 256, "word_embed_proj_dim": 64})
    name, ids = "model.decoder.layers.1.fc2", torch.randint(3, 96, (2, 40))
    entry = run(folder, ids)[name]
    assert entry.statistics is not None
    assert (entry.statistics.one_sidedness, entry.statistics.fraction_negative) == (1.0, 0.0)
    db = losses(entry)
    gain = level(db["uint8", "tensor"].output_sqnr_db) - level(db["int8", "tensor"].output_sqnr_db)
    assert gain == pytest.approx(20 * 0.30103, abs=0.5), "twice the codes for the same range"
    assert level(db["int8", "tensor"].output_sqnr_db) > outlier_report.ENOUGH_DB
    assert advised(entry) == {"none"}, "what is good enough needs no remedy"
    monkeypatch.setattr(outlier_report, "ENOUGH_DB", 60.0)
    assert "asymmetric" in advised(run(folder, ids)[name])


def test_outliers_that_nothing_can_smooth_are_kept(tmp_path: Path) -> None:
    """Behind GELU there is no edge: two loud channels of GPT-2's hidden layer stay in 16 bit."""
    settings = {"vocab_size": 96, "n_embd": 64, "n_layer": 1, "n_head": 4, "n_positions": 64}
    model, _ = saved(tmp_path / "first", "GPT2Config", settings | {"bos_token_id": 1, "eos_token_id": 2})
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.weight[:, [17, 200]] *= 128
        model.transformer.h[0].mlp.c_proj.weight[[17, 200]] /= 128
    model.save_pretrained(tmp_path / "loud")
    entry = run(tmp_path / "loud", torch.randint(3, 96, (4, 40)))["transformer.h.0.mlp.c_proj"]
    assert entry.producers == ()
    assert outliers(entry) == {17, 200}
    assert "keep" in advised(entry)
    assert "smooth" not in advised(entry)


def test_experts_that_no_token_reached_and_routers(tmp_path: Path) -> None:
    """One token repeated has one hidden state, which two of the four experts get."""
    _, folder = saved(tmp_path, "MixtralConfig", BASE | {"num_local_experts": 4, "num_experts_per_tok": 2})
    entries = analyse(stream(folder), torch.full((1, 8), 5), no_progress)
    assert not any(name.endswith("gate") for entry in entries for name in entry.sites), "routers are left out"
    experts = [entry for entry in entries if entry.kind == "expert"]
    assert len(experts) == 2 * 2 * 4
    silent = [entry for entry in experts if entry.num_tokens == 0]
    assert len(silent) == 2 * 2 * 2
    for entry in silent:
        assert (entry.statistics, entry.inputs, entry.weights, entry.num_sampled) == (None, (), (), 0)
        assert entry.advice[0].startswith("none: no token reached")
    assert all(entry.num_tokens == 8 for entry in experts if entry not in silent)
    json.dumps([entry.to_json() for entry in entries], allow_nan=False)


def test_samples_share_a_bounded_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, folder = saved(tmp_path, "LlamaConfig", BASE)
    widths = 64 + 64 + 64 + 256
    monkeypatch.setattr(outlier_report, "SAMPLE_BYTES", 4 * widths * 20)
    entries = analyse(stream(folder), torch.randint(3, 96, (2, 40)), no_progress)
    assert {entry.num_sampled for entry in entries} == {20}
    assert {entry.num_tokens for entry in entries} == {80}


def test_progress_and_nothing_left_in_memory(tiny_llama_dir: Path) -> None:
    steps: list[tuple[str, int, int]] = []
    model = stream(tiny_llama_dir)
    analyse(model, torch.randint(3, 96, (1, 16)), lambda *step: steps.append(step))
    assert [step for step in steps if step[0] == "analyse"] == [("analyse", 1, 2), ("analyse", 2, 2)]
    assert all(parameter.is_meta for parameter in model.skeleton.model.parameters())


def test_a_quantized_model_is_refused(tiny_llama_dir: Path, tmp_path: Path) -> None:
    recipe = Recipe(scheme=Scheme.parse("W8A16-channel"), method="rtn", calibration=Calibration(seqlen=64))
    result = quantize(tiny_llama_dir, recipe, tmp_path / "run")
    with pytest.raises(CheckpointError, match="already quantized"):
        analyse(stream(result.run / "4-model"), torch.randint(3, 96, (1, 16)), no_progress)
