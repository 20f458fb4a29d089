"""What a calibration aims at, and on what data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, NamedTuple, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictStr,
    ValidationError,
    model_validator,
)

from modelopt_sparse.errors import ConfigError, describe, shown
from modelopt_sparse.methods.base import nearest, not_a_field
from modelopt_sparse.methods.calibrated import PhaseName, Share
from modelopt_sparse.methods.fields import not_taken

from .explain import explained

_PHASES: tuple[PhaseName, ...] = ("prefill", "decode")
_TAKES = 'a number, or {"prefill": number, "decode": number}, one or both'


def by_phase(value: Any) -> Any:
    """A number for both phases, or one for each, as a mapping of phases."""
    of_phases = dict(value) if isinstance(value, Mapping) else dict.fromkeys(_PHASES, value)
    if not of_phases or set(of_phases) - set(_PHASES):
        raise not_taken("target", _TAKES)
    if any(isinstance(number, bool) or number is None for number in of_phases.values()):
        raise not_taken("target", _TAKES)
    return of_phases


TargetSparsity = Annotated[dict[PhaseName, Share], BeforeValidator(by_phase)]
"""Shares of tiles to skip, by phase. One number is for both."""

TargetError = Annotated[
    dict[PhaseName, Annotated[float, Field(gt=0, allow_inf_nan=False)]], BeforeValidator(by_phase)
]
"""Relative errors of attention outputs, by phase. One number is for both."""

TargetMass = Annotated[
    dict[PhaseName, Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)]],
    BeforeValidator(by_phase),
]
"""Shares of a row's softmax weight, by phase. One number is for both."""

BoundName = Literal["target_error", "target_dropped_mass", "target_max_dropped_mass"]
"""The fields that bound what skipping costs."""

AIMS = ("target_sparse_ratio", *get_args(BoundName))
"""The fields that say what to aim at, of which a calibration has one."""

_Count = Annotated[int, Field(ge=1, strict=True)]


class Bound(NamedTuple):
    """How much skipping may cost.

    Args:
        name: the field that says it.
        of: the number, by phase.
    """

    name: BoundName
    of: dict[PhaseName, float]


class CalibrationConfig(BaseModel):
    """What to calibrate, and on what. Frozen.

    Args:
        target_sparse_ratio: the share of visible tiles to skip: a number from 0 (dense) to below 1 for
            both phases, or one by phase; a phase that is left out stays as it is. Where no target is given,
            0.5.
        target_error: in place of a share, how far a module's attention output may be off: the norm of its
            difference from the dense one, relative to that one's, root mean square over the modules
            ("layer": of each). A number above 0 for both phases, or one by phase. The share is the largest
            whose error stays within it at every length, with one threshold for all heads of them.
        target_dropped_mass: in place of a share, how much softmax weight may lie in skipped tiles: the share
            of a query row's weight, of what N:M left, mean over all rows that see a key, over heads and over
            the modules ("layer": of each). Above 0 and below 1. The lambdas that are tried are an octave
            apart, so it may stay well within; otherwise as `target_error`.
        target_max_dropped_mass: the same of the row, head and module that lose most; not by head. On other
            prompts a row may lose more.
        thresholds_for: "model" has one threshold by length for all modules, so that the share holds over
            all of them together; "layer" one for each module, each of which then skips that share; "head"
            one for each head, such that all of them together skip that share, each as much as changes the
            output of its layer least.
        form: "table" runs what was measured, by length; "formula" runs a * exp(b * share) / keys, which
            serving engines read, and keeps a share or a bound as well as it fits.
        samples: how many prompts, where no forward_loop brings its own; max_seqlen, text_files and
            tokenizer are of these too.
        max_seqlen: tokens of the longest of these, or fewer where nobody says how many and the model takes
            fewer. The others are halves, quarters ... down to 1024.
        chunk_size: prompts are given to the model in chunks of so many tokens; None: whole, or as a function
            gives them.
        num_decode_tokens: tokens that the model writes after each, drawn as it predicts them, which calibrate
            decode; a function generates its own.
        text_files: prompts are cut out of these files; None: tasks are made up, with seeds.
        tokenizer: name or path of the tokenizer for them; None: the model's own name or path.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    target_sparse_ratio: TargetSparsity | None = None
    target_error: TargetError | None = None
    target_dropped_mass: TargetMass | None = None
    target_max_dropped_mass: TargetMass | None = None
    thresholds_for: Literal["model", "layer", "head"] = "model"
    form: Literal["table", "formula"] = "table"
    samples: _Count = 12
    max_seqlen: Annotated[int, Field(ge=1024, strict=True)] = 8192
    chunk_size: Annotated[int, Field(ge=128, strict=True)] | None = None
    num_decode_tokens: _Count = 64
    text_files: tuple[StrictStr, ...] | None = None
    tokenizer: StrictStr | None = None

    @model_validator(mode="before")
    @classmethod
    def _own_fields_only(cls, data: Any) -> Any:
        for key in data if isinstance(data, Mapping) else ():
            if key not in cls.model_fields:
                raise ConfigError(not_a_field(cls, key, nearest(key, cls.model_fields)))
        return data

    @model_validator(mode="before")
    @classmethod
    def _aims_at_half(cls, data: Any) -> Any:
        if isinstance(data, Mapping) and all(data.get(name) is None for name in AIMS):
            return {**data, "target_sparse_ratio": 0.5}
        return data

    @model_validator(mode="after")
    def _has_text(self) -> CalibrationConfig:
        if self.text_files is not None and not self.text_files:
            raise not_taken("text_files", "at least one path, or None")
        return self

    @model_validator(mode="after")
    def _has_one_aim(self) -> CalibrationConfig:
        if sum(getattr(self, name) is not None for name in AIMS) > 1:
            raise not_taken("target", f"one of {', '.join(AIMS)}")
        return self

    @model_validator(mode="after")
    def _is_offered_by_head(self) -> CalibrationConfig:
        if self.thresholds_for == "head" and self.form == "formula":
            raise not_taken("form", '"table" with thresholds_for="head"')
        if self.thresholds_for == "head" and self.target_max_dropped_mass is not None:
            takes = (
                '"model" or "layer" with target_max_dropped_mass: heads may lose more than others'
            )
            raise not_taken("thresholds_for", takes)
        return self

    @property
    def bound(self) -> Bound | None:
        """What bounds the share; None where the share itself is given."""
        names: tuple[BoundName, ...] = get_args(BoundName)
        given = {name: getattr(self, name) for name in names}
        return next((Bound(name, of) for name, of in given.items() if of is not None), None)

    @property
    def shares(self) -> dict[PhaseName, float]:
        """The shares that are given; none where something bounds them."""
        return self.target_sparse_ratio or {}

    @classmethod
    def load(cls, source: object) -> CalibrationConfig:
        """The configuration that `source` is, or whose fields it maps.

        Raises:
            ConfigError: anything in it isn't taken.
        """
        if isinstance(source, CalibrationConfig):
            return source
        if not isinstance(source, Mapping):
            takes = "a CalibrationConfig or a mapping of its fields"
            raise ConfigError(describe("calibration", shown(source), takes))
        try:
            return cls.model_validate(dict(source))
        except ValidationError as error:
            raise explained(error, "calibration") from None
