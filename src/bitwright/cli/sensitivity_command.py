"""`bitwright sensitivity`: what each site can bear, by several scores, and how well the cheap ones foresee the rest."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich import box
from rich.table import Table

from bitwright.cli.console import ProgressBars, listed, print_json, wide_console
from bitwright.cli.shared_options import AsJson, Calibration, Device, Model, Quiet, RemoteCode
from bitwright.errors import UnknownName, did_you_mean

if TYPE_CHECKING:
    from bitwright.search.sensitivity import Sensitivity
    from bitwright.sensitivity_report import SensitivityReport

PIPE_WIDTH = 160
TARGETS: dict[str, Literal["weights", "inputs", "cache"]] = {"weights": "weights", "inputs": "inputs", "cache": "cache"}
_NATS = ("trace", "fisher", "output_gradient", "window_gradient", "measured")
_RATIOS = ("weight_sqnr", "output_sqnr")


def sensitivity(
    model: Model,
    calibration: Calibration,
    out: Annotated[Path, typer.Option(help="Folder of the result; the same command resumes.")],
    scores: Annotated[
        list[str] | None, typer.Option(help="Scores, separated by commas; every cheap one and measured unless given.")
    ] = None,
    schemes: Annotated[list[str] | None, typer.Option(help="Schemes, separated by commas.")] = None,
    target: Annotated[str, typer.Option(help="What is quantized: weights, inputs, or cache (keys and values).")] = (
        "weights"
    ),
    samples: Annotated[int, typer.Option(min=1, help="Windows of the text.")] = 64,
    seqlen: Annotated[int, typer.Option(help="Tokens per window.")] = 256,
    measured_windows: Annotated[int, typer.Option(min=1, help="Windows that divergences are measured on.")] = 8,
    seed: Annotated[int, typer.Option(min=0, help="Seed of windows, labels and random vectors.")] = 0,
    device: Device = "cpu",
    quiet: Quiet = False,
    as_json: AsJson = False,
    trust_remote_code: RemoteCode = False,
) -> None:
    """Find what each site can bear in each scheme, by cheap scores and by measuring."""
    from bitwright.sensitivity_report import report_sensitivity

    kind = TARGETS.get(target)
    if kind is None:
        raise UnknownName(f"unknown target '{target}'.{did_you_mean(target, TARGETS)}")
    with ProgressBars(quiet=quiet or as_json) as progress:
        report = report_sensitivity(
            model,
            out,
            calibration=calibration,
            scores=listed(scores),
            schemes=listed(schemes),
            target=kind,
            num_samples=samples,
            seqlen=seqlen,
            num_measured_windows=measured_windows,
            seed=seed,
            device=device,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
    if as_json:
        print_json(report.to_json())
    elif not quiet:
        _show(report)


def _show(report: "SensitivityReport") -> None:
    console = wide_console(PIPE_WIDTH)
    console.print(score_table(report.scores.get("measured") or list(report.scores.values())[-1]))
    if report.correlations:
        console.print(correlation_table(report))
    console.print(f"written: {report.file}", soft_wrap=True, highlight=False)


def score_table(found: "Sensitivity") -> Table:
    """One score: a line per site, a column per scheme."""
    unit = "nats per token" if found.score in _NATS else "noise over signal" if found.score in _RATIOS else "per token"
    caption = f"{unit}; larger is worse, 16 bit is 0"
    table = Table(title=f"{found.score} of {found.target}", box=box.SIMPLE_HEAD, title_justify="left", caption=caption)
    table.add_column("site", overflow="fold")
    for scheme in found.schemes:
        table.add_column(scheme, justify="right", no_wrap=True)
    for site, values in found.values.items():
        table.add_row(site, *(f"{values[scheme]:.2e}" for scheme in found.schemes))
    return table


def correlation_table(report: "SensitivityReport") -> Table:
    """Rank correlation of every other score with the measured one."""
    columns = list(next(iter(report.correlations.values())))
    table = Table(title="rank correlation with measured", box=box.SIMPLE_HEAD, title_justify="left")
    table.add_column("score")
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for score, found in report.correlations.items():
        table.add_row(score, *("–" if found[c] is None else f"{found[c]:.2f}" for c in columns))
    return table
