"""The dense operations of torch as they are fastest on a CPU, with gradients of their own.

Matrix products in float32 go to oneDNN, whose kernels use the widest vectors of any make of processor; torch's own
choice, MKL, uses half of them on AMD's. What runs over all activations is computed in as few passes as torch's
primitives allow, and keeps for the gradient only what nothing else holds. On other devices torch's fused kernels are
taken. Knows no models.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

_ONEDNN: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b.T: a [M, K], b [N, K], of any strides. Without a gradient."""
    if _ONEDNN and a.dtype == torch.float32 and a.device.type == "cpu" and a.numel():
        # The operation that torch.compile calls for a linear; the only way to oneDNN that copies neither operand.
        result: Tensor = torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
        return result
    return a @ b.T


Weight = Tensor | Callable[[], Tensor]
"""[out, in]; or what makes it each time that it is multiplied by: it takes no memory meanwhile, and has no gradient."""


def linear(x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias: x [T, in], bias [out]."""
    if isinstance(weight, Tensor) and x.device.type != "cpu":
        return F.linear(x, weight, bias)
    result: Tensor = _Linear.apply(x, weight)  # type: ignore[no-untyped-call]
    return result if bias is None else result + bias


def low_rank_linear(
    x: Tensor, weight: Weight, a: Tensor, b: Tensor, scale: float, magnitude: Tensor | None = None
) -> Tensor:
    """x @ weight.T + scale * (x @ a.T) @ b.T: a [rank, in], b [out, rank]; with a magnitude [out] (DoRA), times that
    over the lengths of the rows of weight + scale * b @ a. No gradient flows to the weight, nor through these lengths
    (Liu et al. 2024, section 4.3)."""
    result: Tensor = _LowRankLinear.apply(x, weight, a, b, scale, magnitude)  # type: ignore[no-untyped-call]
    return result


def row_lengths(weight: Weight, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """[out] float32, of weight + scale * b @ a. Without a gradient."""
    with torch.no_grad():
        added = torch.addmm(_made(weight).float(), b.float(), a.float(), alpha=scale)
        lengths: Tensor = torch.linalg.vector_norm(added, dim=1)
        return lengths


def row_factors(magnitude: Tensor, lengths: Tensor) -> Tensor:
    """magnitude / lengths; 0 for a row of zeros, which stays one."""
    return torch.where(lengths > 0, magnitude / lengths, 0.0)


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis, in float32, as x's type."""
    if x.device.type != "cpu" or x.dtype != torch.float32:
        return F.rms_norm(x.float(), x.shape[-1:], weight, eps).to(x.dtype)
    result: Tensor = _RmsNorm.apply(x, weight, eps)  # type: ignore[no-untyped-call]
    return result


def silu_gated(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up."""
    if gate.device.type != "cpu":
        return F.silu(gate) * up
    result: Tensor = _SiluGated.apply(gate, up)  # type: ignore[no-untyped-call]
    return result


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x: [T, n, Dh] float32; cos and sin: [T, 1, half]. Pairs (i, i + half) of each head rotated, the rest as it is."""
    result: Tensor = _Rotate.apply(x, cos, sin)  # type: ignore[no-untyped-call]
    return result


class _Linear(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Weight) -> Tensor:
        _save(ctx, weight, x if ctx.needs_input_grad[1] else None)
        made = _made(weight)
        return product(x.to(made.dtype), made)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        weight, x = _saved(ctx)
        return (
            product(grad, weight.T) if ctx.needs_input_grad[0] else None,
            product(grad.T, x.T) if ctx.needs_input_grad[1] else None,
        )


class _LowRankLinear(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Weight, a: Tensor, b: Tensor, scale: float, magnitude: Tensor | None
    ) -> Tensor:
        inner = product(x.to(a.dtype), a)  # [T, rank]
        made = _made(weight)
        y = product(x.to(made.dtype), made)
        y.addmm_(inner.to(y.dtype), b.T.to(y.dtype), alpha=scale)
        factors = None
        if magnitude is not None:
            factors = row_factors(magnitude, row_lengths(made, a, b, scale))
            y.mul_(factors)
        ctx.scale = scale
        # y, which what comes next often keeps too, rather than what it was before it was multiplied
        _save(ctx, weight, x, a, b, inner, magnitude, factors, None if magnitude is None else y)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, x, a, b, inner, magnitude, factors, y = _saved(ctx)
        given = grad.to(b.dtype)
        to_magnitude = None
        if magnitude is not None:
            to_magnitude = torch.linalg.vecdot(given, y.to(given.dtype), dim=0)
            to_magnitude = torch.where(magnitude != 0, to_magnitude / magnitude, 0.0)
            given = given * factors
            grad = given.to(grad.dtype)
        to_inner = product(given, b.T).mul_(ctx.scale)  # [T, rank]
        to_x = None
        if ctx.needs_input_grad[0]:
            to_x = product(grad, weight.T)
            to_x.addmm_(to_inner.to(to_x.dtype), a.to(to_x.dtype))
        to_a = product(to_inner.T, x.to(a.dtype).T)
        to_b = product(given.T, inner.T).mul_(ctx.scale)
        return to_x, None, to_a, to_b, None, to_magnitude


def _made(weight: Weight) -> Tensor:
    return weight if isinstance(weight, Tensor) else weight()


def _save(ctx: Any, weight: Weight, *tensors: Tensor | None) -> None:
    ctx.weight = None if isinstance(weight, Tensor) else weight
    ctx.save_for_backward(weight if isinstance(weight, Tensor) else None, *tensors)


def _saved(ctx: Any) -> tuple[Any, ...]:
    weight, *tensors = ctx.saved_tensors
    return (weight if ctx.weight is None else ctx.weight()), *tensors


class _RmsNorm(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        squares = torch.linalg.vecdot(x, x).unsqueeze(-1)
        inverse = squares.div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        normed: Tensor = x * inverse
        return normed if weight is None else normed.mul_(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, weight, inverse = ctx.saved_tensors
        to_weight = None
        if ctx.needs_input_grad[1]:
            to_weight = (grad * x).mul_(inverse).flatten(0, -2).sum(0)
        scaled = grad * inverse if weight is None else (grad * weight).mul_(inverse)
        # d/dx of x/r, r the root mean square: (g - x (g.x) / (n r^2)) / r
        along = torch.linalg.vecdot(scaled, x).unsqueeze(-1).mul_(inverse * inverse).div_(-x.shape[-1])
        return scaled.addcmul_(x, along), to_weight, None


class _SiluGated(Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        to_up = F.silu(gate).mul_(grad)
        return torch.ops.aten.silu_backward(grad * up, gate), to_up


class _Rotate(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotated(grad, cos, -sin), None, None  # the inverse of a rotation, and its transpose, is that by -angle


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = cos.shape[-1]
    result = torch.empty_like(x, memory_format=torch.contiguous_format)
    first, second = x[..., :half], x[..., half : 2 * half]
    torch.mul(first, cos, out=result[..., :half]).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=result[..., half : 2 * half]).addcmul_(first, sin)
    result[..., 2 * half :] = x[..., 2 * half :]
    return result
