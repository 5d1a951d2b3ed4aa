"""The sign of life for the packet filter (bridge.net.liveness)."""

from __future__ import annotations

import errno

import pytest

from bridge.net.liveness import Liveness


def test_an_order_that_the_kernel_does_not_take_keeps_no_sign_of_life_from_it(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[bool] = []

    def tell() -> bool:
        told.append(True)
        return True

    def refused() -> None:
        raise OSError(errno.ENOBUFS, "No buffer space available")

    liveness = Liveness(lambda: None, lambda: None, refused)
    monkeypatch.setattr(liveness, "_tell", tell)
    liveness.beat()
    liveness.beat()
    assert told == [True, True]
