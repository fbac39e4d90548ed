from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaForCausalLM

from bitwright.errors import CheckpointError, DataError, RecipeError, ShapeError
from bitwright.train.distillation import (
    SHARD_WINDOWS,
    TeacherTargets,
    distillation_loss,
    feature_loss,
    kl_loss,
    teacher_targets,
    with_labels,
)

VOCABULARY = 320
TEMPERATURES = (1.0, 2.5)


@pytest.fixture(scope="module")
def teacher(tiny_llama_dir: Path) -> nn.Module:
    model = LlamaForCausalLM.from_pretrained(tiny_llama_dir).eval()
    # A random model says nearly the same of every token.
    with torch.no_grad():
        model.lm_head.weight.mul_(40)
    return model


def windows(count: int = 2) -> Tensor:
    return torch.randint(0, VOCABULARY, (count, 6), generator=torch.Generator().manual_seed(0))


def logits_of(teacher: nn.Module, window: Tensor) -> Tensor:
    with torch.no_grad():
        return teacher(input_ids=window.unsqueeze(0)).logits[0]


def made(teacher: nn.Module, folder: Path, top_k: int) -> TeacherTargets:
    return teacher_targets(teacher, windows(), folder, top_k, temperatures=TEMPERATURES)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_with_the_whole_vocabulary_the_cache_gives_the_full_loss(
    temperature: float, teacher: nn.Module, tmp_path: Path
) -> None:
    indices, log_probs = made(teacher, tmp_path, VOCABULARY).read(1, temperature)
    student = torch.randn(6, VOCABULARY)
    full = kl_loss(student, logits_of(teacher, windows()[1]), temperature)
    cached = distillation_loss(student, indices, log_probs, temperature)
    torch.testing.assert_close(cached, full, rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_the_tail_is_one_bucket_with_its_exact_probability(
    temperature: float, teacher: nn.Module, tmp_path: Path
) -> None:
    targets = made(teacher, tmp_path, 5)
    indices, log_probs = targets.read(0, temperature)
    truth = (logits_of(teacher, windows()[0]) / temperature).softmax(-1)
    top = truth.gather(-1, indices)
    torch.testing.assert_close(log_probs[:, :5].exp(), top, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(log_probs[:, 5].exp(), 1 - top.sum(-1), rtol=1e-4, atol=1e-6)

    student = torch.randn(6, VOCABULARY)
    guess = (student / temperature).softmax(-1)
    rest = torch.ones_like(guess).scatter(-1, indices, 0.0)
    buckets = torch.cat([guess.gather(-1, indices), (guess * rest).sum(-1, keepdim=True)], -1)
    expected = (log_probs.exp() * (log_probs - buckets.log())).sum(-1).mean() * temperature**2
    found = distillation_loss(student, indices, log_probs, temperature)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert found <= kl_loss(student, logits_of(teacher, windows()[0]), temperature)


@pytest.mark.parametrize("top_k", [5, VOCABULARY])
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_a_student_equal_to_its_teacher_has_no_loss_and_no_gradient(
    top_k: int, temperature: float, teacher: nn.Module, tmp_path: Path
) -> None:
    indices, log_probs = made(teacher, tmp_path, top_k).read(0, temperature)
    truth = logits_of(teacher, windows()[0])
    for loss in (
        lambda student: distillation_loss(student, indices, log_probs, temperature),
        lambda student: kl_loss(student, truth, temperature),
    ):
        student = truth.clone().requires_grad_()
        value = loss(student)
        value.backward()
        assert student.grad is not None
        # Probabilities of float32 logits of this size are known to about 1e-6 of themselves.
        assert abs(value.item()) < 1e-5 * temperature**2
        assert float(student.grad.abs().max()) < 1e-5 * temperature


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_gradients_agree_with_finite_differences(temperature: float) -> None:
    student = torch.randn(2, 3, 12, dtype=torch.float64, requires_grad=True)
    truth = torch.randn(2, 3, 12, dtype=torch.float64)
    log_probs, indices = (truth / temperature).log_softmax(-1).topk(4)
    tail = torch.log1p(-log_probs.exp().sum(-1, keepdim=True))
    targets = torch.cat([log_probs, tail], -1)
    mask = torch.tensor([[1, 0, 1], [1, 1, 0]])
    assert torch.autograd.gradcheck(lambda x: distillation_loss(x, indices, targets, temperature, mask=mask), student)
    assert torch.autograd.gradcheck(lambda x: kl_loss(x, truth, temperature, mask=mask), student)
    assert torch.autograd.gradcheck(lambda x: feature_loss([x, 2 * x], [truth, truth]), student)


def test_the_full_loss_is_that_of_torch_and_masks_leave_positions_out() -> None:
    student, truth = torch.randn(2, 3, 12), torch.randn(2, 3, 12)
    expected = functional.kl_div(student.log_softmax(-1), truth.log_softmax(-1), log_target=True, reduction="none").sum(
        -1
    )
    torch.testing.assert_close(kl_loss(student, truth), expected.mean())
    mask = torch.tensor([[1, 0, 1], [0, 0, 0]])
    torch.testing.assert_close(kl_loss(student, truth, mask=mask), expected[0, [0, 2]].mean())


def test_a_share_of_the_loss_is_the_text() -> None:
    logits, ids = torch.randn(2, 5, VOCABULARY), windows()
    followed = torch.tensor(3.0)
    text = functional.cross_entropy(logits.reshape(-1, VOCABULARY), ids[:, 1:].reshape(-1))
    torch.testing.assert_close(with_labels(followed, logits, ids, 0.25), 0.75 * followed + 0.25 * text)
    assert with_labels(followed, logits, ids, 0.0) is followed


def test_feature_loss_counts_every_depth_alike() -> None:
    truth = [torch.randn(2, 5, 8), torch.randn(2, 5, 8) * 100]
    assert feature_loss(truth, truth) == 0
    torch.testing.assert_close(feature_loss([torch.zeros(2, 5, 8)] * 2, truth), torch.tensor(1.0))
    with pytest.raises(ShapeError, match="must be alike"):
        feature_loss(truth, truth[:1])


def test_a_killed_run_goes_on_where_it_stopped(teacher: nn.Module, tmp_path: Path) -> None:
    text = windows(SHARD_WINDOWS + 1)
    whole = teacher_targets(teacher, text, tmp_path / "whole", 3)
    cut = tmp_path / "cut"

    def stop(_what: str, done: int, _total: int) -> None:
        if done == SHARD_WINDOWS + 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        teacher_targets(teacher, text, cut, 3, stop)
    seen: list[int] = []
    again = teacher_targets(teacher, text, cut, 3, lambda _what, done, _total: seen.append(done))

    assert seen == [SHARD_WINDOWS, SHARD_WINDOWS + 1]
    for window in (0, SHARD_WINDOWS):
        for ours, theirs in zip(again.read(window), whole.read(window), strict=True):
            assert torch.equal(ours, theirs)


def test_wrong_targets_are_refused(teacher: nn.Module, tmp_path: Path) -> None:
    targets = made(teacher, tmp_path, 5)
    with pytest.raises(RecipeError, match=r"only for 1.0, 2.5"):
        targets.read(0, 3.0)
    with pytest.raises(DataError, match="does not exist"):
        targets.read(2)
    with pytest.raises(DataError, match="other temperatures, top_k"):
        teacher_targets(teacher, windows(), tmp_path, 6)
    with pytest.raises(DataError, match="other num_windows, windows"):
        teacher_targets(teacher, windows(3), tmp_path, 5, temperatures=TEMPERATURES)
    with pytest.raises(RecipeError, match="exceeds the vocabulary"):
        teacher_targets(teacher, windows(), tmp_path / "new", VOCABULARY + 1)
    with pytest.raises(RecipeError, match="positive"):
        teacher_targets(teacher, windows(), tmp_path / "new", 0)
    with pytest.raises(ShapeError, match="do not fit"):
        distillation_loss(torch.randn(2, 8), torch.zeros(2, 3, dtype=torch.long), torch.zeros(2, 3))
    with pytest.raises(ShapeError, match="differ"):
        kl_loss(torch.randn(2, 8), torch.randn(2, 9))
    with pytest.raises(RecipeError, match="training mode"):
        teacher_targets(LlamaForCausalLM(teacher.config), windows(), tmp_path / "new", 5)
    (tmp_path / "shard-00000.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="cannot be read"):
        targets.read(0)
