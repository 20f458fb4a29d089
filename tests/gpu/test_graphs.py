"""What serving and training loops rely on: no wait for the device, CUDA graphs, streams, no recompiles."""

from __future__ import annotations

import contextlib
import gc
import random
from dataclasses import replace

import pytest
import torch

from modelopt_sparse.kernels import (
    NMSparsity,
    Plan,
    ScaleFactors,
    ScoreGrid,
    Seqs,
    SkipSoftmax,
    SkipSoftmaxDecode,
)
from tests.gpu import calls
from tests.gpu.calls import (
    DEVICE,
    KINDS,
    TRAINED,
    assert_same_bits,
    everything,
    kind,
    needs_cuda,
    output_gradient,
    results,
    run,
    trained,
)
from tests.gpu.tiles import spans

pytestmark = needs_cuda


@contextlib.contextmanager
def waiting_is_an_error():
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("options", ["", "mask sinks", "bias", "bounds"])
def test_no_call_waits_for_the_device(name, options):
    changes = {"sight": options} if options == "bounds" else dict.fromkeys(options.split(), True)
    setup = kind(name, threshold="both", **changes)
    d_out = output_gradient(setup)

    def call():
        with torch.no_grad():
            run(setup, details=True)
            run(setup)
        if name in TRAINED:
            trained(setup, d_out)

    call()  # the first time it compiles
    with waiting_is_an_error():
        call()


@pytest.mark.parametrize("name", ["2:4", "skip", "2:4+skip", "decode", "decode_per_head"])
def test_a_captured_graph_sees_new_lengths_thresholds_and_values(name):
    setup = kind(name, threshold="both" if setup_skips(name) else "number", gaps=True)
    with torch.no_grad():
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            run(setup, details=True)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = run(setup, details=True)
        for change in ("nothing", "values", "threshold", "lengths", "places"):
            change_in_place(setup, change)
            graph.replay()
            assert_same_bits(results(output), results(run(setup, details=True)), change)


@pytest.mark.parametrize("name", ["skip", "decode"])
def test_a_captured_graph_counts_under_thresholds_that_were_never_used_before(name):
    setup = kind(name)
    seen = counting(setup, (0.5, 0.01))
    with torch.no_grad():
        run(seen)  # compiles
        for number in range(2):
            setup = counting(setup, (0.7 - number / 10, 0.02))
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                output = run(setup)
            # What a capture allocates is the graph's: memory that was freed since must not be read.
            torch.empty(2**20, device=DEVICE).fill_(float("nan"))
            graph.replay()
            assert_same_bits(results(output), results(run(setup)))


def counting(setup, thresholds):
    field = "skip" if setup.plan.skip is not None else "skip_decode"
    skip = replace(getattr(setup.plan, field), count_thresholds=thresholds)
    return replace(setup, plan=replace(setup.plan, **{field: skip}))


def setup_skips(name: str) -> bool:
    return KINDS[name].skip != "none" or KINDS[name].skip_decode != "none"


def change_in_place(setup, what: str) -> None:
    """Writes new numbers into the tensors of a call."""
    seqs = setup.seqs
    if what == "values":
        for x in (setup.q, setup.k, setup.v):
            x.copy_(x.flip(1))
    for part in (setup.plan.skip, setup.plan.skip_decode):
        if what == "threshold" and part is not None:
            part.threshold.copy_(part.threshold.nan_to_num(0.3).flip(1) * 0.5)
    if what == "lengths":  # fewer keys, where there are rows to spare: n_q may exceed n_k
        seqs.k_len.copy_((seqs.k_len * 3 // 4).clamp(max=seqs.max_k))
        seqs.q_len.copy_(torch.where(seqs.q_len > 2, seqs.q_len - 2, seqs.q_len))
    if what == "places":
        seqs.k_start.copy_(torch.where(seqs.k_len > 0, seqs.k_start + 1, seqs.k_start))


@pytest.mark.parametrize("lengths", [(64,), (64, 128, 512)], ids=["one length", "lengths"])
def test_a_captured_graph_keeps_scale_factors_that_nobody_else_holds(lengths):
    setup = kind("skip")
    row = tuple(4.0 + head for head in range(setup.q.shape[1]))
    factors = ScaleFactors(lengths, (row,) * len(lengths))
    plan = Plan(skip=SkipSoftmax(None, 16, 16, scale_factor=factors))
    with torch.no_grad():
        wanted = results(run(setup, plan=plan))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = results(run(setup, plan=plan))
    assert int(wanted["prefill.skipped"].sum()) > 0
    del factors, plan
    gc.collect()
    # They take the place of what nobody holds.
    taken = [torch.full((n,), torch.nan, dtype=torch.float64, device=DEVICE) for n in range(1, 99)]
    graph.replay()
    assert_same_bits(found, wanted)
    assert all(x.isnan().all() for x in taken)


@pytest.mark.parametrize("name", ["2:4", "skip"])
def test_a_training_step_can_be_captured(name):
    setup = kind(name)
    d_out = output_gradient(setup)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        trained(setup, d_out)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = trained(setup, d_out)
    for x in (setup.q, setup.k, setup.v):
        x.copy_(x.flip(1))
    graph.replay()
    assert_same_bits(captured, trained(setup, d_out))


@pytest.mark.parametrize("name", ["skip", "decode"])
def test_a_call_runs_on_the_current_stream(name):
    setup = kind(name)
    wanted = everything(setup, name)
    setup.q.neg_()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(
            20_000_000
        )  # what comes after, on this stream, sees the right q only if it waits
        setup.q.neg_()
        found = everything(setup, name)
    stream.synchronize()
    assert_same_bits(found, wanted)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs 2 CUDA devices")
@pytest.mark.parametrize("name", ["2:4", "skip", "decode"])
def test_a_call_runs_on_the_device_of_its_tensors(name):
    setup = kind(name)
    wanted = everything(setup, name)
    assert torch.cuda.current_device() == 0
    other = torch.device("cuda:1")
    seqs = Seqs(
        *(getattr(setup.seqs, x).to(other) for x in ("q_start", "q_len", "k_start", "k_len")),
        setup.seqs.max_q,
        setup.seqs.max_k,
    )
    q, k, v = (x.to(other) for x in (setup.q, setup.k, setup.v))
    found = everything(replace(setup, q=q, k=k, v=v, seqs=seqs), name)
    assert all(x.device == other for x in found.values())
    assert_same_bits({name: x.to(DEVICE) for name, x in found.items()}, wanted)


@contextlib.contextmanager
def compilations():
    """The kernels that Triton compiles or loads meanwhile, by name: any is a new variant."""
    from triton import knobs

    seen: list[str] = []

    def listener(src, **kwargs):
        seen.append(src.name)

    before, knobs.compilation.listener = knobs.compilation.listener, listener
    try:
        yield seen
    finally:
        knobs.compilation.listener = before


def varied(generator: random.Random, phase: str, dtype=torch.bfloat16):
    """Some call of one variant: any lengths, batch, thresholds, placement."""
    batch = generator.choice([1, 2, 3, 8, 16, 17])
    long = generator.choice([1, 16, 40, 128, 700, 1024])
    k_lens = [generator.randint(0, long) for _ in range(batch)]
    q_lens = [generator.choice([1, 1, n, n // 2]) for n in k_lens]
    if phase == "decode":
        q_lens = [1] * batch
    if phase == "prefill":
        q_lens = [n if n > 1 else 0 for n in k_lens]
    seqs = Seqs.from_lengths(q_lens, k_lens, device=DEVICE)
    room = generator.choice([0, 1, 5])
    q = torch.randn(sum(q_lens) + room, 4, 64, device=DEVICE, dtype=dtype)
    k, v = torch.randn(2, sum(k_lens) + room, 2, 64, device=DEVICE, dtype=dtype)
    return q, k, v, seqs


def test_thresholds_lengths_and_batches_compile_nothing():
    generator = random.Random(0)

    def plan():
        nm = NMSparsity(2, 4, generator.choice([0, 1, 4, 16]), generator.choice([0, 1, 33, 64]))
        part = generator.random()
        return Plan(nm, SkipSoftmax(part), SkipSoftmaxDecode(part))

    def call(phase: str, grad: bool):
        q, k, v, seqs = varied(generator, phase)
        options = {"scale": generator.uniform(0.01, 2)}
        options |= {"window": generator.choice([1, 16, 100, 1000])}
        with torch.set_grad_enabled(grad):
            if not grad:
                calls.attention_varlen(q, k, v, seqs, plan=plan(), **options)
                return
            leaves = [x.requires_grad_() for x in (q, k, v)]
            prefill = replace(plan(), skip_decode=None)
            output = calls.attention_varlen(*leaves, seqs, plan=prefill, **options)
            torch.autograd.grad(output.out, leaves, torch.randn_like(output.out))

    def some(count: int):
        for i in range(count):
            call(("prefill", "decode", "mixed")[i % 3], i % 2 == 0)

    some(
        24
    )  # A kernel compiles when it is first needed: by a sequence of one row, by few key tiles.
    with compilations() as seen:
        some(100)
    assert not seen, seen


def test_grids_of_any_size_and_place_compile_nothing():
    generator = random.Random(1)

    def grid(batch: int, n_q: int, n_k: int, dtype):
        heads = generator.choice([1, 4])
        room, skipped = generator.choice([0, 3, 16]), generator.choice([0, 1, 2])
        size = (batch, heads, skipped + n_q + room, skipped + n_k + room)
        values = torch.ones(size, device=DEVICE, dtype=dtype)
        return ScoreGrid(values[:, :, skipped : skipped + n_q, skipped : skipped + n_k])

    def call():
        n_q, n_k = generator.choice([(300, 300), (7, 401), (128, 256)])
        # Starts that lie anywhere in memory.
        ends = torch.arange(4, dtype=torch.int32, device=DEVICE)[generator.choice([0, 1]) :]
        seqs = Seqs(
            ends[:2] * n_q, ends[1:3] * 0 + n_q, ends[:2] * n_k, ends[1:3] * 0 + n_k, n_q, n_k
        )
        q = torch.randn(3 * n_q, 4, 64, device=DEVICE, dtype=torch.bfloat16)
        k, v = torch.randn(2, 3 * n_k, 2, 64, device=DEVICE, dtype=torch.bfloat16)
        grids = {"mask": grid(2, n_q, n_k, torch.bool), "bias": grid(2, n_q, n_k, torch.bfloat16)}
        leaves = [x.requires_grad_() for x in (q, k, v)]
        output = calls.attention_varlen(*leaves, seqs, plan=Plan(skip=SkipSoftmax(0.3)), **grids)
        torch.autograd.grad(output.out, leaves, torch.randn_like(output.out))

    call()
    with compilations() as seen:
        for _ in range(30):
            call()
    assert not seen, seen


def test_the_count_of_compilations_sees_one():
    with compilations() as seen:
        run(kind("dense", dims=(48, 48)))
    assert seen


@pytest.mark.parametrize("name", ["dense", "skip"])
def test_sequences_in_any_order_and_place(name):
    setup = kind(name)
    with torch.no_grad():
        wanted = results(run(setup, details=True))
        order = torch.randperm(len(setup.seqs.q_len), generator=torch.Generator().manual_seed(3))
        columns = (setup.seqs.q_start, setup.seqs.q_len, setup.seqs.k_start, setup.seqs.k_len)
        moved = (column[order.to(DEVICE)] for column in columns)
        seqs = Seqs(*moved, setup.seqs.max_q, setup.seqs.max_k)
        found = results(run(replace(setup, seqs=seqs), details=True))
    assert spans(seqs) != spans(setup.seqs)
    for x in ("out", "lse"):
        assert_same_bits({x: found[x]}, {x: wanted[x]})
