"""What `check` says of charon's release and of its HA messages (bridge.check.charon), for charons the lab has not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bridge.charon.conf_parser import Settings
from bridge.check import charon
from bridge.check.finding import Grade
from bridge.config import ClientConfig, GatewayConfig, HaConfig
from bridge.service import control


@pytest.mark.parametrize("release", ["5.9.8", "6.0.2", "6.1.0"])
def test_a_release_whose_messages_are_known_is_ok(release: str) -> None:
    assert charon._release(release).grade is Grade.OK


def test_the_release_that_crashes_is_named_with_the_one_that_does_not() -> None:
    finding = charon._release("6.0.1")
    assert finding.grade is Grade.WARN
    assert "6.0.2" in (finding.fix or "")


def test_a_newer_release_than_any_known_is_named() -> None:
    finding = charon._release("6.2.0")
    assert finding.grade is Grade.WARN
    assert "6.2.0" in finding.text


@pytest.mark.parametrize(("unsupported", "failed"), [(None, False), (6, True)])
async def test_a_version_that_the_sidecar_does_not_know_is_a_failure(
    unsupported: int | None, failed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def call(path: str, request: dict[str, Any]) -> dict[str, Any]:
        return {"charon": {"ha_unsupported": unsupported}}

    monkeypatch.setattr(control, "call", call)
    config: Any = type("Config", (), {"control": "/nowhere", "ha": HaConfig()})()
    findings = await charon.ha_version(config)
    assert [finding.grade for finding in findings] == ([Grade.FAIL] if failed else [])


async def test_without_a_sidecar_nothing_is_said_of_its_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    async def call(path: str, request: dict[str, Any]) -> dict[str, Any]:
        raise control.ControlError("nobody")

    monkeypatch.setattr(control, "call", call)
    config: Any = type("Config", (), {"control": "/nowhere"})()
    assert await charon.ha_version(config) == []


CHOSEN = """
charon {
    ikesa_table_size = 4096
    journal { default = 1; enc = 0; ike = 0 }
    plugins { hmac { load = 10 } kdf { load = 10 } }
    plugins { kernel-netlink { fwmark = !0x220 } socket-default { fwmark = 0x220 } }
}
"""


def answer(tmp_path: Path, text: str, *plugins: str) -> charon.CharonAnswer:
    path = tmp_path / "strongswan.conf"
    path.write_text(text.replace(";", "\n"))
    return charon.CharonAnswer("5.9.8", list(plugins), 0, Settings(path))


def test_a_gateway_is_told_which_choices_would_save_cpu(tmp_path: Path) -> None:
    findings = charon.cost(GatewayConfig(), answer(tmp_path, "charon { ikesa_table_size = 65536 }", "openssl", "hmac"))
    assert [finding.grade for finding in findings] == [Grade.OK]
    for words in ("ikesa_table_size 4096", "log levels", "hmac and kdf before openssl", "a mark for charon's packets"):
        assert words in findings[0].text


def test_choices_that_were_made_are_not_named(tmp_path: Path) -> None:
    assert charon.cost(GatewayConfig(), answer(tmp_path, CHOSEN, "openssl", "hmac", "kdf")) == []
    [finding] = charon.cost(GatewayConfig(), answer(tmp_path, CHOSEN.replace("kdf", "other"), "openssl"))
    assert "log levels" not in finding.text


def test_a_client_is_told_of_none(tmp_path: Path) -> None:
    assert charon.cost(ClientConfig(), answer(tmp_path, "charon { }", "openssl")) == []
