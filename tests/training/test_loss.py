"""Chunked cross-entropy against torch's own over all logits at once."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from dapji.training import loss
from dapji.training.loss import token_losses


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("rows", [1, 200])
def test_losses_and_gradients(monkeypatch: pytest.MonkeyPatch, softcap: float | None, trained: bool, rows: int) -> None:
    """Chunks of rows and of columns, the last of them partial."""
    monkeypatch.setattr(loss, "_CHUNK_VALUES", 20_000)
    torch.manual_seed(0)
    hidden = torch.randn(rows, 32, requires_grad=True)
    head = torch.randn(301, 32, requires_grad=trained)
    labels = torch.randint(301, (rows,))
    weights = torch.randn(rows)  # a row's own factor, as preferences have
    got = token_losses(hidden, head, labels, softcap)
    (got * weights).sum().backward()

    exact = [x.detach().double().requires_grad_() for x in (hidden, head)]
    logits = exact[0] @ exact[1].T
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    want = F.cross_entropy(logits, labels, reduction="none")
    (want * weights).sum().backward()
    # float32: sums over 301 logits of size up to 20
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(hidden.grad.double(), exact[0].grad, rtol=1e-4, atol=1e-5)
    assert (head.grad is not None) == trained
    if trained:
        torch.testing.assert_close(head.grad.double(), exact[1].grad, rtol=1e-4, atol=1e-4)


def test_a_label_that_is_impossible_has_a_finite_gradient() -> None:
    hidden = torch.tensor([[100.0, 0.0]], requires_grad=True)
    losses = token_losses(hidden, torch.tensor([[10.0, 0.0], [-10.0, 0.0]]), torch.tensor([1]))
    losses.sum().backward()
    assert losses.item() == 2000
    torch.testing.assert_close(hidden.grad, torch.tensor([[20.0, 0.0]]))
