"""A bank whose Redis moves while gateways write: Sentinel's failover, a Cluster's resharding, TLS."""

from __future__ import annotations

import asyncio
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bank_support import PASSWORD, PATIENCE, RedisServer, downloaded, keyring, shipped_users, stub_of
from bridge.bank.interface import BankUnavailable
from bridge.bank.keyspace import Event, Keyspace
from bridge.bank.redis import RedisBank
from bridge.bank.writer import Writer
from bridge.seal import Keyring
from test_bank_servers import admin, cluster, cluster_url, free_port

__all__ = ["cluster"]

pytestmark = pytest.mark.redis


@pytest.fixture
def ring() -> Keyring:
    return keyring()


async def until_back(bank: RedisBank) -> None:
    """Wait until the bank answers."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            await bank.ping()
        except BankUnavailable:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.1)
        else:
            return


@pytest.fixture
def watched_pair(tmp_path: Path, program: list[str]) -> Iterator[tuple[RedisServer, int]]:
    """A primary with a replica and a Sentinel that takes 0.5 s of silence for a failure: primary, Sentinel's port."""
    ports = [free_port() for _ in range(3)]
    for name in ("primary", "replica", "sentinel"):
        (tmp_path / name).mkdir()
    conf = tmp_path / "sentinel/sentinel.conf"
    conf.write_text(
        f"sentinel monitor bank 127.0.0.1 {ports[0]} 1\nsentinel down-after-milliseconds bank 500\n"
        f"sentinel auth-user bank sentinel\nsentinel auth-pass bank {PASSWORD}\n"
        "sentinel failover-timeout bank 3000\n"
    )
    shared = (
        *("--masteruser", "replica", "--masterauth", PASSWORD),
        *shipped_users(tmp_path / "users.acl"),
    )
    login: dict[str, Any] = {"username": "admin", "password": PASSWORD}
    with (
        RedisServer(tmp_path / "primary", "--port", str(ports[0]), *shared, program=program, **login) as primary,
        RedisServer(
            tmp_path / "replica",
            *("--port", str(ports[1]), "--replicaof", "127.0.0.1", str(ports[0]), *shared),
            program=program,
            **login,
        ) as replica,
        RedisServer(
            tmp_path / "sentinel", "--port", str(ports[2]), "--sentinel", program=program, conf=conf
        ) as sentinel,
    ):
        deadline = time.monotonic() + PATIENCE
        while replica.client.info("replication")["master_link_status"] != "up" or not sentinel.client.execute_command(
            "SENTINEL", "REPLICAS", "bank"
        ):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        yield primary, ports[2]


async def test_writing_goes_on_at_the_replica_that_sentinel_promotes(
    watched_pair: tuple[RedisServer, int], ring: Keyring
) -> None:
    primary, port = watched_pair
    url = f"redis+sentinel://gateway:{PASSWORD}@127.0.0.1:{port}/bank/0"
    bank = RedisBank(url, ring, get_timeout=5.0)
    hears: asyncio.Queue[bool] = asyncio.Queue()
    heard: set[str] = set()
    keyspace = Keyspace(url, ("ike:stub:*",), lambda event: heard.add(event.key), hears.put_nowait)
    keyspace.start()
    assert await hears.get()
    writer = Writer(bank, bundle=16)
    stubs = [stub_of() for _ in range(800)]
    for number, stub in enumerate(stubs):
        writer.submit(stub)
        if number % 8 == 0:
            await asyncio.sleep(0.005)
        if number == 400:
            primary.kill()
    async with asyncio.timeout(PATIENCE):
        await writer.flush()
    # a replica may lack the last writes that the primary acknowledged: this is how gateways find which
    indexes = [stub.index for stub in stubs]
    lost = [stub for stub, held in zip(stubs, await bank.revisions(indexes), strict=True) if not held]
    for stub in lost:
        writer.submit(stub)
    await writer.flush()
    assert len(await downloaded(bank)) == len(stubs)
    assert len(lost) < 64
    # and whoever watched hears the new primary
    async with asyncio.timeout(PATIENCE):
        assert not await hears.get()
        assert await hears.get()
        last = stub_of()
        await bank.store([last])
        while last.index.key not in heard:  # noqa: ASYNC110 - its queue is of states, not events
            await asyncio.sleep(0.02)
    await keyspace.close()
    await writer.close()
    await bank.close()


def reshard(ports: list[int], tag: str, to: int) -> None:
    """Move the slot of one bucket, with what is in it, to another primary, as `redis-cli --cluster reshard` does."""
    clients = [admin(port) for port in ports]
    slot = clients[0].execute_command("CLUSTER", "KEYSLOT", f"{{{tag}}}")
    ids = [client.execute_command("CLUSTER", "MYID") for client in clients]
    bounds = ((0, 5460), (5461, 10922), (10923, 16383))
    source = next(number for number, (first, last) in enumerate(bounds) if first <= slot <= last)
    if source == to:
        to = (to + 1) % 3
    clients[to].execute_command("CLUSTER", "SETSLOT", slot, "IMPORTING", ids[source])
    clients[source].execute_command("CLUSTER", "SETSLOT", slot, "MIGRATING", ids[to])
    while keys := clients[source].execute_command("CLUSTER", "GETKEYSINSLOT", slot, 100):
        clients[source].execute_command(
            "MIGRATE", "127.0.0.1", ports[to], "", 0, 60_000, "AUTH2", "admin", PASSWORD, "KEYS", *keys
        )
    for number in (to, source, 3 - to - source):
        clients[number].execute_command("CLUSTER", "SETSLOT", slot, "NODE", ids[to])
    # A node takes a slot over under a new epoch, unless it has the greatest one that it knows of already. One that has
    # not heard yet of an epoch that another node took a moment ago keeps its older one, its claim loses against the
    # former owner's in whatever message is still under way, and an owner that loses a slot in this way deletes what is
    # in it. (Without this, one run in twenty ends with a slot that each of two nodes says is the other's.) So wait, as
    # operators do, until all nodes agree.
    deadline = time.monotonic() + PATIENCE
    while len({layout(client) for client in clients}) > 1:
        assert time.monotonic() < deadline, "the nodes do not agree on who has which slots"
        time.sleep(0.01)


def layout(client: Any) -> frozenset[tuple[str, str, tuple[str, ...]]]:
    """The primaries as a node sees them: id, epoch, slots."""
    lines = client.execute_command("CLUSTER NODES")
    return frozenset((node["node_id"], node["epoch"], tuple(map(str, node["slots"]))) for node in lines.values())


async def test_a_cluster_may_move_buckets_while_gateways_write(cluster: list[int], ring: Keyring) -> None:
    bank = RedisBank(cluster_url(cluster), ring, get_timeout=5.0)
    writer = Writer(bank, bundle=64)
    stubs = [stub_of() for _ in range(1500)]
    moves: asyncio.Task[None] | None = None

    async def move() -> None:
        for number, tag in enumerate(sorted({stub.index.tag for stub in stubs})[:32]):
            await asyncio.to_thread(reshard, cluster, tag, number % 3)

    for number, stub in enumerate(stubs):
        writer.submit(stub)
        if number % 16 == 0:
            await asyncio.sleep(0.005)
        if number == 200:
            moves = asyncio.create_task(move())
    assert moves is not None
    await moves
    async with asyncio.timeout(PATIENCE):
        await writer.flush()
    assert await bank.get([stub.index for stub in stubs]) == stubs
    assert len(await downloaded(bank)) == len(stubs)
    await writer.close()
    await bank.close()


async def test_the_keyspace_of_all_primaries_of_a_cluster_is_heard(cluster: list[int], ring: Keyring) -> None:
    url = cluster_url(cluster)
    heard: set[str] = set()
    ready, complete = asyncio.Event(), asyncio.Event()

    def hear(event: Event) -> None:
        heard.add(event.key)
        if len(heard) == 30:
            complete.set()

    keyspace = Keyspace(url, ("ike:stub:*",), hear, lambda hears: ready.set() if hears else None)
    keyspace.start()
    await ready.wait()
    bank = RedisBank(url, ring, get_timeout=5.0)
    stubs = [stub_of() for _ in range(30)]
    await bank.store(stubs)
    async with asyncio.timeout(PATIENCE):
        await complete.wait()
    assert heard == {stub.index.key for stub in stubs}
    await keyspace.close()
    await bank.close()


def certificate(directory: Path, name: str, issuer: str | None) -> None:
    """`name`.key and `name`.crt, signed by `issuer` or itself."""
    openssl = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:P-256",
        "-nodes",
        "-days",
        "1",
    ]
    signer = ["-CA", f"{issuer}.crt", "-CAkey", f"{issuer}.key"] if issuer else []
    extensions = ["-addext", "subjectAltName=IP:127.0.0.1"] if issuer else []
    files = ["-keyout", f"{name}.key", "-out", f"{name}.crt", "-subj", f"/CN={name}"]
    subprocess.run([*openssl, *signer, *extensions, *files], cwd=directory, check=True, capture_output=True)


async def test_tls_with_client_certificates(tmp_path: Path, ring: Keyring, program: list[str]) -> None:
    certificate(tmp_path, "ca", None)
    certificate(tmp_path, "server", "ca")
    certificate(tmp_path, "gateway", "ca")
    certificate(tmp_path, "stranger", None)
    port = free_port()
    settings = (
        *("--tls-port", str(port), "--tls-ca-cert-file", str(tmp_path / "ca.crt")),
        *("--tls-cert-file", str(tmp_path / "server.crt"), "--tls-key-file", str(tmp_path / "server.key")),
    )
    with RedisServer(tmp_path, *settings, program=program):

        def bank(name: str, ca: str = "ca") -> RedisBank:
            files = (
                f"ssl_ca_certs={tmp_path}/{ca}.crt&ssl_certfile={tmp_path}/{name}.crt&ssl_keyfile={tmp_path}/{name}.key"
            )
            return RedisBank(f"rediss://127.0.0.1:{port}/0?{files}", ring, get_timeout=5.0)

        stub = stub_of()
        ours = bank("gateway")
        assert await ours.store([stub]) == [True]
        assert await ours.get([stub.index]) == [stub]
        await ours.close()
        for refused in (bank("stranger"), bank("gateway", "stranger")):
            with pytest.raises(BankUnavailable):
                await refused.ping()
            await refused.close()
