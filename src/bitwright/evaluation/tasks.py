"""How many questions a model answers, and which: accuracy by log-likelihood, as lm-evaluation-harness defines it.

Of several options the model gives the one whose tokens have the largest summed log-likelihood after the context
(`acc`), or the largest per character of the option (`acc_norm`). A last word counts as predicted if every one of its
tokens is the likeliest one where it stands. Questions are the independent sample of all standard errors.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from bitwright.errors import CheckpointError, DataError
from bitwright.evaluation.question_tokens import EncodedOption, EncodedQuestion
from bitwright.evaluation.ragged import Batch, RaggedHidden, plan_batches, position_logits, ragged_hidden
from bitwright.evaluation.score import mean_and_stderr
from bitwright.model.stream import StreamedModel
from bitwright.progress import Progress

LARGEST_EXPONENT = 700.0
LOGITS_PER_CHUNK = 2**24
"""Logits that are held at a time: 64 MB in float32."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What a model made of one question.

    Attributes:
        log_likelihoods: of each option, in nats.
        given: position of the likeliest option; of a last word the likeliest tokens where it stands; empty where no
            option has a finite log-likelihood.
        correct: whether that is right.
        given_normalised: as `given`, by log-likelihood per character.
        correct_normalised: whether that is right.
    """

    log_likelihoods: tuple[float, ...]
    given: tuple[int, ...]
    correct: bool
    given_normalised: tuple[int, ...]
    correct_normalised: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskScore:
    """What a model scored on the questions of a task.

    Attributes:
        accuracy: fraction of questions answered right.
        stderr: its standard error over questions; None for a single one.
        accuracy_normalised: as `accuracy`, by log-likelihood per character; None for last words.
        stderr_normalised: its standard error.
        chance: accuracy of guessing; None for last words.
        word_perplexity: exp of the mean negative log-likelihood of the right last word; None for options.
        word_perplexity_stderr: its standard error.
        num_truncated: questions whose context lost its beginning.
        per_question: every answer, in the questions' order.
    """

    accuracy: float
    stderr: float | None
    accuracy_normalised: float | None
    stderr_normalised: float | None
    chance: float | None
    word_perplexity: float | None
    word_perplexity_stderr: float | None
    num_truncated: int
    per_question: tuple[Answer, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Predicted:
    """What the model says where one option stands: log-likelihoods of its tokens and the likeliest tokens."""

    log_likelihood: float
    likeliest: tuple[int, ...]


def task_score(
    model: StreamedModel,
    questions: Sequence[EncodedQuestion],
    work: Path,
    progress: Progress,
    *,
    label: str = "tasks",
) -> TaskScore:
    """Answer questions, with one decoder block in memory at a time.

    Args:
        model: an original or a quantized one.
        questions: tokenised by `encode_task`; all with options, or all last words.
        work: a folder for hidden states.
        progress: called with (label, blocks done, blocks).
        label: what progress calls this.
    Raises:
        DataError: no question.
        CheckpointError: a token that the model does not know.
    """
    if not questions:
        raise DataError("there is no question to answer. Give a task with at least one.")
    options = [option for question in questions for option in question.options]
    _check_vocabulary(model, options)
    rows = {inputs: row for row, inputs in enumerate(dict.fromkeys(option.inputs for option in options))}
    batches = plan_batches(list(rows), alone=model.skeleton.checkpoint.quantizes_inputs)
    hidden = ragged_hidden(model, batches, work / "hidden-tasks.bin", progress, label)
    predicted = iter(_predict(model, options, rows, batches, hidden))
    hidden.delete()
    answers = [_answer(question, list(islice(predicted, len(question.options)))) for question in questions]
    return _score(questions, answers)


def _check_vocabulary(model: StreamedModel, options: Sequence[EncodedOption]) -> None:
    size = int(model.skeleton.model.config.get_text_config().vocab_size)
    largest = max(max(*option.inputs, *option.targets) for option in options)
    if largest >= size:
        raise CheckpointError(
            f"{model.skeleton.checkpoint.path}: the tokenizer makes token {largest}, the model knows {size}. "
            "Tokenizer and weights do not belong together."
        )


def _predict(
    model: StreamedModel,
    options: Sequence[EncodedOption],
    rows: dict[tuple[int, ...], int],
    batches: Sequence[Batch],
    hidden: RaggedHidden,
) -> list[_Predicted]:
    """Read off what the model predicts where each option stands."""
    members: dict[int, list[int]] = {}
    for index, option in enumerate(options):
        members.setdefault(rows[option.inputs], []).append(index)
    found: dict[int, _Predicted] = {}
    with model.outside():
        for batch in batches:
            wanted = [(place, index) for place, row in enumerate(batch.rows) for index in members[row]]
            places, positions, targets = _positions(options, wanted)
            states = hidden.read(batch)[places, positions]
            values, tops = _read_off(model, batch.ids[places, positions], states, targets)
            start = 0
            for _, index in wanted:
                end = start + len(options[index].targets)
                found[index] = _Predicted(log_likelihood=math.fsum(values[start:end]), likeliest=tuple(tops[start:end]))
                start = end
    return [found[index] for index in range(len(options))]


def _positions(options: Sequence[EncodedOption], wanted: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor, Tensor]:
    """Row in the batch, position and target of every token of the wanted options, in their order: [P] each."""
    places, positions, targets = list[int](), list[int](), list[int]()
    for place, index in wanted:
        option = options[index]
        length, count = len(option.inputs), len(option.targets)
        places += [place] * count
        positions += range(length - count, length)
        targets += option.targets
    return torch.tensor(places), torch.tensor(positions), torch.tensor(targets)


def _read_off(model: StreamedModel, ids: Tensor, states: Tensor, targets: Tensor) -> tuple[list[float], list[int]]:
    """The log-likelihood of each target [P] and the likeliest token in its place, from states [P, D]."""
    size = max(1, LOGITS_PER_CHUNK // int(model.skeleton.model.config.get_text_config().vocab_size))
    values, tops = list[float](), list[int]()
    for start in range(0, len(targets), size):
        part = slice(start, start + size)
        logits = position_logits(model, ids[part], states[part])
        likely = torch.log_softmax(logits, dim=-1)
        values += likely.gather(1, targets[part].to(likely.device)[:, None])[:, 0].double().tolist()
        tops += logits.argmax(dim=-1).tolist()
    return values, tops


def _answer(question: EncodedQuestion, predicted: Sequence[_Predicted]) -> Answer:
    sums = tuple(each.log_likelihood for each in predicted)
    if len(predicted) == 1:
        given = predicted[0].likeliest if math.isfinite(sums[0]) else ()
        correct = given == question.options[0].targets
        return Answer(
            log_likelihoods=sums, given=given, correct=correct, given_normalised=given, correct_normalised=correct
        )
    per_character = [value / option.num_characters for value, option in zip(sums, question.options, strict=True)]
    given, normalised = _likeliest(sums), _likeliest(per_character)
    return Answer(
        log_likelihoods=sums,
        given=given,
        correct=given == (question.answer,),
        given_normalised=normalised,
        correct_normalised=normalised == (question.answer,),
    )


def _likeliest(values: Sequence[float]) -> tuple[int, ...]:
    """Position of the largest finite value, the first of equals; empty if none is finite."""
    finite = [index for index, value in enumerate(values) if math.isfinite(value)]
    return (max(finite, key=lambda index: values[index]),) if finite else ()


def _score(questions: Sequence[EncodedQuestion], answers: Sequence[Answer]) -> TaskScore:
    accuracy, stderr = mean_and_stderr([float(answer.correct) for answer in answers])
    is_last_word = len(questions[0].options) == 1
    normalised, chance, perplexity = (None, None), None, (None, None)
    if is_last_word:
        perplexity = _perplexity([-answer.log_likelihoods[0] for answer in answers])
    else:
        normalised = mean_and_stderr([float(answer.correct_normalised) for answer in answers])
        chance = math.fsum(1 / len(question.options) for question in questions) / len(questions)
    return TaskScore(
        accuracy=accuracy,
        stderr=stderr,
        accuracy_normalised=normalised[0],
        stderr_normalised=normalised[1],
        chance=chance,
        word_perplexity=perplexity[0],
        word_perplexity_stderr=perplexity[1],
        num_truncated=sum(any(option.is_truncated for option in question.options) for question in questions),
        per_question=tuple(answers),
    )


def _perplexity(losses: Sequence[float]) -> tuple[float, float | None]:
    """exp of the mean loss and, by dexp(x) = exp(x) dx, its standard error; infinite where a loss is not finite."""
    if not all(math.isfinite(loss) for loss in losses):
        return math.inf, None
    mean, stderr = mean_and_stderr(losses)
    perplexity = math.exp(mean) if mean < LARGEST_EXPONENT else math.inf
    return perplexity, None if stderr is None or math.isinf(perplexity) else perplexity * stderr
