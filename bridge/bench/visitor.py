"""A client without a sidecar that performs full handshakes while something else is measured."""

from __future__ import annotations

import contextlib
import threading
import time

from bridge.lab.host import Host
from bridge.lab.space import LabError

REST = 0.1
"""seconds between two handshakes: a legitimate client is no flood of its own"""
PATIENCE = 60.0
"""seconds for one on a machine that is busy"""


def handshakes(visitor: Host, until: threading.Event, took: list[float]) -> None:
    """Full handshakes with gw2, one after the other; how long each took, in seconds."""
    while not until.wait(REST):
        began = time.monotonic()
        with contextlib.suppress(LabError):
            visitor.charon.initiate("net", "home-gw2", PATIENCE)
            took.append(time.monotonic() - began)
        visitor.swanctl("--terminate", "--ike", "home-gw2", check=False)
