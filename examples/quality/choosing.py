"""As many tiles as skip-softmax keeps, chosen by a selector."""

from __future__ import annotations

from dataclasses import fields

import torch
from torch import Tensor

from examples.quality.selectors import Prompt, Selector
from modelopt_sparse.calls import AttentionCall
from modelopt_sparse.errors import UnsupportedCall, describe
from modelopt_sparse.kernels.types import Phase, Plan, TileMap

# Tiles are chosen without a look at any other option.
_OPTIONS = {"causal", "scale", "phase"}


def chosen_like(call: AttentionCall, plan: Plan, selector: Selector) -> TileMap:
    """As many tiles of each head as skip-softmax keeps, chosen by a selector. Waits for the device.

    Each row tile keeps its last one, which holds its rows' own keys.

    Raises:
        UnsupportedCall: not causal, not whole prompts, another option than a scale and a phase, or a
            plan that doesn't skip in prefill, or does more.
    """
    options = call.options
    seqs = call.seqs
    if others := {name for name, value in options.items() if value is not None} - _OPTIONS:
        takes = "causal, scale and phase"
        raise UnsupportedCall(describe("options", ", ".join(sorted(others)), takes))
    parts = {part.name for part in fields(plan) if getattr(plan, part.name) is not None}
    if plan.skip is None or parts != {"skip"}:
        raise UnsupportedCall(describe("plan", ", ".join(sorted(parts)) or "DENSE", "skip alone"))
    if not options.get("causal", True) or not torch.equal(seqs.q_len, seqs.k_len):
        takes = "causal attention of whole prompts"
        raise UnsupportedCall(describe("call", "another one", takes))
    kept = call(plan, details=True).kept
    assert kept is not None
    scale = options.get("scale")
    scale = call.q.shape[-1] ** -0.5 if scale is None else scale
    chosen: list[Tensor | None] = []
    places = zip(seqs.q_start.tolist(), seqs.k_start.tolist(), seqs.q_len.tolist(), strict=True)
    for own, (start, first, n) in zip(kept, places, strict=True):
        if own is None or Phase.of(n, options.get("phase")) is Phase.DECODE:
            chosen.append(None)
            continue
        group = call.q.shape[1] // call.k.shape[1]
        k = call.k[first : first + n].transpose(0, 1).repeat_interleave(group, 0)
        q = call.q[start : start + n].transpose(0, 1)
        prompt = Prompt(q.float() * scale, k.float(), plan.skip.block_rows, plan.skip.block_keys)
        chosen.append(_highest(selector(prompt), prompt, own.sum((1, 2))))
    return TileMap.from_kept(
        chosen,
        seqs,
        True,
        plan.skip.block_rows,
        plan.skip.block_keys,
        rows=len(call.q),
        heads=call.q.shape[1],
        phase=options.get("phase"),
    )


def _highest(scores: Tensor, prompt: Prompt, counts: Tensor) -> Tensor:
    """So many tiles of each head, the last of each row tile among them: bool [Hq, row tiles, key tiles]."""
    heads, rows, keys = scores.shape
    n = prompt.q.shape[1]
    index = torch.arange(rows, device=scores.device)
    end = ((index + 1) * prompt.block_rows).clamp(max=n)
    last = (end - 1) // prompt.block_keys
    visible = torch.arange(keys, device=scores.device) <= last[:, None]
    ranked = scores.masked_fill(~visible, -torch.inf)
    ranked[:, index, last] = torch.inf
    order = ranked.flatten(1).argsort(dim=1, descending=True, stable=True)
    place = torch.empty_like(order).scatter_(
        1, order, torch.arange(order.shape[1], device=order.device).expand(heads, -1)
    )
    return (place < counts[:, None]).view(heads, rows, keys) & visible
