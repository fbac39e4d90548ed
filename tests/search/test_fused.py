"""Sites that an engine joins share a scheme, and a check finds those that do not."""

from pathlib import Path

import pytest
from transformers import MixtralConfig, MixtralForCausalLM

from bitwright.inspection import probe_streamed
from bitwright.model.checkpoint import open_checkpoint
from bitwright.model.stream import StreamedModel
from bitwright.model.structure import ModelStructure
from bitwright.progress import no_progress
from bitwright.schemes import Scheme
from bitwright.search.fused import config_group, export_violations, fused_sets, fusion_violations

Q4 = Scheme.parse("W4A16-g32")


@pytest.fixture(scope="module")
def structure(tiny_llama_dir: Path) -> ModelStructure:
    return probe_streamed(StreamedModel(open_checkpoint(tiny_llama_dir)), no_progress)


def test_sets_of_a_llama(structure: ModelStructure) -> None:
    sets = {tuple(sorted(name.rsplit(".", 1)[1] for name in names)) for names in fused_sets(structure)}
    assert sets == {("k_proj", "q_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)}


def test_sets_hold_every_site_of_a_mixture_once(tmp_path: Path) -> None:
    config = MixtralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=4, num_experts_per_tok=2, dtype="float32",
    )  # fmt: skip
    MixtralForCausalLM(config).save_pretrained(tmp_path)
    found = probe_streamed(StreamedModel(open_checkpoint(tmp_path)), no_progress)
    sets = fused_sets(found)
    names = [name for members in sets for name in members]
    assert sorted(names) == sorted(site.name for block in found.blocks for site in block.sites)
    experts = {site.name for site in found.blocks[0].sites if site.kind == "expert"}
    assert len(experts) == 8
    assert [set(members) for members in sets if experts & set(members)] == [experts]


def test_plans_that_differ_inside_a_set(structure: ModelStructure) -> None:
    sets = fused_sets(structure)
    whole: dict[str, Scheme | None] = {name: Q4 for names in sets for name in names}
    assert fusion_violations(whole, sets) == ()
    odd = next(name for name in whole if name.endswith("k_proj"))
    (found,) = fusion_violations({**whole, odd: None}, sets)
    assert found.parts[odd] is None
    assert "16 bit and W4A16-g32" in str(found)


def _config(groups: dict[str, list[str]], ignore: tuple[str, ...] = ()) -> dict[str, object]:
    entries = {name: {"targets": targets} for name, targets in groups.items()}
    return {"quantization_config": {"config_groups": entries, "ignore": list(ignore)}}


def test_exports_are_read_as_the_engine_reads_them() -> None:
    modules = [f"m.0.attn.{leaf}" for leaf in ("q_proj", "k_proj", "v_proj", "o_proj")]
    modules += [f"m.0.mlp.{leaf}" for leaf in ("gate_proj", "up_proj", "down_proj")]
    assert export_violations(_config({"a": ["Linear"]}), modules) == ()
    (ignored,) = export_violations(_config({"a": ["Linear"]}, ("m.0.attn.q_proj",)), modules)
    assert ignored.parts["m.0.attn.q_proj"] is None
    named = _config({"a": modules[:2], "b": modules[2:]})
    (found,) = export_violations(named, modules)
    assert {found.parts[name] for name in modules[:3]} == {"a", "b"}
    joined = _config({"a": modules[:3], "b": modules[3:]})
    assert export_violations(joined, modules) == ()


def test_a_group_for_the_class_takes_a_joined_product_from_its_parts() -> None:
    modules = [f"m.0.attn.{leaf}" for leaf in ("q_proj", "k_proj", "v_proj")]
    config = _config({"a": modules, "b": ["Linear"]})
    assert {config_group(config["quantization_config"], name) for name in modules} == {"a"}  # type: ignore[arg-type]
    (found,) = export_violations(config, modules)
    assert found.parts["m.0.attn.qkv_proj"] == "b"


def test_experts_of_a_layer_share_one_scheme() -> None:
    modules = [f"m.0.mlp.experts.{i}.{leaf}" for i in range(2) for leaf in ("gate_proj", "up_proj", "down_proj")]
    down = [name for name in modules if "down" in name]
    config = _config({"a": [name for name in modules if name not in down], "b": down})
    (found,) = export_violations(config, modules)
    assert set(found.parts) == set(modules)
    pattern = _config({"a": [r"re:.*\.experts\.\d+\..*"]})
    assert export_violations(pattern, modules) == ()
