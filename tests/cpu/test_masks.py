"""The interval mask shows each row exactly the keys that the dense mask of transformers does."""

from __future__ import annotations

import copy
import pickle
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import masking_utils as mu

from modelopt_sparse.integrations import runs
from modelopt_sparse.integrations.layout import note_of
from modelopt_sparse.integrations.masks import interval_mask

LLAMA = SimpleNamespace(model_type="llama")
B = 2
WINDOW = mu.sliding_window_causal_mask_function(4)
NEAR = mu.sliding_window_bidirectional_mask_function(3)
CHUNKS = mu.chunked_causal_mask_function(4, torch.tensor([0, 3]))
PADDED_LEFT = torch.ones(B, 13, dtype=torch.bool)
PADDED_LEFT[1, :3] = False
PADDED_RIGHT = PADDED_LEFT.flip(-1)
ALL_PADDING = PADDED_LEFT.clone()
ALL_PADDING[0] = False


def packed(function: Any, *lengths: tuple[int, ...]) -> Any:
    positions = torch.stack([torch.cat([torch.arange(n) for n in item]) for item in lengths])
    numbers = mu.find_packed_sequence_indices(positions)
    if hasattr(mu, "packed_sequence_compatibility_function"):
        return mu.packed_sequence_compatibility_function(function, positions, numbers)
    return mu.and_masks(function, mu.packed_sequence_mask_function(numbers))


def causal(n_q: int, n_kv: int, **options: Any) -> dict[str, Any]:
    return {
        "batch_size": B,
        "q_length": n_q,
        "kv_length": n_kv,
        "q_offset": n_kv - n_q,
        "config": LLAMA,
        "allow_is_causal_skip": False,
    } | options


def bidirectional(n_q: int, n_kv: int, **options: Any) -> dict[str, Any]:
    function = mu.bidirectional_mask_function
    options = {"mask_function": function, "allow_is_bidirectional_skip": False} | options
    return causal(n_q, n_kv, q_offset=0) | options


SKIPPED_KEYS = {"kv_offset": 5, "q_offset": 9}  # keys 5 to 12 of 13, rows from 9
CASES: dict[str, dict[str, Any]] = {
    "causal": causal(13, 13),
    "continued": causal(5, 13),
    "one row": causal(1, 13),
    "window": causal(13, 13, mask_function=WINDOW),
    "window, continued": causal(5, 13, mask_function=WINDOW),
    "window of one": causal(13, 13, mask_function=mu.sliding_window_causal_mask_function(1)),
    "window, sliding cache": causal(4, 8, mask_function=WINDOW, **SKIPPED_KEYS),
    "window, sliding cache, left padding": causal(
        4, 8, mask_function=WINDOW, **SKIPPED_KEYS, attention_mask=PADDED_LEFT
    ),
    "chunks": causal(13, 13, mask_function=CHUNKS, attention_mask=PADDED_LEFT),
    "chunks, sliding cache": causal(4, 8, mask_function=CHUNKS, **SKIPPED_KEYS),
    "rows beyond the keys": causal(6, 8, mask_function=WINDOW, q_offset=6),
    "chunks beyond the keys": causal(6, 8, mask_function=CHUNKS, q_offset=6),
    "static cache": causal(4, 16, q_offset=torch.tensor(3)),
    "static cache, window": causal(4, 16, q_offset=torch.tensor(3), mask_function=WINDOW),
    "static cache, left padding": causal(
        4, 16, q_offset=torch.tensor(3), attention_mask=PADDED_LEFT[:, :7]
    ),
    "left padding": causal(13, 13, attention_mask=PADDED_LEFT),
    "right padding": causal(13, 13, attention_mask=PADDED_RIGHT),
    "right padding, window": causal(13, 13, attention_mask=PADDED_RIGHT, mask_function=WINDOW),
    "an item of padding": causal(13, 13, attention_mask=ALL_PADDING),
    "a mask longer than the keys": causal(9, 9, attention_mask=PADDED_LEFT),
    "bidirectional": bidirectional(13, 13),
    "bidirectional, left padding": bidirectional(13, 13, attention_mask=PADDED_LEFT),
    "bidirectional window": bidirectional(13, 13, mask_function=NEAR),
    "bidirectional window, right padding": bidirectional(
        13, 13, mask_function=NEAR, attention_mask=PADDED_RIGHT
    ),
    "cross": bidirectional(4, 13, attention_mask=PADDED_RIGHT),
    "cross, more rows than keys": bidirectional(17, 13, attention_mask=PADDED_LEFT),
    "packed": causal(13, 13, mask_function=packed(mu.causal_mask_function, (4, 1, 8), (6, 7))),
    "packed window": causal(13, 13, mask_function=packed(WINDOW, (4, 1, 8), (6, 7))),
}


def shown(mask: Tensor, n_kv: int) -> Tensor:
    """The dense mask that an interval mask stands for."""
    keys = torch.arange(n_kv)
    return (keys >= mask[..., :1]) & (keys < mask[..., 1:2])


def dense(case: dict[str, Any]) -> Tensor:
    """What transformers shows; nothing in rows that the 2-D mask of a causal case calls padding."""
    skips = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    mask = mu.sdpa_mask(**{**case, **skips}).expand(B, 1, case["q_length"], case["kv_length"])
    padding = case.get("attention_mask")
    if padding is None or "allow_is_bidirectional_skip" in case:
        return mask
    row = torch.arange(case["q_length"]) + case["q_offset"]
    return mask & padding[:, None, row, None]


@pytest.mark.parametrize("way", ["searched", "evaluated", "evaluated by rows"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_the_interval_mask_equals_the_dense_mask(
    case: dict[str, Any], way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if way == "searched":
        monkeypatch.setattr(runs, "_DENSE_PAIRS", 0)
    if way == "evaluated by rows":
        monkeypatch.setattr(runs, "_CHUNK_PAIRS", 2 * case["kv_length"])
    mask = interval_mask(**case)
    assert mask is not None and mask.dtype == torch.int32
    assert mask.shape[:3] == (B, 1, case["q_length"])
    assert torch.equal(shown(mask, case["kv_length"]), dense(case))


def test_a_search_over_many_rows_equals_the_dense_mask() -> None:
    n = 777
    assert n * n > runs._DENSE_PAIRS
    lengths = ((100, 1, 676), (777,))
    for function in (WINDOW, CHUNKS, packed(WINDOW, *lengths), mu.causal_mask_function):
        case = causal(n, n, mask_function=function)
        mask = interval_mask(**case)
        assert mask is not None
        assert torch.equal(shown(mask, n), dense(case))


def test_positions_count_from_the_first_attended_key() -> None:
    case = causal(5, 13, attention_mask=PADDED_LEFT, mask_function=WINDOW)
    mask = interval_mask(**case)
    assert mask is not None
    assert mask[:, 0, :, 2].tolist() == [[8, 9, 10, 11, 12], [5, 6, 7, 8, 9]]
    assert mask[:, 0, :, 3].tolist() == [[0] * 5, [3] * 5]


def test_positions_in_a_sliding_cache_count_within_the_keys_handed_over() -> None:
    case = causal(4, 8, mask_function=WINDOW, **SKIPPED_KEYS, attention_mask=PADDED_RIGHT)
    mask = interval_mask(**case)
    assert mask is not None
    assert mask[:, 0, :, 2].tolist() == [[4, 5, 6, 7]] * 2


def test_packed_sequences_restart_positions_and_are_numbered() -> None:
    function = packed(mu.causal_mask_function, (2, 1, 3), (5, 1))
    case = causal(6, 6, mask_function=function)
    mask = interval_mask(**case)
    assert mask is not None and mask.shape[-1] == 5
    assert mask[:, 0, :, 2].tolist() == [[0, 1, 0, 0, 1, 2], [0, 1, 2, 3, 4, 0]]
    assert mask[:, 0, :, 3].tolist() == [[0, 0, 2, 3, 3, 3], [0] * 5 + [5]]
    assert mask[:, 0, :, 4].tolist() == [[0, 0, 1, 2, 2, 2], [0] * 5 + [1]]


def test_copies_of_a_dense_mask_keep_the_numbers_of_packed_sequences() -> None:
    function = packed(mu.causal_mask_function, (2, 1, 3), (5, 1))
    mask = interval_mask(**causal(6, 6, mask_function=function, config=None))
    assert mask is not None and mask.dtype == torch.bool
    for copied in (mask, copy.deepcopy(mask), pickle.loads(pickle.dumps(mask))):
        note = note_of(copied)
        assert note is not None and note.packed_numbers is not None
        assert note.packed_numbers.tolist() == [[0, 0, 1, 2, 2, 2], [0, 0, 0, 0, 0, 1]]
    assert note_of(mask.clone()) is None


def test_a_hole_in_the_padding_mask_stays_a_hole() -> None:
    holed = PADDED_LEFT.clone()
    holed[0, 5] = False
    case = causal(13, 13, attention_mask=holed)
    mask = interval_mask(**case)
    assert mask is not None and mask.dtype == torch.bool
    assert torch.equal(mask, mu.sdpa_mask(**{**case, "allow_is_causal_skip": False}))


@pytest.mark.parametrize("blocks", [[-1, 0, 0, 0, -1, 1, 1, -1], [0, -1, 0, -1, -1, 1, -1, 1]])
def test_image_blocks_are_shown_whole_also_where_they_are_not_one_run(blocks: list[int]) -> None:
    overlay = mu.blockwise_overlay(torch.tensor([blocks, [-1] * 8]))
    case = causal(8, 8, mask_function=mu.or_masks(mu.causal_mask_function, overlay))
    mask = interval_mask(**case)
    assert mask is not None
    assert (mask.dtype == torch.int32) == (blocks[1] == 0)
    got = mask if mask.dtype == torch.bool else shown(mask, 8)
    assert torch.equal(got, dense(case))


@pytest.mark.parametrize("prefix", [True, False], ids=["one run", "holes"])
def test_a_users_overlay_is_evaluated_exactly(prefix: bool) -> None:
    def overlay(batch: Tensor, head: Tensor, row: Tensor, key: Tensor) -> Tensor:
        return key < 4 if prefix else key % 3 == 0

    function = mu.or_masks(mu.causal_mask_function, overlay)
    case = causal(9, 9, mask_function=function, use_vmap=True)
    mask = interval_mask(**case)
    assert mask is not None
    assert (mask.dtype == torch.int32) == prefix
    got = mask if mask.dtype == torch.bool else shown(mask, 9)
    assert torch.equal(got, dense(case))


ALLOWED = {"allow_is_causal_skip": True}
FULL = torch.ones(B, 13, dtype=torch.bool)


@pytest.mark.parametrize(
    ("case", "is_left_out"),
    [
        (causal(13, 13, **ALLOWED), True),
        (causal(13, 13, **ALLOWED, attention_mask=FULL), True),
        (causal(1, 13, **ALLOWED, attention_mask=FULL), True),
        (bidirectional(13, 13, allow_is_bidirectional_skip=True), True),
        (bidirectional(4, 13, allow_is_bidirectional_skip=True), True),
        (causal(13, 13), False),
        (causal(13, 13, **ALLOWED, attention_mask=PADDED_LEFT), False),
        (causal(5, 13, **ALLOWED), False),
        (causal(5, 13, **ALLOWED, q_offset=0), False),
        (causal(4, 4, **ALLOWED, q_offset=torch.tensor(0)), False),
        (causal(13, 13, **ALLOWED, mask_function=WINDOW, local_size=4), False),
        (
            bidirectional(13, 13, allow_is_bidirectional_skip=True, attention_mask=PADDED_LEFT),
            False,
        ),
    ],
)
def test_the_mask_is_left_out_only_where_none_says_the_same(
    case: dict[str, Any], is_left_out: bool
) -> None:
    assert (interval_mask(**case) is None) == is_left_out


@pytest.mark.parametrize("model_type", ["a_family_nobody_tested", None])
def test_families_that_are_not_compared_get_the_dense_mask(model_type: str | None) -> None:
    config = None if model_type is None else SimpleNamespace(model_type=model_type)
    case = causal(13, 13, config=config, allow_is_causal_skip=True)
    mask = interval_mask(**case)
    assert mask is not None and mask.dtype == torch.bool
    assert torch.equal(mask, dense(case))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("padding", [None, PADDED_LEFT], ids=["no padding", "padding"])
def test_the_mask_is_traced_without_a_graph_break(padding: Tensor | None, dynamic: bool) -> None:
    case = causal(13, 13, attention_mask=padding)

    def build(x: Tensor) -> Tensor:
        function = mu.sliding_window_causal_mask_function(4)
        lengths = {"q_length": len(x), "kv_length": len(x)}
        mask = interval_mask(**{**case, **lengths, "mask_function": function})
        assert mask is not None
        return mask

    compiled = torch.compile(build, fullgraph=True, backend="eager", dynamic=dynamic)
    mask = compiled(torch.zeros(13))
    assert mask.dtype == (torch.int32 if padding is None else torch.bool)
    got = mask if mask.dtype == torch.bool else shown(mask, 13)
    expected = mu.sdpa_mask(**{**case, "mask_function": WINDOW})
    assert torch.equal(got, expected.expand_as(got))


def test_an_overlay_of_blocks_is_traced_as_a_dense_mask() -> None:
    def build(blocks: Tensor) -> Tensor:
        overlay = mu.blockwise_overlay(blocks)
        mask = interval_mask(
            **causal(8, 8, mask_function=mu.or_masks(mu.causal_mask_function, overlay))
        )
        assert mask is not None
        return mask

    blocks = torch.tensor([[0, -1, 0, -1, -1, 1, -1, 1], [-1] * 8])
    mask = torch.compile(build, fullgraph=True, backend="eager")(blocks)
    function = mu.or_masks(mu.causal_mask_function, mu.blockwise_overlay(blocks))
    assert torch.equal(mask, dense(causal(8, 8, mask_function=function)))
