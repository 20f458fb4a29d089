"""Which way imports go: read from the source, compared with a table."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import modelopt_sparse

ROOT = Path(modelopt_sparse.__file__).parent
PACKAGE = ROOT.name

# What each part may import of the package. Parts are files and folders, the longest name counts.
# Every part may import itself, and `errors`.
ALLOWED: dict[str, set[str]] = {
    "": {
        "calibration", "config", "continuous_batching", "export", "faithfulness", "integrations",
        "methods", "models", "modes", "module", "presets", "report", "sparse_mode", "thresholds", "version",
    },
    "__main__": set(),
    "errors": set(),
    "files": set(),
    "kernels": set(),
    "kernels.device": set(),
    "kernels.stages": {"kernels.device"},
    "kernels.programs": {"kernels.device", "kernels.stages"},
    "kernels.reference": {"kernels"},
    "braces": set(),
    "patterns": {"braces"},
    "methods": {"kernels.scale_factors", "kernels.types"},
    "config": {"files", "methods", "patterns"},
    "presets": {"config"},
    "stats": {"kernels.types"},
    "replay": {"kernels.types"},
    "calls": {"kernels.api", "kernels.types"},
    "module": {"calls", "kernels.types", "methods", "replay", "stats"},
    "module_state": {"config", "methods", "module"},
    "models": {"patterns"},
    "modes": {"files", "version"},
    "version": set(),
    "integrations": {
        "calls", "config", "files", "kernels.api", "kernels.pages", "kernels.types", "modes", "module",
    },
    "convert": {"config", "integrations", "methods", "models", "modes", "module"},
    "continuous_batching": {"integrations", "models", "modes"},
    "sparse_mode": {
        "calibration", "config", "convert", "integrations", "models", "modes", "module", "module_state",
        "patterns", "sparse_parts", "thresholds",
    },
    "report": {"integrations", "methods", "modes", "module", "module_state", "stats"},
    "export": {"methods", "models", "modes", "module", "module_state"},
    "calibration": {
        "calls", "config", "faithfulness", "files", "kernels", "methods", "modes", "module",
        "module_state",
    },
    "sparse_parts": {
        "config", "convert", "integrations", "models", "modes", "module", "module_state", "patterns",
    },
    "thresholds": {
        "calibration", "config", "methods", "module", "patterns", "sparse_parts",
    },
    "faithfulness": {"calls", "kernels.types", "modes", "module", "module_state", "stats"},
    "report_html": {
        "bench", "calibration", "faithfulness", "methods", "module_state", "version",
    },
    "bench": {"files", "integrations", "kernels", "report", "sparse_mode", "version"},
}  # fmt: skip
# Of other packages, what each part does without.
WITHOUT: dict[str, set[str]] = {
    "errors": {"torch", "triton", "transformers", "pydantic", "rich"},
    "kernels": {"transformers", "pydantic", "rich", "accelerate"},
    "methods": {"torch", "triton", "transformers"},
    "config": {"torch", "triton", "transformers"},
    "patterns": {"torch", "triton", "transformers", "pydantic"},
    "modes": {"triton", "transformers"},
    "module": {"triton", "transformers"},
    "faithfulness": {"triton", "transformers"},
    "integrations": {"triton", "pydantic"},
}
# Documented in the function: a convenience for callers who look for it there.
EXCEPTION = ("kernels.__init__", "register_triton_attention", "integrations.hf")


def _files() -> dict[str, Path]:
    return {
        ".".join(path.relative_to(ROOT).with_suffix("").parts): path
        for path in sorted(ROOT.rglob("*.py"))
    }


FILES = _files()


def _imports(name: str) -> list[tuple[str, str, bool]]:
    """(enclosing function, absolute name, at import) for each import of a file."""
    here = [PACKAGE, *name.split(".")]
    found: list[tuple[str, str, bool]] = []

    def visit(node: ast.AST, function: str, runs: bool) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                visit(child, child.name, False)
            elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                visit(child, function, False)
            elif isinstance(child, ast.Import):
                found.extend((function, alias.name, runs) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                base = here[: len(here) - child.level] if child.level else []
                module = ".".join([*base, *([child.module] if child.module else [])])
                for alias in child.names:
                    own = f"{module}.{alias.name}"
                    is_file = _file_of(own.removeprefix(f"{PACKAGE}.")) is not None
                    found.append((function, own if is_file else module, runs))
            else:
                visit(child, function, runs)

    visit(ast.parse(FILES[name].read_text()), "", True)
    return found


def _file_of(name: str) -> str | None:
    return next((file for file in (name, f"{name}.__init__") if file in FILES), None)


def _part(name: str) -> str | None:
    """The longest entry of the table that a module belongs to."""
    name = name.removesuffix("__init__").removesuffix(".")
    parts = name.split(".")
    candidates = [".".join(parts[:length]) for length in range(len(parts), 0, -1)]
    return next((part for part in candidates if part in ALLOWED), "" if name == "" else None)


def _inside(name: str, part: str) -> bool:
    return name == part or name.startswith(f"{part}.")


def _wrong_imports(name: str) -> list[str]:
    part = _part(name)
    wrong = []
    for function, imported, _ in _imports(name):
        own = imported.removeprefix(f"{PACKAGE}.")
        if not _inside(imported, PACKAGE) or (name, function, own) == EXCEPTION:
            continue
        allowed = {*ALLOWED[part], part or "-", "errors"}
        if imported == PACKAGE or not any(_inside(own, other) for other in allowed):
            wrong.append(imported)
    return wrong


@pytest.mark.parametrize("name", FILES)
def test_every_import_goes_down(name):
    assert _part(name) is not None, f"{name} is in no part of the table: say what it may import"
    assert _wrong_imports(name) == []


@pytest.mark.parametrize("name", FILES)
def test_every_part_does_without_what_it_should(name):
    without = set().union(*(names for part, names in WITHOUT.items() if _inside(name, part)))
    used = {imported.partition(".")[0] for _, imported, _ in _imports(name)}
    assert not without & used


def test_the_one_exception_is_still_needed():
    file, function, imported = EXCEPTION
    assert (function, f"{PACKAGE}.{imported}", False) in _imports(file)


def _files_of_hosts() -> dict[str, set[str]]:
    """Each file of `integrations` with the other ones that it imports."""
    return {
        name: {
            imported.split(".")[-1]
            for _, imported, _ in _imports(name)
            if imported.startswith(f"{PACKAGE}.integrations.")
        }
        for name in FILES
        if _inside(name, "integrations")
    }


def test_hosts_do_not_import_each_other():
    hosts = {"hf", "hf_checkpoint", "hf_paged", "flashinfer_api"}
    for name, imported in _files_of_hosts().items():
        assert not imported & hosts, name


def test_there_are_no_cycles():
    graph = {
        name: {
            file
            for _, imported, runs in _imports(name)
            if runs and (file := _file_of(imported.removeprefix(f"{PACKAGE}."))) is not None
        }
        for name in FILES
    }
    assert sum(map(len, graph.values())) > len(graph)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


PROGRAM = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "triton":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing())
import torch
assert not torch.cuda.is_available()
import modelopt_sparse as mtsa
from modelopt_sparse import kernels
from transformers import LlamaConfig, LlamaForCausalLM
kernels.register_triton_attention()
config = LlamaConfig(vocab_size=16, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
                     num_attention_heads=2, num_key_value_heads=1)
model = LlamaForCausalLM._from_config(config, attn_implementation="modelopt_triton").eval()
mtsa.sparsify(model, mtsa.SPARSE_SOFTMAX_DEFAULT.with_rule("*", dense_window_size=0))
sparse = model(torch.arange(16)[None]).logits
mtsa.disable_sparse_attention(model)
assert not torch.equal(model(torch.arange(16)[None]).logits, sparse)
print("done")
"""


def test_the_package_works_with_no_gpu_and_no_triton():
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        capture_output=True,
        text=True,
        timeout=180,
        env={"CUDA_VISIBLE_DEVICES": "", "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"},
        cwd=ROOT.parent,
    )
    assert done.stdout.strip() == "done", done.stderr


def test_importing_leaves_transformers_as_it_was_but_for_our_names():
    program = f"""
import torch, transformers
from transformers.modeling_utils import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface
before = [dict(c._global_mapping) for c in (AttentionInterface, AttentionMaskInterface)]
functions = torch.nn.functional.softmax, torch.nn.functional.scaled_dot_product_attention
import {PACKAGE}
paged = {PACKAGE}.integrations.hf_paged.PAGED_NAME
names = ["modelopt_triton", paged], ["modelopt_triton"]
for old, c, ours in zip(before, (AttentionInterface, AttentionMaskInterface), names):
    new = dict(c._global_mapping)
    assert all(new.pop(name) for name in ours)
    assert new == old
assert functions == (torch.nn.functional.softmax, torch.nn.functional.scaled_dot_product_attention)
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=180, cwd=ROOT.parent)


def test_the_command_is_imported_by_its_entry_alone():
    command = f"{PACKAGE}_cli"
    users = {name for name in FILES if any(_inside(i, command) for _, i, _ in _imports(name))}
    assert users == {"__main__"}
