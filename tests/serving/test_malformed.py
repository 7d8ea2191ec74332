"""Requests that make no sense: none is a fault of the server, and none hangs."""

from __future__ import annotations

from pathlib import Path

import pytest

from lpd_export.serving.request import ServeRequest
from malformed import fuzz
from server_process import running

pytestmark = pytest.mark.model


def test_nonsense_is_answered(small_bundle: Path) -> None:
    with running(ServeRequest((small_bundle,), threads=1)) as served:
        statuses = fuzz(served.url, 150)
    assert {"400", "404"} < set(statuses)
    assert sum(statuses.values()) >= 150
