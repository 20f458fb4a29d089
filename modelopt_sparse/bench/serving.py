"""Cases of serving: decode over long caches, keys in pages, and multi-head latent attention."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from modelopt_sparse.kernels import (
    DENSE,
    AttentionOutput,
    PagedKV,
    Phase,
    Plan,
    Seqs,
    SkipSoftmaxDecode,
    attention_paged,
    attention_varlen,
)

from .baselines import COPY, PRODUCT, Peer, Unavailable, copy_of, flashinfer_latent, product_of
from .case import CUDNN, FLASH, OWN_DENSE, SDPA, Case, Check, Setting, Trial
from .checks import DENSE_ERROR, DIAL_ERROR, forward_error, relative_error
from .inputs import (
    LATENT,
    LOG2_E,
    QUERY_NOISE,
    ROTARY,
    SINK,
    SKIPS_NOTHING,
    THRESHOLD,
    TOPIC,
    plain,
)
from .packages import FLASHINFER

DECODE_KEYS = 64
"""Keys of a decision tile in decode: the default of `SkipSoftmaxDecode`."""
OWN_PACKED = "own packed"


@dataclass(frozen=True, eq=False)
class Caches:
    """Sequences of one length, each with one query row: q [B, Hq, D]; k, v [B, length, Hk, D or Dv]."""

    q: Tensor
    k: Tensor
    v: Tensor

    @property
    def seqs(self) -> Seqs:
        """The sequences, as a kernel call takes them."""
        batch, length = self.k.shape[:2]
        return Seqs.from_lengths([1] * batch, [length] * batch, self.q.device)

    def call(self, plan: Plan, seqs: Seqs, details: bool = False) -> AttentionOutput:
        """Decodes."""
        k, v = self.k.flatten(0, 1), self.v.flatten(0, 1)
        return attention_varlen(self.q, k, v, seqs, plan=plan, details=details)

    def bytes(self) -> int:
        """Of all keys and values."""
        return sum(x.numel() * x.element_size() for x in (self.k, self.v))

    def flops(self) -> float:
        """Of one dense call, multiplications and additions of the two products."""
        rows = 2.0 * self.q.shape[0] * self.q.shape[1] * self.k.shape[1]
        return rows * (self.k.shape[-1] + self.v.shape[-1])

    def error(self, out: Tensor, kept: tuple[Tensor | None, ...] | None = None) -> float:
        """Largest error of the first and the last sequence against fp32 softmax over the kept tiles."""
        worst = 0.0
        for b in sorted({0, len(self.q) - 1}):
            group = self.q.shape[1] // self.k.shape[2]
            k, v = (x[b].float().repeat_interleave(group, 1) for x in (self.k, self.v))
            scores = torch.einsum("hd,nhd->hn", self.q[b].float(), k) * k.shape[-1] ** -0.5
            tiles = None if kept is None else kept[b]
            if tiles is not None:
                seen = tiles[:, 0].repeat_interleave(DECODE_KEYS, 1)[:, : scores.shape[1]]
                scores = scores.masked_fill(~seen, -torch.inf)
            exact = torch.einsum("hn,nhd->hd", scores.softmax(-1), v)
            worst = max(worst, relative_error(out[b], exact))
        return worst


def caches(batch: int, length: int, share: float | None, setting: Setting) -> Caches:
    """Caches of which a `share` of the key tiles can be skipped at lambda = `THRESHOLD`; None: plain ones.

    As in `inputs.dialled`, each key tile is about a topic, the first key is a sink, and the queries that
    share a KV head ask for some of the topics.
    """
    shape, device, dtype = setting.shape, setting.device, setting.dtype
    generator = torch.Generator(device).manual_seed(0)
    normal = partial(torch.randn, generator=generator, device=device)
    heads, dim = shape.kv_heads, shape.head_dim
    group = shape.q_heads // heads
    k = normal(batch, length, heads, dim, dtype=dtype)
    v = normal(batch, length, heads, dim, dtype=dtype)
    if share is None:
        return Caches(normal(batch, shape.q_heads, dim, dtype=dtype), k, v)
    topics = min(64, dim // 2)
    basis = torch.linalg.qr(normal(heads, dim, dim)).Q
    directions, sink, rest = basis.split([topics, 1, dim - topics - 1], dim=1)
    size = math.sqrt(dim)
    per_direction = math.sqrt(dim) / (
        size * LOG2_E
    )  # length of a query along one, per unit of log2 score
    tile = torch.arange(length, device=device) // DECODE_KEYS
    asked = torch.rand(batch, heads, topics, generator=generator, device=device).argsort(-1)
    asked = asked < round((1 - share) * topics)
    of_topics = torch.einsum("bht,htd->bhd", asked.float(), directions)
    wanted = per_direction * (TOPIC * of_topics + SINK * sink[:, 0])  # [B, Hk, D]
    noise = torch.einsum("bhgr,hrd->bhgd", normal(batch, heads, group, rest.shape[1]), rest)
    q = wanted[:, :, None] + QUERY_NOISE * noise
    head = torch.arange(heads, device=device)
    for b in range(batch):
        order = torch.rand(heads, int(tile[-1]) + 1, generator=generator, device=device).argsort(-1)
        topic = (order % topics)[:, tile].T  # [length, Hk]
        keys = directions[head, topic] * size
        keys[0] = sink[:, 0] * size
        k[b] = keys + torch.einsum("nhr,hrd->nhd", normal(length, heads, rest.shape[1]), rest)
    return Caches(q.flatten(1, 2).to(dtype), k, v)


def decode(batch: int, length: int, share: float | None, setting: Setting) -> Trial:
    """One row of each sequence. Share: of tiles to skip; 0: skipping on, and none falls; None: dense."""
    inputs = caches(batch, length, share or None, setting)
    seqs = inputs.seqs
    plan = DENSE
    if share is not None:
        plan = Plan(skip_decode=SkipSoftmaxDecode(THRESHOLD if share else SKIPS_NOTHING))
    found = inputs.call(plan, seqs, details=True)
    skipped = None
    if found.decode is not None:
        skipped = float(found.decode.skipped[0].sum() / found.decode.visible.sum())
    off = share is not None and abs((skipped or 0.0) - share) > DIAL_ERROR
    wrong = f"skipped {skipped:.1%}, dialled {share:.0%}" if off else ""
    peers: dict[str, Callable[[], Peer]] = {}
    if share is not None:
        peers[OWN_DENSE] = lambda: Peer(
            partial(inputs.call, DENSE, seqs),
            lambda: inputs.call(DENSE, seqs).out,
            is_rival=False,
        )
    if setting.device.type == "cuda":
        peers[CUDNN] = partial(_sdpa, inputs, SDPBackend.CUDNN_ATTENTION)
        peers[FLASH] = partial(_sdpa, inputs, SDPBackend.FLASH_ATTENTION)
        peers[COPY] = partial(copy_of, inputs.bytes(), setting.device)
    else:
        peers[SDPA] = partial(_sdpa, inputs, None)
    return Trial(
        inputs.error,
        partial(inputs.call, plan, seqs),
        lambda: Check(inputs.error(found.out, found.kept), DENSE_ERROR, wrong),
        peers,
        inputs.flops(),
        skipped,
    )


def paged_prefill(length: int, page_size: int, setting: Setting) -> Trial:
    """Dense prefill over pages, beside packed keys."""
    inputs = plain([length], setting.shape, setting.device, setting.dtype)
    pages = -(-length // page_size)
    order = torch.randperm(pages, generator=torch.Generator().manual_seed(0)).to(setting.device)
    cache = []
    for x in (inputs.k, inputs.v):
        whole = x.new_zeros(pages * page_size, *x.shape[1:])
        whole[:length] = x
        whole = whole.view(pages, page_size, *x.shape[1:])
        pool = torch.empty_like(whole)
        pool[order] = whole
        cache.append(pool)
    kv, seqs = PagedKV(cache[0], cache[1], order.int()[None]), inputs.seqs

    def packed() -> AttentionOutput:
        return attention_varlen(inputs.q, inputs.k, inputs.v, seqs)

    def run() -> AttentionOutput:
        return attention_paged(inputs.q, kv, seqs)

    error = partial(forward_error, inputs)
    return Trial(
        error,
        run,
        lambda: Check(error(run().out), DENSE_ERROR),
        {OWN_PACKED: lambda: Peer(packed, lambda: packed().out, is_rival=False)},
        inputs.flops(),
    )


def latent(batch: int, length: int, heads: int, page_size: int, setting: Setting) -> Trial:
    """Multi-head latent attention in decode, beside what its bytes and its operations take at least."""
    generator = torch.Generator(setting.device).manual_seed(0)
    normal = partial(torch.randn, generator=generator, device=setting.device, dtype=setting.dtype)
    pages = -(-length // page_size)
    latents = normal(batch * pages, page_size, LATENT + ROTARY)
    table = torch.randperm(batch * pages, generator=torch.Generator().manual_seed(0))
    table = table.view(batch, pages).int().to(setting.device)
    q = normal(batch, heads, LATENT + ROTARY)
    cache, scale = PagedKV.from_latent(latents, LATENT, table), 192**-0.5
    seqs = Seqs.from_lengths([1] * batch, [length] * batch, setting.device)

    def run() -> AttentionOutput:
        return attention_paged(q, cache, seqs, scale=scale, phase=Phase.DECODE)

    def error(out: Tensor) -> float:
        keys = latents[table[-1].long()].flatten(0, 1)[:length].float()
        weights = (q[-1].float() @ keys.T * scale).softmax(-1)
        return relative_error(out[-1], weights @ keys[:, :LATENT])

    flops = 2.0 * batch * heads * length * (2 * LATENT + ROTARY)
    bytes_read = batch * length * (LATENT + ROTARY) * latents.element_size()
    peers = {
        COPY: partial(copy_of, bytes_read, setting.device),
        PRODUCT: partial(product_of, flops, setting.device, setting.dtype),
    }
    if setting.device.type == "cuda":
        peers[FLASHINFER] = partial(flashinfer_latent, q, latents, table, length, scale)
    return Trial(error, run, lambda: Check(error(run().out), DENSE_ERROR), peers, flops)


def _sdpa(inputs: Caches, backend: SDPBackend | None) -> Peer:
    """PyTorch's attention over all sequences at once."""
    q = inputs.q[:, :, None]  # [B, Hq, 1, D]
    k, v = (x.transpose(1, 2).contiguous() for x in (inputs.k, inputs.v))

    def run() -> Tensor:
        if backend is None:
            return scaled_dot_product_attention(q, k, v, enable_gqa=True)
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(q, k, v, enable_gqa=True)

    try:
        run()
    except RuntimeError as error:
        raise Unavailable(str(error).strip().splitlines()[0]) from error
    return Peer(run, lambda: run()[:, :, 0])


def serving_cases() -> list[Case]:
    """The table: bf16, 32 query and 8 KV heads, head_dim 128, unless its name says otherwise."""
    k = 1024
    cases = [
        Case("decode", f"decode-{batch}x{n}k", partial(decode, batch, n * k, None))
        for batch, n in ((1, 128), (16, 32), (64, 8))
    ]
    cases += [
        Case("decode", f"decode-skip{share}-16x32k", partial(decode, 16, 32 * k, share / 100))
        for share in (0, 50, 73, 90)
    ]
    cases.append(Case("pages", "pages64-16k", partial(paged_prefill, 16 * k, 64)))
    for batch in (16, 128):
        for n in (8, 32):
            build = partial(latent, batch, n * k, 128, 64)
            cases.append(Case("latent", f"latent-{batch}x{n}k", build))
    return cases


def small_serving_cases() -> list[Case]:
    """Each kind of case, small."""
    return [
        Case("decode", "decode-2x700", partial(decode, 2, 700, None)),
        Case("decode", "decode-skip50-2x8k", partial(decode, 2, 8192, 0.5)),
        Case("pages", "pages16-200", partial(paged_prefill, 200, 16)),
        Case("latent", "latent-2x100", partial(latent, 2, 100, 16, 32)),
    ]
