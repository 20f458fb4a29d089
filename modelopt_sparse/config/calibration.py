"""What a calibration aims at, and on what data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

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
from modelopt_sparse.methods.calibrated import PhaseName, Share
from modelopt_sparse.methods.fields import not_taken

from .explain import explained

_PHASES: tuple[PhaseName, ...] = ("prefill", "decode")
_TAKES = 'a number, or {"prefill": number, "decode": number}, one or both'


def by_phase(value: Any) -> Any:
    """A number for both phases, or one for each, as a mapping of phases."""
    if isinstance(value, Mapping):
        if not value or set(value) - set(_PHASES):
            raise not_taken("target", _TAKES)
        return dict(value)
    if isinstance(value, bool) or value is None:
        raise not_taken("target", _TAKES)
    return dict.fromkeys(_PHASES, value)


TargetSparsity = Annotated[dict[PhaseName, Share], BeforeValidator(by_phase)]
"""Shares of tiles to skip, by phase. One number is for both."""

TargetError = Annotated[
    dict[PhaseName, Annotated[float, Field(gt=0, allow_inf_nan=False)]], BeforeValidator(by_phase)
]
"""Relative errors of attention outputs, by phase. One number is for both."""

_Count = Annotated[int, Field(ge=1, strict=True)]


class CalibrationConfig(BaseModel):
    """What to calibrate, and on what. Frozen.

    Args:
        target_sparse_ratio: the share of visible tiles to skip: a number from 0 (dense) to below 1 for
            both phases, or one by phase; a phase that is left out stays as it is.
        target_error: in place of a share, how far a module's attention output may be off: the norm of its
            difference from the dense one, relative to that one's, root mean square over the modules
            ("layer": of each). A number above 0 for both phases, or one by phase. The share is the largest
            whose error stays within it at every length, with one threshold for all heads of them.
        thresholds_for: "model" has one threshold by length for all modules, so that the share holds over
            all of them together; "layer" one for each module, each of which then skips that share; "head"
            one for each head, such that all of them together skip that share, each as much as changes the
            output of its layer least.
        form: "table" runs what was measured, by length; "formula" runs a * exp(b * share) / keys, which
            serving engines read.
        samples: how many prompts, where no forward_loop brings its own.
        max_seqlen: tokens of the longest of these. The others are halves, quarters ... down to 1024.
        chunk_size: prompts are given to the model in chunks of so many tokens; None: whole.
        num_decode_tokens: tokens that the model writes after each, which calibrate decode.
        text_files: prompts are cut out of these files; None: tasks are made up, with seeds.
        tokenizer: name or path of the tokenizer for them; None: the model's own name or path.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    target_sparse_ratio: TargetSparsity = Field(default_factory=lambda: by_phase(0.5))
    target_error: TargetError | None = None
    thresholds_for: Literal["model", "layer", "head"] = "model"
    form: Literal["table", "formula"] = "table"
    samples: _Count = 12
    max_seqlen: Annotated[int, Field(ge=1024, strict=True)] = 8192
    chunk_size: Annotated[int, Field(ge=128, strict=True)] | None = None
    num_decode_tokens: _Count = 8
    text_files: tuple[StrictStr, ...] | None = None
    tokenizer: StrictStr | None = None

    @model_validator(mode="after")
    def _has_text(self) -> CalibrationConfig:
        if self.text_files is not None and not self.text_files:
            raise not_taken("text_files", "at least one path, or None")
        if self.target_error is not None and "target_sparse_ratio" in self.model_fields_set:
            raise not_taken("target_error", "one of target_sparse_ratio and target_error")
        if self.thresholds_for == "head" and self.form == "formula":
            raise not_taken("form", '"table" with thresholds_for="head"')
        return self

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
