"""`import bitwright`, early or late, suffices to load a model; without it transformers refuses, and says what to do."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from transformers import AutoModelForCausalLM

import bitwright
from bitwright.model.layouts import own
from bitwright.recipe import Recipe


@pytest.fixture(scope="module")
def run(tiny_llama_dir: Path, tiny_text: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in our layout; read only."""
    folder = tmp_path_factory.mktemp("hook")
    (folder / "text.txt").write_text(tiny_text, encoding="utf-8")
    recipe = Recipe.from_mapping(
        {
            "scheme": "nf4-b64-dq",
            "method": "rtn",
            "layout": "bitwright",
            "calibration": {"text": str(folder / "text.txt"), "num_samples": 1, "seqlen": 32},
            "max_kl": 50.0,
        }
    )
    return bitwright.quantize(tiny_llama_dir, recipe, folder / "run").run


@pytest.fixture
def saved(run: Path, tmp_path: Path) -> Path:
    """A model saved by transformers, whose configuration has lost the message, and the logits it should have."""
    model = cast(Any, AutoModelForCausalLM.from_pretrained(run))
    model.save_pretrained(tmp_path / "saved")
    with torch.no_grad():
        torch.save(model(input_ids=torch.arange(2 * 24).view(2, 24) * 5 % 256).logits, tmp_path / "logits.pt")
    return tmp_path / "saved"


COMPUTE = """
import json, sys
before = set(sys.modules)
from pathlib import Path
{first}
import torch
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
def outcome(directory, **options):
    try:
        model = AutoModelForCausalLM.from_pretrained(directory, **options)
    except Exception as error:
        return [type(error).__name__, str(error)]
    with torch.no_grad():
        found = model(input_ids=torch.arange(2 * 24).view(2, 24) * 5 % 256).logits
    return torch.equal(found, torch.load(Path(sys.argv[1]).parent / "logits.pt"))
"""


def run_python(program: str, *arguments: Path) -> list[Any]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", program, *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return json.loads(result.stdout.splitlines()[-1])


def test_importing_bitwright_first_suffices(saved: Path, run: Path) -> None:
    """It costs nothing by itself: a finder waits, and goes when it has done its work."""
    first = (
        "import bitwright\n"
        "light = not {'torch', 'transformers'} & (set(sys.modules) - before)\n"
        "def waits(): return 'QuantizersFinder' in [type(finder).__name__ for finder in sys.meta_path]\n"
        "waiting = waits()"
    )
    program = (
        COMPUTE.format(first=first)
        + "found = [outcome(place) for place in sys.argv[1:]]\n"
        + "print(json.dumps([found, light, waiting, waits()]))"
    )
    assert run_python(program, saved, run, run / "4-model") == [[True] * 3, True, True, False]


def test_without_bitwright_nothing_loads_and_importing_it_late_suffices(saved: Path, run: Path) -> None:
    program = (
        COMPUTE.format(first="import transformers.quantizers.auto")
        + "found = [outcome(place) for place in sys.argv[1:]]\n"
        + "found.append(outcome(sys.argv[2], ignore_mismatched_sizes=True))\n"
        + "assert 'bitwright' not in sys.modules\n"
        + "import bitwright\n"
        + "print(json.dumps(found + [outcome(place) for place in sys.argv[1:]]))"
    )
    resaved, whole, model, forced, *late = run_python(program, saved, run, run / "4-model")
    for name, message in (whole, model, forced):
        assert name == "ValueError"
        assert message.endswith(own.NEEDS_BITWRIGHT)
    assert resaved[0] == "RuntimeError", "the guards: no weight has their shape"
    assert late == [True, True, True]


def test_the_message_says_what_to_do() -> None:
    assert "pip install bitwright" in own.NEEDS_BITWRIGHT
    assert "`import bitwright` before from_pretrained" in own.NEEDS_BITWRIGHT
