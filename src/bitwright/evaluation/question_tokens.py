"""From questions to tokens, by the rule of lm-evaluation-harness.

Context and option are joined by a space, unless the context ends in white space, and tokenised as one text; the
option's tokens are those after the context's own. What does not fit the model's positions is cut off at the front.
"""

from dataclasses import dataclass

from bitwright.data.windows import Tokenizer, tokenise
from bitwright.errors import DataError
from bitwright.evaluation.questions import Task


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodedOption:
    """One option of a question.

    Attributes:
        inputs: what the model sees: all tokens but the last.
        targets: the option's tokens; the last `len(targets)` positions of the inputs predict them.
        num_characters: of the option, by which its log-likelihood is normalised.
        is_truncated: whether the context lost its beginning.
    """

    inputs: tuple[int, ...]
    targets: tuple[int, ...]
    num_characters: int
    is_truncated: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodedQuestion:
    """The options of a question as tokens, and which is right; a single option is a last word to be predicted."""

    options: tuple[EncodedOption, ...]
    answer: int


def encode_task(tokenizer: Tokenizer, task: Task, *, max_length: int) -> list[EncodedQuestion]:
    """Tokenise every question of a task.

    Args:
        tokenizer: the model's.
        task: what to tokenise.
        max_length: the most tokens that the model may see.
    Raises:
        DataError: an option has no token of its own, or alone fills the model's positions.
    """
    questions: list[EncodedQuestion] = []
    for number, question in enumerate(task.questions, start=1):
        where = f"{task.source}: question {number}"
        known: dict[str, int] = {}
        options: list[EncodedOption] = []
        for context, option in zip(question.contexts, question.options, strict=True):
            if context not in known:
                known[context] = len(tokenise(tokenizer, [context.rstrip()]))
            options.append(_encode(tokenizer, context, option, known[context], max_length, where))
        questions.append(EncodedQuestion(options=tuple(options), answer=question.answer))
    return questions


def _encode(
    tokenizer: Tokenizer, context: str, option: str, num_context: int, max_length: int, where: str
) -> EncodedOption:
    joined = context + option if context[-1].isspace() else f"{context} {option}"
    whole: list[int] = tokenise(tokenizer, [joined]).tolist()
    targets = whole[num_context:]
    if not targets:
        raise DataError(f"{where}: the option {option!r} has no token of its own after its context. Change either.")
    if len(targets) > max_length:
        raise DataError(
            f"{where}: an option has {len(targets)} tokens, the model has {max_length} positions. Shorten the option."
        )
    return EncodedOption(
        inputs=tuple(whole[:-1][-max_length:]),
        targets=tuple(targets),
        num_characters=len(option),
        is_truncated=len(whole) - 1 > max_length,
    )
