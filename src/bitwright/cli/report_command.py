"""`bitwright report`: the page of one run, or of several runs side by side."""

from pathlib import Path
from typing import Annotated

import typer

from bitwright.cli.console import ProgressBars, show
from bitwright.cli.shared_options import RemoteCode
from bitwright.errors import RunError


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN [RUN …]", help="Finished run directories.")],
    out: Annotated[
        Path | None,
        typer.Option(help="HTML file; 7-report.html in the run unless given. Several runs need one."),
    ] = None,
    samples: Annotated[
        int, typer.Option(min=0, help="Also let original and result continue so many beginnings of the gate text.")
    ] = 0,
    original: Annotated[
        str | None, typer.Option(help="The original of these runs, for --samples; where they found it unless given.")
    ] = None,
    device: Annotated[str, typer.Option(help="Where --samples are written: cpu, cuda, cuda:1, mps.")] = "cpu",
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bars.")] = False,
    trust_remote_code: RemoteCode = False,
) -> None:
    """Write one self-contained HTML file: what was done, what was lost and where, sizes and timings."""
    if len(runs) > 1 and out is None:
        raise RunError(f"{len(runs)} runs are set side by side in a page of their own. Give it a name with --out.")
    if samples:
        from bitwright.reports.facts import read_facts
        from bitwright.samples import record_samples

        with ProgressBars(quiet=quiet) as progress:
            for run in runs:
                facts = read_facts(run)
                if facts.is_only_trained:
                    raise RunError(f"{run}: has no quantized model that could write samples. Leave out --samples.")
                record_samples(
                    facts.path, original, num=samples, device=device, trust_remote_code=trust_remote_code,
                    progress=progress,
                )  # fmt: skip
    if len(runs) == 1:
        from bitwright.reports.page import write_report

        show(str(write_report(runs[0], out)))
    elif out is not None:
        from bitwright.reports.comparison import compare_runs

        show(str(compare_runs(runs, out)))
