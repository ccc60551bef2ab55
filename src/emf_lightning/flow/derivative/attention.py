"""Forward rules of softmax attention: one that holds all weights, and one in blocks, whose memory is linear."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

WHOLE_LOGITS, BLOCK_LOGITS = 2**24, 2**22
"""Logits (samples x heads x queries x keys) up to which all are held at once, and those of a block above that."""


def attention_rule(given: dict[str, Any]) -> Tensor | None:
    """``F.scaled_dot_product_attention`` of dual numbers; None for arguments that torch's own path takes."""
    q, k, v, mask = given["query"], given["key"], given["value"], given.get("attn_mask")
    if given.get("dropout_p") or given.get("is_causal") or given.get("enable_gqa"):
        return None
    if mask is not None and _unpack(mask)[1] is not None:
        return None
    scale = q.shape[-1] ** -0.5 if given.get("scale") is None else given["scale"]
    heads = _common(q, k).numel()
    if heads * q.shape[-2] * k.shape[-2] <= WHOLE_LOGITS:
        result: Tensor = WholeAttention.apply(q, k, v, mask, scale)
        return result
    (q, dq), (k, dk), (v, dv) = _unpack(q), _unpack(k), _unpack(v)
    block = max(128, math.isqrt(BLOCK_LOGITS // heads))
    value, tangent = blockwise_attention(q, k, v, dq, dk, dv, mask, scale, block)
    return value if tangent is None else forward_ad.make_dual(value, tangent)  # type: ignore[no-untyped-call, no-any-return]


class WholeAttention(torch.autograd.Function):
    """softmax(q k' scale + mask) v, where some of q, k, v may have no tangent, as the text in cross-attention."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        ctx.set_materialize_grads(False)
        logits = (q * scale) @ k.transpose(-2, -1)
        if mask is not None:
            logits = logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask
        weights = torch._safe_softmax(logits, -1).to(v.dtype)  # a row that sees nothing is 0, as in torch's kernels
        ctx.scale = scale
        ctx.save_for_forward(q, k, v, weights)
        return weights @ v

    @staticmethod
    def jvp(
        ctx: Any, dq: Tensor | None, dk: Tensor | None, dv: Tensor | None, _mask: None, _scale: None
    ) -> Tensor | None:
        q, k, v, weights = ctx.saved_tensors
        parts = []
        if dq is not None:
            parts.append((dq * ctx.scale) @ k.transpose(-2, -1))
        if dk is not None:
            parts.append((q * ctx.scale) @ dk.transpose(-2, -1))
        terms = [] if dv is None else [weights @ dv]
        if parts:  # softmax's Jacobian is symmetric: its backward kernel serves
            dlogits = parts[0] if len(parts) == 1 else parts[0] + parts[1]
            terms.append(torch._softmax_backward_data(dlogits.to(weights), weights, -1, weights.dtype) @ v)
        return terms[0] if len(terms) == 1 else terms[0] + terms[1]


def blockwise_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    mask: Tensor | None,
    scale: float,
    block: int,
) -> tuple[Tensor, Tensor | None]:
    """softmax(q k' scale + mask) v and its tangent, of which no more than ``block`` x ``block`` logits a head exist.

    Half-precision inputs are multiplied and summed in fp32. A query that sees no key gives 0.

    Args:
        q: queries, (..., queries, width).
        k: keys, (..., keys, width).
        v: values, (..., keys, any width).
        dq: tangent of the queries; None where they have none.
        dk: tangent of the keys; None where they have none.
        dv: tangent of the values; None where they have none.
        mask: True where a query sees a key, or a number to add to the logit; any shape that broadcasts to the logits'.
        scale: of the logits.
        block: number of queries, and of keys, of a block.

    Returns:
        The value, and its tangent: None where no input has one.
    """
    queries, keys, device = q.shape[-2], k.shape[-2], q.device.type
    shape = (*_common(q, k, v), queries, v.shape[-1])
    cast = torch.is_autocast_enabled(device) and v.dtype != torch.float64
    value = q.new_empty(shape, dtype=torch.get_autocast_dtype(device) if cast else v.dtype)
    tangent = None if dq is None and dk is None and dv is None else torch.empty_like(value)
    if mask is not None:
        mask = mask.expand(*mask.shape[:-2], queries, keys)
    with torch.autocast(device, enabled=False):
        for rows in _blocks(queries, block):
            seen = (
                (*(_part(x, columns) for x in (k, v, dk, dv)), None if mask is None else mask[..., rows, columns])
                for columns in _blocks(keys, block)
            )
            row, drow = _part(q, rows), _part(dq, rows)
            value[..., rows, :], moved = _attend(row * scale, None if drow is None else drow * scale, seen)
            if tangent is not None:
                tangent[..., rows, :] = moved
    return value, tangent


def _attend(q: Tensor, dq: Tensor | None, seen: Iterable[tuple[Any, ...]]) -> tuple[Tensor, Tensor]:
    """Of one block of queries, scaled: the value and its tangent, from sums over the blocks of keys.

    The weights are exp(logit - top) / norm, where top is the largest logit so far: when it rises, the sums shrink.
    """
    top, norm, dnorm, total, dtotal = q.new_full((), -torch.inf), *q.new_zeros(4)
    for k, v, dk, dv, mask in seen:
        logits = q @ k.mT
        if mask is not None:
            logits = logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask.to(logits)
        last, top = top, torch.maximum(top, logits.amax(-1, keepdim=True))
        start = top.masked_fill(top == -torch.inf, 0)  # for queries that have seen nothing yet
        shrink, weights = (last - start).exp(), logits.sub_(start).exp_()
        norm = norm * shrink + weights.sum(-1, keepdim=True)
        total = total * shrink + weights @ v
        dnorm, dtotal = dnorm * shrink, dtotal * shrink
        if dv is not None:
            dtotal = dtotal + weights @ dv
        if dq is not None or dk is not None:
            moved = q @ dk.mT if dq is None else dq @ k.mT if dk is None else (dq @ k.mT).add_(q @ dk.mT)
            moved.mul_(weights)
            dnorm = dnorm + moved.sum(-1, keepdim=True)
            dtotal = dtotal + moved @ v
    norm = norm.masked_fill(norm == 0, 1)
    value = total / norm
    return value, (dtotal - value * dnorm) / norm


def _blocks(length: int, block: int) -> Iterator[slice]:
    return (slice(start, start + block) for start in range(0, length, block))


def _part(x: Tensor | None, rows: slice) -> Any:
    """Rows of ``x``, in fp32 or better."""
    return None if x is None else x[..., rows, :].to(torch.promote_types(x.dtype, torch.float32))


def _common(*tensors: Tensor) -> torch.Size:
    """The samples and heads of all."""
    shape: torch.Size = torch.broadcast_shapes(*(x.shape[:-2] for x in tensors))  # type: ignore[no-untyped-call]
    return shape


def _unpack(x: Tensor) -> tuple[Tensor, Tensor | None]:
    dual: tuple[Tensor, Tensor | None] = forward_ad.unpack_dual(x)  # type: ignore[no-untyped-call]
    return dual
