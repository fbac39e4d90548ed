"""`bitwright diagnose`: every planted fault is named at its site, and healthy checkpoints of every kind are healthy."""

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
import typer
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import bitwright
from bitwright.checkup.diagnose import diagnose_checkpoint
from bitwright.checkup.findings import BlockDepth, Checkup, Finding, Severity, worst_first
from bitwright.checkup.folding import find_folding
from bitwright.checkup.verdicts import first_to_diverge
from bitwright.cli.diagnose_command import diagnose
from bitwright.demo import demo_model
from bitwright.errors import CheckpointError
from bitwright.model.checkpoint import open_checkpoint
from bitwright.model.layouts.compressed_tensors import encode
from bitwright.model.structure import Edge
from bitwright.numerics.grid import Grid
from bitwright.numerics.inputs import QuantizedSite
from bitwright.numerics.qtensor import QTensor
from bitwright.recipe_builder import build_recipe

ROOT = Path(__file__).parents[1]
SITE = "model.layers.1.self_attn.o_proj"
NEIGHBOUR = "model.layers.1.self_attn.q_proj"
# Each goes through the whole of quantize; the rest of the kinds in the slow tests.
HEALTHY = (("W4A16-g32", "gptq"), ("W4A16-g32", "rotation"), ("mxfp4", "rtn"))
MORE_HEALTHY = (
    ("W4A16-g32-asym", "awq"), ("W4A16-g32", "rtn"), ("W8A8", "smoothquant"), ("W8A8-static", "rtn"), ("nf4", "rtn"),
    ("fp8", "rtn"), ("nvfp4-a16", "rtn"), ("ternary-g32", "rtn"), ("kmeans4", "rtn"), ("W2A16-g32", "gptq"),
    ("W4A16-g32", "hadamard"), ("W4A16-g32", "rotation+gptq"), ("W3A16-g32-asym", "awq+gptq+bias"),
    ("W2A16-g32", "rtn+low_rank+bias"),
    ("W4A16-g32", "signround"), ("W4A16-g32-asym", "hqq"), ("W8A8", "llm_int8"), ("nf4-b64-dq", "rtn"),
    ("binary-g32", "rtn"), ("W4A8-g32", "rotation"),
)  # fmt: skip


def _load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


breaker = _load("break_checkpoint")


def _quantize(model: Path, out: Path, text: Path, scheme: str, method: str, layout: str = "auto") -> Path:
    given = {"scheme": scheme, "method": method, "layout": layout, "max_kl": 100.0}
    calibrate = {"text": str(text), "num_samples": 4, "seqlen": 64, "seed": 0}
    bitwright.quantize(model, build_recipe(None, given, calibrate, ignore=()), out)
    return out


@pytest.fixture(scope="session")
def text_file(tiny_text: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(tiny_text, encoding="utf-8")
    return file


@pytest.fixture(scope="session")
def healthy(tiny_llama_dir: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    return {
        layout: _quantize(tiny_llama_dir, folder / layout, text_file, "W4A16-g32-asym", "rtn", layout)
        for layout in ("compressed-tensors", "bitwright")
    }


def _errors(found: Checkup) -> set[tuple[str, str]]:
    return {(finding.kind, finding.site) for finding in found.findings if finding.severity == "error"}


@pytest.mark.parametrize("layout", ["compressed-tensors", "bitwright"])
@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        ("swapped-scales", {("swapped-scales", SITE), ("swapped-scales", NEIGHBOUR)}),
        ("saturated", {("saturated", SITE)}),
        ("group-order", {("group-order", SITE)}),
        ("nan-scale", {("nan-scale", SITE)}),
        ("clipped-zero-point", {("clipped-zero-point", SITE)}),
        ("transposed", {("transposed", SITE)}),
    ],
)
def test_a_planted_fault_is_named_and_nothing_else(
    layout: str,
    fault: str,
    expected: set[tuple[str, str]],
    healthy: dict[str, Path],
    tiny_llama_dir: Path,
    tmp_path: Path,
) -> None:
    planted = breaker.plant(healthy[layout], fault, tmp_path / "broken", site=SITE)

    found = diagnose_checkpoint(tiny_llama_dir, tmp_path / "broken", seqlen=64)

    assert {site for _, site in expected} == set(planted)
    assert _errors(found) == expected
    assert found.num_errors == len(expected)
    assert [finding.severity for finding in found.findings[: len(expected)]] == ["error"] * len(expected)


@pytest.mark.parametrize("layout", ["compressed-tensors", "bitwright"])
def test_a_missing_site_is_named_although_no_loader_reads_the_checkpoint(
    layout: str, healthy: dict[str, Path], tiny_llama_dir: Path, tmp_path: Path
) -> None:
    breaker.plant(healthy[layout], "missing", tmp_path / "broken", site=SITE)

    found = diagnose_checkpoint(tiny_llama_dir, tmp_path / "broken", seqlen=64)

    assert _errors(found) == {("missing-site", SITE)}
    assert ("replaced", "model") in {(finding.kind, finding.site) for finding in found.findings}


@pytest.mark.parametrize(("fault", "severity"), [("unquantized", "error"), ("unquantized-ignored", "warning")])
@pytest.mark.parametrize("layout", ["compressed-tensors", "bitwright"])
def test_a_site_left_in_16_bit_is_an_error_where_the_configuration_denies_it(
    fault: str, severity: str, layout: str, healthy: dict[str, Path], tiny_llama_dir: Path, tmp_path: Path
) -> None:
    breaker.plant(healthy[layout], fault, tmp_path / "broken", site=SITE)

    found = diagnose_checkpoint(tiny_llama_dir, tmp_path / "broken", seqlen=64)

    worse = [(f.severity, f.kind, f.site) for f in found.findings if f.severity != "note"]
    assert worse == [(severity, "unquantized-site", SITE)]


def _changed_copy(healthy: Path, out: Path, change: dict[str, torch.Tensor]) -> Path:
    out.mkdir()
    for file in (healthy / "4-model").iterdir():
        if file.suffix != ".safetensors":
            (out / file.name).write_bytes(file.read_bytes())
            continue
        tensors = load_file(file)
        save_file({**tensors, **{name: new for name, new in change.items() if name in tensors}}, out / file.name)
    return out


@pytest.mark.parametrize(
    ("kind", "site"),
    [
        ("scale-factor", SITE),
        ("zero-scale", SITE),
        ("permuted", SITE),
        ("wrong-shape", SITE),
        ("not-finite", "model.norm"),
    ],
)
def test_further_faults_are_told_apart(
    kind: str, site: str, healthy: dict[str, Path], tiny_llama_dir: Path, tmp_path: Path
) -> None:
    source = open_checkpoint(healthy["compressed-tensors"] / "4-model")
    stored = source.read_stored([name for name in source.stored if name.startswith(SITE)])
    scale, packed = f"{SITE}.weight_scale", f"{SITE}.weight_packed"
    weight = source.read_packed(f"{SITE}.weight").weight
    assert isinstance(weight.grid, Grid)
    assert weight.grid.zero_point is not None
    order = torch.randperm(weight.shape[0])
    grid = replace(weight.grid, scale=weight.grid.scale[order], zero_point=weight.grid.zero_point[order])
    moved = encode("pack-quantized", QuantizedSite(weight=QTensor(codes=weight.codes[order], grid=grid)))
    changes = {
        "scale-factor": {scale: stored[scale] * 16},
        "zero-scale": {scale: torch.zeros_like(stored[scale])},
        "permuted": {f"{SITE}.{name}": tensor for name, tensor in moved.items()},
        "wrong-shape": {packed: stored[packed][:32].clone(), f"{SITE}.weight_shape": torch.tensor([32, 64])},
        "not-finite": {"model.norm.weight": torch.full((64,), torch.nan)},
    }
    broken = _changed_copy(healthy["compressed-tensors"], tmp_path / "broken", changes[kind])

    assert _errors(diagnose_checkpoint(tiny_llama_dir, broken, seqlen=64)) == {(kind, site)}


@pytest.mark.parametrize(
    ("scheme", "method"), [*HEALTHY, *(pytest.param(*each, marks=pytest.mark.slow) for each in MORE_HEALTHY)]
)
def test_a_healthy_checkpoint_has_no_error(
    scheme: str, method: str, tiny_llama_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    run = _quantize(tiny_llama_dir, tmp_path / "run", text_file, scheme, method)

    found = diagnose_checkpoint(tiny_llama_dir, run, text=str(text_file), seqlen=64)

    assert found.num_errors == 0, [finding for finding in found.findings if finding.severity == "error"]
    kinds = {finding.kind for finding in found.findings}
    assert ("changed-basis" in kinds) == method.startswith("rotation")
    assert len(found.sites) == found.num_quantized
    assert len(found.depth) == 2


def test_folded_scales_are_found_and_undone(tiny_llama_dir: Path, text_file: Path, tmp_path: Path) -> None:
    run = _quantize(tiny_llama_dir, tmp_path / "run", text_file, "W8A8", "smoothquant")

    found = diagnose_checkpoint(tiny_llama_dir, run, text=str(text_file), seqlen=64)

    assert "folded-transform" in {finding.kind for finding in found.findings}
    folded = [site for site in found.sites if site.folded]
    assert folded
    for site in folded:
        assert site.weight_sqnr_db is not None
        assert site.expected_weight_sqnr_db is not None
        assert site.weight_sqnr_db > site.expected_weight_sqnr_db - 6.0


def test_a_fault_of_the_consumer_alone_is_not_taken_for_folding() -> None:
    torch.manual_seed(1)
    originals = {"up": torch.randn(8, 6), "down": torch.randn(5, 8)}
    edge = Edge(producer="up", kind="linear", rows=None, repeat=1, head_dim=None, consumers=("down",))
    scale = torch.rand(8) + 0.5
    both = {"up": originals["up"] * scale.unsqueeze(1), "down": originals["down"] / scale}
    alone = {"up": originals["up"], "down": originals["down"] / 9.0}

    folded = find_folding([edge], originals, both, lambda _: None)
    assert torch.allclose(folded.apply("up", originals["up"]), both["up"])
    assert torch.allclose(folded.apply("down", originals["down"]), both["down"])
    assert not find_folding([edge], originals, alone, lambda _: None).producers


def test_findings_are_sorted_by_severity_and_by_what_they_explain() -> None:
    def finding(severity: Severity, site: str, explained: float | None) -> Finding:
        return Finding(
            severity=severity, kind="weight-loss", site=site, what="", evidence="", remedy="", explained=explained
        )

    given = [
        finding("note", "a", 1.0),
        finding("error", "b", 0.1),
        finding("warning", "c", None),
        finding("error", "d", 0.7),
    ]
    assert [each.site for each in worst_first(given)] == ["d", "b", "c", "a"]


def test_the_command_prints_findings_and_exits_1_on_an_error(
    healthy: dict[str, Path], tiny_llama_dir: Path, tmp_path: Path
) -> None:
    app = typer.Typer()
    app.command()(diagnose)
    breaker.plant(healthy["compressed-tensors"], "nan-scale", tmp_path / "broken", site=SITE)
    run = CliRunner().invoke

    good = run(app, [str(tiny_llama_dir), str(healthy["compressed-tensors"]), "--seqlen", "32"])
    bad = run(app, [str(tiny_llama_dir), str(tmp_path / "broken"), "--seqlen", "32"])
    plain = run(app, [str(tiny_llama_dir), str(tmp_path / "broken"), "--seqlen", "32", "--json"])

    assert good.exit_code == 0, good.output
    assert "no errors" in good.output
    assert bad.exit_code == 1
    assert f"nan-scale {SITE}" in bad.output
    assert plain.exit_code == 1
    assert json.loads(plain.output)["findings"][0]["site"] == SITE


def test_the_script_plants_and_says_where(
    healthy: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [str(healthy["compressed-tensors"]), "nan-scale", str(tmp_path / "broken")]
    monkeypatch.setattr(sys, "argv", ["break_checkpoint.py", *given])
    breaker.main()
    assert "nan-scale in model.layers." in capsys.readouterr().out


def test_models_that_do_not_belong_together_are_refused(healthy: dict[str, Path], tiny_llama_dir: Path) -> None:
    with pytest.raises(CheckpointError, match="not quantized"):
        diagnose_checkpoint(tiny_llama_dir, tiny_llama_dir)
    with pytest.raises(CheckpointError, match="already quantized"):
        diagnose_checkpoint(healthy["compressed-tensors"], healthy["compressed-tensors"])
    with pytest.raises(CheckpointError, match="num_hidden_layers is 2"):
        diagnose_checkpoint(demo_model(), healthy["compressed-tensors"])


def _with_tensors(healthy: Path, out: Path, added: dict[str, torch.Tensor], **settings: object) -> Path:
    """A copy with more tensors and other settings of the quantization."""
    _changed_copy(healthy, out, {})
    file = next(out.glob("*.safetensors"))
    save_file({**load_file(file), **added}, file)
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] |= settings
    (out / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return out


def test_an_activation_order_is_refused_once_and_not_taken_for_damage(
    healthy: dict[str, Path], tiny_llama_dir: Path, tmp_path: Path
) -> None:
    order = {f"{SITE}.weight_g_idx": torch.arange(64, dtype=torch.int32)}
    ordered = _with_tensors(healthy["compressed-tensors"], tmp_path / "ordered", order)

    with pytest.raises(CheckpointError, match=r"weight_g_idx.*activation order.*not supported") as error:
        diagnose_checkpoint(tiny_llama_dir, ordered, seqlen=64)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("is_declared", [True, False])
def test_scales_of_a_cache_belong_to_a_checkpoint_that_says_so(
    is_declared: bool, healthy: dict[str, Path], tiny_llama_dir: Path, tmp_path: Path
) -> None:
    attention = "model.layers.0.self_attn"
    scales = {f"{attention}.{name}": torch.ones(1) for name in ("k_scale", "v_scale")}
    scheme = {"num_bits": 8, "type": "float"} if is_declared else None
    cached = _with_tensors(healthy["compressed-tensors"], tmp_path / "cached", scales, kv_cache_scheme=scheme)

    kinds = {finding.kind for finding in diagnose_checkpoint(tiny_llama_dir, cached, seqlen=64).findings}

    assert ("extra-tensor" in kinds) != is_declared


@pytest.mark.parametrize(
    ("levels", "expected"),
    [
        ((30.0, 28.0, 9.0, 5.0), 2),
        ((12.0, 10.0, 9.0, 5.0), 0),
        ((None, 30.0, 29.0, 28.0), 1),
        ((None, None, None, None), None),
    ],
)
def test_the_first_block_to_diverge_is_where_the_error_of_the_hidden_state_begins(
    levels: tuple[float | None, ...], expected: int | None
) -> None:
    depth = [BlockDepth(block=str(i), hidden_sqnr_db=level, update_sqnr_db=1.0) for i, level in enumerate(levels)]
    found = first_to_diverge(depth)
    assert (None if found is None else int(found.block)) == expected


def test_the_first_block_to_diverge_is_named_in_words(
    healthy: dict[str, Path], tiny_llama_dir: Path, tmp_path: Path
) -> None:
    """The second block is broken and loses most; the first is healthy."""
    scale = f"{SITE}.weight_scale"
    stored = open_checkpoint(healthy["compressed-tensors"] / "4-model").read_stored([scale])[scale]
    broken = _changed_copy(healthy["compressed-tensors"], tmp_path / "broken", {scale: stored * 64})

    findings = diagnose_checkpoint(tiny_llama_dir, broken, seqlen=64).findings

    (found,) = (finding for finding in findings if finding.kind == "divergence")
    assert found.what.endswith("The hidden state diverges first after model.layers.1.")
