"""Schemes: which numbers weights and activations become, and how many of them share a scale. One name says it all.

    W<bits>A<bits>     integers; A16 leaves the activations alone. W4A16-g128, W8A8, W4A8-g64-asym, W8A8-static-entropy
    <family>           a row of `FAMILIES`: nf4-b64-dq, fp8, mxfp4-a16, kmeans4-channel-o0.45, ternary-g64, ...

Options follow in any order, each after a dash:

    weights       g<n> or b<n> (groups), channel, tensor, block<n> or block<r>x<c>; sym, asym, floatzero (asym with
                  float zero points); dq (double-quantized scales); o<percent> (largest weights as floats beside a
                  codebook)
    activations   a16 (leave them alone); dynamic (per call) or static (calibrated); token, acttensor, actg<n>;
                  actsym, actasym; for static the observer: minmax, average, percentile, entropy, mse

A scheme knows no algorithm. That it knows the observer of a static activation scale is the one exception: published
names say so (`W8A8-static-entropy`), and a scale without its observer says little.
"""

import math
import re
from dataclasses import dataclass, field, replace
from decimal import Decimal
from typing import NoReturn, cast

import torch

from bitwright.errors import RecipeError, UnknownName, did_you_mean
from bitwright.numerics.codebook_grid import CodebookFormat, LearnedTableFormat
from bitwright.numerics.formats import FORMATS, Format, LevelFormat, has_float_zero, num_code_bits, num_zero_point_bits
from bitwright.numerics.granularity import Granularity
from bitwright.numerics.integer import MAX_BITS, MIN_BITS, IntegerFormat
from bitwright.numerics.scale_formats import SCALE_FORMATS
from bitwright.numerics.scales import FloatScale, ScaleFormat
from bitwright.registry import Registry

DEFAULT_GROUP_SIZE = 128
DEFAULT_OBSERVER = "mse"
OBSERVER_NAMES = ("minmax", "average", "percentile", "entropy", "mse")
COMMON_SCHEMES = (
    "W8A16-channel", "W8A16-g128", "W4A16-g128", "W4A16-g64", "W4A16-g32", "W4A16-g128-asym", "W4A16-channel",
    "W3A16-g128", "W3A16-g64", "W2A16-g64", "W2A16-g32", "W4A16-tensor", "W8A8", "W8A8-static", "W4A8", "W4A4",
)  # fmt: skip
MODEL_SCALE = "model"
"""Scales in the dtype that the model stores its weights in."""
_NUMBER = "(0|[1-9][0-9]*)"
_INTEGERS = re.compile(f"W{_NUMBER}A{_NUMBER}")
_SCALE_BITS = {"float32": 32, "e8m0": 8, "e8m0-int8": 8, "e4m3": 8, "nested": 8}
_NESTED_BLOCK = 256
_OUTLIER_INDEX_BITS = 16
_ABOUT_ACTIVATIONS = {"observer", "time", "activation symmetry", "activation granularity"}
_CHANNEL, _TENSOR, _TOKEN = Granularity(kind="channel"), Granularity(kind="tensor"), Granularity(kind="token")


def group(size: int) -> Granularity:
    """Groups of `size` columns."""
    return Granularity(kind="group", group_size=size)


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightScheme:
    """What weights become.

    Attributes:
        format: the codes.
        granularity: which weights share a scale, or a codebook.
        scale: a name in `SCALE_FORMATS`, or `model` for floats in the weight's own dtype.
        outliers: fraction of the weights kept as floats beside the codes.
    """

    format: Format
    granularity: Granularity
    scale: str = MODEL_SCALE
    outliers: float = 0.0

    def stored_scale(self, dtype: torch.dtype) -> ScaleFormat:
        """Return how scales are stored in a checkpoint of a dtype."""
        return FloatScale(dtype) if self.scale == MODEL_SCALE else SCALE_FORMATS[self.scale]

    def num_bits(self, out_features: int, in_features: int, *, float_bits: int) -> int:
        """Bits of a weight [O, I] as stored; `float_bits` are those of its dtype. Exact but for outliers."""
        format, num_weights = self.format, out_features * in_features
        bits = num_code_bits(format, num_weights)
        bits += math.ceil(num_weights * self.outliers * (_OUTLIER_INDEX_BITS + float_bits))
        rows, groups = self.granularity.scale_shape(out_features, in_features)
        if _has_codebooks(format):
            return bits + rows * groups * format.num_codes * float_bits
        bits += rows * groups * _SCALE_BITS.get(self.scale, float_bits)
        levels_above = {"e4m3": 1, "nested": 1 + math.ceil(rows * groups / _NESTED_BLOCK)}
        bits += 32 * levels_above.get(self.scale, 0)
        bits += 32 * format.num_codes if isinstance(format, LearnedTableFormat) else 0
        return bits + num_zero_point_bits(format, rows * groups)


@dataclass(frozen=True, kw_only=True, slots=True)
class ActivationScheme:
    """What the inputs of a linear product become.

    Attributes:
        format: the codes.
        granularity: token, group or tensor for scales found at run time; tensor or columns for calibrated ones.
        scale: a name in `SCALE_FORMATS`.
        observer: how a calibrated range is found; None where every scale is found at run time. With scale `e4m3` the
            scales of the groups are found at run time and the observer gives only the level above them.
    """

    format: LevelFormat
    granularity: Granularity
    scale: str = "float32"
    observer: str | None = None

    @property
    def is_static(self) -> bool:
        """Whether the scales are calibrated."""
        return self.observer is not None and self.scale != "e4m3"


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """One named family of schemes: its row in `bitwright formats`.

    Attributes:
        weights: with the default granularity.
        activations: what the bare name does to them; None leaves them alone.
        reference: where it was published.
        about: one line for people.
    """

    name: str
    weights: WeightScheme
    activations: ActivationScheme | None = None
    reference: str
    about: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Scheme:
    """The numbers that weights and activations of a site become; `activations` None leaves them in 16 bit."""

    base: str
    weights: WeightScheme
    activations: ActivationScheme | None = None

    @staticmethod
    def parse(name: str) -> "Scheme":
        """Read a scheme's name; the grammar is in this module's docstring.

        Raises:
            UnknownName: the text does not read as a scheme.
            RecipeError: it does, and asks for something that does not exist.
        """
        base = max((f for f in FAMILIES if name == f or name.startswith(f"{f}-")), key=len, default="")
        if base:
            options = name[len(base) + 1 :]
            weights, activations = FAMILIES[base].weights, FAMILIES[base].activations
        else:
            base, _, options = name.partition("-")
            match = _INTEGERS.fullmatch(base)
            if match is None:
                _unknown(name)
            weights, activations = _integers(name, int(match[1]), int(match[2]))
        parsed = _Options(name, base, weights, activations)
        for option in options.split("-") if options or name.endswith("-") else ():
            parsed.read(option)
        return parsed.scheme()

    def __str__(self) -> str:
        weights = self.weights
        parts = [self.base, _granularity_name(weights.granularity)]
        if isinstance(weights.format, IntegerFormat) and not weights.format.symmetric:
            parts.append("floatzero" if has_float_zero(weights.format) else "asym")
        if weights.scale == "nested":
            parts.append("dq")
        if weights.outliers:
            parts.append(f"o{(100 * Decimal(repr(weights.outliers))).normalize():f}")
        return "-".join([*parts, *self._activation_parts()])

    def _activation_parts(self) -> list[str]:
        default = FAMILIES[self.base].activations if self.base in FAMILIES else None
        if self.activations is None:
            return ["a16"] if default else []
        if self.activations == default:
            return []
        parts: list[str] = []
        chosen = self.activations
        if chosen.observer is not None:
            parts += ["static", chosen.observer]
        if chosen.granularity.group_size is not None:
            parts.append(f"actg{chosen.granularity.group_size}")
        elif chosen.granularity.kind == "tensor" and chosen.observer is None:
            parts.append("acttensor")
        if not chosen.format.symmetric:
            parts.append("actasym")
        return parts

    def with_granularity(self, granularity: Granularity) -> "Scheme":
        """The same scheme with another granularity of the weights."""
        return replace(self, weights=replace(self.weights, granularity=granularity))


FAMILIES: Registry[Family] = Registry("family of schemes")


def _add(name: str, weights: WeightScheme, reference: str, about: str, acts: ActivationScheme | None = None) -> None:
    FAMILIES.register(name, Family(name=name, weights=weights, activations=acts, reference=reference, about=about))


def _weights(format: str, granularity: Granularity, scale: str = MODEL_SCALE) -> WeightScheme:
    return WeightScheme(format=FORMATS[format], granularity=granularity, scale=scale)


def _acts(
    format: str, granularity: Granularity, scale: str = "float32", observer: str | None = None
) -> ActivationScheme:
    return ActivationScheme(
        format=cast(LevelFormat, FORMATS[format]), granularity=granularity, scale=scale, observer=observer
    )


def _register_families() -> None:
    fp8, mx, nf = "arXiv:2209.05433", "OCP Microscaling Formats 1.0", "arXiv:2305.14314"
    _add("fp8", _weights("fp8-e4m3", _CHANNEL), fp8, "FP8 E4M3, weights and activations", _acts("fp8-e4m3", _TOKEN))
    _add("fp8-e5m2", _weights("fp8-e5m2", _CHANNEL), fp8, "FP8 with more range", _acts("fp8-e5m2", _TOKEN))
    _add("fp6-e2m3", _weights("fp6-e2m3", group(32)), mx, "FP6, finer")
    _add("fp6-e3m2", _weights("fp6-e3m2", group(32)), mx, "FP6, wider")
    _add("fp4-e2m1", _weights("fp4-e2m1", group(32)), mx, "FP4 with float scales")
    for name, format, scale in (
        ("mxfp8", "fp8-e4m3", "e8m0"), ("mxfp6", "fp6-e2m3", "e8m0"), ("mxfp4", "fp4-e2m1", "e8m0"),
        ("mxint8", "int8", "e8m0-int8"),
    ):  # fmt: skip
        about = f"{format}, power-of-two scales per 32"
        _add(name, _weights(format, group(32), scale), mx, about, _acts(format, group(32), scale))
    _add(
        "nvfp4", _weights("fp4-e2m1", group(16), "e4m3"), "NVIDIA, Introducing NVFP4, 2025",
        "FP4 with FP8 scales per 16 under one float32", _acts("fp4-e2m1", group(16), "e4m3", "minmax"),
    )  # fmt: skip
    _add("nf4", _weights("nf4", group(64), "float32"), nf, "16 quantiles of a normal, absmax scales")
    _add("nf3", _weights("nf3", group(64)), nf, "8 quantiles of a normal")
    _add("nf2", _weights("nf2", group(64)), nf, "4 quantiles of a normal")
    _add("fp4-bnb", _weights("fp4-bnb", group(64), "float32"), nf, "bitsandbytes' FP4 table")
    for bits in (4, 3, 2):
        for shape in ("gaussian", "laplace"):
            format = f"lloyd{bits}-{shape}"
            about = f"{2**bits} levels of least squared error for a {shape} distribution"
            _add(format, _weights(format, group(64)), "Lloyd 1957; Max 1960", about)
        _add(f"kmeans{bits}", _weights(f"kmeans{bits}", _CHANNEL), "arXiv:2306.07629", "a codebook per row or group")
        about = "one learned table per weight, a scale per group"
        _add(f"lut{bits}", _weights(f"lut{bits}", group(64)), "arXiv:2507.04610", about)
    _add("ternary", _weights("ternary", group(128)), "arXiv:1605.04711; arXiv:2402.17764", "-1, 0, 1 times a scale")
    _add("binary", _weights("binary", group(128)), "arXiv:1603.05279", "the sign times a scale")


_register_families()


@dataclass(slots=True)
class _Options:
    """Reads the options of one name, each at most once."""

    name: str
    base: str
    weights: WeightScheme
    activations: ActivationScheme | None
    seen: set[str] = field(default_factory=set[str])
    time: str | None = None

    def read(self, option: str) -> None:
        weight_granularity = _read_granularity(option)
        if weight_granularity is not None:
            self._once("granularity")
            self.weights = replace(self.weights, granularity=weight_granularity)
        elif option in ("sym", "asym", "floatzero"):
            self._once("symmetry")
            format = self._with_symmetry(self.weights.format, option == "sym", float_zero=option == "floatzero")
            if self.weights.scale != MODEL_SCALE:
                self._refuse(f"'{option}': the weights of this family have their scales prescribed")
            self.weights = replace(self.weights, format=format)
        elif option == "dq":
            self._once("dq")
            self._double_quantize()
        elif re.fullmatch(r"o[0-9]+(\.[0-9]+)?", option):
            self._once("outliers")
            self._keep_outliers(float(Decimal(option[1:]) / 100))
        elif option == "a16":
            self._once("activations")
            if self.base not in FAMILIES:
                self._refuse("the bits of the activations are in the first part of the name (W4A16, W8A8)")
        else:
            self._read_activations(option)

    def _read_activations(self, option: str) -> None:
        acts = self.activations
        known = (*OBSERVER_NAMES, "static", "dynamic", "token", "acttensor", "actsym", "actasym")
        sized = re.fullmatch(r"actg([1-9][0-9]*)", option)
        if option not in known and not sized:
            _unknown(self.name)
        if acts is None:
            self._refuse(f"'{option}' concerns activations, which this scheme leaves in 16 bit")
        if acts.scale != "float32":
            self._refuse(f"'{option}': the activations of this family have their scales prescribed")
        if option in OBSERVER_NAMES:
            self._once("observer")
            self.activations = replace(acts, observer=option)
        elif option in ("static", "dynamic"):
            self._once("time")
            self.time = option
        elif option in ("actsym", "actasym"):
            self._once("activation symmetry")
            format = self._with_symmetry(acts.format, option == "actsym")
            self.activations = replace(acts, format=cast(LevelFormat, format))
        else:
            self._once("activation granularity")
            granularity = group(int(sized[1])) if sized else _TOKEN if option == "token" else _TENSOR
            self.activations = replace(acts, granularity=granularity)

    def scheme(self) -> Scheme:
        acts = self.activations
        if "activations" in self.seen:
            if self.seen & _ABOUT_ACTIVATIONS:
                self._refuse("'a16' leaves the activations in 16 bit, and another option says how to quantize them")
            acts = None
        elif acts is not None and acts.scale == "float32":
            acts = self._settled(acts)
        return Scheme(base=self.base, weights=self.weights, activations=acts)

    def _settled(self, acts: ActivationScheme) -> ActivationScheme:
        """Give static activations an observer, and a granularity that needs no run-time statistics."""
        if self.time == "dynamic" and acts.observer is not None:
            self._refuse(f"scales found at run time need no observer ({acts.observer}). Use static, or leave it out")
        if self.time == "static" and acts.observer is None:
            acts = replace(acts, observer=DEFAULT_OBSERVER)
        if acts.observer is None:
            return acts
        if "activation granularity" in self.seen and acts.granularity.kind == "token":
            self._refuse("a static scale cannot be per token. Use dynamic, acttensor or actg<n>")
        size = acts.granularity.group_size
        granularity = _TENSOR if size is None else Granularity(kind="columns", group_size=size)
        return replace(acts, granularity=granularity)

    def _with_symmetry(self, format: Format, symmetric: bool, *, float_zero: bool = False) -> Format:
        if not isinstance(format, IntegerFormat):
            self._refuse(f"only integers have a zero point; {format.name} is symmetric as it is")
        full = format.full_range or not symmetric
        return IntegerFormat(bits=format.bits, symmetric=symmetric, full_range=full, float_zero=float_zero)

    def _double_quantize(self) -> None:
        if self.weights.scale not in (MODEL_SCALE, "float32") or not self.weights.format.symmetric:
            self._refuse("dq needs float scales and no zero point")
        if isinstance(self.weights.format, IntegerFormat) or _has_codebooks(self.weights.format):
            self._refuse("dq stores unsigned scales, unlike those of integers and codebooks. Use nf4 or lut4")
        self.weights = replace(self.weights, scale="nested")

    def _keep_outliers(self, fraction: float) -> None:
        if not _has_codebooks(self.weights.format):
            self._refuse("outliers are kept beside codebooks only (kmeans4)")
        if not 0 < fraction <= 0.05:
            self._refuse(f"outliers: {100 * fraction:g} % is outside (0, 5]. Published values are 0.05 to 0.45")
        self.weights = replace(self.weights, outliers=fraction)

    def _once(self, kind: str) -> None:
        if kind in self.seen:
            self._refuse(f"two options say the {kind}")
        self.seen.add(kind)

    def _refuse(self, reason: str) -> NoReturn:
        raise RecipeError(f"scheme '{self.name}': {reason}.")


def _has_codebooks(format: Format) -> bool:
    """Whether rows or groups have tables of their own in place of scales."""
    return isinstance(format, CodebookFormat) and not isinstance(format, LearnedTableFormat)


def _read_granularity(option: str) -> Granularity | None:
    if option in ("channel", "tensor"):
        return _CHANNEL if option == "channel" else _TENSOR
    if match := re.fullmatch(r"[gb]([1-9][0-9]*)", option):
        return group(int(match[1]))
    if match := re.fullmatch(r"block([1-9][0-9]*)(?:x([1-9][0-9]*))?", option):
        return Granularity(kind="block", block_rows=int(match[1]), group_size=int(match[2] or match[1]))
    return None


def _granularity_name(granularity: Granularity) -> str:
    size = granularity.group_size
    if granularity.kind == "group":
        return f"g{size}"
    if granularity.kind == "block":
        return f"block{size}" if granularity.block_rows == size else f"block{granularity.block_rows}x{size}"
    return granularity.kind


def _integers(name: str, bits: int, activation_bits: int) -> tuple[WeightScheme, ActivationScheme | None]:
    for what, number in (("weight", bits), ("activation", activation_bits)):
        if not MIN_BITS <= number <= MAX_BITS and (what, number) != ("activation", 16):
            raise RecipeError(
                f"scheme '{name}': {number} {what} bits are out of range. Use {MIN_BITS} to {MAX_BITS}"
                f"{', or A16' if what == 'activation' else ''}."
            )
    granularity = _CHANNEL if bits == MAX_BITS else group(DEFAULT_GROUP_SIZE)
    weights = WeightScheme(format=FORMATS[f"int{bits}"], granularity=granularity)
    if activation_bits == 16:
        return weights, None
    # Engines scale by absmax / (2^(b-1) - 1): the restricted range, whose two sides are alike.
    format = IntegerFormat(bits=activation_bits, symmetric=True, full_range=False)
    return weights, ActivationScheme(format=format, granularity=_TOKEN)


def _unknown(name: str) -> NoReturn:
    grammar = "Schemes read W<bits>A<bits> or a family's name, then options (bitwright formats lists them)."
    raise UnknownName(f"unknown scheme '{name}'. {grammar}{did_you_mean(name, (*COMMON_SCHEMES, *FAMILIES))}")
