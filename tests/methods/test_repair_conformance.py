"""What every repair must satisfy, whatever it does; an entry in `REPAIRS` is tested here without another line."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from bitwright import pipeline
from bitwright.calibration.collect import SiteStats
from bitwright.errors import RunError
from bitwright.exporters.registered import EXPORTERS
from bitwright.kernels.reference import linear
from bitwright.methods.repairs import REPAIRS, RepairTask
from bitwright.model.checkpoint import open_checkpoint
from bitwright.model.layouts import own
from bitwright.numerics.formats import FORMATS
from bitwright.numerics.granularity import Granularity
from bitwright.numerics.inputs import FloatColumns, InputQuantizer, InputTransform, QuantizedSite
from bitwright.numerics.qtensor import QTensor
from bitwright.numerics.ranges import fit_grid
from bitwright.options import LowRankOptions
from bitwright.recipe import Recipe
from bitwright.schemes import Scheme

OUT, IN, TOKENS = 24, 32, 300
SCHEME = Scheme.parse("W3A16-channel")
RECIPE = Recipe(low_rank=LowRankOptions(rank=4))
COLUMNS = torch.tensor([3, 17])
EVERY_REPAIR = pytest.mark.parametrize("name", REPAIRS.names)


def case(kind: str) -> tuple[QuantizedSite, RepairTask, Tensor]:
    """A quantized site, what its repair may know, and the inputs that it was calibrated on."""
    x = torch.randn(TOKENS, IN) * torch.logspace(-1, 1, IN) + 0.5
    weight, columns, transform = torch.randn(OUT, IN), None, None
    if kind == "transform":
        transform = InputTransform(scale=torch.linspace(0.5, 2, IN), hadamard=16)
        weight = transform.to_weight(weight)
    if kind == "columns":
        columns = FloatColumns(index=COLUMNS.to(torch.int32), weight=weight[:, COLUMNS])
        weight = weight.index_fill(1, COLUMNS, 0.0)
    stats = SiteStats(transform=transform, float_columns=COLUMNS if kind == "columns" else None)
    inputs = None
    if kind == "quantized":
        inputs = stats.quantizer = InputQuantizer(format=FORMATS["int8"], granularity=Granularity(kind="token"))
    stats.add(x, with_gram=True)
    grid = fit_grid(weight, SCHEME.weights.format, SCHEME.weights.granularity)
    site = QuantizedSite(
        weight=QTensor(codes=grid.quantize(weight), grid=grid), inputs=inputs, transform=transform, columns=columns
    )
    return site, RepairTask(weight=weight, stats=stats, recipe=RECIPE, dtype=torch.bfloat16), x


def output_error(site: QuantizedSite, task: RepairTask, x: Tensor) -> float:
    """Squared error of the outputs, but for what rounding of the inputs adds to it."""
    quantizer = task.stats.quantizer
    seen = x if quantizer is None else quantizer.quantize(x).dequantize()
    exact = QuantizedSite(weight=site.weight, transform=site.transform, columns=site.columns)
    dense = task.weight if site.columns is None else site.columns.put_into(task.weight)
    rows = seen if exact.transform is None else exact.transform.apply(seen)
    return float((linear(x, site) - rows @ dense.T).double().square().sum())


@EVERY_REPAIR
@pytest.mark.parametrize("kind", ["plain", "transform", "columns", "quantized"])
def test_outputs_come_nearer(name: str, kind: str) -> None:
    site, task, x = case(kind)
    repaired = REPAIRS[name].apply(site, task)
    assert output_error(repaired, task, x) < output_error(site, task, x)
    assert repaired.num_bits_total > site.num_bits_total, "what is stored is counted"


@EVERY_REPAIR
def test_what_it_adds_is_stored_and_read_back(name: str) -> None:
    site, task, x = case("plain")
    repaired = REPAIRS[name].apply(site, task)
    stored = {own.GUARD: own.guard(torch.bfloat16), **own.encode(repaired)}
    described = {leaf: (tuple(tensor.shape), tensor.dtype) for leaf, tensor in stored.items()}
    own.check_stored("m", SCHEME, OUT, IN, described)
    assert all(own.is_part(leaf) for leaf in stored)
    assert set(stored) - own.needed_tensors(SCHEME) <= set(own.EXTRAS)
    assert torch.equal(linear(x, own.decode(SCHEME, stored)), linear(x, repaired))
    assert torch.equal(linear(x.to("cpu"), repaired.to("cpu")), linear(x, repaired))


@EVERY_REPAIR
def test_a_site_that_no_token_reached_is_no_worse(name: str) -> None:
    site, task, _ = case("plain")
    untouched = RepairTask(weight=task.weight, stats=SiteStats(is_routed=True), recipe=RECIPE, dtype=torch.bfloat16)
    repaired = REPAIRS[name].apply(site, untouched)
    assert repaired.correction is None
    assert float((repaired.dense() - task.weight).norm()) <= float((site.dense() - task.weight).norm())


@EVERY_REPAIR
@pytest.mark.parametrize("scheme", ["W3A16-g32", "W4A8-g32"])
def test_every_engine_adds_it(name: str, scheme: str, tiny_llama_dir: Path, tmp_path: Path, tiny_text: str) -> None:
    (tmp_path / "text.txt").write_text(tiny_text)
    calibration = {"text": str(tmp_path / "text.txt"), "num_samples": 4, "seqlen": 64}
    recipe = Recipe.from_mapping(
        {
            "scheme": scheme, "method": "rtn", "repairs": [name], "low_rank": {"rank": 4}, "max_kl": 50.0,
            "calibration": calibration,
        }
    )  # fmt: skip
    pipeline.quantize(tiny_llama_dir, recipe, tmp_path / "run")
    model = tmp_path / "run" / "4-model"
    site = open_checkpoint(model).read_packed("model.layers.1.mlp.down_proj.weight")
    assert site.correction is not None or site.low_rank is not None
    EXPORTERS["bitwright"].verify(model, False)  # our streamed reading against transformers
    with pytest.raises(RunError, match="stored in layout bitwright, not compressed-tensors"):
        EXPORTERS["compressed-tensors"].check(model, ["bitwright"])
