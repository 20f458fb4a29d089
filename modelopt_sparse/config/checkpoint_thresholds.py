"""The thresholds that a checkpoint's group of skip-softmax comes to: a formula, its coefficients, shares."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from modelopt_sparse.errors import ConfigError, describe, shown
from modelopt_sparse.methods.calibrated import FORMULA, PHASES

# For both phases, where there is nothing of one's own.
_COEFFICIENTS = "coefficients"


def skip_softmax_fields(group: Mapping[str, Any], target_sparsity: object) -> dict[str, Any]:
    """The method of such a group and its thresholds, as a rule has them.

    Args:
        target_sparsity: in place of the group's own; None takes that.
    Raises:
        ConfigError: they aren't taken.
    """
    factor = mapping_at(group, "threshold_scale_factor", "")
    only_keys(factor, ("formula", _COEFFICIENTS, *PHASES), "threshold_scale_factor")
    formula = factor.get("formula")
    # It is compared, never evaluated.
    if not isinstance(formula, str) or "".join(formula.split()) != "".join(FORMULA.split()):
        got = "nothing" if formula is None else shown(formula)
        raise ConfigError(describe("threshold_scale_factor.formula", got, repr(FORMULA)))
    given = _written_shares(group, factor) if target_sparsity is None else target_sparsity
    thresholds = {
        phase: {"target_sparsity": share, "formula": _coefficients(factor, phase)}
        for phase, share in _shares(given, factor).items()
    }
    return {
        "method": "triton_skip_softmax",
        "skip_softmax_threshold": thresholds.get("prefill"),
        "skip_softmax_decode_threshold": thresholds.get("decode"),
    }


def _written_shares(group: Mapping[str, Any], factor: Mapping[str, Any]) -> object:
    """The group's own shares. Under an older name there is one for each phase, calibrated or not."""
    if "target_sparse_ratio" not in group:
        return group.get("target_sparsity")
    if "target_sparsity" in group:
        got = "target_sparsity and target_sparse_ratio"
        raise ConfigError(describe("sparse_attention_config", got, "one of them"))
    shares = group["target_sparse_ratio"]
    if not isinstance(shares, Mapping):
        return shares
    return {phase: share for phase, share in shares.items() if _is_calibrated(factor, phase)}


def _shares(given: object, factor: Mapping[str, Any]) -> dict[str, float]:
    """The share of tiles to skip in each phase that isn't dense."""
    shares: Mapping[str, Any]
    shares = given if isinstance(given, Mapping) else dict.fromkeys(PHASES, given)
    only_keys(shares, PHASES, "target_sparsity")
    # Model-Optimizer's 0 is a phase that it didn't calibrate.
    shares = {
        phase: share
        for phase, share in shares.items()
        if not (_is_number(share) and share == 0 and not _is_calibrated(factor, phase))
    }
    found: Collection[Any] = shares.values() if shares else [None]
    for share in found:
        if not _is_number(share) or not 0 < share < 1:
            got = "nothing" if share is None else shown(share)
            takes = "a share of tiles above 0 and below 1, for both phases or by phase"
            remedy = 'Give target_sparsity={"prefill": 0.5}; a phase that it leaves out is dense.'
            raise ConfigError(describe("target_sparsity", got, takes, remedy))
    return dict(shares)


def _is_calibrated(factor: Mapping[str, Any], phase: str) -> bool:
    return phase in factor or _COEFFICIENTS in factor


def _coefficients(factor: Mapping[str, Any], phase: str) -> dict[str, float]:
    if not _is_calibrated(factor, phase):
        got, takes = "nothing", '{"a": number, "b": number}, for target_sparsity names the phase'
        remedy = "Give target_sparsity for the phases that have coefficients."
        raise ConfigError(describe(f"threshold_scale_factor.{phase}", got, takes, remedy))
    key = phase if phase in factor else _COEFFICIENTS
    place = f"threshold_scale_factor.{key}"
    found = mapping_at(factor, key, "threshold_scale_factor")
    only_keys(found, ("a", "b"), place)
    for name in ("a", "b"):
        if not _is_number(found.get(name)):
            got = shown(found[name]) if name in found else "nothing"
            raise ConfigError(describe(f"{place}.{name}", got, "a number"))
    return dict(found)


def mapping_at(parent: Mapping[str, Any], key: str, place: str) -> Mapping[str, Any]:
    """The mapping at a key. Raises ConfigError where there is none."""
    value = parent.get(key)
    if not isinstance(value, Mapping):
        got = "nothing" if value is None else shown(value)
        raise ConfigError(describe(f"{place}.{key}" if place else key, got, "a mapping"))
    return value


def only_keys(found: Mapping[str, Any], takes: Collection[str], place: str) -> None:
    """Raises ConfigError at a key that isn't known: it may change what is computed."""
    for key in found:
        if key not in takes:
            raise ConfigError(describe(place, shown(key), ", ".join(takes)))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
