"""What the unit keeps for the sidecar (systemd/ike-sa-sync.service)."""

from __future__ import annotations

from configparser import RawConfigParser
from pathlib import Path

import pytest

from bridge.config import GatewayConfig

ROOT = Path(__file__).parents[1]


@pytest.fixture
def service() -> dict[str, str]:
    unit = RawConfigParser(strict=False, interpolation=None)
    unit.optionxform = str  # type: ignore[method-assign,assignment]
    unit.read(ROOT / "systemd/ike-sa-sync.service")
    return dict(unit["Service"])


def test_what_outlives_a_restart_of_the_host_is_in_the_units_state_directory(service: dict[str, str]) -> None:
    """It is writable for the sidecar, and for root alone; what a client holds can lie there too (held.file)."""
    assert GatewayConfig().state == f"/var/lib/{service['StateDirectory']}"
    assert service["StateDirectoryMode"] == "0700"
