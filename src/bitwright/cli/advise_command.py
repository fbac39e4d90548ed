"""`bitwright advise`: the answers, the figures behind them, and the commands to run next."""

from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.table import Table

from bitwright.cli.console import print_json, wide_console
from bitwright.cli.shared_options import AsJson, RemoteCode
from bitwright.errors import UnknownName, did_you_mean

if TYPE_CHECKING:
    from bitwright.advice import Advice
    from bitwright.advice_answers import Option

DATA = ("none", "some", "lots")
WIDTH = 160
_UNKNOWN = "–"


def advise(
    model: Annotated[str, typer.Argument(metavar="MODEL|CONFIG", help="Model directory, config.json or hub id.")],
    scenario: Annotated[str, typer.Option(help="cloud, edge, mobile, iot or finetune.")],
    hardware: Annotated[
        str | None, typer.Option(help="Device: a profile's name, a .yaml file, or this-cpu, which is measured.")
    ] = None,
    context: Annotated[int | None, typer.Option(min=1, help="Tokens of prompt and answer.")] = None,
    prompt: Annotated[
        int | None, typer.Option(min=1, help="Tokens of the prompt among these; half by default.")
    ] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Sequences at once.")] = None,
    kv_bits: Annotated[float, typer.Option(help="Bits of a number in the cache, scales included.")] = 16.0,
    data: Annotated[str, typer.Option(help="Calibration text there is: none, some, lots.")] = "some",
    max_loss: Annotated[float | None, typer.Option(help="Nats per token that may be lost; becomes --max-kl.")] = None,
    as_json: AsJson = False,
    trust_remote_code: RemoteCode = False,
) -> None:
    """Say which scheme and method suit a model in a place, with its sizes, speeds and reasons; no weights needed."""
    from bitwright.advice import advise as run

    if data == "none" or data == "some" or data == "lots":
        found = run(
            model,
            scenario=scenario,
            hardware=hardware,
            context=context,
            prompt=prompt,
            batch=batch,
            kv_bits=kv_bits,
            data=data,
            max_loss=max_loss,
            trust_remote_code=trust_remote_code,
        )
    else:
        raise UnknownName(f"--data {data}: unknown.{did_you_mean(data, DATA)}")
    if as_json:
        print_json(found.to_json())
        return
    console = wide_console(WIDTH)
    for table in advice_tables(found):
        console.print(table, highlight=False)
    for command in found.commands:
        console.print(f"  {command}", highlight=False, soft_wrap=True)
    for note in found.notes:
        console.print(f"note: {note}", highlight=False, soft_wrap=True)


def advice_tables(found: "Advice") -> list[Table]:
    """The answers, and the figures of every scheme."""
    return [_answers(found), _figures(found)]


def _answers(found: "Advice") -> Table:
    where = f"{found.scenario}, {found.hardware or 'no device named'}"
    size = f"{found.num_parameters / 1e9:.3g} billion parameters"
    if found.num_active_parameters < found.num_parameters:
        size += f", of which a token meets {found.num_active_parameters / 1e9:.3g}"
    title = f"{found.model} ({size}): {where}"
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
    for column in ("question", "answer", "because"):
        table.add_column(column, overflow="fold")
    for answer in found.answers:
        table.add_row(answer.question, answer.answer, answer.reason)
    return table


def _figures(found: "Advice") -> Table:
    work = found.work
    caption = (
        f"memory: with a full cache, {work.batch} × {work.context} tokens in {work.kv_bits:g} bits; tokens/s: at most, "
        "all sequences together; J: at the rated watts; SQNR: of sampled weights. Without a kernel codes are decoded "
        "to 16 bit first, and move in these; they lie in these too, but for this-cpu, where they stay codes"
    )
    table = Table(box=box.SIMPLE_HEAD, caption=caption, caption_justify="left")
    columns = (
        "scheme", "GB on disk", "bits/weight", "GB in memory", "fits", "kernel", "tokens/s", "prompt s", "J/token",
        "SQNR dB",
    )  # fmt: skip
    for column in columns:
        table.add_column(column, justify="left" if column == "scheme" else "right", overflow="fold")
    for option in found.options:
        name = option.scheme or "16 bit"
        table.add_row(
            f"> {name}" if option.scheme and option.scheme == found.scheme else name, *_cells(option, work.batch)
        )
    return table


def _cells(option: "Option", batch: int) -> list[str]:
    if option.size_bytes is None or option.memory is None or option.bits_per_weight is None:
        return ["not possible", *[_UNKNOWN] * 8]
    speed = option.speed
    return [
        _number(option.size_bytes / 1e9),
        f"{option.bits_per_weight:.2f}",
        _number(option.memory.total_bytes / 1e9),
        {True: "yes", False: "no", None: _UNKNOWN}[option.fits],
        _UNKNOWN if option.scheme is None else {True: "yes", False: "no", None: _UNKNOWN}[option.has_kernel],
        _number(None if speed is None else batch / speed.decode_s),
        _number(None if speed is None else speed.prefill_s),
        _number(None if speed is None else speed.energy_j_per_token),
        _UNKNOWN if option.sqnr_db is None else f"{option.sqnr_db:.1f}",
    ]


def _number(value: float | None) -> str:
    from bitwright.advice_answers import three_digits

    return _UNKNOWN if value is None else three_digits(value)
