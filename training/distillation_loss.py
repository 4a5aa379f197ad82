"""Cross-entropy and forward KL from a teacher over vocabulary logits that are never held as a whole."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn


Head = Callable[[torch.Tensor], torch.Tensor]


def distillation_sums(
    student_logits: torch.Tensor, teacher_logits: torch.Tensor, targets: torch.Tensor, temperature: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """The two sums that distillation mixes, in nats, over the tokens whose target is not -100.

    Args:
        student_logits, teacher_logits (`torch.Tensor` of shape `(tokens, vocab)`): any floating type.
        targets (`torch.Tensor` of shape `(tokens,)`): the next token, or -100 where it is unknown.
        temperature: divides both logits in the KL term, which is scaled by its square so that its gradient keeps
            its size (Hinton et al. 2015, section 2).

    Returns:
        `(cross_entropy, kl)`: fp32 scalars; KL(teacher || student), the teacher being the reference.
    """
    known = targets != -100
    student, teacher = student_logits[known].float(), teacher_logits[known].float()
    log_q = torch.log_softmax(student, dim=-1)
    cross_entropy = -log_q.gather(1, targets[known][:, None]).sum()
    if temperature != 1.0:
        log_q = torch.log_softmax(student / temperature, dim=-1)
    log_p = torch.log_softmax(teacher / temperature, dim=-1)
    # kl_div works on p elementwise without a further matrix of differences
    kl = nn.functional.kl_div(log_q, log_p, reduction="sum", log_target=True)
    return cross_entropy, kl * temperature**2


class _ChunkedDistillation(torch.autograd.Function):
    """Mixes both sums chunk by chunk and keeps only gradients: no logits outlive their chunk, none are recomputed."""

    @staticmethod
    def forward(ctx, mix, heads, chunk, student_hidden, teacher_hidden, targets, *weights):
        student_head, teacher_head = heads
        wanted = [w for w in weights if w.requires_grad]
        total = torch.zeros(3, device=student_hidden.device)
        hidden_grad = torch.zeros_like(student_hidden) if student_hidden.requires_grad else None
        weight_grads = [torch.zeros_like(w) for w in wanted]
        for start in range(0, len(targets), chunk):
            part = slice(start, start + chunk)
            teacher_logits = teacher_head(teacher_hidden[part])
            with torch.enable_grad():
                hidden = student_hidden[part].detach().requires_grad_()
                sums = distillation_sums(student_head(hidden), teacher_logits, targets[part], mix[1])
                loss = (1 - mix[0]) * sums[0] + mix[0] * sums[1]
            total += torch.stack([loss.detach(), sums[0].detach(), sums[1].detach()])
            if hidden_grad is None and not wanted:
                continue
            grads = torch.autograd.grad(loss, [hidden, *wanted])
            if hidden_grad is not None:
                hidden_grad[part] = grads[0]
            for held, new in zip(weight_grads, grads[1:], strict=True):
                held += new
        ctx.save_for_backward(hidden_grad, *weight_grads)
        ctx.wanted = [w.requires_grad for w in weights]
        ctx.mark_non_differentiable(sums_out := total[1:].clone())
        return total[0].clone(), sums_out

    @staticmethod
    def backward(ctx, grad, _):
        hidden_grad, *held = ctx.saved_tensors
        held_iter = iter(held)
        weight_grads = [grad * next(held_iter) if want else None for want in ctx.wanted]
        return None, None, None, None if hidden_grad is None else grad * hidden_grad, None, None, *weight_grads


def chunked_distillation_loss(
    student_hidden: torch.Tensor,
    teacher_hidden: torch.Tensor,
    targets: torch.Tensor,
    student_head: Head,
    teacher_head: Head,
    head_weights: Sequence[torch.Tensor],
    *,
    weight: float = 1.0,
    temperature: float = 1.0,
    chunk: int = 512,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`(1 - weight) * CE + weight * KL(teacher || student)`, summed over the tokens with a known target.

    Peak memory beyond the inputs is a few matrices of shape `(chunk, vocab)`, plus one gradient per head weight.

    Args:
        student_hidden (`torch.Tensor` of shape `(tokens, student hidden)`): what the student's head reads.
        teacher_hidden (`torch.Tensor` of shape `(tokens, teacher hidden)`): the same of the teacher; no gradient.
        targets (`torch.Tensor` of shape `(tokens,)`): the next token, or -100.
        student_head, teacher_head: hidden states of one chunk to logits `(chunk, vocab)`, row by row.
        head_weights: every tensor that `student_head` uses and that may want a gradient.
        weight: share of the KL term, 0 to 1.
        temperature: of the KL term, above 0.
        chunk: tokens per step.

    Returns:
        `(loss, cross_entropy, kl)`: fp32 scalars in nats, sums over tokens; only `loss` carries a gradient.
    """
    loss, sums = _ChunkedDistillation.apply(
        (weight, temperature),
        (student_head, teacher_head),
        chunk,
        student_hidden,
        teacher_hidden,
        targets,
        *head_weights,
    )
    return loss, sums[0], sums[1]
