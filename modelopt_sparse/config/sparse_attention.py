"""`SparseAttentionConfig`: which modules become sparse, by which method, with which numbers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Annotated, Any

from pydantic import (
    BaseModel,
    ConfigDict,
    InstanceOf,
    PlainSerializer,
    StrictBool,
    ValidationError,
)

from modelopt_sparse.errors import ConfigError, describe, shown, shown_key
from modelopt_sparse.methods.base import nearest
from modelopt_sparse.patterns import Pattern, Target, matching, names_exactly, pattern_name

from .calibration import CalibrationConfig
from .checkpoints import checkpoint_rules
from .explain import explained
from .files import read_mapping, write_mapping
from .parsing import own_names, parse_rules
from .resolution import Resolved, nothing_matched, resolve_rules
from .rules import DEFAULT, Rules

__all__ = ["Resolved", "SparseAttentionConfig"]


class SparseAttentionConfig(BaseModel):
    """Which attention modules become sparse, and how. Frozen; made of copies of what it is given.

    ``sparse_cfg`` maps patterns (see `modelopt_sparse.patterns`) to rules. A rule is a mapping with
    ``method`` (a registered name), ``enable`` (a bool) and the method's fields, each optional, or a
    method's configuration object, which sets all of its fields. Rules apply in their order:

    * "default" isn't a pattern but the first rule of every module. A module that no rule gives a
      method isn't converted.
    * A later rule overrides an earlier one field by field.
    * Naming a method implies ``enable: True``, unless the same rule says otherwise. Naming another
      method than before drops the old one's fields, backend included; naming the same one keeps
      them. Fields that are set before any method is named go to the first one named.
    * ``{"enable": False}`` changes the flag alone.

    Args:
        sparse_cfg: the rules. A rule that names a method is checked with that method's defaults.
        include_non_causal: whether wildcards, callables and "default" also reach cross-attention
            and bidirectional attention. If not, only a pattern that spells out a module's name or
            class does.
        calibration: how thresholds are found when the model is made sparse; see `CalibrationConfig`. Also
            taken as the key "calibration" of ``sparse_cfg``.

    Raises:
        ConfigError: anything in it isn't taken; the message names the pattern, the field, what it
            got, what it takes.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    sparse_cfg: Annotated[InstanceOf[Rules], PlainSerializer(dict)]
    include_non_causal: StrictBool = False
    calibration: CalibrationConfig | None = None

    def __init__(self, /, **data: Any) -> None:
        for key in data:
            _check_key(key)
        if "sparse_cfg" not in data:
            raise ConfigError(describe("sparse_cfg", "nothing", "a mapping from patterns to rules"))
        rules = data["sparse_cfg"]
        if isinstance(rules, Mapping) and "calibration" in rules:
            if data.get("calibration") is not None:
                raise ConfigError(describe("calibration", "two", "one, beside sparse_cfg or in it"))
            data["calibration"] = rules["calibration"]
            data["sparse_cfg"] = {key: rule for key, rule in rules.items() if key != "calibration"}
        if data.get("calibration") is not None:
            data["calibration"] = CalibrationConfig.load(data["calibration"])
        try:
            super().__init__(**data | {"sparse_cfg": parse_rules(data["sparse_cfg"])})
        except ValidationError as error:
            raise explained(error, "") from None

    @classmethod
    def load(
        cls, source: SparseAttentionConfig | Mapping[str, Any] | str | PathLike[str]
    ) -> SparseAttentionConfig:
        """The configuration that `source` is, holds, or leads to.

        Args:
            source: a configuration, a mapping ``{"sparse_cfg": ...}``, or the path of a .json,
                .yaml or .yml file with such a mapping.

        Raises:
            FileNotFoundError: there is no such file.
            ConfigError: the file or what it holds isn't taken.
        """
        if isinstance(source, SparseAttentionConfig):
            return source
        if isinstance(source, str | PathLike):
            data = read_mapping(Path(source))
            try:
                return cls.load(data)
            except ConfigError as error:
                raise ConfigError(f"{source}: {error}") from None
        if not isinstance(source, Mapping):
            takes = "a SparseAttentionConfig, a mapping, or a path"
            raise ConfigError(describe("config", shown(source), takes))
        for key in source:
            _check_key(key)
        return cls(**source)

    @classmethod
    def from_checkpoint(
        cls,
        directory: str | PathLike[str],
        *,
        target_sparsity: float | Mapping[str, float] | None = None,
    ) -> SparseAttentionConfig:
        """What the config.json of a checkpoint tells serving engines: as NVIDIA Model-Optimizer writes it,
        in any of its forms, or `modelopt_sparse.export_sparse_attention_config`.

        Skip-softmax, if its formula is ``a * exp(b * target_sparsity)``, becomes ``triton_skip_softmax``, and
        N:M sparsity ``triton_sparse_softmax``. Nothing in the file is evaluated. As with engines, there is no
        ``min_context``: sequences of fewer keys than the scale factor run at lambda 1. `with_rule` gives one.

        Args:
            directory: a local folder with a config.json.
            target_sparsity: the share of tiles to skip, above 0 and below 1, for both phases or by phase, in
                place of the checkpoint's. Wherever it stands, a phase that it leaves out is dense.
        Raises:
            FileNotFoundError: no config.json there.
            ArgumentTypeError: `directory` is no path.
            ConfigError: the file isn't JSON or too big, or anything in its ``sparse_attention_config`` isn't
                taken: another formula or algorithm, a coefficient that is missing, a key that is unknown,
                several groups, no share to skip.
        """
        rules = checkpoint_rules(directory, target_sparsity)
        try:
            return cls(sparse_cfg=rules)
        except ConfigError as error:
            raise ConfigError(f"{Path(directory) / 'config.json'}: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON and YAML; `load` makes an equal configuration of it.

        Raises:
            ConfigError: a pattern is a callable.
        """
        for position, pattern in enumerate(self.sparse_cfg):
            if not isinstance(pattern, str):
                place = f"sparse_cfg, rule {position}"
                got = f"the callable {pattern_name(pattern)}"
                remedy = "Use string patterns in configurations that are saved."
                raise ConfigError(describe(place, got, "a string pattern", remedy))
        plain = {
            "sparse_cfg": dict(self.sparse_cfg),
            "include_non_causal": self.include_non_causal,
        }
        if self.calibration is not None:
            plain["calibration"] = self.calibration.model_dump(mode="json")
        return plain

    def save(self, path: str | PathLike[str]) -> None:
        """Writes a .json, .yaml or .yml file that `load` reads.

        Raises:
            ConfigError: the suffix is another, or a pattern is a callable.
        """
        write_mapping(Path(path), self.to_dict())

    def with_rule(self, pattern: Pattern, /, **fields: Any) -> SparseAttentionConfig:
        """A configuration that also says this about `pattern`; this one stays as it is.

        A new pattern comes last. A pattern that has a rule keeps its place, and `fields` override
        that rule as a later rule would.

        Raises:
            ConfigError: as for the constructor.
        """
        old = dict(self.sparse_cfg).get(pattern, {})
        dropped = own_names(fields)
        if "method" in fields:
            same_method = fields["method"] == old.get("method")
            dropped |= {"enable"} if same_method else set(old)
        kept = {key: value for key, value in old.items() if key not in dropped}
        return SparseAttentionConfig(
            sparse_cfg={**self.sparse_cfg, pattern: kept | fields},
            include_non_causal=self.include_non_causal,
            calibration=self.calibration,
        )

    def resolve(self, target: Target) -> Resolved | None:
        """What the rules say about one module, None where it isn't converted.

        Raises:
            ConfigError: the module is enabled and no rule names a method for it, or the rules
                together give its method values that don't fit.
        """
        return self._resolve(target, self.matching([target]))

    def matching(self, targets: Iterable[Target]) -> dict[Pattern, tuple[str, ...]]:
        """For each pattern but "default", the names of the modules that its rule applies to."""
        targets = list(targets)
        return {
            pattern: self._taken_in(pattern, targets)
            for pattern in self.sparse_cfg
            if pattern != DEFAULT
        }

    def resolve_all(self, targets: Iterable[Target]) -> dict[str, Resolved]:
        """What the rules say about each module that is converted, by name.

        Raises:
            ConfigError: a pattern applies to no module; or as for `resolve`.
        """
        targets = list(targets)
        matched = self.matching(targets)
        for pattern, names in matched.items():
            if not names:
                raise nothing_matched(pattern, targets)
        resolved = {target.name: self._resolve(target, matched) for target in targets}
        return {name: found for name, found in resolved.items() if found is not None}

    def _resolve(
        self, target: Target, matched: Mapping[Pattern, tuple[str, ...]]
    ) -> Resolved | None:
        rules = [
            rule
            for rule in self.sparse_cfg.in_order
            if rule.pattern == DEFAULT or target.name in matched[rule.pattern]
        ]
        named = any(rule.pattern != DEFAULT for rule in rules)
        if not (named or target.causal_self_attention or self.include_non_causal):
            return None
        return resolve_rules(rules, target.name)

    def _taken_in(self, pattern: Pattern, targets: Sequence[Target]) -> tuple[str, ...]:
        by_pattern = [t for t in targets if t.causal_self_attention or self.include_non_causal]
        taken = {target.name for target in matching(pattern, by_pattern)}
        return tuple(
            target.name
            for target in targets
            if target.name in taken or (target not in by_pattern and names_exactly(pattern, target))
        )


def _check_key(key: object) -> None:
    names = list(SparseAttentionConfig.model_fields)
    if key not in names:
        near = nearest(key, names)
        remedy = f"Did you mean {near}?" if near else "Patterns go inside sparse_cfg."
        message = f"{shown_key(key)}: not a key of a configuration; takes {', '.join(names)}."
        raise ConfigError(f"{message} {remedy}")
