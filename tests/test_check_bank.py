"""What `check` says of a bank and of the other gateways in it, whatever somebody else has put there."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from bank_support import GATEWAY, RedisServer, keyring
from bridge.bank.redis_bank import RedisBank
from bridge.bank.seal_volume import SEALS_ASK, SEALS_MAX
from bridge.check.bank import bank as check_bank
from bridge.check.finding import Finding, Grade
from bridge.config import BankConfig, GatewayConfig
from bridge.stub import bank_keys
from bridge.stub.keyring import Keyring, generate
from bridge.stub.revocation import Mark, seal

pytestmark = pytest.mark.redis

OTHER = "192.0.2.2"


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    generate(tmp_path / "bank.key")
    return tmp_path / "bank.key"


async def findings(server: RedisServer, key_file: Path, name: str) -> list[Finding]:
    config = GatewayConfig(address=GATEWAY, bank=BankConfig(url=server.url, key_file=str(key_file)))
    return [finding for finding in await check_bank(config, None) if finding.name == name]


async def test_a_gateway_that_lacks_the_newest_key_is_named(server: RedisServer, key_file: Path) -> None:
    bank = RedisBank(server.url, Keyring.load(key_file))
    await bank.heartbeat(OTHER, 30)
    assert await findings(server, key_file, "bank key") == []
    new = generate(key_file, add=True)
    [finding] = await findings(server, key_file, "bank key")
    assert finding.grade is Grade.WARN
    assert OTHER in finding.text
    assert new in finding.text
    await bank.close()


async def test_a_phantom_gateway_is_named_with_the_key_to_delete(server: RedisServer, key_file: Path) -> None:
    server.client.zadd(bank_keys.GATEWAYS, {OTHER: time.time()})
    server.client.set(bank_keys.heartbeat_key(OTHER), "1 ")
    [finding] = await findings(server, key_file, "bank key")
    assert finding.grade is Grade.FAIL
    assert f"delete ike:gateway:{OTHER}" in str(finding)


async def test_a_gateway_whose_clock_is_wrong_is_named(server: RedisServer, key_file: Path) -> None:
    ring = Keyring.load(key_file)
    right = RedisBank(server.url, ring)
    wrong = RedisBank(server.url, ring, wall=lambda: time.time() + 8 * 86_400)
    await right.heartbeat("192.0.2.3", 30)
    await wrong.heartbeat(OTHER, 30)
    [found] = [each for each in await findings(server, key_file, "clock") if each.grade is Grade.FAIL]
    assert OTHER in found.text
    await right.close()
    await wrong.close()


@pytest.mark.parametrize(("seals", "grade"), [(SEALS_ASK, Grade.WARN), (SEALS_MAX // 2, Grade.FAIL)])
async def test_a_key_that_has_sealed_much_is_found(
    server: RedisServer, key_file: Path, seals: int, grade: Grade
) -> None:
    [key_id] = Keyring.load(key_file).ids
    server.client.set(bank_keys.posted_key(bank_keys.SEALS_KIND, GATEWAY), f'{{"{key_id.hex()}": {seals}}}')
    [finding] = await findings(server, key_file, "bank key")
    assert finding.grade is grade
    assert "keygen" in str(finding)


async def test_a_gateway_that_does_not_enforce_a_lock_out_is_named(server: RedisServer, key_file: Path) -> None:
    ring = Keyring.load(key_file)
    bank = RedisBank(server.url, ring)
    assert await findings(server, key_file, "locked out") == []
    now = int(time.time())
    mark = Mark("client@example", True, (now - 60) * 1000, now + 3600)
    await bank.put_revocations({seal(mark, ring): mark.expires}, ())
    for gateway in (GATEWAY, OTHER):
        await bank.heartbeat(gateway, 30)
    await bank.post(bank_keys.LOCKOUT_KIND, GATEWAY, f'{{"latest": {mark.made}}}', 60)
    [finding] = await findings(server, key_file, "locked out")
    assert finding.grade is Grade.FAIL
    assert OTHER in finding.text
    assert "client@example" in finding.text
    await bank.post(bank_keys.LOCKOUT_KIND, OTHER, f'{{"latest": {mark.made}}}', 60)
    [finding] = await findings(server, key_file, "locked out")
    assert finding.grade is Grade.OK
    assert finding.text.endswith(": 1")
    await bank.close()


async def test_marks_that_do_not_open_are_found(server: RedisServer, key_file: Path) -> None:
    foreign = keyring()
    bank = RedisBank(server.url, foreign)
    now = int(time.time())
    await bank.put_revocations({seal(Mark("client@example", True, now * 1000, now + 3600), foreign): now + 3600}, ())
    [finding] = await findings(server, key_file, "locked out")
    assert finding.grade is Grade.FAIL
    assert "1 marks" in finding.text
    await bank.close()


async def test_junk_in_the_bank_is_no_traceback(server: RedisServer, key_file: Path) -> None:
    now = time.time()
    server.client.zadd(bank_keys.GATEWAYS, {b"\xff\xfe": now, "x" * 10_000: now, OTHER: now})
    server.client.set(bank_keys.heartbeat_key(OTHER), b"\xff" * 100_000)
    for kind in (bank_keys.FACTS_KIND, bank_keys.SEALS_KIND, bank_keys.STATS_KIND, bank_keys.LOCKOUT_KIND):
        server.client.set(bank_keys.posted_key(kind, OTHER), b"[" * 100_000)
        server.client.set(bank_keys.posted_key(kind, GATEWAY), b'{"a": ' + b"9" * 5000 + b"}")
    [finding] = await findings(server, key_file, "bank")
    assert finding.grade is Grade.OK
    server.client.delete(bank_keys.GATEWAYS)
    server.client.set(bank_keys.GATEWAYS, "x")
    [finding] = await findings(server, key_file, "bank")
    assert finding.grade is Grade.OK
