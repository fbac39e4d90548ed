"""`bitwright speed`, and the option of other commands that does the same when they are done."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.table import Table

from bitwright.cli.console import ProgressBars, print_json, show
from bitwright.cli.shared_options import AsJson, Quiet, RemoteCode

if TYPE_CHECKING:
    from bitwright.speed_run import MeasuredSpeed

PIPE_WIDTH = 160
MeasureSpeed = Annotated[
    bool, typer.Option("--measure-speed", help="Then run original and result, and record speed, memory and energy.")
]


def speed(
    target: Annotated[str, typer.Argument(metavar="MODEL|RUN", help="Model directory, hub id or run directory.")],
    original: Annotated[
        str | None,
        typer.Option(help="The model to set beside it; that of a run, where the run found it, unless given."),
    ] = None,
    alone: Annotated[bool, typer.Option("--alone", help="Do not measure the original of a run.")] = False,
    context: Annotated[
        int | None, typer.Option(help="Tokens of the prompt; 128, or what the model has positions for.")
    ] = None,
    new_tokens: Annotated[int | None, typer.Option(help="Tokens to write after it; at most 64 unless given.")] = None,
    repeat: Annotated[int, typer.Option(help="Repetitions that count; one more before them does not.")] = 5,
    device: Annotated[str, typer.Option(help="Where the models run: cpu, cuda, cuda:1, mps.")] = "cpu",
    quiet: Quiet = False,
    as_json: AsJson = False,
    trust_remote_code: RemoteCode = False,
) -> None:
    """Measure tokens per second, memory and energy per token of a model and of its original; a run records them."""
    from bitwright.speed_run import run_speed

    with ProgressBars(quiet=quiet or as_json) as progress:
        found = run_speed(
            target, original=original, alone=alone, prompt_tokens=context, new_tokens=new_tokens, repeats=repeat,
            device=device, trust_remote_code=trust_remote_code, progress=progress,
        )  # fmt: skip
    if as_json:
        print_json({"model": target, **speeds_json(found)})
    elif not quiet:
        show(speed_table(found), width=PIPE_WIDTH)


def add_speed(run: Path, is_wanted: bool, *, device: str, trust_remote_code: bool, quiet: bool) -> dict[str, Any]:
    """Do what `--measure-speed` asks for when a run is finished, and print it; return the entry for JSON."""
    if not is_wanted:
        return {}
    from bitwright.speed_run import run_speed

    with ProgressBars(quiet=quiet) as progress:
        found = run_speed(run, device=device, trust_remote_code=trust_remote_code, progress=progress)
    if not quiet:
        show(speed_table(found), width=PIPE_WIDTH)
    return speeds_json(found)


def speeds_json(found: "Sequence[MeasuredSpeed]") -> dict[str, Any]:
    """The records as an entry of a command's JSON."""
    return {"speed": [each.to_record() for each in found]}


def speed_table(found: "Sequence[MeasuredSpeed]") -> Table:
    """The figures of the models beside each other."""
    from bitwright.cli.tables import size
    from bitwright.reports.wording import number

    speeds = [each.speed for each in found]
    first = speeds[0]
    table = Table(title="Speed, memory and energy", box=box.SIMPLE_HEAD, title_justify="left", caption_justify="left")
    table.add_column("")
    for each in found:
        table.add_column(f"{each.of}: {each.model.name}", justify="right", overflow="fold")
    for label, rates in (
        ("prompt, tokens/s", [each.prefill_tokens_per_s for each in speeds]),
        ("new text, tokens/s", [each.decode_tokens_per_s for each in speeds]),
    ):
        table.add_row(
            label, *(f"{number(rate.median)} ({number(rate.slowest)} to {number(rate.fastest)})" for rate in rates)
        )
    table.add_row("weights in memory", *(size(each.weight_bytes) for each in speeds))
    table.add_row("peak of loading and running", *(size(each.memory_bytes) for each in speeds))
    table.add_row("peak of the whole process", *(size(each.process_bytes) for each in speeds))
    energies = [each.decode_j_per_token for each in speeds]
    table.add_row("J/token", *("no meter" if value is None else f"{value:.3g}" for value in energies))
    table.caption = (
        f"Transformers, batch 1, {first.prompt_tokens} tokens then {first.new_tokens} new, {first.dtype}, on "
        f"{first.device} with {first.num_threads} threads; median (slowest to fastest) of {first.repeats}. "
        f"Energy: {first.energy_note}"
    )
    return table
