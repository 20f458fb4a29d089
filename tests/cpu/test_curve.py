"""The curve of a histogram: what a lambda skips, and which lambda skips so much."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from modelopt_sparse.calibration.curve import Curve
from modelopt_sparse.errors import ArgumentError
from modelopt_sparse.kernels import Plan, SkipSoftmax, attention_reference
from modelopt_sparse.kernels.device.bins import BINS, BINS_PER_OCTAVE
from tests.inputs import topical


def histogram(tiles: dict[int, int]) -> torch.Tensor:
    counts = torch.zeros(BINS, 1, dtype=torch.int64)
    for place, number in tiles.items():
        counts[place] = number
    return counts


def test_it_tells_what_a_call_with_that_lambda_skips():
    inputs = topical([400], [400], strength=2.0, span=16, dtype=torch.float32)

    def run(**skip):
        return attention_reference(*inputs.qkv, plan=Plan(skip=SkipSoftmax(**skip))).prefill

    size = {"block_rows": 16, "block_keys": 16}
    curve = Curve.of([run(threshold=None, histogram=True, **size).histogram])
    for edge in (1, 4, 8, 12):
        threshold = 2.0 ** (-edge / BINS_PER_OCTAVE)
        counts = run(threshold=threshold, **size)
        skipped = int(counts.skipped[0].sum())
        assert 0 < skipped < int(counts.visible.sum())
        assert curve.share(threshold) == pytest.approx(skipped / int(counts.visible.sum()))
        # The least lambda that skips as much.
        least = curve.threshold(curve.share(threshold))
        assert least <= threshold * (1 + 1e-9)
        assert curve.share(least) == pytest.approx(curve.share(threshold))


def test_histograms_are_added():
    one, other = histogram({0: 1, 9: 3}), histogram({0: 4})
    both = Curve.of([one, torch.cat([other, one], 1)])
    assert both.counts[[0, 9]].tolist() == [6, 6]
    assert both.most == 0.5


def test_the_ends():
    curve = Curve.of([histogram({0: 2, 8: 1, 9: 1})])
    # Bins 8 and 9 lie on both sides of lambda 1/2.
    assert curve.share(1.0) == 0.5 and curve.share(0.5) == 0.25 and curve.share(0.0) == 0.0
    assert curve.threshold(0.9) == 1.0 and curve.threshold(0.0) == 0.0
    # The least of all that skip half: tiles in bin 8 fall at the first edge above it.
    assert curve.threshold(0.5) == pytest.approx(2**-0.875)
    assert 2**-1.125 < curve.threshold(0.2) < 0.5 < curve.threshold(0.3) < 2**-0.875


def test_tiles_that_fall_at_every_lambda_counted_fall_at_the_least():
    curve = Curve.of([histogram({0: 1, 255: 1})])
    assert curve.threshold(0.3) == curve.threshold(0.5) == 2**-31.75
    assert curve.share(2**-31.75) == 0.5 and curve.share(1e-30) == 0.0


@given(st.dictionaries(st.integers(0, BINS - 1), st.integers(1, 1000), min_size=1))
def test_more_is_skipped_at_a_higher_lambda(tiles):
    curve = Curve.of([histogram(tiles)])
    targets = [i / 20 for i in range(20)]
    thresholds = [curve.threshold(target) for target in targets]
    assert thresholds == sorted(thresholds) and thresholds[0] == 0.0
    for target, threshold in zip(targets, thresholds, strict=True):
        if 0 < target <= curve.most and threshold > 2**-31.75:
            assert curve.share(threshold) == pytest.approx(target, abs=1e-9)
        elif target > 0:
            assert threshold > 0 and curve.share(threshold) == pytest.approx(
                curve.most if target > curve.most else curve.share(2**-31.75)
            )


@pytest.mark.parametrize("share", [-0.1, 1.0, 1.5, float("nan")])
def test_what_is_no_share_is_refused(share):
    with pytest.raises(ArgumentError, match="share: got"):
        Curve.of([histogram({3: 1})]).threshold(share)


def test_without_tiles_there_is_no_curve():
    with pytest.raises(ArgumentError, match="no tiles"):
        Curve.of([])
