"""`check` and intercept.match: whether a client still needs all requests to pass through the sidecar."""

from __future__ import annotations

from typing import Any

import pytest

from bridge.check import host
from bridge.config import GatewayConfig, InterceptConfig
from bridge.service import control

ANYWHERE = GatewayConfig(intercept=InterceptConfig(match="anywhere"))


async def found(monkeypatch: pytest.MonkeyPatch, config: GatewayConfig, counters: dict[str, int] | None) -> list[str]:
    """Grades and texts of what is found, where the sidecar counts this; None: it does not answer."""

    async def call(_: str, request: dict[str, Any]) -> dict[str, Any]:
        assert request == {"command": "counters"}
        if counters is None:
            raise control.ControlError("no sidecar")
        return {"counters": counters}

    monkeypatch.setattr(control, "call", call)
    return [f"{finding.grade}: {finding.text}" for finding in await host.match(config)]


async def test_clients_that_send_the_payload_last_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    [line] = await found(monkeypatch, ANYWHERE, {"clients_sync_last": 3})
    assert line == "ok: 3 clients sent IKE_SA_SYNC last within a day, as release 0.1 does"


async def test_where_none_does_the_option_that_costs_something_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    [line] = await found(monkeypatch, ANYWHERE, {})
    assert line.startswith("warn: every handshake passes through the sidecar")


async def test_without_the_option_or_a_sidecar_nothing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    assert await found(monkeypatch, GatewayConfig(), {"clients_sync_last": 3}) == []
    assert await found(monkeypatch, ANYWHERE, None) == []
