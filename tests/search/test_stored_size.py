"""Sizes from shapes alone must be those of the files, tensor by tensor."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from bitwright.exporters.model_writer import encode
from bitwright.model.checkpoint import open_checkpoint
from bitwright.model.layouts import compressed_tensors as ct
from bitwright.model.layouts import own
from bitwright.model.sites import Site
from bitwright.model.stream import StreamedModel
from bitwright.numerics.fitting import fit
from bitwright.numerics.grid import Grid
from bitwright.numerics.inputs import QuantizedSite
from bitwright.numerics.outliers import split_outliers
from bitwright.numerics.qtensor import QTensor
from bitwright.numerics.ranges import store_scale
from bitwright.numerics.scale_formats import SCALE_FORMATS
from bitwright.numerics.scales import FloatScale
from bitwright.options import LowRankOptions
from bitwright.pipeline import quantize
from bitwright.preflight import estimate
from bitwright.recipe import Calibration, Plan, Recipe, Rule
from bitwright.schemes import MODEL_SCALE, Scheme
from bitwright.search.model_shape import StoredTensor, shape_of_config, shape_of_model
from bitwright.search.stored_size import exported_bytes, file_bytes, site_tensors

CONFIGS = Path(__file__).parents[1] / "data" / "configs"
OUT, IN = 80, 256
SCHEMES = (
    "W8A16-channel", "W4A16-g128", "W3A16-g64", "W4A16-g128-asym", "W4A16-g64-floatzero", "W4A16-tensor", "W8A8",
    "W8A16-block32", "fp8", "mxfp8-a16", "mxfp6-a16", "mxfp4-a16", "nvfp4-a16", "mxint8-a16", "nf4", "nf4-b64-dq",
    "nf3", "kmeans4-channel-o0.45", "kmeans3-g64", "lut4", "ternary-g64", "binary-g64", "W5A16-channel-asym",
)  # fmt: skip


def _encoded(name: str, layout: str) -> dict[str, torch.Tensor]:
    weights = Scheme.parse(name).weights
    weight = torch.randn(OUT, IN)
    scale = FloatScale(torch.bfloat16) if weights.scale == MODEL_SCALE else SCALE_FORMATS[weights.scale]
    outliers = None
    if weights.outliers:
        weight, outliers = split_outliers(weight, weights.outliers, importance=None, dtype=torch.bfloat16)
    grid = fit(weight, weights.format, weights.granularity, method="minmax", importance=None, scale=scale)
    codes = grid.quantize(weight)
    if isinstance(grid, Grid) and scale.stored_afterwards:
        grid = store_scale(grid, scale)
    site = QuantizedSite(weight=QTensor(codes=codes, grid=grid, outliers=outliers))
    return encode(layout, site, torch.bfloat16)


@pytest.mark.parametrize("name", SCHEMES)
def test_tensors_are_those_that_the_encoders_make(name: str) -> None:
    scheme = Scheme.parse(name)
    site = Site(
        name="m", parameter="m.weight", index=None, out_features=OUT, in_features=IN, transposed=False, kind="linear"
    )
    held = ct.layout_of(scheme, IN, torch.bfloat16)
    for layout in {own.NAME, held or own.NAME}:
        expected = {leaf: (tuple(t.shape), t.dtype) for leaf, t in _encoded(name, layout).items()}
        assert site_tensors(site, scheme, layout, torch.bfloat16) == expected


def test_a_file_is_as_long_as_safetensors_makes_it(tmp_path: Path) -> None:
    tensors = {
        "b.weight_scale": torch.zeros(3, 5, dtype=torch.bfloat16),
        "a.weight_packed": torch.zeros(7, 2, dtype=torch.int32),
        "a.weight_shape": torch.zeros(2, dtype=torch.int64),
        "c": torch.zeros(11, dtype=torch.float32),
        "d": torch.zeros(0, dtype=torch.float16),
        "e": torch.zeros(13, dtype=torch.float8_e4m3fn),
        "f": torch.zeros(3, dtype=torch.uint8),
    }
    file = tmp_path / "x.safetensors"
    save_file(tensors, file, metadata={"format": "pt"})
    listed = [StoredTensor(name=name, shape=tuple(t.shape), dtype=t.dtype) for name, t in tensors.items()]
    assert file_bytes(listed) == file.stat().st_size


@pytest.mark.parametrize("name", ["W4A16-g32", "nf4-b64-dq"])
def test_a_run_writes_as_many_bytes_as_predicted(name: str, tiny_llama_dir: Path, tmp_path: Path) -> None:
    scheme = Scheme.parse(name)
    recipe = Recipe(scheme=scheme, method="rtn", max_kl=100.0, calibration=Calibration(seqlen=64))
    quantize(tiny_llama_dir, recipe, tmp_path / "run")
    written = sum(file.stat().st_size for file in (tmp_path / "run" / "4-model").glob("*.safetensors"))
    shape = shape_of_model(StreamedModel(open_checkpoint(tiny_llama_dir)))
    assert exported_bytes(shape, shape.uniform(scheme)) == written


def test_low_rank_addends_are_counted_where_a_rule_asks_for_them(
    tiny_llama_dir: Path, tmp_path: Path, tiny_text: str
) -> None:
    (tmp_path / "text.txt").write_text(tiny_text)
    scheme, rank = Scheme.parse("W4A16-g32"), 3
    recipe = Recipe(
        scheme=scheme, method="rtn", max_kl=100.0, low_rank=LowRankOptions(rank=rank),
        rules=(Rule(pattern="*.v_proj", scheme=scheme, repairs=("low_rank",)),),
        calibration=Calibration(text=str(tmp_path / "text.txt"), num_samples=2, seqlen=64),
    )  # fmt: skip
    done = quantize(tiny_llama_dir, recipe, tmp_path / "run")
    written = sum(file.stat().st_size for file in (tmp_path / "run" / "4-model").glob("*.safetensors"))
    model = StreamedModel(open_checkpoint(tiny_llama_dir))
    shape = shape_of_model(model)
    repaired = [site for site in shape.sites if site.name.endswith("v_proj")]
    shape = replace(shape, ranks={site.name: rank for site in repaired})
    assignment = shape.uniform(scheme)
    assert exported_bytes(shape, assignment) == written
    plan = Plan.load(tmp_path / "run" / "3-plan.yaml")
    assert {name for name, entry in plan.sites.items() if entry.repairs} == {site.name for site in repaired}
    packed = open_checkpoint(tmp_path / "run" / "4-model")
    for site in shape.sites:
        assert (packed.read_packed(f"{site.name}.weight").low_rank is not None) == (site in repaired)
    added = sum(rank * (site.out_features + site.in_features) for site in repaired) * shape.dtype.itemsize
    num_weights = sum(site.out_features * site.in_features for site in shape.sites)
    needed = estimate(model, list(shape.sites), plan, 2, 2, 64, rank=rank).quantized_bits_per_weight
    plain = estimate(model, list(shape.sites), plan, 2, 2, 64).quantized_bits_per_weight
    assert needed == pytest.approx(done.results["bits_per_weight"])
    assert (needed - plain) * num_weights == pytest.approx(8 * added)


def test_a_configuration_tells_what_the_checkpoint_tells(tiny_llama_dir: Path) -> None:
    known = shape_of_model(StreamedModel(open_checkpoint(tiny_llama_dir)))
    guessed = shape_of_config(tiny_llama_dir / "config.json")
    assert (guessed.sites, guessed.site_dtypes, guessed.dtype) == (known.sites, known.site_dtypes, known.dtype)
    assert sorted(guessed.kept, key=lambda t: t.name) == sorted(known.kept, key=lambda t: t.name)
    assert guessed.num_parameters == known.num_parameters


@pytest.mark.parametrize(
    ("name", "num_parameters"),
    [("llama-2-7b", 6_738_415_616), ("llama-2-13b", 13_015_864_320), ("llama-2-70b", 68_976_648_192)],
)
def test_published_sizes_follow_from_the_configuration(name: str, num_parameters: int) -> None:
    shape = shape_of_config(CONFIGS / f"{name}.json")
    assert shape.num_parameters == num_parameters
    dense = exported_bytes(shape, {})
    assert 2 * num_parameters < dense < 2.0001 * num_parameters
    four = exported_bytes(shape, shape.uniform(Scheme.parse("W4A16-g128")))
    quantized = sum(site.out_features * site.in_features for site in shape.sites)
    # 4 bits, and a scale of 16 per 128 weights; what is not a site stays as it is.
    assert four == pytest.approx(dense - quantized * (16 - 4 - 16 / 128) / 8, rel=1e-4)
