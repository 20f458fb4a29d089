"""Every bad argument of `attention_varlen` is a typed error that names it."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from modelopt_sparse.errors import ArgumentError, ArgumentTypeError, SparseAttentionError
from modelopt_sparse.kernels.api import attention_varlen
from modelopt_sparse.kernels.types import (
    NMSparsity,
    Plan,
    ScoreGrid,
    Seqs,
    SkipSoftmax,
    SkipSoftmaxDecode,
)

Q, K, V = torch.ones(6, 4, 8), torch.ones(9, 2, 8), torch.ones(9, 2, 5)
SEQS = Seqs.from_lengths([4, 2], [5, 4])
NAN, INF = math.nan, math.inf
NOT_NUMBERS = ["1", True, [1], 1j]
NOT_FINITE = [NAN, INF, -INF]
NOT_INTS = [1.5, "2", True, NAN, None]
BUILTIN = (ValueError, TypeError, NotImplementedError)


def refused(name: str, **changed) -> SparseAttentionError:
    """The error of a call with these arguments changed."""
    arguments = {"q": Q, "k": K, "v": V, "seqs": SEQS} | changed
    with pytest.raises(SparseAttentionError) as caught:
        attention_varlen(**arguments)
    assert isinstance(caught.value, BUILTIN)
    assert name in str(caught.value), f"{caught.value} doesn't name {name}"
    assert "got" in str(caught.value) and "takes" in str(caught.value)
    return caught.value


def label(value) -> str:
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype)[6:]}{list(value.shape)}{value.device.type}"
    return repr(value)[:40]


def each(**bad):
    """(argument, value) pairs as parameters with readable ids."""
    return pytest.mark.parametrize(
        ("name", "value"),
        [
            pytest.param(name, value, id=f"{name}={label(value)}")
            for name, values in bad.items()
            for value in values
        ],
    )


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


def test_the_good_call_is_good():
    assert attention_varlen(Q, K, V, SEQS).out.shape == (6, 4, 5)


@each(
    q=[
        None,
        [[1.0]],
        3,
        Q[0],
        Q[None],
        Q.int(),
        Q.bool(),
        Q.to(torch.complex64),
        Q[..., :0],
        Q[:, :0],
    ],
    k=[None, "k", K[0], K.double(), K.half(), K.to("meta"), K[..., :4], K[:, :0], K.int()],
    v=[
        None,
        1.0,
        V[0],
        V[None],
        V.double(),
        V.bfloat16(),
        V.to("meta"),
        V[:8],
        V[:, :1],
        V[..., :0],
    ],
)
def test_tensors_of_a_wrong_kind_shape_dtype_or_device(name, value):
    refused(name, **{name: value})


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_a_last_dim_that_is_not_contiguous(name):
    good = {"q": Q, "k": K, "v": V}[name]
    error = refused(name, **{name: good.transpose(1, 2).contiguous().transpose(1, 2)})
    assert "contiguous" in str(error)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 3), (2, 4), (3, 2)])
def test_query_heads_that_are_no_multiple_of_kv_heads(heads, kv_heads):
    refused(
        "k", q=torch.ones(6, heads, 8), k=torch.ones(9, kv_heads, 8), v=torch.ones(9, kv_heads, 5)
    )


@each(
    causal=[None, 1, 0, "yes", torch.tensor(True)],
    details=[None, 1, "no"],
    scale=[*NOT_NUMBERS, *NOT_FINITE, torch.tensor(1.0)],
    softcap=[*NOT_NUMBERS, *NOT_FINITE, 0, 0.0, -1.0, torch.tensor(1.0)],
    window=[*NOT_INTS[:-1], 0, -1, INF, torch.tensor(3)],
    sinks=[1.0, [1.0] * 4, torch.ones(3), torch.ones(4, 1), torch.ones(4).int(), torch.ones(4).bool(),
           torch.ones(4, device="meta")],
    bounds=[3, [[0, 1]] * 6, torch.zeros(6, 2), torch.zeros(6, 2).long(), torch.zeros(5, 2).int(),
            torch.zeros(6, 3).int(), torch.zeros(12).int(), torch.zeros(6, 2).int().to("meta")],
    phase=["prefill", 1, True],
    plan=[None, {}, "dense", SkipSoftmax(0.1)],
    seqs=[None, int32(0, 4), ((0, 4), (4, 2))],
)  # fmt: skip
def test_options_of_a_wrong_kind_or_out_of_range(name, value):
    refused(name, **{name: value})


def test_windows_that_contradict_other_options():
    refused("window", window=3, causal=False)
    refused("window", window=3, bounds=torch.zeros(6, 2, dtype=torch.int32))
    refused("window", window=0)


GRID = torch.ones(2, 1, 4, 5)


@pytest.mark.parametrize("name", ["mask", "bias"])
@pytest.mark.parametrize(
    "change",
    [
        lambda x: x[0], lambda x: x[..., None], lambda x: x[:1], lambda x: x.repeat(1, 3, 1, 1),
        lambda x: x[:, :, :3], lambda x: x[..., :4], lambda x: x.to("meta"), lambda x: x.int(),
        lambda x: None, lambda x: [1],
    ],
    ids=["3d", "5d", "batch", "heads", "rows", "keys", "device", "dtype", "None", "list"],
)  # fmt: skip
def test_grids_that_don_t_fit(change, name):
    values = GRID.bool() if name == "mask" else GRID
    assert attention_varlen(Q, K, V, SEQS, **{name: ScoreGrid(values)}).out.shape == (6, 4, 5)
    refused(name, **{name: ScoreGrid(change(values))})


@pytest.mark.parametrize("name", ["mask", "bias"])
@pytest.mark.parametrize("start", ["row_start", "key_start"])
@pytest.mark.parametrize(
    "value",
    [3, [0, 0], int32(0), int32(0, 0, 0), int32(-1, 0), int32(9, 0), torch.zeros(2),
     torch.zeros(2, dtype=torch.int64), int32(0, 0).to("meta")],
    ids=label,
)  # fmt: skip
def test_grid_offsets_that_don_t_fit(value, start, name):
    values = GRID.bool() if name == "mask" else GRID
    refused(start, **{name: ScoreGrid(values, **{start: value})})


def test_grids_of_the_wrong_dtype_or_no_grids_at_all():
    refused("mask", mask=ScoreGrid(GRID))
    refused("bias", bias=ScoreGrid(GRID.bool()))
    refused("mask", mask=GRID.bool())
    refused("bias", bias=GRID)


COLUMN = [None, [0, 4], 3, int32(0), int32(0, 1, 1), int32(0, 4)[None], torch.zeros(2),
          torch.zeros(2).long(), int32(0, 4).to("meta")]  # fmt: skip


@each(
    q_start=[*COLUMN, int32(-1, 4), int32(0, 5), int32(7, 0)],
    q_len=[*COLUMN[:-1], int32(-1, 2), int32(4, 3), int32(5, 2), int32(7, 0)],
    k_start=[*COLUMN, int32(-1, 5), int32(0, 6), int32(10, 0)],
    k_len=[*COLUMN, int32(-1, 2), int32(5, 5), int32(6, 2), int32(10, 0)],
    max_q=[*NOT_INTS, -1, 3, torch.tensor(4)],
    max_k=[*NOT_INTS, -1, 4, torch.tensor(5)],
    min_q=[*NOT_INTS, -1, 5, torch.tensor(1)],
)
def test_sequences_that_don_t_fit_the_tensors(name, value):
    # starts and lengths that don't fit together: the message may name either
    either = isinstance(value, torch.Tensor) and value.dtype == torch.int32
    refused(f"seqs.{name[0]}_" if either else name, seqs=replace(SEQS, **{name: value}))


@each(
    m=[*NOT_INTS, 0, 1, 2, 3, 5, 16, -4],
    n=[*NOT_INTS, 0, -1, 5],
    num_sink_tokens=[*NOT_INTS, -1],
    dense_window_size=[*NOT_INTS, -1, INF],
)
def test_nm_numbers_that_are_not_taken(name, value):
    refused(name, plan=Plan(nm=replace(NMSparsity(), **{name: value})))


FRACTIONS = [*NOT_NUMBERS, *NOT_FINITE, -0.1, -1e-30, 1.0000001, 2, -1, "0.1"]
TENSORS = [
    torch.tensor(0.1).double(), torch.tensor(0.1).half(), torch.tensor(1), torch.full((2, 4, 1), 0.1),
    torch.full((3, 4), 0.1), torch.full((2, 3), 0.1), torch.full((3,), 0.1), torch.full((1, 1, 1), 0.1),
    torch.full((2, 4), 0.1, device="meta"),
]  # fmt: skip
TILES = [*NOT_INTS, 0, 8, 48, 100, 256, -16]


@pytest.mark.parametrize(
    ("part", "kind"), [("skip", SkipSoftmax), ("skip_decode", SkipSoftmaxDecode)]
)
@each(
    threshold=[*FRACTIONS, *TENSORS],
    block_keys=TILES,
    count_thresholds=[
        None,
        0.1,
        [0.1],
        torch.tensor([0.1]),
        *[(0.1, bad) for bad in FRACTIONS],
        (None,),
    ],
    exact_normalizer=[None, 1, "yes"],
)
def test_skip_numbers_that_are_not_taken(part, kind, name, value):
    refused(name, plan=Plan(**{part: replace(kind(0.1), **{name: value})}))


@each(block_rows=TILES)
def test_row_tiles_that_are_not_taken(name, value):
    refused(name, plan=Plan(skip=SkipSoftmax(0.1, **{name: value})))


@each(
    segment_keys=[*NOT_INTS, 0, -64, 32, 96, 4095],
    vote_heads=[True, 0, 3, 4, "all"],
)
def test_decode_numbers_that_are_not_taken(name, value):
    refused(name, plan=Plan(skip_decode=SkipSoftmaxDecode(0.1, **{name: value})))


@each(
    nm=[(2, 4), SkipSoftmax(0.1), True],
    skip=[0.1, NMSparsity(), SkipSoftmaxDecode(0.1)],
    skip_decode=[0.1, NMSparsity(), SkipSoftmax(0.1)],
)
def test_plan_parts_of_another_kind(name, value):
    refused(name, plan=Plan(**{name: value}))


@pytest.mark.parametrize("threshold", [None, 0.0])
def test_a_plan_part_that_is_off_is_checked_all_the_same(threshold):
    refused("block_keys", plan=Plan(skip=SkipSoftmax(threshold, block_keys=48)))
    refused("segment_keys", plan=Plan(skip_decode=SkipSoftmaxDecode(threshold, segment_keys=100)))
    refused("num_sink_tokens", plan=Plan(nm=NMSparsity(4, 4, -1)))


def test_arguments_that_are_unknown_are_refused():
    with pytest.raises(TypeError, match="dropout"):
        attention_varlen(Q, K, V, SEQS, dropout=0.1)


@pytest.mark.parametrize("value", [10**400, -(10**400)], ids=["huge", "-huge"])
def test_an_int_too_large_for_a_float_is_refused_by_name(value):
    for name, options in (
        ("scale", {"scale": value}),
        ("softcap", {"softcap": value}),
        ("threshold", {"plan": Plan(skip=SkipSoftmax(value))}),
    ):
        with pytest.raises(ArgumentError, match=name):
            attention_varlen(Q, K, V, SEQS, **options)


@pytest.mark.parametrize(
    "cu", [[0, 2], torch.tensor([0.0, 2.5]), torch.tensor([0, 2]), torch.zeros(1, 2).int(), None]
)
def test_cumulative_lengths_are_int32_columns(cu):
    good = torch.tensor([0, 2], dtype=torch.int32)
    with pytest.raises(ArgumentError, match="cu_q"):
        Seqs.from_cu_seqlens(cu, 2)
    if cu is not None:
        with pytest.raises(ArgumentError, match="cu_k"):
            Seqs.from_cu_seqlens(good, 2, cu, 2)


@pytest.mark.parametrize("lengths", [[True], ["a"], [1.0], [None]], ids=repr)
def test_lengths_are_ints(lengths):
    with pytest.raises(ArgumentTypeError, match="q_lens"):
        Seqs.from_lengths(lengths)
    with pytest.raises(ArgumentTypeError, match="k_lens"):
        Seqs.from_lengths([1], lengths)
