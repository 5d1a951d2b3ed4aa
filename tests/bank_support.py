"""Stubs to store, and real redis-servers to store them in."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

import redis
from bridge.bank.interface import Ending, StubBank
from bridge.ike.transforms import Suite
from bridge.service import shipped_files
from bridge.stub.keyring import Keyring
from bridge.stub.readable import Readable
from bridge.stub.stub import Index, Stub
from bridge.stub.types import ChildSa, Endpoint, Identity, TrafficSelector

GATEWAY = "192.0.2.1"
PATIENCE = 20.0


PASSWORD = "secret"
ADMIN = f"user admin on >{PASSWORD} ~* &* +@all\n"


def shipped_users(file: Path) -> tuple[str, ...]:
    """Writes the shipped users, each with PASSWORD, and an administrator for the tests; the settings that name them."""
    users = shipped_files.path("redis/users.acl").read_text().splitlines()
    lines = [f"{line} >{PASSWORD}\n" if line.startswith("user ") else f"{line}\n" for line in users]
    file.write_text("".join([*lines, ADMIN]))
    return ("--aclfile", str(file))


def keyring() -> Keyring:
    """One random key."""
    return Keyring({os.urandom(4): os.urandom(32)})


def stub_of(spi: bytes | None = None, *, gateway: str = GATEWAY, revision: int = 1, lifetime: int = 3600) -> Stub:
    """A stub as a gateway makes it, with one CHILD_SA and a virtual IP."""
    spi_r = spi or os.urandom(8)
    client = Endpoint("198.51.100.7", 4500)
    now = int(time.time())
    return Stub(
        index=Index(gateway, spi_r),
        spi_i=os.urandom(8),
        spi_r=spi_r,
        initiator=False,
        local_id=Identity(2, b"gw1.example"),
        remote_id=Identity(3, b"client@example"),
        eap_id=None,
        suite=Suite(encr=12, encr_len=128, integ=12, prf=5, group=31),
        sk_d=os.urandom(32),
        shared_secret=os.urandom(32),
        local=Endpoint(gateway, 4500),
        remote=client,
        connection="home",
        local_vips=(),
        remote_vips=("10.20.0.7",),
        conditions=(0x01,),
        extensions=(0x1FF,),
        peer_addresses=(client,),
        children=(
            ChildSa(
                name="net",
                mode=2,
                ipcomp=0,
                encr=12,
                encr_len=128,
                integ=12,
                esn=0,
                groups=(),
                spi_in=0xC0010203,
                spi_out=0xC0040506,
                local_ts=(TrafficSelector(7, 0, 0, 65535, False, "10.10.0.0", "10.10.255.255"),),
                remote_ts=(TrafficSelector(7, 0, 0, 65535, True, "10.20.0.7", "10.20.0.7"),),
                initiator=False,
            ),
        ),
        established=now,
        rekey_at=now + lifetime - 60,
        reauth_at=0,
        expires=now + lifetime,
        revision=revision,
    )


def ending(stub: Stub) -> Ending:
    """The end of a stub's session."""
    return Ending(stub.index, stub.expires)


def revised(stub: Stub, revision: int) -> Stub:
    """The same stub at another revision."""
    return msgspec.structs.replace(stub, revision=revision)


class RedisServer:
    """A redis-server with the shipped redis.conf and other `settings`, its data kept across restarts.

    It listens on a Unix socket; on TCP only where `settings` give it a port.
    """

    def __init__(
        self,
        directory: Path,
        *settings: str,
        program: Sequence[str] = ("redis-server",),
        conf: Path | None = None,
        **login: str,
    ) -> None:
        self.directory = directory
        self.socket = directory / "redis.sock"
        # a copy: Redis rewrites the file that it was started with when Sentinel changes its role
        own = directory / "redis.conf"
        directory.mkdir(exist_ok=True, parents=True)
        own.write_text((conf or shipped_files.path("redis/redis.conf")).read_text())
        self._command = [
            *(*program, str(own), "--port", "0"),
            *("--unixsocket", str(self.socket), "--dir", str(directory), "--logfile", str(directory / "redis.log")),
            *settings,
        ]
        self._login = login
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> RedisServer:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    @property
    def url(self) -> str:
        return f"unix://{self.socket}"

    @property
    def client(self) -> Any:
        """A client for looking at it and tampering with it; untyped, since redis-py leaves open what replies are."""
        login: dict[str, Any] = dict(self._login)
        return redis.Redis(unix_socket_path=str(self.socket), **login)

    def start(self) -> None:
        """Start it and wait until it serves."""
        self._process = subprocess.Popen(self._command)
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                self.client.ping()
            except redis.RedisError:
                if time.monotonic() > deadline or self._process.poll() is not None:
                    self.kill()
                    raise AssertionError((self.directory / "redis.log").read_text()[-500:]) from None
                time.sleep(0.02)
            else:
                return

    def kill(self) -> None:
        """SIGKILL: whatever is not on disk or in the page cache is gone."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        """An orderly end."""
        self._end(signal.SIGTERM)

    @property
    def running(self) -> bool:
        """Whether it was started and not killed."""
        return self._process is not None

    def freeze(self) -> None:
        """Keep it from answering, its connections open."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Let it answer again."""
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def _end(self, number: int) -> None:
        if self._process is not None:
            self._process.send_signal(signal.SIGCONT)
            self._process.send_signal(number)
            self._process.wait(PATIENCE)
            self._process = None


async def downloaded(bank: StubBank, gateway: str = GATEWAY, batch: int = 256) -> list[Stub]:
    """All that a download brings."""
    return [stub async for bundle in bank.download(gateway, batch) for stub in bundle]


async def listed(bank: StubBank, gateway: str | None = None) -> list[Readable]:
    """All that a list brings."""
    return [row async for rows in bank.list(gateway) for row in rows]
