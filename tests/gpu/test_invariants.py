"""What must hold between calls of the kernels, whatever the numbers are."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from modelopt_sparse.errors import UnsupportedCall
from modelopt_sparse.kernels import (
    NMSparsity,
    Phase,
    Plan,
    Seqs,
    SkipSoftmax,
    SkipSoftmaxDecode,
    attention_reference,
)
from modelopt_sparse.kernels.device.bins import BINS_PER_OCTAVE
from tests.gpu.build import Setup
from tests.gpu.calls import (
    DEVICE,
    assert_same_bits,
    kind,
    needs_cuda,
    output_gradient,
    run,
    run_dense,
    trained,
)
from tests.gpu.tiles import row_tile_of, spans

pytestmark = needs_cuda
LAMBDAS = (2.0**-120, 0.001, 0.05, 0.2, 0.5, 0.9, 1.0)
ROUNDING = {torch.bfloat16: 2e-2, torch.float16: 3e-3, torch.float32: 1e-5}
SKIPPING = ("skip", "2:4+skip", "exact", "decode", "decode_per_head")


def at(setup: Setup, **changes) -> Plan:
    """The plan with fields of its skipping parts changed."""
    plan = setup.plan
    skip, decode = (part and replace(part, **changes) for part in (plan.skip, plan.skip_decode))
    return replace(plan, skip=skip, skip_decode=decode)


def close(ours, theirs, dtype, what: str = "") -> None:
    rounding = ROUNDING[dtype]
    torch.testing.assert_close(
        ours.float(), theirs.float(), rtol=rounding, atol=rounding, msg=lambda m: f"{what}: {m}"
    )


def counts_of(output):
    return output.prefill if output.prefill is not None else output.decode


@pytest.mark.parametrize("name", SKIPPING)
def test_a_tiny_lambda_skips_nothing_and_is_dense_to_rounding(name):
    setup = kind(name)
    tiny = run(setup, plan=at(setup, threshold=2.0**-120), details=True)
    dense = run(setup, plan=Plan(nm=setup.plan.nm))
    assert int(counts_of(tiny).skipped.sum()) == 0 < int(counts_of(tiny).visible.sum())
    assert not bool(tiny.dropped_mass.any()) and not bool(tiny.dropped_mass_bound.any())
    close(tiny.out, dense.out, setup.q.dtype, "out")
    close(tiny.lse, dense.lse, torch.float32, "lse")


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
@pytest.mark.parametrize(("n", "m"), [(1, 4), (2, 4), (4, 8)])
@pytest.mark.parametrize("shield", [(10**6, 0), (0, 10**6), (300, 400)], ids=str)
def test_sinks_or_a_window_that_cover_everything_are_dense_to_rounding(n, m, shield, dtype):
    setup = kind("dense", dtype=dtype, dims=(64, 64))
    plan = Plan(nm=NMSparsity(n, m, *shield))
    shielded, dense = trained(setup, plan=plan), trained(setup)
    for x, value in shielded.items():
        unit = torch.float32 if x == "lse" else setup.q.dtype
        close(value, dense[x], unit, x)


@pytest.mark.parametrize("name", SKIPPING)
def test_skip_sets_are_nested_in_lambda(name):
    setup = kind(name)
    before = None
    skipped = []
    for threshold in LAMBDAS:
        output = run(setup, plan=at(setup, threshold=threshold), details=True)
        for few, more in zip(output.kept, before or output.kept, strict=True):
            assert few is None or not bool((few & ~more).any()), threshold
        before = output.kept
        skipped.append(int(counts_of(output).skipped[0].sum()))
    assert skipped[0] == 0 < skipped[3] < skipped[-1] < int(counts_of(output).visible.sum())


@pytest.mark.parametrize("name", ["skip", "2:4+skip", "decode", "decode_per_head"])
def test_counted_thresholds_count_what_separate_calls_skip(name):
    setup = kind(name, inputs="integers")
    thresholds = tuple(2.0**-i for i in range(5))
    base = 0.25
    how = {"threshold": base, "count_thresholds": thresholds, "histogram": True}
    counts = counts_of(run(setup, plan=at(setup, **how)))
    plain = run(setup, plan=at(setup, threshold=base), details=True)
    assert counts.skipped.shape[0] == 1 + len(thresholds)
    assert torch.equal(counts.skipped[0], counts_of(plain).skipped[0])
    for i, threshold in enumerate(thresholds):
        own = counts_of(run(setup, plan=at(setup, threshold=threshold)))
        assert torch.equal(counts.skipped[1 + i], own.skipped[0]), threshold
        assert torch.equal(counts.visible, own.visible)
        above = counts.histogram[i * BINS_PER_OCTAVE + 1 :]
        assert torch.equal(counts.skipped[1 + i], above.sum(0)), threshold
    assert len({int(row.sum()) for row in counts.skipped}) > 2


@pytest.mark.parametrize("name", ["skip", "decode"])
def test_counting_changes_nothing(name):
    setup = kind(name)
    plain = run(setup)
    counted = run(setup, plan=at(setup, count_thresholds=(0.5, 0.01)))
    only = run(setup, plan=at(setup, threshold=None, count_thresholds=(0.5, 0.01)))
    close(counted.out, plain.out, setup.q.dtype)
    close(only.out, run_dense(setup).out, setup.q.dtype)
    assert torch.equal(counts_of(counted).skipped[0], counts_of(plain).skipped[0])
    assert int(counts_of(only).skipped[0].sum()) == 0 < int(counts_of(only).skipped[1].sum())


@pytest.mark.parametrize("name", SKIPPING)
@pytest.mark.parametrize("threshold", [0.01, 0.2, 0.9])
def test_the_error_is_within_the_dropped_mass_times_the_spread_of_v(name, threshold):
    setup = kind(name)
    output = run(setup, plan=at(setup, threshold=threshold), details=True)
    dense = run(setup, plan=Plan(nm=setup.plan.nm))
    mass, bound = output.dropped_mass, output.dropped_mass_bound
    assert bool((mass <= bound * (1 + 1e-4) + 1e-6).all()) and float(bound.max()) <= 1
    assert float(mass.max()) > 0 or threshold < 0.1
    group = setup.q.shape[1] // setup.k.shape[1]
    exact = any(
        part and part.exact_normalizer for part in (setup.plan.skip, setup.plan.skip_decode)
    )
    rounding = ROUNDING[setup.q.dtype]
    for q0, n_q, k0, n_k in spans(setup.seqs):
        if n_q == 0 or n_k == 0:
            continue
        v = setup.v[k0 : k0 + n_k].float().repeat_interleave(group, 1)  # [n_k, Hq, Dv]
        spread = v.abs().amax(0) if exact else v.amax(0) - v.amin(0)
        rows = slice(q0, q0 + n_q)
        error = (output.out[rows].float() - dense.out[rows].float()).abs()
        allowed = mass[rows, :, None] * spread + rounding * v.abs().amax(0)
        assert bool((error <= allowed).all())


def test_the_exact_normaliser_has_the_dense_lse():
    setup = kind("exact")
    output, dense = run(setup), run_dense(setup)
    assert int(output.prefill.skipped.sum()) > 0
    close(output.lse, dense.lse, torch.float32)
    assert not torch.equal(output.out, dense.out)


@pytest.mark.parametrize("name", ["skip", "2:4+skip"])
def test_chunks_that_end_on_the_grid_keep_what_the_whole_keeps(name):
    setup = kind(name, shape="single", inputs="integers")
    n = int(setup.seqs.q_len[0])
    block_rows = setup.plan.skip.block_rows
    whole = run(setup, details=True)
    first_tile, kept, outs = 0, [], []
    for start, stop in ((0, 128), (128, 256), (256, n)):
        seqs = Seqs.from_lengths([stop - start], [stop], device=DEVICE)
        chunk = replace(setup, q=setup.q[start:stop], k=setup.k[:stop], v=setup.v[:stop], seqs=seqs)
        output = run(chunk, details=True)
        tiles = output.kept[0]
        assert start // block_rows == first_tile
        first_tile += tiles.shape[1]
        kept.append(torch.nn.functional.pad(tiles, (0, whole.kept[0].shape[2] - tiles.shape[2])))
        outs.append(output.out)
    assert torch.equal(torch.cat(kept, 1), whole.kept[0])
    close(torch.cat(outs), whole.out, setup.q.dtype)
    assert int(whole.prefill.skipped.sum()) > 0


@pytest.mark.parametrize("name", ["skip", "2:4+skip"])
def test_the_tiles_of_a_call_given_back_repeat_it(name):
    setup = kind(name)
    output = run(setup, details=True)
    ours = trained(setup, plan=Plan(nm=setup.plan.nm, tiles=output.tiles))
    theirs = trained(setup)
    assert "prefill.visible" not in ours
    for x, value in ours.items():
        close(value, theirs[x], torch.float32 if x == "lse" else setup.q.dtype, x)


def marked(setup: Setup, block_keys: int) -> Setup:
    """Keys that name their tile in channels where the queries are 0: dq then shows which tiles it saw."""
    q, k = setup.q.clone(), setup.k.clone()
    n_tiles = -(-setup.seqs.max_k // block_keys)
    q[..., -n_tiles:] = 0
    k[..., -n_tiles:] = 0
    for _, _, k0, n_k in spans(setup.seqs):
        j = torch.arange(n_k, device=k.device)
        k[k0 + j, :, k.shape[-1] - n_tiles + j // block_keys] = 1
    return replace(setup, q=q, k=k)


@pytest.mark.parametrize("nm", [None, (2, 4)], ids=str)
def test_the_backward_visits_the_tiles_that_the_forward_kept(nm):
    shape = {"shape": "chunk", "heads": (4, 4), "dims": (64, 64)}
    setup = kind("skip", nm=nm, blocks=(64, 64), dtype="fp32", **shape)
    setup = marked(setup, 64)
    kept = run(setup, details=True).kept
    assert sum(int((~tiles).sum()) for tiles in kept) > 0
    d_out = output_gradient(setup)
    n_tiles = -(-setup.seqs.max_k // 64)
    for b, (q0, n_q, k0, n_k) in enumerate(spans(setup.seqs)):
        row_tile = row_tile_of(n_q, n_k, True, 64).to(DEVICE)
        for tile in range(kept[b].shape[1]):
            rows = q0 + (row_tile == tile).nonzero().flatten()
            only = torch.zeros_like(d_out)
            only[rows] = d_out[rows]
            found = trained(setup, only)
            used = kept[b][:, tile]  # [Hq, key tiles]
            by_channel = found["dq"][rows][..., -n_tiles:].ne(0).any(0)[:, : used.shape[1]]
            assert torch.equal(by_channel, used), f"dq: sequence {b}, row tile {tile}"
            for x in ("dk", "dv"):
                own = found[x][k0 : k0 + n_k].ne(0).any(-1).T  # [Hk, n_k]
                padded = torch.nn.functional.pad(own, (0, -n_k % 64))
                reached = padded.view(own.shape[0], -1, 64).any(-1)
                assert torch.equal(reached, used), f"{x}: sequence {b}, row tile {tile}"


@pytest.mark.parametrize("name", ["skip", "exact"])
def test_gradients_see_the_threshold(name):
    setup = kind(name)
    sparse, dense = trained(setup), trained(setup, plan=Plan())
    for x in ("dq", "dk", "dv"):
        assert not torch.equal(sparse[x], dense[x]), x


def test_bounds_that_say_causal_are_causal_to_rounding():
    setup = kind("dense")
    bounds = torch.zeros(setup.q.shape[0], 2, dtype=torch.int32)
    for q0, n_q, _, n_k in spans(setup.seqs):
        bounds[q0 : q0 + n_q, 1] = torch.arange(n_q) + n_k - n_q + 1
    ours, theirs = trained(setup, plan=Plan()), run(setup, bounds=bounds.to(DEVICE))
    close(ours["out"], theirs.out, setup.q.dtype)
    wide = run(setup, window=10**6)
    close(wide.out, theirs.out, setup.q.dtype)


@pytest.mark.parametrize("form", ["heads", "sequences", "both"])
@pytest.mark.parametrize("name", ["skip", "decode"])
def test_a_threshold_in_a_tensor_is_each_sequences_and_heads_own(name, form):
    setup = kind(name, inputs="integers")
    batch, heads = len(setup.seqs.q_len), setup.q.shape[1]
    group = heads // setup.k.shape[1] if name == "decode" else 1  # they vote together
    values = torch.tensor([0.5, 0.0, 2.0**-4, 1.0]).repeat(batch * heads)[: batch * heads]
    values = values.view(batch, heads)
    values = values[:, torch.arange(heads) // group * group]
    values = {"heads": values[:1], "sequences": values[:, :1], "both": values}[form].to(DEVICE)
    mixed = run(setup, plan=at(setup, threshold=values), details=True).kept
    each = values.expand(batch, heads)
    for value in values.unique().tolist():
        own = run(setup, plan=at(setup, threshold=value or 2.0**-120), details=True).kept
        for b in range(batch):
            if mixed[b] is None:
                continue
            picked = (each[b] == value).nonzero().flatten()
            assert torch.equal(mixed[b][picked], own[b][picked]), (b, value)


def test_values_of_a_threshold_tensor_are_clamped_and_nan_keeps_every_tile():
    setup = kind("skip", inputs="integers")
    for value, same in ((7.0, 1.0), (math.inf, 1.0), (-3.0, 2.0**-120), (math.nan, 2.0**-120)):
        tensor = torch.full((1, 1), value, device=DEVICE)
        ours = run(setup, plan=at(setup, threshold=tensor), details=True)
        theirs = run(setup, plan=at(setup, threshold=same), details=True)
        assert torch.equal(ours.tiles.words, theirs.tiles.words), value


def test_skipping_in_decode_is_trained_right_or_refused():
    setup = kind("decode_per_head")
    try:
        ours = trained(setup)
    except UnsupportedCall:
        return
    double = setup.widened()
    q, k, v = (x.requires_grad_() for x in (double.q, double.k, double.v))
    output = attention_reference(q, k, v, setup.seqs, plan=setup.plan)
    wanted = torch.autograd.grad(output.out, (q, k, v), output_gradient(setup).double())
    for x, grad in zip(("dq", "dk", "dv"), wanted, strict=True):
        error = float((ours[x].double() - grad).norm() / grad.norm())
        assert error < ROUNDING[setup.q.dtype], x


@pytest.mark.parametrize("phase", [Phase.PREFILL, Phase.DECODE])
def test_a_phase_is_what_the_caller_says(phase):
    setup = kind("dense", shape="draft")
    plan = Plan(
        skip=SkipSoftmax(0.3, 16, 32),
        skip_decode=SkipSoftmaxDecode(0.3, 32, 64, vote_heads=1),
    )
    options = {"phase": phase, "plan": plan, "details": True}
    ours = run(setup, **options)
    theirs = attention_reference(*setup.qkv, **options)
    for mine, wanted in zip(ours.kept, theirs.kept, strict=True):
        assert torch.equal(mine, wanted)
    assert (ours.prefill is None) is (phase is Phase.DECODE)
    close(ours.out, theirs.out, setup.q.dtype)


def test_a_sign_of_scale_turns_the_scores_around():
    setup = kind("skip", scale="half")
    ours = run(setup, scale=-0.1, details=True)
    theirs = run(replace(setup, q=-setup.q), scale=0.1, details=True)
    assert_same_bits({"words": ours.tiles.words}, {"words": theirs.tiles.words})
    close(ours.out, theirs.out, setup.q.dtype)
    flat = run(setup, scale=0.0, plan=Plan())
    level = run(replace(setup, q=torch.zeros_like(setup.q)), plan=Plan())
    close(flat.out, level.out, setup.q.dtype)
