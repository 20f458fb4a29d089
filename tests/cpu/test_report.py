"""What people see: counts as plain data and as a table."""

from __future__ import annotations

import json
from io import StringIO

import pytest
import torch
from rich.console import Console

import modelopt_sparse as mtsa
from tests.cpu import tiny
from tests.cpu.tiny import ATTENTION, FLASH, NM, SKIP, config_of, logits, skipped


def _printed(model):
    console = Console(record=True, width=100, file=StringIO())
    mtsa.print_sparse_attention_summary(model, console)
    return console.export_text()


def test_the_table_says_what_each_module_does():
    model = mtsa.sparsify(tiny.tiny_llama(), FLASH)
    mtsa.disable_sparse_attention(model, "*layers.0.*")
    logits(model)
    text = _printed(model)
    assert all(len(line) <= 100 for line in text.splitlines())
    assert "2 modules of LlamaForCausalLM" in text
    assert all(name in text for name in ATTENTION)
    assert "flash_skip_softmax" in text
    for field in ("br", "bc", "16", "0.1", "0.01", "backend", "pytorch"):
        assert field in text
    assert "yes" in text
    assert "no" in text.split(ATTENTION[0])[1].splitlines()[0]
    stats = mtsa.get_stats(model)[ATTENTION[1]]["prefill"]
    assert f"{stats['sparsity']:.1%}" in text
    assert f"{sum(stats['visible'])}" in text


def test_the_table_says_from_which_context_tiles_are_skipped():
    model = mtsa.sparsify(
        tiny.tiny_llama(),
        {"sparse_cfg": {"*": {"method": "triton_skip_softmax", "min_context": "auto"}}},
    )
    logits(model)
    assert "min_context=auto, 8192" in _printed(model)
    assert all(entry["prefill"] is None for entry in mtsa.get_stats(model).values())


def test_the_table_shows_decode_once_there_was_one():
    model = mtsa.sparsify(tiny.tiny_llama(), SKIP)
    assert "%" not in _printed(model)
    tiny.generate(model)
    stats = mtsa.get_stats(model)
    text = _printed(model)
    for phase in ("prefill", "decode"):
        for entry in stats.values():
            assert f"{entry[phase]['sparsity']:.1%}" in text
    total = sum(sum(entry["decode"]["skipped"]) for entry in stats.values())
    visible = sum(sum(entry["decode"]["visible"]) for entry in stats.values())
    assert f"{total / visible:.1%}" in text.split("all")[-1]


def test_the_table_of_a_dense_model_has_no_rows():
    assert "0 modules" in _printed(tiny.tiny_llama())


def test_the_summary_goes_to_standard_output(capsys):
    model = mtsa.sparsify(
        tiny.tiny_llama(), {"sparse_cfg": {"*0.self_attn": NM["sparse_cfg"]["*"]}}
    )
    mtsa.print_sparse_attention_summary(model)
    out = capsys.readouterr().out
    assert "1 module" in out
    assert "\nall" not in out


def test_stats_are_plain_data_by_phase():
    model = mtsa.sparsify(tiny.tiny_llama(), FLASH)
    before = mtsa.get_stats(model)
    assert before[ATTENTION[0]] == {
        "method": "flash_skip_softmax",
        "enabled": True,
        "attn_implementation": "modelopt_triton",
        "prefill": None,
        "decode": None,
    }
    tiny.generate(model, tokens=4)
    stats = mtsa.get_stats(model)
    assert json.loads(json.dumps(stats)) == stats
    for entry in stats.values():
        prefill, decode = entry["prefill"], entry["decode"]
        assert (prefill["calls"], decode["calls"]) == (1, 3)
        tiles = sum(range(1, -(-tiny.LENGTH // 16) + 1))
        assert prefill["visible"] == [tiles, tiles]
        (counted,) = prefill["counted"]
        assert counted["threshold"] == 0.01
        for skips, count in zip(prefill["skipped"], counted["skipped"], strict=True):
            assert 0 < count < skips < tiles
        assert prefill["sparsity"] == pytest.approx(sum(prefill["skipped"]) / (2 * tiles))
        assert decode["counted"] == []
        assert sum(decode["skipped"]) > 0


def test_counts_add_up_over_calls_and_start_over_at_a_reset():
    model = mtsa.sparsify(tiny.tiny_llama(), SKIP)
    logits(model)
    once = mtsa.get_stats(model)
    logits(model)
    twice = mtsa.get_stats(model)
    for name in ATTENTION:
        assert twice[name]["prefill"]["calls"] == 2
        for key in ("visible", "skipped"):
            assert twice[name]["prefill"][key] == [2 * n for n in once[name]["prefill"][key]]
    mtsa.reset_stats(model)
    assert all(entry["prefill"] is None for entry in mtsa.get_stats(model).values())
    logits(model)
    assert mtsa.get_stats(model) == once


def test_a_disabled_module_counts_nothing():
    model = mtsa.sparsify(tiny.tiny_llama(), SKIP)
    logits(model)
    before = mtsa.get_stats(model)
    mtsa.disable_sparse_attention(model)
    logits(model)
    after = mtsa.get_stats(model)
    for name in ATTENTION:
        assert after[name]["prefill"] == before[name]["prefill"]
        assert not after[name]["enabled"]


def test_sparse_softmax_has_no_tiles_to_count():
    model = mtsa.sparsify(tiny.tiny_llama(), NM)
    logits(model)
    assert all(entry["prefill"] is None for entry in mtsa.get_stats(model).values())


def test_counting_starts_over_when_what_is_counted_changes():
    model = mtsa.sparsify(tiny.tiny_llama(), FLASH)
    logits(model)
    module = model.get_submodule(ATTENTION[0])
    config = {**FLASH["sparse_cfg"]["*"], "thresholds": {"prefill": [0.1, 0.01, 0.001]}}
    module.method = type(module.method)(type(module.method).Config(**config))
    logits(model)
    stats = mtsa.get_stats(model)
    assert stats[ATTENTION[0]]["prefill"]["calls"] == 1
    assert len(stats[ATTENTION[0]]["prefill"]["counted"]) == 2
    assert stats[ATTENTION[1]]["prefill"]["calls"] == 2


def test_counting_does_not_change_the_output():
    counted = mtsa.sparsify(tiny.tiny_llama(), FLASH)
    rule = {**FLASH["sparse_cfg"]["*"], "thresholds": {"prefill": [0.1], "decode": [0.1]}}
    plain = mtsa.sparsify(tiny.tiny_llama(), {"sparse_cfg": {"*": rule}})
    assert torch.equal(logits(counted), logits(plain))
    assert skipped(counted) == skipped(plain)
    only = mtsa.sparsify(
        tiny.tiny_llama(), config_of("flash_skip_softmax", thresholds={"prefill": [0, 0.1]})
    )
    dense = logits(tiny.tiny_llama("modelopt_triton"))
    assert torch.allclose(logits(only), dense, atol=1e-5)
    assert all(
        sum(e["prefill"]["counted"][0]["skipped"]) > 0 for e in mtsa.get_stats(only).values()
    )
