"""Random packed batches with features mixed, reference against oracle."""

from __future__ import annotations

import torch
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from modelopt_sparse.kernels.api import attention_varlen
from modelopt_sparse.kernels.types import NMSparsity, Phase, Plan, SkipSoftmax, SkipSoftmaxDecode
from tests.inputs import (
    EXACT_SCALE,
    Tolerance,
    assert_matches,
    features,
    integers,
    topical,
)
from tests.oracle import oracle

MAX_LENGTH = 70
RANDOM = settings(
    max_examples=250,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)

length = st.one_of(st.integers(0, MAX_LENGTH), st.integers(48, MAX_LENGTH))
lengths = st.one_of(
    length.map(lambda n: (n, n)),
    st.tuples(length, length),
    st.tuples(st.just(1), length),
)
batches = st.lists(lengths, min_size=1, max_size=3)
heads = st.sampled_from([(1, 1), (2, 1), (2, 2), (4, 2), (3, 1)])
exact_thresholds = st.sampled_from([0.03125, 0.25, 0.5, 1.0])
thresholds = st.floats(0.001, 1.0)
VISIBILITY = ["", "full", "window", "bounds", "full bounds", "wide_window"]
EXACT_EXTRAS = ["mask", "head_mask", "tile_mask", "bias", "head_bias"]
EXTRAS = [*EXACT_EXTRAS, "softcap", "sinks", "scale"]


@st.composite
def tensor_or_float(draw, values, batch: int, n_heads: int):
    """A threshold: a number, or a tensor that broadcasts to [batch, heads]."""
    value = draw(values)
    shape = draw(st.sampled_from([None, (), (n_heads,), (batch, 1), (batch, n_heads)]))
    if shape is None:
        return value
    number = torch.Size(shape).numel()
    drawn = draw(st.lists(values, min_size=number, max_size=number))
    return torch.tensor(drawn, dtype=torch.float32).reshape(shape)


@st.composite
def plans(draw, values, batch: int, n_heads: int) -> Plan:
    nm = skip = skip_decode = None
    if draw(st.booleans()):
        m = draw(st.sampled_from([4, 8]))
        n = draw(st.integers(1, m))
        nm = NMSparsity(n, m, draw(st.integers(0, 9)), draw(st.integers(0, 20)))
    counted = tuple(draw(st.lists(values, max_size=2)))
    exact = draw(st.booleans())
    tile = st.sampled_from([16, 32])
    if draw(st.integers(0, 3)):
        threshold = draw(tensor_or_float(values, batch, n_heads))
        skip = SkipSoftmax(threshold, draw(tile), draw(tile), counted, exact)
    if draw(st.integers(0, 3)):
        threshold = draw(tensor_or_float(values, batch, n_heads))
        segment = draw(st.sampled_from([32, 64, 128]))
        votes = draw(st.sampled_from([None, 1]))
        skip_decode = SkipSoftmaxDecode(threshold, draw(tile), segment, votes, counted, exact)
    return Plan(nm, skip, skip_decode)


@st.composite
def cases(draw, make, values, extras):
    batch = draw(batches)
    n_heads, kv_heads = draw(heads)
    seed = draw(st.integers(0, 2**20))
    inputs = make(
        [n_q for n_q, _ in batch],
        [n_k for _, n_k in batch],
        heads=n_heads,
        kv_heads=kv_heads,
        seed=seed,
        dim=draw(st.sampled_from([2, 4, 6])),
        dim_v=draw(st.sampled_from([1, 3, 4])),
    )
    names = [draw(st.sampled_from(VISIBILITY))]
    names += [name for name in extras if draw(st.integers(0, 5)) == 5]
    if "mask" in " ".join(names):  # the last mask named is the one that counts
        event("masked")
    phase = draw(st.sampled_from([None, None, Phase.PREFILL, Phase.DECODE]))
    plan = draw(plans(values, len(batch), n_heads))
    return inputs, plan, {"phase": phase, **features(" ".join(names), inputs, seed)}


def report(wanted) -> None:
    for phase in ("prefill", "decode"):
        counts = getattr(wanted, phase)
        if counts is not None and counts.skipped[0].sum():
            event(f"{phase} skipped")


@RANDOM
@given(cases(integers, exact_thresholds, EXACT_EXTRAS))
def test_random_batches_of_integers_are_the_oracle_ties_included(case):
    inputs, plan, options = case
    options["scale"] = EXACT_SCALE
    wanted = oracle(*inputs.qkv, plan=plan, **options)
    report(wanted)
    actual = attention_varlen(*inputs.qkv, plan=plan, details=True, **options)
    assert_matches(actual, wanted, Tolerance.of(inputs, EXACT_SCALE, options.get("bias")))


def structured(*args, **more):
    return topical(*args, strength=5.0, topics=2, **more)


@RANDOM
@given(cases(structured, thresholds, EXTRAS), st.sampled_from([torch.float64, torch.float32]))
def test_random_batches_are_the_oracle(case, dtype):
    inputs, plan, options = case
    if dtype != torch.float64:
        inputs.q, inputs.k = ((x * 8).round() / 8 for x in (inputs.q, inputs.k))
        inputs.q, inputs.k, inputs.v = (x.to(dtype) for x in (inputs.q, inputs.k, inputs.v))
    wanted = oracle(*inputs.qkv, plan=plan, **options)
    bound = Tolerance.of(inputs, options.get("scale"), options.get("bias"))
    report(wanted)
    actual = attention_varlen(*inputs.qkv, plan=plan, details=True, **options)
    if wanted.margin <= bound.decision or wanted.nm_margin <= 4 * bound.score:
        event("a tie within rounding")  # either answer is right
        assert not actual.out.isnan().any()
        return
    assert_matches(actual, wanted, bound)
