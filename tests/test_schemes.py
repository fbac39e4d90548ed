"""The grammar of schemes: what every name means, that names are canonical, what is refused, and what weights cost."""

from itertools import permutations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bitwright.errors import RecipeError, UnknownName
from bitwright.numerics.fitting import fit
from bitwright.numerics.granularity import Granularity
from bitwright.numerics.grid import Grid
from bitwright.numerics.integer import IntegerFormat
from bitwright.numerics.outliers import split_outliers
from bitwright.numerics.qtensor import QTensor
from bitwright.numerics.ranges import store_scale
from bitwright.numerics.scale_formats import SCALE_FORMATS
from bitwright.schemes import COMMON_SCHEMES, FAMILIES, MODEL_SCALE, OBSERVER_NAMES, Scheme, WeightScheme, group

CHANNEL, TENSOR, TOKEN = Granularity(kind="channel"), Granularity(kind="tensor"), Granularity(kind="token")
ALL_BASES = (*FAMILIES, *(f"W{bits}A{acts}" for bits in range(2, 9) for acts in (16, *range(2, 9))))
FREE_ACTIVATIONS = tuple(
    base for base in ALL_BASES if (acts := Scheme.parse(base).activations) is not None and acts.scale == "float32"
)


EVERY_OPTION = (
    "channel", "tensor", "g64", "block32", "sym", "asym", "floatzero", "dq", "o0.45", "a16", "static", "dynamic",
    *OBSERVER_NAMES, "token", "acttensor", "actg64", "actsym", "actasym",
)  # fmt: skip


def parse(name: str) -> Scheme:
    return Scheme.parse(name)


# Bare names


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("acts", [16, *range(2, 9)])
def test_integers_of_every_width(bits: int, acts: int) -> None:
    scheme = parse(f"W{bits}A{acts}")
    assert scheme.weights == WeightScheme(
        format=IntegerFormat(bits=bits, symmetric=True), granularity=CHANNEL if bits == 8 else group(128)
    )
    if acts == 16:
        assert scheme.activations is None
        return
    assert scheme.activations is not None
    assert scheme.activations.format == IntegerFormat(bits=acts, symmetric=True, full_range=False)
    assert (scheme.activations.granularity, scheme.activations.observer) == (TOKEN, None)


# Name: weight format, group size (None: per row), scale, activations' format.
FAMILY_TABLE = {
    "fp8": ("fp8-e4m3", None, "model", "fp8-e4m3"),
    "fp8-e5m2": ("fp8-e5m2", None, "model", "fp8-e5m2"),
    "fp6-e2m3": ("fp6-e2m3", 32, "model", None),
    "fp6-e3m2": ("fp6-e3m2", 32, "model", None),
    "fp4-e2m1": ("fp4-e2m1", 32, "model", None),
    "mxfp8": ("fp8-e4m3", 32, "e8m0", "fp8-e4m3"),
    "mxfp6": ("fp6-e2m3", 32, "e8m0", "fp6-e2m3"),
    "mxfp4": ("fp4-e2m1", 32, "e8m0", "fp4-e2m1"),
    "mxint8": ("int8", 32, "e8m0-int8", "int8"),
    "nvfp4": ("fp4-e2m1", 16, "e4m3", "fp4-e2m1"),
    "nf4": ("nf4", 64, "float32", None),
    "nf3": ("nf3", 64, "model", None),
    "nf2": ("nf2", 64, "model", None),
    "fp4-bnb": ("fp4-bnb", 64, "float32", None),
    **{f"lloyd{b}-{d}": (f"lloyd{b}-{d}", 64, "model", None) for b in (2, 3, 4) for d in ("gaussian", "laplace")},
    **{f"kmeans{b}": (f"kmeans{b}", None, "model", None) for b in (2, 3, 4)},
    **{f"lut{b}": (f"lut{b}", 64, "model", None) for b in (2, 3, 4)},
    "ternary": ("ternary", 128, "model", None),
    "binary": ("binary", 128, "model", None),
}


def test_the_families_are_these() -> None:
    assert set(FAMILIES) == set(FAMILY_TABLE)
    assert all(FAMILIES[name].name == name and FAMILIES[name].reference and FAMILIES[name].about for name in FAMILIES)


@pytest.mark.parametrize("name", FAMILY_TABLE)
def test_a_bare_family_means_what_was_published(name: str) -> None:
    format, size, scale, acts = FAMILY_TABLE[name]
    scheme = parse(name)
    assert (scheme.base, scheme.weights.format.name, scheme.weights.scale) == (name, format, scale)
    assert scheme.weights.granularity == (CHANNEL if size is None else group(size))
    assert scheme.weights.outliers == 0
    assert (None if scheme.activations is None else scheme.activations.format.name) == acts
    assert parse(f"{name}-a16").activations is None


def test_group_scales_of_activations_are_those_of_the_weights() -> None:
    for name in ("mxfp8", "mxfp6", "mxfp4", "mxint8", "nvfp4"):
        scheme = parse(name)
        assert scheme.activations is not None
        assert (scheme.activations.scale, scheme.activations.granularity) == (
            scheme.weights.scale,
            scheme.weights.granularity,
        )
    nvfp4 = parse("nvfp4").activations
    assert nvfp4 is not None
    # The level above the groups is calibrated, the groups' scales are not.
    assert (nvfp4.observer, nvfp4.is_static) == ("minmax", False)


# Options


@pytest.mark.parametrize(
    ("option", "granularity"),
    [
        ("g32", group(32)),
        ("b64", group(64)),
        ("g1", group(1)),
        ("channel", CHANNEL),
        ("tensor", TENSOR),
        ("block64", Granularity(kind="block", group_size=64, block_rows=64)),
        ("block16x128", Granularity(kind="block", group_size=128, block_rows=16)),
    ],
)
def test_every_base_takes_every_weight_granularity(option: str, granularity: Granularity) -> None:
    for base in ALL_BASES:
        scheme = parse(f"{base}-{option}")
        assert scheme.weights.granularity == granularity
        assert scheme == parse(base).with_granularity(granularity)


def test_symmetry_dq_and_outliers() -> None:
    asymmetric = parse("W4A16-asym").weights.format
    assert asymmetric == IntegerFormat(bits=4, symmetric=False)
    floating = parse("W4A16-floatzero").weights.format
    assert floating == IntegerFormat(bits=4, symmetric=False, float_zero=True)
    assert parse("W4A16-sym") == parse("W4A16")
    assert parse("nf4-dq").weights.scale == parse("lut4-dq").weights.scale == "nested"
    assert parse("kmeans4-o0.45").weights.outliers == 0.0045
    assert parse("kmeans4-o5").weights.outliers == 0.05


def test_activation_options() -> None:
    def acts(name: str) -> tuple[Granularity, str | None, bool]:
        found = parse(name).activations
        assert found is not None
        assert found.is_static == (found.observer is not None)
        return found.granularity, found.observer, found.format.symmetric

    assert acts("W8A8-dynamic") == acts("W8A8-token") == acts("W8A8") == (TOKEN, None, True)
    assert acts("W8A8-acttensor") == (TENSOR, None, True)
    assert acts("W8A8-actg64") == (group(64), None, True)
    assert acts("W8A8-actasym") == (TOKEN, None, False)
    assert acts("W8A8-actsym") == (TOKEN, None, True)
    assert acts("W8A8-static") == acts("W8A8-static-mse") == acts("W8A8-mse") == (TENSOR, "mse", True)
    assert acts("W8A8-static-acttensor-actasym") == (TENSOR, "mse", False)
    for name in OBSERVER_NAMES:
        assert acts(f"fp8-static-{name}") == acts(f"fp8-{name}") == (TENSOR, name, True)
    assert acts("W8A8-static-actg64") == (Granularity(kind="columns", group_size=64), "mse", True)


# Canonical names


@st.composite
def names(draw: st.DrawFn) -> str:
    """A name that is no contradiction: a base and some of the options that it takes, in any order."""
    base = draw(st.sampled_from(ALL_BASES))
    scheme = parse(base)
    sizes = st.integers(1, 4096)
    options = [draw(st.sampled_from(["", "channel", "tensor", f"g{draw(sizes)}", f"b{draw(sizes)}"]))]
    if draw(st.booleans()):
        options = [draw(st.sampled_from([f"block{draw(sizes)}", f"block{draw(sizes)}x{draw(sizes)}"]))]
    format = scheme.weights.format
    if isinstance(format, IntegerFormat) and scheme.weights.scale == MODEL_SCALE:
        options.append(draw(st.sampled_from(["", "sym", "asym", "floatzero"])))
    elif format.name.startswith("kmeans"):
        hundredths = draw(st.integers(0, 500))
        options.append(f"o{hundredths / 100:.2f}" if hundredths else "")
    elif scheme.weights.scale in (MODEL_SCALE, "float32"):
        options.append(draw(st.sampled_from(["", "dq"])))
    if base in FAMILIES and draw(st.booleans()):
        options.append("a16")
    elif base in FREE_ACTIVATIONS:
        static = draw(st.booleans())
        size = f"actg{draw(sizes)}"
        if static:
            options += [draw(st.sampled_from(["static", ""])), draw(st.sampled_from(OBSERVER_NAMES))]
        else:
            options.append(draw(st.sampled_from(["", "dynamic"])))
        options.append(draw(st.sampled_from(["", "acttensor", size, *([] if static else ["token"])])))
        if base not in FAMILIES:
            options.append(draw(st.sampled_from(["", "actsym", "actasym"])))
    return "-".join([base, *draw(st.permutations([option for option in options if option]))])


@given(names())
def test_a_canonical_name_reads_back_to_the_same_scheme(name: str) -> None:
    scheme = parse(name)
    canonical = str(scheme)
    assert parse(canonical) == scheme
    assert str(parse(canonical)) == canonical


@pytest.mark.parametrize(
    ("name", "canonical"),
    [
        ("W4A16", "W4A16-g128"),
        ("W8A8-asym-g32", "W8A8-g32-asym"),
        ("W3A16-floatzero-b64", "W3A16-g64-floatzero"),
        ("nf4-dq-b64", "nf4-g64-dq"),
        ("mxfp4", "mxfp4-g32"),
        ("nvfp4-a16", "nvfp4-g16-a16"),
        ("fp4-e2m1-a16", "fp4-e2m1-g32"),
        ("fp8-e5m2-static-block128x64", "fp8-e5m2-block128x64-static-mse"),
        ("W4A8-block64x64", "W4A8-block64"),
        ("kmeans4-o0.450", "kmeans4-channel-o0.45"),
        ("kmeans4-o1.0", "kmeans4-channel-o1"),
        ("W8A8-mse-actasym", "W8A8-channel-static-mse-actasym"),
        ("W8A8-acttensor-dynamic", "W8A8-channel-acttensor"),
        ("W8A8-static-actg64", "W8A8-channel-static-mse-actg64"),
    ],
)
def test_canonical_names(name: str, canonical: str) -> None:
    assert str(parse(name)) == canonical


@pytest.mark.parametrize("percent", ["0.0000001", "0.05", "0.123456789", "1.25", "4.999999999", "5"])
def test_outliers_keep_every_digit(percent: str) -> None:
    scheme = parse(f"kmeans4-channel-o{percent}")
    assert scheme.weights.outliers == float(f"{percent}e-2")
    assert str(scheme) == f"kmeans4-channel-o{percent}"


@given(base=st.sampled_from(ALL_BASES), options=st.lists(st.sampled_from(EVERY_OPTION), min_size=2, max_size=3))
def test_the_order_of_the_options_means_nothing_and_excuses_nothing(base: str, options: list[str]) -> None:
    found: list[Scheme | None] = []
    for permuted in permutations(options):
        try:
            found.append(parse("-".join([base, *permuted])))
        except RecipeError:
            found.append(None)
    assert all(each == found[0] for each in found)


def test_common_names_are_read_and_distinct() -> None:
    assert len({parse(name) for name in COMMON_SCHEMES}) == len(COMMON_SCHEMES)


# Refusals


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("W1A16", "1 weight bits are out of range. Use 2 to 8."),
        ("W9A16", "9 weight bits are out of range. Use 2 to 8."),
        ("W16A16", "16 weight bits are out of range. Use 2 to 8."),
        ("W4A1", "1 activation bits are out of range. Use 2 to 8, or A16."),
        ("W4A12", "12 activation bits are out of range. Use 2 to 8, or A16."),
        ("W4A16-g64-channel", "two options say the granularity."),
        ("W4A16-g64-block64", "two options say the granularity."),
        ("W4A16-sym-asym", "two options say the symmetry."),
        ("W4A16-asym-floatzero", "two options say the symmetry."),
        ("nf4-floatzero", "only integers have a zero point; nf4 is symmetric as it is."),
        ("W4A16-floatzero-dq", "dq needs float scales and no zero point."),
        ("nf4-dq-dq", "two options say the dq."),
        ("kmeans4-o1-o2", "two options say the outliers."),
        ("fp8-a16-a16", "two options say the activations."),
        ("W8A8-mse-entropy", "two options say the observer."),
        ("W8A8-static-dynamic", "two options say the time."),
        ("W8A8-actsym-actasym", "two options say the activation symmetry."),
        ("W8A8-token-actg64", "two options say the activation granularity."),
        ("nf4-asym", "only integers have a zero point; nf4 is symmetric as it is."),
        ("fp8-sym", "only integers have a zero point; fp8-e4m3 is symmetric as it is."),
        ("fp8-actasym", "only integers have a zero point; fp8-e4m3 is symmetric as it is."),
        ("mxint8-asym", "'asym': the weights of this family have their scales prescribed."),
        ("mxint8-sym", "'sym': the weights of this family have their scales prescribed."),
        ("mxfp4-dq", "dq needs float scales and no zero point."),
        ("nvfp4-dq", "dq needs float scales and no zero point."),
        ("W4A16-asym-dq", "dq needs float scales and no zero point."),
        ("W4A16-dq", "dq stores unsigned scales, unlike those of integers and codebooks. Use nf4 or lut4."),
        ("kmeans4-dq", "dq stores unsigned scales, unlike those of integers and codebooks. Use nf4 or lut4."),
        ("nf4-o1", "outliers are kept beside codebooks only (kmeans4)."),
        ("lut4-o1", "outliers are kept beside codebooks only (kmeans4)."),
        ("kmeans4-o0", "outliers: 0 % is outside (0, 5]. Published values are 0.05 to 0.45."),
        ("kmeans4-o5.01", "outliers: 5.01 % is outside (0, 5]. Published values are 0.05 to 0.45."),
        ("W4A8-a16", "the bits of the activations are in the first part of the name (W4A16, W8A8)."),
        ("W4A16-static", "'static' concerns activations, which this scheme leaves in 16 bit."),
        ("nf4-actg64", "'actg64' concerns activations, which this scheme leaves in 16 bit."),
        ("mxfp4-static", "'static': the activations of this family have their scales prescribed."),
        ("nvfp4-entropy", "'entropy': the activations of this family have their scales prescribed."),
        ("fp8-a16-mse", "'a16' leaves the activations in 16 bit, and another option says how to quantize them."),
        ("fp8-dynamic-a16", "'a16' leaves the activations in 16 bit, and another option says how to quantize them."),
        ("fp8-acttensor-a16", "'a16' leaves the activations in 16 bit, and another option says how to quantize them."),
        ("W8A8-dynamic-mse", "scales found at run time need no observer (mse). Use static, or leave it out."),
        ("W8A8-static-token", "a static scale cannot be per token. Use dynamic, acttensor or actg<n>."),
    ],
)
def test_contradictions_are_refused_with_a_reason(name: str, reason: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse(name)
    assert str(caught.value) == f"scheme '{name}': {reason}"


@pytest.mark.parametrize(
    "name",
    [
        "", "-", "W4", "w4a16", "W04A16", "W4A016", "W4A16-", "W4A16--g64", "W4A16-g0", "W4A16-g", "W4A16-g-1", "nf4-",
        "W4A16-g064", "W4A16-G64", "W4A16 ", "W4A16-g64\n", "W4A16-block0", "W4A16-block64x", "W4A16-block64x0", "nf5",
        "W8A8-actg0", "W8A8-static-foo", "kmeans4-o", "kmeans4-o.5", "kmeans4-o-1", "kmeans4-o1e0", "fp8-e3m4", "nf4dq",
        "W8A8-columns", "W\u0664A16", "W4A16-g\u0664",
    ],
)  # fmt: skip
def test_anything_else_is_unknown_and_the_grammar_is_shown(name: str) -> None:
    with pytest.raises(UnknownName) as caught:
        parse(name)
    message = str(caught.value)
    assert message.startswith(f"unknown scheme '{name}'. Schemes read W<bits>A<bits> or a family's name, then options")
    assert all(family in message for family in FAMILIES)


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("ternry", "ternary"),
        ("nvpf4", "nvfp4"),
        ("kmean4", "kmeans4"),
        ("mxfp-8", "mxfp8"),
        ("w4a16-g128", "W4A16-g128"),
        ("W4A16-128", "W4A16-g128"),
        ("W8A8-statics", "W8A8-static"),
        ("lloyd4-gausian", "lloyd4-gaussian"),
    ],
)
def test_a_slip_of_the_pen_gets_a_suggestion(name: str, meant: str) -> None:
    with pytest.raises(UnknownName, match=f"Did you mean '{meant}'\\?"):
        parse(name)


# Bits


def quantized(scheme: Scheme, weight: torch.Tensor) -> QTensor:
    """What a round-to-nearest run stores of a weight."""
    wanted, outliers = scheme.weights, None
    if wanted.outliers:
        weight, outliers = split_outliers(weight.float(), wanted.outliers, dtype=weight.dtype)
    stored_as = str(weight.dtype if outliers is None else outliers.value.dtype).removeprefix("torch.")
    scale = SCALE_FORMATS[stored_as if wanted.scale == MODEL_SCALE else wanted.scale]
    grid = fit(weight.float(), wanted.format, wanted.granularity, method="minmax", importance=None, scale=scale)
    codes = grid.quantize(weight.float())
    if isinstance(grid, Grid) and scale.stored_afterwards:
        grid = store_scale(grid, scale)
    return QTensor(codes=codes, grid=grid, outliers=outliers)


SIZED = (
    *FAMILIES, "W4A16", "W3A16-asym", "W8A16-tensor", "W2A16-g32-asym", "W4A16-g64-floatzero", "W5A16-block16x32",
    "nf4-dq", "nf3-g8-dq", "fp4-bnb-channel-dq", "lut4-g8-dq", "lut3-tensor", "kmeans3-g32", "kmeans4-tensor",
    "fp8-block32", "ternary-tensor",
)  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", SIZED)
def test_predicted_bits_are_those_stored(name: str, dtype: torch.dtype) -> None:
    scheme = parse(name)
    for shape in ((48, 96), (33, 83)):
        real = quantized(scheme, torch.randn(shape).to(dtype))
        assert scheme.weights.num_bits(*shape, float_bits=8 * dtype.itemsize) == real.num_bits_total


@pytest.mark.parametrize("percent", ["0.45", "1", "5"])
def test_predicted_bits_of_outliers_are_close(percent: str) -> None:
    # The prediction has 16 bits per position; row starts (32 bits per row) come on top, or flat int32 positions.
    for shape in ((48, 512), (64, 1024)):
        scheme = parse(f"kmeans4-o{percent}")
        real = quantized(scheme, torch.randn(shape).bfloat16())
        predicted = scheme.weights.num_bits(*shape, float_bits=16)
        assert predicted <= real.num_bits_total <= 1.2 * predicted
        without = parse("kmeans4").weights.num_bits(*shape, float_bits=16)
        assert predicted - without == pytest.approx(real.num_bits_total - without, rel=0.5)
