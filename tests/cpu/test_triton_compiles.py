"""The kernels compile for GPUs that aren't here, and need no more of them than they have."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="the kernels need Triton")

# A few that differ in most: seconds for each.
FEW = [
    ("sm_90", ["dense", "skip"]),
    ("sm_80", ["grids+exact"]),
]
KINDS = [
    "dense", "skip", "2:4+skip", "given", "grids+skip", "exact", "bounds+skip", "splits skip", "dim 64",
    "dim 256", "fp32",
]  # fmt: skip
# Default decision tiles are too large for sm_120 where heads are wide, or in fp32: such calls say so.
MANY = [("sm_90", []), ("sm_80", KINDS), ("sm_100", KINDS), ("sm_120", KINDS), ("gfx942", KINDS)]


def compiled(target: str, names: list[str], cache: Path) -> str:
    """What `tests.offline` prints; kernels that an earlier run compiled don't count."""
    variables = {x: y for x, y in os.environ.items() if not x.startswith("TRITON_")}
    variables |= {"TRITON_CACHE_DIR": str(cache), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "tests.offline", target, *names]
    done = subprocess.run(command, capture_output=True, text=True, env=variables, cwd=ROOT)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def assert_compile(target: str, names: list[str], cache: Path) -> None:
    """The cases of these names, or all."""
    from tests.offline import CASES, GPUS

    printed = compiled(target, names, cache)
    cases = re.split(rf"^{target} ", printed, flags=re.MULTILINE)[1:]
    assert [case.splitlines()[0] for case in cases] == (names or list(CASES))
    for case in cases:
        found = re.findall(r"^  (\w+): (\d+) warps, (\d+) bytes$", case, flags=re.MULTILINE)
        assert len({name for name, *_ in found}) > 2, case
        assert all(int(shared) <= GPUS[target].capacity for *_, shared in found), case


@pytest.mark.parametrize(("target", "names"), FEW, ids=[target for target, _ in FEW])
def test_kernels_compile_for_a_gpu_that_is_not_here(target, names, tmp_path):
    assert_compile(target, names, tmp_path)


@pytest.mark.slow
def test_latents_have_a_kernel_of_their_own_on_hopper_alone(tmp_path):
    names = ["latent of 128 heads"]
    assert "latent_kernel" in compiled("sm_90", names, tmp_path)
    assert "latent_kernel" not in compiled("sm_80", names, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("target", "names"), MANY, ids=[target for target, _ in MANY])
def test_every_kind_of_plan_compiles(target, names, tmp_path):
    if target == "sm_100" and version("triton").startswith("3.6."):
        # Its compiler fails on further thresholds; that of 3.9 does not.
        names = [name for name in names if name != "exact"]
    assert_compile(target, names, tmp_path)
