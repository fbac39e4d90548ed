"""Scores of questions, against transformers on each option by itself."""

import json
import math
import statistics
from pathlib import Path

import pytest
import torch
from scipy.stats import binomtest
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from bitwright.errors import CheckpointError, DataError
from bitwright.evaluation.flips import compare_answers, compare_right
from bitwright.evaluation.question_tokens import EncodedOption, EncodedQuestion, encode_task
from bitwright.evaluation.questions import Task, read_task
from bitwright.evaluation.ragged import plan_batches
from bitwright.evaluation.tasks import Answer, TaskScore, task_score
from bitwright.model import activations
from bitwright.model.checkpoint import open_checkpoint
from bitwright.model.stream import StreamedModel
from bitwright.pipeline import quantize
from bitwright.progress import no_progress
from bitwright.recipe import Calibration, Recipe
from bitwright.schemes import Scheme

NUM_QUESTIONS, CONTEXT = 9, 128
ROUNDING = 2.0**-12
"""Two blocks of float32 sums over at most 128 terms: log-likelihoods of a few nats a token move by far less."""


@pytest.fixture(scope="module")
def choices(tiny_text: str, tmp_path_factory: pytest.TempPathFactory) -> Task:
    """Questions of many lengths, some with options of a single token, from the text's own sentences."""
    words = tiny_text.split()
    file = tmp_path_factory.mktemp("tasks") / "choices.jsonl"
    entries = [
        {
            "query": " ".join(words[40 * i : 40 * i + 2 + 3 * i]),
            "choices": [" ".join(words[j : j + 1 + (i + j) % 4]) for j in range(7 * i, 7 * i + 3)],
            "gold": i % 3,
        }
        for i in range(NUM_QUESTIONS)
    ]
    file.write_text("\n".join(map(json.dumps, entries)))
    return read_task(file)


@pytest.fixture(scope="module")
def last_words(tiny_text: str, tmp_path_factory: pytest.TempPathFactory) -> Task:
    words = tiny_text.split()
    file = tmp_path_factory.mktemp("tasks") / "words.jsonl"
    lines = [json.dumps({"text": " ".join(words[20 * i : 20 * i + 4 + 2 * i])}) for i in range(NUM_QUESTIONS)]
    file.write_text("\n".join(lines))
    return read_task(file)


def stream(folder: Path) -> StreamedModel:
    return StreamedModel(open_checkpoint(folder))


def score(folder: Path, task: Task, work: Path, *, max_length: int = CONTEXT) -> TaskScore:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return task_score(stream(folder), encode_task(tokenizer, task, max_length=max_length), work, no_progress)


def alone(folder: Path, task: Task) -> list[list[tuple[float, bool]]]:
    """Log-likelihood, and whether every token is the likeliest, of each option, in memory and without padding."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    found: list[list[tuple[float, bool]]] = []
    for question in task.questions:
        found.append([])
        for context, option in zip(question.contexts, question.options, strict=True):
            ids = torch.tensor([tokenizer(f"{context} {option}")["input_ids"]])
            start = len(tokenizer(context)["input_ids"])
            with torch.no_grad():
                likely = torch.log_softmax(model(input_ids=ids).logits[0].double(), -1)[start - 1 : -1]
            targets = ids[0, start:]
            total = float(likely.gather(1, targets[:, None]).sum())
            found[-1].append((total, bool((likely.argmax(-1) == targets).all())))
    return found


def test_choices_are_those_of_each_option_alone(tiny_llama_dir: Path, choices: Task, tmp_path: Path) -> None:
    found, expected = score(tiny_llama_dir, choices, tmp_path), alone(tiny_llama_dir, choices)
    right, right_normalised = [], []
    for question, answer, options in zip(choices.questions, found.per_question, expected, strict=True):
        sums = [total for total, _ in options]
        assert answer.log_likelihoods == pytest.approx(sums, rel=ROUNDING)
        assert answer.given == (sums.index(max(sums)),)
        each = [total / len(option) for total, option in zip(sums, question.options, strict=True)]
        assert answer.given_normalised == (each.index(max(each)),)
        right.append(float(answer.given == (question.answer,)))
        right_normalised.append(float(answer.given_normalised == (question.answer,)))
    assert found.accuracy == statistics.fmean(right)
    assert found.accuracy_normalised == statistics.fmean(right_normalised)
    assert found.stderr == pytest.approx(statistics.stdev(right) / math.sqrt(NUM_QUESTIONS), rel=1e-12)
    assert found.chance == pytest.approx(1 / 3, rel=1e-12)
    assert (found.word_perplexity, found.num_truncated) == (None, 0)
    assert list(tmp_path.iterdir()) == [], "hidden states are not left behind"


def test_last_words_are_those_of_each_alone(tiny_llama_dir: Path, last_words: Task, tmp_path: Path) -> None:
    found, expected = score(tiny_llama_dir, last_words, tmp_path), alone(tiny_llama_dir, last_words)
    losses = [-options[0][0] for options in expected]
    assert [answer.correct for answer in found.per_question] == [options[0][1] for options in expected]
    assert [-answer.log_likelihoods[0] for answer in found.per_question] == pytest.approx(losses, rel=ROUNDING)
    assert found.word_perplexity == pytest.approx(math.exp(statistics.fmean(losses)), rel=ROUNDING * max(losses))
    assert (found.accuracy_normalised, found.chance) == (None, None)


def test_a_word_that_the_model_would_write_is_predicted(
    tiny_llama_dir: Path, last_words: Task, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """The given tokens of one question, as its right ones, make it correct; others make it wrong again."""
    model, questions = stream(tiny_llama_dir), encode_task(tiny_tokenizer, last_words, max_length=CONTEXT)
    first = questions[0].options[0]
    short = EncodedOption(
        inputs=first.inputs[: len(first.inputs) + 1 - len(first.targets)],
        targets=first.targets[:1],
        num_characters=1,
        is_truncated=False,
    )

    def given(targets: tuple[int, ...]) -> Answer:
        option = EncodedOption(inputs=short.inputs, targets=targets, num_characters=1, is_truncated=False)
        return task_score(model, [EncodedQuestion(options=(option,), answer=0)], tmp_path, no_progress).per_question[0]

    likeliest = given(short.targets).given
    assert given(likeliest).correct
    assert not given(((likeliest[0] + 1) % 320,)).correct


@pytest.mark.parametrize("tokens_per_batch", [1, 100, 10_000])
def test_the_size_of_a_batch_only_rounds(
    tokens_per_batch: int, tiny_llama_dir: Path, choices: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = score(tiny_llama_dir, choices, tmp_path)
    monkeypatch.setattr(activations, "TOKENS_PER_BATCH", tokens_per_batch)
    found = score(tiny_llama_dir, choices, tmp_path)
    for ours, theirs in zip(found.per_question, expected.per_question, strict=True):
        assert ours.log_likelihoods == pytest.approx(theirs.log_likelihoods, rel=ROUNDING)


def test_batches_hold_every_sequence_once_in_few_shapes() -> None:
    lengths = range(1, 300)
    sequences = [[7] * length for length in lengths]
    batches = plan_batches(sequences, alone=False)
    assert sorted(row for batch in batches for row in batch.rows) == list(range(len(sequences)))
    for batch in batches:
        for place, row in enumerate(batch.rows):
            length, width = len(sequences[row]), batch.ids.shape[1]
            assert batch.ids[place].tolist() == sequences[row] + [0] * (width - length)
            assert width - length < max(8, length / 4)
    assert [batch.offset for batch in batches[1:]] == [b.offset + b.ids.numel() for b in batches[:-1]]
    by_itself = plan_batches(sequences, alone=True)
    assert [batch.ids.shape for batch in by_itself] == [(1, length) for length in lengths]


@pytest.mark.parametrize("scheme", ["W4A16-g32", "W8A8-channel-acttensor"])
def test_a_packed_model_answers_as_transformers_reads_it(
    scheme: str, tiny_llama_dir: Path, tiny_text: str, choices: Task, tmp_path: Path
) -> None:
    """A scale per tensor of inputs depends on all tokens of a call: padding or neighbours would change the answers."""
    run, text = tmp_path / "run", tmp_path / "text.txt"
    text.write_text(tiny_text)
    recipe = Recipe(
        scheme=Scheme.parse(scheme),
        method="rtn",
        calibration=Calibration(text=str(text), num_samples=2, seqlen=32),
        max_kl=1e6,
        layout="bitwright",
    )
    quantize(tiny_llama_dir, recipe, run)
    found, expected = score(run / "4-model", choices, tmp_path), alone(run / "4-model", choices)
    for answer, options in zip(found.per_question, expected, strict=True):
        assert answer.log_likelihoods == pytest.approx([total for total, _ in options], rel=ROUNDING)


def test_a_context_too_long_loses_its_beginning(
    tiny_llama_dir: Path, choices: Task, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    whole = encode_task(tiny_tokenizer, choices, max_length=CONTEXT)
    lengths = sorted(max(len(option.inputs) for option in question.options) for question in whole)
    limit = lengths[NUM_QUESTIONS // 2]
    cut = encode_task(tiny_tokenizer, choices, max_length=limit)
    for before, after in zip(whole, cut, strict=True):
        for long, short in zip(before.options, after.options, strict=True):
            assert short.inputs == long.inputs[-limit:]
            assert short.targets == long.targets
    found = score(tiny_llama_dir, choices, tmp_path, max_length=limit)
    assert found.num_truncated == sum(length > limit for length in lengths) > 0
    with pytest.raises(DataError, match="positions"):
        encode_task(tiny_tokenizer, choices, max_length=1)


def test_foreign_tokens_and_no_questions(tiny_llama_dir: Path, tmp_path: Path) -> None:
    option = EncodedOption(inputs=(1, 2), targets=(320,), num_characters=1, is_truncated=False)
    with pytest.raises(CheckpointError, match="token 320, the model knows 320"):
        task_score(stream(tiny_llama_dir), [EncodedQuestion(options=(option,), answer=0)], tmp_path, no_progress)
    with pytest.raises(DataError, match="no question"):
        task_score(stream(tiny_llama_dir), [], tmp_path, no_progress)


def test_a_collapsed_model_answers_nothing(
    tiny_llama_dir: Path, choices: Task, last_words: Task, tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_dir)
    with torch.no_grad():
        model.lm_head.weight.fill_(math.nan)
    folder = tmp_path / "collapsed"
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_llama_dir).save_pretrained(folder)
    found = score(folder, choices, tmp_path)
    assert (found.accuracy, found.accuracy_normalised) == (0, 0)
    assert {answer.given for answer in found.per_question} == {()}
    words = score(folder, last_words, tmp_path)
    assert (words.accuracy, words.word_perplexity) == (0, math.inf)


def answer(given: int, right: int) -> Answer:
    return Answer(
        log_likelihoods=(0.0,) * 3,
        given=(given,),
        correct=given == right,
        given_normalised=(right,),
        correct_normalised=True,
    )


def test_flips_are_counted_by_kind() -> None:
    ours, theirs = [0, 1, 2, 1, 0, 2], [0, 0, 1, 2, 1, 2]
    found = compare_answers([answer(g, 0) for g in ours], [answer(g, 0) for g in theirs])
    assert (found.num_questions, found.num_changed, found.num_lost, found.num_gained) == (6, 4, 1, 1)
    assert (found.difference, found.mcnemar_p) == (0, 1)
    normalised = compare_answers([answer(g, 0) for g in ours], [answer(g, 0) for g in theirs], normalised=True)
    assert (normalised.num_changed, normalised.num_lost, normalised.num_gained) == (0, 0, 0)


@pytest.mark.parametrize(("lost", "gained", "same"), [(0, 0, 4), (9, 1, 30), (3, 3, 0), (40, 70, 900), (0, 1500, 10)])
def test_the_paired_test_is_scipys_and_the_paired_error_that_of_the_differences(
    lost: int, gained: int, same: int
) -> None:
    right = [(False, True)] * lost + [(True, False)] * gained + [(True, True)] * same
    found = compare_right(right)
    differences = [float(ours) - float(theirs) for ours, theirs in right]
    assert found.difference == pytest.approx((gained - lost) / len(right), rel=1e-12)
    assert found.stderr == pytest.approx(statistics.stdev(differences) / math.sqrt(len(right)), rel=1e-9)
    expected = 1.0 if lost + gained == 0 else binomtest(lost, lost + gained).pvalue
    assert found.mcnemar_p == pytest.approx(expected, rel=1e-9)
    assert found.num_changed is None


def test_one_question_says_nothing_of_the_spread() -> None:
    assert compare_right([(True, False)]).stderr is None
