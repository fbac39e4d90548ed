"""Every scheme, from its name to an evaluated model: quantize the demo model, save, reload, compare."""

from pathlib import Path

import pytest

import bitwright
from bitwright.demo import demo_model
from bitwright.model.checkpoint import open_checkpoint
from bitwright.recipe import Calibration, Recipe
from bitwright.schemes import FAMILIES, Scheme

# What may be lost, in nats per token: a bound on nonsense, far above what any of these loses. Ternary and binary codes
# without training lose most of a model, but less than a uniform guess over its 2048 tokens (about 4.5 nats) would.
LARGEST_KL = {8: 0.1, 7: 0.1, 6: 0.1, 5: 0.2, 4: 0.5, 3: 1.5, 2: 5.0, 1: 5.0}
SCHEMES = (
    "W8A16", "W4A16", "W4A16-asym", "W3A16", "W2A16", "W8A8", "W8A8-static-entropy", "W4A8", "nf4-b64-dq",
    "kmeans4-g128", "nvfp4-a16", "fp8", "mxfp4", "nf4", "ternary", "binary",
)  # fmt: skip
MORE_SCHEMES = (
    *(name for name in FAMILIES if name not in SCHEMES),
    "W7A16", "W6A16", "W5A16", "W4A16-g32", "W4A16-tensor", "W4A16-block32",
    *(f"W8A8-static-{name}" for name in ("minmax", "average", "percentile", "mse")), "W8A8-acttensor",
    "W8A8-static-actasym", "W8A8-static-actg64", "W4A8-asym", "W4A16-g64-floatzero", "W4A4-actg64", "fp8-static",
    "fp8-block128", "fp8-tensor-a16", "fp4-bnb-dq", "lut4-g64-dq", "kmeans4-channel-o0.45", "kmeans3-tensor",
    "ternary-channel", "binary-tensor", "mxfp4-a16",
)  # fmt: skip


@pytest.mark.parametrize("name", [*SCHEMES, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE_SCHEMES)])
def test_a_scheme_quantizes_saves_reloads_and_evaluates(name: str, tmp_path: Path) -> None:
    scheme = Scheme.parse(name)
    calibrates = scheme.activations is not None and scheme.activations.observer is not None
    calibration = Calibration(text="stdlib" if calibrates else None, num_samples=4, seqlen=128)
    recipe = Recipe(scheme=scheme, method="rtn", calibration=calibration, max_kl=100.0)

    result = bitwright.quantize(demo_model(), recipe, tmp_path / "run")
    score, _ = bitwright.evaluate(tmp_path / "run", "stdlib:heldout", reference=demo_model(), seqlen=128, max_windows=4)

    stored = open_checkpoint(tmp_path / "run" / "4-model")
    assert stored.is_packed
    assert stored.quantizes_inputs == (scheme.activations is not None)
    assert len(stored.packed_names()) == result.results["num_quantized"]
    expected = scheme.weights.num_bits(256, 256, float_bits=16) / 256**2
    assert result.results["bits_per_weight"] == pytest.approx(expected, rel=0.25)
    assert score.kl_mean is not None
    assert score.kl_mean < LARGEST_KL[int(scheme.weights.format.bits)]
