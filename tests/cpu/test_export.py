"""What a sparse model does, in the schema that serving engines read."""

from __future__ import annotations

import json
from fnmatch import fnmatchcase
from importlib.resources import files
from typing import Any

import pytest
import torch
from jsonschema import Draft202012Validator, ValidationError
from transformers import BartConfig, BartForConditionalGeneration, LlamaForCausalLM

import modelopt_sparse as mtsa
from tests.cpu import tiny
from tests.cpu.tiny import ATTENTION, FLASH, NM, SKIP, config_of, logits, snapshot

SCHEMA = json.loads((files(mtsa) / "schemas/sparse_attention_config.schema.json").read_text())
PREFILL = {"target_sparsity": 0.5, "formula": {"a": 7.93, "b": 8.61}}
DECODE = {"target_sparsity": 0.3, "formula": {"a": 0.12, "b": 9.85, "worst_error": 1.5}}
TABLE = {"lengths": [64, 256], "targets": [0.5], "factors": [[3.0], [9.0]]}
CALIBRATED = config_of(
    "triton_skip_softmax", skip_softmax_threshold=PREFILL, skip_softmax_decode_threshold=DECODE
)
FORMULA = "a * exp(b * target_sparsity)"


def exported(config: Any, **changes: Any) -> dict[str, Any]:
    """What the tiny model exports, which the schema takes."""
    return checked(mtsa.export_sparse_attention_config(sparse(config, **changes)))


def sparse(config: Any, **changes: Any) -> Any:
    return mtsa.sparsify(tiny.tiny_llama(**changes), config)


def checked(export: dict[str, Any]) -> dict[str, Any]:
    Draft202012Validator(SCHEMA).validate(export)
    # Plain data: JSON gives it back.
    assert json.loads(json.dumps(export, allow_nan=False)) == export
    return export


def skipping(**fields: Any) -> dict[str, Any]:
    return config_of("triton_skip_softmax", **{"skip_softmax_threshold": None, **fields})


def test_a_calibrated_model_exports_its_formula_and_its_shares():
    assert exported(CALIBRATED) == {
        "config_groups": {
            "group_0": {
                "algorithm": "skip_softmax",
                "targets": ["LlamaAttention"],
                "threshold_scale_factor": {
                    "formula": FORMULA,
                    "prefill": {"a": 7.93, "b": 8.61},
                    "decode": {"a": 0.12, "b": 9.85},
                },
                "target_sparsity": {"prefill": 0.5, "decode": 0.3},
            }
        },
        "producer": {"name": "modelopt_sparse", "version": mtsa.__version__},
    }


def test_exporting_changes_nothing():
    model = sparse(CALIBRATED)
    before = snapshot(model)
    mtsa.export_sparse_attention_config(model)
    assert snapshot(model) == before


def test_both_methods_that_skip_export_the_same():
    flash = config_of(
        "flash_skip_softmax", thresholds={"prefill": [PREFILL, 0.1], "decode": [DECODE]}
    )
    assert exported(flash) == exported(CALIBRATED)


@pytest.mark.parametrize(
    "dense", [None, 0, {**DECODE, "target_sparsity": 0}, {"target_sparsity": 0, "table": TABLE}]
)
def test_a_dense_phase_has_neither_coefficients_nor_a_share(dense):
    prefill = skipping(skip_softmax_threshold=PREFILL, skip_softmax_decode_threshold=dense)
    group = exported(prefill)["config_groups"]["group_0"]
    assert group["threshold_scale_factor"] == {
        "formula": FORMULA,
        "prefill": {"a": 7.93, "b": 8.61},
    }
    assert group["target_sparsity"] == {"prefill": 0.5}
    decode = skipping(skip_softmax_threshold=dense, skip_softmax_decode_threshold=PREFILL)
    group = exported(decode)["config_groups"]["group_0"]
    assert group["target_sparsity"] == {"decode": 0.5}


def test_a_formula_is_exported_where_there_is_a_table_too():
    both = skipping(skip_softmax_threshold={**PREFILL, "table": TABLE})
    assert exported(both) == exported(skipping(skip_softmax_threshold=PREFILL))


def test_nm_sparsity_is_a_group_of_its_own_kind():
    config = config_of("triton_sparse_softmax", sparsity_n=3, sparsity_m=8, num_sink_tokens=4)
    assert exported(config)["config_groups"]["group_0"] == {
        "algorithm": "sparse_softmax",
        "targets": ["LlamaAttention"],
        "sparsity_n": 3,
        "sparsity_m": 8,
        "dense_sink_tokens": 4,
        "dense_recent_tokens": 64,
    }


@pytest.mark.parametrize("config", [CALIBRATED, NM], ids=["skip", "N:M"])
def test_modules_that_are_disabled_are_ignored(config):
    model = mtsa.disable_sparse_attention(sparse(config), "*.1.*")
    group = checked(mtsa.export_sparse_attention_config(model))["config_groups"]["group_0"]
    assert group["ignore"] == [ATTENTION[1]]
    mtsa.enable_sparse_attention(model)
    group = checked(mtsa.export_sparse_attention_config(model))["config_groups"]["group_0"]
    assert "ignore" not in group


def dense_by(rule: dict[str, Any]) -> dict[str, Any]:
    return {"sparse_cfg": {**CALIBRATED["sparse_cfg"], "*.0.*": rule}}


@pytest.mark.parametrize(
    "rule",
    [
        {"method": "triton_sparse_softmax", "sparsity_n": 4},
        {"skip_softmax_threshold": 0, "skip_softmax_decode_threshold": None},
        {"method": "triton_skip_softmax", "enable": False, "skip_softmax_threshold": 0.1},
        {"method": "flash_skip_softmax", "thresholds": {"prefill": [0, 0.1]}},
    ],
)
def test_modules_that_leave_nothing_out_are_ignored(rule):
    group = exported(dense_by(rule))["config_groups"]["group_0"]
    assert group["ignore"] == [ATTENTION[0]]


def test_modules_that_were_never_converted_are_ignored():
    config = {"sparse_cfg": {ATTENTION[0]: CALIBRATED["sparse_cfg"]["*"]}}
    group = exported(config)["config_groups"]["group_0"]
    assert group["ignore"] == [ATTENTION[1]]


def tiny_bart() -> BartForConditionalGeneration:
    torch.manual_seed(0)
    sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": 64}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    ffn = {"encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    return BartForConditionalGeneration(BartConfig(**sizes, **heads, **ffn)).eval()


def test_cross_attention_of_the_same_class_is_ignored_by_name():
    model = mtsa.sparsify(tiny_bart(), CALIBRATED)
    (group,) = checked(mtsa.export_sparse_attention_config(model))["config_groups"].values()
    assert group["targets"] == ["BartAttention"]
    assert group["ignore"] == [
        "model.encoder.layers.0.self_attn",
        "model.decoder.layers.0.encoder_attn",
    ]


def test_names_that_look_like_globs_are_escaped():
    model = tiny.tiny_llama()
    odd = torch.nn.ModuleDict({"a[b]": model.model.layers[1].self_attn, "ab": torch.nn.Identity()})
    model.model.odd, model.model.layers[1] = odd, torch.nn.Identity()
    mtsa.sparsify(model, {"sparse_cfg": {ATTENTION[0]: CALIBRATED["sparse_cfg"]["*"]}})
    (group,) = checked(mtsa.export_sparse_attention_config(model))["config_groups"].values()
    (ignored,) = group["ignore"]
    assert fnmatchcase("model.odd.a[b]", ignored)
    assert not fnmatchcase("model.odd.ab", ignored)


CANNOT: dict[str, tuple[dict[str, Any], str]] = {
    "a fixed lambda": (
        SKIP,
        r"layers\.0\.self_attn, prefill: got a fixed lambda, 0\.1; takes .*Calib",
    ),
    "of decode": (
        skipping(skip_softmax_threshold=PREFILL, skip_softmax_decode_threshold=1e-3),
        r"decode: got a fixed lambda, 0\.001",
    ),
    "of flash": (FLASH, r"prefill: got a fixed lambda"),
    "a table": (
        skipping(skip_softmax_threshold={"target_sparsity": 0.5, "table": TABLE}),
        r"prefill: got a table without a formula; takes .*formula",
    ),
    "other coefficients": (
        dense_by({"skip_softmax_threshold": {**PREFILL, "formula": {"a": 7.93, "b": 8.6}}}),
        r"layers\.1\.self_attn: got .*8\.61.*; takes what model\.layers\.0.*8\.6}.*one group",
    ),
    "other shares": (
        dense_by({"skip_softmax_threshold": {**PREFILL, "target_sparsity": 0.4}}),
        r"got .*'prefill': 0\.5.*takes .*'prefill': 0\.4",
    ),
    "one phase more": (dense_by({"skip_softmax_decode_threshold": None}), "one group"),
    "another method": (
        dense_by({"method": "triton_sparse_softmax"}),
        "skip_softmax.*sparse_softmax",
    ),
    "another N:M": (
        {"sparse_cfg": {**NM["sparse_cfg"], "*.1.*": {"num_sink_tokens": 1}}},
        "'dense_sink_tokens': 1.*takes .*'dense_sink_tokens': 0",
    ),
}


@pytest.mark.parametrize("what", CANNOT)
def test_what_the_schema_has_no_form_for_is_refused_by_name(what):
    config, message = CANNOT[what]
    with pytest.raises(mtsa.ConfigError, match=message):
        mtsa.export_sparse_attention_config(sparse(config))


def test_what_is_disabled_may_be_whatever_it_is():
    config = dense_by({"skip_softmax_threshold": 0.1, "enable": False})
    assert exported(config)["config_groups"]["group_0"]["ignore"] == [ATTENTION[0]]


class _Other(mtsa.SparseMethodConfig):
    method: str = "other"


def test_a_method_of_ones_own_is_refused_by_name():
    model = sparse(CALIBRATED)
    model.get_submodule(ATTENTION[1]).method.config = _Other()
    with pytest.raises(mtsa.ConfigError, match=r"layers\.1\.self_attn: got method 'other'; takes"):
        mtsa.export_sparse_attention_config(model)


def test_a_dense_model_is_refused():
    for model in (
        tiny.tiny_llama(),
        mtsa.disable_sparse_attention(sparse(CALIBRATED)),
        sparse(skipping()),
        sparse(config_of("triton_sparse_softmax", sparsity_n=4)),
    ):
        with pytest.raises(mtsa.ConfigError, match="model: got one that is dense; takes"):
            mtsa.export_sparse_attention_config(model)


def test_a_wrapped_model_is_refused_for_its_names_are_others():
    model = sparse(CALIBRATED)
    for wrapped in (torch.nn.Sequential(model), torch.compile(model, backend="eager")):
        with pytest.raises(mtsa.UnsupportedModel, match="takes a transformers model"):
            mtsa.export_sparse_attention_config(wrapped)


def test_one_checkpoint_serves_engines_and_this_package(tmp_path):
    model = sparse(dense_by({"enable": False}))
    export = mtsa.export_sparse_attention_config(model)
    model.config.sparse_attention_config.update(export)
    model.save_pretrained(tmp_path)
    block = json.loads((tmp_path / "config.json").read_text())["sparse_attention_config"]
    checked({key: block[key] for key in export})
    loaded = mtsa.from_pretrained(LlamaForCausalLM, tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    assert mtsa.export_sparse_attention_config(loaded) == export
    # What engines would read is out of date once a module is enabled.
    mtsa.enable_sparse_attention(model)
    assert "config_groups" not in model.config.sparse_attention_config


def _group(export):
    return export["config_groups"]["group_0"]


BROKEN = {
    "another formula": lambda e: _group(e)["threshold_scale_factor"].update(
        formula="a ** target_sparsity"
    ),
    "no formula": lambda e: _group(e)["threshold_scale_factor"].pop("formula"),
    "no coefficients": lambda e: _group(e).update(threshold_scale_factor={"formula": FORMULA}),
    "no b": lambda e: _group(e)["threshold_scale_factor"]["decode"].pop("b"),
    "a share of 1": lambda e: _group(e)["target_sparsity"].update(prefill=1),
    "no share": lambda e: _group(e).update(target_sparsity={}),
    "no algorithm": lambda e: _group(e).pop("algorithm"),
    "another key": lambda e: _group(e).update(min_context=5),
    "no targets": lambda e: _group(e).update(targets=[]),
    "no producer": lambda e: e.pop("producer"),
    "two groups": lambda e: e["config_groups"].update(group_1=_group(e)),
}


@pytest.mark.parametrize("what", BROKEN)
def test_the_schema_refuses_what_is_not_an_export(what):
    Draft202012Validator.check_schema(SCHEMA)
    export = exported(CALIBRATED)
    BROKEN[what](export)
    with pytest.raises(ValidationError):
        checked(export)
