"""Losses of tokens from hidden states: cross-entropy without ever holding the logits of all rows, or their gradients.

Rows go through the head some at a time. Where the head is frozen, the gradient of the hidden states is made on the way,
a row's up to a factor that is known later; where it is trained, logits are made again for the gradients. Knows neither
models nor data.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.utils.checkpoint import checkpoint

from dapji.ops.torch_kernels import product

_CHUNK_VALUES = 1 << 23
"""Logits held at a time: 32 MiB in float32, about what a processor's last cache holds."""
_FEWEST_ROWS = 64
"""At a time; with fewer, reading the head takes longer than multiplying."""


def token_losses(hidden: Tensor, head: Tensor, labels: Tensor, softcap: float | None = None) -> Tensor:
    """-log p(label), [R] float32: of hidden [R, D] by head [V, D] and labels [R] int64, in natural units.

    softcap: logits x are softcap tanh(x / softcap). Differentiable in hidden and head.
    """
    result: Tensor = _TokenLosses.apply(hidden, head, labels, softcap)  # type: ignore[no-untyped-call]
    return result


class _TokenLosses(Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, labels: Tensor, softcap: float | None) -> Tensor:
        trained = ctx.needs_input_grad[1]
        to_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] and not trained else None
        log_sums = torch.empty(len(hidden), device=hidden.device)
        losses = torch.empty_like(log_sums)
        step = max(_FEWEST_ROWS, _CHUNK_VALUES // len(head))
        for rows in (slice(at, at + step) for at in range(0, len(hidden), step)):
            logits = product(hidden[rows], head).float()
            slopes = _cap(logits, softcap)
            chosen = logits.gather(1, labels[rows, None])
            largest = logits.amax(dim=1, keepdim=True)
            powers = logits.sub_(largest).exp_()
            sums = powers.sum(dim=1, keepdim=True)
            log_sums[rows] = (sums.log() + largest).squeeze(1)
            losses[rows] = log_sums[rows] - chosen.squeeze(1)
            if to_hidden is not None:  # (softmax - one at the label) @ head
                own = head[labels[rows]].float()
                if slopes is not None:
                    powers.mul_(slopes)
                    own *= slopes.gather(1, labels[rows, None])
                to_hidden[rows] = (product(powers.to(head.dtype), head.T).float() / sums).sub_(own)
        ctx.softcap = softcap
        ctx.save_for_backward(*((hidden, head, labels, log_sums) if trained else (to_hidden,)))
        return losses

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        if not ctx.needs_input_grad[1]:
            (to_hidden,) = ctx.saved_tensors
            return (to_hidden * grad[:, None]).to(to_hidden.dtype), None, None, None
        hidden, head, labels, log_sums = ctx.saved_tensors
        factors = grad[:, None]
        to_head = torch.empty_like(head)
        to_hidden = torch.zeros(hidden.shape, device=hidden.device)
        step = max(1, _CHUNK_VALUES // len(hidden))  # by columns: each of the head's gradients is one product
        for at in range(0, len(head), step):
            part = head[at : at + step]
            logits = product(hidden, part).float()
            slopes = _cap(logits, ctx.softcap)
            given = logits.sub_(log_sums[:, None]).exp_().mul_(factors)
            here = ((labels >= at) & (labels < at + step)).nonzero().squeeze(1)
            given[here, labels[here] - at] -= grad[here]
            if slopes is not None:
                given.mul_(slopes)
            given = given.to(head.dtype)
            to_hidden += product(given, part.T)
            to_head[at : at + step] = product(given.T, hidden.T)
        return to_hidden.to(hidden.dtype), to_head, None, None


def distillation_losses(
    hidden: Tensor, head: Tensor, labels: Tensor, top: Tensor, top_log_probs: Tensor, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """-log p(label), and the divergence KL(teacher || student) of what a teacher gave for its likeliest tokens, each
    [R] float32, of hidden [R, D] by head [V, D].

    top [R, k] int64: different tokens, k < V; top_log_probs [R, k]: the teacher's. All other tokens count as one, with
    what is left of each distribution: so the divergence is never more than that of all V, and 0 where they are alike.
    Differentiable in hidden and head; logits are made again for the gradients.
    """
    step = max(_FEWEST_ROWS, _CHUNK_VALUES // len(head))
    parts = [
        checkpoint(
            _distilled, hidden[rows], head, labels[rows], top[rows], top_log_probs[rows], softcap, use_reentrant=False
        )
        for rows in (slice(at, at + step) for at in range(0, len(hidden), step))
    ]
    return torch.cat([losses for losses, _ in parts]), torch.cat([divergences for _, divergences in parts])


def _distilled(
    hidden: Tensor, head: Tensor, labels: Tensor, top: Tensor, teacher: Tensor, softcap: float | None
) -> tuple[Tensor, Tensor]:
    logits = F.linear(hidden, head).float()
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    log_sums = logits.logsumexp(dim=1)
    losses = log_sums - logits.gather(1, labels[:, None]).squeeze(1)
    student = logits.gather(1, top) - log_sums[:, None]
    rest = logits.scatter(1, top, -math.inf).logsumexp(dim=1) - log_sums
    given = teacher.exp()
    left = (1 - given.sum(dim=1)).clamp(min=0)
    divergences = (given * (teacher - student)).sum(dim=1) + torch.xlogy(left, left) - left * rest
    return losses, divergences


def _cap(logits: Tensor, softcap: float | None) -> Tensor | None:
    """Caps logits in place; gives the derivative of what is capped by what was."""
    if softcap is None:
        return None
    ratios = logits.div_(softcap).tanh_()
    slopes = 1 - ratios * ratios
    logits.mul_(softcap)
    return slopes
