"""The roofline: bytes over bandwidth, operations over rate, and never codes where there is no kernel."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bitwright.errors import RecipeError
from bitwright.schemes import Scheme
from bitwright.search.cost import Workload, cache_bytes, memory, site_latency, site_seconds, speed
from bitwright.search.hardware import Hardware, load_hardware
from bitwright.search.model_shape import LayerCache, ModelShape, shape_of_config

CONFIGS = Path(__file__).parents[1] / "data" / "configs"


@pytest.fixture(scope="module")
def seven() -> ModelShape:
    return shape_of_config(CONFIGS / "llama-2-7b.json")


@pytest.fixture(scope="module")
def a100() -> Hardware:
    return load_hardware("a100-80gb")


def test_a_step_for_one_reads_every_weight_once(seven: ModelShape, a100: Hardware) -> None:
    found = speed(seven, {}, Workload(context=2, prompt=1), a100)
    weights = sum(site.out_features * site.in_features for site in seven.sites) + seven.head_weights
    assert found.bound == "memory"
    assert found.decode_s == pytest.approx(2 * weights / a100.bytes_per_s, rel=1e-3)
    assert found.energy_j_per_token == pytest.approx(400 * found.decode_s)


def test_a_prompt_waits_for_arithmetic(seven: ModelShape, a100: Hardware) -> None:
    tokens = 4096
    site = seven.sites[0]
    moving, computing = site_seconds(seven, site, None, a100, tokens=tokens)
    assert computing == pytest.approx(2 * tokens * site.out_features * site.in_features / 312e12)
    assert site_latency(seven, site, None, a100, tokens=tokens) == computing > moving
    eight = site_latency(seven, site, Scheme.parse("W8A8"), a100, tokens=tokens)
    assert eight == pytest.approx(computing / 2)


def test_schemes_without_kernel_cost_what_16_bit_costs(seven: ModelShape, a100: Hardware) -> None:
    work = Workload(context=1024)
    dense, three = speed(seven, {}, work, a100), seven.uniform(Scheme.parse("W3A16-g128"))
    found = speed(seven, three, work, a100)
    assert (found.decode_s, found.prefill_s) == (dense.decode_s, dense.prefill_s)
    assert found.decoded_sites == len(seven.sites)
    assert memory(seven, three, work, a100) == memory(seven, {}, work, a100)
    assert memory(seven, three, work, None).weight_bytes < memory(seven, {}, work, None).weight_bytes / 4


def test_without_a_device_the_largest_weight_is_decoded_beside_the_packed_ones(seven: ModelShape) -> None:
    here, there = (memory(seven, {}, Workload(), hardware) for hardware in (None, load_hardware("a100-80gb")))
    assert here.workspace_bytes - there.workspace_bytes == 4096 * 11008 * (2 + 1)
    assert (here.weight_bytes, here.cache_bytes) == (there.weight_bytes, there.cache_bytes)


def test_a_device_that_keeps_codes_saves_memory_and_no_time(seven: ModelShape, a100: Hardware) -> None:
    packed, work = replace(a100, kernels=(), stays_packed=True), Workload(context=1024)
    four = seven.uniform(Scheme.parse("W4A16-g128"))
    assert memory(seven, four, work, packed) == memory(seven, four, work, None)
    assert speed(seven, four, work, packed) == speed(seven, four, work, replace(packed, stays_packed=False))


def test_what_is_not_published_is_not_computed(seven: ModelShape) -> None:
    found = speed(seven, {}, Workload(), load_hardware("apple-m3-max"))
    assert found.prefill_s is None
    assert found.energy_j_per_token is None
    assert found.decode_s > 0


def test_the_cache(seven: ModelShape) -> None:
    # Keys and values of 32 layers of 4096 numbers, 2 bytes each.
    assert cache_bytes(seven, 1000, 3, 16) == 2 * 32 * 4096 * 2 * 1000 * 3
    assert cache_bytes(seven, 1000, 3, 4) * 4 == cache_bytes(seven, 1000, 3, 16)
    windowed = replace(seven, caches=(LayerCache(values_per_token=10, window=100),))
    assert cache_bytes(windowed, 1000, 1, 8) == 1000


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kv_bits": -8.0}, "--kv-bits must be above 0 and at most 32, got -8"),
        ({"kv_bits": 0.0}, "--kv-bits"),
        ({"context": 0}, "--context must be at least 1, got 0"),
        ({"batch": -1}, "--batch"),
        ({"prompt": 0}, "--prompt"),
        ({"context": 16, "prompt": 16}, "--prompt 16 leaves no room"),
    ],
)
def test_a_workload_that_cannot_be_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Workload(**options)
