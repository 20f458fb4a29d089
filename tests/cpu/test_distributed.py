"""Two processes over gloo: sharded and tensor-parallel models compute what one process does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import modelopt_sparse as mtsa
from tests.cpu import tiny
from tests.cpu.tiny import FLASH, logits

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (torch.distributed.is_available() and torch.distributed.is_gloo_available()),
        reason="this build of torch has no gloo",
    ),
]
ROOT = Path(__file__).parents[2]

START = """
import sys
import torch
import torch.distributed as dist
import modelopt_sparse as mtsa
from tests.cpu import tiny
from tests.cpu.tiny import FLASH, logits, skipped

folder = sys.argv[1]
dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.get_world_size()
assert world == 2
"""
SHARD = """
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

order, unit = sys.argv[2:]
mesh = init_device_mesh("cpu", (2,))
model = tiny.tiny_llama()

def shard():
    for layer in model.model.layers:
        fully_shard(layer.self_attn if unit == "attention" else layer, mesh=mesh)
    fully_shard(model, mesh=mesh)

if order == "before":
    mtsa.sparsify(model, FLASH)
    shard()
else:
    shard()
    mtsa.sparsify(model, FLASH)
attention = model.model.layers[0].self_attn
assert isinstance(attention, mtsa.SparseAttentionModule)
assert isinstance(attention, FSDPModule) == (unit == "attention")
out = logits(model)
assert sum(skipped(model).values()) > 0
mtsa.disable_sparse_attention(model)
disabled = logits(model)
try:
    mtsa.save(model, folder + "/refused")
except mtsa.UnsupportedModel as error:
    assert "sharded" in str(error)
else:
    raise AssertionError("sharded weights were saved")
mtsa.unsparsify(model)
assert not mtsa.is_attn_sparsified(model)
assert isinstance(attention, FSDPModule) == (unit == "attention")
assert "Sparse" not in type(attention).__name__
dense = logits(model)
torch.save({"sparse": out, "disabled": disabled, "dense": dense}, f"{folder}/{rank}.pt")
dist.destroy_process_group()
"""
PARALLEL = """
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained(folder + "/model", tp_plan="auto").eval()
attention = model.model.layers[0].self_attn
assert type(attention.q_proj.weight).__name__ == "DTensor", type(attention.q_proj.weight)
dense = logits(model)
mtsa.sparsify(model, FLASH)
seen = []
from modelopt_sparse.integrations import module_call
original = module_call.attention_reference
def attend(q, *args, **kwargs):
    seen.append(q.shape[1])
    return original(q, *args, **kwargs)
module_call.attention_reference = attend
out = logits(model)
assert seen == [1, 1], seen
assert sum(skipped(model).values()) > 0
mtsa.unsparsify(model)
assert torch.equal(logits(model), dense)
torch.save({"sparse": out, "dense": dense}, f"{folder}/{rank}.pt")
dist.destroy_process_group()
"""


def _run(program, folder, *arguments):
    """Runs a program in two processes. Returns what each one saved."""
    script = folder / "program.py"
    script.write_text(START + program)
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    done = subprocess.run(
        [sys.executable, *launcher, str(script), str(folder), *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-6000:]
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


@pytest.mark.parametrize("unit", ["layer", "attention"])
@pytest.mark.parametrize("order", ["before", "after"])
def test_a_model_made_sparse_before_or_after_sharding_computes_the_same(order, unit, tmp_path):
    model = tiny.tiny_llama()
    dense = logits(model)
    sparse = logits(mtsa.sparsify(model, FLASH))
    disabled = logits(mtsa.disable_sparse_attention(model))
    for outs in _run(SHARD, tmp_path, order, unit):
        torch.testing.assert_close(outs["sparse"], sparse)
        torch.testing.assert_close(outs["disabled"], disabled)
        torch.testing.assert_close(outs["dense"], dense)
    assert not torch.allclose(sparse, dense, atol=1e-2)


def test_a_tensor_parallel_model_computes_the_same(tmp_path):
    changes = {"num_key_value_heads": 2}
    model = tiny.tiny_llama(**changes)
    model.save_pretrained(tmp_path / "model")
    dense = logits(model)
    sparse = logits(mtsa.sparsify(model, FLASH))
    for outs in _run(PARALLEL, tmp_path):
        torch.testing.assert_close(outs["dense"], dense)
        torch.testing.assert_close(outs["sparse"], sparse, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(sparse, dense, atol=1e-2)


CALIBRATE = """
model = tiny.tiny_llama()
mtsa.sparsify(model, tiny.SKIP)
mtsa.calibrate(model, {"target_sparse_ratio": 0.3}, [tiny.prompt((200, 400)[rank], seed=rank)])
found = [module.method.config.model_dump() for module in model.modules() if hasattr(module, "method")]
torch.save(found, f"{folder}/{rank}.pt")
try:
    mtsa.calibrate(model, {"thresholds_for": "head"}, [tiny.prompt(200)])
except mtsa.UnsupportedCall as error:
    assert "2 processes" in str(error)
else:
    raise AssertionError("heads were calibrated apart in two processes")
dist.destroy_process_group()
"""


def test_all_ranks_get_the_thresholds_of_what_all_of_them_counted(tmp_path):
    model = mtsa.sparsify(tiny.tiny_llama(), tiny.SKIP)
    prompts = [tiny.prompt((200, 400)[rank], seed=rank) for rank in (0, 1)]
    mtsa.calibrate(model, {"target_sparse_ratio": 0.3}, prompts)
    wanted = [
        module.method.config.model_dump() for module in model.modules() if hasattr(module, "method")
    ]
    one = mtsa.calibrate(
        mtsa.sparsify(tiny.tiny_llama(), tiny.SKIP),
        {"target_sparse_ratio": 0.3},
        [tiny.prompt(200)],
    )
    alone = [
        module.method.config.model_dump() for module in one.modules() if hasattr(module, "method")
    ]
    first, second = _run(CALIBRATE, tmp_path)
    assert first == second == wanted != alone


PARALLEL_CALIBRATE = """
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained(folder + "/model", tp_plan="auto").eval()
assert type(model.model.layers[0].self_attn.q_proj.weight).__name__ == "DTensor"
mtsa.sparsify(model, tiny.SKIP)
mtsa.calibrate(model, {"target_sparse_ratio": 0.3}, [tiny.prompt(200)])
found = [module.method.config.model_dump() for module in model.modules() if hasattr(module, "method")]
torch.save(found, f"{folder}/{rank}.pt")
dist.destroy_process_group()
"""


def test_ranks_with_other_heads_get_the_thresholds_of_all_heads(tmp_path):
    model = tiny.tiny_llama(num_key_value_heads=2)
    model.save_pretrained(tmp_path / "model")
    mtsa.calibrate(
        mtsa.sparsify(model, tiny.SKIP), {"target_sparse_ratio": 0.3}, [tiny.prompt(200)]
    )
    wanted = [
        module.method.config.model_dump() for module in model.modules() if hasattr(module, "method")
    ]
    first, second = _run(PARALLEL_CALIBRATE, tmp_path)
    assert first == second
    for found, own in zip(first, wanted, strict=True):
        for phase in ("skip_softmax_threshold", "skip_softmax_decode_threshold"):
            factors, of_one = (each[phase]["table"]["factors"] for each in (found, own))
            torch.testing.assert_close(torch.tensor(factors), torch.tensor(of_one))
        assert found["min_context"] == own["min_context"] == 200
