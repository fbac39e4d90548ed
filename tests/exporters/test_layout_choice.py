"""Which layout a model is written in: what measurements with transformers and compressed-tensors allow, and no more."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch

from bitwright.errors import RecipeError, ShapeError
from bitwright.exporters.layout_choice import carried_by, choose_layouts
from bitwright.model.layouts import own
from bitwright.model.layouts.compressed_tensors import LAYOUTS, layout_of
from bitwright.model.sites import Site
from bitwright.recipe import Layout, SitePlan
from bitwright.schemes import FAMILIES, Scheme

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
HELD = {
    "W4A16-g32": "pack-quantized",
    "W4A16-channel-asym": "pack-quantized",
    "W8A16-g32": "pack-quantized",
    "W2A16-tensor": "pack-quantized",
    "W4A8-g32": "pack-quantized",
    "W4A4-channel": "pack-quantized",
    "W5A8-channel-static-minmax": "pack-quantized",
    "W8A8": "int-quantized",
    "W8A8-asym": "int-quantized",
    "W8A8-g32-actasym": "int-quantized",
    "W8A8-block32": "int-quantized",
    "W8A8-actg64": "int-quantized",
    "W8A8-static-minmax-actasym": "int-quantized",
    "W8A4-acttensor": "int-quantized",
    "fp8": "float-quantized",
    "fp8-tensor-static": "float-quantized",
    "fp8-block48x80-a16": "float-quantized",
    "fp8-g32-actg32": "float-quantized",
}
BFLOAT16_ONLY = {
    "mxfp8": "mxfp8-quantized",
    "mxfp8-a16": "mxfp8-quantized",
    "mxfp6": "mxfp6-pack-quantized",
    "mxfp4": "mxfp4-pack-quantized",
    "nvfp4": "nvfp4-pack-quantized",
    "nvfp4-a16": "nvfp4-pack-quantized",
}
NOT_HELD = (
    "W4A8-g32-asym", "W4A16-g32-floatzero", "W8A8-floatzero", "W4A4-asym-channel", "W7A8-asym-channel",
    "W4A16-block32", "W8A16-block32", "W8A8-static-actg32", "fp8-static-actg32", "fp8-e5m2", "fp8-e5m2-a16",
    "fp4-e2m1", "fp6-e2m3", "fp6-e3m2", "mxint8", "mxint8-a16", "mxfp4-g64", "nvfp4-g32-a16", "nf4", "nf4-b64-dq",
    "lut4", "kmeans4", "ternary", "binary",
)  # fmt: skip


@pytest.mark.parametrize("dtype", [BF16, F16, F32], ids=str)
@pytest.mark.parametrize("name", HELD)
def test_integers_and_fp8_of_any_model(name: str, dtype: torch.dtype) -> None:
    assert layout_of(Scheme.parse(name), 192, dtype) == HELD[name]


@pytest.mark.parametrize("name", BFLOAT16_ONLY)
def test_readers_make_bfloat16_of_fp4_and_mx(name: str) -> None:
    layouts = [layout_of(Scheme.parse(name), 192, dtype) for dtype in (BF16, F16, F32)]
    assert layouts == [BFLOAT16_ONLY[name], None, None]


@pytest.mark.parametrize("name", NOT_HELD)
def test_what_they_misread_or_do_not_know(name: str) -> None:
    assert [layout_of(Scheme.parse(name), 192, dtype) for dtype in (BF16, F16, F32)] == [None, None, None]


@pytest.mark.parametrize(
    "name", ["W4A16-g128", "W8A8-g128", "W8A8-actg128", "fp8-g128", "fp8-actg128", "mxfp4", "nvfp4", "mxfp8-a16"]
)
def test_groups_divide_the_row(name: str) -> None:
    scheme = Scheme.parse(name)
    assert layout_of(scheme, 256, BF16) in LAYOUTS
    assert layout_of(scheme, 264, BF16) is None, "a ragged group"
    assert layout_of(scheme, 8, BF16) is None, "a group longer than the row"


def site(name: str, **changes: Any) -> Site:
    plain = Site(
        name=name,
        parameter=f"{name}.weight",
        index=None,
        out_features=64,
        in_features=128,
        transposed=False,
        kind="linear",
    )
    return replace(plain, **changes)


def planned(name: str | None) -> SitePlan:
    if name is None:
        return SitePlan(scheme=None, group_size=None, method=None, reason="kept")
    scheme = Scheme.parse(name)
    return SitePlan(scheme=scheme, group_size=scheme.weights.granularity.group_size, method="rtn", reason="recipe")


def choose(
    schemes: Mapping[str, str | None],
    asked: Layout = "auto",
    *,
    dtype: torch.dtype = BF16,
    stored: Mapping[str, torch.dtype] | None = None,
    **changes: Any,
) -> dict[str, str]:
    """Names that hold `[n]` are experts in one 3-D parameter."""
    sites = [
        site(name, index=int(name.split("[")[1][:-1]), kind="expert") if "[" in name else site(name, **changes)
        for name in schemes
    ]
    plan = {name: planned(scheme) for name, scheme in schemes.items()}
    return choose_layouts(sites, plan, asked, dtype=dtype, stored=dict.fromkeys(schemes, dtype) | dict(stored or {}))


def test_each_site_has_its_own_of_compressed_tensors() -> None:
    schemes = {"q": "W8A8", "k": "nvfp4", "v": None, "o": "W4A16-g32", "up": "W8A8-asym"}
    expected = {"q": "int-quantized", "k": "nvfp4-pack-quantized", "o": "pack-quantized", "up": "int-quantized"}
    assert choose(schemes) == expected
    assert choose(schemes, "compressed-tensors") == expected


def test_one_site_that_does_not_fit_brings_all_into_our_own() -> None:
    schemes = {"q": "W8A8", "k": "nf4", "v": None}
    assert choose(schemes) == {"q": own.NAME, "k": own.NAME}
    assert choose({"q": "W8A8", "v": None}, "bitwright") == {"q": own.NAME}
    with pytest.raises(RecipeError, match=r"^k: nf4-g64 with 128 columns, in a bfloat16 model, cannot be held"):
        choose(schemes, "compressed-tensors")


def test_the_models_dtype_counts() -> None:
    assert choose({"q": "mxfp4"}) == {"q": "mxfp4-pack-quantized"}
    assert choose({"q": "mxfp4"}, dtype=F32) == {"q": own.NAME}
    with pytest.raises(RecipeError, match=r"^q: mxfp4-g32 with 128 columns, in a float32 model, cannot be held"):
        choose({"q": "mxfp4"}, "compressed-tensors", dtype=F32)


def test_scales_that_readers_would_round() -> None:
    """They cast every scale to the dtype of the configuration, whatever the file holds."""
    assert choose({"q": "W8A8", "k": "W8A8"}, stored={"k": F32}) == {"q": own.NAME, "k": own.NAME}
    assert choose({"q": "W8A8", "k": None}, stored={"k": F32}) == {"q": "int-quantized"}
    with pytest.raises(RecipeError, match=r"^k: stored in float32 in a bfloat16 model, to which transformers rounds"):
        choose({"q": "W8A8", "k": "W8A8"}, "compressed-tensors", stored={"k": F32})


def test_packed_zero_points_need_one_scheme() -> None:
    """Transformers then dequantizes every site by the first group, and leaves inputs alone."""
    assert choose({"q": "W4A16-g32-asym", "k": "W4A16-g32-asym", "v": None}) == {
        "q": "pack-quantized", "k": "pack-quantized",
    }  # fmt: skip
    for other in ("W4A16-g32", "W4A16-g64-asym", "W8A8", "W8A8-asym"):
        assert choose({"q": "W4A16-g32-asym", "k": other}) == {"q": own.NAME, "k": own.NAME}
        with pytest.raises(RecipeError, match=r"transformers reads an asymmetric scheme only if all sites have it"):
            choose({"q": "W4A16-g32-asym", "k": other}, "compressed-tensors")


EXPERTS = {"experts[0]": "W4A16-g32", "experts[1]": "W4A16-g32"}


@pytest.mark.parametrize("other", ["W4A16-g64", "W4A16-g32-asym", "W8A8", "W8A8-asym", "nvfp4", "fp8", None])
def test_experts_of_one_parameter_are_packed_beside_anything(other: str | None) -> None:
    layouts = choose({"q": other, **EXPERTS})
    assert {layouts["experts[0]"], layouts["experts[1]"]} == {"pack-quantized"}


@pytest.mark.parametrize("name", ["W8A8", "W4A8-g32", "fp8-a16", "fp8", "mxfp4-a16", "nvfp4-a16"])
def test_other_experts_are_refused(name: str) -> None:
    with pytest.raises(RecipeError, match=r"^experts\[0\]: experts in one 3-D parameter can be W<bits>A16 only\."):
        choose({"q": "W8A8", "experts[0]": name, "experts[1]": name})


@pytest.mark.parametrize("pair", [("W4A16-g32", None), ("W4A16-g32", "W8A16-g32"), ("W4A16-g32-asym",) * 2])
def test_experts_of_one_parameter_are_alike_and_symmetric(pair: tuple[str, str | None]) -> None:
    with pytest.raises(RecipeError, match=r"^experts: .*reads the experts of this model only if all are"):
        choose({"q": "W8A8", "experts[0]": pair[0], "experts[1]": pair[1]})


def test_experts_kept_as_they_are_need_our_own_layout() -> None:
    schemes = {"q": "W8A8", "experts[0]": None, "experts[1]": None}
    assert choose(schemes) == {"q": own.NAME}
    with pytest.raises(RecipeError, match=r"^experts: kept in 16 bit\. Transformers reads the experts"):
        choose(schemes, "compressed-tensors")


def test_experts_beside_a_site_that_only_our_own_layout_holds() -> None:
    with pytest.raises(RecipeError, match=r"^q: nf4-g64 with 128 columns"):
        choose({"q": "nf4", **EXPERTS})


@pytest.mark.parametrize("asked", ["auto", "compressed-tensors", "bitwright"])
def test_transposed_weights_have_no_layout(asked: Layout) -> None:
    with pytest.raises(ShapeError, match=r"^q: stored as \[in, out\]"):
        choose({"q": "W8A8"}, asked, transposed=True)


@pytest.mark.parametrize("name", [*FAMILIES, *HELD, *BFLOAT16_ONLY, *NOT_HELD])
def test_our_own_layout_carries_everything(name: str) -> None:
    *others, last = carried_by(Scheme.parse(name))
    assert last == own.NAME
    expected = {**HELD, **BFLOAT16_ONLY}.get(name)
    assert others == ([] if expected is None else [f"compressed-tensors ({expected})"])
