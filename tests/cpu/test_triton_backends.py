"""Where the Triton kernels run and where they say that they don't."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import modelopt_sparse
from modelopt_sparse.errors import UnsupportedCall
from modelopt_sparse.kernels import Phase, Plan, SkipSoftmaxDecode, attention_triton
from tests.inputs import needs_interpreter, topical

ROOT = Path(modelopt_sparse.__file__).parent.parent


@needs_interpreter
def test_float64_is_refused_with_a_remedy():
    inputs = topical([3], [5], gaps=False)
    with pytest.raises(UnsupportedCall, match=r"q: got torch\.float64.*attention_reference"):
        attention_triton(*inputs.qkv)


@needs_interpreter
@pytest.mark.parametrize("vote_heads", [None, 1], ids=["groups", "heads"])
def test_more_than_16_rows_that_decode_are_refused_where_they_skip(vote_heads):
    inputs = topical([17], [40], gaps=False, dtype=torch.float32)
    skip = SkipSoftmaxDecode(0.1, 16, 64, vote_heads=vote_heads)
    with pytest.raises(UnsupportedCall, match=r"max_q 17.*at most 16 rows.*Phase\.PREFILL"):
        attention_triton(*inputs.qkv, plan=Plan(skip_decode=skip), phase=Phase.DECODE)
    dense = attention_triton(*inputs.qkv, phase=Phase.DECODE)
    assert torch.equal(dense.out, attention_triton(*inputs.qkv, phase=Phase.PREFILL).out)


CALLS = """
import torch
import modelopt_sparse
from modelopt_sparse.errors import UnsupportedCall
from modelopt_sparse.kernels import Plan, Seqs, SkipSoftmax, attention_triton, attention_varlen
x = torch.randn(5, 2, 16)
seqs = Seqs.from_lengths([5])
plan = Plan(skip=SkipSoftmax(0.1, 16, 16))
assert attention_varlen(x, x, x, seqs, plan=plan).out.isfinite().all()
try:
    attention_triton(x, x, x, seqs, plan=plan)
except UnsupportedCall as error:
    print(error)
"""
NO_TRITON = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "triton":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing())
"""
MODEL = """
from transformers import LlamaConfig, LlamaForCausalLM
config = LlamaConfig(vocab_size=16, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
                     num_attention_heads=2, num_key_value_heads=1)
model = LlamaForCausalLM._from_config(config).eval()
modelopt_sparse.sparsify(model, modelopt_sparse.SPARSE_SOFTMAX_DEFAULT)
assert model(torch.arange(16)[None]).logits.isfinite().all()
"""


def printed(program: str, **variables: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=180,
        env={"CUDA_VISIBLE_DEVICES": "", "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
        | variables,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_tensors_on_a_cpu_are_refused_outside_of_the_interpreter():
    message = printed(CALLS)
    assert "q: got tensors on cpu" in message
    assert "TRITON_INTERPRET=1" in message and "attention_reference" in message


def test_without_triton_models_run_and_the_kernels_say_what_is_missing():
    message = printed(NO_TRITON + CALLS + MODEL, TRITON_INTERPRET="1")
    assert "triton is not installed" in message
    assert 'attention_reference, or backend="pytorch"' in message
