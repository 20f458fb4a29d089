"""Padded batches become packed sequences: nothing is copied, moved or lost on the way."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import masking_utils as mu

from modelopt_sparse.errors import ArgumentError
from modelopt_sparse.integrations import packing
from modelopt_sparse.integrations.layout import from_intervals, note_of
from modelopt_sparse.integrations.masks import interval_mask
from modelopt_sparse.integrations.packing import PackedBatch, Visibility, pack
from modelopt_sparse.kernels.api import attention_varlen
from modelopt_sparse.kernels.types import NMSparsity, Plan, SkipSoftmax

B, HQ, HK, L, D, DV = 2, 4, 2, 13, 8, 6
LEFT, RIGHT = (slice(0, 3), slice(-3, None))
CU = torch.tensor([0, 4, 5, L])


class Llama:
    model_type = "llama"


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def qkv(n_q: int = L, n_kv: int = L, batch: int = B) -> tuple[Tensor, Tensor, Tensor]:
    """As models hand them over: queries transposed, keys and values as a cache holds them."""
    return (
        random(batch, n_q, HQ, D, seed=1).transpose(1, 2),
        random(batch, HK, n_kv, D, seed=2),
        random(batch, HK, n_kv, DV, seed=3),
    )


def intervals(mask: Tensor | None, n_q: int = L, n_kv: int = L, **options: Any) -> Tensor:
    options = {"q_offset": n_kv - n_q, "allow_is_causal_skip": False} | options
    built = interval_mask(
        batch_size=B if mask is None else len(mask),
        q_length=n_q,
        kv_length=n_kv,
        attention_mask=mask,
        config=Llama,
        **options,
    )
    assert built is not None and built.dtype == torch.int32
    return built


def hiding(span: slice, length: int = L) -> Tensor:
    """A 2-D mask whose second item has padding at `span`."""
    mask = torch.ones(B, length, dtype=torch.bool)
    mask[1, span] = False
    return mask


def attend(packed: PackedBatch, causal: bool, plan: Plan | None = None) -> Tensor:
    out = attention_varlen(
        packed.q,
        packed.k,
        packed.v,
        packed.seqs,
        causal=causal,
        bounds=packed.bounds,
        mask=packed.mask,
        bias=packed.bias,
        plan=Plan() if plan is None else plan,
    )
    return packed.unpack(out.out)  # [B, Lq, Hq, Dv]


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, added: Tensor) -> Tensor:
    """Attention written out; rows that see nothing are 0."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    weights = torch.softmax(q @ k.transpose(2, 3) * q.shape[-1] ** -0.5 + added, -1)
    return (weights.nan_to_num() @ v).transpose(1, 2)


def hide(visible: Tensor) -> Tensor:
    return torch.zeros(visible.shape).masked_fill(~visible, -torch.inf)


TRIANGLE = torch.ones(L, L, dtype=torch.bool).tril()
HALF = (random(B, 1, L, L, seed=5) > 0) & TRIANGLE
HALF_PER_HEAD = (random(B, HQ, L, L, seed=6) > 0) & TRIANGLE
LEAST = torch.finfo(torch.float32).min
BIAS = random(B, HQ, L, L, seed=7)
CASES: dict[str, tuple[Visibility, Tensor]] = {
    "none, causal": (Visibility(), hide(TRIANGLE)),
    "none, not causal": (Visibility(causal=False), torch.zeros(L, L)),
    "left padding": (
        Visibility(intervals(hiding(LEFT))),
        hide(TRIANGLE & hiding(LEFT)[:, None, None]),
    ),
    "bool": (Visibility(HALF), hide(HALF)),
    "bool, not causal": (Visibility(HALF.mT, causal=False), hide(HALF.mT)),
    "bool that shows later keys": (Visibility(HALF.mT), hide(HALF.mT)),
    "bool for each head": (Visibility(HALF_PER_HEAD), hide(HALF_PER_HEAD)),
    "bool, one row for all": (
        Visibility(hiding(RIGHT)[:, None, None], causal=False),
        hide(hiding(RIGHT)[:, None, None]),
    ),
    "float": (Visibility(torch.where(HALF, 0.0, LEAST)), hide(HALF)),
    "float that almost hides": (Visibility(torch.where(HALF, 0.0, 0.6 * LEAST)), hide(HALF)),
    "float with a bias in it": (Visibility(torch.where(HALF, BIAS, LEAST)), BIAS + hide(HALF)),
    "position bias": (Visibility(position_bias=BIAS), BIAS + hide(TRIANGLE)),
    "position bias for all items": (
        Visibility(position_bias=BIAS[:1], causal=False),
        BIAS[:1],
    ),
    "position bias and left padding": (
        Visibility(intervals(hiding(LEFT)), position_bias=BIAS),
        BIAS + hide(TRIANGLE & hiding(LEFT)[:, None, None]),
    ),
    "position bias and bool": (Visibility(HALF, position_bias=BIAS), BIAS + hide(HALF)),
    "position bias and float": (
        Visibility(torch.where(HALF, 1.0, LEAST), position_bias=BIAS),
        BIAS + 1 + hide(HALF),
    ),
}


@pytest.mark.parametrize(("visibility", "added"), CASES.values(), ids=CASES.keys())
def test_packed_attention_equals_attention_written_out(
    visibility: Visibility, added: Tensor
) -> None:
    q, k, v = qkv()
    got = attend(pack(q, k, v, visibility), visibility.causal)
    assert got.is_contiguous()
    torch.testing.assert_close(got, softmax_attention(q, k, v, added), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("n_kv", [L, 20])
@pytest.mark.parametrize("span", [LEFT, RIGHT], ids=["left", "right"])
def test_without_causality_rows_are_never_taken_for_padding(span: slice, n_kv: int) -> None:
    q, k, v = qkv(n_kv=n_kv)
    keys = hiding(span, n_kv)
    bidirectional = {
        "mask_function": mu.bidirectional_mask_function,
        "allow_is_bidirectional_skip": False,
    }
    mask = intervals(keys, n_kv=n_kv, q_offset=0, **bidirectional)
    bias = random(B, HQ, L, n_kv, seed=7)
    for position_bias in (None, bias, bias[:1]):
        visibility = Visibility(mask, causal=False, position_bias=position_bias)
        added = hide(keys[:, None, None]) + (0 if position_bias is None else position_bias)
        got = attend(pack(q, k, v, visibility), causal=False)
        torch.testing.assert_close(got, softmax_attention(q, k, v, added), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("n_q", [1, 4])
def test_a_static_cache_ends_at_its_last_valid_key(n_q: int) -> None:
    q, k, v = qkv(n_q, n_kv=16)
    filled = 9
    k[:, :, filled:], v[:, :, filled:] = torch.nan, torch.nan
    mask = intervals(None, n_q, 16, q_offset=torch.tensor(filled - n_q))
    packed = pack(q, k, v, Visibility(mask))
    assert packed.seqs.k_len.tolist() == [filled] * B
    assert packed.seqs.q_len.tolist() == [n_q] * B
    added = hide(torch.ones(n_q, filled, dtype=torch.bool).tril(filled - n_q))
    expected = softmax_attention(q, k[:, :, :filled], v[:, :, :filled], added)
    torch.testing.assert_close(attend(packed, True), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("more_rows", [0, 2])
def test_a_row_reaches_from_its_origin_to_its_position_or_the_last_key_it_sees(
    more_rows: int,
) -> None:
    # It is at position 7 and sees no later key than 4; it is padding; it lies before its origin.
    rows = torch.tensor([[2, 5, 7, 1], [3, 3, 4, 2], [0, 3, -1, 2]], dtype=torch.int32)[:, None]
    padding = rows.clone()
    padding[..., 1] = padding[..., 0]
    layout = from_intervals(torch.cat([rows] + [padding] * more_rows, 1), 10, causal=True)
    assert layout.n_q.tolist() == [1, 0, 1] and layout.row.tolist() == [0, 0, 0]
    assert layout.key[::2].tolist() == [1, 1] and layout.n_k.tolist() == [8, 0, 2]
    assert layout.bounds is not None and layout.bounds[::2, 0].tolist() == [[1, 4], [0, 2]]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    "plan",
    [Plan(), Plan(nm=NMSparsity(2, 4, 1, 2)), Plan(skip=SkipSoftmax(0.9, 16, 16))],
    ids=["dense", "N:M", "skip"],
)
def test_the_side_of_the_padding_changes_no_bit(plan: Plan, causal: bool) -> None:
    n, pad = 150, 37
    q, k, v = (x[:1] for x in qkv(n, n, 1))
    alone = attend(pack(q, k, v, Visibility(causal=causal)), causal, plan)
    function = {} if causal else {"allow_is_bidirectional_skip": False}
    for before, after in ((pad, 0), (0, pad), (5, pad)):
        padded = [
            torch.nn.functional.pad(x, (0, 0, before, after), value=torch.nan) for x in (q, k, v)
        ]
        total = before + n + after
        mask = torch.ones(1, total, dtype=torch.bool)
        mask[:, :before], mask[:, before + n :] = False, False
        pattern = mu.causal_mask_function if causal else mu.bidirectional_mask_function
        built = intervals(mask, total, total, mask_function=pattern, **function)
        out = attend(pack(*padded, Visibility(built, causal)), causal, plan)
        assert torch.equal(out[:, before : before + n], alone)
        if causal:
            assert not out[:, :before].any() and not out[:, before + n :].any()


def test_rows_that_see_nothing_are_zero_whatever_the_keys_hold() -> None:
    q, k, v = qkv()
    visible = HALF.clone()
    visible[0, :, 4], visible[1] = False, False
    k[1], v[1] = torch.nan, torch.inf
    got = attend(pack(q, k, v, Visibility(visible)), True)
    assert not got[0, 4].any() and not got[1].any()
    expected = softmax_attention(q[:1], k[:1], v[:1], hide(visible[:1]))
    torch.testing.assert_close(got[:1], expected, rtol=1e-5, atol=1e-6)


def test_values_that_are_not_finite_in_padding_reach_no_row() -> None:
    q, k, v = qkv()
    clean = attend(pack(q, k, v, Visibility(intervals(hiding(LEFT)))), True)
    k[1, :, LEFT], v[1, :, LEFT] = torch.nan, torch.inf
    assert torch.equal(attend(pack(q, k, v, Visibility(intervals(hiding(LEFT)))), True), clean)


def test_packed_sequences_equal_the_same_sequences_alone() -> None:
    lengths = (4, 1, 8)
    q, k, v = qkv(batch=1)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    numbers = mu.find_packed_sequence_indices(positions)
    function = mu.and_masks(mu.causal_mask_function, mu.packed_sequence_mask_function(numbers))
    mask = intervals(torch.ones(1, L), mask_function=function)
    window = intervals(torch.ones(1, L), mask_function=mu.causal_mask_function)
    plan = Plan(nm=NMSparsity(2, 4, 0, 1))
    for visibility in (
        Visibility(mask),
        Visibility(cu_seq_lens_q=CU, cu_seq_lens_k=CU),
        Visibility(window, cu_seq_lens_q=CU, cu_seq_lens_k=CU, max_length_q=8, max_length_k=8),
        Visibility(TRIANGLE[None, None], cu_seq_lens_q=CU, cu_seq_lens_k=CU),
    ):
        packed = pack(q, k, v, visibility)
        assert packed.seqs.k_len.tolist() == list(lengths)
        whole = attend(packed, True, plan)
        parts = [
            attend(pack(*parts, Visibility()), True, plan)
            for parts in zip(*(x.split(lengths, 2) for x in (q, k, v)), strict=True)
        ]
        assert torch.equal(whole, torch.cat(parts, 1))


def shares_memory(view: Tensor, base: Tensor) -> bool:
    return view.untyped_storage().data_ptr() == base.untyped_storage().data_ptr()


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("form", ["cache", "transposed", "slice of a longer cache", "fused"])
def test_keys_and_values_are_not_copied(form: str, batch: int) -> None:
    q, k, v = qkv(batch=batch)
    if form == "transposed":
        k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v))
    if form == "slice of a longer cache":
        k, v = (torch.cat([x, x], 2)[:, :, :L] for x in (k, v))
    if form == "fused":
        joined = random(batch, L, HK, D + DV)
        k, v = (x.transpose(1, 2) for x in joined.split([D, DV], -1))
    packed = pack(q, k, v, Visibility())
    assert shares_memory(packed.q, q)
    assert shares_memory(packed.k, k) and shares_memory(packed.v, v)
    expected = softmax_attention(q, k, v, hide(TRIANGLE))
    torch.testing.assert_close(attend(packed, True), expected, rtol=1e-5, atol=1e-6)


def test_keys_that_are_no_whole_number_of_steps_apart_are_copied() -> None:
    q, k, v = qkv()
    k = random(B * HK * L * D + B).as_strided(k.shape, (HK * L * D + 1, L * D, D, 1))
    packed = pack(q, k, v, Visibility())
    expected = softmax_attention(q, k, v, hide(TRIANGLE))
    torch.testing.assert_close(attend(packed, True), expected, rtol=1e-5, atol=1e-6)


def test_gradients_pass_through_packing() -> None:
    for batch in (1, B):
        ours, plain = ([x.clone().requires_grad_() for x in qkv(batch=batch)] for _ in range(2))
        attend(pack(*ours, Visibility()), True).square().sum().backward()
        softmax_attention(*plain, hide(TRIANGLE)).square().sum().backward()
        for x, y in zip(ours, plain, strict=True):
            torch.testing.assert_close(x.grad, y.grad, rtol=1e-4, atol=1e-5)


def test_one_item_of_queries_serves_a_batch_of_keys() -> None:
    q, k, v = qkv()
    got = attend(pack(q[:1], k, v, Visibility(causal=False)), False)
    expected = softmax_attention(q[:1].expand_as(q), k, v, torch.zeros(L, L))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_an_interval_mask_is_read_once_for_all_layers() -> None:
    q, k, v = qkv()
    mask = intervals(hiding(LEFT))
    first = pack(q, k, v, Visibility(mask))
    note = note_of(mask)
    assert note is not None
    kept = dict(note.readings)
    second = pack(q, k, v, Visibility(mask))
    assert note_of(mask) is note and note.readings == kept and len(kept) == 1
    assert torch.equal(second.seqs.q_len, first.seqs.q_len)


def test_a_mask_is_read_again_when_its_first_reader_asks_again() -> None:
    q, k, v = qkv()
    mask = intervals(hiding(LEFT))
    first, second = (pack(q, k, v, Visibility(mask), reader) for reader in (1, 2))
    assert second.seqs is first.seqs and second.bounds is first.bounds
    mask.copy_(intervals(hiding(slice(0))))
    again = pack(q, k, v, Visibility(mask), 1)
    assert again.seqs.k_len.tolist() == [L, L] != first.seqs.k_len.tolist()
    assert pack(q, k, v, Visibility(mask), 2).seqs is again.seqs


def test_what_was_read_before_a_capture_is_read_again_in_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    q, k, v = qkv()
    mask = intervals(hiding(LEFT))
    before = pack(q, k, v, Visibility(mask))
    monkeypatch.setattr(packing, "is_capturing", lambda device: True)
    inside = pack(q, k, v, Visibility(mask))
    assert inside.seqs is not before.seqs
    assert pack(q, k, v, Visibility(mask)).seqs is inside.seqs


def test_of_dense_masks_those_of_users_are_read_for_each_layer() -> None:
    q, k, v = qkv()
    holes = hiding(slice(4, 6)) & hiding(slice(8, 9))
    ours = interval_mask(
        batch_size=B, q_length=L, kv_length=L, q_offset=0, attention_mask=holes, config=Llama
    )
    assert ours is not None and ours.dtype == torch.bool
    theirs = ours.clone()
    for mask, is_shared in ((ours, True), (theirs, False)):
        first, second = (pack(q, k, v, Visibility(mask)) for _ in range(2))
        assert (second.seqs is first.seqs) == is_shared
        assert torch.equal(attend(first, True), attend(second, True))
    assert not vars(theirs)


def test_causal_and_other_modules_may_share_an_interval_mask() -> None:
    q, k, v = qkv()
    shared = intervals(hiding(LEFT))
    for causal in (True, False):
        alone = pack(q, k, v, Visibility(intervals(hiding(LEFT)), causal))
        together = pack(q, k, v, Visibility(shared, causal))
        assert torch.equal(together.seqs.q_len, alone.seqs.q_len)


def test_a_mask_over_packed_sequences_may_show_later_keys() -> None:
    q, k, v = qkv(batch=1)
    visible = HALF.mT[:1]
    own = torch.bucketize(torch.arange(L), CU[1:-1], right=True)
    visibility = Visibility(visible, cu_seq_lens_q=CU, cu_seq_lens_k=CU)
    expected = softmax_attention(q, k, v, hide(visible & (own[:, None] == own)))
    got = attend(pack(q, k, v, visibility), True)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("visibility", "name"),
    [
        (Visibility(torch.ones(B, L, dtype=torch.bool)), "attention_mask"),
        (Visibility(torch.ones(B, L, L, dtype=torch.bool)), "attention_mask"),
        (Visibility(torch.ones(B, 1, L, L - 1, dtype=torch.bool)), "attention_mask"),
        (Visibility(torch.ones(B, 3, L, L, dtype=torch.bool)), "attention_mask"),
        (Visibility(torch.ones(B, 1, L, L, dtype=torch.int64)), "attention_mask"),
        (Visibility(torch.ones(B, 1, L, L, dtype=torch.int32)), "attention_mask"),
        (Visibility(torch.ones(B, 1, L - 1, 4, dtype=torch.int32)), "attention_mask"),
        (Visibility(position_bias=torch.ones(1, HQ, L, L + 1)), "position_bias"),
        (Visibility(position_bias=torch.ones(1, HQ, L, L).long()), "position_bias"),
        (Visibility(cu_seq_lens_q=torch.tensor([0, L])), "cu_seq_lens_k"),
        (
            Visibility(cu_seq_lens_q=torch.tensor([0, L]), cu_seq_lens_k=torch.tensor([0, L])),
            "cu_seq_lens",
        ),
        (Visibility(cu_seq_lens_q={"full": 1}, cu_seq_lens_k={"full": 1}), "cu_seq_lens_q"),
        (Visibility(cu_seq_lens_q=CU.float(), cu_seq_lens_k=CU), "cu_seq_lens_q"),
        (Visibility(cu_seq_lens_q=CU, cu_seq_lens_k=CU, max_length_q="x"), "max_length_q"),
        (Visibility(cu_seq_lens_q=CU, cu_seq_lens_k=CU, max_length_k=True), "max_length_k"),
    ],
)
def test_what_does_not_fit_is_an_error_that_names_it(visibility: Visibility, name: str) -> None:
    with pytest.raises(ArgumentError, match=f"^{name}: got"):
        pack(*qkv(), visibility)


def test_cumulative_lengths_cover_all_rows_and_keys() -> None:
    q, k, v = (x[:1] for x in qkv())
    short = torch.tensor([0, L - 1])
    with pytest.raises(ArgumentError, match=r"^cu_seq_lens_q: got"):
        pack(q, k, v, Visibility(cu_seq_lens_q=short, cu_seq_lens_k=torch.tensor([0, L])))
    with pytest.raises(ArgumentError, match=r"^cu_seq_lens_k: got"):
        pack(q, k, v, Visibility(cu_seq_lens_q=torch.tensor([0, L]), cu_seq_lens_k=short))


def on_meta(value: Any) -> Any:
    return value.to("meta") if isinstance(value, Tensor) else value


@pytest.mark.parametrize("visibility", [case[0] for case in CASES.values()], ids=CASES.keys())
def test_packing_reads_nothing_on_the_host(visibility: Visibility) -> None:
    # A tensor on the meta device has no values to read.
    with_cu_seqlens = replace(visibility, cu_seq_lens_q=CU, cu_seq_lens_k=CU)
    for given, batch in ((visibility, B), (with_cu_seqlens, 1)):
        if batch < B and any(isinstance(x, Tensor) and len(x) == B for x in vars(given).values()):
            continue
        moved = Visibility(**{name: on_meta(value) for name, value in vars(given).items()})
        packed = pack(*(x[:batch].to("meta") for x in qkv()), moved)
        assert packed.q.shape == (batch * L, HQ, D)
        assert (packed.seqs.max_q, packed.seqs.max_k) == (L, L)
