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

import hashlib
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
from bitwright.recipe import QUANTIZABLE_KINDS, Recipe, Rule, matches, resolve
from bitwright.records import write_json_atomic, write_text_atomic
from bitwright.schemes import Scheme
from bitwright.search.allocate import Allocation, Choice, Item, Limits, Objective, allocate
from bitwright.search.choices import open_bench
from bitwright.search.cost import memory, resident_bytes, site_latency, speed
from bitwright.search.frontier import frontier
from bitwright.search.fused import fused_sets
from bitwright.search.menus import default_menu
from bitwright.search.meter import Assignment, Meter
from bitwright.search.model_shape import ModelShape, shape_of_model
from bitwright.search.polish import polish
from bitwright.search.rivals import faithful_rivals, small_rivals
from bitwright.search.sensitivity import Sensitivity, measure_sensitivity
from bitwright.search.stored_size import exported_bytes, site_bytes

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
        rules = tuple(
            Rule(pattern=site, scheme=None if scheme is None else Scheme.parse(scheme))
            for site, scheme in self.schemes.items()
            if scheme != common
        )
        return replace(base, scheme=Scheme.parse(common), rules=rules)

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
        self.sites = tuple(site for site in model_sites(model) if site.kind in QUANTIZABLE_KINDS)
        everywhere = [site.name for site in self.sites] if LOW_RANK in recipe.repairs else []
        self.shape = self._with_addends(shape_of_model(model), everywhere)
        offered = schemes or default_menu(self.sites, recipe.ragged, tables=not fuse)
        self.menu = tuple(str(Scheme.parse(name)) for name in offered)
        self.allowed = _allowed(self.sites, self.menu, recipe, min_bits or {})
        fixed = {name for options in self.allowed.values() for name in options if name is not None}
        self.menu = (*self.menu, *sorted(fixed - set(self.menu)))
        self._sets = fused_sets(probe_streamed(model, progress)) if fuse else tuple((s.name,) for s in self.sites)

    def run(self, *, rounds: int = 10, offspring: int = 8, seed: int = 0) -> Found:
        """Score, allocate, correct and polish.

        Args:
            rounds: of the polish; 0 leaves it out.
            offspring: mixes that each round measures.
            seed: of the polish.
        Raises:
            RecipeError: no mix keeps the budget; says which limit is to blame and what can be reached.
        """
        self.sensitivity = self.scores()
        items = self.items(self.sensitivity)
        with self.measuring() as measure:
            cache, loss_of = self.folder / self._cache_name(), lambda mix: measure([mix])[0]
            allocation = self._start(items, Meter(loss_of, cache).loss)
            limits = self.limits()
            if self.budget.max_loss is not None and not self.budget.limits_cost:
                limits = replace(limits, max_size_bytes=float(allocation.size_bytes))
            done = polish(
                allocation, items, loss_of, limits=replace(limits, max_loss=None),
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

    def items(self, sensitivity: Sensitivity) -> list[Item]:
        """What chooses, and from what."""
        found: list[Item] = []
        for members in self.sets:
            common = [s for s in self.allowed[members[0].name] if all(s in self.allowed[m.name] for m in members)]
            if not common:
                raise RecipeError(
                    f"{members[0].name} and {members[-1].name} run as one product, and the recipe allows no scheme for "
                    "both. Change its rules, or use --engine transformers."
                )
            choices = tuple(self._choice(members, scheme, sensitivity) for scheme in common)
            found.append(Item(name=members[0].name, sites=tuple(m.name for m in members), choices=choices))
        return found

    def _choice(self, members: Sequence[Site], scheme: str | None, sensitivity: Sensitivity) -> Choice:
        loss = sum(0.0 if scheme is None else sensitivity.values[site.name][scheme] for site in members)
        return replace(self._cost(self.shape, members, scheme), loss=loss)

    def _cost(self, shape: ModelShape, members: Sequence[Site], scheme: str | None) -> Choice:
        """What sites cost in a scheme, whatever they lose."""
        hardware = self.budget.hardware
        latency = 0.0
        size = resident = 0
        for site in members:
            real = self._effective(site, scheme)
            rank = shape.ranks.get(site.name, 0)
            size += site_bytes(site, real, shape.site_dtypes[site.name], shape.dtype, rank=rank)
            resident += resident_bytes(shape, site, real, hardware)
            if hardware is not None:
                latency += site_latency(shape, site, real, hardware, tokens=self.budget.work.batch)
        return Choice(scheme=scheme, loss=0.0, size_bytes=size, memory_bytes=resident, latency_s=latency)

    def limits(self) -> Limits:
        """The budget, less what no choice changes: embeddings, norms, head, cache and workspace."""
        budget, nothing = self.budget, dict.fromkeys((site.name for site in self.sites), None)
        dense = sum(site_bytes(s, None, self.shape.site_dtypes[s.name], self.shape.dtype) for s in self.sites)
        sizes: list[float] = []
        if budget.size_bytes is not None:
            sizes.append(budget.size_bytes - (exported_bytes(self.shape, nothing) - dense))
        if budget.average_bits is not None:
            sizes.append(budget.average_bits * self._num_weights / 8)
        resident = latency = None
        if budget.fit_bytes is not None:
            whole = memory(self.shape, nothing, budget.work, budget.hardware).total_bytes
            resident = float(budget.fit_bytes - (whole - dense))
        if budget.min_tokens_per_s is not None and budget.hardware is not None:
            step = speed(self.shape, nothing, budget.work, budget.hardware).decode_s
            of_sites = sum(
                site_latency(self.shape, site, None, budget.hardware, tokens=budget.work.batch) for site in self.sites
            )
            latency = budget.work.batch / budget.min_tokens_per_s - (step - of_sites)
        return Limits(
            max_loss=budget.max_loss, max_size_bytes=min(sizes, default=None), max_memory_bytes=resident,
            max_latency_s=latency,
        )  # fmt: skip

    def costs_fit(self, schemes: Mapping[str, str | None], *, addends: Collection[str] = ()) -> bool:
        """Whether an assignment, also of schemes outside of the menu, keeps the limits on anything but quality.

        Args:
            schemes: site -> scheme.
            addends: sites that get a low-rank addend beside those that the recipe gives one.
        Raises:
            ShapeError: groups that do not fit a row.
        """
        shape = self._with_addends(self.shape, addends)
        chosen = [self._cost(shape, members, schemes[members[0].name]) for members in self.sets]
        return replace(self.limits(), max_loss=None).hold(chosen)

    def size_bytes(self, sites: Collection[str], scheme: str | None, *, addend: bool = False) -> int:
        """Return the bytes of sites in one scheme, with low-rank addends or without."""
        shape = self._with_addends(self.shape, sites if addend else ())
        return self._cost(shape, [site for site in self.sites if site.name in sites], scheme).size_bytes

    def _with_addends(self, shape: ModelShape, sites: Collection[str]) -> ModelShape:
        return replace(shape, ranks={**shape.ranks, **dict.fromkeys(sites, self.recipe.low_rank.rank)})

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
            tried += faithful_rivals(items, replace(self.limits(), max_loss=None))
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
        costs, allowed = replace(self.limits(), max_loss=None), self.budget.max_loss
        if self._objective == "loss" or allowed is None:
            return [allocate(items, objective=self._objective, limits=costs)]
        tried = [allocate(items, objective="size", limits=replace(costs, max_loss=allowed))]
        for _ in range(MAX_CORRECTIONS):
            last, measured = tried[-1], loss_of(tried[-1].schemes)
            if last.loss == 0 or measured <= 0 or allowed * (1 - CLOSE) < measured <= allowed:
                break
            predicted = last.loss * allowed / measured
            tried.append(allocate(items, objective="size", limits=replace(costs, max_loss=predicted)))
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
            average_bits=8 * allocation.size_bytes / self._num_weights,
            tokens_per_s=None if step is None else work.batch / step,
            frontier=tuple(
                {
                    "size_bytes": each.size_bytes + others,
                    "average_bits": 8 * each.size_bytes / self._num_weights,
                    "predicted_loss": each.loss,
                }
                for each in frontier(items, NUM_FRONTIER)
            ),
            num_measured=num_measured,
        )

    def assignment(self, schemes: Mapping[str, str | None]) -> dict[str, Scheme | None]:
        """Schemes with the group sizes that each site really gets."""
        return {site.name: self._effective(site, schemes[site.name]) for site in self.sites}

    def _effective(self, site: Site, scheme: str | None) -> Scheme | None:
        if scheme is None:
            return None
        wished = Recipe(scheme=Scheme.parse(scheme), ignore=(), ragged=self.recipe.ragged)
        return resolve(wished, [site]).sites[site.name].effective

    @property
    def _num_weights(self) -> int:
        return sum(site.out_features * site.in_features for site in self.sites)

    def _cache_name(self) -> str:
        parts = [self.model.skeleton.checkpoint.audit(), hash_tokens(self.calibration), self.recipe.range_method]
        key = hashlib.sha256(" ".join([*parts, self.recipe.ragged]).encode()).hexdigest()[:12]
        return f"measured-{key}-{self.num_windows}.jsonl"


def _allowed(
    sites: Sequence[Site], menu: Sequence[str], recipe: Recipe, min_bits: Mapping[str, int]
) -> dict[str, tuple[str | None, ...]]:
    """Which schemes each site may have: what the recipe keeps in 16 bit or fixes has no choice.

    Raises:
        RecipeError: a pattern of `min_bits` matches no site.
    """
    for pattern in min_bits:
        if not any(matches(pattern, site.name) for site in sites):
            raise RecipeError(f"--min-bits {pattern}: matches no site that can be quantized.")
    found: dict[str, tuple[str | None, ...]] = {}
    for site in sites:
        least = max((bits for pattern, bits in min_bits.items() if matches(pattern, site.name)), default=0)
        rule = next((rule for rule in reversed(recipe.rules) if matches(rule.pattern, site.name)), None)
        if any(matches(pattern, site.name) for pattern in recipe.ignore):
            found[site.name] = (None,)
        elif rule is not None:
            found[site.name] = (None if rule.scheme is None else str(rule.scheme),)
        else:
            kept = [name for name in menu if Scheme.parse(name).weights.format.bits >= least]
            found[site.name] = (*kept, None)
    return found
