"""What a config.json tells serving engines, read as a configuration."""

from __future__ import annotations

import builtins
import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import modelopt_sparse as mtsa
from modelopt_sparse.config.checkpoints import MAX_CONFIG_BYTES
from modelopt_sparse.kernels.types import NMSparsity
from tests.cpu import tiny
from tests.cpu.tiny import ATTENTION, KernelCalls, config_of, logits

FORMULA = "a * exp(b * target_sparsity)"
FACTOR = {
    "formula": FORMULA,
    "prefill": {"a": 7.93, "b": 8.61},
    "decode": {"a": 0.12, "b": 9.85},
}
SHARES = {"prefill": 0.5, "decode": 0.3}
PRODUCER = {"name": "modelopt", "version": "0.47.0"}
GROUP = {
    "algorithm": "skip_softmax",
    "targets": ["LlamaAttention"],
    "ignore": [ATTENTION[0]],
    "threshold_scale_factor": FACTOR,
    "target_sparsity": SHARES,
}
FORMS: dict[str, dict[str, Any]] = {
    "config_groups": {"config_groups": {"group_0": GROUP}, "producer": PRODUCER},
    "sparse_algo": {
        "config_groups": {
            "group_0": {
                "sparse_algo": "softmax_skip",
                "targets": ["LlamaAttention"],
                "ignore": [ATTENTION[0]],
            }
        },
        "threshold_scale_factor": FACTOR,
        "target_sparsity": SHARES,
        "producer": PRODUCER,
    },
    "flat": {
        "threshold_scale_factor": FACTOR,
        "target_sparsity": SHARES,
        "ignore": [ATTENTION[0]],
    },
}
NM_GROUP = {
    "algorithm": "sparse_softmax",
    "targets": ["LlamaAttention"],
    "sparsity_n": 1,
    "sparsity_m": 4,
    "dense_sink_tokens": 8,
    "dense_recent_tokens": 32,
}
read = mtsa.SparseAttentionConfig.from_checkpoint


def write(folder: Path, block: Any, **others: Any) -> Path:
    """A folder with a config.json that has this block."""
    config = {"model_type": "llama", **others, "sparse_attention_config": block}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def in_groups(*groups: Any) -> dict[str, Any]:
    groups_by_name = {f"group_{number}": group for number, group in enumerate(groups)}
    return {"config_groups": groups_by_name, "producer": PRODUCER}


def changed(**changes: Any) -> dict[str, Any]:
    """The block in its newest form, with other values, or without where they are None."""
    group = {key: value for key, value in (GROUP | changes).items() if value is not None}
    return in_groups(group)


def plans(model: Any) -> dict[str, tuple[Any, Any]]:
    """The scale factors of each module that isn't dense, by phase."""
    return {
        name: tuple(part and part.scale_factor.factors[0] for part in (plan.skip, plan.skip_decode))
        for name in ATTENTION
        if getattr(module := model.get_submodule(name), "enabled", False)
        for plan in [module.method.plan()]
    }


@pytest.mark.parametrize("form", FORMS)
def test_each_form_gives_the_scale_factors_of_its_formula(form, tmp_path):
    config = read(write(tmp_path, FORMS[form]))
    model = mtsa.sparsify(tiny.tiny_llama(), config)
    expected = (7.93 * math.exp(8.61 * 0.5), 0.12 * math.exp(9.85 * 0.3))
    assert plans(model) == {ATTENTION[1]: pytest.approx(expected, rel=1e-12)}
    assert model.get_submodule(ATTENTION[1]).method.config.method == "triton_skip_softmax"


def test_lambda_is_the_scale_factor_over_the_number_of_keys(tmp_path, monkeypatch):
    share, formula = 0.6, {"a": 0.2, "b": 7.5}
    factor = {"formula": FORMULA, "prefill": formula}
    block = changed(threshold_scale_factor=factor, target_sparsity={"prefill": share}, ignore=None)
    model = mtsa.sparsify(tiny.tiny_llama(), read(write(tmp_path, block)))
    calls = KernelCalls(monkeypatch)
    by_formula = logits(model)
    assert calls[0].skip.scale_factor is not None
    fixed = 0.2 * math.exp(7.5 * share) / tiny.LENGTH
    dense = logits(tiny.tiny_llama())
    model = mtsa.sparsify(
        tiny.tiny_llama(), config_of("triton_skip_softmax", skip_softmax_threshold=fixed)
    )
    assert tiny.same(by_formula, logits(model))
    assert not tiny.same(by_formula, dense)


def test_a_block_that_an_engine_calibrated_for_model_optimizer(tmp_path):
    """Its targets are attention of any class, and it has a share of a phase that wasn't calibrated."""
    block = {
        "config_groups": {"group_0": {"sparse_algo": "softmax_skip", "targets": ["Attention"]}},
        "threshold_scale_factor": {"formula": FORMULA, "prefill": FACTOR["prefill"]},
        "target_sparse_ratio": {"prefill": 0.4, "decode": 0.5},
        "producer": PRODUCER,
    }
    model = mtsa.sparsify(tiny.tiny_llama(), read(write(tmp_path, block)))
    expected = pytest.approx(7.93 * math.exp(8.61 * 0.4), rel=1e-12)
    assert plans(model) == dict.fromkeys(ATTENTION, (expected, None))
    with pytest.raises(mtsa.ConfigError, match="one of them"):
        read(write(tmp_path, block | {"target_sparsity": 0.5}))


@pytest.mark.parametrize("form", FORMS)
def test_a_form_becomes_an_export_that_reads_back_the_same(form, tmp_path):
    def export(config):
        return mtsa.export_sparse_attention_config(mtsa.sparsify(tiny.tiny_llama(), config))

    first = export(read(write(tmp_path, FORMS[form])))
    assert first["config_groups"]["group_0"] == GROUP
    assert export(read(write(tmp_path, first))) == first


def test_nm_sparsity_reads_and_exports(tmp_path):
    block = in_groups({**NM_GROUP, "ignore": ["*.1.*"]})
    model = mtsa.sparsify(tiny.tiny_llama(), read(write(tmp_path, block)))
    assert model.get_submodule(ATTENTION[0]).method.plan().nm == NMSparsity(1, 4, 8, 32)
    assert not model.get_submodule(ATTENTION[1]).enabled
    first = mtsa.export_sparse_attention_config(model)
    assert first["config_groups"]["group_0"] == {**NM_GROUP, "ignore": [ATTENTION[1]]}
    again = mtsa.sparsify(tiny.tiny_llama(), read(write(tmp_path, first)))
    assert mtsa.export_sparse_attention_config(again) == first


coefficient = st.floats(1e-6, 1e6)
formula = st.fixed_dictionaries({"a": coefficient, "b": st.floats(-50, 50)})
share = st.floats(0, 1, exclude_min=True, exclude_max=True)
threshold = st.fixed_dictionaries({"target_sparsity": share, "formula": formula})
MODEL = tiny.tiny_llama()


@given(st.lists(threshold | st.none(), min_size=2, max_size=2).filter(any), st.booleans())
def test_any_calibrated_model_comes_back_from_its_export(tmp_path_factory, thresholds, half):
    prefill, decode = thresholds
    config = config_of(
        "triton_skip_softmax", skip_softmax_threshold=prefill, skip_softmax_decode_threshold=decode
    )
    model = mtsa.sparsify(MODEL, config)
    if half:
        mtsa.disable_sparse_attention(model, "*.0.*")
    first, before = mtsa.export_sparse_attention_config(model), plans(model)
    config = read(write(tmp_path_factory.mktemp("checkpoint"), first))
    again = mtsa.sparsify(MODEL, config)
    assert mtsa.export_sparse_attention_config(again) == first
    assert plans(again) == before
    assert len(before) == 2 - half


def test_without_targets_it_is_about_every_causal_self_attention(tmp_path):
    block = changed(targets=None, ignore=None)
    assert list(read(write(tmp_path, block)).sparse_cfg) == ["default", "*"]
    assert len(plans(mtsa.sparsify(tiny.tiny_llama(), read(tmp_path)))) == 2


def test_globs_of_ignore_match_as_those_of_engines_do(tmp_path):
    config = read(write(tmp_path, changed(ignore=["model.layers.[!0].*"])))
    assert list(plans(mtsa.sparsify(tiny.tiny_llama(), config))) == [ATTENTION[0]]


def test_escaped_names_are_read_as_names(tmp_path):
    block = changed(ignore=["model.layers.[0].self_attn"])
    assert list(plans(mtsa.sparsify(tiny.tiny_llama(), read(write(tmp_path, block))))) == [
        ATTENTION[1]
    ]


def test_an_ignore_that_matches_nothing_is_refused_by_the_model(tmp_path):
    config = read(write(tmp_path, changed(ignore=["blocks.0.attn1"])))
    with pytest.raises(mtsa.ConfigError, match=r"blocks\.0\.attn1.*patterns for 'model\.layers"):
        mtsa.sparsify(tiny.tiny_llama(), config)


@pytest.mark.parametrize("spelling", [FORMULA, "a*exp(b*target_sparsity)"])
def test_spaces_in_the_formula_do_not_matter(spelling, tmp_path):
    block = changed(threshold_scale_factor={**FACTOR, "formula": spelling})
    assert read(write(tmp_path, block)) == read(write(tmp_path, FORMS["config_groups"]))


def test_coefficients_for_both_phases_are_taken(tmp_path):
    factor = {"formula": FORMULA, "coefficients": {"a": 2.0, "b": 3.0}, "decode": {"a": 5, "b": 7}}
    block = changed(threshold_scale_factor=factor, target_sparsity=0.5, ignore=None)
    model = mtsa.sparsify(tiny.tiny_llama(), read(write(tmp_path, block)))
    expected = pytest.approx((2 * math.exp(1.5), 5 * math.exp(3.5)))
    assert plans(model)[ATTENTION[0]] == expected


def thresholds(config: Any) -> tuple[Any, Any]:
    """The shares of both phases, None where dense."""
    rule = config.sparse_cfg["type:LlamaAttention"]
    both = rule["skip_softmax_threshold"], rule["skip_softmax_decode_threshold"]
    return tuple(one and one["target_sparsity"] for one in both)


def test_a_phase_without_a_target_is_dense(tmp_path):
    folder = write(tmp_path, changed(target_sparsity={"decode": 0.3}))
    assert thresholds(read(folder)) == (None, 0.3)


def test_a_phase_that_model_optimizer_did_not_calibrate_is_dense(tmp_path):
    factor = {key: FACTOR[key] for key in ("formula", "prefill")}
    block = changed(threshold_scale_factor=factor, target_sparsity={"prefill": 0.5, "decode": 0.0})
    assert thresholds(read(write(tmp_path, block))) == (0.5, None)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (0.7, (0.7, 0.7)),
        ({"prefill": 0.7}, (0.7, None)),
        ({"decode": 0.2, "prefill": 0.1}, (0.1, 0.2)),
    ],
)
@pytest.mark.parametrize("own", [None, SHARES, 0.9])
def test_a_share_that_is_given_takes_the_place_of_the_checkpoints(given, expected, own, tmp_path):
    folder = write(tmp_path, changed(target_sparsity=own))
    assert thresholds(read(folder, target_sparsity=given)) == expected


def factor(**changes: Any) -> dict[str, Any]:
    new = {key: value for key, value in (FACTOR | changes).items() if value is not None}
    return changed(threshold_scale_factor=new)


def beside(**more: Any) -> dict[str, Any]:
    return FORMS["config_groups"] | more


TAKEN_NOT: dict[str, tuple[Any, str]] = {
    "no block": (None, "sparse_attention_config: got nothing; takes a mapping"),
    "text": ("skip_softmax", "sparse_attention_config: got 'skip_softmax'; takes a mapping"),
    "empty": ({}, "threshold_scale_factor: got nothing; takes a mapping"),
    "a family's own": (
        {"use_sparse_attention": True, "sparse_block_size": 64},
        "sparse_attention_config: got 'use_sparse_attention'; takes algorithm",
    ),
    "groups are a list": ({"config_groups": [GROUP]}, r"config_groups: got \[.*; takes a mapping"),
    "no groups": (in_groups(), "got 0 groups; takes one"),
    "a group is text": (in_groups("x"), r"config_groups\.group_0: got 'x'; takes a mapping"),
    "two groups": (in_groups(GROUP, GROUP), "got 2 groups; takes one"),
    "skip and N:M": (in_groups(GROUP, NM_GROUP), "got 2 groups; takes one group, for a module"),
    "twice": (beside(target_sparsity=0.5), "target_sparsity: got in a group and beside it"),
    "unknown beside": (beside(kv_cache="fp8"), "got 'kv_cache'; takes"),
    "no algorithm": (changed(algorithm=None), "algorithm: got nothing; takes 'skip_softmax' or"),
    "new algorithm": (changed(algorithm="vsa"), "algorithm: got 'vsa'; takes 'skip_softmax' or"),
    "algorithm list": (changed(algorithm=["skip_softmax"]), "algorithm: got"),
    "two algorithms": (changed(sparse_algo="dsa"), "algorithm: got 'skip_softmax', 'dsa'"),
    "steps": (changed(initial_disabled_steps=4), "got 'initial_disabled_steps'; takes algorithm"),
    "timestep": (changed(disabled_until_timestep=0.9), "got 'disabled_until_timestep'; takes"),
    "fixed": (changed(threshold=1e-4), "got 'threshold'; takes"),
    "implementation": (changed(attn_implementation="x/y"), "got 'attn_implementation'; takes"),
    "uncalibrated": (changed(threshold_scale_factor=None), "threshold_scale_factor: got nothing"),
    "a number": (changed(threshold_scale_factor=587.18), r"threshold_scale_factor: got 587\.18;"),
    "another formula": (
        factor(formula="a * target_sparsity ** b"),
        r"formula: got 'a \* target_sparsity \*\* b'; takes 'a \* exp\(b \* target_sparsity\)'",
    ),
    "code": (factor(formula="__import__('os').abort()"), r"formula: got .*; takes 'a \* exp"),
    "no formula": (factor(formula=None), "formula: got nothing; takes"),
    "no text": (factor(formula=5), "formula: got 5; takes"),
    "a third phase": (factor(verify={"a": 1, "b": 1}), "got 'verify'; takes formula, coeff"),
    "no decode": (factor(decode=None), r"factor\.decode: got nothing; takes .*Give target_spars"),
    "no a": (factor(prefill={"b": 1}), r"prefill\.a: got nothing; takes a number"),
    "a third": (factor(prefill={"a": 1, "b": 1, "c": 1}), "prefill: got 'c'; takes a, b"),
    "a list": (factor(prefill=[1, 2]), r"prefill: got \[1, 2\]; takes a mapping"),
    "a text": (factor(prefill={"a": "7", "b": 1}), r"prefill\.a: got '7'; takes a number"),
    "a bool": (factor(prefill={"a": True, "b": 1}), r"prefill\.a: got True; takes a number"),
    "a of 0": (factor(prefill={"a": 0, "b": 1}), "formula.a: Input should be greater than 0"),
    "a is infinite": (factor(prefill={"a": math.inf, "b": 1}), "formula.a: Input should be"),
    "b is nan": (factor(prefill={"a": 1, "b": math.nan}), "formula.b: Input should be"),
    "no share": (
        changed(target_sparsity=None),
        r"target_sparsity: got nothing; takes a share .*Give target_sparsity=",
    ),
    "no phase": (changed(target_sparsity={}), "target_sparsity: got nothing; takes a share"),
    "a share of 1": (changed(target_sparsity=1.0), r"target_sparsity: got 1\.0; takes a share"),
    "a share of 0": (changed(target_sparsity=SHARES | {"decode": 0}), "target_sparsity: got 0; "),
    "below 0": (changed(target_sparsity=-0.5), r"target_sparsity: got -0\.5; takes"),
    "share text": (changed(target_sparsity="0.5"), r"target_sparsity: got '0\.5'; takes"),
    "share bool": (changed(target_sparsity={"prefill": False}), "target_sparsity: got False;"),
    "share nan": (changed(target_sparsity=math.nan), "target_sparsity: got nan;"),
    "share phase": (changed(target_sparsity={"verify": 0.5}), "target_sparsity: got 'verify';"),
    "targets text": (changed(targets="LlamaAttention"), "targets: got 'LlamaAttention'; takes"),
    "ignore numbers": (changed(ignore=[5]), r"ignore: got \[5\]; takes a list of names"),
    "default": (changed(ignore=["default"]), "ignore: got 'default'; takes names and globs"),
    "type": (changed(ignore=["type:LlamaAttention"]), "ignore: got 'type:LlamaAttention'"),
    "braces": (changed(targets=["{a,b}"]), r"targets: got '{a,b}'; takes names and globs"),
    "slash": (changed(ignore=["a/b"]), "a slash or backslash"),
    "N of 0": (in_groups(NM_GROUP | {"sparsity_n": 0}), "sparsity_n: got 0; takes"),
    "M of 6": (in_groups(NM_GROUP | {"sparsity_m": 6}), "sparsity_m: got 6; takes"),
    "N over M": (in_groups(NM_GROUP | {"sparsity_n": 5}), "sparsity_n: got 5; takes"),
    "N:M with more": (in_groups(NM_GROUP | {"target_sparsity": 0.5}), "got 'target_sparsity'"),
}


@pytest.mark.parametrize("what", TAKEN_NOT)
def test_what_is_not_taken_is_refused_by_name(what, tmp_path):
    block, message = TAKEN_NOT[what]
    with pytest.raises(mtsa.ConfigError, match=message) as caught:
        read(write(tmp_path, block))
    assert str(caught.value).startswith(str(tmp_path / "config.json"))


@pytest.mark.parametrize("given", [0, 1, "0.5", True, [], {}, {"verify": 0.5}, math.nan])
def test_a_share_that_is_given_is_checked_as_well(given, tmp_path):
    with pytest.raises(mtsa.ConfigError, match="target_sparsity: got"):
        read(write(tmp_path, FORMS["flat"]), target_sparsity=given)


def test_nm_sparsity_has_no_share_to_give(tmp_path):
    with pytest.raises(mtsa.ConfigError, match=r"target_sparsity: got 0\.5; takes None for N:M"):
        read(write(tmp_path, in_groups(NM_GROUP)), target_sparsity=0.5)


@pytest.mark.parametrize("owner", [None, {"use_sparse_attention": True}])
def test_what_save_pretrained_wrote_of_a_sparse_model_is_for_from_pretrained(owner, tmp_path):
    config = tiny.tiny_config(**({"sparse_attention_config": owner} if owner else {}))
    model = mtsa.sparsify(tiny.tiny_llama(config=config), tiny.SKIP)
    model.save_pretrained(tmp_path)
    with pytest.raises(mtsa.ConfigError, match=r"sparse model saved; .*from_pretrained"):
        read(tmp_path)


FILES = {
    "not JSON": (b"{", "well-formed JSON"),
    "not text": (b"\xff\xfe\x00", "well-formed JSON"),
    "no mapping": (b"[1]", "got a list; takes a mapping"),
    "too deep": (b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}", "well-formed JSON"),
    "too big": (b" " * (MAX_CONFIG_BYTES + 1), "a larger file; takes at most"),
    "a key twice": (b'{"sparse_attention_config": 1, "sparse_attention_config": 2}', "twice"),
}


@pytest.mark.parametrize("what", FILES)
def test_a_file_that_is_no_config_json_is_refused(what, tmp_path):
    content, message = FILES[what]
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(mtsa.ConfigError, match=message):
        read(tmp_path)


def test_other_entries_of_the_config_json_do_not_matter(tmp_path):
    labels = {str(number): "x" * 50 for number in range(40_000)}
    folder = write(tmp_path, FORMS["flat"], id2label=labels, time_step_limit=[0, math.inf])
    assert read(str(folder)) == read(folder)


def test_a_folder_without_a_config_json_is_a_file_not_found_error(tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(FileNotFoundError, match=r"config\.json"):
            read(folder)
    (tmp_path / "config.json").mkdir()
    with pytest.raises(mtsa.ConfigError, match="folder"):
        read(tmp_path)


def test_what_is_no_folder_is_refused(tmp_path):
    folder = write(tmp_path, FORMS["flat"])
    with pytest.raises(mtsa.ConfigError, match="directory: got the file"):
        read(folder / "config.json")
    for value in (None, 5, b"x", {}):
        with pytest.raises(mtsa.ArgumentTypeError, match="directory"):
            read(value)


junk = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
) | st.sampled_from([10**400, "skip_softmax", "sparse_softmax", FORMULA, [], {}])


def places(block: Any, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """The paths of all values in nested mappings."""
    below = block.items() if isinstance(block, dict) else ()
    return [path, *(found for key, value in below for found in places(value, (*path, key)))]


@given(st.data(), st.sampled_from(sorted(FORMS)))
def test_whatever_stands_in_a_block_is_read_or_a_configuration_error(tmp_path_factory, data, form):
    block = copy.deepcopy(FORMS[form])
    *above, last = data.draw(st.sampled_from([place for place in places(block) if place]))
    holder = block
    for key in above:
        holder = holder[key]
    if data.draw(st.booleans()):
        last = data.draw(st.text(max_size=8))
    holder[last] = data.draw(junk)
    folder = write(tmp_path_factory.mktemp("checkpoint"), block)
    try:
        config = read(folder)
    except mtsa.ConfigError:
        return
    assert isinstance(config, mtsa.SparseAttentionConfig)


def test_nothing_in_the_file_is_evaluated(tmp_path, monkeypatch):
    ran = tmp_path / "ran"
    code = f"open({str(ran)!r}, 'w')"
    with monkeypatch.context() as patch:
        for name in ("eval", "exec"):
            patch.setattr(builtins, name, lambda *args: pytest.fail("evaluated"))
        for form in FORMS.values():
            read(write(tmp_path, form))
        with pytest.raises(mtsa.ConfigError):
            read(write(tmp_path, factor(formula=code)))
        with pytest.raises(mtsa.ConfigError):
            read(write(tmp_path, factor(prefill={"a": code, "b": 1})))
    assert not ran.exists()
