"""`bitwright merge`: the command, and what it prints."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bitwright.cli.console import ProgressBars, fail, print_json, show
from bitwright.cli.shared_options import AsJson, Device, MaxKl, Quiet, RemoteCode
from bitwright.errors import RecipeError

if TYPE_CHECKING:
    from bitwright.merging import MergeResult

WAYS = ("dense", "requantize", "fold")
PLACES = ("base", "original")


def merge(
    adapter: Annotated[
        Path, typer.Argument(metavar="RUN|ADAPTER", help="Run of bitwright train lora or qlora, or a PEFT directory.")
    ],
    out: Annotated[Path, typer.Option(help="Model directory (dense) or run directory to write.")],
    how: Annotated[
        str,
        typer.Option(
            help="dense: 16-bit weights; requantize: quantized again; fold: group adapters, into zero points."
        ),
    ],
    base: Annotated[
        str | None, typer.Option(help="The model that a bare PEFT adapter was trained on, or where the run's is now.")
    ] = None,
    into: Annotated[
        str, typer.Option(help="base: the weights that were trained on, dequantized; original: the 16-bit ones.")
    ] = "base",
    scheme: Annotated[
        str | None, typer.Option(help="With requantize: another scheme than the base's; see bitwright formats.")
    ] = None,
    calibration: Annotated[
        str | None, typer.Option(help="With requantize: another text than the training's, as for quantize.")
    ] = None,
    text: Annotated[str | None, typer.Option(help="Text to judge by; the run's held-out windows unless given.")] = None,
    seqlen: Annotated[int | None, typer.Option(min=2, help="Tokens per window, for a bare PEFT adapter.")] = None,
    max_kl: MaxKl = None,
    device: Device = "cpu",
    quiet: Quiet = False,
    as_json: AsJson = False,
    trust_remote_code: RemoteCode = False,
) -> None:
    """Put an adapter into the weights, measure what that lost on the written result, and fail if it is too much."""
    from bitwright.merging import MergeTask
    from bitwright.merging import merge as run
    from bitwright.schemes import Scheme

    for option, given, known in (("--how", how, WAYS), ("--into", into, PLACES)):
        if given not in known:
            raise RecipeError(f"{option} {given}: unknown. Use {', '.join(known)}.")
    limit: dict[str, Any] = {} if max_kl is None else {"max_kl": max_kl}
    wished: Any = {"how": how, "into": into, "scheme": None if scheme is None else Scheme.parse(scheme)}
    task = MergeTask(**wished, base=base, calibration=calibration, text=text, seqlen=seqlen, device=device, **limit)
    with ProgressBars(quiet=quiet or as_json) as progress:
        result = run(adapter, task, out, trust_remote_code=trust_remote_code, progress=progress)
    if as_json:
        print_json({"out": str(result.out), **result.record})
    elif not quiet:
        show(_summary(result))
    if result.failure is not None:
        fail(f"{result.out}: {result.failure}", 1)


def _summary(result: "MergeResult") -> str:
    found = result.record
    scheme = "" if found["scheme"] is None else f" in {found['scheme']}"
    return (
        f"{result.out}: {found['how']}{scheme}; KL divergence from the model with its adapter {found['kl_mean']:.3g} "
        f"nats per token; perplexity {found['perplexity_before']:.4f} -> {found['perplexity']:.4f} on "
        f"{found['heldout_tokens']} held-out tokens"
    )
