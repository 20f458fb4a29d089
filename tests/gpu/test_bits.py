"""What must be equal to the bit: repeats, memory that nobody owns, the rest of the batch."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from modelopt_sparse.kernels import NMSparsity, Phase, Plan, Seqs, SkipSoftmax, SkipSoftmaxDecode
from tests.gpu.calls import (
    DEVICE,
    KINDS,
    TRAINED,
    alone,
    assert_same_bits,
    everything,
    kind,
    needs_cuda,
    output_gradient,
    results,
    run,
    trained,
    unowned_set_to,
    without_hopper,
)
from tests.gpu.tiles import spans

pytestmark = needs_cuda
REPEATS = 100
OPTIONS = {
    "": {},
    "window sinks": {"sight": "window", "sinks": True},
    "bounds bias": {"sight": "bounds", "bias": True},
    "full mask": {"sight": "full_bounds", "mask": True},
}


@pytest.mark.parametrize("name", KINDS)
def test_a_hundred_repeats_are_equal(name):
    setup = kind(name)
    first = everything(setup, name)
    for repeat in range(1, REPEATS):
        assert_same_bits(everything(setup, name), first, f"repeat {repeat}:")


@pytest.mark.parametrize("options", OPTIONS, ids=lambda names: names or "plain")
@pytest.mark.parametrize("name", ["2:4", "skip", "given", "decode"])
def test_what_lies_in_memory_that_no_sequence_owns_changes_nothing(name, options):
    setup = kind(name, gaps=True, **OPTIONS[options])
    zeros = everything(unowned_set_to(setup, 0.0), name)
    for value in (math.nan, math.inf):
        assert_same_bits(everything(unowned_set_to(setup, value), name), zeros, str(value))


@pytest.mark.parametrize("strides", ["padded", "odd", "heads_first"])
@pytest.mark.parametrize("name", ["2:4", "skip", "decode"])
def test_strides_change_nothing(name, strides, monkeypatch):
    if strides == "odd":  # no descriptor takes them
        without_hopper(monkeypatch)
    setup = kind(name)
    packed = everything(setup, name)
    other = kind(name, strides=strides)
    # The name of a case seeds its numbers, so these are other numbers: copy them over.
    for x, y in ((other.q, setup.q), (other.k, setup.k), (other.v, setup.v)):
        x.copy_(y)
    same = replace(setup, q=other.q, k=other.k, v=other.v)
    assert same.q.stride() != setup.q.stride()
    assert_same_bits(everything(same, name), packed)


@pytest.mark.parametrize("name", TRAINED)
def test_strides_of_the_gradient_of_out_change_nothing(name):
    setup = kind(name)
    d_out = output_gradient(setup)
    packed = trained(setup, d_out)
    heads_first = d_out.transpose(0, 1).contiguous().transpose(0, 1)
    assert_same_bits(trained(setup, heads_first), packed)
    ones = torch.ones_like(d_out)
    expanded = torch.ones((), dtype=d_out.dtype, device=DEVICE).expand(d_out.shape)
    assert_same_bits(trained(setup, expanded), trained(setup, ones))


@pytest.mark.parametrize("name", [name for name in KINDS if name != "given"])
def test_a_sequence_alone_gives_what_it_gives_in_a_batch(name):
    setup = kind(name)
    d_out = output_gradient(setup)
    with torch.no_grad():
        batch = run(setup, details=True)
    whole = trained(setup, d_out) if name in TRAINED else {}
    for b, (q0, n_q, k0, n_k) in enumerate(spans(setup.seqs)):
        rows, keys = slice(q0, q0 + n_q), slice(k0, k0 + n_k)
        single = alone(setup, b)
        with torch.no_grad():
            ours = run(single, details=True)
        wanted = {"out": batch.out[rows], "lse": batch.lse[rows]}
        found = {"out": ours.out, "lse": ours.lse}
        if batch.kept is not None and batch.kept[b] is not None:
            wanted["kept"], found["kept"] = batch.kept[b], ours.kept[0]
        if name in TRAINED:
            gradients = trained(single, d_out[rows])
            wanted["dq"], found["dq"] = whole["dq"][rows], gradients["dq"]
            for x in ("dk", "dv"):
                assert_same_sums(gradients[x], whole[x][keys])
        assert_same_bits(found, wanted, f"sequence {b}:")


def assert_same_sums(found: torch.Tensor, wanted: torch.Tensor) -> None:
    """Up to the order of fp32 sums: in another batch, other programs share the rows that see a key."""
    most = float(wanted.abs().max()) if wanted.numel() else 0.0
    torch.testing.assert_close(found, wanted, rtol=torch.finfo(wanted.dtype).eps, atol=1e-5 * most)


@pytest.mark.parametrize("name", TRAINED)
def test_nan_in_a_sequence_stays_in_it(name):
    setup = kind(name)
    d_out = output_gradient(setup)
    clean = trained(setup, d_out)
    batch = spans(setup.seqs)
    for poisoned in (0, len(batch) - 2):
        q0, n_q, k0, n_k = batch[poisoned]
        q, k, v = setup.q.clone(), setup.k.clone(), setup.v.clone()
        q[q0 : q0 + n_q], k[k0 : k0 + n_k], v[k0 : k0 + n_k] = math.nan, math.nan, math.nan
        found = trained(replace(setup, q=q, k=k, v=v), d_out)
        for b, (q1, m_q, k1, m_k) in enumerate(batch):
            if b == poisoned:
                continue
            rows, keys = slice(q1, q1 + m_q), slice(k1, k1 + m_k)
            places = {"out": rows, "lse": rows, "dq": rows, "dk": keys, "dv": keys}
            assert_same_bits(
                {x: found[x][part] for x, part in places.items()},
                {x: clean[x][part] for x, part in places.items()},
                f"sequence {b}, NaN in {poisoned}:",
            )


@pytest.mark.parametrize("hidden_by", ["mask", "bounds", "bias"])
@pytest.mark.parametrize("name", ["dense", "2:4", "skip"])
def test_nan_in_keys_that_no_row_sees_changes_nothing(name, hidden_by):
    setup = kind(name, shape="single", **{hidden_by: True} if hidden_by != "bounds" else {})
    n_q, n_k = int(setup.seqs.q_len[0]), int(setup.seqs.k_len[0])
    hidden = torch.zeros(n_k, dtype=torch.bool, device=DEVICE)
    hidden[n_k // 2 : n_k // 2 + 40] = True
    options = dict(setup.options)
    if hidden_by == "bounds":
        hidden = torch.arange(n_k, device=DEVICE) < 70
        bounds = torch.stack([torch.full((n_q,), 70), torch.arange(n_q) + 1], 1)
        options["bounds"] = bounds.int().to(DEVICE)
    else:
        grid = options[hidden_by]
        values, first = grid.values.clone(), int(grid.key_start[0])
        outside = False if hidden_by == "mask" else -math.inf
        values[..., first : first + n_k].masked_fill_(hidden, outside)
        options[hidden_by] = replace(grid, values=values)
    setup = replace(setup, options=options)
    zeros, poisoned = ({"k": setup.k.clone(), "v": setup.v.clone()} for _ in range(2))
    for changed, value in ((zeros, 0.0), (poisoned, math.nan)):
        for x in changed.values():
            x[hidden] = value
    found = everything(replace(setup, **poisoned), name)
    assert_same_bits(found, everything(replace(setup, **zeros), name))
    assert not any(bool(x.isnan().any()) for x in found.values())


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
@pytest.mark.parametrize("threshold", [None, 0, 0.0, -0.0])
def test_no_threshold_and_n_equal_m_are_dense(threshold, dtype):
    setup = kind("dense", dtype=dtype, dims=(64, 64))
    dense = trained(setup)
    for plan in (
        Plan(skip=SkipSoftmax(threshold), skip_decode=SkipSoftmaxDecode(threshold)),
        Plan(nm=NMSparsity(4, 4)),
        Plan(nm=NMSparsity(8, 8), skip=SkipSoftmax(threshold)),
    ):
        assert_same_bits(trained(setup, plan=plan), dense)


def test_nm_and_skip_leave_the_other_phase_alone():
    setup = kind("dense", shape="mixed")
    plan = Plan(nm=NMSparsity(2, 4), skip=SkipSoftmax(0.25, 16, 32))
    sparse, dense = run(setup, plan=plan, phase=Phase.DECODE), run(setup, phase=Phase.DECODE)
    assert_same_bits({"out": sparse.out, "lse": sparse.lse}, {"out": dense.out, "lse": dense.lse})
    prefill = run(setup, plan=Plan(skip_decode=SkipSoftmaxDecode(0.25)), phase=Phase.PREFILL)
    dense = run(setup, phase=Phase.PREFILL)
    assert_same_bits({"out": prefill.out, "lse": prefill.lse}, {"out": dense.out, "lse": dense.lse})


@pytest.mark.parametrize("name", ["dense", "2:4+skip", "decode"])
def test_upper_bounds_of_the_lengths_change_nothing(name):
    setup = kind(name)
    seqs = setup.seqs
    loose = replace(setup, seqs=replace(seqs, max_q=seqs.max_q + 300, max_k=seqs.max_k + 1000))
    for x in ("out", "lse"):
        with torch.no_grad():
            ours, wanted = results(run(loose)), results(run(setup))
        assert_same_bits({x: ours[x]}, {x: wanted[x]})


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("lens", [([], []), ([0, 0], [0, 0]), ([0, 0], [5, 0]), ([7, 1], [0, 0])])
def test_nothing_to_attend_to_gives_zeros(name, lens):
    setup = kind(name)
    plan = replace(setup.plan, tiles=None)
    rows, keys = sum(lens[0]) + 3, sum(lens[1])  # three rows that nobody owns
    small = replace(
        setup,
        q=setup.q.new_full((rows, *setup.q.shape[1:]), 2.0),
        k=setup.k.new_full((keys, *setup.k.shape[1:]), 2.0),
        v=setup.v.new_full((keys, *setup.v.shape[1:]), 2.0),
        seqs=Seqs.from_lengths(*lens, device=DEVICE),
        plan=plan,
        options={},
    )
    found = trained(small) if name in TRAINED else results(run(small))
    for x, value in found.items():
        wanted = -math.inf if x == "lse" else 0
        assert bool((value == wanted).all()), x
