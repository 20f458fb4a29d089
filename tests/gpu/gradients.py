"""Gradients of a call, held against autograd through plain attention over the same kept keys."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from modelopt_sparse.kernels.types import ScoreGrid
from tests.gpu.build import Setup
from tests.gpu.checks import check_values, near
from tests.gpu.judge import Sheet, attend

GRADIENT_RATIO = 3


def with_leaves(setup: Setup) -> tuple[Setup, dict[str, torch.Tensor]]:
    """The same values and strides in tensors that want gradients, and these by name."""
    leaves = {name: getattr(setup, name).detach().requires_grad_() for name in ("q", "k", "v")}
    options = dict(setup.options)
    if "sinks" in options:
        leaves["sinks"] = options["sinks"] = options["sinks"].detach().requires_grad_()
    if "bias" in options:
        grid = options["bias"]
        leaves["bias"] = grid.values.detach().requires_grad_()
        options["bias"] = ScoreGrid(leaves["bias"], grid.row_start, grid.key_start)
    tensors = {name: leaves[name] for name in ("q", "k", "v")}
    return replace(setup, options=options, **tensors), leaves


def output_gradient(setup: Setup, sheets: list[Sheet], seed: int) -> torch.Tensor:
    """A gradient of out with strides of its own: NaN in rows that nobody owns, 0 in rows that are unsure."""
    shape = (setup.q.shape[1], setup.q.shape[0], setup.v.shape[-1])
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(shape, generator=generator).to(setup.q.device, setup.q.dtype)
    drawn = drawn.transpose(0, 1)  # [Tq, Hq, Dv], heads first in memory
    gradient = torch.full_like(drawn, math.nan)
    for sheet in sheets:
        gradient[sheet.rows] = drawn[sheet.rows].masked_fill(sheet.unsure[..., None], 0.0)
    return gradient


def check_gradients(setup: Setup, entry, sheets: list[Sheet], seed: int = 0) -> None:
    """Gradients in everything that is differentiable, by the call that users make."""
    d_out = output_gradient(setup, sheets, seed)
    ours, leaves = with_leaves(setup)
    output = entry(*ours.qkv, **ours.options, plan=setup.plan)
    detached = replace(output, out=output.out.detach(), lse=output.lse.detach())
    check_values(setup, detached, sheets)
    found = torch.autograd.grad(output.out, list(leaves.values()), d_out)

    compare_gradients(setup, sheets, d_out, dict(zip(leaves, found, strict=True)))


def compare_gradients(setup: Setup, sheets: list[Sheet], d_out: torch.Tensor, found: dict) -> None:
    """`found` by name: the truth, as near as plain attention's are to it."""
    usual = plain_gradients(setup, sheets, d_out)
    truth = plain_gradients(setup.widened(), sheets, d_out.double())
    sizes = natural_sizes(setup, d_out)
    share = torch.finfo(setup.q.dtype).eps + 2.0**-15
    for name, wanted in usual.items():
        got = found[name]
        assert got is not None and got.dtype == wanted.dtype, f"d{name}"
        near(got, truth[name], wanted, GRADIENT_RATIO, f"d{name}", share * sizes[name])


def natural_sizes(setup: Setup, d_out: torch.Tensor) -> dict[str, float]:
    """How large a term of each gradient may be. Where terms cancel, what is left is their rounding.

    So it is with dq, from which the mean over a row is taken away: that mean comes from the rounded out.
    """
    typical = {
        name: float(x.float().nan_to_num().square().mean().sqrt())
        for name, x in (("q", setup.q), ("k", setup.k), ("v", setup.v), ("out", d_out))
    }
    weight = typical["out"] * typical["v"] * setup.v.shape[-1] ** 0.5  # of a score
    scale = abs(setup.scale)
    return {
        "q": weight * scale * typical["k"],
        "k": weight * scale * typical["q"],
        "v": typical["out"],
        "sinks": weight,
        "bias": weight,
    }


def plain_gradients(setup: Setup, sheets: list[Sheet], d_out: torch.Tensor) -> dict:
    """Gradients of plain attention by name, in the dtype of the call."""
    setup, leaves = with_leaves(setup)
    out, _ = attend(setup, sheets)
    owned = torch.zeros(out.shape[0], dtype=torch.bool, device=out.device)
    for sheet in sheets:
        owned[sheet.rows] = True
    d_out = d_out.masked_fill(~owned[:, None, None], 0.0)
    tensors = list(leaves.values())
    found = torch.autograd.grad(out, tensors, d_out, allow_unused=True, materialize_grads=True)
    return dict(zip(leaves, found, strict=True))
