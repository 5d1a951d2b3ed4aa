"""What `status` and `ready` say of charon and its SAs."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

from bridge.charon.charon import Charon
from bridge.service.control import SLICE
from bridge.service.systemd import notify

READY_SECONDS = 10.0
"""how long `ready` waits for charon's SAs to be known; charon may well be down"""


async def wait_known(charon: Charon) -> None:
    """Wait a while for charon and its SAs to be known."""
    if charon.channel.charon_socket() is None:
        # systemd starts charon after the sidecar
        notify("READY=1")
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(READY_SECONDS):
            await charon.reconciled.wait()


async def sa_rows(charon: Charon) -> list[dict[str, Any]]:
    """The IKE_SAs that are up, as `status` lists them."""
    rows = []
    for sa in charon.tracker.established():
        rows.append(
            {
                "connection": sa.connection,
                "spi_i": sa.id.spi_i.hex(),
                "spi_r": sa.id.spi_r.hex(),
                "initiator": sa.id.initiator,
                "remote": sa.remote.address if sa.remote else None,
                "remote_id": sa.remote_id.text if sa.remote_id else None,
                "virtual_ips": list(sa.remote_vips or sa.local_vips),
                "children": [child.name for child in sa.children],
                "expires": sa.expires,
                "resumable": sa.resumable,
                "taken_over": sa.taken_over,
            }
        )
        if len(rows) % SLICE == 0:
            await asyncio.sleep(0)
    return rows


def charon_status(charon: Charon) -> dict[str, Any]:
    """The state of the local charon, for `status`."""
    end = charon.channel.charon_socket()
    return {
        "reachable": charon.vici.connected,
        "release": charon.release,
        "ha_plugin": end is not None,
        "ha_version": charon.channel.version,
        "ha_unsupported": charon.channel.unsupported,
        "ha_received": charon.channel.received,
        "ha_malformed": charon.channel.malformed,
        "ha_drops": charon.channel.drops(),
        "ha_drops_charon": end.drops if end else 0,
        "unresumable": charon.tracker.unresumable,
    }
