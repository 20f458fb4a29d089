"""What a configuration takes and refuses before any model is there."""

import copy
import pickle
from collections import OrderedDict
from types import MappingProxyType

import pytest
from pydantic import ValidationError

from modelopt_sparse.config import SparseAttentionConfig
from modelopt_sparse.config.calibration import CalibrationConfig
from modelopt_sparse.errors import ConfigError
from modelopt_sparse.methods import (
    FlashSkipSoftmaxConfig,
    TritonSkipSoftmaxConfig,
    TritonSparseSoftmaxConfig,
)
from modelopt_sparse.patterns import Target

SKIP, NM, FLASH = "triton_skip_softmax", "triton_sparse_softmax", "flash_skip_softmax"
SKIP_RULE = {"method": SKIP, "skip_softmax_threshold": 0.2}


def config(rules, **more):
    return SparseAttentionConfig(sparse_cfg=rules, **more)


def resolve(rules, name="model.layers.0.self_attn"):
    return config(rules).resolve(Target(name, "LlamaAttention", None))


def refused(rules, *words, **more):
    with pytest.raises(ConfigError) as refusal:
        config(rules, **more)
    assert not [word for word in words if word not in str(refusal.value)]
    assert len(str(refusal.value)) < 1500


@pytest.mark.parametrize(
    "rules",
    [None, 3, True, "x", "*", [], [("*", SKIP_RULE)], {("*", SKIP)}, SKIP_RULE.items(), Ellipsis],
    ids=repr,
)
def test_rules_come_as_a_mapping(rules):
    refused(rules, "sparse_cfg", "takes a mapping from patterns to rules")


@pytest.mark.parametrize(
    "rule", [None, 3, True, 0.1, "", SKIP, [], [SKIP_RULE], ("a",), {1}, TritonSkipSoftmaxConfig]
)
@pytest.mark.parametrize("pattern", ["*", "default"])
def test_a_rule_is_a_mapping_or_a_method_s_configuration(pattern, rule):
    refused({pattern: rule}, f"sparse_cfg['{pattern}']", "takes a mapping with 'method'")


@pytest.mark.parametrize(
    "pattern", ["", " ", "a/b", "a\\b", "{a", "a}", "{}", 3, None, True, 0.5, b"*"]
)
def test_a_bad_pattern_is_an_error_at_once(pattern):
    refused({"*": SKIP_RULE, pattern: {"enable": False}}, "sparse_cfg: pattern", "takes")


def test_a_class_as_pattern_is_told_to_use_its_name():
    refused({OrderedDict: SKIP_RULE}, "type:OrderedDict")


@pytest.mark.parametrize(
    "enable",
    [None, 0, 1, 1.0, "true", "True", "false", "", "on", [], [True], {"a": True}],
    ids=repr,
)
@pytest.mark.parametrize("rest", [{}, SKIP_RULE], ids=["alone", "with method"])
def test_enable_is_a_real_bool(enable, rest):
    refused(
        {"*": SKIP_RULE, "x": {**rest, "enable": enable}}, "sparse_cfg['x'].enable", "takes true"
    )


@pytest.mark.parametrize("value", [None, 0, 1, "true", "", [], {}])
def test_include_non_causal_is_a_real_bool(value):
    refused({"*": SKIP_RULE}, "include_non_causal", include_non_causal=value)


@pytest.mark.parametrize("method", ["", "nope", None, 3, True, [], {}, "TRITON_SKIP_SOFTMAX"])
def test_an_unknown_method_lists_the_registered_ones(method):
    refused({"*": {"method": method}}, "sparse_cfg['*'].method", SKIP, NM, FLASH)


@pytest.mark.parametrize(
    ("key", "near"),
    [
        ("sparse_config", "sparse_cfg"),
        ("cfg", "sparse_cfg"),
        ("include_noncausal", "include_non_causal"),
    ],
)
def test_an_unknown_key_of_the_configuration_names_the_nearest(key, near):
    with pytest.raises(ConfigError, match=rf"{key}: not a key.*Did you mean {near}"):
        SparseAttentionConfig(**{"sparse_cfg": {}, key: {}})
    with pytest.raises(ConfigError, match=rf"{key}: not a key.*Did you mean {near}"):
        SparseAttentionConfig.load({key: {}})


@pytest.mark.parametrize("key", ["*", "default", 3, None, "self", "zzzz"])
def test_rules_outside_sparse_cfg_are_sent_there(key):
    with pytest.raises(ConfigError, match="not a key of a configuration; takes sparse_cfg"):
        SparseAttentionConfig.load({key: SKIP_RULE})


def test_a_configuration_without_rules_is_an_error():
    with pytest.raises(ConfigError, match="sparse_cfg: got nothing"):
        SparseAttentionConfig()
    with pytest.raises(ConfigError, match="sparse_cfg: got nothing"):
        SparseAttentionConfig.load({})


@pytest.mark.parametrize(
    ("key", "near"),
    [("enabled", "enable"), ("enabl", "enable"), ("Enable", "enable"), ("methd", "method")],
)
@pytest.mark.parametrize("rest", [{}, {"method": SKIP}], ids=["alone", "with method"])
def test_a_misspelt_key_of_a_rule_names_the_nearest(rest, key, near):
    rules = {"*": {"method": SKIP}, "x": {**rest, key: False}}
    refused(rules, f"sparse_cfg['x'].{key}", f"Did you mean {near}?")


@pytest.mark.parametrize("key", [3, None, 0.5, True, ("a",)])
def test_a_key_of_a_rule_is_a_string(key):
    refused({"*": {"method": SKIP, key: 1}}, f"sparse_cfg['*'].{key}: not a field")
    refused({"*": {"method": SKIP}, "x": {key: 1}}, f"sparse_cfg['x'].{key}: not a field")


def test_a_rule_out_of_its_place_is_an_error():
    refused({"method": SKIP}, "'method'", "Put it in a rule")
    refused({"*": SKIP_RULE, "enable": False}, "'enable'", "Put it in a rule")
    refused({"*": SKIP_RULE, "skip_softmax_threshold": 0.1}, "skip_softmax_threshold", "Put it in")
    refused({"*": {**SKIP_RULE, "calibration": {"samples": 8}}}, "calibration", "beside sparse_cfg")


def test_a_calibration_stands_beside_the_rules_or_among_them():
    said = {"target_sparse_ratio": {"prefill": 0.4}, "samples": 8}
    beside = SparseAttentionConfig(sparse_cfg={"*": SKIP_RULE}, calibration=said)
    among = SparseAttentionConfig(sparse_cfg={"*": SKIP_RULE, "calibration": said})
    assert beside == among == SparseAttentionConfig.load(among.to_dict())
    assert beside.calibration.samples == 8
    assert beside.with_rule("*", enable=False).calibration == beside.calibration
    with pytest.raises(ConfigError, match="calibration: got two"):
        SparseAttentionConfig(sparse_cfg={"*": SKIP_RULE, "calibration": said}, calibration=said)
    with pytest.raises(ConfigError, match=r"calibration\.samples"):
        SparseAttentionConfig(sparse_cfg={"*": SKIP_RULE}, calibration={"samples": True})


@pytest.mark.parametrize(
    "source",
    [
        {"sparse_cfg": {"*": {"method": SKIP, "\ud800": 1}}},
        {"sparse_cfg": {"*": {"method": SKIP}}, "calibration": {"\ud800": 1}},
        {"sparse_cfg": {"*": {"method": SKIP}}, "\ud800": 1},
    ],
    ids=["rule", "calibration", "configuration"],
)
def test_a_key_that_can_not_be_printed_is_refused_in_words_that_can(source):
    with pytest.raises(ConfigError) as caught:
        SparseAttentionConfig.load(source)
    assert r"\ud800" in str(caught.value) and str(caught.value).encode()


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("threshold_for", " Did you mean thresholds_for?"),
        ("max_len", " Did you mean max_seqlen?"),
        ("x1y2", ""),
    ],
)
def test_a_key_that_a_calibration_does_not_have_names_the_nearest(key, hint):
    fields = ", ".join(CalibrationConfig.model_fields)
    said = f"calibration.{key}: not a field of CalibrationConfig; takes {fields}.{hint}"
    for load in (
        lambda: CalibrationConfig.load({key: 1}),
        lambda: SparseAttentionConfig(sparse_cfg={"*": SKIP_RULE}, calibration={key: 1}),
    ):
        with pytest.raises(ConfigError) as refusal:
            load()
        assert str(refusal.value) == said


@pytest.mark.parametrize("field", ["br", "sparsity_n", "thresholds", "num_sink_tokens"])
def test_a_field_of_a_method_that_no_rule_names_is_an_error(field):
    refused({"*": SKIP_RULE, "x": {field: 4}}, f"sparse_cfg['x'].{field}: not a field")


def test_a_field_without_any_method_asks_for_one():
    refused({"*": {"skip_softmax_threshold": 0.1}}, "skip_softmax_threshold", "'method' too", SKIP)
    refused({"*": {"enable": True}}, "enable", "'method' too", SKIP)
    refused({"default": {"enable": True}}, "enable", "'method' too", SKIP)


def test_a_method_s_fields_are_checked_against_its_defaults():
    refused({"*": {"method": NM, "sparsity_n": 6}}, "sparse_cfg['*'].sparsity_n", "which is 4")
    assert resolve({"*": {"method": NM, "sparsity_n": 6, "sparsity_m": 8}}).config.sparsity_n == 6


def test_everything_wrong_with_a_rule_is_said_at_once():
    rule = {"method": NM, "sparsity_n": 0, "sparsity_m": 5, "num_sink_tokens": -1, "backend": "x"}
    refused({"*": rule}, *(f"sparse_cfg['*'].{field}" for field in rule if field != "method"))


def test_a_callable_is_called_by_its_name_in_messages():
    def lower_half(name, module):
        return True

    with pytest.raises(ConfigError, match=r"lower_half.*skip_softmax_threshold: got -1"):
        config({lower_half: {"method": SKIP, "skip_softmax_threshold": -1}})


@pytest.mark.parametrize("mapping", [dict, OrderedDict, MappingProxyType])
def test_any_mapping_does(mapping):
    rules = mapping({"*": mapping(dict(SKIP_RULE))})
    assert config(rules) == config({"*": SKIP_RULE})
    assert SparseAttentionConfig.load(mapping({"sparse_cfg": rules})) == config({"*": SKIP_RULE})


@pytest.mark.parametrize(
    "instance",
    [
        TritonSkipSoftmaxConfig(skip_softmax_threshold=0.3, backend="pytorch"),
        TritonSparseSoftmaxConfig(sparsity_n=5, sparsity_m=8, dense_recent_tokens=1),
        FlashSkipSoftmaxConfig(thresholds={"decode": [0.1, 0.2]}, br=16),
    ],
)
def test_a_method_s_configuration_is_a_rule_with_all_its_fields(instance):
    given = config({"*": instance})
    assert set(given.sparse_cfg["*"]) == set(type(instance).model_fields)
    resolved = given.resolve(Target("a", "", None))
    assert resolved.config == instance
    assert resolved.enabled is True
    assert SparseAttentionConfig.load(given.to_dict()) == given


def test_a_configuration_object_that_was_tampered_with_is_checked_again():
    bad = TritonSkipSoftmaxConfig().model_copy(update={"skip_softmax_threshold": -1.0})
    refused({"*": bad}, "sparse_cfg['*'].skip_softmax_threshold: got -1.0")


def test_the_given_dict_is_neither_changed_nor_kept():
    rules = {"*": {"method": FLASH, "thresholds": {"prefill": ["1e-3"], "decode": [0.5]}}}
    before = copy.deepcopy(rules)
    made = config(rules)
    again = config(before)
    assert rules == before
    rules["*"]["thresholds"]["prefill"][0] = 0.9
    rules["*"]["enable"] = False
    rules["x"] = {}
    assert made == again
    assert made.to_dict() == again.to_dict()


def test_two_configurations_of_one_dict_share_nothing_that_can_change():
    rules = {"*": {"method": FLASH}}
    first, second = config(rules), config(rules)
    first.to_dict()["sparse_cfg"]["*"]["enable"] = False
    first.sparse_cfg["*"]["method"] = NM
    assert first == second == config({"*": {"method": FLASH}})


def test_a_configuration_is_frozen():
    made = config({"*": SKIP_RULE})
    with pytest.raises(ValidationError, match="frozen"):
        made.sparse_cfg = {}
    with pytest.raises(ValidationError, match="frozen"):
        made.include_non_causal = True
    with pytest.raises(TypeError):
        made.sparse_cfg["*"] = {}
    with pytest.raises(AttributeError):
        made.sparse_cfg.in_order = ()
    with pytest.raises(AttributeError):
        made.sparse_cfg.in_order[0].enable = False


def test_equality_and_hash_follow_the_rules_and_their_order():
    one, two = {"method": SKIP}, {"enable": False}
    assert config({"*": one, "x": two}) == config({"*": one, "x": two})
    assert hash(config({"*": one, "x": two})) == hash(config({"*": one, "x": two}))
    assert config({"*": one, "x": two}) != config({"x": two, "*": one})
    assert config({"*": one}) != config({"*": one}, include_non_causal=True)
    assert config({"*": one}) != config({"*": {**one, "skip_softmax_threshold": 0.1}})
    assert config({"*": {"method": SKIP, "backend": "triton"}}) == config(
        {"*": {"backend": "triton", "method": SKIP}}
    )


def test_default_is_first_wherever_it_is_written():
    rules = {"*": SKIP_RULE, "default": {"enable": False}}
    assert list(config(rules).sparse_cfg) == ["default", "*"]
    assert config(rules) == config(dict(reversed(rules.items())))


def test_deepcopy_and_pickle_give_equal_configurations():
    made = config({"*": {"method": FLASH, "thresholds": {"decode": ["1e-3"]}}, "x": {"br": 16}})
    assert copy.deepcopy(made) == made
    assert pickle.loads(pickle.dumps(made)) == made


@pytest.mark.parametrize("bad", [{"sparse_cfg": 3}, {"sparse_cfg": {"*": {"method": "x"}}}])
def test_pydantic_s_own_entry_raises_pydantic_s_own_error(bad):
    with pytest.raises(ValidationError, match="sparse_cfg"):
        SparseAttentionConfig.model_validate(bad)
    made = config({"*": SKIP_RULE})
    assert SparseAttentionConfig.model_validate(made.model_dump()) == made
    assert SparseAttentionConfig.model_validate_json(made.model_dump_json()) == made


def test_recursive_and_huge_values_give_short_errors():
    recursive = []
    recursive.append(recursive)
    refused({"*": {"method": FLASH, "thresholds": {"prefill": recursive}}}, "thresholds")
    refused({"*": {"method": FLASH, "thresholds": {"prefill": "x" * 100_000}}}, "thresholds")
    refused({"*": {"method": FLASH, "thresholds": {"prefill": [2] * 10_000}}}, "And 9990 more")
    refused({"*": {"method": FLASH, "br": 10**5000}}, "br")
    refused({"*": {"method": FLASH, "br": 16**5000}, 10**5000: {}}, "pattern")
    refused({"*": {"method": [10**5000]}}, "method")
    refused({"*": {"method": FLASH, "enable": 10**5000}}, "enable")
    refused({"x" * 100_000: {"method": FLASH}}, "pattern", "characters")
    refused({"*": {"method": FLASH, "y" * 100_000: 1}}, "not a field")


def test_with_rule_derives_and_leaves_the_original_alone():
    made = config({"default": {"enable": False}, "*": SKIP_RULE}, include_non_causal=True)
    before = made.to_dict()
    more = made.with_rule("*.0.*", enable=False)
    assert made.to_dict() == before
    assert more.include_non_causal is True
    assert list(more.sparse_cfg) == ["default", "*", "*.0.*"]
    assert more.sparse_cfg["*.0.*"] == {"enable": False}


@pytest.mark.parametrize(
    ("old", "fields", "new"),
    [
        (SKIP_RULE, {"backend": "pytorch"}, {**SKIP_RULE, "backend": "pytorch"}),
        (SKIP_RULE, {"enable": False}, {**SKIP_RULE, "enable": False}),
        (SKIP_RULE, {"method": SKIP}, SKIP_RULE),
        (SKIP_RULE, {"method": NM, "sparsity_n": 1}, {"method": NM, "sparsity_n": 1}),
        ({**SKIP_RULE, "enable": False}, {"method": SKIP}, SKIP_RULE),
        ({**SKIP_RULE, "enable": False}, {"method": NM}, {"method": NM}),
        (
            {**SKIP_RULE, "enable": False},
            {"backend": "pytorch"},
            {**SKIP_RULE, "enable": False, "backend": "pytorch"},
        ),
        (
            {"method": NM, "num_sink_tokens": 3},
            {"dense_sink_tokens": 5},
            {"method": NM, "num_sink_tokens": 5},
        ),
    ],
)
def test_with_rule_overrides_a_rule_in_its_place(old, fields, new):
    made = config({"*": old, "x": {"enable": True}}).with_rule("*", **fields)
    assert made == config({"*": new, "x": {"enable": True}})


def test_with_rule_checks_like_the_constructor():
    with pytest.raises(ConfigError, match=r"'\*'\]\.skip_softmax_threshold: got 2"):
        config({"*": SKIP_RULE}).with_rule("*", skip_softmax_threshold=2)
    with pytest.raises(ConfigError, match="pattern"):
        config({"*": SKIP_RULE}).with_rule("a/b", enable=False)
