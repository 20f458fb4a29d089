"""What both Hopper kernels need: names that Triton changed, and steps of the softmax."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma

# Triton 3.9 has other names for two things.
load_box = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
wait_for_all = getattr(gl, "barrier", None) or gl.thread_barrier


@gluon.jit
def finite(running):
    """The running max, or 0 where no key was seen."""
    return gl.where(running == float("-inf"), 0.0, running)


@gluon.jit
def shrink(acc, alpha):
    """The sums [rows, channels] times a factor for each row, in whatever layout."""
    layout: gl.constexpr = gl.SliceLayout(1, acc.type.layout)
    return acc * gl.expand_dims(gl.convert_layout(alpha, layout), 1)
