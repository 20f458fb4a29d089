"""A call held against the reference in float64, and its error against that of plain attention."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from modelopt_sparse.kernels import attention_reference
from modelopt_sparse.kernels.types import DENSE, AttentionOutput, Phase
from tests.gpu.build import Setup
from tests.gpu.judge import LOG2E, Sheet, attend, dropped, sheets_of
from tests.gpu.tiles import packed_tiles, spans

OUTPUT_RATIO = 2
# What an error may be without reference to that of plain attention, in units of the dtype's spacing: of
# the largest value, and of the values' norm. One result of few terms may be exact in one of the two.
SPACINGS = {"largest": 0.5, "norm": 0.25}
UNSURE_SHARE = 0.25  # of the rows at most, whose N:M choice is a matter of rounding


@dataclass
class Checked:
    """What a comparison saw: tiles that were skipped and visible, rows that could not be compared."""

    skipped: int = 0
    visible: int = 0
    unsure: int = 0


def check(setup: Setup, entry) -> tuple[Checked, list[Sheet]]:
    """Runs the call with details and as users do, where that may differ; compares all that comes back."""
    with torch.no_grad():
        output = entry(*setup.qkv, **setup.options, plan=setup.plan, details=True)
    sheets = sheets_of(setup, output.kept)
    seen, reference = check_decisions(setup, output)
    seen.unsure = check_values(setup, output, sheets, reference)
    if setup.plan.skip is not None or setup.plan.skip_decode is not None:
        with torch.no_grad():
            output = entry(*setup.qkv, **setup.options, plan=setup.plan)
        assert output.kept is None and output.dropped_mass is None
        assert output.tiles is None and output.decode_tiles is None
        check_values(setup, output, sheets)
    return seen, sheets


def check_decisions(
    setup: Setup, output: AttentionOutput
) -> tuple[Checked, AttentionOutput | None]:
    """Kept tiles and counts are those of the reference in float64, but for rounding at the threshold.

    Returns:
        What was seen, and the reference's output in float64 if it kept the same tiles for sure.
    """
    seen = Checked()
    plan, wide = setup.plan, setup.widened()
    if plan.skip is None and plan.skip_decode is None:
        assert output.prefill is None and output.decode is None and output.decode_tiles is None
        assert output.dropped_mass is None and output.dropped_mass_bound is None
        assert plan.tiles is not None or output.tiles is None
        assert plan.tiles is None or torch.equal(output.tiles.words, plan.tiles.words)
        return seen, _decisions(wide, 0.0)
    slack = 0.0 if setup.exact else _slack(setup)
    least = most = _decisions(wide, slack)
    if slack:
        most = _decisions(wide, -slack)
    assert output.kept is not None and len(output.kept) == len(least.kept)
    same = True
    for b, (few, got, many) in enumerate(zip(least.kept, output.kept, most.kept, strict=True)):
        if few is None:
            assert got is None, f"sequence {b}: kept tiles although nothing is decided there"
            continue
        assert got is not None and got.dtype == torch.bool and got.shape == few.shape
        for name, wrong in (("skipped", few & ~got), ("kept", got & ~many)):
            where = wrong.nonzero()[:4].tolist()
            assert not where, f"sequence {b}: tiles (head, row, key) {where} wrongly {name}"
        same &= torch.equal(few, many)
    for phase in (Phase.PREFILL, Phase.DECODE):
        seen.visible += _check_counts(output, least, most, phase)
        counts = getattr(output, phase.value)
        if counts is not None:
            seen.skipped += int(counts.skipped[0].sum())
            kept = sum(int(t.sum()) for t in _of_phase(setup, output.kept, phase) if t is not None)
            total = int(counts.visible.sum() - counts.skipped[0].sum())
            assert total == kept, f"{phase.value}: {total} counted, {kept} in kept"
    _check_words(setup, output)
    return seen, most if same else None


def _decisions(setup: Setup, slack: float) -> AttentionOutput:
    """The reference, with thresholds raised by `slack` (log2)."""

    def raised(part):
        if part is None:
            return None
        value, factor = part.threshold, 2.0**slack
        if isinstance(value, torch.Tensor):
            value = value * factor
        elif value is not None:
            value = min(value * factor, 1.0)
        counted = tuple(min(each * factor, 1.0) for each in part.count_thresholds)
        return replace(part, threshold=value, count_thresholds=counted)

    plan = replace(
        setup.plan, skip=raised(setup.plan.skip), skip_decode=raised(setup.plan.skip_decode)
    )
    with torch.no_grad():
        return attention_reference(*setup.qkv, **setup.options, plan=plan, details=True)


def _slack(setup: Setup) -> float:
    """How far rounding may move two scores and a log2 threshold against each other."""
    worst = largest = 0.0
    for sheet in sheets_of(replace(setup, plan=DENSE), None):
        seen = sheet.left
        if seen.any():
            worst = max(worst, float(sheet.error[seen].max()))
            largest = max(largest, float(sheet.x[seen].abs().max()))
    return 2 * worst + 2.0**-22 * (largest + 16)


def _check_counts(output: AttentionOutput, least, most, phase: Phase) -> int:
    got, low, high = (getattr(each, phase.value) for each in (output, most, least))
    if low is None or int(low.visible.sum()) == 0:
        assert got is None or int(got.visible.sum()) == 0, f"{phase.value} counted"
        return 0
    assert got is not None, f"{phase.value} not counted"
    assert got.visible.dtype == got.skipped.dtype == torch.int64
    assert got.visible.tolist() == low.visible.tolist(), f"{phase.value}: visible tiles"
    assert got.skipped.shape == low.skipped.shape
    between = (low.skipped <= got.skipped) & (got.skipped <= high.skipped)
    where = (~between).nonzero().tolist()
    wanted = f"{low.skipped.tolist()} to {high.skipped.tolist()}"
    assert not where, f"{phase.value}: skipped {got.skipped.tolist()}, not {wanted}"
    if low.histogram is not None:
        _check_histogram(got.histogram, low.histogram, got.visible, phase)
    return int(got.visible.sum())


def _check_histogram(got, wanted, visible, phase: Phase) -> None:
    """Rounding moves a tile by less than a bin, and so to a neighbour at most."""
    assert torch.equal(got.sum(0), visible), f"{phase.value}: histogram"
    got, wanted = (x.cumsum(0) for x in (got, wanted))
    assert bool((got[:-1] <= wanted[1:]).all() & (wanted[:-1] <= got[1:]).all()), (
        f"{phase.value}: histogram {got.tolist()}, not {wanted.tolist()}"
    )


def _of_phase(setup: Setup, kept, phase: Phase) -> list:
    """The tiles of the sequences in a phase, None for the others."""
    decoding = [setup.decodes(n_q) for _, n_q, _, _ in spans(setup.seqs)]
    wanted = phase is Phase.DECODE
    return [t if d is wanted else None for t, d in zip(kept, decoding, strict=True)]


def _check_words(setup: Setup, output: AttentionOutput) -> None:
    """The bits of `tiles` and `decode_tiles` are those of `kept`, and no others."""
    for name, phase, part in (
        ("tiles", Phase.PREFILL, setup.plan.skip),
        ("decode_tiles", Phase.DECODE, setup.plan.skip_decode),
    ):
        found = getattr(output, name)
        if part is None:
            assert found is None, name
            continue
        block_rows = getattr(part, "block_rows", None)
        assert (found.block_rows, found.block_keys) == (block_rows, part.block_keys), name
        rows, heads = setup.q.shape[:2]
        kept = _of_phase(setup, output.kept, phase)
        sizes = (rows, heads, block_rows, part.block_keys)
        words = packed_tiles(kept, setup.seqs, *sizes, setup.causal)
        assert found.words.dtype == torch.int32 and found.words.shape == words.shape, name
        assert torch.equal(found.words.cpu(), words), name


def check_values(
    setup: Setup,
    output: AttentionOutput,
    sheets: list[Sheet],
    reference: AttentionOutput | None = None,
) -> int:
    """out, lse and what is known of the dropped mass; returns how many rows were left out."""
    wide = setup.widened()
    with torch.no_grad():
        truth, true_lse = attend(wide, sheets)
        plain, plain_lse = attend(setup, sheets)
        lost, bound = dropped(setup, sheets)
    sure = torch.ones(setup.q.shape[:2], dtype=torch.bool, device=setup.q.device)
    for sheet in sheets:
        sure[sheet.rows] &= ~sheet.unsure
    owned = sum(sheet.unsure.numel() for sheet in sheets)
    unsure = int((~sure).sum())
    assert unsure <= UNSURE_SHARE * owned, (
        f"{unsure} of {owned} rows have an N:M tie within rounding"
    )

    if reference is not None:
        same = {"rtol": 1e-9, "atol": 1e-9}
        torch.testing.assert_close(truth[sure], reference.out[sure], **same)
        torch.testing.assert_close(true_lse[sure], reference.lse[sure], **same)

    assert output.out.dtype == setup.q.dtype and output.lse.dtype == torch.float32
    wobble = max((float(s.error[s.left].max()) for s in sheets if s.left.any()), default=0.0)
    largest_v = float(setup.v.detach().nan_to_num().abs().max()) if setup.v.numel() else 0.0
    floor = wobble / 8 * largest_v
    near(output.out[sure], truth[sure], plain[sure], OUTPUT_RATIO, "out", floor)
    hidden = true_lse == -math.inf
    assert torch.equal(output.lse[sure] == -math.inf, hidden[sure]), "lse: rows that see no key"
    assert bool((output.out[hidden & sure] == 0).all()), "out: rows that see no key are not 0"
    finite = sure & ~hidden
    near(output.lse[finite], true_lse[finite], plain_lse[finite], OUTPUT_RATIO, "lse", 4 * wobble)
    natural = output.natural_lse[finite]
    torch.testing.assert_close(natural.double(), true_lse[finite] / LOG2E, rtol=1e-4, atol=1e-4)

    skips = any(sheet.skip is not None for sheet in sheets)
    if output.dropped_mass is not None:
        torch.testing.assert_close(
            output.dropped_mass.double()[sure], lost[sure], rtol=1e-4, atol=1e-5 + 4 * wobble
        )
    if skips:
        found = output.dropped_mass_bound
        assert found is not None and found.dtype == torch.float32
        assert found.shape == setup.q.shape[:2]
        assert bool((found.double() >= lost * (1 - 1e-4) - 1e-6)[sure].all()), (
            "bound below the mass"
        )
        torch.testing.assert_close(
            found.double()[sure], bound[sure], rtol=1e-3, atol=1e-5 + 4 * wobble
        )
    return unsure


def near(ours, truth, plain, ratio: float, what: str, floor: float = 0.0) -> None:
    """The largest error and the norm of the errors are at most `ratio` times those of `plain`."""
    if truth.numel() == 0:
        return
    spacing = torch.finfo(plain.dtype).eps
    ours, plain, truth = ours.double(), plain.double(), truth.double()
    assert ours.shape == truth.shape, f"{what}: shape {tuple(ours.shape)}"
    assert bool(ours.isfinite().all()), f"{what}: {int((~ours.isfinite()).sum())} values not finite"
    for kind, size in (
        ("largest", lambda x: float(x.abs().max())),
        ("norm", lambda x: float(x.norm())),
    ):
        error, usual, whole = size(ours - truth), size(plain - truth), size(truth)
        most = ratio * usual + SPACINGS[kind] * spacing * whole
        most += floor if kind == "largest" else floor / 16 * math.sqrt(truth.numel())
        assert error <= most, (
            f"{what}: {kind} error {error:.3g}, plain attention's {usual:.3g}, "
            f"allowed {most:.3g}, of {whole:.3g}"
        )
