"""What `check` knows of routing daemons."""

from __future__ import annotations

from pathlib import Path

import pytest

from bridge.check.return_path import exporting
from bridge.service import shipped_files


@pytest.mark.parametrize(
    ("daemon", "configuration", "taken"),
    [
        ("bird", "bird-gateway.conf", True),
        ("bird", "bird-router.conf", False),
        ("zebra", "frr-gateway.conf", True),
        ("zebra", "frr10-gateway.conf", True),
        ("zebra", "frr-router.conf", False),
    ],
)
def test_a_daemon_with_the_shipped_configuration_of_a_gateway_takes_charons_table(
    daemon: str, configuration: str, taken: bool
) -> None:
    file = Path(shipped_files.path(f"strongswan-conf/network/{configuration}"))
    assert exporting([(daemon, file)]) == (daemon if taken else None)
