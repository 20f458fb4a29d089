"""What `attention_paged` and `PagedKV` refuse, and how they say so."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from modelopt_sparse import ArgumentError, ArgumentTypeError, UnsupportedCall
from modelopt_sparse.kernels import PagedKV, Seqs, attention_paged

SEQS = Seqs.from_lengths([3, 1], [20, 7])


def cache(**changes) -> PagedKV:
    """5 pages of 8 slots."""
    table = torch.tensor([[4, 0, 2], [1, 99, 99]], dtype=torch.int32)
    k, v = torch.zeros(5, 8, 2, 16), torch.zeros(5, 8, 2, 12)
    return replace(PagedKV(k, v, table), **changes)


def call(kv: object = None, seqs: Seqs = SEQS, **options):
    return attention_paged(torch.zeros(4, 4, 16), cache() if kv is None else kv, seqs, **options)


def test_a_cache_is_taken_with_more_pages_of_values_than_of_keys():
    assert call().out.shape == (4, 4, 12)
    assert call(cache(v=torch.zeros(9, 8, 2, 12))).out.shape == (4, 4, 12)


TABLE = cache().block_table
WRONG = {
    "page -1": (cache(block_table=TABLE - 1), "block_table: got -1 at"),
    "page 99": (cache(block_table=TABLE + 97), "block_table: got 101 at [0, 0]; takes pages in [0, 5)"),
    "values' page": (cache(v_block_table=TABLE + 2), "v_block_table: got 6 at [0, 0]"),
    "int64": (cache(block_table=TABLE.long()), "block_table: got torch.int64"),
    "batch": (cache(block_table=TABLE[:1]), "block_table: got shape (1, 3)"),
    "strides": (cache(block_table=TABLE.repeat(1, 2)[:, ::2]), "block_table: got strides"),
    "packed": (cache(k=torch.zeros(40, 2, 16)), "k: got shape (40, 2, 16); takes [pages, page_size"),
    "page size": (cache(v=torch.zeros(5, 4, 2, 12)), "v: got shape (5, 4, 2, 12); takes [pages, 8, 2, Dv]"),
    "heads": (cache(k=torch.zeros(5, 8, 3, 16)), "k: got 3 heads"),
    "dtype": (cache(k=torch.zeros(5, 8, 2, 16).half()), "k: got torch.float16 on cpu"),
}  # fmt: skip


@pytest.mark.parametrize(("kv", "message"), WRONG.values(), ids=WRONG)
def test_a_wrong_cache_is_refused(kv, message):
    with pytest.raises(ArgumentError) as error:
        call(kv)
    assert str(error.value).startswith(message), error.value


def test_lengths_beyond_the_table_are_refused():
    with pytest.raises(ArgumentError, match=r"seqs\.max_k: got 25; takes at most 24"):
        call(seqs=replace(SEQS, max_k=25))
    with pytest.raises(ArgumentError, match=r"seqs\.k_len: got 20; takes lengths in"):
        call(seqs=replace(SEQS, max_k=19))


def test_what_a_sequence_does_not_use_of_its_table_is_not_looked_at():
    cache().check(SEQS)
    with pytest.raises(ArgumentError, match=r"got 99 at \[1, 1\]"):
        cache().check(Seqs.from_lengths([3, 1], [20, 9]))


def test_no_cache_is_no_paged_call():
    with pytest.raises(ArgumentTypeError, match="cache: got 'pages'; takes a PagedKV"):
        call("pages")


def test_gradients_are_refused():
    kv = cache(k=torch.zeros(5, 8, 2, 16, requires_grad=True))
    with pytest.raises(UnsupportedCall, match="attention_paged: got a tensor that wants"):
        call(kv)
    with torch.no_grad():
        call(kv)
