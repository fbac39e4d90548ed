"""How common data sets write a question: a table of layouts, each told by its fields.

A layout's prompt is the one that lm-evaluation-harness gives the same data set, without examples before it. The first
layout of the table whose fields are all there is the file's.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from bitwright.errors import DataError

CONTEXT_FIELDS = ("question", "query", "context", "ctx", "prompt", "stem")
OPTION_FIELDS = ("choices", "options", "endings")
ANSWER_FIELDS = ("answer", "gold", "label", "answer_index", "answerKey")
YES_OR_NO = ("no", "yes")
ARC_PROMPT = "Question: {}\nAnswer:"
CONNECTORS = {"cause": "because", "effect": "therefore"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """One item of a task.

    Attributes:
        contexts: what precedes each option.
        options: the continuations to choose from; a single one is a last word, which is to be predicted.
        answer: position of the right option.
    """

    contexts: tuple[str, ...]
    options: tuple[str, ...]
    answer: int

    @property
    def is_last_word(self) -> bool:
        """Whether the one option is to be predicted, rather than one of several to be chosen."""
        return len(self.options) == 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Item:
    """One line of a file; its getters raise DataError with the line's place."""

    where: str
    fields: Mapping[str, Any]

    def text(self, name: str) -> str:
        """The text in a field."""
        value = self.fields.get(name)
        if not isinstance(value, str):
            raise DataError(f"{self.where}: field '{name}' is {_shown(value)}, not text. Give text.")
        return value

    def texts(self, name: str) -> tuple[str, ...]:
        """The list of texts in a field."""
        value = self.fields.get(name)
        if not isinstance(value, list) or not all(isinstance(each, str) for each in cast(list[object], value)):
            raise DataError(f"{self.where}: field '{name}' is {_shown(value)}, not a list of texts. Give one.")
        return tuple(cast(list[str], value))

    def one_of(self, names: Sequence[str]) -> str:
        """The one name of several that is a field here."""
        found = [name for name in names if name in self.fields]
        if len(found) != 1:
            raise DataError(f"{self.where}: {len(found)} of the fields {', '.join(names)} are there. Keep one of them.")
        return found[0]

    def position(
        self, name: str, options: Sequence[str], *, labels: Sequence[str] | None = None, first: int = 0
    ) -> int:
        """Which option a field names: by its label where there are labels, else by number, letter or its own text."""
        value = self.fields[name]
        found: set[int] = set()
        if isinstance(value, int):
            found.add(value - first)
        elif isinstance(value, str):
            word = value.strip()
            found.update(index for index, each in enumerate(labels or options) if each == word)
            if labels is None and word.isdecimal():
                found.add(int(word) - first)
            elif labels is None and re.fullmatch("[A-Z]", word):
                found.add(ord(word) - ord("A"))
        inside = [index for index in found if 0 <= index < len(options)]
        if len(inside) != 1:
            numbers = f"{first} … {first + len(options) - 1}, a letter, or the option's text"
            known = ", ".join(labels) if labels else numbers
            raise DataError(
                f"{self.where}: field '{name}' is {_shown(value)}, which names {'more than one' if inside else 'no'} "
                f"option of {len(options)}. Give {known}; splits without answers cannot be scored."
            )
        return inside[0]


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """A way to write questions: `fields` must be there, of alternatives (separated by |) at least one."""

    name: str
    fields: tuple[str, ...]
    read: Callable[[Item], Question]

    def fits(self, entry: Mapping[str, Any]) -> bool:
        """Whether an entry has all fields."""
        return all(any(name in entry for name in field.split("|")) for field in self.fields)


def _choose(context: str, options: Sequence[str], answer: int) -> Question:
    return Question(contexts=(context,) * len(options), options=tuple(options), answer=answer)


def _hellaswag(item: Item) -> Question:
    context = f"{item.text('activity_label')}: {item.text('ctx_a')} {item.text('ctx_b').capitalize()}"
    endings = item.texts("endings")
    return _choose(_without_brackets(context), [_without_brackets(e) for e in endings], item.position("label", endings))


def _without_brackets(text: str) -> str:
    """HellaSwag's marks of WikiHow headings are not text."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def _labelled(item: Item, stem: str, choices: object, prompt: str) -> Question:
    """Options with labels of their own: two lists as on the hub, or a list of pairs as in the original files."""
    columns: dict[str, Any] = {"text": choices, "label": None}
    if isinstance(choices, dict):
        columns = cast(dict[str, Any], choices)
    elif isinstance(choices, list) and all(isinstance(each, dict) for each in cast(list[object], choices)):
        pairs = cast(list[dict[str, Any]], choices)
        columns = {name: [pair.get(name) for pair in pairs] for name in ("text", "label")}
    inner = Item(where=f"{item.where}: choices", fields=columns)
    options = inner.texts("text")
    labels = None if columns.get("label") is None else inner.texts("label")
    return _choose(prompt.format(stem), options, item.position("answerKey", options, labels=labels))


def _arc(item: Item) -> Question:
    question = item.fields["question"]
    if not isinstance(question, dict):
        return _labelled(item, item.text("question"), item.fields.get("choices"), ARC_PROMPT)
    inner = Item(where=f"{item.where}: question", fields=cast(dict[str, Any], question))
    return _labelled(item, inner.text("stem"), inner.fields.get("choices"), ARC_PROMPT)


def _openbookqa(item: Item) -> Question:
    return _labelled(item, item.text("question_stem"), item.fields["choices"], "{}")


def _piqa(item: Item) -> Question:
    options = (item.text("sol1"), item.text("sol2"))
    return _choose(f"Question: {item.text('goal')}\nAnswer:", options, item.position("label", options))


def _winogrande(item: Item) -> Question:
    before, blank, after = item.text("sentence").partition("_")
    if not blank:
        raise DataError(f"{item.where}: field 'sentence' has no '_' where the options go. Give one.")
    words = (item.text("option1"), item.text("option2"))
    return Question(
        contexts=tuple(before + word for word in words),
        options=(after.strip(),) * 2,
        answer=item.position("answer", words, first=1),
    )


def _social_iqa(item: Item) -> Question:
    options = tuple(item.text(f"answer{letter}") for letter in "ABC")
    return _choose(
        f"Q: {item.text('context')} {item.text('question')}\nA:", options, item.position("label", options, first=1)
    )


def _copa(item: Item) -> Question:
    asked = item.text("question")
    if asked not in CONNECTORS:
        raise DataError(f"{item.where}: field 'question' is {_shown(asked)}. Give {' or '.join(CONNECTORS)}.")
    options = tuple(text[:1].lower() + text[1:] for text in (item.text("choice1"), item.text("choice2")))
    return _choose(f"{item.text('premise').strip()[:-1]} {CONNECTORS[asked]}", options, item.position("label", options))


def _boolq(item: Item) -> Question:
    context = f"{item.text('passage')}\nQuestion: {item.text('question')}?\nAnswer:"
    return _choose(context, YES_OR_NO, item.position(item.one_of(("label", "answer")), YES_OR_NO))


def _sciq(item: Item) -> Question:
    options = tuple(item.text(name) for name in ("distractor1", "distractor2", "distractor3", "correct_answer"))
    return _choose(f"{item.text('support').lstrip()}\nQuestion: {item.text('question')}\nAnswer:", options, 3)


def _context_options(item: Item) -> Question:
    contexts = item.texts("context_options")
    return Question(
        contexts=contexts,
        options=(item.text("continuation"),) * len(contexts),
        answer=item.position(item.one_of(ANSWER_FIELDS), contexts),
    )


def _choices(item: Item) -> Question:
    options = item.texts(item.one_of(OPTION_FIELDS))
    return _choose(item.text(item.one_of(CONTEXT_FIELDS)), options, item.position(item.one_of(ANSWER_FIELDS), options))


def _continuation(item: Item) -> Question:
    return Question(contexts=(item.text("context"),), options=(item.text("continuation").strip(),), answer=0)


def _lambada(item: Item) -> Question:
    context, _, word = item.text("text").rstrip().rpartition(" ")
    return Question(contexts=(context,), options=(word,), answer=0)


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}…"


LAYOUTS = (
    Layout(name="HellaSwag", fields=("activity_label", "ctx_a", "ctx_b", "endings", "label"), read=_hellaswag),
    Layout(name="ARC", fields=("question", "answerKey"), read=_arc),
    Layout(name="OpenBookQA", fields=("question_stem", "choices", "answerKey"), read=_openbookqa),
    Layout(name="PIQA", fields=("goal", "sol1", "sol2", "label"), read=_piqa),
    Layout(name="WinoGrande", fields=("sentence", "option1", "option2", "answer"), read=_winogrande),
    Layout(
        name="Social IQa",
        fields=("context", "question", "answerA", "answerB", "answerC", "label"),
        read=_social_iqa,
    ),
    Layout(name="COPA", fields=("premise", "question", "choice1", "choice2", "label"), read=_copa),
    Layout(name="BoolQ", fields=("passage", "question", "label|answer"), read=_boolq),
    Layout(
        name="SciQ",
        fields=("support", "question", "distractor1", "distractor2", "distractor3", "correct_answer"),
        read=_sciq,
    ),
    Layout(
        name="contexts to choose from",
        fields=("context_options", "continuation", "|".join(ANSWER_FIELDS)),
        read=_context_options,
    ),
    Layout(
        name="multiple choice",
        fields=tuple("|".join(names) for names in (CONTEXT_FIELDS, OPTION_FIELDS, ANSWER_FIELDS)),
        read=_choices,
    ),
    Layout(name="last word", fields=("context", "continuation"), read=_continuation),
    Layout(name="LAMBADA", fields=("text",), read=_lambada),
)
"""From what has the most fields of its own to what has the fewest."""
