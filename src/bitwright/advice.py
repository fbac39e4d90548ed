"""Which scheme and method for this model in that place: the questions that everybody asks, answered with its figures.

Sizes come from shapes and are exact but for what methods add. Speeds are bounds of a roofline: no engine is faster.
What would need text, a training run or a device is not guessed; the answer then says what to run to know it.
"""

import math
import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bitwright.advice_answers import MEMORY_SHARE, Answer, Data, Option, Situation, answers_of, choose, method_for
from bitwright.errors import RecipeError, ShapeError
from bitwright.model.checkpoint import open_checkpoint
from bitwright.model.stream import StreamedModel
from bitwright.numerics.granularity import Granularity
from bitwright.recipe import STANDARD_GROUP_SIZES
from bitwright.schemes import Scheme
from bitwright.search.cost import Workload, memory, speed
from bitwright.search.cpu_profile import find_hardware
from bitwright.search.hardware import Hardware
from bitwright.search.model_shape import ModelShape, shape_of_config, shape_of_model
from bitwright.search.proxies import sampled_sqnr_db
from bitwright.search.scenarios import MENU, SCENARIOS
from bitwright.search.stored_size import exported_bytes, site_bytes

NO_WEIGHTS_NAME = "MODEL"
"""Stands in commands for a directory with the weights, where only a configuration was given."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Advice:
    """What `bitwright advise` says.

    Attributes:
        model: as it was given.
        num_parameters: of the model.
        num_active_parameters: those that one token meets; fewer only in a mixture of experts.
        scenario: its name.
        hardware: name of the device; None without one.
        work: what it is used for.
        options: every scheme of the menu, 16 bit first; after one whose groups do not fit, one with smaller groups.
        answers: to the questions, in order.
        scheme: the one to use; None where nothing fits.
        commands: to run next, in order.
        notes: what to know before believing a figure.
    """

    model: str
    num_parameters: int
    num_active_parameters: int
    scenario: str
    hardware: str | None
    work: Workload
    options: tuple[Option, ...]
    answers: tuple[Answer, ...]
    scheme: str | None
    commands: tuple[str, ...]
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self)


def advise(
    source: str | Path,
    *,
    scenario: str,
    hardware: str | None = None,
    context: int | None = None,
    prompt: int | None = None,
    batch: int | None = None,
    kv_bits: float = 16.0,
    data: Data = "some",
    max_loss: float | None = None,
    trust_remote_code: bool = False,
) -> Advice:
    """Answer for one model in one place.

    Args:
        source: model directory, or a configuration without weights: a config.json, its directory, or a hub id.
        scenario: a name in `SCENARIOS`.
        hardware: a profile's name or file, or `this-cpu`; the scenario's unless given.
        context: tokens of prompt and answer; the scenario's, or the model's if that is less.
        prompt: tokens of the prompt among these; half unless given.
        batch: sequences at once; the scenario's unless given.
        kv_bits: of a number in the cache, scales included.
        data: calibration text there is: none, some (a hundred windows), lots (thousands).
        max_loss: KL divergence in nats per token above which the result is to count as failed.
        trust_remote_code: let the model's own code run.
    Raises:
        UnknownName: no such scenario or hardware.
        CheckpointError: no model can be built, or it is quantized already.
        RecipeError: numbers that cannot be.
    """
    place = SCENARIOS[scenario]
    if max_loss is not None and not max_loss > 0:
        raise RecipeError(f"--max-loss must be above 0, got {max_loss}.")
    model = _open(source, trust_remote_code=trust_remote_code)
    if model is not None:
        model.skeleton.checkpoint.require_original()
    shape = shape_of_config(source, trust_remote_code=trust_remote_code) if model is None else shape_of_model(model)
    name = hardware or place.hardware
    device = None if name is None else find_hardware(name)
    work = Workload(
        context=min(place.context, shape.max_context or place.context) if context is None else context,
        prompt=prompt,
        batch=place.batch if batch is None else batch,
        kv_bits=kv_bits,
    )
    instead = _finer_groups(shape)
    menu = tuple(dict.fromkeys(each for scheme in MENU for each in (scheme, instead.get(scheme, scheme))))
    proxies = {} if model is None else sampled_sqnr_db(model, [Scheme.parse(scheme) for scheme in menu])
    options = (_option(shape, None, work, device, {}), *(_option(shape, s, work, device, proxies) for s in menu))
    now = Situation(scenario=scenario, work=work, hardware=device, data=data, options=options, instead=instead)
    chosen = choose(now)
    model_name = NO_WEIGHTS_NAME if model is None else shlex.quote(str(source))
    return Advice(
        model=str(source),
        num_parameters=shape.num_parameters,
        num_active_parameters=shape.num_active_parameters,
        scenario=scenario,
        hardware=None if device is None else device.name,
        work=work,
        options=options,
        answers=tuple(answers_of(now, chosen)),
        scheme=None if chosen is None else chosen.scheme,
        commands=() if chosen is None else _commands(model_name, chosen, now, name, max_loss),
        notes=tuple(_notes(shape, now)),
    )


def _open(source: str | Path, *, trust_remote_code: bool) -> StreamedModel | None:
    """The model, where there are weights on this machine."""
    folder = Path(source)
    if not folder.is_dir() or not any(folder.glob("*.safetensors")):
        return None
    return StreamedModel(open_checkpoint(folder), trust_remote_code=trust_remote_code)


def _finer_groups(shape: ModelShape) -> dict[str, str]:
    """Schemes of the menu whose groups do not fit the rows -> the same in the largest smaller groups that do."""
    found: dict[str, str] = {}
    for name in MENU:
        scheme = Scheme.parse(name)
        granularity = scheme.weights.granularity
        if granularity.kind != "group" or granularity.group_size is None or _is_possible(shape, scheme):
            continue
        smaller = (size for size in sorted(STANDARD_GROUP_SIZES, reverse=True) if size < granularity.group_size)
        finer = (scheme.with_granularity(Granularity(kind="group", group_size=size)) for size in smaller)
        if fitting := next((each for each in finer if _is_possible(shape, each)), None):
            found[name] = str(fitting)
    return found


def _is_possible(shape: ModelShape, scheme: Scheme) -> bool:
    try:
        exported_bytes(shape, shape.uniform(scheme))
    except (ShapeError, RecipeError):
        return False
    return True


def _option(
    shape: ModelShape, name: str | None, work: Workload, device: Hardware | None, proxies: Mapping[str, float]
) -> Option:
    scheme = None if name is None else Scheme.parse(name)
    try:
        assignment = {} if scheme is None else shape.uniform(scheme)
        size = exported_bytes(shape, assignment)
    except (ShapeError, RecipeError) as error:
        return Option(
            scheme=name, size_bytes=None, bits_per_weight=None, memory=None, fits=None, speed=None, has_kernel=None,
            sqnr_db=None, note=str(error),
        )  # fmt: skip
    used = memory(shape, assignment, work, device)
    quantized = [site for site in shape.sites if scheme is None or assignment.get(site.name) is not None]
    bits = 8 * sum(
        site_bytes(site, assignment.get(site.name), shape.site_dtypes[site.name], shape.dtype) for site in quantized
    )
    found = None if device is None else speed(shape, assignment, work, device)
    return Option(
        scheme=name,
        size_bytes=size,
        bits_per_weight=bits / max(1, sum(site.out_features * site.in_features for site in quantized)),
        memory=used,
        fits=None if device is None else used.total_bytes <= MEMORY_SHARE * device.memory_bytes,
        speed=found,
        has_kernel=None if found is None else found.decoded_sites == 0,
        sqnr_db=None if scheme is None else proxies.get(str(scheme)),
    )


def _commands(
    model: str, chosen: Option, now: Situation, hardware: str | None, max_loss: float | None
) -> tuple[str, ...]:
    assert chosen.scheme is not None
    assert chosen.memory is not None
    scheme = chosen.scheme
    if now.scenario == "finetune":
        train = f"bitwright train qlora {model} --data TEXT --scheme {scheme} --out runs/qlora"
        return (train, "bitwright merge runs/qlora --how dense --out runs/merged")
    method, _ = method_for(scheme, now.data)
    gate = "" if max_loss is None else f" --max-kl {max_loss:g}"
    text = "" if method in ("rtn", "hqq") else " --calibration TEXT"
    folder = f"runs/{scheme}-{method}".lower()
    compared = ",".join(dict.fromkeys(("rtn", method)))
    commands = [
        f"bitwright quantize {model} --scheme {scheme} --method {method}{text}{gate} --out {folder}",
        f"bitwright evaluate {folder} --text HELD_OUT_TEXT",
        f"bitwright bench {model} --schemes {scheme} --methods {compared}{text} --text HELD_OUT_TEXT --out runs/bench",
    ]
    if hardware is not None and now.data != "none":
        # What the chosen scheme takes, so that the search looks for a better mix in the same memory.
        room = math.ceil(chosen.memory.total_bytes / 1e7) / 100
        commands.append(
            f"bitwright search {model} --calibration TEXT --fit {room:.2f}GB --hardware {shlex.quote(hardware)} "
            f"--context {now.work.context} --batch {now.work.batch} --kv-bits {now.work.kv_bits:g}{gate} "
            "--out runs/search"
        )
    return tuple(commands)


def _notes(shape: ModelShape, now: Situation) -> list[str]:
    refused: dict[str, list[str]] = {}
    for option in now.options:
        if option.scheme is not None and option.note:
            refused.setdefault(option.note, []).append(option.scheme)
    notes = [f"{', '.join(schemes)}: not possible. {reason}" for reason, schemes in refused.items()]
    if now.hardware is not None:
        notes.append("times are what the device's peaks allow; engines reach a part of that")
    if now.hardware is not None and now.hardware.note:
        notes.append(f"{now.hardware.name}: {now.hardware.note}")
    if shape.routed is not None:
        notes += _expert_notes(*shape.routed, now.work)
    if shape.max_context is not None and now.work.context > shape.max_context:
        notes.append(f"the model was made for {shape.max_context} tokens, and the context is {now.work.context}")
    if now.scenario == "finetune":
        notes.append("adapters, their optimiser states and the activations of training come on top of these figures")
    dense = now.option(None).memory
    if dense is not None and dense.cache_bytes > dense.weight_bytes:
        notes.append("the cache is larger than the weights: --kv-bits 8 saves more than fewer bits of weights would")
    return notes


def _expert_notes(chosen: int, experts: int, work: Workload) -> list[str]:
    woken = experts * (1.0 - (1.0 - chosen / experts) ** work.batch)
    return [
        f"a token goes through {chosen} of {experts} experts in a layer, and a step of {work.batch} through "
        f"{woken:.3g} of them if the router chooses evenly: all experts fill memory, and only these are read. Routers "
        "stay in 16 bit",
        f"an expert sees {chosen / experts:.0%} of the calibration text: take more of it (--samples) than for a dense "
        "model",
    ]
