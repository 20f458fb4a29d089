"""Tensors of more than 2^31 elements, and how much memory a long call takes beside its results."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from modelopt_sparse.integrations.packing import Visibility, pack
from modelopt_sparse.kernels import NMSparsity, Plan, ScoreGrid, Seqs, SkipSoftmax
from modelopt_sparse.kernels import SkipSoftmaxDecode as Decode
from tests.gpu import calls
from tests.gpu.build import Setup
from tests.gpu.calls import (
    DEVICE,
    KINDS,
    assert_same_bits,
    kind,
    needs_cuda,
    results,
    run,
    trained,
    without_hopper,
)
from tests.gpu.tiles import spans

pytestmark = [needs_cuda, pytest.mark.xdist_group("large")]  # one after another
OVER = 2**31
SMALL = ([300, 1], [300, 200])  # rows and keys of the sequences that are compared


def small(dtype=torch.bfloat16, dim=128) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(5)
    shapes = ((sum(SMALL[0]), 4, dim), (sum(SMALL[1]), 2, dim), (sum(SMALL[1]), 2, dim))
    return tuple(torch.randn(s, generator=generator).to(DEVICE, dtype) for s in shapes)


PLANS = {
    "2:4": Plan(nm=NMSparsity(2, 4)),
    "skip 16x16": Plan(skip=SkipSoftmax(0.9, 16, 16), skip_decode=Decode(0.9, 16, 64)),
    "skip": Plan(skip=SkipSoftmax(0.9), skip_decode=Decode(0.9)),
}


@pytest.mark.parametrize("plan", PLANS)
def test_the_last_sequences_of_more_than_2_31_elements_are_those_of_a_small_call(plan):
    q, k, v = small()
    seqs = Seqs.from_lengths(*SMALL, device=DEVICE)
    wanted = Setup(q, k, v, seqs, PLANS[plan], {})
    big, starts = [], []
    for x in (q, k, v):
        tokens = OVER // (x.shape[1] * x.shape[2]) + 1000
        big.append(x.new_full((tokens, *x.shape[1:]), math.nan))
        assert big[-1].numel() > OVER
        big[-1][-len(x) :] = x
        starts.append(tokens - len(x))
    there = replace(seqs, q_start=seqs.q_start + starts[0], k_start=seqs.k_start + starts[1])
    with torch.no_grad():
        found = run(Setup(*big, there, PLANS[plan], {}))
        assert_same_bits(
            {"out": found.out[starts[0] :], "lse": found.lse[starts[0] :]},
            {x: results(run(wanted))[x] for x in ("out", "lse")},
        )
    assert not bool(found.out[: starts[0] : 1009].any())


@pytest.mark.parametrize("is_portable", [False, True])
@pytest.mark.parametrize("name", ["2:4", "skip", "given", "decode"])
def test_strides_past_2_31_reach_the_right_rows(name, is_portable, monkeypatch):
    if is_portable:
        without_hopper(monkeypatch)
    setup = kind(name)
    wanted = trained(setup) if name != "decode" else results(run(setup))
    far = []
    for x in (setup.q, setup.k, setup.v):
        step = (OVER // (len(x) - 1) // 8 + 1) * 8  # descriptors take multiples of 16 bytes
        memory = x.new_full((step * len(x),), math.nan)
        view = memory.as_strided(x.shape, (step, x.shape[2], 1))
        view.copy_(x)
        far.append(view)
    there = replace(setup, q=far[0], k=far[1], v=far[2])
    found = trained(there) if name != "decode" else results(run(there))
    assert_same_bits(found, wanted)


@pytest.mark.parametrize("kind_of_grid", ["mask", "bias"])
def test_a_grid_of_more_than_2_31_elements(kind_of_grid):
    q, k, v = small()
    seqs = Seqs.from_lengths(*SMALL, device=DEVICE)
    keys = 20_000
    rows = OVER // keys + 1000
    batch = len(SMALL[0])
    kind_of_value = torch.bool if kind_of_grid == "mask" else torch.bfloat16
    # The sequences share one grid, which lies in memory once.
    values = torch.zeros((1, 1, rows, keys), dtype=kind_of_value, device=DEVICE)
    corner = torch.randn((1, 1, 300, 300), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    part = corner > 0 if kind_of_grid == "mask" else corner.to(kind_of_value)
    values[:, :, -300:, -300:] = part
    assert values.numel() > OVER
    first_row = torch.tensor([rows - 300] * batch, dtype=torch.int32, device=DEVICE)
    first_key = torch.tensor([keys - 300] * batch, dtype=torch.int32, device=DEVICE)
    far = ScoreGrid(values.expand(batch, -1, -1, -1), first_row, first_key)
    near = ScoreGrid(part.expand(batch, -1, -1, -1))
    with torch.no_grad():
        setup = Setup(q, k, v, seqs, PLANS["skip"], {})
        found, wanted = (results(run(setup, **{kind_of_grid: grid})) for grid in (far, near))
    assert_same_bits(found, wanted)


@pytest.mark.parametrize("plan", [Plan(), Plan(skip=SkipSoftmax(0.05))], ids=["dense", "skip"])
def test_a_prefill_of_128k_tokens_takes_little_more_than_its_output(plan):
    batch, heads, kv_heads, length, dim = 2, 8, 2, 128 * 1024, 128
    query = torch.randn(batch, length, heads, dim, device=DEVICE, dtype=torch.bfloat16)
    # A static cache is longer than what is in it, and heads come first.
    cache = torch.randn(2, batch, kv_heads, length + 256, dim, device=DEVICE, dtype=torch.bfloat16)
    key, value = cache[..., :length, :]
    with torch.no_grad():
        packed = pack(query.transpose(1, 2), key, value, Visibility())
        assert packed.k.data_ptr() == key.data_ptr() and packed.q.data_ptr() == query.data_ptr()

        def call():
            return calls.attention_varlen(
                packed.q, packed.k, packed.v, packed.seqs, plan=plan, window=4096
            )

        call()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        output = call()
        torch.cuda.synchronize()
        taken = torch.cuda.max_memory_allocated() - before
    rows = batch * length * heads
    expected = output.out.numel() * 2 + rows * 4 * (1 if plan.skip is None else 3)
    assert taken < expected + 32 * 2**20, f"{taken / 2**20:.0f} MiB, output {expected / 2**20:.0f}"


def test_a_backward_takes_no_score_matrix():
    batch, heads, length, dim = 1, 8, 32 * 1024, 128
    q, k, v = torch.randn(3, batch * length, heads, dim, device=DEVICE, dtype=torch.bfloat16)
    setup = Setup(q, k, v, Seqs.from_lengths([length], device=DEVICE), Plan(nm=NMSparsity()), {})
    d_out = torch.randn_like(q)
    trained(setup, d_out)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    trained(setup, d_out)
    torch.cuda.synchronize()
    taken = torch.cuda.max_memory_allocated() - before
    size = q.numel() * 2
    # out, dq, dk, dv, and as much again where one of them is summed in float32
    assert taken < 4 * size + 3 * 2 * size + 64 * 2**20, f"{taken / 2**20:.0f} MiB"


def test_every_kind_has_a_sequence_to_speak_of():
    for name in KINDS:
        assert max(n_k for *_, n_k in spans(kind(name).seqs)) > 300
