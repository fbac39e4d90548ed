"""Merging: three ways, what each loses on the written result, and what is refused."""

import json
import shutil
import sys
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from bitwright.adapter_run import ADAPTER, BASE, SITES, AdapterTask, train_adapter
from bitwright.cli.app import main
from bitwright.errors import CheckpointError, DataError, RecipeError, RunError
from bitwright.merging import RECORD, MergeResult, MergeTask, merge
from bitwright.model.checkpoint import open_checkpoint
from bitwright.pipeline import export, quantize
from bitwright.preparation import open_model
from bitwright.progress import no_progress
from bitwright.recipe import Calibration, Recipe
from bitwright.records import read_jsonl
from bitwright.runs import RUN_FILE, RunDirectory
from bitwright.schemes import Scheme
from bitwright.train.adapter_files import load_adapters, save_adapters
from bitwright.train.given_sites import GivenSites
from bitwright.train.heldout import score_in_memory
from bitwright.train.lora import LoraConfig, LoraLinear, add_adapters, attach
from bitwright.train.merged_weights import onto_base, onto_original
from bitwright.train.options import TrainingOptions
from bitwright.training_text import TrainingText

SEQLEN = 64
FLOAT_ZERO = "W4A16-g32-floatzero"
TRAINING = TrainingOptions(steps=3, batch=4, learning_rate=2e-2, warmup=0.0)
TARGETS = ("*.q_proj", "*.down_proj")
QUERY = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module", autouse=True)
def short_gate_text(text: Path) -> Iterator[None]:
    """Runs without calibration text tokenise little; what gates those is not what is tested here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bitwright.preparation.GATE_TEXT_WITHOUT_CALIBRATION", str(text))
        yield


@pytest.fixture(scope="module")
def text(tiny_text: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(tiny_text)
    return file


@pytest.fixture(scope="module")
def bf16_dir(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama in bfloat16."""
    folder = tmp_path_factory.mktemp("bf16") / "model"
    shutil.copytree(tiny_llama_dir, folder)
    LlamaForCausalLM.from_pretrained(tiny_llama_dir, dtype=torch.bfloat16).save_pretrained(folder)
    return folder


def train(model: Path, text: Path, out: Path, **changes: Any) -> Path:
    lora = LoraConfig(rank=4, targets=TARGETS)
    task = AdapterTask(text=TrainingText(data=str(text), seqlen=SEQLEN), training=TRAINING, lora=lora, **changes)
    return train_adapter(model, task, out).run


@pytest.fixture(scope="module")
def lora_run(bf16_dir: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(bf16_dir, text, tmp_path_factory.mktemp("lora") / "run")


@pytest.fixture(scope="module")
def qlora_run(bf16_dir: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(bf16_dir, text, tmp_path_factory.mktemp("qlora") / "run", scheme=Scheme.parse("W3A16-g32"))


@pytest.fixture(scope="module")
def group_run(bf16_dir: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(
        bf16_dir, text, tmp_path_factory.mktemp("group") / "run", scheme=Scheme.parse(FLOAT_ZERO), by_group=True
    )


def run_of(folder: Path, **changes: Any) -> Path:
    """Change what a run says it was asked."""
    info = json.loads((folder / RUN_FILE).read_text())
    (folder / RUN_FILE).write_text(json.dumps({**info, **changes}))
    return folder


def adapted(base: Path, adapter: Path) -> nn.Module:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    load_adapters(model, adapter)
    return model


def stored(folder: Path) -> dict[str, Tensor]:
    checkpoint = open_checkpoint(folder)
    return checkpoint.read(checkpoint.names)


def test_a_dense_merge_loses_one_rounding(lora_run: Path, bf16_dir: Path, tmp_path: Path) -> None:
    result = merge(lora_run, MergeTask(how="dense"), tmp_path / "out")

    model, found, original = adapted(bf16_dir, lora_run / ADAPTER), stored(tmp_path / "out"), stored(bf16_dir)
    changed = {name for name in found if not torch.equal(found[name], original[name])}
    adapters = {name: module for name, module in model.named_modules() if hasattr(module, "lora_a")}
    assert changed == {f"{name}.weight" for name in adapters}
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    for name, adapter in adapters.items():
        wanted = (adapter.base_weight() + adapter.delta()).detach()
        assert torch.equal(found[f"{name}.weight"], wanted.bfloat16())
    # What rounding moves, against what the adapter moves: a share of the unit squared, as divergence is quadratic.
    text = TrainingText(data=text_of(lora_run), seqlen=SEQLEN).draw(bf16_dir, trust_remote_code=False)
    _, heldout = text.read(lora_run, "cpu", no_progress)
    plain = AutoModelForCausalLM.from_pretrained(bf16_dir, dtype=torch.float32)
    assert 0 < result.record["kl_mean"] < 0.1 * score_in_memory(plain, heldout, reference=model).kl_mean  # pyright: ignore[reportOptionalOperand]
    assert result.record["perplexity_before"] == pytest.approx(score_in_memory(model, heldout).perplexity, rel=1e-6)
    assert json.loads((tmp_path / "out" / RECORD).read_text()) == result.record
    assert result.failure is None


def test_weights_stored_inputs_first_take_adapters_in(tmp_path: Path) -> None:
    config = GPT2Config(
        n_layer=2, n_embd=32, n_head=2, vocab_size=40, n_positions=32, bos_token_id=0, eos_token_id=1
    )  # fmt: skip
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    adapters = add_adapters(model, LoraConfig(rank=4))
    original = open_model(tmp_path, device="cpu", dtype="float32", trust_remote_code=False)
    for adapter in adapters.values():
        nn.init.normal_(adapter.lora_b)
    for found in (onto_base(model, original), onto_original(model, original)):
        for name, adapter in adapters.items():
            added = (adapter.scaling * (adapter.lora_b @ adapter.lora_a)).T
            assert torch.equal(found[f"{name}.weight"], adapter.weight + added), name


def text_of(run: Path) -> str:
    return json.loads((run / RUN_FILE).read_text())["asked"]["task"]["text"]["data"]


def test_an_adapter_belongs_to_the_weights_that_it_was_trained_on(
    qlora_run: Path, bf16_dir: Path, tmp_path: Path
) -> None:
    base = merge(qlora_run, MergeTask(how="dense"), tmp_path / "base")
    original = merge(qlora_run, MergeTask(how="dense", into="original"), tmp_path / "original")

    assert 0 < base.record["kl_mean"] < 0.1 * original.record["kl_mean"]
    model = adapted(qlora_run / BASE / "4-model", qlora_run / ADAPTER)
    query = model.get_submodule(QUERY)
    delta, dense = query.delta().detach(), query.base.site().dense(torch.float32)
    name = f"{QUERY}.weight"
    assert torch.equal(stored(tmp_path / "base")[name], (dense + delta).bfloat16())
    wanted = (stored(bf16_dir)[name].float() + delta).bfloat16()
    assert torch.equal(stored(tmp_path / "original")[name], wanted)
    # A packed layer without adapter is decoded, and left as it was in the original.
    key = "model.layers.0.self_attn.k_proj"
    decoded = model.get_submodule(key).site().dense(torch.float32).bfloat16()
    assert torch.equal(stored(tmp_path / "base")[f"{key}.weight"], decoded)
    assert torch.equal(stored(tmp_path / "original")[f"{key}.weight"], stored(bf16_dir)[f"{key}.weight"])


@pytest.fixture(scope="module")
def requantized(qlora_run: Path, tmp_path_factory: pytest.TempPathFactory) -> MergeResult:
    return merge(qlora_run, MergeTask(how="requantize"), tmp_path_factory.mktemp("requantized") / "out")


def test_requantized_with_the_scheme_of_the_base(requantized: MergeResult, qlora_run: Path) -> None:
    run = RunDirectory(requantized.out)
    assert run.info is not None
    assert run.info["complete"]
    recipe = run.info["asked"]["recipe"]
    assert (recipe["scheme"], recipe["method"]) == ("W3A16-g32", "gptq")
    assert recipe["calibration"]["text"] == text_of(qlora_run)
    assert open_checkpoint(run.model).is_packed
    assert read_jsonl(run.records)[-1] == requantized.record
    assert [entry.name for entry in run.path.parent.iterdir()] == ["out"]


def test_another_scheme_and_calibration_text(
    requantized: MergeResult, qlora_run: Path, tiny_text: str, tmp_path: Path
) -> None:
    other = tmp_path / "other.txt"
    other.write_text(tiny_text.upper())
    task = MergeTask(how="requantize", scheme=Scheme.parse("W8A16-g32"), calibration=str(other))
    result = merge(qlora_run, task, tmp_path / "out")
    info = RunDirectory(tmp_path / "out").info
    assert info is not None
    recipe = info["asked"]["recipe"]
    assert (recipe["scheme"], recipe["calibration"]["text"]) == ("W8A16-g32", str(other))
    assert 0 < result.record["kl_mean"] < requantized.record["kl_mean"]

    other.write_text(tiny_text + tiny_text)  # cut elsewhere, so that held-out windows are among those calibrated on
    with pytest.raises(DataError, match="held-out"):
        merge(qlora_run, task, tmp_path / "no")


def test_a_killed_merge_is_taken_up_and_a_failed_one_is_marked(
    requantized: MergeResult, qlora_run: Path, tmp_path: Path
) -> None:
    task, out = MergeTask(how="requantize", max_kl=1e-12), tmp_path / "out"

    def kill(what: str, done: int, total: int) -> None:
        if what == "quantize" and done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge(qlora_run, task, out, progress=kill)
    assert not RunDirectory(out).is_complete
    result = merge(qlora_run, task, out)
    assert result.record["kl_mean"] == requantized.record["kl_mean"]
    info = RunDirectory(out).info
    assert info is not None
    assert info["failure"] is not None
    assert result.failure == info["failure"]
    assert "above the gate of 1e-12" in info["failure"]


def test_a_fold_loses_nothing(
    group_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The layer with the adapter computes with the very zero points that are stored."""
    out = tmp_path / "out"
    assert command(monkeypatch, group_run, "--how", "fold", "--out", out, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    (record,) = (record for record in read_jsonl(RunDirectory(out).records) if record["kind"] == "merge")
    assert found == {"out": str(out), **record}

    # Both models do the same float32 operations; what is left is the rounding of the float64 sum of the divergence.
    assert record["kl_mean"] <= torch.finfo(torch.float64).eps * 320
    assert record["perplexity"] == record["perplexity_before"]
    results = json.loads((group_run / RUN_FILE).read_text())["results"]
    assert record["perplexity"] == pytest.approx(results["perplexity"], rel=1e-5)
    assert results["perplexity"] != results["perplexity_before"]
    base, folded = (open_checkpoint(RunDirectory(run).model) for run in (group_run / BASE, out))
    assert base.packed_names() == folded.packed_names()
    moved = set()
    for name in base.packed_names():
        before, after = base.read_packed(name).weight, folded.read_packed(name).weight
        assert torch.equal(before.codes, after.codes)
        assert torch.equal(before.grid.scale, after.grid.scale)
        if not torch.equal(before.grid.zero_point, after.grid.zero_point):
            moved.add(name)
    assert {name.split(".")[-2] for name in moved} == {"q_proj", "down_proj"}
    assert set(GivenSites(group_run / SITES).schemes) == {name.removesuffix(".weight") for name in base.packed_names()}
    assert not (group_run / ADAPTER).exists()


def test_adapters_beside_stacked_experts_fold(tiny_moe_dir: Path, text: Path, tmp_path: Path) -> None:
    lora = LoraConfig(rank=4, targets=("*.q_proj",))
    task = AdapterTask(
        text=TrainingText(data=str(text), seqlen=SEQLEN), training=replace(TRAINING, steps=1), lora=lora,
        scheme=Scheme.parse(FLOAT_ZERO), by_group=True,
    )  # fmt: skip
    run = train_adapter(tiny_moe_dir, task, tmp_path / "run").run
    assert merge(run, MergeTask(how="fold"), tmp_path / "out").failure is None
    packed = {
        base: set(open_checkpoint(RunDirectory(base).model).packed_names()) for base in (run / BASE, tmp_path / "out")
    }
    assert packed[run / BASE] == packed[tmp_path / "out"]


def test_group_adapters_merge_dense_too(group_run: Path, tmp_path: Path) -> None:
    merged = merge(group_run, MergeTask(how="dense"), tmp_path / "out").record
    assert 0 < merged["kl_mean"] < 1e-3
    wanted = GivenSites(group_run / SITES).read(QUERY).dense(torch.float32).bfloat16()
    assert torch.equal(stored(tmp_path / "out")[f"{QUERY}.weight"], wanted)


@pytest.fixture
def peft() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # at import, about other packages
        return pytest.importorskip("peft")


def bare(peft: Any, model: nn.Module, folder: Path, *targets: str) -> Path:
    """An adapter as the package peft leaves it, not at zero."""
    config = peft.LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", target_modules=list(targets))
    theirs = peft.get_peft_model(model, config)
    for name, parameter in theirs.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.05)
    theirs.save_pretrained(folder, save_embedding_layers=False)
    return folder


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_an_adapter_of_peft_merges_as_peft_merges_it(
    peft: Any, tiny_llama_dir: Path, text: Path, tmp_path: Path
) -> None:
    model = LlamaForCausalLM.from_pretrained(tiny_llama_dir)
    adapter = bare(peft, model, tmp_path / "adapter", "q_proj", "down_proj", "lm_head")
    theirs = peft.PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(tiny_llama_dir), str(adapter))
    task = MergeTask(how="dense", base=str(tiny_llama_dir), text=str(text), seqlen=SEQLEN)
    result = merge(adapter, task, tmp_path / "out")

    found = stored(tmp_path / "out")
    for name, wanted in theirs.merge_and_unload().state_dict().items():
        torch.testing.assert_close(found[name], wanted, rtol=2**-22, atol=2**-22)
    # Logits of float32 differ by 2^-24 of their terms; the divergence is quadratic in that.
    assert result.record["kl_mean"] < torch.finfo(torch.float32).eps ** 2 * 320 * 1024


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_an_adapter_of_peft_over_a_quantized_run(peft: Any, tiny_llama_dir: Path, text: Path, tmp_path: Path) -> None:
    recipe = Recipe(
        scheme=Scheme.parse("W4A16-g32"), method="rtn", layout="bitwright", calibration=Calibration(seqlen=SEQLEN)
    )
    base = quantize(tiny_llama_dir, recipe, tmp_path / "base").run
    adapter = bare(peft, LlamaForCausalLM.from_pretrained(tiny_llama_dir), tmp_path / "adapter", "q_proj")
    task = MergeTask(how="requantize", base=str(base), text=str(text), seqlen=SEQLEN)
    record = merge(adapter, task, tmp_path / "out").record
    assert (record["scheme"], record["original"]) == ("W4A16-g32", str(tiny_llama_dir))

    shutil.move(base / "4-model", tmp_path / "packed")
    moved = replace(task, base=str(tmp_path / "packed"), how="dense")
    record = merge(adapter, moved, tmp_path / "dense").record
    assert record["original"] == record["base"] == str(tmp_path / "packed")
    assert record["kl_mean"] < 1e-6
    assert set(stored(tmp_path / "dense")) == set(stored(tiny_llama_dir))
    assert "quantization_config" not in open_checkpoint(tmp_path / "dense").config
    with pytest.raises(RecipeError, match=r"nothing says what it was made from\. Leave --into out"):
        merge(adapter, replace(moved, into="original"), tmp_path / "no")
    compressed = quantize(tiny_llama_dir, replace(recipe, layout="compressed-tensors"), tmp_path / "other").run
    with pytest.raises(CheckpointError, match="packed in another layout"):
        merge(adapter, replace(task, base=str(compressed), how="dense"), tmp_path / "no")
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("how", ["dense", "requantize"])
def test_an_adapter_over_a_model_of_bitsandbytes(
    tiny_llama_dir: Path, text: Path, tmp_path: Path, how: Literal["dense", "requantize"]
) -> None:
    pytest.importorskip("bitsandbytes")
    recipe = Recipe(
        scheme=Scheme.parse("nf4-g64"), method="rtn", layout="bitwright", calibration=Calibration(seqlen=SEQLEN)
    )
    export(quantize(tiny_llama_dir, recipe, tmp_path / "base").run, "bitsandbytes", tmp_path / "packed", verify=False)
    run = train(tmp_path / "packed", text, tmp_path / "run")
    record = merge(run, MergeTask(how=how), tmp_path / "out").record
    assert record["scheme"] == (None if how == "dense" else "nf4-g64")
    assert how == "requantize" or record["kl_mean"] < 1e-6


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_an_adapter_of_another_base(
    peft: Any, tiny_llama_dir: Path, lora_run: Path, text: Path, tmp_path: Path
) -> None:
    config = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    other = LlamaForCausalLM(LlamaConfig(vocab_size=320, num_hidden_layers=3, **config))
    adapter = bare(peft, other, tmp_path / "adapter", "q_proj")
    task = MergeTask(how="dense", base=str(tiny_llama_dir), text=str(text), seqlen=SEQLEN)
    with pytest.raises(CheckpointError, match=r"adapts a weight \[32, 32\] at model\.layers\.0\.self_attn\.q_proj"):
        merge(adapter, task, tmp_path / "out")
    with pytest.raises(CheckpointError, match="was trained on other weights than those of"):
        merge(lora_run / ADAPTER, task, tmp_path / "out")
    with pytest.raises(CheckpointError, match="holds other weights than the model that"):
        merge(lora_run, MergeTask(how="dense", base=str(tiny_llama_dir)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_tied_head_takes_no_adapter(
    text: Path, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path, tiny_llama_dir: Path
) -> None:
    config = LlamaConfig.from_pretrained(tiny_llama_dir)
    config.tie_word_embeddings = True
    model = LlamaForCausalLM(config)
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    attach(model, ["lm_head"], lambda _, base: LoraLinear(base, LoraConfig(rank=4)))
    save_adapters(model, tmp_path / "adapter", base="some/base")
    task = MergeTask(how="dense", base=str(tmp_path / "model"), text=str(text), seqlen=SEQLEN)
    with pytest.raises(CheckpointError, match=r"^lm_head: its weight is another layer's too \(tied\)"):
        merge(tmp_path / "adapter", task, tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"how": "dense", "scheme": Scheme.parse("W8A16")}, "--how dense chooses no codes"),
        ({"how": "fold", "calibration": "text"}, "--how fold chooses no codes"),
        ({"how": "fold", "into": "original"}, "--how fold keeps the codes of the base"),
        ({"how": "dense", "max_kl": 0.0}, "--max-kl 0.0: must be a finite number above 0"),
    ],
)
def test_tasks_that_contradict_themselves(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        MergeTask(**options)


def test_what_cannot_be_merged(
    lora_run: Path, qlora_run: Path, tiny_llama_dir: Path, text: Path, tmp_path: Path
) -> None:
    dense, out = MergeTask(how="dense"), tmp_path / "out"
    adapter = lora_run / ADAPTER
    unfinished = run_of(Path(shutil.copytree(lora_run, tmp_path / "unfinished")), complete=False)
    quantized = run_of(Path(shutil.copytree(lora_run, tmp_path / "quantized")), asked={"recipe": {}})
    moved = Path(shutil.copytree(lora_run, tmp_path / "moved"))
    asked = json.loads((moved / RUN_FILE).read_text())["asked"]
    (tmp_path / "short.txt").write_text(text.read_text()[:30_000])
    asked["task"]["text"]["data"] = str(tmp_path / "short.txt")
    run_of(moved, asked=asked)
    cases: list[tuple[Path, MergeTask, type[Exception], str]] = [
        (unfinished, dense, RunError, "the training is not finished. Give the same bitwright train command again"),
        (quantized, dense, RunError, "not a run of bitwright train lora or qlora"),
        (tmp_path, dense, RunError, "neither a run of bitwright train lora or qlora nor"),
        (moved, dense, DataError, "is not the text of the training any more"),
        (adapter, replace(dense, text=str(text)), RecipeError, "a bare adapter. Give the model that it was trained on"),
        (adapter, replace(dense, base=str(tiny_llama_dir)), RecipeError, "Give --text"),
        (adapter, MergeTask(how="fold"), RecipeError, "a plain adapter does not fold into zero points"),
        (qlora_run, MergeTask(how="fold"), RecipeError, "a plain adapter does not fold into zero points"),
        (lora_run, MergeTask(how="requantize"), RecipeError, "it has no scheme to quantize in. Give --scheme"),
        (lora_run, replace(dense, seqlen=16), RecipeError, "its windows are cut already. Leave --seqlen out"),
        (lora_run, replace(dense, base="nowhere"), CheckpointError, "nowhere: no such directory"),
    ]
    for source, task, kind, message in cases:
        with pytest.raises(kind, match=message):
            merge(source, task, out)
    assert not out.exists()


def test_places_that_are_taken(lora_run: Path, qlora_run: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for out in (tmp_path, tmp_path / "file", lora_run):
        with pytest.raises(RunError, match=r"exists. Choose another --out"):
            merge(qlora_run, MergeTask(how="dense"), out)
    for out, message in (
        (tmp_path, "not empty and not a run directory"),
        (tmp_path / "file", "is a file"),
        (lora_run, "belongs to a run with another recipe"),
    ):
        with pytest.raises(RunError, match=message):
            merge(qlora_run, MergeTask(how="requantize"), out)


def command(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["bitwright", "merge", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        main()
    return int(stop.value.code or 0)


def test_the_command(
    group_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert command(monkeypatch, group_run, "--how", "dense", "--out", out, "--max-kl", "1e-12") == 1
    said = capsys.readouterr()
    assert said.out.startswith(f"{out}: dense; KL divergence from the model with its adapter ")
    assert "is above the gate of 1e-12" in said.err
    assert json.loads((out / RECORD).read_text())["failure"] in said.err
    assert stored(out)

    assert command(monkeypatch, group_run, "--how", "melt", "--out", out) == 2
    assert capsys.readouterr().err == "bitwright: --how melt: unknown. Use dense, requantize, fold.\n"
