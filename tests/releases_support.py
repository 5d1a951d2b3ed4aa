"""Tests that are run with the strongSwan of other Debian releases too (`make test-releases`)."""

from __future__ import annotations

import pytest

from bridge.lab.releases import RELEASES, machine

OTHERS = tuple(name for name in RELEASES if name != machine())
RELEASED = [
    pytest.param(None, id="here"),
    *(pytest.param(name, marks=pytest.mark.releases, id=name) for name in OTHERS),
]
"""parameters of a fixture: the machine's own release, and each other one"""


def on_all(release: str | None) -> dict[str, str] | None:
    """What `standard` needs to run a release on both gateways and the client."""
    return None if release is None else dict.fromkeys(("gw1", "gw2", "client"), release)
