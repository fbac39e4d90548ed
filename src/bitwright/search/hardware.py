"""Devices as data: bandwidth, memory, rates of arithmetic and the kernels there are, each number with its source.

A profile is a YAML file. What its maker does not publish is left out, and what would need it is then reported as not
known. Rates are dense (no sparsity) and are peaks, so that times made of them are lower bounds.

A kernel is named by what it multiplies without decoding to 16 bit first. Whatever is not listed, an engine decodes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Literal, get_args

from bitwright.errors import RecipeError, UnknownName, did_you_mean
from bitwright.model.sites import SiteKind
from bitwright.numerics.formats import has_float_zero
from bitwright.numerics.integer import IntegerFormat
from bitwright.schemes import MODEL_SCALE, Scheme
from bitwright.strict_yaml import build, read_yaml_mapping

Arithmetic = Literal["float32", "bf16", "int8", "fp8", "int4"]
GIGA, TERA = 1e9, 1e12


@dataclass(frozen=True, kw_only=True, slots=True)
class Kernel:
    """Products that a device computes on codes.

    Attributes:
        weights: `int`, or the name of a floating-point format.
        bits: widths of the weights that it takes.
        group_sizes: columns per scale that it takes; 0 stands for one scale per row.
        symmetric_only: it takes no zero points.
        scale: as `WeightScheme.scale`.
        activations: format of the inputs' codes; None for inputs in 16 bit.
        experts: it also takes the experts of a mixture, which engines multiply by kernels of their own.
        arithmetic: what it multiplies in, which decides the rate.
        source: who says so.
    """

    weights: str
    bits: tuple[int, ...]
    group_sizes: tuple[int, ...]
    arithmetic: Arithmetic
    source: str
    symmetric_only: bool = True
    scale: str = MODEL_SCALE
    activations: str | None = None
    experts: bool = True

    def takes(self, scheme: Scheme, kind: SiteKind = "linear") -> bool:
        """Whether it multiplies weights and inputs of this scheme as they are stored, in a site of this kind."""
        if kind == "expert" and not self.experts:
            return False
        weights, acts = scheme.weights, scheme.activations
        granularity, format = weights.granularity, weights.format
        is_integer = isinstance(format, IntegerFormat)
        fits = weights.scale == self.scale and not weights.outliers and not has_float_zero(format)
        fits = fits and ("int" if is_integer else format.name) == self.weights and float(format.bits) in self.bits
        fits = fits and granularity.kind in ("group", "channel")
        fits = fits and (granularity.group_size or 0) in self.group_sizes
        fits = fits and (format.symmetric or not self.symmetric_only)
        if self.activations is None or acts is None:
            return fits and (self.activations is None) == (acts is None)
        return fits and acts.format.name == self.activations and acts.granularity.kind in ("token", "tensor")


@dataclass(frozen=True, kw_only=True, slots=True)
class Hardware:
    """One device.

    Attributes:
        name: for people.
        source: of the numbers below: the documents of its maker.
        checked: which numbers were compared with what else, and which rest on the source alone.
        bandwidth_gb_per_s: of its memory, in 10^9 bytes.
        memory_gb: for weights, cache and workspace, in 10^9 bytes.
        tera_ops_per_s: dense rate of each arithmetic, 10^12 multiplications and additions.
        watts: at full load; None where it is not published.
        kernels: products on codes.
        stays_packed: weights without a kernel lie there as codes, and each is decoded when it is multiplied, as
            bitwright's own layers do; elsewhere an engine decodes them all when it loads them.
        note: what to know before believing a figure.
    """

    name: str
    source: str
    bandwidth_gb_per_s: float
    memory_gb: float
    tera_ops_per_s: Mapping[str, float]
    watts: float | None = None
    kernels: tuple[Kernel, ...] = ()
    stays_packed: bool = False
    checked: str = ""
    note: str = ""

    def __post_init__(self) -> None:
        positive = {"bandwidth_gb_per_s": self.bandwidth_gb_per_s, "memory_gb": self.memory_gb, **self.tera_ops_per_s}
        if self.watts is not None:
            positive["watts"] = self.watts
        for key, value in positive.items():
            if not value > 0:
                raise RecipeError(f"{key} must be above 0, got {value}. Leave out what is not known.")
        known = get_args(Arithmetic)
        for key in self.tera_ops_per_s:
            if key not in known:
                raise RecipeError(f"tera_ops_per_s: unknown arithmetic '{key}'.{did_you_mean(key, known)}")

    def kernel(self, scheme: Scheme | None, kind: SiteKind = "linear") -> Kernel | None:
        """The kernel for a scheme in a site; None where there is none, or the weight is in 16 bit anyway."""
        return None if scheme is None else next((each for each in self.kernels if each.takes(scheme, kind)), None)

    def ops_per_s(self, arithmetic: Arithmetic) -> float | None:
        """Operations per second; None where it is not published."""
        rate = self.tera_ops_per_s.get(arithmetic)
        return None if rate is None else rate * TERA

    @property
    def bytes_per_s(self) -> float:
        """Bandwidth in bytes."""
        return self.bandwidth_gb_per_s * GIGA

    @property
    def memory_bytes(self) -> int:
        """Memory in bytes."""
        return int(self.memory_gb * GIGA)


def load_hardware(name: str | Path) -> Hardware:
    """Read a profile that bitwright brings, by its name, or a file of one's own, by a path that ends in .yaml.

    Raises:
        UnknownName: no profile of that name.
        RecipeError: the file cannot be read, or holds something a profile does not know.
    """
    if str(name).endswith((".yaml", ".yml")):
        return build(Hardware, read_yaml_mapping(Path(name)), str(name))
    if str(name) not in hardware_names():
        raise UnknownName(
            f"unknown hardware '{name}'.{did_you_mean(str(name), hardware_names())} Or give a .yaml file of your own."
        )
    path = _folder() / f"{name}.yaml"
    return build(Hardware, read_yaml_mapping(path), str(name))


def hardware_names() -> tuple[str, ...]:
    """Names of the profiles that bitwright brings."""
    return tuple(sorted(path.stem for path in _folder().glob("*.yaml")))


def _folder() -> Path:
    return Path(str(resources.files("bitwright"))) / "assets" / "hardware"
