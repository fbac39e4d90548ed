"""A run directory written by hand: what bitwright records, without torch or a model."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy
import pytest
from safetensors.numpy import save_file

from bitwright import demo
from bitwright.progress import no_progress

RESULTS = {
    "kl_mean": 0.0521,
    "kl_stderr": 0.0043,
    "kl_p99": 0.731,
    "kl_p999": 1.62,
    "same_top1": 0.8912,
    "perplexity": 6.575,
    "reference_perplexity": 6.033,
    "gate_tokens": 2040,
    "bits_per_weight": 4.137,
    "ideal_bits_per_weight": 3.912,
    "model_bits_per_parameter": 6.25,
    "size_bytes": 2_750_000,
    "original_size_bytes": 11_000_000,
    "num_quantized": 4,
    "num_kept": 1,
    "quantized_weights": 65536,
    "num_parameters": 70000,
    "seconds": 95.0,
    "peak_memory_bytes": 573_775_872,
}
RECIPE = {
    "scheme": "W4A16-g128",
    "method": "gptq",
    "rules": [{"pattern": "*.down_proj", "scheme": "W8A16-channel", "method": None}],
    "ignore": ["lm_head"],
    "range_method": "auto",
    "gptq": {"damp": 0.01, "block": 128, "act_order": True},
    "calibration": {"text": "notes.txt", "num_samples": 32, "seqlen": 256, "seed": 7},
    "max_kl": 0.5,
}
CONTEXT = {
    "kind": "context",
    "device": "cpu",
    "dtype": "bfloat16",
    "environment": {"python": "3.11.7", "cpu": "Example CPU", "num_cores": 2, "versions": {"torch": "2.13.0"}},
}
EVALUATION = {
    "kind": "evaluate",
    "text": "heldout.txt",
    "reference": "models/original",
    "seqlen": 512,
    "num_windows": 40,
    "num_tokens": 20440,
    "perplexity": 10.876,
    "perplexity_stderr": 0.449,
    "kl_mean": 0.0837,
    "kl_stderr": 0.0065,
    "kl_p99": 1.39,
    "kl_p999": 2.79,
    "same_top1": 0.7634,
}
EXPORT = {
    "kind": "export",
    "to": "compressed-tensors",
    "out": "exported",
    "engine": "transformers",
    "weights_compared": 45,
    "max_logit_difference": 0.0,
    "logit_bound": 0.00016,
}


class ExampleRun:
    """Records as bitwright writes them, and a run directory made of them."""

    results, recipe, context = RESULTS, RECIPE, CONTEXT

    def __init__(self, path: Path) -> None:
        self.path = path

    def site(self, name: str, *, block: str, **changes: Any) -> dict[str, Any]:
        record = {
            "kind": "site",
            "block": block,
            "site": name,
            "scheme": "W4A16-g128",
            "method": "gptq",
            "bits_per_weight": 4.125,
            "num_weights": 16384,
            "weight_sqnr_db": 20.5,
            "output_sqnr_db": 23.5,
            "ideal_bits_per_weight": 3.9,
            "saturated": 0.061,
            "num_tokens": 8192,
            "reason": "recipe",
        }
        return {**record, **changes}

    def block(self, name: str, **changes: Any) -> dict[str, Any]:
        return {"kind": "block", "block": name, "seconds": 2.5, "hidden_sqnr_db": 19.7, **changes}

    def speed(self, of: str, *, rate: float, spread: float = 1.0, **figures: float) -> dict[str, Any]:
        """What `bitwright speed` records of one model; `spread` is the distance of the slowest and fastest decoding."""
        details = {"prompt_tokens": 128, "new_tokens": 64, "dtype": "bfloat16", "num_threads": 2}
        ends = {"slowest": rate - spread, "fastest": rate + spread}
        values = {"decode_tokens_per_s": rate, "memory_bytes": 50_000_000, **figures}
        measured = [
            {"name": name, "value": value, "device": "cpu", "details": details | (ends if value == rate else {})}
            for name, value in values.items()
        ]
        return {"kind": "speed", "of": of, "model": of, "energy_note": "rapl:package-0", "measurements": measured}

    def records(self) -> list[dict[str, Any]]:
        """Two blocks: one site of four by a rule, one by another method, one more kept in 16 bit."""
        first, second = "model.layers.0", "model.layers.1"
        unreached = "no calibration token reached this expert, so it was rounded to nearest"
        return [
            CONTEXT,
            {"kind": "quantize", **RESULTS},
            self.block(first),
            self.site(f"{first}.q_proj", block=first),
            self.site(f"{first}.down_proj", block=first, output_sqnr_db=40.26, reason="rule '*.down_proj'"),
            self.block(second, hidden_sqnr_db=14.2),
            self.site(f"{second}.q_proj", block=second, output_sqnr_db=11.75),
            self.site(
                f"{second}.experts[3]", block=second, method="rtn", output_sqnr_db=None, num_tokens=0, reason=unreached
            ),
            {"kind": "kept", "site": f"{second}.gate", "reason": "ignored by pattern '*.gate'"},
            EVALUATION,
            EXPORT,
        ]

    def everything(self) -> list[dict[str, Any]]:
        """Every kind of record that a report knows."""
        first, second = "model.layers.0", "model.layers.1"
        histogram = {"kind": "histogram", "low": -1.0, "high": 1.0, "levels": [-0.5, 0.0, 0.5]}
        trial = {"kind": "auto", "block": first, "solvers": {}, "error": None, "refused": None}
        mixed = {"solvers": {f"{first}.q_proj": "rtn"}, "composition": "gptq"}
        sensitivity = {"kind": "sensitivity", "scheme": "W4A16-g128", "score": "fisher"}
        repair = {"kind": "repair", "from": "W4A16-g128", "to": "W8A16-channel"}
        mixes = [
            {"size_bytes": size, "average_bits": bits, "predicted_loss": loss}
            for size, bits, loss in ((2_000_000, 3.1, 0.4), (2_750_000, 4.137, 0.04), (11_000_000, 16.0, 0.0))
        ]
        chosen = "auto: gptq with gptq leaves error 0.012 here, gptq 0.012"
        return [
            *self.records(),
            self.site(f"{second}.o_proj", block=second, output_sqnr_db=9.5, reason=chosen),
            {**histogram, "site": f"{first}.q_proj", "counts": [1, 2, 60, 1]},
            {**histogram, "site": f"{second}.o_proj", "counts": [5, 9, 9, 5], "levels": None},
            {**trial, "composition": "gptq", "error": 0.012},
            {**trial, "composition": "gptq", "block": second, "error": 0.022},
            {**trial, "composition": "awq+gptq", "error": 0.015},
            {**trial, "composition": "awq+gptq", "block": second, "error": 0.025},
            {**trial, "composition": "lnq", "block": "", "refused": "it learns tables"},
            {**trial, **mixed, "error": 0.011},
            {**trial, **mixed, "block": second, "error": 0.023},
            {**sensitivity, "site": f"{first}.q_proj", "value": 0.0125},
            {**sensitivity, "site": f"{second}.q_proj", "value": 0.375},
            {**repair, "step": 1, "site": f"{second}.o_proj", "kl_before": 0.8, "kl_after": 0.2},
            {"kind": "generation", "prompt": "Once", "before": " upon a time", "after": " upon a hill"},
            {"kind": "generation", "prompt": "Twice", "before": " over", "after": " over"},
            {"kind": "search", **mixes[1], "measured_loss": 0.05, "frontier": mixes},
            self.speed("original", rate=43.0, weight_bytes=11_000_000, decode_j_per_token=1.5),
            self.speed("result", rate=21.5, weight_bytes=2_800_000, decode_j_per_token=0.75),
            {"kind": "transform", "transform": "awq", "block": first, "what": "scaled", "invariance": 1e-6},
            {"kind": "training", "method": "qat", "loss": "kl", "kl_before": 0.04, "kl_mean": 0.03},
            {"kind": "training_step", "step": 1, "loss": 0.045, "learning_rate": 0.001},
            {"kind": "training_step", "step": 2, "loss": 0.031, "learning_rate": 0.0005},
            {"kind": "merge", "how": "requantize", "kl_mean": 0.01, "perplexity_before": 6.5, "perplexity": 6.6},
        ]

    def write_statistics(self) -> None:
        """Mean squares of one group of sites, whose channel 2 is nine times as loud as the others."""
        first = "model.layers.0"
        mean_square = numpy.ones(8, dtype=numpy.float32)
        mean_square[2] = 81.0
        save_file({f"{first}.q_proj.mean_square": mean_square}, self.path / "2-stats.safetensors")
        groups = [{"sites": [f"{first}.q_proj", f"{first}.down_proj"]}]
        structure = {"blocks": [{"name": first, "groups": groups}]}
        (self.path / "1-structure.json").write_text(json.dumps(structure), encoding="utf-8")

    def write(
        self,
        *,
        results: Mapping[str, Any] = RESULTS,
        records: Sequence[Mapping[str, Any]] | None = None,
        failure: str | None = None,
        recipe: Mapping[str, Any] = RECIPE,
    ) -> Path:
        """Write the run directory; the arguments replace what it holds by default."""
        self.path.mkdir()
        asked = {"model": "models/tiny-llama", "recipe": recipe, "model_hash": "ab12" * 16, "data_hash": "cd34" * 16}
        info = {"fingerprint": "f", "asked": asked, "complete": True, "failure": failure, "results": results}
        (self.path / "run.json").write_text(json.dumps(info), encoding="utf-8")
        lines = [json.dumps(record) + "\n" for record in (self.records() if records is None else records)]
        (self.path / "5-records.jsonl").write_text("".join(lines), encoding="utf-8")
        return self.path


@pytest.fixture
def example(tmp_path: Path) -> ExampleRun:
    return ExampleRun(tmp_path / "run")


@pytest.fixture(scope="session")
def example_class() -> type[ExampleRun]:
    """For fixtures that write runs of their own."""
    return ExampleRun


@pytest.fixture(scope="session")
def demo_pages(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The demo as `bitwright demo` makes it, in one of its configurations: its page, and the report of its run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "CONFIGURATIONS", demo.CONFIGURATIONS[2:3])
        patch.setattr(demo, "EVALUATION_WINDOWS", 1)
        rows, page = demo.run_demo(tmp_path_factory.mktemp("demo"), no_progress)
    report = rows[-1].report
    assert report is not None
    return page, page.parent / report
