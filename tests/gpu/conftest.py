"""No test hangs: a kernel that never ends can't be interrupted, so its process ends and another goes on."""

from __future__ import annotations

import faulthandler
from collections.abc import Iterator

import pytest

LIMIT_SECONDS = 300


@pytest.fixture(autouse=True)
def limit() -> Iterator[None]:
    """Ends a test's process when it takes too long; pytest-xdist reports the test as failed."""
    faulthandler.dump_traceback_later(LIMIT_SECONDS, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()
