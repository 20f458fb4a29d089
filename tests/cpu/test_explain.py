"""Which kernel a call gets, and why."""

from __future__ import annotations

import pytest
import torch

from modelopt_sparse.errors import ArgumentError
from modelopt_sparse.kernels import (
    KernelChoice,
    NMSparsity,
    PagedKV,
    Phase,
    Plan,
    ScoreGrid,
    Seqs,
    SkipSoftmax,
    SkipSoftmaxDecode,
    attention_paged,
    attention_reference,
    attention_varlen,
    choices,
    explain,
    hopper_prefill,
    latent,
)

SEQS = Seqs.from_lengths([70, 1], [70, 200])


@pytest.fixture
def on_hopper(monkeypatch):
    monkeypatch.setattr(choices, "IS_INTERPRETED", True)
    for module in (hopper_prefill, latent):
        monkeypatch.setattr(module, "is_hopper", lambda device: True)


def qkv(dim=64, dim_v=64, dtype=torch.bfloat16):
    return (
        torch.zeros(71, 4, dim, dtype=dtype),
        torch.zeros(270, 2, dim, dtype=dtype),
        torch.zeros(270, 2, dim_v, dtype=dtype),
    )


def prefill_of(tensors, **options):
    prefill, decode = explain(attention_varlen, *tensors, SEQS, **options)
    assert (prefill.phase, decode.phase) == (Phase.PREFILL, Phase.DECODE)
    assert decode.kernel == "decode"
    return prefill


def test_tensors_on_a_cpu_are_the_references(monkeypatch):
    monkeypatch.setattr(choices, "IS_INTERPRETED", False)
    choice = KernelChoice(Phase.PREFILL, "reference", ("tensors on a CPU",))
    assert choice in explain(attention_varlen, *qkv(), SEQS)


def test_on_other_gpus_the_portable_kernels_compute(monkeypatch):
    monkeypatch.setattr(choices, "IS_INTERPRETED", True)
    why = ("the GPU isn't one of compute capability 9.0",)
    assert prefill_of(qkv()) == KernelChoice(Phase.PREFILL, "prefill", why)


@pytest.mark.parametrize("dims", [(64, 64), (128, 128), (192, 128)])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"causal": False},
        {"window": 30, "sinks": torch.zeros(4)},
        {"plan": Plan(skip=SkipSoftmax(0.1, exact_normalizer=True)), "details": True},
    ],
    ids=["dense", "not causal", "window", "skip"],
)
def test_long_prefill_on_hopper_has_a_kernel_of_its_own(on_hopper, dims, options):
    assert prefill_of(qkv(*dims), **options) == KernelChoice(Phase.PREFILL, "hopper prefill")


REFUSED = {
    "fp32": ({"dtype": torch.float32}, {}, "torch.float32 queries and torch.float32 keys"),
    "dims": ({"dim": 96, "dim_v": 96}, {}, "head dims 96 and 96"),
    "N:M": ({}, {"plan": Plan(nm=NMSparsity(2, 4))}, "N:M sparsity"),
    "softcap": ({}, {"softcap": 9.0}, "a softcap"),
    "bounds": ({}, {"bounds": torch.ones(71, 2).int()}, "bounds of each row"),
    "mask": ({}, {"mask": ScoreGrid(torch.ones(2, 1, 70, 200) > 0)}, "a mask"),
    "bias": ({}, {"bias": ScoreGrid(torch.ones(2, 1, 70, 200))}, "a bias"),
    "tiles": (
        {},
        {"plan": Plan(skip=SkipSoftmax(0.1, 64, 64))},
        "decision tiles of 64 rows and 64 keys",
    ),
    "counting": (
        {},
        {"plan": Plan(skip=SkipSoftmax(0.1, count_thresholds=(0.2,)))},
        "further thresholds to count",
    ),
    "histogram": ({}, {"plan": Plan(skip=SkipSoftmax(None, histogram=True))}, "a histogram"),
}


@pytest.mark.parametrize(("shape", "options", "why"), REFUSED.values(), ids=REFUSED)
def test_what_it_does_not_offer_goes_to_the_portable_kernel_and_is_said(
    on_hopper, shape, options, why
):
    assert prefill_of(qkv(**shape), **options) == KernelChoice(Phase.PREFILL, "prefill", (why,))


def test_strides_that_no_descriptor_takes_are_said(on_hopper):
    q, k, v = qkv()
    odd = torch.zeros(270, 2, 65, dtype=k.dtype)[..., :64]
    assert prefill_of((q, odd, v)).reasons == ("strides that no tensor descriptor takes",)


def paged_choice(page, **options):
    pages = torch.zeros(30, page, 2, 64, dtype=torch.bfloat16)
    table = torch.zeros(2, -(-200 // page), dtype=torch.int32)
    return explain(
        attention_paged, qkv()[0], PagedKV(pages, pages.clone(), table), SEQS, **options
    )[0]


def test_pages_that_boxes_fit(on_hopper):
    for page in (16, 32, 64, 128, 256):
        assert paged_choice(page).kernel == "hopper prefill"
    assert paged_choice(48).reasons == ("pages of 48 tokens",)
    assert paged_choice(8).reasons == ("pages of 8 tokens",)


def latent_choice(heads=64, page=64, plan=None, **options):
    q = torch.zeros(2, heads, 576, dtype=torch.bfloat16)
    pages = torch.zeros(9, page, 576, dtype=torch.bfloat16)
    table = torch.zeros(2, -(-200 // page), dtype=torch.int32)
    seqs = Seqs.from_lengths([1, 1], [100, 200])
    options = {"plan": plan or Plan(), "phase": Phase.DECODE, **options}
    (choice,) = explain(attention_paged, q, PagedKV.from_latent(pages, 512, table), seqs, **options)
    return choice


def test_dense_latents_on_hopper_have_a_kernel_of_their_own(on_hopper):
    assert latent_choice() == KernelChoice(Phase.DECODE, "hopper latents")
    assert latent_choice(heads=16).reasons == ("16 rows of a sequence",)
    assert latent_choice(page=32).reasons == ("no pages of 64 tokens or a multiple",)
    skip = Plan(skip_decode=SkipSoftmaxDecode(0.1, vote_heads=16))
    assert "tiles to skip" in latent_choice(plan=skip).reasons
    assert latent_choice(window=9).reasons == ("window",)


def test_other_functions_are_refused():
    with pytest.raises(ArgumentError, match="attention_varlen or attention_paged"):
        explain(attention_reference, *qkv(), SEQS)


def test_arguments_are_checked_as_the_call_checks_them():
    with pytest.raises(ArgumentError, match="softcap"):
        explain(attention_varlen, *qkv(), SEQS, softcap=-1.0)
