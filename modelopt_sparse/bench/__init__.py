"""Speed beside other attention kernels, results checked first: ``python -m modelopt_sparse.bench``."""

from __future__ import annotations

from .case import Case, Setting
from .decode_step import small_step_cases, step_cases
from .run import Row, measure
from .serving import serving_cases, small_serving_cases
from .suites import smoke_cases, standard_cases

__all__ = [
    "Case",
    "Row",
    "Setting",
    "measure",
    "serving_cases",
    "small_serving_cases",
    "small_step_cases",
    "smoke_cases",
    "standard_cases",
    "step_cases",
]
