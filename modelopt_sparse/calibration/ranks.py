"""What several processes counted, together: every one gets the same."""

from __future__ import annotations

from collections.abc import Mapping

from torch import distributed

from modelopt_sparse.errors import UnsupportedCall, describe

from .recorder import Tallies, added


def of_all_ranks(tallies: Mapping[str, Tallies]) -> dict[str, Tallies]:
    """Adds what all ranks counted, by module, without telling heads apart.

    Ranks may have other prompts, other heads of the same modules, or other modules.
    """
    own = {
        name: {place: tally.of_all_heads() for place, tally in counted.items()}
        for name, counted in tallies.items()
    }
    if _ranks() == 1:
        return own
    gathered: list[dict[str, Tallies]] = [{} for _ in range(_ranks())]
    distributed.all_gather_object(gathered, own)
    names = dict.fromkeys(name for each in gathered for name in each)
    return {name: added(each.get(name, {}) for each in gathered) for name in names}


def refuse_ranks() -> None:
    """Raises UnsupportedCall in several processes: which of them have the same heads isn't known."""
    if _ranks() > 1:
        remedy = 'Take thresholds_for="layer" or "model", or calibrate in one process.'
        got = f"{_ranks()} processes"
        raise UnsupportedCall(describe('thresholds_for="head"', got, "one process", remedy))


def _ranks() -> int:
    is_distributed = distributed.is_available() and distributed.is_initialized()
    return distributed.get_world_size() if is_distributed else 1
