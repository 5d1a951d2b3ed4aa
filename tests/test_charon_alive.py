"""Whether the charon runs whose IKE_SAs a sidecar knows (bridge.charon.reconcile)."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from bridge.charon.reconcile import Reconciler


@pytest.mark.parametrize(
    ("known", "holder", "alive"),
    [
        (None, None, None),
        (None, 7, None),
        (7, 7, True),
        (7, None, False),
        (7, 8, False),
    ],
    ids=["none yet", "not asked yet", "the same", "gone, or held by a process of another user", "another one"],
)
def test_it_is_the_process_that_holds_charons_end_of_the_ha_channel(
    known: int | None, holder: int | None, alive: bool | None
) -> None:
    reconciler = SimpleNamespace(_channel=SimpleNamespace(holder=lambda: holder), _inode=known)
    assert Reconciler.alive(cast(Any, reconciler)) is alive
