"""Two processes that torchrun might have started share the work and meet in the folder; one table on disk."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bitwright.errors import RecipeError, RunError, VerificationError
from bitwright.model.checkpoint import open_checkpoint
from bitwright.model.stream import StreamedModel
from bitwright.preparation import model_sites
from bitwright.schemes import Scheme
from bitwright.search import score_cache
from bitwright.search.score_cache import ScoreCache, Share
from bitwright.search.sensitivity import measure_sensitivities

SCORES = ("output_sqnr", "trace", "fisher", "measured")
ROUNDING = 1e-3
"""Float32 sums whose order may differ between processes, relative to their result."""
SCRIPT = """
import json, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from bitwright.model.checkpoint import open_checkpoint
from bitwright.model.stream import StreamedModel
from bitwright.preparation import model_sites
from bitwright.schemes import Scheme
from bitwright.search.sensitivity import measure_sensitivities
model = StreamedModel(open_checkpoint(sys.argv[1]))
windows = torch.tensor(json.loads(sys.argv[3]))
found = measure_sensitivities(
    model, model_sites(model), windows, scores=sys.argv[4].split(","), folder=Path(sys.argv[2]),
    schemes=[Scheme.parse("W3A16-g32")],
)
print(json.dumps({score: each.to_json() for score, each in found.items()}))
"""


@pytest.mark.slow
def test_two_ranks_do_half_each_and_both_have_all(
    tiny_llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    windows = torch.randint(2, 320, (3, 16))
    arguments = [str(tiny_llama_dir), str(tmp_path / "two"), json.dumps(windows.tolist()), ",".join(SCORES)]
    other = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, *arguments], stdout=subprocess.PIPE, text=True,
        env={**os.environ, "RANK": "1", "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    model = StreamedModel(open_checkpoint(tiny_llama_dir))

    def run(folder: str) -> dict[str, Any]:
        found = measure_sensitivities(
            model, model_sites(model), windows, scores=SCORES, folder=tmp_path / folder,
            schemes=[Scheme.parse("W3A16-g32")],
        )  # fmt: skip
        return {score: each.to_json() for score, each in found.items()}

    alone = run("one")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    together = run("two")
    assert json.loads(other.communicate(timeout=600)[0]) == together

    for score, each in alone.items():
        for site, row in each["values"].items():
            assert together[score]["values"][site] == pytest.approx(row, rel=ROUNDING), (score, site)
    written = {path.name: path.read_text().splitlines() for path in (tmp_path / "two").rglob("*.jsonl")}
    for table in ("output_sqnr", "fisher", "measured-3"):
        assert [len(written[f"weights-{table}.rank{rank}.jsonl"]) for rank in (0, 1)] == [7, 7]
    assert sorted(len(written[f"weights-probe.rank{rank}.jsonl"]) for rank in (0, 1)) == [1, 2]


def test_a_rank_is_read_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert Share.of_environment() == Share(rank=0, num_ranks=1)
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "3")
    share = Share.of_environment()
    assert [index for index in range(7) if share.has(index)] == [2, 5]
    monkeypatch.setenv("RANK", "3")
    with pytest.raises(RecipeError, match="not a rank of a world"):
        Share.of_environment()


def test_a_torn_line_does_not_count_and_is_overwritten(tmp_path: Path) -> None:
    ScoreCache(tmp_path, "fisher", 0).add("a", {"W4": 1.0})
    file = tmp_path / "fisher.rank0.jsonl"
    with file.open("a") as handle:
        handle.write('{"row": "b", "val')
    cache = ScoreCache(tmp_path, "fisher", 0)
    assert cache.missing("a", ["W4", "W2"]) == ("W2",)
    assert cache.missing("b", ["W4"]) == ("W4",)
    cache.add("b", {"W4": 2.0})
    assert ScoreCache(tmp_path, "fisher", 1).rows == {"a": {"W4": 1.0}, "b": {"W4": 2.0}}


def test_what_is_no_score_is_named(tmp_path: Path) -> None:
    cache = ScoreCache(tmp_path, "fisher", 0)
    with pytest.raises(VerificationError, match="a: its fisher in W4 is nan"):
        cache.add("a", {"W4": float("nan")})
    (tmp_path / "fisher.rank1.jsonl").write_text('{"site": "a"}\n')
    with pytest.raises(RunError, match=r"rank1\.jsonl: holds a line that is no score"):
        cache.refresh()


def test_a_rank_that_never_delivers_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(score_cache, "PATIENCE_SECONDS", 0.0)
    monkeypatch.setattr(score_cache, "POLL_SECONDS", 0.001)
    with pytest.raises(RunError, match="1 rows of fisher are missing"):
        ScoreCache(tmp_path, "fisher", 0).wait(["a"], ["W4"], lambda *_: None)


def test_two_processes_of_one_rank_do_not_mix(tmp_path: Path) -> None:
    with Share().locked(tmp_path), pytest.raises(RunError, match="as rank 0"), Share().locked(tmp_path):
        pass
