"""`ike-sa-sync stubs`: the bank as operators look at it, in a real Redis."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from bank_support import GATEWAY, RedisServer, stub_of
from bridge.bank.redis_bank import RedisBank
from bridge.lab.sidecar import program
from bridge.stub.keyring import Keyring, generate
from bridge.stub.types import Identity

pytestmark = pytest.mark.redis


class Operator:
    """Runs commands with a configuration that names a server."""

    def __init__(self, directory: Path, server: RedisServer) -> None:
        self.key_file = directory / "bank.key"
        self._file = directory / "gateway.yaml"
        generate(self.key_file)
        self._file.write_text(f"bank: {{url: '{server.url}', key_file: {self.key_file}}}\n")
        self.keyring = Keyring.load(self.key_file)
        self.bank = RedisBank(server.url, self.keyring)

    def stubs(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """`ike-sa-sync stubs`."""
        return self.run("stubs", *arguments)

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        """`ike-sa-sync WORDS`."""
        command = [*program(), *words, "-c", str(self._file)]
        return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture
def server(tmp_path: Path, program: list[str]) -> Iterator[RedisServer]:
    with RedisServer(tmp_path / "redis", program=program) as server:
        yield server


@pytest.fixture
def operator(tmp_path: Path, server: RedisServer) -> Operator:
    return Operator(tmp_path, server)


async def test_a_stub_is_listed_shown_and_deleted(operator: Operator) -> None:
    stub = stub_of()
    await operator.bank.store([stub])
    spi = stub.spi_r.hex()
    [row] = json.loads(operator.stubs("list", "--json").stdout)
    assert (row["gateway"], row["spi"], row["id_i"]) == (GATEWAY, spi, "client@example")
    told = json.loads(operator.stubs("show", GATEWAY, spi.upper(), "--json").stdout)
    assert (told["spi_i"], told["established"]) == (stub.spi_i.hex(), stub.established)
    deleted = operator.stubs("delete", GATEWAY, spi)
    assert (deleted.returncode, deleted.stdout) == (0, f"deleted {stub.index.key}\n")
    assert operator.stubs("list").stdout.endswith("0 stubs\n")
    await operator.bank.close()


async def test_the_eap_identity_is_listed_shown_and_found(operator: Operator) -> None:
    by_eap = msgspec.structs.replace(stub_of(), eap_id=Identity(3, b"alice@example"))
    await operator.bank.store([by_eap, stub_of()])
    [row] = json.loads(operator.stubs("list", "--identity", "alice@*", "--json").stdout)
    assert (row["spi"], row["eap_id"]) == (by_eap.spi_r.hex(), "alice@example")
    assert "alice@example" in operator.stubs("list").stdout
    assert "alice@example" in operator.stubs("show", GATEWAY, by_eap.spi_r.hex()).stdout
    await operator.bank.close()


async def test_what_is_shown_holds_no_key(operator: Operator) -> None:
    stub = stub_of()
    await operator.bank.store([stub])
    assert stub.shared_secret is not None
    for form in ((), ("--json",)):
        shown = operator.stubs("show", GATEWAY, stub.spi_r.hex(), *form).stdout
        assert stub.spi_i.hex() in shown
        assert stub.sk_d.hex() not in shown
        assert stub.shared_secret.hex() not in shown
    await operator.bank.close()


async def test_people_read_times_as_times(operator: Operator) -> None:
    stub = stub_of()
    await operator.bank.store([stub])
    lines = operator.stubs("show", GATEWAY, stub.spi_r.hex()).stdout.splitlines()
    shown = dict(line.split(maxsplit=1) for line in lines if len(line.split(maxsplit=1)) == 2)
    assert shown["expires"].endswith(" UTC")
    assert shown["reauth_at"] == "never"
    assert str(stub.expires) not in "".join(lines)
    await operator.bank.close()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("list", "--gateway", "gw1"), "'gw1' is not an IP address"),
        (("show", "gw1", "00" * 8), "'gw1' is not an IP address"),
        (("delete", "gw1", "00" * 8), "'gw1' is not an IP address"),
        (("download", "--from", "gw1"), "'gw1' is not an IP address"),
        (("show", GATEWAY, "00" * 7), f"'{'00' * 7}' is not an IKE SPI: 16 hex digits"),
        (("delete", GATEWAY, "client"), "'client' is not an IKE SPI: 16 hex digits"),
    ],
)
def test_what_names_no_stub_is_refused_and_leaves_nothing_in_the_bank(
    operator: Operator, server: RedisServer, arguments: tuple[str, ...], told: str
) -> None:
    done = operator.stubs(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert told in done.stderr
    assert server.client.dbsize() == 0


async def test_a_stub_that_is_not_there_and_one_that_does_not_open_are_distinguished(
    operator: Operator, server: RedisServer
) -> None:
    stub = stub_of()
    done = operator.stubs("show", GATEWAY, stub.spi_r.hex())
    assert (done.returncode, done.stderr) == (1, f"ike-sa-sync: no stub {stub.index.key}\n")
    await operator.bank.store([stub])
    server.client.hset(stub.index.key, "sealed", "spoilt")
    done = operator.stubs("show", GATEWAY, stub.spi_r.hex(), "--json")
    assert (done.returncode, done.stdout) == (1, "")
    assert "cut: shorter than its envelope" in done.stderr
    assert f"{stub.index.key} does not open" in done.stderr
    await operator.bank.close()


def test_the_sidecars_own_redis_is_named_where_it_does_not_run(tmp_path: Path) -> None:
    generate(tmp_path / "bank.key")
    file = tmp_path / "gateway.yaml"
    file.write_text(f"bank: {{key_file: {tmp_path}/bank.key, runtime: {tmp_path}/redis}}\n")
    done = subprocess.run([*program(), "stubs", "list", "-c", str(file)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert "does the sidecar run?" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_bank_that_is_away_is_named_with_what_to_look_at(operator: Operator, server: RedisServer) -> None:
    server.stop()
    done = operator.stubs("list", "--json")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("ike-sa-sync: Redis: ")
    assert done.stderr.endswith("; is bank.url right, and the server up?\n")
