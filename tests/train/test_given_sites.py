from pathlib import Path

import pytest
import torch
from torch import nn

from bitwright.errors import CheckpointError, RecipeError, UnknownName
from bitwright.model.layouts import own
from bitwright.numerics.inputs import QuantizedSite
from bitwright.schemes import FAMILIES, Scheme, group
from bitwright.train.given_sites import SCHEMES, TENSORS, GivenSites, write_given_sites
from bitwright.train.qat import convert, prepare

COLUMNS = 64
NAMES = (
    *FAMILIES, "W8A16", "W7A16", "W6A16", "W5A16", "W4A16", "W4A16-g32", "W4A16-asym", "W3A16", "W2A16", "W4A16-tensor",
    "W4A16-block32", "W4A16-g64-floatzero", "W8A8", "W4A8", "W4A8-asym", "W8A8-acttensor", "kmeans4-g128", "nvfp4-a16",
    *(f"W8A8-static-{name}" for name in ("minmax", "average", "percentile", "mse")), "fp8-tensor-a16", "fp4-bnb-dq",
    "ternary-channel",
    "W8A8-static-entropy", "W8A8-static-actasym", "W8A8-static-actg64", "W4A4-actg64", "fp8-static", "fp8-block128",
    "nf4-b64-dq", "lut4-g64-dq", "kmeans4-channel-o0.45", "kmeans3-tensor", "binary-tensor", "mxfp4-a16",
)  # fmt: skip


def effective(name: str) -> Scheme:
    scheme = Scheme.parse(name)
    granularity = scheme.weights.granularity
    wide = granularity.kind == "group" and (granularity.group_size or 0) > COLUMNS
    return scheme.with_granularity(group(COLUMNS)) if wide else scheme


def made(schemes: dict[str, Scheme]) -> dict[str, QuantizedSite]:
    model = nn.ModuleDict({name: nn.Linear(COLUMNS, 8, dtype=torch.bfloat16) for name in schemes})
    for module in prepare(model, schemes).values():
        module(torch.randn(4, COLUMNS))
    return convert(model)


def test_every_scheme_comes_back_bit_for_bit(tmp_path: Path) -> None:
    schemes = {f"site{number}": effective(name) for number, name in enumerate(NAMES)}
    sites = made(schemes)

    write_given_sites(tmp_path / "given", sites, schemes)
    given = GivenSites(tmp_path / "given")

    assert given.schemes == schemes
    for name, site in sites.items():
        expected, found = own.encode(site), own.encode(given.read(name))
        assert expected.keys() == found.keys()
        for part, tensor in expected.items():
            assert tensor.dtype == found[part].dtype
            assert torch.equal(tensor.view(torch.uint8), found[part].view(torch.uint8)), (schemes[name], part)
        assert torch.equal(site.dense(), given.read(name).dense())


def test_dotted_names_are_kept(tmp_path: Path) -> None:
    site = made({"a": Scheme.parse("W4A16-g32")})["a"]
    write_given_sites(tmp_path, {"model.layers.0.mlp.down_proj": site}, {"model.layers.0.mlp.down_proj": Scheme.parse("W4A16-g32")})  # fmt: skip  # noqa: E501
    assert torch.equal(GivenSites(tmp_path).read("model.layers.0.mlp.down_proj").dense(), site.dense())
    with pytest.raises(UnknownName, match="no site"):
        GivenSites(tmp_path).read("model.layers.0.mlp.up_proj")


def test_unfinished_and_damaged_folders_are_refused(tmp_path: Path) -> None:
    scheme = Scheme.parse("W4A16-g32")
    sites = made({"a": scheme})
    with pytest.raises(RecipeError, match="no scheme is given"):
        write_given_sites(tmp_path, sites, {})
    with pytest.raises(CheckpointError, match="missing"):
        GivenSites(tmp_path)
    write_given_sites(tmp_path, sites, {"a": scheme})
    text = (tmp_path / SCHEMES).read_text()

    (tmp_path / SCHEMES).write_text(text.replace("g32", "g16"))
    with pytest.raises(CheckpointError, match="do not belong together"):
        GivenSites(tmp_path).read("a")
    (tmp_path / SCHEMES).write_text(text.replace('"version": 1', '"version": 2'))
    with pytest.raises(CheckpointError, match="version"):
        GivenSites(tmp_path)
    (tmp_path / SCHEMES).write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read"):
        GivenSites(tmp_path)
    (tmp_path / SCHEMES).write_text(text.replace('"a"', '"b"'))
    with pytest.raises(CheckpointError, match="belongs to no site"):
        GivenSites(tmp_path)
    (tmp_path / SCHEMES).write_text(text)
    (tmp_path / TENSORS).write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="cannot be read"):
        GivenSites(tmp_path)
