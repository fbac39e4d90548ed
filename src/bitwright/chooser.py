"""The data-driven choice: try cheap compositions on a sample of blocks, pick per site, and keep GPTQ if nothing helps.

1. Plain GPTQ quantizes the whole model. What enters a few blocks spread over the depth is kept: hidden states that have
   gone through a quantized prefix, as they will in the finished model.
2. On these blocks every candidate quantizes the block, on three quarters of the calibration windows; what counts is how
   far the block's output on the other windows is from that of the unquantized model. So a method that makes up for the
   blocks before is seen to do so.
3. The transforms of the best composition are taken for the whole model, since they are a recipe's. Then the solvers of
   the other candidates with these transforms are tried on one group of sites after the other; a group keeps a solver
   that lowers the block's error.
4. A site of a block outside the sample takes the solver that its kind has on the nearest sampled block.
5. The error of a block is not the loss of the model. So the choice is kept only where its divergence on the gate text
   is not above GPTQ's.

Shapes: N windows, T tokens, D hidden size.
"""

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path

import torch

from bitwright.automatic import BASELINE, CHOICE, Choice, Trial, known, work_beside
from bitwright.errors import RecipeError, VerificationError
from bitwright.evaluation.streamed import enter_all
from bitwright.methods.composition import Composition, check_composition, compose, needs_own_layout
from bitwright.methods.solvers import AUTO
from bitwright.methods.transforms import TRANSFORMS
from bitwright.model.activations import Activations, batch_slices
from bitwright.model.layouts import own
from bitwright.model.stream import StreamedModel
from bitwright.model.structure import BlockStructure
from bitwright.preparation import Job
from bitwright.progress import Progress
from bitwright.recipe import Plan, Recipe
from bitwright.records import write_json_atomic
from bitwright.walk import Walk, needs_gradients, needs_teacher

ENTERING = "auto-entering"
WEIGHT_CANDIDATES = ("gptq", "gptaq", "awq+gptq", "awq+gptaq")
INPUT_CANDIDATES = ("gptq", "gptaq", "smoothquant+gptq", "smoothquant+gptaq")
HELD_OUT_FRACTION = 4
"""One of so many calibration windows judges the candidates."""
WORTH_A_TRIAL = 1.1
"""How many times the error of the best a solver may leave on a block to be tried on single groups of it."""


class Chooser:
    """Chooses transforms and solvers for a job; a resumed run finds the choice in its work folder.

    Args:
        job: whose plan has sites with method auto.
        model: what will be quantized.
        work: the run's work folder.
        progress: called with (what, done, total).
    Raises:
        RecipeError: too few calibration windows, or no candidate that goes with the recipe.
    """

    def __init__(self, job: Job, model: StreamedModel, work: Path, progress: Progress) -> None:
        count = job.calibration.shape[0]
        if count < 2:
            raise RecipeError("auto needs calibration windows to judge on: at least 2. Give more, or name a method.")
        self.job, self.model, self.work, self.progress = job, model, work, progress
        self.trials: list[Trial] = []
        sampled = min(job.recipe.auto.sample, model.num_blocks)
        last = model.num_blocks - 1
        self.sample = sorted({round(i * last / max(1, sampled - 1)) for i in range(sampled)})
        tried_on = count - max(1, count // HELD_OUT_FRACTION)
        self.windows = {"calibration": slice(0, tried_on), "gate": slice(tried_on, count)}
        self.structures: dict[int, BlockStructure] = {}
        self.done = 0
        self.candidates = self._candidates()
        if not self.candidates:
            raise RecipeError(f"auto: no candidate works here; the first was refused: {self.trials[0].refused}")

    def keep(self, index: int, streams: Mapping[str, Activations]) -> None:
        """Keep the hidden states that enter a sampled block of the baseline, before it is quantized."""
        if index in self.sample:
            folder = self.work / ENTERING
            folder.mkdir(exist_ok=True)
            for name, windows in self.windows.items():
                _copy(streams["calibration"], windows, folder / f"{name}-{index}.bin").sync()

    def choose(self) -> Job:
        """Return the job with the chosen transforms and a solver for every site; the baseline has run by now."""
        choice = known(self.work)
        if choice is None:
            folder = self.work / "auto"
            shutil.rmtree(folder, ignore_errors=True)
            self.run = work_beside(self.work, folder / "trial")
            choice = self._choose()
            write_json_atomic(self.work / CHOICE, asdict(choice))
            for done in (folder, self.work / ENTERING):
                shutil.rmtree(done)
        sites = {
            name: entry if name not in choice.solvers else replace(
                entry, method=choice.solvers[name][0], reason=choice.solvers[name][1]
            )
            for name, entry in self.job.plan.sites.items()
        }  # fmt: skip
        return replace(self.job, recipe=replace(self.job.recipe, transforms=choice.transforms), plan=Plan(sites=sites))

    def _choose(self) -> Choice:
        streams = {index: {**self._entering(index, floats), **floats} for index, floats in self._float_streams()}
        candidates = self.candidates
        errors: dict[str, dict[int, float]] = {}
        for text, composed in candidates.items():
            found = {index: self._try(text, composed, index, streams[index], {}) for index in self.sample}
            worked = {index: error for index, error in found.items() if error is not None}
            if len(worked) == len(found):
                errors[text] = worked
        if not errors:
            raise RecipeError(f"auto: no candidate works here; the first was refused: {self.trials[0].refused}")
        best = min(errors, key=lambda text: sum(errors[text].values()))
        per_block = {index: self._refine(best, errors, index, streams[index]) for index in self.sample}
        return Choice(
            transforms=candidates[best].transforms,
            solvers=self._solvers(best, candidates[best].method, per_block, errors),
            trials=tuple(self.trials),
        )

    def _candidates(self) -> dict[str, Recipe]:
        """Compositions that go with the recipe's own transforms, its layout and its schemes, by name."""
        found: dict[str, Recipe] = {}
        for text in self.job.recipe.auto.candidates or default_candidates(self.job.plan):
            parts = compose(text)
            transforms = tuple(dict.fromkeys((*self.job.recipe.transforms, *parts.transforms)))
            recipe = replace(self.job.recipe, transforms=transforms, method=parts.method)
            try:
                self._check_parts(parts)
                check_composition(recipe, self._plan(recipe, {}))
                part = needs_own_layout(recipe)
                if part is not None and set(self.job.layouts.values()) != {own.NAME}:
                    raise RecipeError(f"{part} needs layout bitwright")
            except RecipeError as error:
                self._refuse("", text, {}, error)
                continue
            found[text] = recipe
        return found

    def _check_parts(self, parts: Composition) -> None:
        """Raises RecipeError for what cannot be tried on one block, or is the recipe's to say."""
        for name in parts.transforms:
            if TRANSFORMS[name].apply_model is not None and name not in self.job.recipe.transforms:
                raise RecipeError(f"{name} changes the whole model: name it in the recipe's transforms")
        if parts.repairs:
            raise RecipeError(f"repairs ({', '.join(parts.repairs)}) are not chosen: name them in the recipe")
        if needs_gradients(parts.method):
            raise RecipeError(f"{parts.method} needs gradients of the whole model, which trials on blocks do not have")

    def _refuse(self, block: str, text: str, solvers: dict[str, str], error: Exception) -> None:
        self.trials.append(Trial(block=block, composition=text, solvers=solvers, error=None, refused=str(error)))

    def _plan(self, recipe: Recipe, solvers: Mapping[str, str]) -> Plan:
        sites = {
            name: replace(entry, method=solvers.get(name, recipe.method)) if entry.method == AUTO else entry
            for name, entry in self.job.plan.sites.items()
        }
        return Plan(sites=sites)

    def _entering(self, index: int, floats: Mapping[str, Activations]) -> dict[str, Activations]:
        """What `keep` has kept of the baseline."""
        like = {"calibration": floats["teacher"], "gate": floats["reference"]}
        return {
            name: Activations(self.work / ENTERING / f"{name}-{index}.bin", store.shape, store.dtype)
            for name, store in like.items()
        }

    def _float_streams(self) -> Iterator[tuple[int, dict[str, Activations]]]:
        """Yield the hidden states of the unquantized model that enter each sampled block."""
        folder = self.run.path.parent
        whole = enter_all(self.model, self.job.calibration, folder / "float.bin")
        for index in range(max(self.sample) + 1):
            if index in self.sample:
                teacher = _copy(whole, self.windows["calibration"], folder / f"teacher-{index}.bin")
                reference = _copy(whole, self.windows["gate"], folder / f"reference-{index}.bin")
                yield index, {"teacher": teacher, "reference": reference}
            with self.model.block(index) as block:
                self._run(block, index, whole, whole)

    def _run(self, block: torch.nn.Module, index: int, source: Activations, target: Activations) -> None:
        for start, end in batch_slices(source.shape[0], source.shape[1]):
            target.write(start, self.model.run_block(block, index, source.read(start, end, self.model.device)))

    def _try(
        self, text: str, recipe: Recipe, index: int, streams: dict[str, Activations], solvers: dict[str, str]
    ) -> float | None:
        """Quantize one block and return the error of its output on the held-out windows; None where that cannot be.

        Args:
            text: the composition, as a recipe's method reads.
            recipe: with it.
            index: of the block.
            streams: what enters it: `calibration` and `gate` after the baseline's blocks, and their like in the
                unquantized model, `teacher` and `reference`.
            solvers: of sites that have another one.
        """
        calibration = self.job.calibration
        walk = Walk(
            self.model, self.run, recipe, self._plan(recipe, solvers), self.job.layouts,
            calibration[self.windows["calibration"]], calibration[self.windows["gate"]], self.progress,
        )  # fmt: skip
        outputs = {
            name: Activations(self.run.path.parent / f"out-{name}.bin", streams[name].shape, streams[name].dtype)
            for name in ("reference", "gate", "teacher")
        }
        unused = set() if needs_teacher(walk.needs) else {"teacher"}
        name = self.model.block_names[index]
        with self.model.block(index) as block:
            self._run(block, index, streams["reference"], outputs["reference"])
            given = {each: store for each, store in streams.items() if each not in unused}
            try:
                stage, *_ = walk.quantize_block(block, index, given, outputs)
            except VerificationError as problem:
                self._refuse(name, text, solvers, problem)
                return None
            self.structures[index] = stage.structure
            self._run(block, index, streams["gate"], outputs["gate"])
        error = _relative_error(streams["reference"], outputs["reference"], outputs["gate"])
        self.trials.append(Trial(block=name, composition=text, solvers=solvers, error=error))
        self.done += 1
        self.progress("auto", self.done, max(self.done + 1, len(self.candidates) * len(self.sample)))
        return error

    def _refine(
        self, best: str, errors: Mapping[str, Mapping[int, float]], index: int, streams: dict[str, Activations]
    ) -> dict[str, tuple[str, float]]:
        """Let one group after the other try the other solvers; return site -> solver and the error it led to.

        A solver that did much worse on the whole block is not tried: no group of it would do better.
        """
        recipe, error = self.candidates[best], errors[best][index]
        solvers = {
            each.method for text, each in self.candidates.items()
            if each.transforms == recipe.transforms and each.method != recipe.method
            and text in errors and errors[text][index] <= WORTH_A_TRIAL * error
        }  # fmt: skip
        chosen: dict[str, tuple[str, float]] = {}
        for members in self._tried_together(index):
            for solver in sorted(solvers):
                mix = {name: picked for name, (picked, _) in chosen.items()} | dict.fromkeys(members, solver)
                tried = self._try(best, recipe, index, streams, mix)
                if tried is not None and tried < error:
                    error = tried
                    chosen |= dict.fromkeys(members, (solver, tried))
        return chosen

    def _tried_together(self, index: int) -> list[list[str]]:
        """Sites of a block that are left to the data: by groups, and all experts of a stack as one."""
        structure = self.structures[index]
        parameters = {site.name: site.parameter for site in structure.sites}
        found: dict[tuple[str, ...], list[str]] = {}
        for group in structure.groups:
            members = [name for name in group.sites if self.job.plan.sites[name].method == AUTO]
            if members:
                found.setdefault(tuple(parameters[name] for name in group.sites), []).extend(members)
        return list(found.values())

    def _solvers(
        self,
        best: str,
        solver: str,
        per_block: Mapping[int, Mapping[str, tuple[str, float]]],
        errors: Mapping[str, Mapping[int, float]],
    ) -> dict[str, tuple[str, str]]:
        """Spread the choices of the sampled blocks over all sites, with the reason of each."""
        result: dict[str, tuple[str, str]] = {}
        for index, block in enumerate(self.model.block_names):
            near = min(self.sample, key=lambda sampled: abs(sampled - index))
            sampled = self.model.block_names[near]
            special = {name[len(sampled) :]: picked for name, picked in per_block[near].items()}
            where = "here" if near == index else f"on {sampled}, the nearest block tried"
            for name, entry in self.job.plan.sites.items():
                if entry.method != AUTO or not name.startswith(block + "."):
                    continue
                method, error = special.get(name[len(block) :], (solver, errors[best][near]))
                against = f", {BASELINE} {errors[BASELINE][near]:.3g}" if BASELINE in errors else ""
                result[name] = method, f"auto: {best} with {method} leaves error {error:.3g} {where}{against}"
        return result


def _copy(source: Activations, windows: slice, path: Path) -> Activations:
    """Copy some windows of a file of hidden states to another, batch by batch."""
    count = windows.stop - windows.start
    target = Activations(path, (count, *source.shape[1:]), source.dtype)
    for start, end in batch_slices(count, source.shape[1]):
        target.write(start, source.read(windows.start + start, windows.start + end, torch.device("cpu")))
    return target


def _relative_error(inputs: Activations, expected: Activations, found: Activations) -> float:
    """Squared distance of the outputs, relative to what the block adds to its inputs."""
    distance = added = 0.0
    cpu = torch.device("cpu")
    for start in range(len(inputs)):
        target = expected.read(start, start + 1, cpu).double()
        distance += float((found.read(start, start + 1, cpu).double() - target).square().sum())
        added += float((target - inputs.read(start, start + 1, cpu).double()).square().sum())
    return distance / added if added > 0 else distance


def default_candidates(plan: Plan) -> tuple[str, ...]:
    """Return what is tried unless the recipe says so: with AWQ for weights alone, with SmoothQuant for inputs too."""
    schemes = [entry.scheme for entry in plan.sites.values() if entry.method == AUTO and entry.scheme is not None]
    inputs = [scheme.activations is not None for scheme in schemes]
    return tuple(dict.fromkeys((*WEIGHT_CANDIDATES * (not all(inputs)), *INPUT_CANDIDATES * any(inputs))))
