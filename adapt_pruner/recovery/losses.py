"""The loss of recovery: next tokens and distillation, computed in chunks of tokens.

The logits of all tokens are the largest tensors of training by far, and distillation has them twice. Here
the head is applied to a chunk of tokens at a time. The gradient of a sum over tokens is a sum of gradients,
and it scales with the gradient that arrives from above: so both are computed at once, in the forward pass,
and no logits are left for the backward pass.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

IGNORED = -100  # the label of a position that predicts nothing, as in transformers
CHUNK_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Distillation:
    """How a teacher takes part in the loss: `alpha * divergence + (1 - alpha) * cross_entropy`.

    Args:
        temperature: T in `T^2 * KL(softmax(z_teacher / T) || softmax(z_student / T))`; above 0.
        alpha: the share of the divergence, in [0, 1].
    Raises:
        ValueError: a value is out of range.
    Source: arXiv 1503.02531.
    """

    temperature: float = 2.0
    alpha: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature is {self.temperature}; expected a finite number above 0")
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha is {self.alpha}; expected 0 to 1")


class HeadInput(NamedTuple):
    """A language-model head and what it is applied to.

    Logits are `z = hidden @ weight.T + bias`, or `softcap * tanh(z / softcap)`.

    Args:
        hidden: [batch, sequence, hidden], fp64, fp32, bf16 or fp16, after the final norm.
        weight: [vocabulary, hidden], the whole tensor, not a shard; it may be the embedding's as well.
        bias: [vocabulary] or None.
        softcap: bound of the logits (`final_logit_softcapping` of Gemma 2), or None for plain logits.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None


class RecoveryLoss(NamedTuple):
    """A loss and its parts; scalars in nats, fp32 (fp64 where the student's hidden states are).

    Args:
        loss: what to minimise; differentiable.
        cross_entropy: of the labels; detached.
        divergence: from the teacher, with its factor T^2; detached; None without a teacher.
    """

    loss: Tensor
    cross_entropy: Tensor
    divergence: Tensor | None


def recovery_loss(
    student: HeadInput,
    labels: Tensor,
    *,
    num_items: Tensor | int | None = None,
    teacher: HeadInput | None = None,
    distillation: Distillation | None = None,
    chunk_tokens: int | None = None,
) -> RecoveryLoss:
    """Loss of the next tokens, with or without a teacher's distribution, summed and divided by `num_items`.

    Matrix products are in the dtype of autocast where it is on, else in that of the hidden states; all else,
    the sum of the weight's gradient included, is in fp32. Gradients cost no more memory than the weight's own
    and a few chunks of logits; where none are wanted (a frozen head, no_grad) their work is left out.
    Second derivatives are not supported.

    Args:
        labels: [batch, sequence], int64, not shifted: position t predicts `labels[:, t + 1]`, unless that is
            -100. Positions without a label are not computed.
        num_items: labels of all that is averaged over, so that the losses of parts of a batch add up to that
            of the batch; None for those of this call.
        teacher: of the same vocabulary, batch and sequence; its hidden size and device may be others. It gets
            no gradients.
        distillation: given with a teacher and only then.
        chunk_tokens: tokens whose logits exist at a time, in up to three and a half tensors of fp32; None for
            `default_chunk_tokens`.
    Returns:
        The loss and its parts; 0, with gradients of 0, where all labels are ignored.
    Raises:
        ValueError: shapes, vocabularies or labels that do not fit, a teacher without distillation or the
            reverse, or fewer than 1 item or token to a chunk.
    Source: arXiv 1503.02531 (distillation); arXiv 2410.10989 (gradients in the forward pass).
    """
    _check(student, labels, teacher, distillation)
    vocabulary = len(student.weight)
    if chunk_tokens is None:
        chunk_tokens = default_chunk_tokens(student.weight)
    elif chunk_tokens < 1:
        raise ValueError(f"chunk_tokens is {chunk_tokens}; expected at least 1")
    following = F.pad(labels[:, 1:], (0, 1), value=IGNORED).flatten().to(student.hidden.device)
    rows = (following != IGNORED).nonzero()[:, 0]
    targets = following[rows]
    if len(targets):
        low, high = (int(end) for end in targets.aminmax())
        if low < 0 or high >= vocabulary:
            wrong = low if low < 0 else high
            raise ValueError(f"label {wrong}; expected 0 to {vocabulary - 1}, or {IGNORED} to ignore it")
    items = float(len(targets) if num_items is None else num_items)
    if items < min(1, len(targets)):
        raise ValueError(f"num_items is {items:g}, with {len(targets)} labels; expected at least 1")
    hidden, weight, bias = student.hidden, student.weight, student.bias
    if not torch.is_grad_enabled():  # an autograd.Function is told of requires_grad alone
        hidden, weight = hidden.detach(), weight.detach()
        bias = None if bias is None else bias.detach()
    sums = _ChunkedLoss.apply(
        hidden, weight, bias, student.softcap, rows, targets, teacher, distillation, chunk_tokens
    )
    loss, cross_entropy, divergence = (each / max(items, 1.0) for each in sums)
    return RecoveryLoss(loss, cross_entropy, None if teacher is None else divergence)


def default_chunk_tokens(weight: Tensor) -> int:
    """Tokens of a chunk: of fp32 logits of 64 MiB, or of an eighth of the weight's size if that is more.

    Each chunk reads and writes the gradient of the whole weight, which takes longer than computing it where
    chunks are small.

    Args:
        weight: [vocabulary, hidden] of the student's head.
    """
    vocabulary, hidden_size = weight.shape
    return max(1, CHUNK_BYTES // (4 * vocabulary), hidden_size // 8)


def _check(
    student: HeadInput, labels: Tensor, teacher: HeadInput | None, distillation: Distillation | None
) -> None:
    for who, head in (("student", student), ("teacher", teacher)):
        if head is None:
            continue
        hidden, weight = tuple(head.hidden.shape), tuple(head.weight.shape)
        if len(hidden) != 3 or hidden[:2] != tuple(labels.shape):
            raise ValueError(
                f"{who}'s hidden states are {hidden}, labels {tuple(labels.shape)}; "
                "expected [batch, sequence, hidden] and [batch, sequence]"
            )
        if len(weight) != 2 or weight[1] != hidden[2]:
            raise ValueError(f"{who}'s head is {weight}; expected [vocabulary, {hidden[2]}]")
        if head.bias is not None and tuple(head.bias.shape) != weight[:1]:
            raise ValueError(f"{who}'s bias is {tuple(head.bias.shape)}; expected {weight[:1]}")
        if head.softcap is not None and not head.softcap > 0:
            raise ValueError(f"{who}'s softcap is {head.softcap}; expected more than 0")
    if labels.dtype != torch.int64:
        raise ValueError(f"labels are {labels.dtype}; expected torch.int64")
    if (teacher is None) != (distillation is None):
        missing = "teacher" if teacher is None else "distillation"
        raise ValueError(f"{missing} is None; expected a teacher and distillation, or neither")
    if teacher is not None and len(teacher.weight) != len(student.weight):
        raise ValueError(
            f"the teacher's vocabulary is {len(teacher.weight)}, the student's {len(student.weight)}; "
            "expected the same"
        )


class _ChunkedLoss(torch.autograd.Function):
    """Sums over rows of loss, cross-entropy and divergence; only the first is differentiable."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        softcap: float | None,
        rows: Tensor,
        targets: Tensor,
        teacher: HeadInput | None,
        distillation: Distillation | None,
        chunk_tokens: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        student = _ready(HeadInput(hidden, weight, bias, softcap))
        teacher = None if teacher is None else _ready(teacher)
        wide = torch.float64 if student.weight.dtype == torch.float64 else torch.float32
        # Of the sum: divided by num_items, which the upstream gradient brings, they would vanish in fp16.
        grads = [
            None if each is None or not needed else each.new_zeros(each.shape, dtype=wide)
            for each, needed in zip((hidden, weight, bias), ctx.needs_input_grad[:3], strict=True)
        ]
        cross_entropy = rows.new_empty(len(rows), dtype=wide)
        divergence = torch.zeros_like(cross_entropy)
        for at in range(0, len(rows), chunk_tokens):
            chunk = slice(at, at + chunk_tokens)
            cross_entropy[chunk], divergence[chunk], gradient = _loss_of_chunk(
                student,
                teacher,
                rows[chunk],
                targets[chunk],
                distillation,
                wide,
                any(ctx.needs_input_grad),
            )
            if gradient is not None:
                _add_gradients(grads, student, rows[chunk], gradient)
            del gradient  # or it would live through the next chunk
        ctx.save_for_backward(*grads)
        ctx.dtypes = [None if each is None else each.dtype for each in (hidden, weight, bias)]
        ce, kl = cross_entropy.sum(), divergence.sum()
        alpha = 0.0 if distillation is None else distillation.alpha
        ctx.mark_non_differentiable(ce, kl)
        return alpha * kl + (1 - alpha) * ce, ce, kl

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        # Not in place: a retained graph can be gone through again. `out` saves a third tensor in fp32.
        scaled = (
            None if grad is None else torch.mul(grad, upstream, out=torch.empty_like(grad, dtype=dtype))
            for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return (*scaled, *(None,) * 6)


def _ready(head: HeadInput) -> HeadInput:
    """Hidden states as [tokens, hidden]; weight and bias in the dtype in which products are computed."""
    device = head.hidden.device.type
    dtype = head.hidden.dtype
    if torch.is_autocast_enabled(device) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
    bias = None if head.bias is None else head.bias.to(dtype)
    return HeadInput(head.hidden.flatten(0, 1), head.weight.to(dtype), bias, head.softcap)


def _inputs(head: HeadInput, rows: Tensor) -> Tensor:
    return head.hidden[rows.to(head.hidden.device)].to(head.weight.dtype)


def _logits(head: HeadInput, rows: Tensor, wide: torch.dtype) -> Tensor:
    """[rows, vocabulary] on the device of the rows, in a tensor of its own."""
    logits = F.linear(_inputs(head, rows), head.weight, head.bias).to(rows.device, wide)
    if head.softcap is not None:
        logits.div_(head.softcap).tanh_().mul_(head.softcap)
    return logits


def _loss_of_chunk(
    student: HeadInput,
    teacher: HeadInput | None,
    rows: Tensor,
    targets: Tensor,
    distillation: Distillation | None,
    wide: torch.dtype,
    with_gradient: bool,
) -> tuple[Tensor, Tensor | float, Tensor | None]:
    """Cross-entropy and divergence of each row; the gradient of the loss with respect to the logits.

    Most of the memory there is goes by here, hence the operations in place.
    """
    of_teacher = None if teacher is None else _logits(teacher, rows, wide)
    logits = _logits(student, rows, wide)
    peak = logits.amax(-1, keepdim=True)
    logits.sub_(peak)  # softmax does not change, and exp cannot overflow
    divergence: Tensor | float = 0.0
    pull = None
    if of_teacher is not None:
        assert distillation is not None
        divergence, pull = _divergence(logits, of_teacher, distillation.temperature)
    # What was the teacher's logits is free again.
    cross_entropy, gradient = _cross_entropy(
        logits, targets, out=torch.empty_like(logits) if of_teacher is None else of_teacher
    )
    if not with_gradient:
        return cross_entropy, divergence, None
    if pull is not None:
        assert distillation is not None
        gradient.mul_(1 - distillation.alpha).add_(pull, alpha=distillation.alpha)
    if student.softcap is not None:  # tanh' = 1 - tanh^2
        slope = logits.add_(peak).div_(student.softcap).square_().neg_().add_(1)
        gradient.mul_(slope)
    return cross_entropy, divergence, gradient


def _cross_entropy(logits: Tensor, targets: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    """Of each row, with its gradient `softmax(logits) - onehot(target)` in `out`.

    Args:
        logits: [rows, vocabulary], each row at most 0.
    """
    row = torch.arange(len(targets), device=targets.device)
    softmax = torch.exp(logits, out=out)
    total = softmax.sum(-1, keepdim=True)
    loss = total[:, 0].log() - logits[row, targets]
    softmax.div_(total)
    softmax[row, targets] -= 1
    return loss, softmax


def _divergence(logits: Tensor, teacher: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """T^2 KL(p || q) of each row with p = softmax(teacher / T), q = softmax(logits / T); gradient T (q - p).

    Args:
        logits: [rows, vocabulary], each row at most 0.
        teacher: [rows, vocabulary]; overwritten.
    """
    teacher.sub_(teacher.amax(-1, keepdim=True)).mul_(1 / temperature)
    p = teacher.exp()
    total_p = p.sum(-1, keepdim=True)
    p.div_(total_p)
    # log p - log q = difference - log total_p + log total_q. A token that the teacher rules out counts 0,
    # however small the logarithms are.
    difference = teacher.sub_(logits, alpha=1 / temperature).masked_fill_(p == 0, 0)
    divergence = difference.mul_(p).sum(-1)
    q = torch.mul(logits, 1 / temperature, out=teacher).exp_()
    total_q = q.sum(-1, keepdim=True)
    divergence += (total_q.log() - total_p.log())[:, 0]
    gradient = p.neg_().add_(q.div_(total_q)).mul_(temperature)
    return divergence.mul_(temperature**2), gradient


def _add_gradients(grads: list[Tensor | None], student: HeadInput, rows: Tensor, gradient: Tensor) -> None:
    """Adds the gradients of a chunk to those of hidden [batch, sequence, hidden], weight and bias.

    Args:
        gradient: [rows, vocabulary], with respect to the logits.
    """
    of_hidden, of_weight, of_bias = grads
    if of_bias is not None:
        of_bias += gradient.sum(0)
    narrow = gradient.to(student.weight.dtype)
    if of_hidden is not None:
        of_hidden.view(-1, of_hidden.shape[-1])[rows] = (narrow @ student.weight).to(of_hidden.dtype)
    if of_weight is None:
        return
    inputs = _inputs(student, rows)
    if narrow.dtype == of_weight.dtype:
        of_weight.addmm_(narrow.T, inputs)
        return
    # A product of 16-bit matrices has 16 bits; in slices, or it would be as large as the weight once more.
    slices = max(1, CHUNK_BYTES // (4 * inputs.shape[1]))
    for part, columns in zip(of_weight.split(slices), narrow.T.split(slices), strict=True):
        part += columns @ inputs
