"""A bank whose Redis moves while gateways write: Sentinel's failover, a Cluster's resharding, TLS."""

from __future__ import annotations

import asyncio
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import redis
from bank_support import PASSWORD, PATIENCE, RedisServer, downloaded, shipped_users, stub_of
from bridge.bank.interface import BankUnavailable
from bridge.bank.keyspace import Event, Keyspace
from bridge.bank.redis_bank import RedisBank
from bridge.bank.write_queue import WriteQueue
from bridge.stub.keyring import Keyring
from test_bank_servers import admin, cluster, cluster_url, free_port, three_primaries

__all__ = ["cluster"]

pytestmark = pytest.mark.redis


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
    writer = WriteQueue(bank, bundle=16)
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


async def switched(sentinel: int, old: int) -> int:
    """Wait until Sentinel names another primary than that of port `old`: its port."""
    client: Any = redis.Redis(port=sentinel)
    deadline = time.monotonic() + PATIENCE
    while (port := int(client.execute_command("SENTINEL", "GET-MASTER-ADDR-BY-NAME", "bank")[1])) == old:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.1)
    return port


@pytest.mark.parametrize("failed", [True, False])
async def test_a_primary_that_comes_back_before_sentinel_has_demoted_it_gets_no_writes(
    watched_pair: tuple[RedisServer, int], ring: Keyring, failed: bool
) -> None:
    """It acknowledges them, and loses them when it becomes a replica. Either a command met its silence, or whoever
    watches the keyspace reported the switch."""
    primary, sentinel = watched_pair
    old = primary.client.config_get("port")["port"]
    bank = RedisBank(f"redis+sentinel://gateway:{PASSWORD}@127.0.0.1:{sentinel}/bank/0", ring, timeout=0.5)
    # connections that lie ready, and scripts that are loaded
    await asyncio.gather(*(bank.store([stub_of()]) for _ in range(8)))
    primary.freeze()
    if failed:
        with pytest.raises(BankUnavailable):
            await bank.store([stub_of()])
    new = await switched(sentinel, int(old))
    if not failed:
        bank.renew()
    primary.thaw()
    stubs = [stub_of() for _ in range(8)]
    for stub in stubs:
        await until_back(bank)
        assert await bank.store([stub]) == [True]
    replica = redis.Redis(port=new, username="admin", password=PASSWORD)
    assert [replica.exists(stub.index.key) for stub in stubs] == [1] * len(stubs)
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
    writer = WriteQueue(bank, bundle=64)
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


async def serves(url: str, ring: Keyring, count: int = 1) -> None:
    """What a URL leads to takes stubs, gives them back, and what happens to them is heard."""
    bank = RedisBank(url, ring, get_timeout=5.0)
    stubs = [stub_of() for _ in range(count)]
    missed = {stub.index.key for stub in stubs}
    ready, complete = asyncio.Event(), asyncio.Event()

    def hear(event: Event) -> None:
        missed.discard(event.key)
        if not missed:
            complete.set()

    keyspace = Keyspace(url, ("ike:stub:*",), hear, lambda hears: ready.set() if hears else None)
    keyspace.start()
    async with asyncio.timeout(PATIENCE):
        await ready.wait()
        assert all(await bank.store(stubs))
        assert await bank.get([stub.index for stub in stubs]) == stubs
        await complete.wait()
    await keyspace.close()
    await bank.close()


async def test_the_keyspace_of_all_primaries_of_a_cluster_is_received(cluster: list[int], ring: Keyring) -> None:
    await serves(cluster_url(cluster), ring, 30)


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


def certificates(directory: Path) -> tuple[str, ...]:
    """A server's certificate and a client's, of one CA; the settings of a server with TLS that asks for them."""
    certificate(directory, "ca", None)
    certificate(directory, "server", "ca")
    certificate(directory, "gateway", "ca")
    return (
        *("--tls-ca-cert-file", str(directory / "ca.crt")),
        *("--tls-cert-file", str(directory / "server.crt"), "--tls-key-file", str(directory / "server.key")),
    )


def client_files(directory: Path, name: str = "gateway", ca: str = "ca") -> str:
    """The end of a URL that names a client's certificate."""
    return f"ssl_ca_certs={directory}/{ca}.crt&ssl_certfile={directory}/{name}.crt&ssl_keyfile={directory}/{name}.key"


async def test_tls_with_client_certificates(tmp_path: Path, ring: Keyring, program: list[str]) -> None:
    settings = certificates(tmp_path)
    certificate(tmp_path, "stranger", None)
    port = free_port()
    url = f"rediss://127.0.0.1:{port}/0?"
    with RedisServer(tmp_path, "--tls-port", str(port), *settings, program=program):
        await serves(url + client_files(tmp_path), ring)
        for files in (client_files(tmp_path, "stranger"), client_files(tmp_path, "gateway", "stranger")):
            refused = RedisBank(url + files, ring, get_timeout=5.0)
            with pytest.raises(BankUnavailable):
                await refused.ping()
            await refused.close()


async def test_tls_by_way_of_a_sentinel(tmp_path: Path, ring: Keyring, program: list[str]) -> None:
    settings = certificates(tmp_path)
    port, sentinel_port = free_port(), free_port()
    conf = tmp_path / "sentinel.conf"
    conf.write_text(f"sentinel monitor bank 127.0.0.1 {port} 1\ntls-replication yes\n")
    with (
        RedisServer(tmp_path / "primary", "--tls-port", str(port), *settings, program=program),
        RedisServer(
            tmp_path / "sentinel",
            *("--tls-port", str(sentinel_port), *settings, "--sentinel"),
            program=program,
            conf=conf,
        ),
    ):
        url = f"redis+sentinel://127.0.0.1:{sentinel_port}/bank/0?ssl=true&"
        await serves(url + client_files(tmp_path), ring)


async def test_tls_to_all_nodes_of_a_cluster(tmp_path: Path, ring: Keyring, program: list[str]) -> None:
    settings = ("--tls-cluster", "yes", *certificates(tmp_path))
    with three_primaries(tmp_path, program, *settings, option="--tls-port") as ports:
        hosts = ",".join(f"127.0.0.1:{port}" for port in ports)
        await serves(f"redis+cluster://gateway:{PASSWORD}@{hosts}?ssl=true&{client_files(tmp_path)}", ring, 30)
