"""`bitwright search`: the command, and what it prints."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.table import Table

from bitwright.cli.console import ProgressBars, fail, listed, print_json, show
from bitwright.cli.shared_options import AsJson, Calibration, Device, Dtype, Model, Quiet, RemoteCode
from bitwright.cli.speed_command import MeasureSpeed, add_speed
from bitwright.errors import RecipeError

if TYPE_CHECKING:
    from bitwright.escalation import Applied
    from bitwright.mixture import Found

ENGINES = ("vllm", "transformers")
NUM_SHOWN = 12
PIPE_WIDTH = 160


def search(
    model: Model,
    calibration: Calibration,
    out: Annotated[Path, typer.Option(help="Folder of the search; the same command resumes.")],
    fit: Annotated[str | None, typer.Option(help="Resident memory with cache and workspace, such as 4GB.")] = None,
    size: Annotated[str | None, typer.Option(help="Size of the files, such as 3GB.")] = None,
    average_bits: Annotated[float | None, typer.Option(help="Stored bits per quantizable weight.")] = None,
    max_kl: Annotated[float | None, typer.Option(help="Nats per token from the original.")] = None,
    max_ppl_increase: Annotated[str | None, typer.Option(help="Such as 2%.")] = None,
    min_tokens_per_s: Annotated[float | None, typer.Option(help="Of a batch together, on --hardware.")] = None,
    hardware: Annotated[str | None, typer.Option(help="A profile's name, this-cpu, or a .yaml file.")] = None,
    context: Annotated[int, typer.Option(min=1, help="Tokens in the cache, for --fit and speed.")] = 4096,
    batch: Annotated[int, typer.Option(min=1, help="Sequences at once.")] = 1,
    kv_bits: Annotated[float, typer.Option(help="Bits of a number in the cache.")] = 16.0,
    schemes: Annotated[list[str] | None, typer.Option(help="The menu, separated by commas; may be repeated.")] = None,
    min_bits: Annotated[list[str] | None, typer.Option(help="PATTERN=BITS; may be repeated.")] = None,
    recipe: Annotated[Path | None, typer.Option(help="YAML recipe; what it keeps or fixes stays so.")] = None,
    method: Annotated[str | None, typer.Option(help="Solver for --apply; gptq unless the recipe says.")] = None,
    engine: Annotated[str, typer.Option(help="vllm (products that it fuses share a scheme) or transformers.")] = "vllm",
    score: Annotated[str, typer.Option(help="The sensitivity that is summed; see bitwright sensitivity.")] = (
        "window_gradient"
    ),
    polish: Annotated[int, typer.Option(min=0, help="Rounds of evolution on measured divergence.")] = 10,
    apply: Annotated[bool, typer.Option("--apply", help="Quantize what was found.")] = False,
    repair: Annotated[bool, typer.Option(help="With --apply: mend the worst sites until the gate holds.")] = True,
    fresh: Annotated[bool, typer.Option("--fresh", help="With --apply: replace the run of another search.")] = False,
    measure_speed: MeasureSpeed = False,
    samples: Annotated[int | None, typer.Option(min=1, help="Calibration windows.")] = None,
    seqlen: Annotated[int | None, typer.Option(help="Tokens per window.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Seed of windows and polish.")] = None,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    as_json: AsJson = False,
    quiet: Quiet = False,
    trust_remote_code: RemoteCode = False,
) -> None:
    """Find the scheme of every site under budgets in real units; print and save the plan and the whole frontier."""
    from bitwright.budget import Budget, parse_share, parse_size
    from bitwright.escalation import apply as carry_out
    from bitwright.mixture import Search
    from bitwright.pipeline import QuantizeResult, quantize
    from bitwright.preparation import open_model, text_sample
    from bitwright.recipe import Recipe
    from bitwright.recipe_builder import build_recipe
    from bitwright.search.cost import Workload
    from bitwright.search.cpu_profile import find_hardware

    if engine not in ENGINES:
        raise RecipeError(f"--engine {engine}: unknown. Use {' or '.join(ENGINES)}.")
    if measure_speed and not apply:
        raise RecipeError("--measure-speed: there is nothing to run without --apply. Add it.")
    budget = Budget(
        fit_bytes=None if fit is None else parse_size(fit, "--fit"),
        size_bytes=None if size is None else parse_size(size, "--size"),
        average_bits=average_bits,
        max_kl=max_kl,
        max_ppl_increase=None if max_ppl_increase is None else parse_share(max_ppl_increase, "--max-ppl-increase"),
        min_tokens_per_s=min_tokens_per_s,
        work=Workload(context=context, batch=batch, kv_bits=kv_bits),
        hardware=None if hardware is None else find_hardware(hardware),
    )
    calibrate = {"text": calibration, "num_samples": samples, "seqlen": seqlen, "seed": seed}
    wished = build_recipe(recipe, {"method": method, "max_kl": max_kl}, calibrate, ignore=())
    place: dict[str, Any] = {"device": device, "dtype": dtype, "trust_remote_code": trust_remote_code}
    with ProgressBars(quiet=quiet or as_json) as progress:
        opened = open_model(model, **place)
        asked = wished.calibration
        tokens = text_sample(
            opened, calibration, asked.seqlen, num_samples=asked.num_samples, seed=asked.seed,
            trust_remote_code=trust_remote_code,
        )  # fmt: skip
        found_by = Search(
            opened, tokens, wished, budget, out, schemes=listed(schemes), min_bits=_bits(min_bits or []),
            fuse=engine == "vllm", score=score, progress=progress,
        )  # fmt: skip
        found = found_by.run(rounds=polish, seed=asked.seed)
        chosen = found.recipe(wished)
        found.write(out, chosen)

        def run(recipe: Recipe, folder: Path) -> QuantizeResult:
            return quantize(model, recipe, folder, progress=progress, **place)

        applied = None
        if apply:
            applied = carry_out(found_by, found, chosen, out, run, repair=repair, fresh=fresh)
            found.write(out, applied.recipe)
    is_silent = quiet or as_json
    if not is_silent:
        show(_summary(found, out, applied), _mix_table(found), _frontier_table(found), width=PIPE_WIDTH)
        if applied is not None:
            _show_applied(applied)
    entry = {"recipe": str(out / "recipe.yaml"), **asdict(found)}
    if applied is not None:
        entry |= {"run": str(applied.result.run), "failure": applied.failure, "results": applied.result.results}
        entry |= add_speed(
            applied.result.run, measure_speed, device=device, trust_remote_code=trust_remote_code, quiet=is_silent
        )
    if as_json:
        print_json(entry)
    if applied is not None and applied.failure is not None:
        fail(f"{applied.result.run}: {applied.failure}", 1)


def _summary(found: "Found", out: Path, applied: "Applied | None") -> str:
    speed = "" if found.tokens_per_s is None else f", at most {found.tokens_per_s:.3g} tokens/s"
    polished = ""
    if found.measured_loss < found.start_loss:
        polished = f" (the polish took it from {found.start_loss:.3g})"
    lines = [
        f"{found.average_bits:.3f} bits per weight, files {found.size_bytes / 1e6:.3f} MB, memory "
        f"{found.memory_bytes / 1e6:.1f} MB{speed}",
        f"rounded to nearest it loses {found.measured_loss:.3g} nats per token{polished}; the sum of the scores said "
        f"{found.predicted_loss:.3g}",
    ]
    if applied is None:
        lines.append(f"to quantize: bitwright quantize MODEL --recipe {out / 'recipe.yaml'} --out RUN, or add --apply")
    return "\n".join(lines)


def _mix_table(found: "Found") -> Table:
    """Schemes of the sites, a row for each block."""
    blocks: dict[str, dict[str, str]] = {}
    for site, scheme in found.schemes.items():
        block, kind = _place(site)
        blocks.setdefault(block, {})[kind] = scheme or "16 bit"
    kinds = dict.fromkeys(kind for row in blocks.values() for kind in row)
    table = Table(title="Schemes", box=box.SIMPLE)
    for column in ("block", *kinds):
        table.add_column(column, overflow="fold")
    for block, row in blocks.items():
        table.add_row(block, *(row.get(kind, "") for kind in kinds))
    return table


def _place(site: str) -> tuple[str, str]:
    """The number of a site's block and the last part of its name; experts count as one kind each."""
    numbers = [part for part in site.split(".") if part.isdigit()]
    last = site.rpartition(".")[2]
    expert = f"{numbers[1]}." if len(numbers) > 1 else ""
    return (numbers[0] if numbers else "", f"{expert}{last}")


def _frontier_table(found: "Found") -> Table:
    table = Table(title=f"Frontier, {len(found.frontier)} mixes (search.json has all)", box=box.SIMPLE)
    for column in ("bits per weight", "files MB", "predicted loss"):
        table.add_column(column, justify="right")
    step = max(1, len(found.frontier) // NUM_SHOWN)
    for each in found.frontier[::step]:
        table.add_row(f"{each['average_bits']:.3f}", f"{each['size_bytes'] / 1e6:.3f}", f"{each['predicted_loss']:.3g}")
    return table


def _show_applied(applied: "Applied") -> None:
    from bitwright.cli.tables import run_table

    if applied.was_finished:
        show(f"{applied.result.run}: was finished already; nothing was quantized anew")
    show(run_table(applied.result))
    for step in applied.steps:
        show(
            f"repair {step.step}: {step.site}: {step.before} -> {step.after}; KL {step.kl_before:.3g} -> "
            f"{step.kl_after:.3g}"
        )


def _bits(given: list[str]) -> dict[str, int]:
    found: dict[str, int] = {}
    for each in given:
        pattern, _, bits = each.rpartition("=")
        if not pattern or not bits.isdigit():
            raise RecipeError(f"--min-bits {each}: write it as PATTERN=BITS, such as '*.v_proj=4'.")
        found[pattern] = int(bits)
    return found
