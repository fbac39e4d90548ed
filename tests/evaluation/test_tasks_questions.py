"""Questions in the layouts of common data sets, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from bitwright.errors import DataError
from bitwright.evaluation.question_layouts import LAYOUTS, Question
from bitwright.evaluation.questions import read_task


def chosen(context: str, options: tuple[str, ...], answer: int) -> Question:
    return Question(contexts=(context,) * len(options), options=options, answer=answer)


def write(file: Path, *entries: object) -> Path:
    file.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return file


PAIRS = [{"text": "red", "label": "A"}, {"text": "blue", "label": "B"}]
COLUMNS = {"text": ["red", "blue"], "label": ["A", "B"]}
SKY = chosen("Sky:", ("red", "blue"), 1)
ASKED = chosen("Question: Sky?\nAnswer:", ("red", "blue"), 1)
KNOWN: list[tuple[str, dict[str, Any], Question]] = [
    (
        "HellaSwag",
        {
            "activity_label": "Baking [title]",
            "ctx_a": "A man stirs.",
            "ctx_b": "he",
            "ctx": "A man stirs. he",
            "endings": ["eats [substeps] it.", "sleeps."],
            "label": "1",
        },
        chosen("Baking. : A man stirs. He", ("eats it.", "sleeps."), 1),
    ),
    ("ARC", {"question": "Sky?", "choices": COLUMNS, "answerKey": "B"}, ASKED),
    (
        "ARC",
        {"question": {"stem": "Sky?", "choices": PAIRS}, "answerKey": "B"},
        ASKED,
    ),
    (
        "ARC",
        {"question": "Sky?", "choices": {"text": ["red", "blue"], "label": ["1", "2"]}, "answerKey": "2"},
        ASKED,
    ),
    ("OpenBookQA", {"question_stem": "Sky:", "choices": COLUMNS, "answerKey": "B"}, SKY),
    (
        "PIQA",
        {"goal": "Cut.", "sol1": "knife", "sol2": "spoon", "label": 0},
        chosen("Question: Cut.\nAnswer:", ("knife", "spoon"), 0),
    ),
    (
        "WinoGrande",
        {"sentence": "Ann saw Eve, so _ waved.", "option1": "Ann", "option2": "Eve", "answer": "2"},
        Question(contexts=("Ann saw Eve, so Ann", "Ann saw Eve, so Eve"), options=("waved.",) * 2, answer=1),
    ),
    (
        "Social IQa",
        {"context": "Al fell.", "question": "Why?", "answerA": "ice", "answerB": "joy", "answerC": "tea", "label": "1"},
        chosen("Q: Al fell. Why?\nA:", ("ice", "joy", "tea"), 0),
    ),
    (
        "COPA",
        {"premise": "It rained.", "question": "effect", "choice1": "It dried.", "choice2": "We got wet.", "label": 1},
        chosen("It rained therefore", ("it dried.", "we got wet."), 1),
    ),
    (
        "BoolQ",
        {"passage": "Ice is cold.", "question": "is ice cold", "answer": True},
        chosen("Ice is cold.\nQuestion: is ice cold?\nAnswer:", ("no", "yes"), 1),
    ),
    (
        "SciQ",
        {
            "support": " Ice.",
            "question": "What?",
            "distractor1": "a",
            "distractor2": "b",
            "distractor3": "c",
            "correct_answer": "d",
        },
        chosen("Ice.\nQuestion: What?\nAnswer:", ("a", "b", "c", "d"), 3),
    ),
    (
        "contexts to choose from",
        {"context_options": ["Ann", "Eve"], "continuation": "waved.", "gold": 1},
        Question(contexts=("Ann", "Eve"), options=("waved.",) * 2, answer=1),
    ),
    ("multiple choice", {"query": "Sky:", "choices": ["red", "blue"], "gold": 1}, SKY),
    ("multiple choice", {"question": "Sky:", "options": ["red", "blue"], "answer": "B"}, SKY),
    ("multiple choice", {"ctx": "Sky:", "endings": ["red", "blue"], "label": "blue"}, SKY),
    ("last word", {"context": "The sky is", "continuation": " blue"}, chosen("The sky is", ("blue",), 0)),
    ("LAMBADA", {"text": "The sky is blue\n"}, chosen("The sky is", ("blue",), 0)),
]  # fmt: skip


@pytest.mark.parametrize(("layout", "entry", "expected"), KNOWN)
def test_common_layouts_are_recognised(layout: str, entry: dict[str, Any], expected: Question, tmp_path: Path) -> None:
    task = read_task(write(tmp_path / "q.jsonl", entry, entry))
    assert task.layout == layout
    assert task.questions == (expected, expected)


def test_every_layout_has_an_example_above() -> None:
    assert {layout.name for layout in LAYOUTS} == {layout for layout, _, _ in KNOWN}


GOOD = {"query": "Sky:", "choices": ["red", "blue"], "gold": 1}


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        (
            {"sentence": "x", "target": "y"},
            ("the fields sentence, target are of no known layout", "PIQA (goal, sol1, sol2, label)"),
        ),
        ({**GOOD, "gold": 2}, ("names no option of 2", "0 … 1")),
        ({**GOOD, "gold": ""}, ("names no option", "splits without answers")),
        ({**GOOD, "gold": -1}, ("names no option",)),
        ({**GOOD, "gold": None}, ("None",)),
        ({**GOOD, "choices": ["1", "0"], "gold": "0"}, ("more than one option",)),
        ({**GOOD, "choices": ["red", 2]}, ("'choices'", "not a list of texts")),
        ({**GOOD, "choices": ["red", " "]}, ("an option is empty",)),
        ({**GOOD, "choices": ["red"], "gold": 0}, ("only one option",)),
        ({**GOOD, "query": " "}, ("nothing stands before",)),
        ({**GOOD, "query": 3}, ("'query' is 3, not text",)),
        ({**GOOD, "context": "Also"}, ("2 of the fields", "Keep one")),
        ({"context": "one", "continuation": "two"}, ("has the fields context, continuation", "multiple choice")),
    ],
)
def test_what_is_wrong_is_said_with_its_line(entry: object, says: tuple[str, ...], tmp_path: Path) -> None:
    lines = (GOOD, entry) if isinstance(entry, dict) and "target" not in entry else (entry,)
    file = write(tmp_path / "q.jsonl", *lines)
    with pytest.raises(DataError) as error:
        read_task(file)
    assert str(error.value).startswith(f"{file}:{len(lines)}")
    for words in says:
        assert words in str(error.value)


def test_files_that_hold_no_questions(tmp_path: Path) -> None:
    file = tmp_path / "q.jsonl"
    with pytest.raises(DataError, match="no such file"):
        read_task(file)
    file.write_text("\n")
    with pytest.raises(DataError, match="holds no question"):
        read_task(file)
    file.write_text("[1]\n")
    with pytest.raises(DataError, match=":1: not a JSON object"):
        read_task(file)
    file.write_text('{"text": \n')
    with pytest.raises(DataError, match=":1: not JSON"):
        read_task(file)


def test_a_limit_takes_the_first_and_reads_no_further(tmp_path: Path) -> None:
    file = write(tmp_path / "q.jsonl", GOOD, {**GOOD, "gold": 0}, {"text": "another layout"})
    assert [question.answer for question in read_task(file, limit=2).questions] == [1, 0]
    assert read_task(file, limit=1).data_hash != read_task(file, limit=2).data_hash
