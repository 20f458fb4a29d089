"""FlashInfer's TensorRT-LLM attention functions, by their names and arguments, on this package's kernels.

They skip tiles on every GPU that the kernels run on. What FlashInfer uses to choose among its kernels and to
lay out its scratch memory (``workspace_buffer``, ``enable_pdl``, ``backend``, ``is_var_seq``,
``multi_ctas_kv_counter_buffer``) is taken and not read, for there is one kernel here and it allocates what it
needs. Every other argument is followed, or refused with an ArgumentError, which is a ValueError.

Two ways to ask for skipping, of which a call has one: ``skip_softmax_threshold_scale_factor``, a number that
is divided by each sequence's own count of keys; and ``skip_softmax_threshold``, lambda itself, a number or a
float32 tensor [B] whose values may change between replays of a CUDA graph. None and 0 are dense.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from modelopt_sparse.errors import ArgumentError, describe
from modelopt_sparse.kernels.api import attention_paged, attention_varlen
from modelopt_sparse.kernels.pages import PagedKV
from modelopt_sparse.kernels.types import Phase, Plan, Seqs, SkipSoftmax, SkipSoftmaxDecode

from .flashinfer_arguments import (
    Cache,
    Result,
    check_batch,
    paged,
    refuse,
    refuse_beside_skipping,
    result_of,
    row_starts,
    scale_of,
    seqs_of,
    sinks_of,
    skipping_of,
    window_of,
)

MLA_VOTE_HEADS = 16
"""Heads that vote together in multi-head latent attention, where all share one KV head and seldom agree."""

# (Dqk, Dv) that the ragged function takes.
_RAGGED_DIMS = ((192, 128), (128, 128), (256, 256))


def trtllm_batch_context_with_kv_cache(
    query: Tensor,
    kv_cache: Cache,
    workspace_buffer: Tensor | None,
    block_tables: Tensor,
    seq_lens: Tensor,
    max_q_len: int,
    max_kv_len: int,
    bmm1_scale: float,
    bmm2_scale: float | Tensor,
    batch_size: int,
    cum_seq_lens_q: Tensor,
    cum_seq_lens_kv: Tensor,
    window_left: int = -1,
    out: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    o_sf_scale: float | None = None,
    o_sf_vec_size: int | None = None,
    kv_layout: str = "HND",
    enable_pdl: bool | None = None,
    sinks: Tensor | Sequence[Tensor] | None = None,
    kv_cache_sf: Any = None,
    skip_softmax_threshold_scale_factor: float | None = None,
    uses_shared_paged_kv_idx: bool = True,
    causal: bool = True,
    lse: Tensor | None = None,
    return_lse: bool = False,
    backend: str = "auto",
    *,
    skip_softmax_threshold: float | Tensor | None = None,
) -> Result:
    """Prefill over a paged cache; the rows of a sequence are its last positions.

    Args:
        query: [tokens, Hq, D], the rows of sequence b from ``cum_seq_lens_q[b]`` on.
        kv_cache: (K, V) of [pages, Hk, page_size, D] ("NHD": [pages, page_size, Hk, D]), or both in one
            tensor [pages, 2, ...]; [pages, 1, ...] where V is K.
        block_tables: int32 [B, pages of a sequence]; [B, 2, ..] of K and of V without
            ``uses_shared_paged_kv_idx``.
        seq_lens: int32 [B], keys of each sequence, with those of this call. ``cum_seq_lens_kv`` says the same
            and isn't read.
        bmm1_scale: multiplies q·k, natural-log units. bmm2_scale: multiplies the output.
        window_left: keys that a row sees before its own; -1 is all.
        sinks: [Hq] logits in the softmax's denominator.
        out, lse: written to, where given: [tokens, Hq, D], [tokens, Hq] fp32. lse is base 2.
    Returns:
        out, and with ``return_lse`` also lse.
    Raises:
        ArgumentError: an argument isn't taken. UnsupportedCall: the kernels don't offer the call.
    Source: FlashInfer 0.7, flashinfer/prefill.py.
    """
    refuse(o_sf_scale=o_sf_scale, o_sf_vec_size=o_sf_vec_size, kv_cache_sf=kv_cache_sf)
    skipping = skipping_of(skip_softmax_threshold_scale_factor, skip_softmax_threshold, seq_lens)
    check_batch(batch_size, seq_lens)
    cache = paged(kv_cache, block_tables, kv_layout, uses_shared_paged_kv_idx)
    found = attention_paged(
        query,
        cache,
        seqs_of(cum_seq_lens_q, seq_lens, max_q_len, max_kv_len, cache),
        **_prefill(causal, bmm1_scale, window_left, sinks, skipping),
    )
    return result_of(found, query.shape[:1], bmm2_scale, out, out_dtype, lse, return_lse)


def trtllm_batch_decode_with_kv_cache(
    query: Tensor,
    kv_cache: Cache,
    workspace_buffer: Tensor | None,
    block_tables: Tensor,
    seq_lens: Tensor,
    max_seq_len: int,
    bmm1_scale: float = 1.0,
    bmm2_scale: float | Tensor = 1.0,
    window_left: int = -1,
    out: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    o_sf_scale: float | None = None,
    o_sf_vec_size: int | None = None,
    sinks: Tensor | Sequence[Tensor] | None = None,
    kv_layout: str = "HND",
    enable_pdl: bool | None = None,
    backend: str = "auto",
    q_len_per_req: int | None = 1,
    o_scale: float | None = 1.0,
    mask: Tensor | None = None,
    max_q_len: int | None = None,
    cum_seq_lens_q: Tensor | None = None,
    skip_softmax_threshold_scale_factor: float | None = None,
    kv_cache_sf: Any = None,
    uses_shared_paged_kv_idx: bool = True,
    lse: Tensor | None = None,
    return_lse: bool = False,
    multi_ctas_kv_counter_buffer: Tensor | None = None,
    enable_block_sparse_attention: bool = False,
    *,
    skip_softmax_threshold: float | Tensor | None = None,
    vote_heads: int | None = None,
) -> Result:
    """Decode over a paged cache: 1 to 16 query rows a sequence, its last positions.

    Args:
        query: [B * q_len_per_req, Hq, D]; or, with ``cum_seq_lens_q`` and ``max_q_len``, any number of
            rows of each sequence.
        kv_cache, block_tables, seq_lens, bmm1_scale, bmm2_scale, window_left, sinks, out, lse: as for
            `trtllm_batch_context_with_kv_cache`.
        max_seq_len: the longest of ``seq_lens``, or more.
        vote_heads: query heads that decide together; see `SkipSoftmaxDecode`.
    Returns, Raises: as `trtllm_batch_context_with_kv_cache`.
    Source: FlashInfer 0.7, flashinfer/decode.py.
    """
    skipping = skipping_of(skip_softmax_threshold_scale_factor, skip_softmax_threshold, seq_lens)
    refuse_beside_skipping(
        skipping, enable_block_sparse_attention=enable_block_sparse_attention or None
    )
    refuse(
        o_sf_scale=o_sf_scale,
        o_sf_vec_size=o_sf_vec_size,
        kv_cache_sf=kv_cache_sf,
        mask=mask,
        o_scale=None if o_scale == 1.0 else o_scale,
    )
    cache = paged(kv_cache, block_tables, kv_layout, uses_shared_paged_kv_idx)
    cum_seq_lens_q, max_q_len = row_starts(
        query.shape[0], seq_lens, q_len_per_req, cum_seq_lens_q, max_q_len
    )
    skip = None if skipping is None else SkipSoftmaxDecode(**skipping, vote_heads=vote_heads)
    found = attention_paged(
        query,
        cache,
        seqs_of(cum_seq_lens_q, seq_lens, max_q_len, max_seq_len, cache),
        scale=scale_of(bmm1_scale),
        window=window_of(window_left),
        sinks=sinks_of(sinks),
        phase=Phase.DECODE,
        plan=Plan(skip_decode=skip),
    )
    return result_of(found, query.shape[:1], bmm2_scale, out, out_dtype, lse, return_lse)


def trtllm_ragged_attention_deepseek(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    workspace_buffer: Tensor | None,
    seq_lens: Tensor,
    max_q_len: int,
    max_kv_len: int,
    bmm1_scale: float,
    bmm2_scale: float | Tensor,
    o_sf_scale: float,
    batch_size: int,
    window_left: int,
    cum_seq_lens_q: Tensor,
    cum_seq_lens_kv: Tensor,
    enable_pdl: bool | None,
    is_causal: bool,
    return_lse: bool,
    attention_sinks: Tensor | None = None,
    skip_softmax_threshold_scale_factor: float | None = None,
    out: Tensor | None = None,
    lse: Tensor | None = None,
    backend: str = "auto",
    *,
    skip_softmax_threshold: float | Tensor | None = None,
) -> Result:
    """Prefill over packed keys and values, with the head dims of DeepSeek: 192 and 128, or 128, or 256.

    Args:
        query: [tokens, Hq, Dqk]; key: [keys, Hk, Dqk]; value: [keys, Hk, Dv].
        seq_lens: int32 [B], keys of each sequence; they begin at ``cum_seq_lens_kv``.
        o_sf_scale: -1, for the output isn't quantised.
        bmm1_scale, bmm2_scale, window_left, attention_sinks, out, lse: as for
            `trtllm_batch_context_with_kv_cache`.
    Returns, Raises: as `trtllm_batch_context_with_kv_cache`.
    Source: FlashInfer 0.7, flashinfer/prefill.py.
    """
    refuse(o_sf_scale=None if o_sf_scale in (None, -1, -1.0) else o_sf_scale)
    dims = query.shape[-1], value.shape[-1]
    if dims not in _RAGGED_DIMS:
        takes = "192 and 128, 128 and 128, or 256 and 256"
        raise ArgumentError(describe("query", f"head dims {dims[0]} and {dims[1]}", takes))
    check_batch(batch_size, seq_lens)
    skipping = skipping_of(skip_softmax_threshold_scale_factor, skip_softmax_threshold, seq_lens)
    q_start = cum_seq_lens_q[:-1]
    seqs = Seqs(
        q_start, cum_seq_lens_q[1:] - q_start, cum_seq_lens_kv[:-1], seq_lens, max_q_len, max_kv_len
    )
    found = attention_varlen(
        query,
        key,
        value,
        seqs,
        **_prefill(is_causal, bmm1_scale, window_left, attention_sinks, skipping),
    )
    return result_of(found, query.shape[:1], bmm2_scale, out, None, lse, return_lse)


def trtllm_batch_decode_with_kv_cache_mla(
    query: Tensor,
    kv_cache: Tensor,
    workspace_buffer: Tensor | None,
    qk_nope_head_dim: int,
    kv_lora_rank: int,
    qk_rope_head_dim: int,
    block_tables: Tensor,
    seq_lens: Tensor,
    max_seq_len: int,
    sparse_mla_top_k: int = 0,
    out: Tensor | None = None,
    bmm1_scale: float = 1.0,
    bmm2_scale: float | Tensor = 1.0,
    sinks: Tensor | Sequence[Tensor] | None = None,
    skip_softmax_threshold_scale_factor: float | None = None,
    enable_pdl: bool | None = None,
    backend: str = "auto",
    is_var_seq: bool = True,
    uses_shared_paged_kv_idx: bool = True,
    lse: Tensor | None = None,
    return_lse: bool = False,
    cum_seq_lens_q: Tensor | None = None,
    max_q_len: int | None = None,
    multi_ctas_kv_counter_buffer: Tensor | None = None,
    *,
    skip_softmax_threshold: float | Tensor | None = None,
    vote_heads: int | None = None,
) -> Result:
    """Decode of multi-head latent attention over a paged cache of latents.

    Args:
        query: [B, q_len, H, R + P], R = ``kv_lora_rank`` and P = ``qk_rope_head_dim``: absorbed, and
            rotated. Or [rows, H, R + P] with ``cum_seq_lens_q`` and ``max_q_len``.
        kv_cache: [pages, page_size, R + P] or [pages, 1, page_size, R + P]; keys are all channels, values the
            first R. Any page size.
        max_seq_len: the longest of ``seq_lens``, or more.
        bmm1_scale: multiplies q·k; that of the model, by the head dim before absorption.
        vote_heads: heads that decide together; default the lesser of H and `MLA_VOTE_HEADS`.
        block_tables, seq_lens, bmm2_scale, sinks, out, lse: as for `trtllm_batch_context_with_kv_cache`.
            ``qk_nope_head_dim`` isn't read, for nothing is left of it in the absorbed query.
    Returns:
        out [B, q_len, H, R] or [rows, H, R], and with ``return_lse`` also lse [B * q_len, H] or [rows, H].
    Raises: as `trtllm_batch_context_with_kv_cache`.
    Source: FlashInfer 0.7, flashinfer/mla.py.
    """
    skipping = skipping_of(skip_softmax_threshold_scale_factor, skip_softmax_threshold, seq_lens)
    refuse_beside_skipping(skipping, sparse_mla_top_k=sparse_mla_top_k or None)
    if not uses_shared_paged_kv_idx:
        raise ArgumentError(describe("uses_shared_paged_kv_idx", False, "True: keys are values"))
    width = kv_lora_rank + qk_rope_head_dim
    latents = kv_cache.squeeze(1) if kv_cache.ndim == 4 else kv_cache
    if latents.ndim != 3 or latents.shape[-1] != width:
        takes = f"[pages, page_size, {width}] or [pages, 1, page_size, {width}]"
        raise ArgumentError(describe("kv_cache", f"shape {tuple(kv_cache.shape)}", takes))
    if query.shape[-1] != width or query.ndim != (4 if cum_seq_lens_q is None else 3):
        takes = f"[B, q_len, H, {width}], or [rows, H, {width}] with cum_seq_lens_q"
        raise ArgumentError(describe("query", f"shape {tuple(query.shape)}", takes))
    rows = query.shape[:-2]
    q = query.flatten(0, -3)
    q_len = None if cum_seq_lens_q is not None else query.shape[1]
    cum_seq_lens_q, max_q_len = row_starts(q.shape[0], seq_lens, q_len, cum_seq_lens_q, max_q_len)
    cache = PagedKV.from_latent(latents, kv_lora_rank, block_tables)
    skip = None
    if skipping is not None:
        skip = SkipSoftmaxDecode(
            **skipping, vote_heads=vote_heads or min(q.shape[1], MLA_VOTE_HEADS)
        )
    found = attention_paged(
        q,
        cache,
        seqs_of(cum_seq_lens_q, seq_lens, max_q_len, max_seq_len, cache),
        scale=scale_of(bmm1_scale),
        sinks=sinks_of(sinks),
        phase=Phase.DECODE,
        plan=Plan(skip_decode=skip),
    )
    return result_of(found, rows, bmm2_scale, out, None, lse, return_lse)


def _prefill(
    causal: bool,
    bmm1_scale: float,
    window_left: int,
    sinks: Tensor | Sequence[Tensor] | None,
    skipping: dict[str, Any] | None,
) -> dict[str, Any]:
    """What both functions that prefill ask of the kernels."""
    return {
        "causal": causal,
        "scale": scale_of(bmm1_scale),
        "window": window_of(window_left),
        "sinks": sinks_of(sinks),
        "phase": Phase.PREFILL,
        "plan": Plan(skip=None if skipping is None else SkipSoftmax(**skipping)),
    }
