"""What a model is calibrated with: the forms that are taken, and what is wrong with others."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset
from transformers import AutoTokenizer

import modelopt_sparse as mtsa
from modelopt_sparse.calibration.loop import device_of
from modelopt_sparse.calibration.prompts import tokenizer_of
from modelopt_sparse.errors import ArgumentError, ArgumentTypeError, ConfigError, UnsupportedModel
from modelopt_sparse.module_state import sparse_modules
from tests.cpu import tiny
from tests.cpu.bundled import MODEL
from tests.cpu.tiny import SKIP, tiny_llama

PROMPTS = tiny.prompt(300), tiny.prompt(200, seed=1)
CONFIG = {"target_sparse_ratio": {"prefill": 0.3}, "num_decode_tokens": 1}


class Rows(Dataset):
    """A dataset that is only indexed, and doesn't say where it ends."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index % len(self.rows)]


def calibrated(data: object, **changes: object) -> list[object]:
    model = mtsa.calibrate(mtsa.sparsify(tiny_llama(), SKIP), CONFIG | changes, data)
    return [module.method.config for _, module in sparse_modules(model)]


@pytest.fixture(scope="module")
def wanted() -> list[object]:
    return calibrated(list(PROMPTS))


@pytest.mark.parametrize(
    "form",
    {
        "a dataset of rows": lambda: Rows([ids[0] for ids in PROMPTS]),
        "its rows as lists": lambda: Rows([{"input_ids": ids[0].tolist()} for ids in PROMPTS]),
        "rows with a mask and labels": lambda: [
            {"input_ids": ids[0], "attention_mask": ids[0] > -1, "labels": ids[0]}
            for ids in PROMPTS
        ],
        "a loader": lambda: DataLoader(Rows([ids[0] for ids in PROMPTS]), batch_size=1),
        "a generator": lambda: iter(PROMPTS),
        "a function": lambda: lambda model: [model(ids) for ids in PROMPTS],
    }.items(),
    ids=lambda form: form[0],
)
def test_each_form_calibrates_alike(form, wanted):
    assert calibrated(form[1]()) == wanted


def test_check_takes_a_dataset_too():
    model = mtsa.calibrate(mtsa.sparsify(tiny_llama(), SKIP), CONFIG, list(PROMPTS))
    rows = Rows([ids[0].tolist() for ids in PROMPTS])
    assert mtsa.check_calibration(model, rows, CONFIG) == mtsa.check_calibration(
        model, PROMPTS, CONFIG
    )


IDS = PROMPTS[0]
WRONG = {
    "a batch": (IDS, ArgumentTypeError, "Put a single batch in a list"),
    "a number": (3, ArgumentTypeError, "got 3; takes an iterable of batches, or a dataset"),
    "text": ([["a"]], ArgumentTypeError, "takes token ids"),
    "rows of several lengths": ([[[1, 2], [3]]], ArgumentTypeError, "takes token ids"),
    "no tokens": ([[]], ArgumentTypeError, "takes token ids"),
    "fractions": ([[0.5]], ArgumentTypeError, "takes token ids"),
    "bits": ([IDS > 0], ArgumentTypeError, "takes token ids"),
    "no ids": ([{"labels": IDS}], ArgumentTypeError, "takes token ids"),
    "positions": (
        [{"input_ids": IDS, "position_ids": IDS}],
        ArgumentTypeError,
        "got position_ids; takes input_ids, attention_mask, labels. .* give a function",
    ),
    "a mask of another shape": (
        [{"input_ids": IDS, "attention_mask": IDS[:, :9]}],
        ArgumentError,
        r"got shape \(1, 9\); takes \(1, 300\)",
    ),
    "a mask of words": (
        [{"input_ids": IDS, "attention_mask": "all"}],
        ArgumentError,
        "attention_mask: got 'all'",
    ),
    "padding alone": (
        [{"input_ids": IDS, "attention_mask": IDS * 0}],
        ArgumentError,
        "padding alone",
    ),
}


@pytest.mark.parametrize(("data", "error", "message"), WRONG.values(), ids=list(WRONG))
def test_what_is_wrong_with_data_is_said(data, error, message):
    with pytest.raises(error, match=message):
        calibrated(data)


def test_a_model_in_training_mode():
    model = mtsa.sparsify(tiny_llama().train(), SKIP)
    with pytest.raises(ArgumentError, match="in training mode"):
        mtsa.calibrate(model, CONFIG, list(PROMPTS))


def test_a_model_that_keeps_no_cache():
    """Each chunk would be a prompt of its own."""
    model = mtsa.sparsify(tiny_llama(), SKIP)
    forward = model.forward

    def without_cache(ids, **options):
        return forward(ids, **options | {"use_cache": False, "past_key_values": None})

    model.forward = without_cache
    with pytest.raises(UnsupportedModel, match="returns no past_key_values"):
        mtsa.calibrate(model, CONFIG, list(PROMPTS))


def test_a_model_without_a_head():
    model = mtsa.sparsify(tiny_llama().model, SKIP)
    with pytest.raises(UnsupportedModel, match="returns no logits"):
        mtsa.calibrate(model, CONFIG, list(PROMPTS))


def test_a_model_that_computes_nan():
    model = mtsa.sparsify(tiny_llama(), SKIP)
    nn.init.constant_(model.lm_head.weight, torch.nan)
    with pytest.raises(ArgumentError, match="got NaN"):
        mtsa.calibrate(model, CONFIG, list(PROMPTS))


def test_weights_that_wait_elsewhere_do_not_say_where_inputs_go():
    model = tiny_llama()
    model.model.embed_tokens.to("meta")
    assert next(model.parameters()).device.type == "meta"
    assert device_of(model) == torch.device("cpu")


@pytest.mark.parametrize("family", ["qwen3", "gemma2", "llama"])
def test_a_checkpoint_without_a_tokenizer(family, tmp_path):
    """transformers makes one that knows no words for some families."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family}))
    assert tokenizer_of(str(tmp_path)) is None
    with pytest.raises(ConfigError, match="which has none"):
        calibrated(None, tokenizer=str(tmp_path), max_seqlen=1024)
    known = AutoTokenizer.from_pretrained(MODEL).get_vocab()
    assert tokenizer_of(str(MODEL)).get_vocab() == known
