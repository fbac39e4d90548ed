"""`bitwright quantize`: the command."""

from pathlib import Path
from typing import Annotated

import typer

from bitwright.cli.console import ProgressBars, fail, print_json, show
from bitwright.cli.shared_options import AsJson, Device, Dtype, FreshRun, MaxKl, Model, Quiet, RecipeFile, RemoteCode
from bitwright.cli.speed_command import MeasureSpeed, add_speed


def quantize(
    model: Model,
    out: Annotated[Path, typer.Option(help="Run directory; the same command resumes an interrupted run.")],
    scheme: Annotated[
        str | None, typer.Option(help="W4A16-g128, W8A8, nf4-b64-dq, fp8, mxfp4-a16 …; see bitwright formats.")
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(help="rtn, gptq, auto …, or a composition such as awq+gptq+bias; see bitwright methods."),
    ] = None,
    calibration: Annotated[
        str | None, typer.Option(help="Text file, JSONL, hub:NAME[:CONFIG[:SPLIT]], stdlib, or self.")
    ] = None,
    samples: Annotated[int | None, typer.Option(help="Calibration windows.")] = None,
    seqlen: Annotated[int | None, typer.Option(help="Tokens per window.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the choice of windows.")] = None,
    ignore: Annotated[list[str] | None, typer.Option(help="Leave matching sites in 16 bit; may be repeated.")] = None,
    recipe: RecipeFile = None,
    ragged: Annotated[
        str | None, typer.Option(help="Rows that the group size does not divide: auto, refuse, divisor.")
    ] = None,
    layout: Annotated[str | None, typer.Option(help="How it is stored: auto, compressed-tensors or bitwright.")] = None,
    max_kl: MaxKl = None,
    fresh: FreshRun = False,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    measure_speed: MeasureSpeed = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
    trust_remote_code: RemoteCode = False,
) -> None:
    """Quantize a model into a run directory, measure what was lost, and fail if it is too much."""
    from bitwright.cli.tables import estimate_line, run_table
    from bitwright.pipeline import quantize as run
    from bitwright.recipe_builder import build_recipe

    given = {"scheme": scheme, "method": method, "ragged": ragged, "layout": layout, "max_kl": max_kl}
    calibrate = {"text": calibration, "num_samples": samples, "seqlen": seqlen, "seed": seed}
    wished = build_recipe(recipe, given, calibrate, ignore=ignore or ())
    with ProgressBars(quiet=quiet or as_json) as progress:
        result = run(
            model,
            wished,
            out,
            fresh=fresh,
            device=device,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            progress=progress,
            announce=lambda needed: None if quiet or as_json else show(estimate_line(needed)),
        )
    if not (quiet or as_json):
        show(run_table(result))
    speeds = add_speed(
        result.run, measure_speed, device=device, trust_remote_code=trust_remote_code, quiet=quiet or as_json
    )
    if as_json:
        print_json({"run": str(result.run), "failure": result.failure, **result.results, **speeds})
    if result.failure is not None:
        fail(f"{result.run}: {result.failure}", 1)
