"""The Triton kernels in Triton's interpreter, dense and with N:M, against the oracle."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from modelopt_sparse.kernels import NMSparsity, Phase, Plan, ScoreGrid, Seqs, attention_triton
from tests.inputs import check, features, integers, needs_interpreter, topical
from tests.thinned import thinned

pytestmark = needs_interpreter

DTYPES = [torch.float32, torch.float16]
# rows before position 0, no rows, no keys, one row
LENGTHS = ([40, 1, 0, 9, 3], [61, 33, 5, 4, 0])
FEATURES = [
    "", "full", "window", "wide_window", "softcap", "sinks", "bounds", "mask", "head_mask",
    "tile_mask", "bias", "head_bias", "scale",
    "full bounds", "window sinks", "softcap head_bias", "full tile_mask", "bounds sinks",
    "head_mask bias scale",
]  # fmt: skip
NM_FEATURES = ["", "full", "window sinks", "softcap", "bounds", "tile_mask", "head_bias"]
PATTERNS = [(1, 4), (2, 4), (3, 4), (2, 8), (4, 8)]
PATTERN_IDS = [f"{n}:{m}" for n, m in PATTERNS]


def small(make=topical, lengths=LENGTHS, **more):
    return make(*lengths, **{"heads": 2, "kv_heads": 1, "dtype": torch.float32} | more)


@thinned(2, names=FEATURES, dtype=DTYPES)
def test_dense_attention_is_the_oracle_with_every_feature(names, dtype):
    inputs = small(dtype=dtype)
    check(inputs, Plan(), attention_triton, **features(names, inputs))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("heads", "kv_heads"), [(3, 3), (4, 2), (3, 1)], ids=["3", "4kv2", "3kv1"])
def test_dense_attention_is_the_oracle_in_other_layouts(heads, kv_heads, dtype):
    lengths = ([150, 1, 70], [150, 70, 131])
    inputs = small(lengths=lengths, heads=heads, kv_heads=kv_heads, dim=24, dim_v=40, dtype=dtype)
    check(inputs, Plan(), attention_triton)


def test_every_length_around_a_launch_tile_is_the_oracle():
    lens = [15, 16, 17, 63, 64, 65]
    inputs = small(lengths=(lens, [n + 64 for n in lens]), heads=1, dim=8, dtype=torch.float16)
    check(inputs, Plan(), attention_triton)


@pytest.mark.parametrize("phase", Phase)
def test_dense_attention_does_not_depend_on_the_phase(phase):
    inputs = small(lengths=([4, 1, 20], [33, 40, 20]))
    check(inputs, Plan(), attention_triton, phase=phase)


@pytest.mark.parametrize(("q_lens", "k_lens"), [([], []), ([0, 0], [0, 3]), ([2], [0])], ids=str)
@pytest.mark.parametrize("plan", [Plan(), Plan(NMSparsity(2, 4))], ids=["dense", "2:4"])
def test_calls_with_nothing_to_see_are_zero(plan, q_lens, k_lens):
    inputs = small(lengths=(q_lens, k_lens))
    check(inputs, plan, attention_triton)


@thinned(2, shields={"": (0, 0), "shields": (3, 5)}, pattern=PATTERNS, dtype=DTYPES)
def test_nm_keeps_the_keys_of_the_oracle_ties_included(shields, pattern, dtype):
    (sinks, window), (n, m) = shields, pattern
    inputs = small(integers, dtype=dtype)
    _, wanted = check(inputs, Plan(NMSparsity(n, m, sinks, window)), attention_triton)
    assert wanted.nm_ties > 0


@pytest.mark.parametrize("names", NM_FEATURES)
@pytest.mark.parametrize("nm", [(2, 4, 2, 7), (3, 8, 0, 0)], ids=["2:4", "3:8"])
def test_nm_is_the_oracle_with_every_feature(nm, names):
    inputs = small(lengths=([40, 1, 9], [61, 33, 4]), dtype=torch.float16)
    check(inputs, Plan(NMSparsity(*nm)), attention_triton, **features(names, inputs))


@pytest.mark.parametrize("n_k", [70, 75, 77], ids="of{}".format)
def test_the_dense_window_and_groups_follow_absolute_positions_in_a_chunk(n_k):
    inputs = small(integers, lengths=([21], [n_k]))
    check(inputs, Plan(NMSparsity(1, 4, 5, 6)), attention_triton)


def test_exactly_n_of_equal_scores_stay_the_first_ones():
    inputs = small(integers, lengths=([8], [8]), dim_v=8, gaps=False)
    inputs.q[:], inputs.k[:] = 1.0, 0.0
    inputs.v[:] = torch.eye(8)[:, None]
    for n, m in PATTERNS:
        plan = Plan(NMSparsity(n, m, 0, 0))
        out = attention_triton(*inputs.qkv, plan=plan, causal=False).out
        kept = (torch.arange(8) % m < n).float()
        torch.testing.assert_close(out, (kept / kept.sum()).expand(8, 2, 8))


def test_a_sequence_that_decodes_is_dense_under_nm():
    inputs = small(lengths=([1, 20, 1], [70, 20, 33]))
    dense = attention_triton(*inputs.qkv)
    sparse = attention_triton(*inputs.qkv, plan=Plan(NMSparsity(1, 4, 0, 0)))
    of = [slice(start, start + n) for start, n in zip(inputs.seqs.q_start, (1, 20, 1), strict=True)]
    torch.testing.assert_close(sparse.out[of[0]], dense.out[of[0]])
    torch.testing.assert_close(sparse.out[of[2]], dense.out[of[2]])
    assert not torch.allclose(sparse.out[of[1]], dense.out[of[1]])


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("nm", [None, NMSparsity(2, 4, 1, 3)], ids=["", "2:4"])
@pytest.mark.parametrize("n_q", [35, 1])
def test_what_hidden_keys_hold_never_shows(n_q, nm, poison):
    inputs = small(lengths=([n_q], [70]), gaps=False)
    hidden = torch.arange(70) % 7 == 0
    options = {"mask": ScoreGrid((~hidden).expand(1, 1, n_q, 70)), "plan": Plan(nm)}
    clean = attention_triton(*inputs.qkv, **options)
    inputs.k[hidden], inputs.v[hidden] = poison, poison
    poisoned = attention_triton(*inputs.qkv, **options)
    assert clean.out.isfinite().all()
    assert torch.equal(poisoned.out, clean.out) and torch.equal(poisoned.lse, clean.lse)


@pytest.mark.parametrize("names", ["bounds", "window"])
def test_what_lies_outside_of_every_row_s_limits_never_shows(names):
    inputs = small(lengths=([5], [70]), gaps=False)
    options = {"window": 9}
    seen = slice(57, 70)
    if names == "bounds":
        options = {"bounds": torch.tensor([[3, 9], [50, 60], [4, 4], [52, 53], [5, 8]]).int()}
        seen = torch.cat([torch.arange(3, 9), torch.arange(50, 60)])
    clean = attention_triton(*inputs.qkv, **options)
    hidden = torch.ones(70, dtype=torch.bool)
    hidden[seen] = False
    inputs.k[hidden], inputs.v[hidden] = math.nan, math.nan
    assert torch.equal(attention_triton(*inputs.qkv, **options).out, clean.out)


@pytest.mark.parametrize("scale", [-0.4, 0.0])
@pytest.mark.parametrize("names", ["", "softcap", "head_bias"])
def test_scales_that_are_not_positive_are_the_oracle(names, scale):
    inputs = small(lengths=([20, 1], [33, 40]))
    check(inputs, Plan(), attention_triton, **features(names, inputs) | {"scale": scale})


def test_strides_are_followed():
    inputs = small(lengths=([33], [70]), gaps=False)
    plain = attention_triton(*inputs.qkv)
    q, k, v = (
        x.transpose(0, 1).contiguous().transpose(0, 1).repeat(1, 2, 1)[:, : x.shape[1]]
        for x in inputs.qkv[:3]
    )
    assert q.stride() != inputs.q.stride()
    assert torch.equal(attention_triton(q, k, v, inputs.seqs).out, plain.out)
    shared = torch.stack([k, k], 2)[:, :, 0]
    assert torch.equal(attention_triton(q, shared, v, inputs.seqs).out, plain.out)


def test_bf16_is_computed_in_fp32_here():
    inputs = small(dtype=torch.bfloat16)
    check(inputs, Plan(NMSparsity(2, 4, 1, 3)), attention_triton)


def test_longer_bounds_on_the_lengths_change_nothing():
    inputs = small()
    columns = (getattr(inputs.seqs, name) for name in ("q_start", "q_len", "k_start", "k_len"))
    roomy = Seqs(*columns, inputs.seqs.max_q + 200, inputs.seqs.max_k + 300)
    for plan in (Plan(), Plan(NMSparsity(2, 4, 0, 0))):
        plain = attention_triton(*inputs.qkv, plan=plan)
        assert torch.equal(attention_triton(*inputs.qkv[:3], roomy, plan=plan).out, plain.out)


def test_grids_whose_keys_do_not_lie_side_by_side():
    inputs = small(dtype=torch.float32)
    options = features("mask", inputs)
    wanted = attention_triton(*inputs.qkv, **options)
    values = options["mask"].values
    turned = values.transpose(2, 3).contiguous().transpose(2, 3)
    assert turned.stride(-1) != 1
    options["mask"] = replace(options["mask"], values=turned)
    assert torch.equal(attention_triton(*inputs.qkv, **options).out, wanted.out)
