"""transformers' continuous batching: the tokens, logits and tiles of each prompt alone, or a typed error."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import transformers
from tiny import config_of, prompt, skipped, snapshot, tiny_config, tiny_llama
from torch import Tensor, nn
from transformers import (
    ContinuousBatchingConfig,
    GenerationConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers.generation.continuous_batching import continuous_api

import modelopt_sparse as mtsa
from modelopt_sparse.errors import UnsupportedCall, UnsupportedModel
from modelopt_sparse.integrations import hf_paged, module_call
from modelopt_sparse.integrations.hf import ATTENTION_NAME

TOKENS, WINDOW, SMALL_WINDOW = 6, 200, 40
TAKES_ANY_NAME = tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 19)
CONFIGS = {
    "skip": config_of(
        "triton_skip_softmax",
        skip_softmax_threshold=0.5,
        skip_softmax_decode_threshold=0.5,
        decode_block_keys=16,
    ),
    "flash": config_of(
        "flash_skip_softmax",
        thresholds={"prefill": [0.5], "decode": [0.5]},
        br=16,
        bc=16,
        decode_block_keys=16,
    ),
}


def llama(attention: str = "sdpa", window: int = WINDOW) -> LlamaForCausalLM:
    return tiny_llama(attention)


def mistral(attention: str = "sdpa", window: int = WINDOW) -> MistralForCausalLM:
    """The weights of `llama`, every layer with a sliding window."""
    config = MistralConfig(**{**tiny_config().to_dict(), "sliding_window": window})
    return _with_weights(MistralForCausalLM, config, attention)


def qwen2(attention: str = "sdpa", window: int = WINDOW) -> Qwen2ForCausalLM:
    """The weights of `llama`, the second layer with a sliding window."""
    config = Qwen2Config(
        **{
            **tiny_config().to_dict(),
            "use_sliding_window": True,
            "sliding_window": window,
            "layer_types": ["full_attention", "sliding_attention"],
        }
    )
    return _with_weights(Qwen2ForCausalLM, config, attention)


def _with_weights(cls: Any, config: Any, attention: str) -> Any:
    model = cls._from_config(config, attn_implementation=attention).eval()
    missing, unexpected = model.load_state_dict(tiny_llama().state_dict(), strict=False)
    assert not unexpected
    with torch.no_grad():
        for name in missing:
            model.get_parameter(name).zero_()
    model.generation_config.eos_token_id = None
    return model


FAMILIES = {"llama": llama, "mistral": mistral, "qwen2": qwen2}


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Any:
    return FAMILIES[request.param]


def prompts() -> list[Tensor]:
    return [prompt(length, seed=length)[0] for length in (300, 70, 513)]


def batched(model: Any, at_once: int = 1024) -> tuple[list[list[int]], list[Tensor]]:
    """The tokens and their log-probabilities, prompt by prompt, of one call of generate_batch.

    Args:
        at_once: tokens of a forward pass at most. The prompts have 883.
    """
    generation = GenerationConfig(
        max_new_tokens=TOKENS, do_sample=False, eos_token_id=-1, pad_token_id=0
    )
    batching = ContinuousBatchingConfig(
        num_blocks=64, max_batch_tokens=at_once, return_logprobs=True, allow_block_sharing=False
    )
    found = model.generate_batch(
        [ids.tolist() for ids in prompts()],
        generation_config=generation,
        continuous_batching_config=batching,
    ).values()
    assert [each.error for each in found] == [None] * 3
    return [each.generated_tokens for each in found], [
        torch.tensor(each.logprobs) for each in found
    ]


def alone(model: Any) -> tuple[list[list[int]], list[Tensor]]:
    """The same of one call of generate for each prompt."""
    tokens, logprobs = [], []
    for ids in prompts():
        out = model.generate(
            ids[None],
            attention_mask=torch.ones_like(ids[None]),
            max_new_tokens=TOKENS,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        new = out.sequences[0, len(ids) :]
        tokens.append(new.tolist())
        each = torch.cat(out.logits).float().log_softmax(-1)
        logprobs.append(each.gather(1, new[:, None])[:, 0])
    return tokens, logprobs


def assert_same(got: tuple[list[list[int]], list[Tensor]], expected: Any) -> None:
    assert got[0] == expected[0]
    for a, b in zip(got[1], expected[1], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4)


def differ(a: tuple[Any, list[Tensor]], b: tuple[Any, list[Tensor]]) -> bool:
    return (torch.stack(a[1]) - torch.stack(b[1])).abs().max().item() > 0.01


def counts(model: nn.Module) -> dict[Any, Any]:
    found = {
        (name, phase): entry[phase] and (entry[phase]["visible"], entry[phase]["skipped"])
        for name, entry in mtsa.get_stats(model).items()
        for phase in ("prefill", "decode")
    }
    mtsa.reset_stats(model)
    return found


class Calls(list[Any]):
    """What reached the kernels: the sequences, window and plan of each call."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        original = module_call.attention_varlen

        def recording(q: Tensor, k: Tensor, v: Tensor, seqs: Any, **options: Any) -> Any:
            self.append((seqs.q_len.tolist(), options["window"], options["plan"]))
            return original(q, k, v, seqs, **options)

        monkeypatch.setattr(module_call, "attention_varlen", recording)


@pytest.mark.parametrize("at_once", [1024, 320], ids=["whole prompts", "chunks"])
def test_dense_attention_is_that_of_sdpa_and_of_each_prompt_alone(
    family: Any, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = alone(family(window=SMALL_WINDOW))
    assert_same(batched(family(window=SMALL_WINDOW), at_once), expected)
    model = family(ATTENTION_NAME, window=SMALL_WINDOW)
    calls = Calls(monkeypatch)
    with mtsa.continuous_batching(model):
        assert_same(batched(model, at_once), expected)
    windows = {"llama": {None}, "mistral": {SMALL_WINDOW}, "qwen2": {None, SMALL_WINDOW}}
    assert {window for _, window, _ in calls} == windows[family.__name__]
    # Requests share a call, those that decode and those in prefill too where prompts come in chunks.
    assert max(len(n_q) for n_q, _, _ in calls) == 3
    assert any(1 in n_q and max(n_q) > 1 for n_q, _, _ in calls) == (at_once == 320)


@pytest.mark.parametrize("name", CONFIGS)
def test_sparse_attention_skips_what_each_prompt_alone_skips(family: Any, name: str) -> None:
    dense = alone(family())
    model = mtsa.sparsify(family(), CONFIGS[name])
    expected = alone(model)
    assert differ(expected, dense)
    tiles = counts(model)
    with mtsa.continuous_batching(model):
        assert_same(batched(model), expected)
    for phase in ("prefill", "decode"):
        assert all(n > 0 for n in skipped(model, phase).values())
    assert counts(model) == tiles


def test_rows_that_decode_beside_chunks_of_prompts_have_their_own_threshold(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fields = {"skip_softmax_threshold": 1e-30, "decode_block_keys": 16}
    results = {}
    for threshold in (None, 0.9):
        config = config_of("triton_skip_softmax", skip_softmax_decode_threshold=threshold, **fields)
        model = mtsa.sparsify(llama(), config)
        expected = alone(model)
        decoded = {name: entry["decode"] for name, entry in mtsa.get_stats(model).items()}
        mtsa.reset_stats(model)
        calls = Calls(monkeypatch)
        with mtsa.continuous_batching(model):
            results[threshold] = batched(model, at_once=320)
        assert_same(results[threshold], expected)
        assert any(1 in n_q and max(n_q) > 1 for n_q, _, _ in calls)
        for name, entry in mtsa.get_stats(model).items():
            assert sum(entry["prefill"]["skipped"]) == 0
            if threshold is None:
                assert entry["decode"] is None
            else:
                assert entry["decode"]["visible"] == decoded[name]["visible"]
                assert entry["decode"]["skipped"] == decoded[name]["skipped"]
                assert sum(entry["decode"]["skipped"]) > 0
    assert differ(results[None], results[0.9])


def test_a_model_that_is_sparse_in_part_is_dense_in_the_other() -> None:
    config = {"sparse_cfg": {"*layers.1.*": CONFIGS["skip"]["sparse_cfg"]["*"]}}
    model = mtsa.sparsify(llama(), config)
    expected = alone(model)
    with mtsa.continuous_batching(model):
        assert_same(batched(model), expected)
    mtsa.disable_sparse_attention(model)
    with mtsa.continuous_batching(model):
        assert_same(batched(model), alone(llama()))


def test_a_sparse_model_refuses_continuous_batching_outside_of_the_block(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = mtsa.sparsify(llama(), CONFIGS["skip"])
    for each in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with pytest.raises(UnsupportedCall, match=r"modelopt_sparse\.continuous_batching\(model\)"):
            batched(each)
        with pytest.raises(UnsupportedCall), each.continuous_batching_context_manager():
            pass
    assert_same(batched(mtsa.unsparsify(model)), alone(llama()))


def test_sparsity_is_not_lost_where_flash_attention_is_installed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(continuous_api, "is_flash_attn_2_available", lambda **_: True)
    model = mtsa.sparsify(llama(), CONFIGS["skip"])
    expected = alone(model)
    mtsa.reset_stats(model)
    with pytest.raises(UnsupportedCall):
        batched(model)
    with mtsa.continuous_batching(model):
        assert_same(batched(model), expected)
    assert all(n > 0 for n in skipped(model).values())


def test_a_dense_model_outside_of_the_block_runs_where_transformers_takes_any_name() -> None:
    model = llama(ATTENTION_NAME)
    if TAKES_ANY_NAME:
        assert_same(batched(model), alone(llama()))
    else:
        with pytest.raises(ValueError, match=f"Implementation {ATTENTION_NAME} is not supported"):
            batched(model)


@pytest.mark.parametrize("failure", [None, RuntimeError, KeyboardInterrupt])
def test_the_block_leaves_the_model_as_it_was(failure: Any) -> None:
    model = mtsa.sparsify(llama(), CONFIGS["skip"])
    before, expected = snapshot(model), alone(model)
    try:
        with mtsa.continuous_batching(model):
            assert snapshot(model) != before
            if failure is not None:
                raise failure
    except (RuntimeError, KeyboardInterrupt):
        assert failure is not None
    assert snapshot(model) == before
    assert_same(alone(model), expected)
    with pytest.raises(UnsupportedCall):
        batched(model)


def test_the_summary_knows_the_name_of_the_block() -> None:
    model = mtsa.sparsify(llama(), CONFIGS["skip"])
    with mtsa.continuous_batching(model):
        table = mtsa.report.summary_table(model)
    assert list(table.columns[2].cells)[:2] == ["yes", "yes"]


@pytest.mark.parametrize(
    "build", [llama, lambda: mtsa.unsparsify(mtsa.sparsify(llama(), CONFIGS["skip"]))]
)
def test_the_block_refuses_a_model_that_does_not_run_our_attention(build: Any) -> None:
    refused = pytest.raises(UnsupportedModel, match="Call sparsify first")
    with refused, mtsa.continuous_batching(build()):
        pass


def test_other_calls_inside_of_the_block_are_refused() -> None:
    model = mtsa.sparsify(llama(), CONFIGS["skip"])
    with (
        mtsa.continuous_batching(model),
        pytest.raises(UnsupportedCall, match=r"cache: got None.*leave modelopt_sparse\.continuous"),
    ):
        model(prompt(40))


@pytest.mark.parametrize("change", [mtsa.unsparsify, lambda m: mtsa.sparsify(m, CONFIGS["flash"])])
def test_a_model_stays_sparse_inside_of_the_block(change: Any) -> None:
    model = mtsa.sparsify(llama(), CONFIGS["skip"])
    before = snapshot(model)
    with mtsa.continuous_batching(model):
        with pytest.raises(UnsupportedModel, match="Leave it first"):
            change(model)
        mtsa.disable_sparse_attention(model)
    states = model.config.sparse_attention_config["metadata"]["modules"]
    assert not any(state["enable"] for state in states.values())
    mtsa.enable_sparse_attention(model)
    assert snapshot(model)["modules"].keys() == before["modules"].keys()
    assert model.config._attn_implementation == ATTENTION_NAME


class Attention(nn.Module):
    layer_idx = 0
    is_causal = True


class Cache:
    """A paged cache of one layer, which keeps nothing."""

    def __init__(self, window: int = 1) -> None:
        self.sliding_windows = {0: window}

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, **place: Any
    ) -> tuple[Tensor, Tensor]:
        if TAKES_ANY_NAME:
            return key_states[0].transpose(0, 1), value_states[0].transpose(0, 1)
        kwargs = place["kwargs"]
        for name in ("cu_seq_lens_k", "max_length_k"):
            kwargs[name] = kwargs[name]["full_attention"]
        return key_states, value_states


def call(**changes: Any) -> Tensor:
    """Two requests, of 20 rows and of one."""
    q, k, v = torch.randn(3, 1, 2, 21, 8, generator=torch.Generator().manual_seed(0))
    cu, longest = torch.tensor([0, 20, 21], dtype=torch.int32), 20
    arguments: dict[str, Any] = {
        "module": Attention(),
        "cache": Cache(),
        "cu_seq_lens_q": cu,
        "cu_seq_lens_k": cu if TAKES_ANY_NAME else {"full_attention": cu},
        "max_seqlen_q" if TAKES_ANY_NAME else "max_length_q": longest,
        "max_seqlen_k" if TAKES_ANY_NAME else "max_length_k": (
            longest if TAKES_ANY_NAME else {"full_attention": longest}
        ),
        "read_index": [],
        "write_index": [],
        "logits_indices": cu,
        "logits_processor_args": cu,
        "use_cache": False,
        **changes,
    }
    module = arguments.pop("module")
    out, weights = hf_paged.paged_attention(module, q, k, v, None, **arguments)
    assert weights is None
    return out


def test_requests_do_not_see_each_other() -> None:
    _, _, v = torch.randn(3, 1, 2, 21, 8, generator=torch.Generator().manual_seed(0))
    out = call()
    assert out.shape == (1, 21, 2, 8)
    # The first row of either sees itself alone.
    torch.testing.assert_close(out[0, [0, 20]], v[0, :, [0, 20]].transpose(0, 1))


class Bidirectional(Attention):
    is_causal = False


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dropout": 0.1}, "dropout: got 0.1; takes 0"),
        ({"output_attentions": True}, "output_attentions: got True"),
        ({"position_bias": torch.zeros(1)}, "position_bias: got a Tensor; takes None"),
        ({"indices": torch.zeros(1)}, "indices: got a Tensor; takes None"),
        ({"cache": None}, "cache: got None; takes what continuous batching gives"),
        ({"cu_seq_lens_q": None}, "cu_seq_lens_q: got None; takes what continuous batching"),
        ({"block_table": torch.zeros(1)}, "block_table: got a tensor.*max_blocks_per_request=0"),
        ({"module": Bidirectional()}, "is_causal: got False"),
        ({"cache": Cache(window=8)}, "sliding_window: got None; takes the window"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_would_change_the_result_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedCall, match=message):
        call(**changes)


def test_softcap_and_sinks_are_honoured() -> None:
    plain = call()
    assert (call(softcap=0.5) - plain).abs().max() > 1e-3
    assert (call(s_aux=torch.ones(2)) - plain).abs().max() > 1e-3
    assert (call(sliding_window=4) - plain).abs().max() > 1e-3
    assert (call(scaling=1.0) - plain).abs().max() > 1e-3
