"""What every training has in common as a run: it belongs to what was asked, resumes, and leaves figures and a curve."""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from bitwright.records import Environment, append_jsonl
from bitwright.runs import RunDirectory
from bitwright.train.processes import Processes

TRAINING, LOSSES = "training", "losses.jsonl"


def carry_out(
    run: RunDirectory, asked: Mapping[str, Any], work: Callable[[], None], processes: Processes, *, fresh: bool
) -> dict[str, Any]:
    """Do the work of a run, unless it is finished, in every process; the main one alone makes the folder its own.

    Args:
        asked: plain data; all that determines the result.
        work: ends with `run.finish` in the main process.
    Returns:
        the results of the finished run.
    Raises:
        RunError: the folder belongs to another run.
    """
    fingerprint = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()
    run.check(fingerprint, fresh=fresh)
    if fresh or not run.is_complete:
        processes.wait()  # until all have seen that it is not finished
        try:
            if processes.is_main:
                run.start(fingerprint, dict(asked), fresh=fresh)
                run.commit({"training": True})
            processes.wait()
            work()
            processes.wait()
        finally:
            run.release()
    info = run.info
    assert info is not None
    return cast(dict[str, Any], info["results"])


def load_in_memory(model: Path, device: str, dtype: torch.dtype, *, trust_remote_code: bool) -> nn.Module:
    """Load a whole model, as training needs it."""
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=dtype, trust_remote_code=trust_remote_code)
    return cast(nn.Module, cast(Any, loaded).to(device))


def write_training_records(run: RunDirectory, results: Mapping[str, Any]) -> None:
    """Write the records of a training: the figures, then the loss of every step."""
    losses = run.work / TRAINING / LOSSES
    steps = [json.loads(line) for line in losses.read_text(encoding="utf-8").splitlines()]
    headline = {key: value for key, value in results.items() if key not in ("losses", "kind")}
    run.records.unlink(missing_ok=True)
    append_jsonl(
        run.records,
        {"kind": "environment", **asdict(Environment.capture())},
        {"kind": "training", "method": results["kind"], **headline},
        *({"kind": "training_step", **step} for step in steps),
    )
