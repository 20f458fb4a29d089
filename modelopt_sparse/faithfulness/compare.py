"""Dense against sparse, on a sparse model and a user's own token ids."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from modelopt_sparse.errors import ArgumentError, ArgumentTypeError, UnsupportedModel, describe
from modelopt_sparse.kernels.types import Phase
from modelopt_sparse.modes.apply import check_eval_mode, check_model
from modelopt_sparse.module import SparseAttentionModule, counting_anew, observed
from modelopt_sparse.module_state import sparse_modules

from .batches import Batch
from .probe import Probe
from .results import Comparison, ModuleComparison
from .summary import sparsity, token_results
from .tokens import TokenScores, token_scores


@torch.no_grad()
def compare(
    model: nn.Module,
    inputs: Iterable[Tensor | Mapping[str, Any]],
    *,
    num_decode_tokens: int = 0,
    confidence: float = 0.95,
) -> Comparison:
    """Runs a sparse model on token ids, dense and sparse, and says how far apart the two are.

    A batch runs twice. In the dense pass each enabled sparse module computes its attention dense and
    sparse, and the model goes on with the dense output: a module's error is its own, on dense inputs.
    In the sparse pass the model runs as it is; tiles are counted there. Modules that are disabled are dense
    in both. The model's statistics and what is enabled stay as they were, whatever happens.

    Args:
        model: a causal language model that was made sparse, in eval mode.
        inputs: batches of whole sequences on the model's device, each token ids [B, T] or a mapping of
            forward arguments, ``input_ids`` and ``attention_mask`` [B, T] among them, as tokenizers return.
            They are taken one by one, so progress can be shown around them; logits of past ones aren't kept.
            Padding, and what would follow the last token, isn't scored; ``labels`` aren't looked at.
        num_decode_tokens: so many tokens at the end of each sequence are given one by one, after the prompt
            before them, and so are decoded; what they predict is all that is scored then. 0: sequences run
            whole. Otherwise 2 or more, padding is on the left, and batches have nothing but ids and a mask.
        confidence: of the intervals, between 0 and 1.
    Returns:
        What was found, of the tokens and module by module. Means are over all tokens. Tokens of a
        sequence depend on one another, so intervals of bits and of KL are t intervals over sequences, by how
        much their own means differ; with one sequence over up to 20 blocks of consecutive tokens; None
        with less than 32 tokens. That of the agreement is Wilson's, which takes tokens for independent, so it
        may be too narrow.
    Raises:
        ArgumentError, ArgumentTypeError: not a model, no module of it is sparse and enabled, or none was
            called; it trains; a batch isn't what is taken, has a sequence of less than two tokens, or there
            are none.
        UnsupportedModel: its output has no logits of each token, or no cache where tokens are decoded; or it
            has an encoder and a decoder.
        UnsupportedCall: a batch has ``past_key_values``, ``use_cache`` or ``return_dict``, which are given
            here; or whatever the attention refuses.
    """
    modules = _enabled_modules(model)
    if isinstance(inputs, Tensor | Mapping | str) or not isinstance(inputs, Iterable):
        remedy = "Put a single batch in a list."
        got = f"a {type(inputs).__name__}"
        raise ArgumentTypeError(describe("inputs", got, "an iterable of batches", remedy))
    if not isinstance(confidence, float) or not 0 < confidence < 1:
        raise ArgumentError(describe("confidence", repr(confidence), "a float between 0 and 1"))
    if type(num_decode_tokens) is not int or num_decode_tokens < 0 or num_decode_tokens == 1:
        takes = "0, or an int from 2 on: the last token predicts none that is known"
        raise ArgumentError(describe("num_decode_tokens", repr(num_decode_tokens), takes))
    probes = {module: Probe() for module in modules.values()}
    sequences: list[TokenScores] = []
    with counting_anew(modules.values()):
        for index, batch in enumerate(inputs):
            checked = Batch.of(f"inputs[{index}]", batch)
            if num_decode_tokens:
                checked = checked.decoded(f"inputs[{index}]", num_decode_tokens)
            sequences += _scores(model, probes, checked, num_decode_tokens)
        if not sequences:
            raise ArgumentError(describe("inputs", "no batches", "at least one"))
        if not any(probe.was_called for probe in probes.values()):
            takes = "one whose attention is modelopt_triton"
            raise ArgumentError(describe("model", "one that called no sparse module", takes))
        return Comparison(
            **token_results(sequences, confidence),
            sparsity=sparsity(module.stats for module in modules.values()),
            modules={
                name: ModuleComparison(
                    prefill=probes[module].result(Phase.PREFILL, module.stats.prefill.counts),
                    decode=probes[module].result(Phase.DECODE, module.stats.decode.counts),
                )
                for name, module in modules.items()
                if probes[module].was_called
            },
        )


def _enabled_modules(model: nn.Module) -> dict[str, SparseAttentionModule]:
    """The modules to compare, by name, of a model that can be compared."""
    check_model(model)
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        got = f"a {type(model).__name__}, which has an encoder and a decoder"
        raise UnsupportedModel(describe("model", got, "a causal language model"))
    modules = {name: module for name, module in sparse_modules(model) if module.enabled}
    if not modules:
        remedy = "Call sparsify, or enable_sparse_attention, first."
        takes = "a model with at least one"
        raise ArgumentError(describe("model", "no enabled sparse module", takes, remedy))
    check_eval_mode(model)
    return modules


def _scores(
    model: nn.Module, probes: dict[SparseAttentionModule, Probe], batch: Batch, decoded: int
) -> list[TokenScores]:
    with observed(probes):
        dense = _logits(model, batch, decoded)
    return token_scores(batch, dense, _logits(model, batch, decoded))


def _logits(model: nn.Module, batch: Batch, decoded: int) -> Tensor:
    """[B, T, V]."""
    found, cache = [], None
    for arguments in batch.calls(decoded):
        with_cache = {"past_key_values": cache, "use_cache": decoded > 0, "return_dict": True}
        output = model(**arguments, **with_cache)
        found.append(_checked_logits(model, arguments["input_ids"].shape, output))
        cache = getattr(output, "past_key_values", None)
        if decoded and cache is None:
            got = f"a {type(model).__name__} whose output has no past_key_values"
            takes = "one that returns its cache, where tokens are decoded"
            raise UnsupportedModel(describe("model", got, takes, "Leave num_decode_tokens at 0."))
    return torch.cat(found, 1)


def _checked_logits(model: nn.Module, shape: torch.Size, output: object) -> Tensor:
    logits = getattr(output, "logits", None)
    if not isinstance(logits, Tensor) or logits.shape[:-1] != shape:
        found = list(logits.shape) if isinstance(logits, Tensor) else "none"
        got = f"a {type(model).__name__} whose logits are {found}"
        takes = f"a causal language model that returns {[*shape, 'V']}"
        raise UnsupportedModel(describe("model", got, takes))
    return logits
