"""The speed of one model, measured in a process of its own: its memory is then the model's, and no other model's.

    python -m bitwright.speed_worker FILE

Reads the arguments of `measure_speed` from the file and puts the figures into their place; see `worker_process`.
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bitwright.evaluation.generation_speed import measure_speed
from bitwright.progress import Progress
from bitwright.records import write_json_atomic
from bitwright.worker_process import serve


def measure(file: Path, progress: Progress) -> None:
    """Measure the model of a file.

    Raises:
        BitwrightError: as `measure_speed` does.
    """
    asked: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    model_dir = Path(asked.pop("model_dir"))
    write_json_atomic(file, asdict(measure_speed(model_dir, progress=progress, **asked)))


if __name__ == "__main__":
    sys.exit(serve(measure))
