"""Speed beside other attention kernels, results checked first: ``python -m modelopt_sparse.bench``."""

from __future__ import annotations

from .cases import Case, Setting, smoke_cases, standard_cases
from .run import Row, measure

__all__ = ["Case", "Row", "Setting", "measure", "smoke_cases", "standard_cases"]
