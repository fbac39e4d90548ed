"""The charts of one run: what was lost by depth and by site, what was tried and trained, what the inputs are like."""

import math
import re
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from bitwright.reports import wording
from bitwright.reports.channels import ChannelFact
from bitwright.reports.entries import Figure, is_finite
from bitwright.reports.facts import BlockFact, SiteFact
from bitwright.reports.findings import TrialFact
from bitwright.reports.plotting import Chart, block_axis, compact, drawable, framed, log_axis, plain, series
from bitwright.reports.training import StepFact, Training, levels, loss_name

MEASURES = {"output_sqnr_db": "output", "weight_sqnr_db": "weights"}
NUM_POINTS = 200
"""A loss curve has no more points: each is the mean over `steps_per_point`."""
_LAST_INDEX = re.compile(r"\[\d+\]$")


def depth_chart(blocks: Sequence[BlockFact]) -> Chart:
    """Signal to noise of the hidden state after each block."""
    values = [drawable(block.hidden_sqnr_db) for block in blocks]
    labels = [f"<b>{plain(block.block)}</b><br>{wording.decibel(block.hidden_sqnr_db)}" for block in blocks]
    trace = series("scatter", list(range(len(blocks))), values, labels, colour=0)
    return framed([{**trace, "mode": "lines+markers"}], block_axis(len(blocks)), "Hidden-state SQNR (dB)")


def time_chart(blocks: Sequence[BlockFact]) -> Chart:
    """Seconds per block."""
    values = [drawable(block.seconds) for block in blocks]
    labels = [f"<b>{plain(block.block)}</b><br>{wording.duration(block.seconds)}" for block in blocks]
    trace = series("bar", list(range(len(blocks))), values, labels, colour=0)
    chart = framed([trace], block_axis(len(blocks)), "Seconds")
    chart["layout"]["yaxis"]["rangemode"] = "tozero"
    return chart


def site_chart(sites: Sequence[SiteFact], block_order: Mapping[str, int], measure: str) -> Chart:
    """One mark per block and role (`q_proj`, `down_proj`, …): its worst site, so that experts do not bury the page."""
    worst: dict[str, dict[str, SiteFact]] = {}
    members: dict[tuple[str, str], int] = {}
    for site in sites:
        kind = role(site.site)
        members[kind, site.block] = members.get((kind, site.block), 0) + 1
        value = getattr(site, measure)
        if not is_finite(value):
            continue
        best = worst.setdefault(kind, {}).get(site.block)
        if best is None or value < getattr(best, measure):
            worst[kind][site.block] = site
    traces: list[dict[str, Any]] = []
    for index, (kind, by_block) in enumerate(worst.items()):
        found = sorted(by_block.values(), key=lambda site: block_order[site.block])
        trace = series(
            "scatter",
            [block_order[site.block] for site in found],
            [drawable(getattr(site, measure)) for site in found],
            [_site_label(site, members[kind, site.block]) for site in found],
            colour=index,
        )
        traces.append({**trace, "mode": "markers", "name": plain(kind)})
    chart = framed(traces, block_axis(len(block_order)), f"SQNR of the {MEASURES[measure]} (dB)")
    chart["layout"]["showlegend"] = True
    return chart


def channel_chart(
    channels: Sequence[ChannelFact], block_order: Mapping[str, int], of_block: Mapping[str, str]
) -> Chart:
    """How much louder than the median the loudest input channel of each group is, one colour per role.

    Args:
        channels: of all groups.
        block_order: block -> its number.
        of_block: site -> its block; groups without one are left out.
    """
    by_role: dict[str, list[ChannelFact]] = {}
    for fact in channels:
        if fact.site in of_block:
            by_role.setdefault(role(fact.site), []).append(fact)
    traces: list[dict[str, Any]] = []
    for index, (kind, facts) in enumerate(by_role.items()):
        labels = [
            f"<b>{plain(', '.join(map(role, fact.sites)))}</b><br>channel {fact.loudest[0][0]}: "
            f"{wording.number(fact.ratio)} times the median"
            for fact in facts
        ]
        x = [block_order[of_block[fact.site]] for fact in facts]
        trace = series("scatter", x, [drawable(fact.ratio) for fact in facts], labels, colour=index)
        traces.append({**trace, "mode": "markers", "name": plain(kind)})
    chart = framed(traces, block_axis(len(block_order)), "Loudest over median")
    chart["layout"]["yaxis"].update(log_axis([y for trace in traces for y in trace["y"] if y]))
    chart["layout"]["showlegend"] = True
    return chart


def trial_chart(trials: Sequence[TrialFact], block_order: Mapping[str, int]) -> Chart:
    """The error that each composition left on the blocks it was tried on; crosses where single groups differ."""
    names = dict.fromkeys(trial.composition for trial in trials if is_finite(trial.error))
    traces: list[dict[str, Any]] = []
    for mixed in (False, True):
        for index, name in enumerate(names):
            found = [
                trial for trial in trials
                if trial.composition == name and bool(trial.solvers) == mixed and trial.block in block_order
                and trial.error is not None and trial.error > 0 and is_finite(trial.error)
            ]  # fmt: skip
            if not found:
                continue
            title = f"{name}, single groups otherwise" if mixed else name
            labels = [f"<b>{plain(title)}</b><br>{plain(t.block)}<br>error {wording.number(t.error)}" for t in found]
            x, y = [block_order[trial.block] for trial in found], [trial.error for trial in found]
            trace = series("scatter", x, y, labels, colour=index)
            if mixed:
                trace["marker"] = {**trace["marker"], "symbol": "x-thin-open", "size": 9}
            traces.append({**trace, "mode": "markers", "name": plain(title)})
    chart = framed(traces, block_axis(len(block_order)), "Error of the block's output")
    chart["layout"]["yaxis"].update(log_axis([y for trace in traces for y in trace["y"] if y]))
    chart["layout"]["showlegend"] = True
    return chart


def training_chart(training: Training) -> Chart:
    """The loss over the steps, and as level lines what it is without training and at best."""
    size = steps_per_point(training)
    points = [training.steps[first : first + size] for first in range(0, len(training.steps), size)]
    losses = [_mean_loss(steps) for steps in points]
    last = training.steps[-1].step
    x = [steps[-1].step for steps in points]
    labels = [_step_label(steps, loss) for steps, loss in zip(points, losses, strict=True)]
    curve = series("scatter", x, [compact(loss) for loss in losses], labels, colour=0)
    traces: list[dict[str, Any]] = [{**curve, "mode": "lines", "name": "loss of the text trained on"}]
    for index, (label, level) in enumerate(levels(training), start=1):
        words = f"<b>{plain(label)}</b><br>{wording.number(level)} nats per token on the held-out text"
        line = series("scatter", [0, last], [compact(level)] * 2, [words] * 2, colour=index)
        line["line"]["dash"] = "dash" if index == 1 else "dot"
        traces.append({**line, "mode": "lines", "name": plain(label)})
    kind = loss_name(training)
    chart = framed(traces, {"title": {"text": "Step"}}, f"{kind} (nats per token)" if kind else "Loss")
    chart["layout"]["showlegend"] = True
    return chart


def steps_per_point(training: Training) -> int:
    """Steps behind one point of the curve."""
    return max(1, math.ceil(len(training.steps) / NUM_POINTS))


def role(site: str) -> str:
    """The last part of a site's name without an expert's number: sites of one role do the same job in every block."""
    return _LAST_INDEX.sub("", site).rsplit(".", 1)[-1]


def _mean_loss(steps: Sequence[StepFact]) -> Figure:
    known = [step.loss for step in steps if step.loss is not None]
    return fmean(known) if known else None


def _step_label(steps: Sequence[StepFact], loss: Figure) -> str:
    first, last = (wording.count(step.step) for step in (steps[0], steps[-1]))
    which = f"step {first}" if len(steps) == 1 else f"steps {first}–{last}"
    return f"<b>{which}</b><br>loss {wording.number(loss)}<br>learning rate {wording.number(steps[-1].learning_rate)}"


def _site_label(site: SiteFact, num_members: int) -> str:
    lines = [f"<b>{plain(site.site)}</b>"]
    if num_members > 1:
        lines.append(f"worst of {num_members} in this block")
    lines.append(f"output {wording.decibel(site.output_sqnr_db)}, weights {wording.decibel(site.weight_sqnr_db)}")
    lines.append(f"{plain(site.scheme)} by {plain(site.method)}, {wording.fixed(site.bits_per_weight, 3)} bits/weight")
    return "<br>".join(lines)
