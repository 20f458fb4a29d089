"""What `modelopt-sparse explain` says is what a model then does."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from typer.testing import CliRunner

import modelopt_sparse as mtsa
from modelopt_sparse.errors import UnsupportedModel
from modelopt_sparse.kernels import ScoreGrid, choices, hopper_prefill
from modelopt_sparse.models.attention import attention_targets
from modelopt_sparse.module import observed
from modelopt_sparse.module_state import sparse_modules
from modelopt_sparse_cli import app
from modelopt_sparse_cli.choosing import on_device
from modelopt_sparse_cli.deciding import decisions
from modelopt_sparse_cli.explain import explained
from modelopt_sparse_cli.tracing import empty_model, trace, unreached
from tests.conformance.models import DECODERS, build, config_of
from tests.cpu.tiny import ATTENTION, tiny_config, tiny_llama

EVERYTHING = {"sparse_cfg": {"*": {"method": "triton_skip_softmax"}}, "include_non_causal": True}
LENGTH = 20
FIRST, SECOND = ATTENTION
# The oldest transformers' OPT makes a mask of its own, whose values say what is padding.
READ = {"opt"} if transformers.__version__.startswith("5.17.") else set()


def shapes(call):
    """What a call is made of, without values."""

    def of(value):
        if isinstance(value, ScoreGrid):
            return "grid", value.values.shape
        return (value.shape, value.dtype) if isinstance(value, torch.Tensor) else value

    # The stride of a dim of one entry means nothing.
    strides = [
        [step for step, size in zip(x.stride(), x.shape, strict=True) if size > 1]
        for x in (call.q, call.k, call.v)
    ]
    tensors = [(x.shape, x.dtype) for x in (call.q, call.k, call.v)]
    return tensors, strides, {name: of(value) for name, value in call.options.items()}


@pytest.mark.parametrize("family", DECODERS)
def test_the_traced_calls_are_those_of_the_model(family):
    model = mtsa.sparsify(build(family), EVERYTHING)
    seen = []

    def note(name):
        def observe(call, plan):
            seen[-1][name] = shapes(call)
            return call(plan)

        return observe

    with torch.no_grad(), observed({module: note(name) for name, module in sparse_modules(model)}):
        seen.append({})
        past = model(torch.ones(1, LENGTH).long(), use_cache=True).past_key_values
        seen.append({})
        model(torch.ones(1, 1).long(), use_cache=True, past_key_values=past)
    empty, mode = empty_model(config_of(family))
    if family in READ:
        with pytest.raises(UnsupportedModel, match="without values"):
            trace(empty, mode, LENGTH)
        return
    found = trace(empty, mode, LENGTH)
    assert seen[0]
    for calls, expected in zip((found.prefill, found.decode), seen, strict=True):
        assert {name: shapes(call) for name, call in calls.items()} == expected
    assert not mtsa.is_attn_sparsified(empty)


def test_real_tensors_have_the_shapes_and_strides_of_the_traced():
    empty, mode = empty_model(config_of("gpt_oss"))
    for call in trace(empty, mode, LENGTH).prefill.values():
        real = on_device(call, torch.device("cpu"))
        assert [(x.shape, x.stride()) for x in (real.q, real.k, real.v)] == [
            (x.shape, x.stride()) for x in (call.q, call.k, call.v)
        ]


@pytest.fixture
def on_a_cpu(monkeypatch):
    monkeypatch.setattr(choices, "IS_INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def on_hopper(monkeypatch):
    monkeypatch.setattr(choices, "IS_INTERPRETED", True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(hopper_prefill, "is_hopper", lambda device: True)


def saved(tmp_path, dtype=torch.float32, **changes):
    tiny_llama(config=tiny_config(**changes)).to(dtype).save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def rules(**sparse_cfg):
    return mtsa.SparseAttentionConfig(sparse_cfg=sparse_cfg)


def test_the_command_says_it_as_a_table_and_as_a_document(on_a_cpu, tmp_path):
    arguments = ["explain", saved(tmp_path), "--preset", "skip_softmax", "--length", "300"]
    table = CliRunner().invoke(app, arguments)
    assert table.exit_code == 0, table.output
    assert "reference, sparse" in table.stdout and FIRST in table.stdout
    document = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).stdout)
    module = document["modules"][SECOND]
    assert module["sparse"] and module["rules"] == ["default", "*"]
    assert module["why"] == "triton_skip_softmax, by the rule '*'"
    reasons = ["tensors on a CPU"]
    assert module["prefill"] == {"kernel": "reference", "is_sparse": True, "reasons": reasons}
    assert module["decode"] == {"kernel": "reference", "is_sparse": False, "reasons": reasons}
    assert document["device"] == "cpu" and document["unreached"] == {}


def test_a_checkpoint_that_is_sparse_says_itself_what_it_does(on_a_cpu, tmp_path):
    formula = {"target_sparsity": 0.3, "formula": {"a": 3.7, "b": 5.1}}
    config = rules(**{"*": {"method": "triton_skip_softmax", "skip_softmax_threshold": formula}})
    model = mtsa.sparsify(tiny_llama(), config)
    mtsa.disable_sparse_attention(model, SECOND)
    mtsa.set_sparsity(model, 0.4)
    model.save_pretrained(tmp_path / "sparse")
    arguments = ["explain", str(tmp_path / "sparse"), "--length", "300", "--json"]
    modules = json.loads(CliRunner().invoke(app, arguments).stdout)["modules"]
    first, second = modules[FIRST], modules[SECOND]
    assert first["sparse"] and first["prefill"]["is_sparse"] and first["rules"] == ["*"]
    assert first["why"] == "triton_skip_softmax, by the rule '*'"
    assert first["fields"]["skip_softmax_threshold"]["target_sparsity"] == 0.4
    assert not second["sparse"] and not second["prefill"]["is_sparse"]
    assert second["why"] == "disabled when the checkpoint was saved"
    # What is given counts before what it says.
    given = [*arguments, "--preset", "sparse_softmax"]
    modules = json.loads(CliRunner().invoke(app, given).stdout)["modules"]
    assert {module["fields"]["method"] for module in modules.values()} == {"triton_sparse_softmax"}


def test_a_module_that_a_rule_leaves_out_runs_our_dense_attention(on_a_cpu, tmp_path):
    config = rules(**{SECOND: {"method": "triton_skip_softmax"}})
    found = explained(saved(tmp_path), config, 300)["modules"]
    assert (found[FIRST]["sparse"], found[FIRST]["why"]) == (False, "no rule gives it a method")
    assert found[FIRST]["prefill"]["kernel"] == "reference" and found[FIRST]["fields"] is None
    assert not found[FIRST]["prefill"]["is_sparse"] and found[SECOND]["prefill"]["is_sparse"]


def test_the_last_rule_that_says_so_decides():
    config = rules(
        **{
            "*": {"method": "triton_sparse_softmax"},
            "*layers.1.*": {"method": "triton_skip_softmax"},
            "*self_attn": {"skip_softmax_threshold": 0.3},
            "*.0.*": {"enable": False},
        }
    )
    targets = attention_targets(tiny_llama())
    with pytest.raises(mtsa.ConfigError):  # the threshold is no field of layer 0's method
        decisions(config, targets)
    config = rules(
        **{
            "*": {"method": "triton_sparse_softmax"},
            "*layers.1.*": {"method": "triton_skip_softmax"},
            "*.0.*": {"enable": False},
        }
    )
    found = decisions(config, targets)
    assert found[FIRST].why == "enable: false, by the rule '*.0.*'" and not found[FIRST].is_sparse
    assert found[SECOND].why == "triton_skip_softmax, by the rule '*layers.1.*'"
    assert found[SECOND].rules == ("*", "*layers.1.*")


def test_bidirectional_modules_are_out_of_reach_of_wildcards():
    targets = attention_targets(build("bart"))
    found = decisions(mtsa.PRESETS["skip_softmax"], targets)
    whys = {target.causal_self_attention: found[name].why for name, target in targets.items()}
    assert whys[True].startswith("triton_skip_softmax")
    assert "include_non_causal" in whys[False]


def test_modules_without_the_interface_are_named():
    class LinearAttention(torch.nn.Module):
        pass

    model = tiny_llama()
    model.model.layers[0].linear = LinearAttention()
    found = unreached(model, set(attention_targets(model)))
    assert found == {"model.layers.0.linear": "LinearAttention"}


def test_on_hopper_it_is_the_kernel_made_for_it_or_why_not(on_hopper, tmp_path):
    config = rules(**{"*": {"method": "triton_skip_softmax"}, SECOND: {"enable": False}})
    bf16 = saved(tmp_path, torch.bfloat16, head_dim=64)
    found = explained(bf16, config, 300)["modules"]
    assert found[FIRST]["prefill"] == {"kernel": "hopper prefill", "is_sparse": True, "reasons": ()}
    assert found[SECOND]["prefill"] == {
        "kernel": "hopper prefill", "is_sparse": False, "reasons": ()
    }  # fmt: skip
    assert found[FIRST]["decode"]["kernel"] == "decode"
    found = explained(bf16, mtsa.PRESETS["sparse_softmax"], 300)["modules"]
    assert found[FIRST]["prefill"]["reasons"] == ("N:M sparsity",)
    found = explained(saved(tmp_path, head_dim=48), config, 300)["modules"]
    assert "head dims 48 and 48" in found[FIRST]["prefill"]["reasons"]
    assert "torch.float32 queries and torch.float32 keys" in found[FIRST]["prefill"]["reasons"]


def test_the_backend_and_min_context_are_reasons(on_hopper, tmp_path):
    model = saved(tmp_path)
    found = explained(model, mtsa.PRESETS["flash_skip_softmax"], 300)["modules"][FIRST]
    assert found["prefill"] == {
        "kernel": "reference", "is_sparse": True, "reasons": ('backend="pytorch"',)
    }  # fmt: skip
    config = rules(**{"*": {"method": "triton_skip_softmax", "min_context": 301}})
    found = explained(model, config, 300)["modules"][FIRST]["prefill"]
    assert not found["is_sparse"] and "300 keys are fewer than min_context, 301" in found["reasons"]
    assert explained(model, config, 301)["modules"][FIRST]["prefill"]["is_sparse"]


def test_a_call_that_would_be_refused_says_so(on_a_cpu, tmp_path):
    config = rules(
        **{
            "*": {
                "method": "triton_skip_softmax",
                "skip_softmax_decode_threshold": 0.1,
                "decode_vote_heads": 5,
            }
        }
    )
    found = explained(saved(tmp_path), config, 300)["modules"][FIRST]
    assert found["decode"]["kernel"] == "none" and "vote_heads" in found["decode"]["reasons"][0]
