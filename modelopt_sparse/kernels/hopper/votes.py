"""Votes of the rows of a warpgroup, and of a warp.

A reduction would pass through shared memory. A warpgroup's vote is one instruction; but what a thread has of
its result is an element of a tensor and no scalar, so it goes by way of a register with a name.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

# Named barriers that Triton doesn't use, one for each warpgroup.
_FIRST_BARRIER = 14
# Each thread has two rows. The last vote tells ptxas that all threads of a warp go on together.
_VOTE = """{{ .reg .pred mine, all; .reg .b32 both;
or.b32 both, $2, $3;
setp.ne.b32 mine, both, 0;
{vote}
vote.sync.any.pred all, all, 0xffffffff;
selp.b32 {register}, 1, 0, all;
mov.b32 $0, 0;
mov.b32 $1, 0; }}"""
_OF_WARPGROUP = "bar.red.or.pred all, {barrier}, 128, mine;"
_OF_WARP = "mov.pred all, mine;"


def _votes(scope: str, vote: str) -> tuple[gl.constexpr, gl.constexpr]:
    """The instructions that vote, and that read the result, for each warpgroup."""
    registers = [f"{scope}_{half}" for half in (0, 1)]
    votes = (vote.format(barrier=_FIRST_BARRIER + half) for half in (0, 1))
    asked = (_VOTE.format(vote=v, register=r) for v, r in zip(votes, registers, strict=True))
    return gl.constexpr(tuple(asked)), gl.constexpr(tuple(f"mov.b32 $0, {r};" for r in registers))


_ASK_WARPGROUP, _READ_WARPGROUP = _votes("warpgroup", _OF_WARPGROUP)
_ASK_WARP, _READ_WARP = _votes("warp", _OF_WARP)
_DECLARE = gl.constexpr(
    tuple(f".reg .b32 warpgroup_{h}; .reg .b32 warp_{h}; mov.b32 $0, 0;" for h in (0, 1))
)


@gluon.jit
def declare_votes(HALF: gl.constexpr):
    """To be called once by each warpgroup, before it votes."""
    gl.inline_asm_elementwise(_DECLARE[HALF], "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def any_row(marked, HALF: gl.constexpr):
    """1 if a row of the warpgroup is marked, else 0; its four warps wait for each other.

    Args:
        marked: bool [64].
    """
    gl.inline_asm_elementwise(
        _ASK_WARPGROUP[HALF], "=r,=r,r,r", [marked.to(gl.int32)], dtype=gl.int32, is_pure=False, pack=2
    )  # fmt: skip
    return gl.inline_asm_elementwise(
        _READ_WARPGROUP[HALF], "=r", [], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def any_row_of_warp(marked, HALF: gl.constexpr):
    """1 if a row of the warp that asks is marked, else 0: other warps may go another way."""
    gl.inline_asm_elementwise(
        _ASK_WARP[HALF], "=r,=r,r,r", [marked.to(gl.int32)], dtype=gl.int32, is_pure=False, pack=2
    )  # fmt: skip
    return gl.inline_asm_elementwise(
        _READ_WARP[HALF], "=r", [], dtype=gl.int32, is_pure=False, pack=1
    )
