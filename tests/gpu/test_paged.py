"""Keys and values in pages: pairwise against the reference in float64, and what no page layout may change.

Best run with `pytest --dist loadgroup`: the cases of a group share their kernels.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from modelopt_sparse.kernels import (
    PagedKV,
    Phase,
    Plan,
    Seqs,
    SkipSoftmaxDecode,
    attention_paged,
    attention_reference,
)
from tests.gpu.build import build
from tests.gpu.calls import DEVICE, assert_same_bits, kind, needs_cuda, results, run
from tests.gpu.cases import (
    DECODE_RUN,
    PAGED_DECODE_VARIANT,
    PAGED_PREFILL_VARIANT,
    PREFILL_RUN,
    paged_decode_cases,
    paged_prefill_cases,
)
from tests.gpu.checks import check
from tests.inputs import topical
from tests.paged import LAYOUTS, in_pages
from tests.pairwise import uncovered

pytestmark = needs_cuda
HAS_DEVICE = torch.cuda.is_available()
# Without a GPU they are not even made.
PREFILL, DECODE = (paged_prefill_cases(), paged_decode_cases()) if HAS_DEVICE else ([], [])
SERVED = ("dense", "2:4", "skip", "2:4+skip", "exact", "decode", "decode_per_head")


def entry(page: int, layout: str = "nhd", seed: int = 0):
    """`attention_varlen`, by way of pages."""

    def call(q, k, v, seqs, **options):
        return attention_paged(q, in_pages(k, v, seqs, page, layout, seed), seqs, **options)

    return call


def paged(setup, *how, **changes) -> dict:
    """The results of a setup's call over pages, with details, by name."""
    options = {**setup.options, "plan": setup.plan, "details": True, **changes}
    with torch.no_grad():
        return results(entry(*how)(*setup.qkv, **options))


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=case.name, marks=pytest.mark.xdist_group(f"variant{case.group}"))
        for case in PREFILL + DECODE
    ],
)
def test_a_paged_call_is_as_near_to_the_reference_as_plain_attention(case):
    check(build(case, DEVICE), entry(case.page, case.layout))


def test_every_two_levels_meet_in_at_least_400_paged_cases():
    for cases, factors in (
        (PREFILL, PAGED_PREFILL_VARIANT | PREFILL_RUN),
        (DECODE, PAGED_DECODE_VARIANT | DECODE_RUN),
    ):
        rows = [{name: getattr(case, name) for name in factors} for case in cases]
        assert not uncovered(rows, factors)
    assert len({case.name for case in PREFILL + DECODE}) == len(PREFILL + DECODE) >= 400


@pytest.mark.parametrize("page", [1, 7, 16, 64])
@pytest.mark.parametrize("name", SERVED)
def test_where_pages_lie_changes_no_bit(name, page):
    setup = kind(name)
    wanted = paged(setup, page)
    for layout in LAYOUTS:
        for seed in (1, 2):
            assert_same_bits(paged(setup, page, layout, seed), wanted, f"{layout} {seed}")


@pytest.mark.parametrize("name", SERVED)
def test_pages_keep_the_tiles_of_packed_keys(name):
    setup = kind(name, inputs="integers")
    with torch.no_grad():
        wanted = results(run(setup, details=True))
    decided = [x for x in wanted if x not in ("out", "lse", "dropped_mass", "dropped_mass_bound")]
    for page in (1, 16, 64, 128):
        found = paged(setup, page)
        assert_same_bits({x: found[x] for x in decided}, {x: wanted[x] for x in decided})
        torch.testing.assert_close(found["out"], wanted["out"], rtol=1e-2, atol=4e-3)


@pytest.mark.parametrize("page", [0, 16])
@pytest.mark.parametrize("name", ["decode", "decode_per_head", "dense"])
def test_a_sequence_that_decodes_has_the_same_bits_in_every_batch(name, page):
    """Alone it may be a single split; beside a longer one its sums are merged."""
    setup = kind(name, shape="decode", inputs="topical")

    def call(seqs):
        part = replace(setup, seqs=seqs)
        with torch.no_grad():
            if page:
                return paged(part, page, details=False)
            return results(run(part))

    names = ("out", "lse")
    together = call(setup.seqs)
    columns = ("q_start", "q_len", "k_start", "k_len")
    for b in range(len(setup.seqs.q_len)):
        own = {x: getattr(setup.seqs, x)[b : b + 1] for x in columns}
        alone = call(replace(setup.seqs, **own, max_k=int(own["k_len"])))
        row = int(own["q_start"])
        assert_same_bits(
            {x: alone[x][row] for x in names}, {x: together[x][row] for x in names}, str(b)
        )


@pytest.mark.parametrize("name", ["dense", "skip", "decode"])
def test_a_captured_graph_sees_new_tables_and_lengths(name):
    setup = kind(name)
    first, other = (in_pages(*setup.qkv[1:], 16, seed=seed) for seed in (0, 1))
    options = {**setup.options, "plan": setup.plan}
    # Both orders of pages in one cache.
    k, v = torch.cat([first.k, other.k]), torch.cat([first.v, other.v])
    pages = len(first.k)
    used = torch.arange(first.block_table.shape[1], device=DEVICE) * 16 < setup.seqs.k_len[:, None]
    tables = [first.block_table, torch.where(used, other.block_table + pages, 2**31 - 1)]
    cache = PagedKV(k, v, tables[0].clone())
    with torch.no_grad():
        wanted = results(attention_paged(setup.q, cache, setup.seqs, **options))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = attention_paged(setup.q, cache, setup.seqs, **options)
        for table in (tables[1], tables[0]):
            cache.block_table.copy_(table)
            graph.replay()
            assert_same_bits(results(output), wanted)
        setup.seqs.k_len.sub_((setup.seqs.k_len > 9).int())
        graph.replay()
        assert_same_bits(
            results(output), results(attention_paged(setup.q, cache, setup.seqs, **options))
        )


@pytest.mark.xdist_group("large")
@pytest.mark.parametrize("name", ["skip", "decode"])
def test_pages_past_2_31_bytes(name):
    setup = kind(name)
    near = in_pages(*setup.qkv[1:], 64)
    count = 2**32 // near.k[0].numel() // near.k.element_size() + 1
    far = [x.new_full((count + len(x), *x.shape[1:]), float("nan")) for x in (near.k, near.v)]
    for x, pages in zip(far, (near.k, near.v), strict=True):
        x[count:] = pages
    used = torch.arange(near.block_table.shape[1], device=DEVICE) * 64 < setup.seqs.k_len[:, None]
    table = torch.where(used, near.block_table + count, 0)
    options = {**setup.options, "plan": setup.plan}
    with torch.no_grad():
        found, wanted = (
            results(attention_paged(setup.q, cache, setup.seqs, **options))
            for cache in (PagedKV(*far, table), near)
        )
    assert_same_bits(found, wanted)


LATENT_DTYPES = {"bf16": (torch.bfloat16, 4e-3), "fp16": (torch.float16, 6e-4)}


@pytest.mark.parametrize("q_len", [1, 2])
@pytest.mark.parametrize("page", [32, 64])
@pytest.mark.parametrize("heads", [16, 64, 128])
@pytest.mark.parametrize("skips", [False, True], ids=["dense", "skip"])
@pytest.mark.parametrize("dtype", LATENT_DTYPES)
def test_latents_decode(dtype, skips, heads, page, q_len):
    dtype, bound = LATENT_DTYPES[dtype]
    lengths = [700, 33, 0, 5000]
    inputs = topical(
        [q_len] * 4,
        lengths,
        heads=heads,
        kv_heads=1,
        dim=576,
        strength=9.0,
        span=64,
        topics=12,
        dtype=dtype,
    )
    q, k = inputs.q.to(DEVICE), inputs.k.to(DEVICE)
    columns = (getattr(inputs.seqs, x).to(DEVICE) for x in ("q_start", "q_len", "k_start", "k_len"))
    seqs = Seqs(*columns, q_len, max(lengths), q_len)
    pages = in_pages(k, k, seqs, page)
    cache = PagedKV.from_latent(pages.k.squeeze(2), 512, pages.block_table)
    plan = Plan(skip_decode=SkipSoftmaxDecode(0.1, vote_heads=16)) if skips else Plan()
    options = {"plan": plan, "phase": Phase.DECODE, "scale": 576**-0.5, "details": True}
    found = attention_paged(q, cache, seqs, **options)
    wanted = attention_reference(q.double(), k.double(), k[..., :512].double(), seqs, **options)
    assert (found.out.double() - wanted.out).norm() <= bound * wanted.out.norm()
    torch.testing.assert_close(found.lse.double(), wanted.lse, rtol=1e-3, atol=2e-3)
    if skips:
        assert all(map(torch.equal, found.kept, wanted.kept))
        assert 0 < found.decode.skipped.sum() < found.decode.visible.sum()


@pytest.mark.parametrize("skips", [False, True], ids=["dense", "skip"])
@pytest.mark.parametrize("name", ["dense", "skip", "decode"])
def test_caches_in_8_bits(name, skips):
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("the GPU has no float8_e4m3fn")
    setup = kind(name)
    k8, v8 = (x.float().nan_to_num(0.0).to(torch.float8_e4m3fn) for x in (setup.k, setup.v))
    pages = in_pages(k8.float(), v8.float(), setup.seqs, 64)
    narrow = [x.to(torch.float8_e4m3fn) for x in (pages.k, pages.v)]
    cache = PagedKV(*narrow, pages.block_table, None, 0.5, 0.25)
    options = {**setup.options, "plan": setup.plan if skips else Plan()}
    with torch.no_grad():
        found = attention_paged(setup.q, cache, setup.seqs, **options)
        wide = (setup.q.double(), k8.double() * 0.5, v8.double() * 0.25)
        wanted = attention_reference(*wide, setup.seqs, **options)
    assert (found.out.double() - wanted.out).norm() <= 5e-3 * wanted.out.norm()
