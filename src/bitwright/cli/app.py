"""The command line: parse, call the pipeline, print, and turn errors into one line and an exit code.

Exit codes: 0 good; 1 the result failed verification or a quality gate; 2 bad input; 130 interrupted.
Heavy imports happen inside the commands, so that `--help` answers at once.
"""

import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from bitwright.cli.advise_command import advise
from bitwright.cli.console import ProgressBars, fail, listed, print_json, show
from bitwright.cli.diagnose_command import diagnose
from bitwright.cli.merge_command import merge
from bitwright.cli.quantize_command import quantize
from bitwright.cli.report_command import report
from bitwright.cli.search_command import search
from bitwright.cli.sensitivity_command import sensitivity
from bitwright.cli.shared_options import AsJson, Device, Dtype, Model, Quiet, RemoteCode
from bitwright.cli.speed_command import speed
from bitwright.cli.tasks_command import tasks
from bitwright.cli.train_command import train
from bitwright.errors import BitwrightError

INTERRUPTED = "interrupted; the same command resumes a quantize run or a grid"
INTERRUPTED_STATUS = 130
CATALOGUE_WIDTH = 160
_UsageError: Any = (
    typer.BadParameter.__base__
)  # typer's releases differ in which click, or copy of click, it comes from

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help="LLM compression with proof."
)


@app.command()
def inspect(
    model: Model,
    calibration: Annotated[
        str | None, typer.Option(help="Text to run: also find outliers, and what each format would lose and why.")
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Windows of that text.")] = 16,
    seqlen: Annotated[int | None, typer.Option(help="Tokens per window; at most 512 unless given.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the choice of windows.")] = 0,
    as_json: AsJson = False,
    device: Device = "cpu",
    quiet: Quiet = False,
    trust_remote_code: RemoteCode = False,
) -> None:
    """Show sites, groups, edges and sizes of a model, and what each common scheme would weigh."""
    from bitwright.cli.outliers import outlier_tables
    from bitwright.cli.tables import inspection_tables
    from bitwright.pipeline import inspect as run

    with ProgressBars(quiet=quiet or as_json) as progress:
        found = run(
            model,
            calibration=calibration,
            num_samples=samples,
            seqlen=seqlen,
            seed=seed,
            device=device,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
    if as_json:
        print_json(found.to_json())
    elif not quiet:
        show(*inspection_tables(found), *outlier_tables(found.activity))


@app.command()
def formats(as_json: AsJson = False) -> None:
    """List every number format: bits, levels, range, granularity, the exports that carry it, and its reference."""
    from bitwright.catalogue import catalogue
    from bitwright.cli.tables import formats_table

    rows = catalogue()
    if as_json:
        print_json([asdict(row) for row in rows])
    else:
        show(formats_table(rows), width=CATALOGUE_WIDTH)


@app.command()
def methods(as_json: AsJson = False) -> None:
    """List every transform, solver and repair that `--method` may join, and which need calibration text."""
    from bitwright.cli.methods import methods_rows, methods_table

    if as_json:
        print_json(methods_rows())
    else:
        show(methods_table())


@app.command("testbed")
def plant(
    model: Model,
    out: Annotated[Path, typer.Option(help="Model directory to write.")],
    channels: Annotated[int, typer.Option(min=1, help="Hidden channels that become outliers.")] = 4,
    factor: Annotated[float, typer.Option(help="How much louder; a power of two.")] = 64.0,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the choice of channels.")] = 0,
    device: Device = "cpu",
    quiet: Quiet = False,
    as_json: AsJson = False,
    trust_remote_code: RemoteCode = False,
) -> None:
    """Plant activation outliers in a model without changing its function: a bed to test methods on."""
    from bitwright.cli.outliers import testbed_table
    from bitwright.testbed import plant_outliers

    with ProgressBars(quiet=quiet or as_json) as progress:
        planted = plant_outliers(
            model,
            out,
            channels=channels,
            factor=factor,
            seed=seed,
            device=device,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
    if as_json:
        print_json(planted.to_json())
    elif not quiet:
        show(testbed_table(planted))


app.command()(quantize)


@app.command()
def bench(
    model: Model,
    schemes: Annotated[list[str], typer.Option(help="Schemes, separated by commas; may be repeated.")],
    methods: Annotated[list[str], typer.Option(help="Methods, or recipe files whose scheme is replaced; likewise.")],
    text: Annotated[str, typer.Option(help="What is evaluated on: text file, JSONL, hub:… or stdlib:heldout.")],
    out: Annotated[Path, typer.Option(help="Folder of the grid; the same command resumes.")],
    calibration: Annotated[
        str | None, typer.Option(help="Text file, JSONL, hub:NAME[:CONFIG[:SPLIT]], stdlib, or self.")
    ] = None,
    samples: Annotated[int | None, typer.Option(help="Calibration windows.")] = None,
    seqlen: Annotated[int | None, typer.Option(help="Tokens per window, of calibration and evaluation.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the choice of calibration windows.")] = None,
    windows: Annotated[int | None, typer.Option(min=1, help="Evaluate only the first windows.")] = None,
    keep_models: Annotated[bool, typer.Option("--keep-models", help="Do not remove the weights of each cell.")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Discard what an earlier grid left in --out.")] = False,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    quiet: Quiet = False,
    as_json: AsJson = False,
    trust_remote_code: RemoteCode = False,
) -> None:
    """Quantize and evaluate in every combination of scheme and method; write a table and an interactive page."""
    from bitwright.bench import run_bench
    from bitwright.cli.grid import grid_notes, grid_table

    with ProgressBars(quiet=quiet or as_json) as progress:
        result = run_bench(
            model,
            out,
            schemes=listed(schemes),
            methods=listed(methods),
            text=text,
            calibration=calibration,
            num_samples=samples,
            seqlen=seqlen,
            seed=seed,
            max_windows=windows,
            keep_models=keep_models,
            fresh=fresh,
            device=device,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
    if as_json:
        print_json(result.records)
    elif not quiet:
        show(grid_table(result), *grid_notes(result), f"page: {result.page}", width=CATALOGUE_WIDTH)
    if result.problem is not None:
        fail(result.problem, 1)


@app.command()
def evaluate(
    target: Annotated[str, typer.Argument(metavar="MODEL|RUN", help="Model directory, hub id or run directory.")],
    text: Annotated[str, typer.Option(help="Text file, JSONL, hub:NAME[:CONFIG[:SPLIT]] or stdlib:heldout.")],
    reference: Annotated[str | None, typer.Option(help="Also measure the divergence from this model.")] = None,
    seqlen: Annotated[
        int | None, typer.Option(help="Context length; the model's own, at most 2048, unless given.")
    ] = None,
    windows: Annotated[int | None, typer.Option(min=1, help="Evaluate only the first windows.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the score as JSON; '-' prints it.")] = None,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    quiet: Quiet = False,
    trust_remote_code: RemoteCode = False,
) -> None:
    """Measure perplexity and, against a reference, KL divergence and same-top-1."""
    from bitwright.cli.tables import score_table
    from bitwright.pipeline import evaluate as run
    from bitwright.records import write_json_atomic

    to_stdout = json_file is not None and str(json_file) == "-"
    with ProgressBars(quiet=quiet or to_stdout) as progress:
        score, circumstances = run(
            target,
            text,
            reference=reference,
            seqlen=seqlen,
            max_windows=windows,
            device=device,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
    entry = {**circumstances, **asdict(score)}
    if to_stdout:
        print_json(entry)
        return
    if json_file is not None:
        write_json_atomic(json_file, entry)
    if not quiet:
        show(score_table(score, circumstances))


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="Finished run directory.")],
    out: Annotated[Path, typer.Option(help="Directory to write.")],
    to: Annotated[
        str, typer.Option(help="compressed-tensors, bitsandbytes (nf4, fp4) or bitwright.")
    ] = "compressed-tensors",
    verify: Annotated[
        bool, typer.Option(help="Load the export with its engine and compare weights and logits.")
    ] = True,
    quiet: Quiet = False,
    as_json: AsJson = False,
    trust_remote_code: RemoteCode = False,
) -> None:
    """Write a run's model for an engine, and prove that the engine reads what was decided."""
    from bitwright.pipeline import export as write

    with ProgressBars(quiet=quiet or as_json) as progress:
        comparison = write(run, to, out, verify=verify, trust_remote_code=trust_remote_code, progress=progress)
    if as_json:
        print_json({"out": str(out), **comparison})
    elif not quiet:
        show(f"{out}: {_checked(comparison)}")


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Where the demo's runs and report go.")] = Path("runs/demo"),
    quiet: Quiet = False,
) -> None:
    """Quantize the embedded demo model four ways, compare, and write the report."""
    from bitwright.cli.tables import demo_table
    from bitwright.demo import run_demo

    with ProgressBars(quiet=quiet) as progress:
        rows, page = run_demo(out, progress)
    show(demo_table(rows), f"report: {page}")


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Say what is installed, which devices there are, what is missing and how to get it."""
    from bitwright.cli.tables import doctor_table
    from bitwright.diagnosis import diagnose_installation

    found = diagnose_installation()
    if as_json:
        print_json(found)
    else:
        show(doctor_table(found))


for command in (sensitivity, search, advise, tasks, speed, diagnose, merge, report):
    app.command()(command)
app.add_typer(train, name="train")


def main() -> None:
    """Entry point: one line per error, the right exit code, never a traceback for what the user can mend."""
    # Before torch is imported: waiting threads must not spin, or a second job on the machine slows both several times.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        status = app(standalone_mode=False)
    except BitwrightError as error:
        fail(str(error), error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        fail(INTERRUPTED, INTERRUPTED_STATUS)
    except typer.Exit as stop:
        sys.exit(stop.exit_code)
    except OSError as error:
        fail(_describe_os_error(error), 2)
    except _UsageError as error:
        if message := error.format_message():
            fail(message, 2)
        sys.exit(2)  # nothing was asked, and the help is printed
    else:
        if status == INTERRUPTED_STATUS:  # newer typer turns Ctrl-C into this return value
            fail(INTERRUPTED, INTERRUPTED_STATUS)
        sys.exit(status if isinstance(status, int) else 0)


def _checked(comparison: dict[str, Any]) -> str:
    """What an export's verification found, in one line."""
    if not comparison:
        return "not verified"
    measure, key = ("RMS", "rms_logit") if "rms_logit_bound" in comparison else ("largest", "max_logit")
    bound = comparison["rms_logit_bound" if measure == "RMS" else "logit_bound"]
    return (
        f"{comparison['engine']} loads it: {comparison['weights_compared']} tensors equal, "
        f"{measure} logit difference {comparison[f'{key}_difference']:.2g} (allowed {bound:.2g})"
    )


def _describe_os_error(error: OSError) -> str:
    place = f"{error.filename}: " if error.filename else ""
    return (
        f"{place}{error.strerror or error}. Free space or choose a place that can be written; the same command resumes."
    )


if __name__ == "__main__":
    main()
