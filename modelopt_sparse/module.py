"""The class that a converted attention module has besides its own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from modelopt_sparse.calls import Observer
from modelopt_sparse.kernels.types import DENSE, AttentionOutput, Plan
from modelopt_sparse.methods.base import SparseMethod
from modelopt_sparse.replay import Replay, inside_backward
from modelopt_sparse.stats import AttentionStats


class SparseAttentionModule(nn.Module):
    """Mixed in before an attention class: adds what to leave out, and overrides nothing of it.

    ``forward`` stays the model's own; the registered attention function asks the module that it is
    called for. So hooks, state_dict keys and isinstance checks are unaffected.

    Attributes:
        method: the method in use, with its configuration.
        enabled: False makes the module dense.
        active_plan: the plan of the call that is running, None between calls. For show only: the call
            itself uses what the context yields, so two threads may share a module.
        stats: tiles visited and skipped since the last reset.
        replay: the plan that gradient checkpointing repeats.
        observer: who computes the calls in the kernels' stead, and so sees them; None but in `observed`.
    """

    method: SparseMethod[Any]
    enabled: bool
    active_plan: Plan | None
    stats: AttentionStats
    replay: Replay
    observer: Observer | None

    def attach(self, method: SparseMethod[Any], enabled: bool) -> None:
        """Sets what this module does. Called once by the conversion, before the first forward."""
        self.set_method(method)
        self.enabled = enabled
        self.active_plan = None
        self.stats = AttentionStats()
        self.replay = Replay()
        self.observer = None

    def set_method(self, method: SparseMethod[Any]) -> None:
        """Has this method from now on, its plan ready for the device where the module is."""
        self.method = method
        method.plan().prepare(next((x.device for x in self.parameters()), torch.device("cpu")))

    def detach(self) -> None:
        """Removes what `attach` and the calls since have set."""
        for name in SparseAttentionModule.__annotations__:
            self.__dict__.pop(name, None)

    @contextmanager
    def plan_in_force(self) -> Iterator[Plan]:
        """The plan of this call.

        A forward that gradient checkpointing runs again, from inside the backward pass, repeats the plan
        of the forward it repeats, whatever was enabled or disabled since.
        """
        if inside_backward() and (repeated := self.replay.repeat()) is not None:
            yield repeated
        elif not self.enabled:
            self.replay.note(DENSE, None, self.training)
            yield DENSE
        else:
            with self.method.get_sparse_context(self) as plan:
                self.replay.note(plan, self.method, self.training)
                yield plan

    def record(self, output: AttentionOutput) -> None:
        """Adds a call's tile counts to `stats`; a recomputed forward was counted the first time.

        Calls that torch.compile traces aren't counted: a graph would hold for one count of calls.
        """
        if not torch.compiler.is_compiling() and not inside_backward():
            self.stats.record(output)


@contextmanager
def observed(observers: Mapping[SparseAttentionModule, Observer]) -> Iterator[None]:
    """Has each module's calls computed by its observer, in this block."""
    before = {module: module.observer for module in observers}
    try:
        for module, observer in observers.items():
            module.observer = observer
        yield
    finally:
        for module, observer_before in before.items():
            module.observer = observer_before


@contextmanager
def counting_anew(modules: Iterable[SparseAttentionModule]) -> Iterator[None]:
    """Has the modules count tiles from nothing in this block, and gives them their own counts back."""
    before = {module: module.stats for module in modules}
    try:
        for module in before:
            module.stats = AttentionStats()
        yield
    finally:
        for module, stats in before.items():
            module.stats = stats
