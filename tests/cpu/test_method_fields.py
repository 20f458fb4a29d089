"""What the fields of the built-in methods take and refuse."""

import math
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from modelopt_sparse.config import SparseAttentionConfig
from modelopt_sparse.errors import ConfigError
from modelopt_sparse.methods import (
    FlashSkipSoftmax,
    FlashSkipSoftmaxConfig,
    TritonSkipSoftmax,
    TritonSkipSoftmaxConfig,
    TritonSparseSoftmax,
    TritonSparseSoftmaxConfig,
)
from modelopt_sparse.methods.fields import MAX_TOKENS
from modelopt_sparse.patterns import Target

SKIP, NM, FLASH = "triton_skip_softmax", "triton_sparse_softmax", "flash_skip_softmax"
BUILT_IN = {
    SKIP: (TritonSkipSoftmax, TritonSkipSoftmaxConfig),
    NM: (TritonSparseSoftmax, TritonSparseSoftmaxConfig),
    FLASH: (FlashSkipSoftmax, FlashSkipSoftmaxConfig),
}

NOT_SCALARS = [[], [1], {}, {"a": 1}, (), {1}, "", " ", "one", b"1", Ellipsis, torch.ones(1), 1j]
NOT_FRACTIONS = [
    *NOT_SCALARS,
    True,
    False,
    np.True_,
    math.nan,
    math.inf,
    -math.inf,
    np.float32("nan"),
    -1,
    -1e-9,
    -5e-324,
    1.0000000000000002,
    2,
    10**400,
    "nan",
    "inf",
    "-0.1",
    "1.5",
    "1e999",
    "0x1",
    "1_0e-3",
    "0,1",
    "1e-3 1e-3",
    "True",
    Decimal("0.1"),
]
NOT_INTEGERS = [
    *NOT_SCALARS,
    True,
    False,
    np.True_,
    None,
    math.nan,
    math.inf,
    64.5,
    "64.0",
    "64.5",
    "1e1",
    "6_4",
    "nan",
    "9" * 5000,
    10**400,
    -64,
    "-64",
]
PHASES = ("prefill", "decode")
BAD_VALUES = {
    (SKIP, "skip_softmax_threshold"): NOT_FRACTIONS,
    (SKIP, "skip_softmax_decode_threshold"): NOT_FRACTIONS,
    (NM, "sparsity_n"): [*NOT_INTEGERS, 0, -1, 9, 5],
    (NM, "sparsity_m"): [*NOT_INTEGERS, 0, 1, 2, 3, 5, 6, 7, 16, -4, "16"],
    (NM, "num_sink_tokens"): [*NOT_INTEGERS, -1, "-1", MAX_TOKENS + 1],
    (NM, "dense_window_size"): [*NOT_INTEGERS, -1, "-1", MAX_TOKENS + 1],
    (FLASH, "br"): [*NOT_INTEGERS, 0, 8, 63, 65, 256, "256"],
    (SKIP, "decode_block_keys"): [*NOT_INTEGERS, 0, 8, 63, 65, 256, "256"],
    (FLASH, "decode_block_keys"): [*NOT_INTEGERS, 0, 8, 63, 65, 256, "256"],
    (SKIP, "decode_segment_keys"): [*NOT_INTEGERS, 0, 64, 1000, 131072, "64"],
    (FLASH, "decode_segment_keys"): [*NOT_INTEGERS, 0, 64, 1000, 131072, "64"],
    (SKIP, "decode_vote_heads"): [*(x for x in NOT_INTEGERS if x is not None), 0, -1, "0"],
    (FLASH, "decode_vote_heads"): [*(x for x in NOT_INTEGERS if x is not None), 0, -1, "0"],
    (SKIP, "min_context"): [*NOT_INTEGERS, -1, "-1", "Auto", "auto ", MAX_TOKENS + 1],
    (FLASH, "min_context"): [*NOT_INTEGERS, -1, "-1", "Auto", "auto ", MAX_TOKENS + 1],
    (FLASH, "bc"): [*NOT_INTEGERS, 0, 8, 63, 65, 256, "256"],
    (FLASH, "thresholds"): [
        *NOT_SCALARS,
        *(True, None, 0.1, "prefill", math.nan, [0.1], {"prefil": [0.1]}, {1: [0.1]}),
        *({"prefill": [0.1], "phase": [0.1]}, {"prefill": None}, {"prefill": None, "decode": None}),
        *(
            {phase: bad}
            for phase in PHASES
            for bad in (0.1, True, "0.1", [], (), {}, {0.1}, [[0.1]])
        ),
        *({phase: [bad]} for phase in PHASES for bad in (*NOT_FRACTIONS, None)),
        *({phase: [0.1, bad]} for phase in PHASES for bad in (*NOT_FRACTIONS, None)),
    ],
    **{
        (name, "backend"): [*NOT_SCALARS, True, None, 0, "cuda", "Triton", "triton ", "flash"]
        for name in BUILT_IN
    },
    **{(name, "method"): [*NOT_SCALARS, True, None, 0, "x", name.upper()] for name in BUILT_IN},
}
CASES = [
    pytest.param(method, field, value, id=f"{field}={value!r:.30}-{method}")
    for (method, field), values in BAD_VALUES.items()
    for value in values
]


def test_every_field_of_every_built_in_method_has_bad_values():
    fields = {(name, field) for name in BUILT_IN for field in BUILT_IN[name][1].model_fields}
    assert fields == set(BAD_VALUES)


@pytest.mark.parametrize(("method", "field", "value"), CASES)
def test_a_method_refuses_bad_values_by_the_field_s_name(method, field, value):
    with pytest.raises(ValidationError, match=field):
        BUILT_IN[method][1](**{field: value})


@pytest.mark.parametrize(("method", "field", "value"), CASES)
def test_a_rule_refuses_bad_values_by_pattern_and_field(method, field, value):
    rule = {"method": method, field: value}
    with pytest.raises(ConfigError) as refusal:
        SparseAttentionConfig(sparse_cfg={"*attn*": rule})
    assert f"sparse_cfg['*attn*'].{field}" in str(refusal.value)
    assert "takes" in str(refusal.value)
    assert len(str(refusal.value)) < 600


@pytest.mark.parametrize(("method", "field", "value"), CASES)
def test_a_rule_without_method_refuses_bad_values_too(method, field, value):
    rules = {"*": {"method": method}, "*attn*": {field: value}}
    if (field, value) == ("sparsity_n", 5):
        # Fits when another rule sets sparsity_m=8; what doesn't fit together shows when resolved.
        with pytest.raises(ConfigError, match="sparsity_n"):
            SparseAttentionConfig(sparse_cfg=rules).resolve(Target("attn", "", None))
        return
    with pytest.raises(ConfigError) as refusal:
        SparseAttentionConfig(sparse_cfg=rules)
    assert f"sparse_cfg['*attn*'].{field}" in str(refusal.value)


@pytest.mark.parametrize("name", BUILT_IN)
@pytest.mark.parametrize("value", [[[]], {"a": {"b": [1]}}, ["x" * 10_000], "y" * 10_000])
def test_messages_stay_short_however_large_the_value(name, value):
    with pytest.raises(ConfigError) as refusal:
        SparseAttentionConfig(sparse_cfg={"*": {"method": name, "backend": value}})
    assert "backend" in str(refusal.value)
    assert len(str(refusal.value)) < 400


GOOD_FRACTIONS = [
    (0, 0.0),
    (-0.0, 0.0),
    ("-0", 0.0),
    (1, 1.0),
    ("1", 1.0),
    ("1e-3", 1e-3),
    ("1E-3", 1e-3),
    (" .5 ", 0.5),
    ("+0.5", 0.5),
    ("1.", 1.0),
    (0.1, 0.1),
    (5e-324, 5e-324),
    (np.float64(0.1), 0.1),
    (np.float32(0.5), 0.5),
    (np.int64(1), 1.0),
    (Fraction(1, 4), 0.25),
]


@pytest.mark.parametrize(("given", "kept"), GOOD_FRACTIONS, ids=repr)
def test_fractions_become_plain_floats(given, kept):
    config = TritonSkipSoftmaxConfig(skip_softmax_threshold=given)
    flash = FlashSkipSoftmaxConfig(thresholds={"decode": (given, given)})
    for value in (config.skip_softmax_threshold, *flash.thresholds.decode):
        assert type(value) is float
        assert value == kept
        assert math.copysign(1, value) == 1


@pytest.mark.parametrize(
    "given", [64, "64", " 64 ", "+64", np.int64(64), np.uint8(64), 64.0], ids=repr
)
def test_integers_become_plain_ints(given):
    config = TritonSparseSoftmaxConfig(num_sink_tokens=given, dense_window_size=given)
    flash = FlashSkipSoftmaxConfig(br=given, bc=given)
    for value in (config.num_sink_tokens, config.dense_window_size, flash.br, flash.bc):
        assert type(value) is int
        assert value == 64


@pytest.mark.parametrize("m", [4, 8])
@pytest.mark.parametrize("n", range(0, 10))
def test_n_is_taken_from_1_to_m(n, m):
    if 1 <= n <= m:
        assert TritonSparseSoftmaxConfig(sparsity_n=n, sparsity_m=m).sparsity_n == n
    else:
        with pytest.raises(ValidationError, match="sparsity_n"):
            TritonSparseSoftmaxConfig(sparsity_n=n, sparsity_m=m)


@pytest.mark.parametrize("count", [0, 1, 100_000, MAX_TOKENS])
def test_token_counts_are_taken_up_to_int32(count):
    config = TritonSparseSoftmaxConfig(num_sink_tokens=count, dense_window_size=count)
    assert (config.num_sink_tokens, config.dense_window_size) == (count, count)


def test_defaults_are_what_the_documentation_says():
    assert TritonSkipSoftmaxConfig().model_dump() == {
        "method": SKIP,
        "backend": "triton",
        "skip_softmax_threshold": 0.1,
        "skip_softmax_decode_threshold": None,
        "decode_block_keys": 64,
        "decode_segment_keys": 4096,
        "decode_vote_heads": None,
        "min_context": 0,
    }
    assert TritonSparseSoftmaxConfig().model_dump() == {
        "method": NM,
        "backend": "triton",
        "sparsity_n": 2,
        "sparsity_m": 4,
        "num_sink_tokens": 0,
        "dense_window_size": 64,
    }
    assert FlashSkipSoftmaxConfig().model_dump() == {
        "method": FLASH,
        "backend": "pytorch",
        "thresholds": {"prefill": (0.1,), "decode": (0.01,)},
        "br": 64,
        "bc": 128,
        "decode_block_keys": 64,
        "decode_segment_keys": 4096,
        "decode_vote_heads": None,
        "min_context": 0,
    }


UNKNOWN_KEYS = [
    (SKIP, "threshold", "skip_softmax_threshold"),
    (SKIP, "treshold", "skip_softmax_threshold"),
    (SKIP, "thresholds", "skip_softmax_threshold"),
    (SKIP, "skip_softmax_treshold", "skip_softmax_threshold"),
    (SKIP, "decode_threshold", "skip_softmax_decode_threshold"),
    (SKIP, "back_end", "backend"),
    (NM, "dense_window_blocks", "dense_window_size"),
    (NM, "window_size", "dense_window_size"),
    (NM, "sink_tokens", "num_sink_tokens"),
    (NM, "sparsity_k", "sparsity_"),
    (NM, "n", "sparsity_n"),
    (NM, "m", "sparsity_m"),
    (FLASH, "threshold", "thresholds"),
    (FLASH, "skip_softmax_threshold", "thresholds"),
    (FLASH, "block_keys", "bc"),
]


@pytest.mark.parametrize(("method", "key", "near"), UNKNOWN_KEYS)
def test_an_unknown_key_is_an_error_that_names_the_right_one(method, key, near):
    with pytest.raises(ValidationError, match=rf"{key}: not a field.*Did you mean {near}"):
        BUILT_IN[method][1](**{key: 1})
    with pytest.raises(ConfigError, match=rf"'\*'\]\.{key}: not a field.*Did you mean {near}"):
        SparseAttentionConfig(sparse_cfg={"*": {"method": method, key: 1}})
    rules = {"*": {"method": method}, "*x*": {key: 1}}
    with pytest.raises(ConfigError, match=rf"'\*x\*'\]\.{key}: not a field.*Did you mean {near}"):
        SparseAttentionConfig(sparse_cfg=rules)


@pytest.mark.parametrize("method", BUILT_IN)
def test_a_key_like_nothing_lists_the_fields(method):
    with pytest.raises(ValidationError, match="takes method, backend") as refusal:
        BUILT_IN[method][1](zzz=1)
    assert "Did you mean" not in str(refusal.value)


@pytest.mark.parametrize("method", BUILT_IN)
def test_nested_calibration_settings_are_refused_by_name(method):
    with pytest.raises(ValidationError, match=r"calibration: not a field.*beside sparse_cfg"):
        BUILT_IN[method][1](calibration={"target_sparse_ratio": 0.5})


def test_aliases_mean_the_fields():
    config = TritonSparseSoftmaxConfig(dense_sink_tokens=3, dense_recent_tokens=5)
    assert config == TritonSparseSoftmaxConfig(num_sink_tokens=3, dense_window_size=5)


@pytest.mark.parametrize(
    ("alias", "field"),
    [("dense_sink_tokens", "num_sink_tokens"), ("dense_recent_tokens", "dense_window_size")],
)
def test_a_field_given_twice_is_an_error(alias, field):
    with pytest.raises(ValidationError, match=f"{field}: given twice"):
        TritonSparseSoftmaxConfig(**{alias: 3, field: 3})
    rules = {"*": {"method": NM}, "*x*": {alias: 3, field: 3}}
    with pytest.raises(ConfigError, match=f"{field}: given twice"):
        SparseAttentionConfig(sparse_cfg=rules)


@pytest.mark.parametrize("method", BUILT_IN)
@pytest.mark.parametrize("backend", ["triton", "pytorch", "cuda", "eager", "flash", ""])
def test_the_whole_table_of_methods_and_backends(method, backend):
    if backend in ("triton", "pytorch"):
        config = SparseAttentionConfig(sparse_cfg={"*": {"method": method, "backend": backend}})
        assert config.resolve(Target("a", "", None)).config.backend == backend
    else:
        with pytest.raises(ConfigError, match="backend"):
            SparseAttentionConfig(sparse_cfg={"*": {"method": method, "backend": backend}})


@pytest.mark.parametrize("method", BUILT_IN)
def test_configurations_are_frozen_to_the_bottom_and_hashable(method):
    config = BUILT_IN[method][1]()
    for field in type(config).model_fields:
        with pytest.raises(ValidationError, match="frozen"):
            setattr(config, field, getattr(config, field))
    assert hash(config) == hash(BUILT_IN[method][1]())
    if method == FLASH:
        with pytest.raises(ValidationError, match="frozen"):
            config.thresholds.prefill = (0.5,)


def test_a_caller_s_list_is_copied():
    thresholds = {"prefill": [0.5, 0.25]}
    config = FlashSkipSoftmaxConfig(thresholds=thresholds)
    thresholds["prefill"].append(0.1)
    thresholds["decode"] = [0.1]
    assert config.thresholds.prefill == (0.5, 0.25)
    assert config.thresholds.decode is None
