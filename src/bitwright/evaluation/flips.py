"""Two models on the same questions: what the accuracy hides.

A quantized model can keep the accuracy of its original and still answer many questions otherwise, as many wrong ones
right as right ones wrong. Both models see the same questions, so the difference has a smaller standard error than two
independent accuracies, and whether it may be chance depends only on the questions that they disagree about.

Reference: McNemar, Psychometrika 12 (1947), here with exact binomial probabilities; flips: arXiv:2407.09141.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from bitwright.evaluation.score import mean_and_stderr
from bitwright.evaluation.tasks import Answer


@dataclass(frozen=True, kw_only=True, slots=True)
class Flips:
    """How the answers of a model differ from a reference's.

    Attributes:
        num_questions: that both answered.
        num_changed: answers that differ, right or wrong; None where only right and wrong are known.
        num_lost: right in the reference, wrong in the model.
        num_gained: the reverse.
        difference: accuracy minus the reference's.
        stderr: of the difference, by pairs; None for a single question.
        mcnemar_p: probability that questions which flip by tossing a coin split at least as unevenly.
    """

    num_questions: int
    num_changed: int | None
    num_lost: int
    num_gained: int
    difference: float
    stderr: float | None
    mcnemar_p: float


def compare_answers(answers: Sequence[Answer], reference: Sequence[Answer], *, normalised: bool = False) -> Flips:
    """Compare the answers of a model with a reference's to the same questions.

    Args:
        answers: the model's.
        reference: the reference's, in the same order.
        normalised: compare the answers by log-likelihood per character.
    """
    pairs = list(zip(answers, reference, strict=True))
    if normalised:
        changed = sum(ours.given_normalised != theirs.given_normalised for ours, theirs in pairs)
        right = [(ours.correct_normalised, theirs.correct_normalised) for ours, theirs in pairs]
    else:
        changed = sum(ours.given != theirs.given for ours, theirs in pairs)
        right = [(ours.correct, theirs.correct) for ours, theirs in pairs]
    return compare_right(right, num_changed=changed)


def compare_right(right: Sequence[tuple[bool, bool]], *, num_changed: int | None = None) -> Flips:
    """Compare by what is known of each question: whether (the model, the reference) is right."""
    lost = sum(theirs and not ours for ours, theirs in right)
    gained = sum(ours and not theirs for ours, theirs in right)
    difference, stderr = mean_and_stderr([float(ours) - float(theirs) for ours, theirs in right])
    return Flips(
        num_questions=len(right),
        num_changed=num_changed,
        num_lost=lost,
        num_gained=gained,
        difference=difference,
        stderr=stderr,
        mcnemar_p=_mcnemar(lost, gained),
    )


def _mcnemar(lost: int, gained: int) -> float:
    """Two-sided probability that a fair coin, tossed lost + gained times, falls at least as unevenly."""
    tosses, fewer = lost + gained, min(lost, gained)
    tail = sum(math.comb(tosses, count) for count in range(fewer + 1))
    return min(1.0, 2 * tail / 2**tosses)
