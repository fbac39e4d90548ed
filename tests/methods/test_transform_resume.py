"""A run with transforms and repairs that dies after a block ends with the bytes of one that was never disturbed."""

import hashlib
from pathlib import Path

import pytest

from bitwright import pipeline
from bitwright.recipe import Recipe


class Killed(BaseException):
    """Stands for a kill in the same process: nothing in bitwright catches it."""


def shards(run: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted((run / "4-model").iterdir())}


@pytest.mark.parametrize(
    ("scheme", "transforms", "repairs"),
    [
        ("W3A16-g32", ["awq"], []),
        ("W8A8-static", ["smoothquant"], []),
        ("W8A8", ["llm_int8"], ["low_rank", "bias"]),
        ("W4A8-g32", ["awq"], ["bias"]),
    ],
)
def test_killed_after_a_block(
    scheme: str, transforms: list[str], repairs: list[str], tiny_llama_dir: Path, tmp_path: Path, tiny_text: str
) -> None:
    (tmp_path / "text.txt").write_text(tiny_text)
    recipe = Recipe.from_mapping(
        {
            "scheme": scheme, "method": "gptq", "transforms": transforms, "repairs": repairs, "max_kl": 50.0,
            "llm_int8": {"threshold": 2.0}, "awq": {"explicit": bool(repairs) and "awq" in transforms},
            "calibration": {"text": str(tmp_path / "text.txt"), "num_samples": 8, "seqlen": 128},
        }
    )  # fmt: skip
    pipeline.quantize(tiny_llama_dir, recipe, tmp_path / "undisturbed")

    def progress(what: str, done: int, total: int) -> None:
        if what == "quantize" and 0 < done < total:
            raise Killed

    with pytest.raises(Killed):
        pipeline.quantize(tiny_llama_dir, recipe, tmp_path / "killed", progress=progress)
    result = pipeline.quantize(tiny_llama_dir, recipe, tmp_path / "killed")
    assert result.resumed_blocks == 1
    assert shards(tmp_path / "killed") == shards(tmp_path / "undisturbed")
