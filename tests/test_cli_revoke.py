"""`ike-sa-sync unrevoke` while a bank has lost marks, or is asked twice, in a real Redis."""

from __future__ import annotations

import asyncio
import json
import time

import pytest

from bank_support import GATEWAY, RedisServer
from bridge.gateway.revocation import Revocations
from bridge.stub import bank_keys
from bridge.stub.revocation import Mark, open_mark, seal
from test_cli_stubs import Operator, operator, server

__all__ = ["operator", "server"]

pytestmark = pytest.mark.redis

IDENTITY = "client@example"


def mark(made: float) -> Mark:
    return Mark(IDENTITY, True, int(made * 1000), int(made) + 3600)


async def enforced(operator: Operator, made: int) -> None:
    """A living gateway reports that it enforces the mark that was made then."""
    await operator.bank.heartbeat(GATEWAY, 30)
    await operator.bank.post(bank_keys.LOCKOUT_KIND, GATEWAY, json.dumps({"latest": made}), 60)


async def test_letting_in_may_be_repeated_until_all_gateways_know_it(operator: Operator) -> None:
    locked = mark(time.time() - 5)
    await operator.bank.put_revocations({seal(locked, operator.keyring): locked.expires}, ())
    await enforced(operator, locked.made)
    # the gateway does not report in time
    assert operator.run("unrevoke", IDENTITY).returncode == 1
    [[sealed]] = await operator.bank.revocations()
    let_in = open_mark(sealed, operator.keyring)
    assert not let_in.revoked
    await enforced(operator, let_in.made)
    assert operator.run("unrevoke", IDENTITY).returncode == 0
    assert await operator.bank.revocations() == [[sealed]]
    await operator.bank.close()


async def test_who_fills_the_set_of_marks_does_not_keep_an_identity_from_being_locked_out(
    operator: Operator, server: RedisServer
) -> None:
    server.client.zadd(bank_keys.REVOKED, {f"junk {number}": time.time() + 60 for number in range(12_000)})
    revocations = Revocations(operator.bank, operator.keyring)
    await operator.bank.heartbeat(GATEWAY, 30)
    task = asyncio.create_task(asyncio.to_thread(operator.run, "revoke", IDENTITY))
    while not task.done():
        # as the gateway does it when the stamp has changed
        await revocations.look()
        await operator.bank.post(bank_keys.LOCKOUT_KIND, GATEWAY, json.dumps({"latest": revocations.latest}), 60)
        await asyncio.wait([task], timeout=0.1)
    assert task.result().returncode == 0
    assert [mark.identity for mark in revocations.active()] == [IDENTITY]
    await operator.bank.close()


async def test_a_bank_that_lost_the_mark_is_not_an_identity_that_is_not_locked_out(operator: Operator) -> None:
    done = operator.run("unrevoke", IDENTITY)
    assert (done.returncode, "is not locked out" in done.stderr) == (1, True)
    await enforced(operator, mark(time.time()).made)
    done = operator.run("unrevoke", IDENTITY)
    assert (done.returncode, "repeat the command" in done.stderr) == (1, True)
    await operator.bank.close()
