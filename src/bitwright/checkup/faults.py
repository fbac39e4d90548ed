"""Which fault a weight has: each is a hypothesis whose repair must bring back what the codes can hold.

    group-order           the scales of all rows in another order of the groups
    scale-factor          all scales times one number
    zero points           those that fit the codes differ from the stored ones by a code or more
    saturated             most of the error comes from weights beyond the last level
    transposed, permuted  the decoded weight fits the original's transpose, or its rows or columns in another order

A repair is tried on the stored codes, and its signal to noise compared with that of the best scales for these codes. So
nothing here depends on how good the method was that chose the codes. What no repair explains is left to the blocks'
outputs (`examination`).

Legend: O out features, I in features, R rows of scales, G groups.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from bitwright.checkup.findings import Finding
from bitwright.checkup.sites import Groups, Measured, SiteCase, groups_of
from bitwright.numerics.grid import Grid
from bitwright.numerics.metrics import sqnr_db

GAIN_DB = 1.5
"""What better scales gain when the stored ones are wrong; those that a method chose are within a few tenths."""
RESTORED_DB = 1.0
"""How near to the best scales a repair must come."""
SUSPICIOUS_DB = 6.0
"""One bit worse than rounding to nearest."""
ZERO_POINT_STEPS = 0.6
MIN_SHARE = 0.05
"""Of groups whose zero point is wrong; of codes at the ends."""
CLIPPED_SHARE = 0.5
"""Of the squared error, from weights beyond the last level."""
UNIFORM_SPREAD = 1.15
FEWEST_ROWS = 8
CORRELATED = 0.7
FIT_AGAIN = "Quantize the site again from the original's weight."


def scale_gain_db(groups: Groups) -> float:
    """What the best scales and zero points for the stored codes gain over the stored ones."""
    best = groups.sqnr_db(*groups.best())
    stored = groups.sqnr_db(groups.scale)
    return 0.0 if math.isinf(stored) else best - stored


def find_fault(case: SiteCase, measured: Measured) -> Finding | None:
    """Return the fault whose repair explains the loss of a site; None if there is none, or none was recognised."""
    groups = groups_of(case)
    if groups is not None:
        found = _zero_points_outside(case)
        if found is None and scale_gain_db(groups) >= GAIN_DB:
            found = _group_order(case, groups) or _zero_points(case, groups) or _scale_factor(case, groups, measured)
        found = found or _saturated(case, measured)
        if found is not None:
            return found
    return _rearranged(case, measured) if measured.loss_db >= SUSPICIOUS_DB else None


def _zero_points_outside(case: SiteCase) -> Finding | None:
    """Zero points that are no codes."""
    grid = case.quantized.weight.grid
    if not isinstance(grid, Grid) or grid.zero_point is None or grid.zero_point.is_floating_point():
        return None
    lowest, highest = grid.format.end_codes
    outside = int(((grid.zero_point < lowest) | (grid.zero_point > highest)).sum())
    if not outside:
        return None
    return Finding(
        severity="error", kind="wrong-zero-point", site=case.site,
        what=f"Zero points lie outside of the codes {lowest} to {highest}.",
        evidence=f"{outside} of {grid.zero_point.numel()}, from {int(grid.zero_point.min())} to "
        f"{int(grid.zero_point.max())}",
        remedy=f"Store zero points as the layout asks, signed ones less half the number of codes. {FIT_AGAIN}",
    )  # fmt: skip


def _group_order(case: SiteCase, groups: Groups) -> Finding | None:
    best_scale, best_zero = groups.best()
    num_rows, num_groups = groups.scale.shape
    if num_groups < 2:
        return None
    limit = groups.sqnr_db(best_scale, best_zero)
    tried: list[tuple[float, str]] = []
    for order, words in _orders(best_scale, groups.scale, num_rows, num_groups):
        zero_points = [None] if groups.zero_point is None else [None, groups.zero_point[:, order]]
        tried += [(groups.sqnr_db(groups.scale[:, order], zero), words) for zero in zero_points]
    restored, words = max(tried, default=(-math.inf, ""))
    stored = groups.sqnr_db(groups.scale)
    if restored < max(limit - RESTORED_DB, stored + GAIN_DB):
        return None
    return Finding(
        severity="error", kind="group-order", site=case.site,
        what=f"The scales of the {num_groups} groups of every row are in the wrong order: {words}.",
        evidence=f"weights {stored:.1f} dB as stored, {restored:.1f} dB with the scales put in order",
        remedy="Reorder weight_scale (and weight_zero_point) along its last dimension to the columns' order; look for "
        "a column permutation (act-order, g_idx) that was applied to one of codes and scales only.",
    )  # fmt: skip


def _orders(best: Tensor, stored: Tensor, num_rows: int, num_groups: int) -> Iterator[tuple[Tensor, str]]:
    """Orders of the groups that a writer may have made, as indices into the stored scales."""
    forward = torch.arange(num_groups, device=stored.device)
    if num_rows >= FEWEST_ROWS:
        profile = [(x.abs().clamp_min(1e-30).log2()) for x in (best, stored)]
        profile = [x - x.mean(1, keepdim=True) for x in profile]
        wanted, given = (torch.nn.functional.normalize(x - x.mean(0), dim=0) for x in profile)
        match = wanted.T @ given
        order = match.argmax(1)
        is_permutation = bool((order.sort().values == forward).all()) and not torch.equal(order, forward)
        if is_permutation and float(match.amax(1).mean()) >= CORRELATED:
            shift = int(order[0])
            is_shift = torch.equal(order, (forward + shift) % num_groups)
            words = f"shifted by {shift}" if is_shift else f"group 0 has the scale of group {shift}"
            yield order, words
    for shift in {1, num_groups - 1}:
        yield (forward + shift) % num_groups, f"shifted by {shift}"
    yield forward.flip(0), "reversed"


def _scale_factor(case: SiteCase, groups: Groups, measured: Measured) -> Finding | None:
    best_scale, best_zero = groups.best()
    ratio = (best_scale / groups.scale).flatten()
    factor = ratio.median()
    near = ((ratio / factor).clamp(1 / UNIFORM_SPREAD, UNIFORM_SPREAD) == ratio / factor).float().mean()
    stored, restored = groups.sqnr_db(groups.scale), groups.sqnr_db(groups.scale * factor)
    limit = max(groups.sqnr_db(best_scale, best_zero) - RESTORED_DB, stored + GAIN_DB)
    # Codes that were clipped also ask for larger scales, and hold little with any.
    if near < 1 - MIN_SHARE or restored < max(limit, measured.expected_weight_db - SUSPICIOUS_DB):
        return None
    return Finding(
        severity="error", kind="scale-factor", site=case.site,
        what=f"All scales are {1 / float(factor):.4g} times what the codes need.",
        evidence=f"weights {stored:.1f} dB as stored, {restored:.1f} dB with the scales times {float(factor):.4g}",
        remedy="Multiply the scales by that number; a reader or writer may take the inverse of a global scale, or half "
        "of the range for the whole.",
    )  # fmt: skip


def _zero_points(case: SiteCase, groups: Groups) -> Finding | None:
    _, fitting = groups.best()
    if fitting is None or groups.zero_point is None:
        return None
    format = case.quantized.weight.grid.format
    zero = groups.zero_point
    # Beside the stored scales: a slope of its own would move the zero point of codes that lie to one side.
    count = groups.mask.sum(-1)
    fitting = zero + groups.levels.sum(-1) / count - groups.weight.sum(-1) / count / groups.scale
    wrong = (fitting - zero).abs() > ZERO_POINT_STEPS
    share = float(wrong.float().mean())
    repaired = torch.where(wrong, fitting.round(), zero)
    stored, restored = groups.sqnr_db(groups.scale), groups.sqnr_db(groups.scale, repaired)
    if share < MIN_SHARE or restored < stored + GAIN_DB:
        return None
    values, moved = zero[wrong], (fitting - zero)[wrong]
    edge = float(values.mode().values)
    at_edge = (values == edge).float().mean() > 1 - MIN_SHARE and edge in (float(zero.max()), float(zero.min()))
    one_way = bool((moved > 0).all()) or bool((moved < 0).all())
    is_clipped = bool(at_edge) and one_way
    evidence = (
        f"{share:.0%} of the groups, off by {float(moved.abs().mean()):.2g} codes on average; weights {stored:.1f} dB "
        f"as stored, {restored:.1f} dB with zero points that fit the codes"
    )
    what = (
        f"Zero points were clipped at {edge:g}, and those that the codes need lie beyond."
        if is_clipped
        else "Zero points do not belong to the codes."
    )
    return Finding(
        severity="error", kind="clipped-zero-point" if is_clipped else "wrong-zero-point", site=case.site, what=what,
        evidence=evidence,
        remedy=f"Zero points of {format.name} are 0 to {format.num_codes - 1}: store them in a type that holds them, "
        f"packed or less half the number of codes, as the layout says. {FIT_AGAIN}",
    )  # fmt: skip


def _saturated(case: SiteCase, measured: Measured) -> Finding | None:
    """Scales so small that many weights lie beyond the last level."""
    weight = case.quantized.weight
    more = measured.saturated - measured.expected_saturated
    if measured.loss_db < SUSPICIOUS_DB or more < MIN_SHARE:
        return None
    target, coded = case.target, case.coded
    lowest, highest = weight.grid.format.end_codes
    at_end = (weight.codes == lowest) | (weight.codes == highest)
    beyond = at_end & (target.abs() > coded.abs()) & (target * coded >= 0)
    error = (target - coded).square()
    share = float(error[beyond].sum() / error.sum())
    if share < CLIPPED_SHARE:
        return None
    reach = float((target.abs() / coded.abs().clamp_min(1e-30))[beyond].max())
    return Finding(
        severity="error", kind="saturated", site=case.site,
        what="The scales are too small: many weights lie beyond the last level and were clipped.",
        evidence=f"{measured.saturated:.1%} of the codes at the ends of the range ({measured.expected_saturated:.1%} "
        f"if rounded to nearest), {share:.0%} of the error from weights beyond it, the largest {reach:.1f} times the "
        f"last level; weights {measured.weight_db:.1f} dB, expected {measured.expected_weight_db:.1f} dB",
        remedy="Fit the scales again with a wider range (range_method mse or minmax), and check the percentile if one "
        "was used; or use smaller groups.",
    )  # fmt: skip


def _rearranged(case: SiteCase, measured: Measured) -> Finding | None:
    dense, reference = case.quantized.dense(), case.reference
    needed = max(measured.weight_db + SUSPICIOUS_DB, measured.expected_weight_db - SUSPICIOUS_DB)
    if dense.shape[0] == dense.shape[1]:
        turned = sqnr_db(reference.T, dense)
        if turned >= needed:
            return _transposed(case.site, f"{measured.weight_db:.1f} dB against the original's weight, {turned:.1f} dB "
                               "against its transpose")  # fmt: skip
    for words, one, other in (("rows", reference, dense), ("columns", reference.T, dense.T)):
        order = _row_order(one, other)
        if order is not None and (restored := sqnr_db(one[order], other)) >= needed:
            moved = int((order != torch.arange(len(order), device=order.device)).sum())
            return Finding(
                severity="error", kind="permuted", site=case.site,
                what=f"The {words} are those of the original in another order.",
                evidence=f"{moved} of {len(order)} {words} moved; weights {measured.weight_db:.1f} dB as stored, "
                f"{restored:.1f} dB in that order",
                remedy="Undo the permutation (rotary layouts of other tools order the rows of q and k differently; "
                "act-order permutes columns).",
            )  # fmt: skip
    return None


def _transposed(site: str, evidence: str) -> Finding:
    return Finding(
        severity="error", kind="transposed", site=site,
        what="The weight was stored transposed: inputs and outputs have changed places.",
        evidence=evidence,
        remedy="Codes are stored as [out, in]. Transpose the weight (layers that keep [in, out], as GPT-2's, must be "
        "turned before) and quantize it again: groups of scales do not survive a transpose.",
    )  # fmt: skip


def _row_order(reference: Tensor, found: Tensor) -> Tensor | None:
    """For each row of `found` the row of `reference` that it is; None if they are not a permutation of each other."""
    one, other = (torch.nn.functional.normalize(x, dim=1) for x in (reference, found))
    best = [(part @ one.T).max(1) for part in other.split(1024)]
    order = torch.cat([each.indices for each in best])
    strength = torch.cat([each.values for each in best])
    count = torch.arange(len(order), device=order.device)
    is_permutation = bool((order.sort().values == count).all()) and not torch.equal(order, count)
    return order if is_permutation and float(strength.mean()) >= CORRELATED else None
