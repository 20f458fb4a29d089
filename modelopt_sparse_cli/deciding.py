"""What a configuration says about each attention module of a model, and by which rule."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from modelopt_sparse import SparseAttentionConfig
    from modelopt_sparse.config import Resolved
    from modelopt_sparse.patterns import Target


@dataclass(frozen=True)
class Decision:
    """What becomes of a module.

    Args:
        resolved: its method, None where it isn't converted.
        rules: the patterns of the rules that apply to it, in order.
        why: what decided, in words.
    """

    resolved: Resolved | None
    rules: tuple[str, ...]
    why: str

    @property
    def is_sparse(self) -> bool:
        """Whether it leaves anything out."""
        return self.resolved is not None and self.resolved.enabled

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        fields = None if self.resolved is None else self.resolved.config.model_dump(mode="json")
        return {"sparse": self.is_sparse, "why": self.why, "rules": self.rules, "fields": fields}


def decisions(config: SparseAttentionConfig, targets: dict[str, Target]) -> dict[str, Decision]:
    """The decision about each of `targets`, by name.

    Raises:
        ConfigError: as `sparsify`.
    """
    matched = config.matching(targets.values())
    resolved = config.resolve_all(targets.values())
    found = {}
    for name, target in targets.items():
        rules = ["default"] * ("default" in config.sparse_cfg)
        rules += [str(pattern) for pattern, names in matched.items() if name in names]
        why = _why(config, target, resolved.get(name), rules)
        found[name] = Decision(resolved.get(name), tuple(rules), why)
    return found


def _why(
    config: SparseAttentionConfig, target: Target, resolved: Resolved | None, rules: list[str]
) -> str:
    is_reached = target.causal_self_attention or config.include_non_causal
    if resolved is None and not is_reached and set(rules) <= {"default"}:
        return (
            "bidirectional or cross-attention, which only its exact name or class reaches, "
            "or include_non_causal"
        )
    if resolved is None:
        return "no rule gives it a method"
    decided_by, named_by = "", ""
    for pattern in rules:
        rule = config.sparse_cfg[pattern]
        named_by = pattern if "method" in rule else named_by
        decided_by = pattern if {"method", "enable"} & set(rule) else decided_by
    if not resolved.enabled:
        return f"enable: false, by the rule {decided_by!r}"
    return f"{resolved.config.method}, by the rule {named_by!r}"
