"""The Hopper prefill kernel as ptxas sees it: registers, shared memory, no spills, no product that waits."""

from __future__ import annotations

import re
import subprocess
from importlib.metadata import version
from pathlib import Path

import pytest

from tests.cpu.test_triton_compiles import compiled

triton = pytest.importorskip("triton")
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# Three warpgroups share 65,536 registers; a program has 227 KiB of shared memory to itself.
REGISTERS = 168
SHARED = {
    "dense": 180_320,
    "skip": 180_320,
    "given": 180_320,
    "window+skip": 180_320,
    "pages of 64": 180_320,
    "dim 64": 164_000,
    "dims 192, 128": 229_472,
    "dim 256": 229_472,
    "dim 256 skip": 229_472,
}
# Bytes stored and loaded: sums of 256 channels take half of a thread's registers, and leave a warp that
# fetches with 24.
SPILLED = {"dim 256": (36, 44), "dim 256 skip": (468, 460)}
FEW = ("skip",)


def notes_of(case: str, cache: Path) -> tuple[str, str]:
    """What is printed of a launch, and what ptxas says of its code."""
    printed = compiled("sm_90", [case], cache)
    (line,) = set(re.findall(r"^  hopper_prefill_kernel: .*$", printed, flags=re.MULTILINE))
    (ptx,) = cache.rglob("hopper_prefill_kernel.ptx")
    # Triton ships two; the older doesn't read the code of newer versions.
    for name in ("ptxas", "ptxas-blackwell"):
        command = [TOOLS / name, "-v", "-arch=sm_90a", ptx, "-o", cache / "kernel.cubin"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode == 0:
            return line, done.stderr
    raise AssertionError(done.stderr)


@pytest.mark.parametrize(
    "case", [pytest.param(x, marks=() if x in FEW else pytest.mark.slow) for x in SHARED]
)
def test_products_go_on_together_and_nothing_is_spilled_but_at_256_channels(case, tmp_path):
    line, notes = notes_of(case, tmp_path)
    # C7510 and its like: wgmma instructions wait for each other.
    assert not re.findall(r"\bC75\d\d\b", notes)
    assert f"Used {REGISTERS} registers" in notes
    if version("triton").startswith("3.6."):
        assert line == f"  hopper_prefill_kernel: 12 warps, {SHARED[case]} bytes"
        stores, loads = SPILLED.get(case, (0, 0))
        assert f" {stores} bytes spill stores, {loads} bytes spill loads" in notes
