"""FlashInfer's functions: what they return is what packed attention does, and what they refuse."""

from __future__ import annotations

import inspect
import math

import pytest
import torch

from modelopt_sparse import ArgumentError
from modelopt_sparse.integrations import flashinfer_api as api
from modelopt_sparse.kernels import (
    Phase,
    Plan,
    SkipSoftmax,
    SkipSoftmaxDecode,
    attention_varlen,
)
from tests.inputs import topical
from tests.paged import LAYOUTS, in_pages

WORKSPACE = torch.zeros(0)
SCALE = 0.25
LENGTHS = [300, 150, 0, 70]
ROWS = {"context": [40, 150, 0, 3], "decode": [1] * 4}
NUMBERS = torch.tensor([0.3, 0.05, 0.1, 1.0])


def inputs_of(rows, lengths=LENGTHS, **more):
    more = {
        "dim": 16,
        "dim_v": 16,
        "dtype": torch.float32,
        "strength": 9.0,
        "span": 128,
        "gaps": False,
    } | more
    return topical(rows, lengths, **more)


def cumulative(lengths) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def cache_of(inputs, layout: str):
    """kv_cache, block_tables and the arguments that say how they lie."""
    cache = in_pages(inputs.k, inputs.v, inputs.seqs, 16, layout)
    if layout == "nhd":
        return (cache.k, cache.v), cache.block_table, {"kv_layout": "NHD"}
    if layout == "two_tables":
        tables = torch.stack(cache.block_tables, 1)
        return (cache.k, cache.v), tables, {"kv_layout": "NHD", "uses_shared_paged_kv_idx": False}
    k, v = cache.k.transpose(1, 2), cache.v.transpose(1, 2)
    if layout == "together":
        return torch.stack([k, v], 1), cache.block_table, {}
    return (k, v), cache.block_table, {}


def context(inputs, layout="hnd", **more):
    kv, tables, how = cache_of(inputs, layout)
    seqs = inputs.seqs
    cu_q, cu_k = (cumulative(x.tolist()) for x in (seqs.q_len, seqs.k_len))
    return api.trtllm_batch_context_with_kv_cache(
        inputs.q, kv, WORKSPACE, tables, seqs.k_len, seqs.max_q, seqs.max_k + 999, SCALE,
        **({"bmm2_scale": 1.0, "batch_size": len(seqs.q_len), "cum_seq_lens_q": cu_q,
            "cum_seq_lens_kv": cu_k} | how | more),
    )  # fmt: skip


def decode(inputs, layout="hnd", **more):
    kv, tables, how = cache_of(inputs, layout)
    return api.trtllm_batch_decode_with_kv_cache(
        inputs.q, kv, WORKSPACE, tables, inputs.seqs.k_len, inputs.seqs.max_k + 999,
        **({"bmm1_scale": SCALE} | how | more),
    )  # fmt: skip


CALLS = {"context": (context, Phase.PREFILL), "decode": (decode, Phase.DECODE)}
each_call = pytest.mark.parametrize("name", CALLS)


def wanted(name, inputs, threshold=None, **options):
    skip = SkipSoftmax if name == "context" else SkipSoftmaxDecode
    part = {"context": "skip", "decode": "skip_decode"}[name]
    plan = Plan(**{part: skip(threshold)})
    options = {"scale": SCALE, "phase": CALLS[name][1], "plan": plan} | options
    return attention_varlen(*inputs.qkv, **options)


@each_call
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_read(name, layout):
    inputs = inputs_of(ROWS[name])
    assert torch.equal(CALLS[name][0](inputs, layout), wanted(name, inputs).out)


def test_one_storage_may_hold_keys_that_are_values():
    inputs = inputs_of(ROWS["decode"])
    kv, tables, _ = cache_of(inputs, "hnd")
    same = inputs.__class__(inputs.q, inputs.k, inputs.k, inputs.seqs)
    found = api.trtllm_batch_decode_with_kv_cache(
        inputs.q, kv[0][:, None], WORKSPACE, tables, inputs.seqs.k_len, 300, SCALE
    )
    assert torch.equal(found, wanted("decode", same).out)


@each_call
@pytest.mark.parametrize(
    ("given", "options"),
    [
        ({"window_left": 20}, {"window": 21}),
        ({"window_left": 0}, {"window": 1}),
        ({"sinks": torch.tensor([0.5, -1.0, 2.0, 0.0])}, {"sinks": torch.tensor([0.5, -1.0, 2.0, 0.0])}),
        ({"sinks": [torch.zeros(4)]}, {"sinks": torch.zeros(4)}),
    ],
    ids=["window", "own key", "sinks", "list of sinks"],
)  # fmt: skip
def test_options_are_followed(name, given, options):
    inputs = inputs_of(ROWS[name])
    assert torch.equal(CALLS[name][0](inputs, **given), wanted(name, inputs, **options).out)


def test_context_without_causality():
    inputs = inputs_of(ROWS["context"])
    found = context(inputs, causal=False)
    assert torch.equal(found, wanted("context", inputs, causal=False).out)


@each_call
def test_a_factor_is_divided_by_each_sequences_own_length(name):
    inputs = inputs_of(ROWS[name], [600, 300, 0, 270], strength=3.2)
    found = CALLS[name][0](inputs, skip_softmax_threshold_scale_factor=30.0, return_lse=True)
    lambdas = torch.tensor([[0.05], [0.1], [1.0], [30 / 270]])
    expected = wanted(name, inputs, lambdas)
    assert torch.equal(found[0], expected.out) and torch.equal(found[1], expected.lse)
    assert not torch.equal(found[0], wanted(name, inputs).out)
    # A length of the batch, as that of its longest sequence, would give another result.
    assert not torch.equal(found[0], wanted(name, inputs, 0.05).out)


@each_call
def test_a_factor_above_a_length_counts_as_1(name):
    inputs = inputs_of(ROWS[name])
    found = CALLS[name][0](inputs, skip_softmax_threshold_scale_factor=1e6)
    assert torch.equal(found, wanted(name, inputs, 1.0).out)


@each_call
def test_a_threshold_is_lambda_itself(name):
    inputs = inputs_of(ROWS[name])
    for value in (0.3, NUMBERS):
        found = CALLS[name][0](inputs, skip_softmax_threshold=value)
        expected = wanted(name, inputs, value if value is not NUMBERS else NUMBERS[:, None])
        assert torch.equal(found, expected.out)
        assert not torch.equal(found, wanted(name, inputs).out)


@each_call
@pytest.mark.parametrize("value", [None, 0, 0.0, -0.0])
def test_nothing_and_zero_are_dense(name, value):
    inputs = inputs_of(ROWS[name])
    dense = wanted(name, inputs).out
    for given in ("skip_softmax_threshold", "skip_softmax_threshold_scale_factor"):
        assert torch.equal(CALLS[name][0](inputs, **{given: value}), dense)


@each_call
def test_results_go_where_the_caller_says(name):
    inputs = inputs_of(ROWS[name], dtype=torch.float16)
    expected = wanted(name, inputs)
    out, lse = torch.full_like(inputs.q, math.nan), torch.full(inputs.q.shape[:2], math.nan)
    found = CALLS[name][0](inputs, out=out, lse=lse, return_lse=True)
    assert found[0] is out and found[1] is lse
    assert torch.equal(out, expected.out) and torch.equal(lse, expected.lse)
    wide = CALLS[name][0](inputs, out_dtype=torch.float32, bmm2_scale=torch.tensor(0.5))
    assert wide.dtype == torch.float32 and torch.equal(wide, (expected.out * 0.5).float())


def test_several_rows_of_each_sequence_decode():
    inputs = inputs_of([3, 3, 3], [300, 150, 70])
    found = decode(inputs, q_len_per_req=3)
    assert torch.equal(found, wanted("decode", inputs).out)
    ragged = inputs_of([3, 1, 2], [300, 150, 70])
    cu = cumulative([3, 1, 2])
    found = decode(ragged, q_len_per_req=None, cum_seq_lens_q=cu, max_q_len=3)
    assert torch.equal(found, wanted("decode", ragged).out)


@pytest.mark.parametrize(("dim", "dim_v"), [(192, 128), (128, 128), (256, 256)])
def test_ragged_prefill_of_deepseek(dim, dim_v):
    inputs = inputs_of([40, 70, 3], [40, 90, 30], dim=dim, dim_v=dim_v)
    seqs = inputs.seqs
    cu_q, cu_k = (cumulative(x.tolist()) for x in (seqs.q_len, seqs.k_len))
    found = api.trtllm_ragged_attention_deepseek(
        *inputs.qkv[:3], WORKSPACE, seqs.k_len, 70, 90, SCALE, 1.0, -1, 3, -1, cu_q, cu_k, None, True, True,
        skip_softmax_threshold=0.5,
    )  # fmt: skip
    expected = wanted("context", inputs, 0.5)
    assert torch.equal(found[0], expected.out) and torch.equal(found[1], expected.lse)


def latents(q_len=1, heads=32, rank=32, rope=16):
    """Inputs of multi-head latent attention; the query [B, q_len, H, rank + rope]."""
    inputs = inputs_of([q_len] * 3, [300, 150, 70], heads=heads, kv_heads=1, dim=rank + rope)
    cache = in_pages(inputs.k, inputs.k, inputs.seqs, 32)
    packed = inputs.__class__(inputs.q, inputs.k, inputs.k[..., :rank], inputs.seqs)
    return packed, cache.k.squeeze(2), cache.block_table, inputs.q.view(3, q_len, heads, -1)


def mla(query, kv_cache, tables, seq_lens, **more):
    return api.trtllm_batch_decode_with_kv_cache_mla(
        query, kv_cache, WORKSPACE, 128, 32, 16, tables, seq_lens, 300, bmm1_scale=SCALE, **more
    )


@pytest.mark.parametrize("q_len", [1, 2])
def test_latents_decode(q_len):
    packed, cache, tables, query = latents(q_len)
    expected = wanted("decode", packed)
    for kv_cache in (cache, cache[:, None]):
        out, lse = mla(query, kv_cache, tables, packed.seqs.k_len, return_lse=True)
        assert out.shape == (3, q_len, 32, 32) and torch.equal(out.flatten(0, 1), expected.out)
        assert lse.shape == (3 * q_len, 32) and torch.equal(lse, expected.lse)
    cu = cumulative([q_len] * 3)
    out = mla(packed.q, cache, tables, packed.seqs.k_len, cum_seq_lens_q=cu, max_q_len=q_len)
    assert torch.equal(out, expected.out)


@pytest.mark.parametrize("votes", [None, 1, 32])
def test_latents_skip_by_groups_of_heads(votes):
    packed, cache, tables, query = latents()
    found = mla(
        query, cache, tables, packed.seqs.k_len, skip_softmax_threshold=0.5, vote_heads=votes
    )
    plan = Plan(skip_decode=SkipSoftmaxDecode(0.5, vote_heads=votes or api.MLA_VOTE_HEADS))
    assert torch.equal(found.flatten(0, 1), wanted("decode", packed, plan=plan).out)


LATENT = latents()
REFUSED = {
    "both": ({"skip_softmax_threshold": 0.1, "skip_softmax_threshold_scale_factor": 1.0},
             "skip_softmax_threshold_scale_factor: got skip_softmax_threshold as well"),
    "negative": ({"skip_softmax_threshold_scale_factor": -1.0},
                 "skip_softmax_threshold_scale_factor: got -1"),
    "nan": ({"skip_softmax_threshold_scale_factor": math.nan},
            "skip_softmax_threshold_scale_factor: got nan"),
    "above 1": ({"skip_softmax_threshold": 1.5}, "threshold: got 1.5"),
    "shape": ({"skip_softmax_threshold": NUMBERS[:2]}, "skip_softmax_threshold: got torch.float32 (2,)"),
    "dtype": ({"skip_softmax_threshold": NUMBERS.double()}, "skip_softmax_threshold: got torch.float64"),
    "layout": ({"kv_layout": "DHN"}, "kv_layout: got 'DHN'"),
    "scale": ({"bmm1_scale": torch.tensor(0.5)}, "bmm1_scale: got a Tensor"),
    "block scales": ({"kv_cache_sf": (1, 2)}, "kv_cache_sf: got"),
    "fp4": ({"out_dtype": "nvfp4"}, "out_dtype: got nvfp4"),
    "out": ({"out": torch.zeros(1)}, "out: got torch.float32 (1,)"),
    "lse": ({"lse": torch.zeros(4, 4).double()}, "lse: got torch.float64"),
    "sinks": ({"sinks": [NUMBERS, NUMBERS]}, "sinks: got 2 tensors"),
    "mask": ({"mask": NUMBERS}, "mask: got a Tensor"),
    "o_scale": ({"o_scale": 2.0}, "o_scale: got 2.0"),
    "rows": ({"q_len_per_req": 2}, "query: got 4 rows, q_len_per_req 2"),
    "no most": ({"cum_seq_lens_q": cumulative([1] * 4)}, "max_q_len: got None"),
    "block sparse": ({"enable_block_sparse_attention": True, "skip_softmax_threshold": 0.1},
                     "enable_block_sparse_attention: got True beside a skip-softmax threshold"),
    "one table": ({"uses_shared_paged_kv_idx": False}, "block_tables: got shape"),
}  # fmt: skip


@pytest.mark.parametrize(("given", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_not_taken_is_refused_by_name(given, message):
    with pytest.raises(ArgumentError) as error:
        decode(inputs_of(ROWS["decode"]), **given)
    assert isinstance(error.value, ValueError)
    assert str(error.value).startswith(message), error.value


def test_sparse_latents_are_refused_by_both_names():
    packed, cache, tables, query = LATENT
    with pytest.raises(ValueError, match="sparse_mla_top_k: got 64 beside a skip-softmax"):
        mla(
            query, cache, tables, packed.seqs.k_len, sparse_mla_top_k=64, skip_softmax_threshold=0.1
        )
    with pytest.raises(ValueError, match="sparse_mla_top_k: got 64; takes its default"):
        mla(query, cache, tables, packed.seqs.k_len, sparse_mla_top_k=64)
    with pytest.raises(ValueError, match="kv_cache: got shape"):
        mla(query, cache[..., :40], tables, packed.seqs.k_len)
    with pytest.raises(ValueError, match="query: got shape"):
        mla(packed.q, cache, tables, packed.seqs.k_len)


def test_ragged_head_dims_and_outputs_that_are_not_taken():
    inputs = inputs_of([4], [4])
    one = torch.tensor([4]).int()
    cu = cumulative([4])
    call = [*inputs.qkv[:3], WORKSPACE, one, 4, 4, SCALE, 1.0, -1, 1, -1, cu, cu, None, True, False]
    with pytest.raises(ValueError, match="query: got head dims 16 and 16"):
        api.trtllm_ragged_attention_deepseek(*call)
    call[9] = 2.0
    with pytest.raises(ValueError, match="o_sf_scale: got 2"):
        api.trtllm_ragged_attention_deepseek(*call)


@each_call
def test_what_only_chooses_among_their_kernels_changes_nothing(name):
    inputs = inputs_of(ROWS[name])
    found = CALLS[name][0](inputs, enable_pdl=True, backend="trtllm-gen")
    assert torch.equal(found, wanted(name, inputs).out)


@pytest.mark.parametrize("name", [n for n in vars(api) if n.startswith("trtllm_")])
def test_every_argument_is_in_the_docstring_of_its_function_or_of_the_module(name):
    function = getattr(api, name)
    shared = api.__doc__ + api.trtllm_batch_context_with_kv_cache.__doc__
    missing = [
        p for p in inspect.signature(function).parameters if p not in shared + function.__doc__
    ]
    refused = {"o_sf_vec_size", "o_sf_scale", "kv_cache_sf", "o_scale", "mask", "sparse_mla_top_k",
               "enable_block_sparse_attention"}  # fmt: skip
    plain = {"query", "key", "value", "batch_size", "max_q_len", "max_kv_len", "kv_layout", "causal",
             "is_causal", "out_dtype"}  # fmt: skip
    assert set(missing) <= refused | plain
