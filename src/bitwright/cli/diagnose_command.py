"""`bitwright diagnose`: what is wrong with a quantized checkpoint, where, and how to mend it."""

from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.table import Table

from bitwright.cli.console import ProgressBars, print_json, wide_console
from bitwright.cli.shared_options import AsJson, Device, Quiet, RemoteCode

if TYPE_CHECKING:
    from bitwright.checkup.findings import Checkup, Finding

WIDTH = 160
COLOURS = {"error": "bold red", "warning": "yellow", "note": "dim"}


def diagnose(
    original: Annotated[str, typer.Argument(help="Unquantized model: directory or hub id.")],
    quantized: Annotated[str, typer.Argument(help="Quantized model: directory, hub id or run directory.")],
    text: Annotated[
        str | None, typer.Option(help="Text to run both on, as for evaluate; random tokens unless given.")
    ] = None,
    windows: Annotated[int, typer.Option(min=1, help="Windows of that text.")] = 4,
    seqlen: Annotated[int, typer.Option(min=2, help="Tokens per window.")] = 128,
    seed: Annotated[int, typer.Option(min=0, help="Seed of random tokens.")] = 0,
    as_json: AsJson = False,
    device: Device = "cpu",
    quiet: Quiet = False,
    trust_remote_code: RemoteCode = False,
) -> None:
    """Compare a quantized checkpoint with its original and say what is wrong, where, and how to mend it."""
    from bitwright.checkup.diagnose import diagnose_checkpoint

    with ProgressBars(quiet=quiet or as_json) as progress:
        found = diagnose_checkpoint(
            original,
            quantized,
            text=text,
            num_windows=windows,
            seqlen=seqlen,
            seed=seed,
            device=device,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
    if as_json:
        print_json(found.to_json())
    elif not quiet:
        _show(found)
    if found.num_errors:
        raise typer.Exit(1)


def _show(found: "Checkup") -> None:
    console = wide_console(WIDTH)
    for finding in found.findings:
        console.print(f"[{COLOURS[finding.severity]}]{finding.severity}[/] [bold]{finding.kind}[/] {finding.site}")
        for line in _lines(finding):
            console.print(f"    {line}", soft_wrap=True, highlight=False, markup=False)
    console.print(_depth_table(found))
    console.print(_verdict(found), soft_wrap=True, highlight=False)


def _lines(finding: "Finding") -> list[str]:
    lines = [finding.what, f"why: {finding.evidence}", f"mend: {finding.remedy}"]
    if finding.explained is not None:
        lines.append(f"explains {finding.explained:.0%} of the divergence")
    return lines


def _verdict(found: "Checkup") -> str:
    text = found.text or "random tokens"
    verdict = f"{found.num_errors} errors" if found.num_errors else "no errors"
    return (
        f"{found.quantized}: {verdict} in {found.num_quantized} quantized weights; KL divergence {found.kl:.4g} nats "
        f"per token on {found.num_windows} windows of {found.seqlen} tokens ({text})"
    )


def _depth_table(found: "Checkup") -> Table:
    """Block by block: hidden state, what the block adds, and the site that falls behind most."""
    table = Table(box=box.SIMPLE_HEAD, caption="signal to noise in dB", caption_justify="left")
    for column in ("block", "hidden state", "what it adds", "weakest weight", "expected"):
        table.add_column(column, justify="left" if column == "block" else "right", overflow="fold")
    for index, depth in enumerate(found.depth):
        sites = [site for site in found.sites if site.block == index and site.weight_sqnr_db is not None]
        weakest = min(sites, key=lambda site: site.weight_sqnr_db or 0.0, default=None)
        table.add_row(
            depth.block,
            _db(depth.hidden_sqnr_db),
            _db(depth.update_sqnr_db),
            "–" if weakest is None else f"{weakest.site.rpartition('.')[2]} {_db(weakest.weight_sqnr_db)}",
            "–" if weakest is None else _db(weakest.expected_weight_sqnr_db),
        )
    return table


def _db(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"
