"""`bitwright search`: which scheme for which site, under budgets that people have.

    scores      what each site loses in each scheme of the menu (`search.sensitivity`), in nats per token
    items       sites that an engine runs as one product choose together (`search.fused`)
    allocation  the exact best sum under the limits (`search.allocate`), and the whole frontier
    correction  the divergence of the whole, measured: sums are right up to a factor, and quality limits need it
    rivals      one scheme for all, where that keeps the limits and turns out better (`search.rivals`)
    polish      an evolution on measured divergences (`search.polish`)

Scores and divergences are of weights rounded to nearest. Whatever solver quantizes them afterwards loses less, so that
a limit on quality is kept with room to spare; `repair` looks at what the finished model really lost.
"""

from collections import Counter
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import yaml
from torch import Tensor

from bitwright.budget import Budget
from bitwright.data.windows import hash_tokens
from bitwright.errors import RecipeError
from bitwright.inspection import probe_streamed
from bitwright.methods.low_rank import LOW_RANK
from bitwright.model.sites import Site
from bitwright.model.stream import StreamedModel
from bitwright.preparation import model_sites
from bitwright.progress import Progress, no_progress
from bitwright.recipe import QUANTIZABLE_KINDS, Recipe, Rule, pattern_of, rule_of
from bitwright.records import write_json_atomic, write_text_atomic
from bitwright.schemes import Scheme
from bitwright.search.allocate import Allocation, Choice, Infeasible, Item, Limits, Objective, allocate
from bitwright.search.choices import open_bench
from bitwright.search.cost import memory, speed
from bitwright.search.frontier import frontier
from bitwright.search.fused import fused_sets, join_stacks
from bitwright.search.menus import default_menu
from bitwright.search.meter import Assignment, Meter
from bitwright.search.model_shape import shape_of_model
from bitwright.search.permitted import permitted
from bitwright.search.polish import polish
from bitwright.search.rivals import faithful_rivals, small_rivals
from bitwright.search.sensitivity import Sensitivity, circumstances, measure_sensitivity
from bitwright.search.stored_size import exported_bytes
from bitwright.site_costs import SiteCosts

SCORE = "window_gradient"
NUM_FRONTIER = 40
MAX_CORRECTIONS = 4
CLOSE = 0.02
"""Of the limit: how near a corrected loss comes to it before the search is content."""

Measure = Callable[[Sequence[Assignment]], list[float]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """What a search found.

    Attributes:
        schemes: site -> scheme, None for 16 bit.
        predicted_loss: sum of the scores, nats per token.
        measured_loss: divergence of the whole with weights rounded to nearest, nats per token.
        start_loss: the same before the polish.
        size_bytes: of the files.
        memory_bytes: resident, at the end of the context.
        average_bits: stored, per weight of the sites that can be quantized.
        tokens_per_s: of a batch, a bound from above; None without a device.
        frontier: sizes of files, predicted losses and average bits of the best mixes of every size.
        num_measured: mixes whose divergence was measured.
    """

    schemes: Mapping[str, str | None]
    predicted_loss: float
    measured_loss: float
    start_loss: float
    size_bytes: int
    memory_bytes: int
    average_bits: float
    tokens_per_s: float | None
    frontier: tuple[Mapping[str, float], ...]
    num_measured: int

    def recipe(self, base: Recipe) -> Recipe:
        """The recipe that quantizes so: the commonest scheme for all, and a rule for every other site."""
        named = [scheme for scheme in self.schemes.values() if scheme is not None]
        if not named:
            raise RecipeError("the budget leaves every site in 16 bit: nothing is to be quantized.")
        common = Counter(named).most_common(1)[0][0]
        rules: list[Rule] = []
        for site, scheme in self.schemes.items():
            given = rule_of(base, site)
            method, repairs = (None, None) if given is None or scheme is None else (given.method, given.repairs)
            if scheme != common or method is not None or repairs is not None:
                real = None if scheme is None else Scheme.parse(scheme)
                rules.append(Rule(pattern=pattern_of(site), scheme=real, method=method, repairs=repairs))
        return replace(base, scheme=Scheme.parse(common), rules=tuple(rules))

    def write(self, folder: Path, recipe: Recipe) -> None:
        """Leave search.json and recipe.yaml in a folder."""
        write_json_atomic(folder / "search.json", asdict(self))
        text = yaml.safe_dump(recipe.to_mapping(), sort_keys=False, width=120)
        write_text_atomic(folder / "recipe.yaml", text)


class Search:
    """A search on one model.

    Args:
        model: the original.
        calibration: [N, T] token ids.
        recipe: its ignore patterns and rules are constraints: what they keep or fix stays so.
        budget: the limits.
        folder: scores and measured divergences are kept here, so that the same search resumes.
        schemes: the menu; those of `search.menus` that fit the model unless given. 16 bit is always among the choices.
        min_bits: site pattern -> the fewest bits of a code that its sites may have.
        fuse: sites that vLLM runs as one product share a scheme, and the default menu holds what it may load.
        score: which sensitivity is summed.
        num_windows: on how many windows divergences are measured.
        progress: called with (what, done, total).
    """

    def __init__(
        self,
        model: StreamedModel,
        calibration: Tensor,
        recipe: Recipe,
        budget: Budget,
        folder: Path,
        *,
        schemes: Sequence[str] = (),
        min_bits: Mapping[str, int] | None = None,
        fuse: bool = True,
        score: str = SCORE,
        num_windows: int = 8,
        progress: Progress = no_progress,
    ) -> None:
        self.model, self.calibration, self.recipe, self.budget = model, calibration, recipe, budget
        self.folder, self.score, self.num_windows, self.progress = folder, score, num_windows, progress
        self.sensitivity: Sensitivity | None = None
        model.skeleton.checkpoint.require_original()
        self.sites = tuple(site for site in model_sites(model) if site.kind in QUANTIZABLE_KINDS)
        everywhere = [site.name for site in self.sites] if LOW_RANK in recipe.repairs else []
        shape = shape_of_model(model)
        self.shape = replace(shape, ranks={**shape.ranks, **dict.fromkeys(everywhere, recipe.low_rank.rank)})
        self._header_bytes = 0
        offered = schemes or default_menu(self.sites, recipe.ragged, tables=not fuse)
        self.menu = tuple(str(Scheme.parse(name)) for name in offered)
        self.allowed = permitted(self.sites, self.menu, recipe, min_bits or {}, self.shape.dtype)
        fixed = {name for options in self.allowed.values() for name in options if name is not None}
        self.menu = (*self.menu, *sorted(fixed - set(self.menu)))
        sets = fused_sets(probe_streamed(model, progress)) if fuse else tuple((s.name,) for s in self.sites)
        self._sets = join_stacks(sets, self.sites)

    def run(self, *, rounds: int = 10, offspring: int = 8, seed: int = 0) -> Found:
        """Score, allocate, correct and polish.

        Args:
            rounds: of the polish; 0 leaves it out.
            offspring: mixes that each round measures.
            seed: of the polish.
        Raises:
            RecipeError: no mix keeps the budget; says which limit is to blame and what can be reached.
        """
        self._check_costs()
        self.sensitivity = self.scores()
        items = self.items(self.sensitivity)
        with self.measuring() as measure:
            found = self._find(items, measure, rounds=rounds, offspring=offspring, seed=seed)
            while self.budget.size_bytes is not None and found.size_bytes > self.budget.size_bytes:
                longer = self.costs.longer_headers(found.schemes)  # which no sum over sites knows
                self._header_bytes = max(longer, self._header_bytes + 1)
                found = self._find(items, measure, rounds=rounds, offspring=offspring, seed=seed)
        return found

    def _check_costs(self) -> None:
        """Raises RecipeError where limits on cost cannot be kept, in their units and before anything is measured."""
        costs = self.costs
        free = [self._item(each, [costs.choice(each, scheme) for scheme in self.common(each)]) for each in self.sets]
        if self.budget.size_bytes is not None:
            self._header_bytes = costs.longer_headers(allocate(free, objective="size").schemes)
        self._allocate(free, "size", self.costs.limits())

    def _allocate(self, items: Sequence[Item], objective: Objective, limits: Limits) -> Allocation:
        try:
            return allocate(items, objective=objective, limits=limits)
        except Infeasible as error:
            raise RecipeError(self.costs.in_units(error)) from None

    def _find(self, items: Sequence[Item], measure: Measure, *, rounds: int, offspring: int, seed: int) -> Found:
        """Allocate, correct and polish."""
        cache, loss_of = self.folder / self._cache_name(), lambda mix: measure([mix])[0]
        allocation = self._start(items, Meter(loss_of, cache).loss)
        limits = self.costs.limits()
        if self._objective == "size":
            limits = replace(limits, max_size_bytes=float(allocation.size_bytes))
        done = polish(
            allocation, items, loss_of, limits=limits,
            offspring=offspring, rounds=rounds, seed=seed, cache=cache, progress=self.progress,
        )  # fmt: skip
        return self.found(items, done.allocation, done.measured_loss, done.start_loss, done.num_measured)

    def scores(self) -> Sensitivity:
        """What each site loses in each scheme of the menu; those that the folder has are not measured again."""
        return measure_sensitivity(
            self.model, self.sites, self.calibration, score=self.score, folder=self.folder / "scores",
            schemes=[Scheme.parse(name) for name in self.menu], recipe=self.recipe,
            num_measured_windows=self.num_windows, progress=self.progress,
        )  # fmt: skip

    @contextmanager
    def measuring(self, *, extra: Sequence[str] = ()) -> Generator[Measure, None, None]:
        """A context in which divergences are measured: a function of mixes, site -> scheme of the menu or `extra`."""
        self.folder.mkdir(parents=True, exist_ok=True)
        schemes = [Scheme.parse(name) for name in (*self.menu, *extra)]
        with open_bench(
            self.model, self.sites, self.calibration, schemes=schemes, folder=self.folder, recipe=self.recipe,
            num_windows=self.num_windows, progress=self.progress,
        ) as bench:  # fmt: skip
            yield bench.divergences

    @property
    def sets(self) -> list[list[Site]]:
        """The sites that choose together."""
        sites = {site.name: site for site in self.sites}
        members = [[sites[name] for name in names if name in sites] for names in self._sets]
        return [each for each in members if each]

    @property
    def costs(self) -> SiteCosts:
        """What sites cost, and what the budget leaves for them."""
        return SiteCosts(
            shape=self.shape, sites=self.sites, recipe=self.recipe, budget=self.budget, header_bytes=self._header_bytes
        )

    def items(self, sensitivity: Sensitivity) -> list[Item]:
        """What chooses, and from what."""
        return [
            self._item(
                members,
                [
                    replace(self.costs.choice(members, scheme), loss=_loss(members, scheme, sensitivity))
                    for scheme in self.common(members)
                ],
            )
            for members in self.sets
        ]

    def _item(self, members: Sequence[Site], choices: Sequence[Choice]) -> Item:
        return Item(name=members[0].name, sites=tuple(site.name for site in members), choices=tuple(choices))

    def common(self, members: Sequence[Site]) -> list[str | None]:
        """The schemes that all of a set may have.

        Raises:
            RecipeError: none.
        """
        common = [s for s in self.allowed[members[0].name] if all(s in self.allowed[m.name] for m in members)]
        if not common:
            raise RecipeError(
                f"{members[0].name} and {members[-1].name} run as one product, and the recipe allows no scheme for "
                "both. Change its rules, or use --engine transformers."
            )
        return common

    def costs_fit(self, schemes: Mapping[str, str | None], *, addends: Collection[str] = ()) -> bool:
        """Whether an assignment, also of schemes outside of the menu, keeps the limits on anything but quality.

        Args:
            schemes: site -> scheme.
            addends: sites that get a low-rank addend beside those that the recipe gives one.
        Raises:
            ShapeError: groups that do not fit a row.
        """
        costs = self.costs.with_addends(addends)
        return self.costs.limits().hold([costs.choice(members, schemes[members[0].name]) for members in self.sets])

    def size_bytes(self, sites: Collection[str], scheme: str | None, *, addend: bool = False) -> int:
        """Return the bytes of sites in one scheme, with low-rank addends or without."""
        costs = self.costs.with_addends(sites if addend else ())
        return costs.choice([site for site in self.sites if site.name in sites], scheme).size_bytes

    def _start(self, items: Sequence[Item], loss_of: Callable[[Assignment], float]) -> Allocation:
        """The best by measured losses among mixes that are the best by their sums, and one scheme for all.

        Raises:
            RecipeError: nothing keeps the limits.
        """
        allowed = self.budget.max_loss
        tried = self._mixes(items, loss_of)
        if self._objective == "size" and allowed is not None:
            tried += small_rivals(items, allowed)
        else:
            tried += faithful_rivals(items, self.costs.limits())
        kept = [each for each in tried if allowed is None or loss_of(each.schemes) <= allowed]
        if not kept:
            least = min(loss_of(each.schemes) for each in tried)
            raise RecipeError(
                f"a loss of {allowed:.3g} nats per token cannot be kept: the best mix that was found loses "
                f"{least:.3g}. Allow more, raise the other limits, or offer larger schemes."
            )
        if self._objective == "loss":
            return min(kept, key=lambda each: loss_of(each.schemes))
        return min(kept, key=lambda each: each.size_bytes)

    def _mixes(self, items: Sequence[Item], loss_of: Callable[[Assignment], float]) -> list[Allocation]:
        """Allocate; where only quality is limited, until the measured loss is within the limit and close to it."""
        costs, allowed = self.costs.limits(), self.budget.max_loss
        if self._objective == "loss" or allowed is None:
            return [self._allocate(items, self._objective, costs)]
        tried = [self._allocate(items, "size", replace(costs, max_loss=allowed))]
        for _ in range(MAX_CORRECTIONS):
            last, measured = tried[-1], loss_of(tried[-1].schemes)
            if last.loss == 0 or measured <= 0 or allowed * (1 - CLOSE) < measured <= allowed:
                break
            predicted = last.loss * allowed / measured
            tried.append(self._allocate(items, "size", replace(costs, max_loss=predicted)))
        return tried

    @property
    def _objective(self) -> Objective:
        return "loss" if self.budget.limits_cost else "size"

    def found(
        self, items: Sequence[Item], allocation: Allocation, measured: float, start: float, num_measured: int
    ) -> Found:
        """Describe an allocation, and the frontier of its items."""
        schemes = dict(allocation.schemes)
        real = self.assignment(schemes)
        hardware, work = self.budget.hardware, self.budget.work
        step = None if hardware is None else speed(self.shape, real, work, hardware).decode_s
        size = exported_bytes(self.shape, real, layout=self.recipe.layout)
        others = size - allocation.size_bytes
        return Found(
            schemes=schemes,
            predicted_loss=allocation.loss,
            measured_loss=measured,
            start_loss=start,
            size_bytes=size,
            memory_bytes=memory(self.shape, real, work, hardware).total_bytes,
            average_bits=8 * allocation.size_bytes / self.costs.num_weights,
            tokens_per_s=None if step is None else work.batch / step,
            frontier=tuple(
                {
                    "size_bytes": each.size_bytes + others,
                    "average_bits": 8 * each.size_bytes / self.costs.num_weights,
                    "predicted_loss": each.loss,
                }
                for each in frontier(items, NUM_FRONTIER)
            ),
            num_measured=num_measured,
        )

    def assignment(self, schemes: Mapping[str, str | None]) -> dict[str, Scheme | None]:
        """Schemes with the group sizes that each site really gets."""
        return self.costs.assignment(schemes)

    def _cache_name(self) -> str:
        model_hash, device = self.model.skeleton.checkpoint.audit(), f"{self.model.device.type} {self.model.dtype}"
        key = circumstances(model_hash, hash_tokens(self.calibration), self.recipe, 0, device)
        return f"measured-{key}-{self.num_windows}.jsonl"


def _loss(members: Sequence[Site], scheme: str | None, sensitivity: Sensitivity) -> float:
    return sum(0.0 if scheme is None else sensitivity.values[site.name][scheme] for site in members)
