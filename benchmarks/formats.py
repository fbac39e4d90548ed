"""Every number format on one model: KL divergence, perplexity and bits per weight, and what they say about claims.

    python benchmarks/formats.py [--model DIR] [--text SOURCE] [--calibration SOURCE] [--data NAME] [--fresh]

Each cell is a scheme and a method: `rtn` rounds to nearest, with the scales of least squared error and no data;
`absmax` is the same with scales from the largest weight; `weighted` weights the squared error by the mean square of
the inputs on calibration text; `gptq` also compensates rounding errors. Every cell is quantized into a run of its own
and read back from disk. What the results' JSON file holds is not measured again unless `--fresh` is given: it does not
know whether the code has changed since.

For models that fit into memory beside their logits: those of the original are computed once and kept.
"""

import argparse
import hashlib
import json
import math
import re
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

from formats_page import write_page
from formats_rows import DATA_FREE, Row
from torch import Tensor

from bitwright.data.corpora import load_corpus
from bitwright.data.overlap import require_disjoint
from bitwright.data.windows import hash_tokens
from bitwright.demo import demo_model
from bitwright.errors import BitwrightError
from bitwright.evaluation.score import Scorer
from bitwright.evaluation.streamed import final_hidden
from bitwright.model.stream import StreamedModel
from bitwright.pipeline import quantize
from bitwright.preparation import model_sites, open_model, text_windows
from bitwright.progress import no_progress
from bitwright.recipe import Calibration, RangeMethod, Recipe
from bitwright.records import Environment, read_jsonl, write_json_atomic
from bitwright.runs import RunDirectory, model_directory
from bitwright.schemes import FAMILIES, Scheme

ROOT = Path(__file__).resolve().parents[1]
EVALUATION_WINDOWS, CALIBRATION_WINDOWS, SEQLEN = 16, 16, 512
MAX_OVERHEAD_BITS = 1.26
"""Scales and tables of more bits per weight make no sensible scheme."""
NEVER_FAILS = 1e6
METHODS: dict[str, tuple[str, RangeMethod]] = {
    "rtn": ("rtn", "mse"), "absmax": ("rtn", "minmax"), "weighted": ("rtn", "importance"),
    "gptq": ("gptq", "importance"),
}  # fmt: skip
# "base: granularities and options: methods"; "" stands for the base alone.
WEIGHT_CELLS = """
    W8A16: channel g32: rtn
    W8A16: channel: weighted
    W6A16: channel g64: rtn
    W5A16: channel g128 g64 g32: rtn
    W5A16: channel: gptq
    W4A16: tensor block128 block32 block16 channel g128 g64 g32 g16: rtn weighted
    W4A16: channel-asym g128-asym g64-asym: rtn weighted
    W4A16: g128 g64: absmax
    W4A16: channel g128 g64 g32 g128-asym: gptq
    W3A16: block32 channel g128 g64 g32 g16 g64-asym: rtn weighted
    W3A16: channel g64: gptq
    W2A16: block16 channel g128 g64 g32 g16 g32-asym: rtn weighted
    W2A16: g64 g32: gptq
    nf4: g64 g32 g64-dq g32-dq: rtn absmax weighted
    nf4: g64-dq: gptq
    nf3 nf2: g64 g32-dq: rtn
    nf3 nf2: g64-dq: rtn weighted
    fp4-bnb: g64 g64-dq: rtn absmax
    fp4-e2m1: g128 g64 g32 g16: rtn
    fp6-e2m3 fp6-e3m2: channel g32: rtn
    fp8: a16: rtn weighted
    fp8-e5m2 mxfp6 mxint8: a16: rtn
    mxfp4 mxfp8 nvfp4: a16: rtn weighted
    lloyd4-gaussian lloyd4-laplace lloyd3-gaussian lloyd3-laplace lloyd2-gaussian lloyd2-laplace: g64: rtn
    lloyd4-gaussian: g128 g64-dq: rtn
    lut4: g128 g64 g32 g64-dq g32-dq: rtn weighted
    lut4: g128 g64: gptq
    lut3 lut2: g128 g64 g64-dq g32-dq: rtn weighted
    kmeans4: tensor block128 block64 block32 channel block64-o0.45 channel-o0.45: rtn weighted
    kmeans4: block64 channel: gptq
    kmeans3: tensor block32 channel block32-o0.45: rtn weighted
    kmeans2: tensor block16 channel block16-o0.45: rtn weighted
    ternary binary: channel g128 g64: rtn
    ternary binary: g64: weighted
"""
# All with the weights of `weighted`, so that only the activations differ.
ACTIVATION_SCHEMES = (
    "W8A8", "W8A8-acttensor", "W8A8-actasym", "W8A8-static-minmax", "W8A8-static-average", "W8A8-static-percentile",
    "W8A8-static-entropy", "W8A8-static-mse", "W4A8-g128", "W4A8-g64", "W4A4-g128", "W4A4-g64", "fp8", "fp8-static",
    "mxfp8", "nvfp4", "mxfp4",
)  # fmt: skip
KINDS = {
    ("kmeans", "lut"): "learned table", ("fp4-e2m1", "fp6", "fp8"): "float", ("mx", "nvfp4"): "block-scaled",
    ("ternary", "binary"): "1 to 1.6 bits",
}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=demo_model(), help="model directory")
    parser.add_argument("--text", default="stdlib:heldout", help="what is evaluated on")
    parser.add_argument("--calibration", default="stdlib", help="what is calibrated on")
    parser.add_argument("--data", help="name of the text in the results")
    parser.add_argument("--only", default="", help="regular expression that a cell's 'scheme method' must contain")
    parser.add_argument("--fresh", action="store_true", help="measure again what is known")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    given = parser.parse_args()
    path = given.out / f"formats_{given.model.name}_{date.today().isoformat()}.json"
    with tempfile.TemporaryDirectory(prefix="bitwright-") as folder:
        bench = Bench(given.model, given.text, given.calibration, Path(folder))
        data = given.data or f"calibration on {given.calibration}, evaluation on {given.text}"
        options = "" if given.model == demo_model() else " --model DIR --text FILE --calibration FILE"
        description = {**bench.description(data), "command": f"python benchmarks/formats.py{options}"}
        known = read_rows(path) if path.is_file() else {}
        if given.fresh:
            known = {key: row for key, row in known.items() if not re.search(given.only, f"{row.scheme} {row.method}")}
        rows, failures = fill(bench, known, given.only, path, description)
    print(f"written: {write_page(description, rows, failures, path.with_suffix('.md'))}")
    return int(bool(failures))


def fill(
    bench: "Bench", known: dict[str, Row], only: str, path: Path, description: dict[str, Any]
) -> tuple[list[Row], dict[str, str]]:
    """Measure what is not known yet; keep the file up to date after every cell. Return rows and what went wrong."""
    failures: dict[str, str] = {}
    cells = {bench.key(scheme, method): (scheme, method) for scheme, method in bench.cells()}

    def rows() -> list[Row]:
        return [known[key] for key in cells if key in known]

    for number, (key, (scheme, method)) in enumerate(cells.items(), start=1):
        name = f"{scheme} {method}"
        if key in known or not re.search(only, name):
            continue
        start = time.perf_counter()
        try:
            row = bench.measure(scheme, method)
        except BitwrightError as error:
            failures[name] = f"{type(error).__name__}: {error}"
            print(name, failures[name], flush=True)
            continue
        known[key] = row
        write_json_atomic(path, {**description, "rows": [each.to_mapping() for each in rows()]})
        seconds = time.perf_counter() - start
        print(f"{number}/{len(cells)} {name}: {row.bits:.3f} bits, KL {row.kl_mean:.5f}, {seconds:.0f} s", flush=True)
    return rows(), failures


def read_rows(path: Path) -> dict[str, Row]:
    rows = [Row.from_mapping(each) for each in json.loads(path.read_text(encoding="utf-8"))["rows"]]
    return {row.key: row for row in rows}


class Bench:
    """One model and its two texts. Shapes: N windows, T tokens, V vocabulary."""

    def __init__(self, model: Path, text: str, calibration: str, work: Path) -> None:
        self.model, self.calibration, self.work = model, calibration, work
        opened = open_model(model, device="cpu", dtype="float32", trust_remote_code=False)
        self.checkpoint, self.sites = opened.skeleton.checkpoint, model_sites(opened)
        every = text_windows(opened, text, SEQLEN, trust_remote_code=False)
        # Evenly spread, because neighbouring windows come from one document.
        self.windows = every[:: max(1, len(every) // EVALUATION_WINDOWS)][:EVALUATION_WINDOWS]
        seen = text_windows(opened, calibration, SEQLEN, trust_remote_code=False)
        require_disjoint(seen, self.windows, calibration_source=calibration, evaluation_source=text)
        self.model_hash = self.checkpoint.audit()
        self.data_hash = hash_tokens(self.windows)
        self.calibration_hash = load_corpus(calibration).data_hash
        self.reference = list(self._logits(opened))

    def cells(self) -> Iterator[tuple[Scheme, str]]:
        """Every scheme that suits the model's shapes, with every method asked for."""
        asked = [(name, method) for name, method in listed(WEIGHT_CELLS)]
        asked += [(name, "weighted") for name in ACTIVATION_SCHEMES]
        done: set[tuple[str, str]] = set()
        for name, method in asked:
            scheme = Scheme.parse(name)
            if (str(scheme), method) not in done and self._suits(scheme):
                done.add((str(scheme), method))
                yield scheme, method

    def _suits(self, scheme: Scheme) -> bool:
        """Whether groups fit into every row, and scales and tables stay small beside the codes."""
        size = scheme.weights.granularity.group_size or 1
        shapes = [(site.out_features, site.in_features) for site in self.sites]
        float_bits = self.checkpoint.dense_dtype.itemsize * 8
        num_bits = sum(scheme.weights.num_bits(*shape, float_bits=float_bits) for shape in shapes)
        overhead = num_bits / sum(math.prod(shape) for shape in shapes) - scheme.weights.format.bits
        return size <= min(columns for _, columns in shapes) and overhead <= MAX_OVERHEAD_BITS

    def key(self, scheme: Scheme, method: str) -> str:
        """What a measurement depends on."""
        calibration = "" if method in DATA_FREE else f"{self.calibration_hash} {CALIBRATION_WINDOWS} x {SEQLEN}"
        parts = (str(scheme), method, self.model_hash, self.data_hash, calibration)
        return hashlib.sha256("|".join(parts).encode()).hexdigest()[:16]

    def measure(self, scheme: Scheme, method: str) -> Row:
        solver, range_method = METHODS[method]
        text = None if method in DATA_FREE else self.calibration
        calibration = Calibration(text=text, num_samples=CALIBRATION_WINDOWS, seqlen=SEQLEN)
        recipe = Recipe(
            scheme=scheme, method=solver, range_method=range_method, calibration=calibration, max_kl=NEVER_FAILS
        )
        run = self.work / "run"
        quantize(self.model, recipe, run, fresh=True)
        sites = [each for each in read_jsonl(RunDirectory(run).records) if each["kind"] == "site"]
        quantized = open_model(model_directory(run), device="cpu", dtype="float32", trust_remote_code=False)
        scores = self._scores(self._logits(quantized))
        return Row(
            key=self.key(scheme, method), scheme=str(scheme), method=method, plain=plain_name(scheme),
            family=family(scheme), code_bits=scheme.weights.format.bits, bits=_mean_over(sites, "bits_per_weight"),
            ideal_bits=_mean_over(sites, "ideal_bits_per_weight"), nll=tuple(nll for nll, _ in scores),
            kl=tuple(kl for _, kl in scores),
        )  # fmt: skip

    def description(self, data: str) -> dict[str, Any]:
        """What the rows have in common."""
        return {
            "date": date.today().isoformat(),
            "model": self.model.name,
            "model_hash": self.model_hash,
            "num_quantized_weights": sum(site.out_features * site.in_features for site in self.sites),
            "stored_dtype": str(self.checkpoint.dense_dtype).removeprefix("torch."),
            "row_lengths": sorted({site.in_features for site in self.sites}),
            "data": data,
            "evaluation": {"windows": len(self.windows), "seqlen": SEQLEN, "data_hash": self.data_hash},
            "calibration": {
                "windows": CALIBRATION_WINDOWS, "seqlen": SEQLEN, "text_hash": self.calibration_hash,
            },
            "environment": Environment.capture().to_mapping(),
            "reference_nll": [nll for nll, _ in self._scores(self.reference)],
        }  # fmt: skip

    def _logits(self, model: StreamedModel) -> Iterator[Tensor]:
        """Yield the logits [T, V] of each window."""
        hidden = final_hidden(model, self.windows, self.work / "hidden.bin", no_progress, "evaluate")
        with model.outside():
            for index in range(len(self.windows)):
                yield model.leave(self.windows[index : index + 1], hidden.read(index, index + 1, model.device))[0]
        hidden.delete()

    def _scores(self, logits: Iterable[Tensor]) -> list[tuple[float, float]]:
        """Of each window, the mean negative log-likelihood and the KL from the reference."""
        scores: list[tuple[float, float]] = []
        for ids, ours, reference in zip(self.windows, logits, self.reference, strict=True):
            scorer = Scorer()
            scorer.add(ids, ours, reference)
            score = scorer.result()
            assert score.kl_mean is not None
            scores.append((math.log(score.perplexity), score.kl_mean))
        return scores


def listed(cells: str) -> Iterator[tuple[str, str]]:
    """Yield scheme and method of each cell of a table such as WEIGHT_CELLS."""
    for line in cells.strip().splitlines():
        bases, variants, methods = (part.split() for part in line.split(":"))
        for base in bases:
            for variant in variants or [""]:
                yield from ((f"{base}-{variant}".rstrip("-"), method) for method in methods)


def plain_name(scheme: Scheme) -> str | None:
    """The scheme with the same weights and 16-bit activations; None if it is that itself."""
    if scheme.activations is None:
        return None
    base = scheme.base if scheme.base in FAMILIES else re.sub(r"A\d+$", "A16", scheme.base)
    return str(replace(scheme, base=base, activations=None))


def family(scheme: Scheme) -> str:
    """The kind of format."""
    if scheme.base not in FAMILIES:
        return "integer"
    return next((kind for prefixes, kind in KINDS.items() if scheme.base.startswith(prefixes)), "fixed table")


def _mean_over(sites: Sequence[dict[str, Any]], name: str) -> float:
    return sum(site[name] * site["num_weights"] for site in sites) / sum(site["num_weights"] for site in sites)


if __name__ == "__main__":
    sys.exit(main())
