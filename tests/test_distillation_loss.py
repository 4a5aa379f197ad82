"""The chunked loss against the same loss over whole matrices, and what it may hold."""

import pytest
import torch
from torch import nn

from varidepth.training.distillation_loss import chunked_distillation_loss, distillation_sums


TOKENS, WIDTH, VOCAB = 37, 16, 53


def build(tokens=TOKENS, vocab=VOCAB):
    torch.manual_seed(0)
    student, teacher = nn.Linear(WIDTH, vocab, bias=True), nn.Linear(WIDTH + 4, vocab)
    hidden = torch.randn(tokens, WIDTH, requires_grad=True)
    targets = torch.randint(vocab, (tokens,))
    targets[5:9] = -100
    return student, teacher, hidden, torch.randn(tokens, WIDTH + 4), targets


def written_out(student, teacher, hidden, teacher_hidden, targets, weight, temperature):
    """The definition, token by token, over the whole vocabulary matrix."""
    known = targets != -100
    q, p = student(hidden)[known], teacher(teacher_hidden)[known].detach()
    ce = nn.functional.cross_entropy(q, targets[known], reduction="sum")
    p, log_q = torch.softmax(p / temperature, -1), torch.log_softmax(q / temperature, -1)
    kl = (p * (p.log() - log_q)).sum() * temperature**2
    return (1 - weight) * ce + weight * kl, ce, kl


@pytest.mark.parametrize("chunk", [1, 8, 37, 100])
@pytest.mark.parametrize(("weight", "temperature"), [(1.0, 1.0), (0.3, 2.0), (0.0, 1.0)])
def test_equals_the_definition_and_its_gradients(chunk, weight, temperature):
    student, teacher, hidden, teacher_hidden, targets = build()
    inputs = [hidden, *student.parameters()]
    expected = written_out(student, teacher, hidden, teacher_hidden, targets, weight, temperature)
    expected_grads = torch.autograd.grad(expected[0], inputs)
    found = chunked_distillation_loss(
        hidden, teacher_hidden, targets, student, teacher, tuple(student.parameters()),
        weight=weight, temperature=temperature, chunk=chunk,
    )  # fmt: skip
    torch.testing.assert_close(torch.stack(found), torch.stack(expected))
    for a, b in zip(torch.autograd.grad(2 * found[0], inputs), expected_grads, strict=True):
        torch.testing.assert_close(a, 2 * b, rtol=1e-4, atol=1e-5)


def test_frozen_head_and_frozen_hidden_states_get_no_gradient():
    student, teacher, hidden, teacher_hidden, targets = build()
    student.requires_grad_(False)
    loss, *_ = chunked_distillation_loss(
        hidden, teacher_hidden, targets, student, teacher, tuple(student.parameters())
    )
    loss.backward()
    assert hidden.grad is not None and student.weight.grad is None

    student.requires_grad_(True)
    loss, *_ = chunked_distillation_loss(
        hidden.detach(), teacher_hidden, targets, student, teacher, tuple(student.parameters())
    )
    loss.backward()
    assert student.weight.grad.abs().sum() > 0


def test_equal_distributions_have_no_divergence():
    logits = torch.randn(4, 9, generator=torch.Generator().manual_seed(0))
    _, kl = distillation_sums(logits, logits.clone(), torch.tensor([1, 2, 3, -100]), temperature=3.0)
    assert kl.abs() < 1e-6


def test_no_vocabulary_matrix_is_held():
    """Neither among saved tensors nor alive at any moment: the largest logits a head makes are one chunk."""
    student, teacher, hidden, teacher_hidden, targets = build(tokens=64, vocab=211)
    seen = []
    for head in (student, teacher):
        head.register_forward_hook(lambda module, args, output: seen.append(tuple(output.shape)))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        loss, *_ = chunked_distillation_loss(
            hidden, teacher_hidden, targets, student, teacher, tuple(student.parameters()), chunk=16
        )
    assert set(seen) == {(16, 211)}
    assert max(saved) <= max(16 * 211, student.weight.numel()) < 64 * 211
    loss.backward()
    assert set(seen) == {(16, 211)}
