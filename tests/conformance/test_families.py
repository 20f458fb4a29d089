"""Dense attention through the adapter equals eager attention: every family in every scenario."""

from __future__ import annotations

import functools

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import PreTrainedModel

from modelopt_sparse.integrations import hf, module_call
from modelopt_sparse.integrations.masks import INTERVAL_FAMILIES

from .models import FAMILIES, build
from .scenarios import SCENARIOS, Scenario

TOLERANCE = 2e-4  # of logits of size 1 to 10, in fp32
CELLS = [(name, scenario) for name, kind in FAMILIES.items() for scenario in SCENARIOS[kind]]

# What eager attention itself cannot do: the message of the error that the model raises.
NOT_OFFERED = {
    ("qwen3_next", "generate_prompt_lookup"): "assisted generation is not supported with stateful",
}
if Version(transformers.__version__) < Version("5.18"):
    NOT_OFFERED["llama4_text", "generate_static_cache"] = (
        "create_chunked_causal_mask() got an unexpected keyword argument 'block_sequence_ids'"
    )


@pytest.fixture(autouse=True)
def registered() -> None:
    hf.register()


@functools.cache
def pair(name: str) -> tuple[PreTrainedModel, PreTrainedModel]:
    """The same model with eager attention and with ours."""
    return build(name, "eager"), build(name, hf.ATTENTION_NAME)


@pytest.mark.parametrize(
    ("name", "scenario"),
    [pytest.param(*cell, id=f"{cell[0]}-{cell[1].__name__}") for cell in CELLS],
)
def test_dense_attention_equals_eager(
    name: str,
    scenario: Scenario,
    monkeypatch: pytest.MonkeyPatch,
    record_property: pytest.RecordProperty,
) -> None:
    reference, ours = pair(name)
    calls = []

    def counted(*args: object, **kwargs: object) -> object:
        calls.append(None)
        return attend(*args, **kwargs)

    attend = module_call.attention_varlen
    monkeypatch.setattr(module_call, "attention_varlen", counted)
    cell = [name, scenario.__name__]
    reason = NOT_OFFERED.get((name, scenario.__name__))
    with torch.no_grad():
        if reason is not None:
            record_property("conformance", [*cell, reason])
            with pytest.raises((TypeError, ValueError)) as raised:
                scenario(reference, True)
            assert reason in str(raised.value)
            pytest.skip(f"eager attention raises: {raised.value}")
        expected = scenario(reference, True)
        got = scenario(ours, False)
    assert calls, f"{name} never calls the registered attention function"
    assert expected.shape == got.shape
    assert expected.isfinite().all()
    difference = (expected - got).abs().max().item()
    record_property("conformance", [*cell, difference])
    assert difference < TOLERANCE


def test_exactly_the_compared_families_get_interval_masks() -> None:
    assert set(FAMILIES) == INTERVAL_FAMILIES


def test_the_comparison_covers_what_it_claims() -> None:
    scenarios = {name: len(SCENARIOS[kind]) for name, kind in FAMILIES.items()}
    assert len(FAMILIES) >= 26
    assert sum(count >= 10 for count in scenarios.values()) >= 20
