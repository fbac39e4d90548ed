"""Number formats on the command line: the list, and what is refused before any work."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from bitwright.demo import demo_model
from bitwright.schemes import FAMILIES, Scheme

Refuse = Callable[..., str]
Cli = Callable[..., tuple[int, str, str]]


def test_every_family_is_listed_with_what_a_reader_needs(cli: Cli) -> None:
    status, out, _ = cli("formats", "--json")
    rows = {row["scheme"]: row for row in json.loads(out)}
    assert status == 0
    assert set(FAMILIES) | {f"W{bits}A16" for bits in range(2, 9)} | {"W8A8"} <= set(rows)
    for name, row in rows.items():
        scheme = Scheme.parse(name)
        assert row["levels"] == scheme.weights.format.num_codes
        assert row["bits"] <= row["bits_per_weight"]
        assert all(row[key] for key in ("range", "granularities", "exports", "reference", "about"))
    assert rows["ternary"]["bits"] == 1.6
    assert rows["ternary"]["exports"] == ["bitwright"]
    assert rows["nvfp4-a16"]["exports"] == ["compressed-tensors (nvfp4-pack-quantized)", "bitwright"]
    assert rows["fp8"]["range"] == "-448 … 448"

    status, out, _ = cli("formats")
    assert status == 0
    assert all(name in out for name in rows)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--scheme", "W8A8-static-entropy"), ("calibrates its activations", "--calibration", "-dynamic")),
        (("--scheme", "nvfp4"), ("calibrates its activations", "-a16")),
        (("--scheme", "W8A8-static-foo"), ("unknown scheme 'W8A8-static-foo'", "bitwright formats")),
        (("--scheme", "W8A16-static"), ("leaves in 16 bit",)),
        (("--scheme", "kmeans4-o40"), ("outside (0, 5]",)),
        (("--scheme", "ternry"), ("Did you mean 'ternary'",)),
        (("--scheme", "nf4-b64-dq", "--layout", "compressed-tensors"), ("nf4-g64-dq", "layout bitwright")),
        (("--scheme", "fp8-e5m2", "--layout", "compressed-tensors"), ("fp8-e5m2", "layout bitwright")),
        (("--scheme", "W8A8-actg48", "--layout", "gguf"), ("layout", "gguf")),
        (("--scheme", "W4A16-g32", "--method", "lnq"), ("kmeans",)),
    ],
)
def test_a_scheme_that_cannot_be_is_refused_before_any_work(
    options: tuple[str, ...], says: tuple[str, ...], refuse: Refuse, out: Path
) -> None:
    method = () if "--method" in options else ("--method", "rtn")
    refuse("quantize", demo_model(), "--out", out, *options, *method, says=says)


def test_an_activation_format_that_the_export_cannot_carry_is_refused_before_any_work(
    refuse: Refuse, out: Path, text: Path
) -> None:
    refuse(
        "quantize", demo_model(), "--out", out, "--scheme", "W8A8-static-minmax-actg64", "--calibration", text,
        "--method", "rtn", "--layout", "compressed-tensors", says=("W8A8-channel-static-minmax-actg64", "bitwright"),
    )  # fmt: skip


def test_inspect_with_text_shows_outliers_and_advice(cli: Cli, tiny_llama_dir: Path, text: Path) -> None:
    options = ("--calibration", text, "--samples", "2", "--seqlen", "32")
    status, out, err = cli("inspect", tiny_llama_dir, *options, "--json")
    assert status == 0, err
    activity = json.loads(out)["activity"]
    assert {site for entry in activity for site in entry["sites"]} >= {"model.layers.0.self_attn.q_proj"}
    assert all(entry["advice"] for entry in activity)

    status, out, err = cli("inspect", tiny_llama_dir, *options)
    assert status == 0, err
    assert "what follows" in out


def test_inspect_refuses_a_window_longer_than_the_model(refuse: Refuse, tiny_llama_dir: Path, text: Path) -> None:
    refuse("inspect", tiny_llama_dir, "--calibration", text, "--seqlen", "100000", says=("positions",))


def test_a_test_bed_is_written_once(cli: Cli, refuse: Refuse, tiny_llama_dir: Path, out: Path) -> None:
    status, printed, err = cli("testbed", tiny_llama_dir, "--out", out, "--channels", "2", "--json")
    assert status == 0, err
    assert json.loads(printed)["factor"] == 64.0
    refuse("testbed", tiny_llama_dir, "--out", out, says=("not empty",))
