"""CPU seconds of each stage of quantizing a model.

    python benchmarks/speed.py [--model DIR] [--scheme W4A16-g128] [--method gptq] [--calibration stdlib]
        [--samples 128] [--seqlen 256] [--threads 1] [--repeat 1] [--dtype float32]

CPU seconds of the process, unlike those of a clock, still mean something while other work shares the cores: with one
thread within a tenth or so. Time within a stage that another stage takes is counted there only. With --repeat the
least of several runs is shown, stage by stage.
"""

import argparse
import importlib
import tempfile
import time
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

STAGES = {
    "preparation": "bitwright.pipeline:prepare",
    "loading blocks": "bitwright.model.skeleton:Skeleton.load",
    "structure": "bitwright.walk:propose",
    "transforms and teacher": "bitwright.walk:Walk._stage",
    "running blocks for statistics": "bitwright.methods.gatherer:Gatherer.collect",
    "Gram matrices": "bitwright.calibration.collect:accumulate_gram",
    "files of hidden states, reading": "bitwright.model.activations:Activations.read",
    "files of hidden states, writing": "bitwright.model.activations:Activations.write",
    "range search": "bitwright.group_solver:fit",
    "factorisation": "bitwright.methods.gptq:damped_inverse_cholesky",
    "column sweep": "bitwright.group_solver:GroupSolver._solve_stack",
    "describing sites": "bitwright.group_solver:_describe",
    "moving on to the next block": "bitwright.walk:Walk._propagate",
    "running the gate's text": "bitwright.walk:Walk._check",
    "writing a block": "bitwright.exporters.model_writer:ModelWriter.write_shard",
    "conclusion": "bitwright.pipeline:conclude",
}
"""Stage -> module:function that it is."""
REST = "the rest"


class Clock:
    """Charges CPU seconds to the innermost stage that runs."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._running = [REST]
        self._since = time.process_time()

    def switch(self) -> None:
        now = time.process_time()
        stage = self._running[-1]
        self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self._since
        self._since = now

    def watch(self, stage: str, place: str) -> None:
        """Put a function that charges its time in the place of another."""
        module, _, path = place.partition(":")
        owner: Any = importlib.import_module(module)
        *parents, name = path.split(".")
        for parent in parents:
            owner = getattr(owner, parent)
        setattr(owner, name, self._watched(stage, getattr(owner, name)))

    def _watched(self, stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def watched(*args: Any, **kwargs: Any) -> Any:
            self.switch()
            # The gate's text runs through the functions of other stages.
            self._running.append(self._running[-1] if self._running[-1] == "running the gate's text" else stage)
            try:
                return function(*args, **kwargs)
            finally:
                self.switch()
                self._running.pop()

        return watched


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="model directory; the demo model unless given")
    parser.add_argument("--scheme", default="W4A16-g128")
    parser.add_argument("--method", default="gptq")
    parser.add_argument("--calibration", default="stdlib")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--dtype", default="float32", help="of products and hidden states")
    args = parser.parse_args()

    import torch

    torch.set_num_threads(args.threads)
    clock = Clock()
    for stage, place in STAGES.items():
        clock.watch(stage, place)
    runs: list[dict[str, float]] = []
    figures: dict[str, Any] = {}
    for _ in range(args.repeat):
        clock.switch()
        clock.seconds = {}
        figures = quantize(args)
        clock.switch()
        runs.append(clock.seconds)
    print(f"{args.method} {args.scheme}: KL {figures['kl_mean']:.6f}, {figures['result_hash'][:16]}")
    for stage in (*STAGES, REST):
        print(f"{min(run.get(stage, 0.0) for run in runs):8.2f}  {stage}")
    print(f"{min(sum(run.values()) for run in runs):8.2f}  in all, CPU seconds")


def quantize(args: argparse.Namespace) -> dict[str, Any]:
    from bitwright import pipeline
    from bitwright.demo import demo_model
    from bitwright.recipe_builder import build_recipe

    calibration = {"text": args.calibration, "num_samples": args.samples, "seqlen": args.seqlen}
    recipe = build_recipe(None, {"scheme": args.scheme, "method": args.method}, calibration)
    with tempfile.TemporaryDirectory(prefix="bitwright-") as work:
        return pipeline.quantize(args.model or demo_model(), recipe, Path(work) / "run", dtype=args.dtype).results


if __name__ == "__main__":
    main()
