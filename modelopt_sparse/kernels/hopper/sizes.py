"""Tiles of the Hopper prefill kernel, and how its warps share registers."""

from __future__ import annotations

from triton.experimental.gluon import language as gl

# A warpgroup's rows and the keys that it visits together: a decision tile.
ROWS = gl.constexpr(64)
KEYS = gl.constexpr(128)
# Channels of a box: 128 bytes, the widest swizzle.
CHANNELS = gl.constexpr(64)
# Warps of a warpgroup.
WARPS = gl.constexpr(4)
# Registers of a thread at first. Two warpgroups attend, and a third is set aside for the warp that fetches:
# 65,536 registers in all.
REGISTERS = 168
# Registers of a thread that attends, and of one that fetches; where sums of 256 channels take 128, these.
ATTEND_REGISTERS, FETCH_REGISTERS = gl.constexpr(232), gl.constexpr(40)
WIDE_ATTEND_REGISTERS, WIDE_FETCH_REGISTERS = gl.constexpr(240), gl.constexpr(24)
