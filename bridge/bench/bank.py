"""`ike-sa-sync bench bank`: what a bank takes, in octets and in time, with a Redis of its own beside it."""

from __future__ import annotations

import math
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from typing import Any, Final

import uvloop

from bridge.bank.private_redis import PrivateBank
from bridge.bank.write_queue import WriteQueue
from bridge.bench.plot import bars
from bridge.bench.usage import Meter
from bridge.ike.transforms import Suite
from bridge.service import log as logging
from bridge.service.process import spare_collections
from bridge.stub.keyring import Keyring
from bridge.stub.stub import Index, Stub
from bridge.stub.types import ChildSa, Endpoint, Identity, TrafficSelector

GATEWAY_STUBS: Final = 100_000
"""stubs of one gateway, by default: a larger bank is that of more gateways"""
GATEWAYS_MAX: Final = 254
"""gateways that `address` has addresses for"""
CHUNK: Final = 10_240
"""stubs that are made before they are handed over: making them is not measured"""
GETS: Final = 40_000
"""look-ups at most; of a small bank, four times each stub"""
GET_BATCH: Final = 32
"""look-ups in one round trip: a gateway asks for all requests that wait"""
LIFETIME: Final = 14_400
STEPS: Final = ("Initiate", "GET", "Download")

Progress = Callable[[str, float], None]
"""gets what goes on, and which share of it is done"""


def make_stub(number: int, gateway: str, now: int) -> Stub:
    """A stub as a gateway makes it, with one CHILD_SA and a virtual IP."""
    spi_r = os.urandom(8)
    vip = f"10.{number >> 16 & 255}.{number >> 8 & 255}.{number & 255}"
    client = Endpoint(f"100.{number >> 16 & 255}.{number >> 8 & 255}.{number & 255}", 4500)
    spis = os.urandom(8)
    return Stub(
        index=Index(gateway, spi_r),
        spi_i=os.urandom(8),
        spi_r=spi_r,
        initiator=False,
        local_id=Identity(2, b"vpn.example.org"),
        remote_id=Identity(3, b"client%d@example.org" % number),
        eap_id=None,
        suite=Suite(encr=12, encr_len=128, integ=12, prf=5, group=31),
        sk_d=os.urandom(32),
        shared_secret=os.urandom(32),
        local=Endpoint(gateway, 4500),
        remote=client,
        connection="home",
        local_vips=(),
        remote_vips=(vip,),
        conditions=(0x43,),
        extensions=(0x1FF,),
        peer_addresses=(client,),
        children=(
            ChildSa(
                name="net",
                mode=2,
                ipcomp=0,
                encr=20,
                encr_len=128,
                integ=0,
                esn=0,
                groups=(),
                spi_in=int.from_bytes(spis[:4], "big"),
                spi_out=int.from_bytes(spis[4:], "big"),
                local_ts=(TrafficSelector(7, 0, 0, 65535, False, "10.10.0.0", "10.10.255.255"),),
                remote_ts=(TrafficSelector(7, 0, 0, 65535, True, vip, vip),),
                initiator=False,
            ),
        ),
        established=now,
        rekey_at=now + LIFETIME - 1440,
        reauth_at=0,
        expires=now + LIFETIME,
        revision=now * 1000,
    )


class Clock:
    """Time and CPU of this process and of Redis, of what is done within `running`."""

    def __init__(self, redis: int) -> None:
        self._meter = Meter({"sidecar": os.getpid(), "redis": redis})
        self._seconds = 0.0
        self._cpu = dict.fromkeys(self._meter.pids, 0.0)

    @contextmanager
    def running(self) -> Any:
        """Measure the body."""
        self._meter.restart()
        began = time.perf_counter()
        yield
        self._seconds += time.perf_counter() - began
        for name, used in self._meter.read().items():
            self._cpu[name] += used["cpu_s"]

    def of(self, count: int) -> dict[str, Any]:
        """What each of `count` took."""
        return {
            "per_s": round(count / self._seconds),
            "cpu_us": {name: round(seconds / count * 1e6, 1) for name, seconds in self._cpu.items()},
        }


def address(gateway: int) -> str:
    """The address of a gateway, counted from 0."""
    return f"192.0.2.{gateway + 1}"


def gateways_of(count: int, gateways: int | None) -> int:
    """How many gateways `count` stubs are of; None: one for each GATEWAY_STUBS."""
    return gateways or min(math.ceil(count / GATEWAY_STUBS), GATEWAYS_MAX)


def fill(counts: Sequence[int], gateways: int | None, progress: Progress) -> dict[str, Any]:
    """Fill an empty bank with so many stubs, look up, download; for each of `counts`.

    They belong to so many `gateways`, an equal share to each; None: see `gateways_of`.
    """
    # a busy machine is no reason for warnings between the lines of the table
    logging.configure("error", "logfmt")
    rows = []
    for count in counts:
        with tempfile.TemporaryDirectory(prefix="ike-sa-sync-bench-") as directory:
            rows.append(uvloop.run(_measure(count, gateways_of(count, gateways), directory, progress)))
    return {"rows": rows}


async def _measure(count: int, gateways: int, directory: str, progress: Progress) -> dict[str, Any]:
    bank = PrivateBank(directory, Keyring({os.urandom(4): os.urandom(32)}), get_timeout=60.0)
    await bank.start()
    try:
        info = await bank.info()
        pid, empty = int(info["process_id"]), int(info["used_memory"])
        row: dict[str, Any] = {"stubs": count, "gateways": gateways}
        indexes, row["Initiate"] = await _initiate(bank, count, gateways, Clock(pid), progress)
        # as a sidecar; and this benchmark's own list of what it made costs no operation anything
        spare_collections()
        row["octets_per_stub"] = round((int((await bank.info())["used_memory"]) - empty) / count, 1)
        row["GET"] = await _get(bank, indexes, Clock(pid), progress)
        row["Download"] = await _download(bank, count, gateways, Clock(pid), progress)
    finally:
        await bank.close()
    return row


async def _initiate(
    bank: PrivateBank, count: int, gateways: int, clock: Clock, progress: Progress
) -> tuple[list[Index], dict[str, Any]]:
    """Through the writer, as a gateway does; one gateway after the other."""
    writer, indexes = WriteQueue(bank), []
    now = int(time.time())
    for first in range(0, count, CHUNK):
        numbers = range(first, min(first + CHUNK, count))
        stubs = [make_stub(number, address(number * gateways // count), now) for number in numbers]
        indexes += [stub.index for stub in stubs]
        with clock.running():
            for stub in stubs:
                writer.submit(stub)
            await writer.flush()
        progress(f"Initiate, {count:,} stubs", len(indexes) / count)
    await writer.close()
    if writer.counters.stored != count:
        raise RuntimeError(f"{writer.counters.stored} of {count} stubs were stored")
    return indexes, clock.of(count)


async def _get(bank: PrivateBank, indexes: Sequence[Index], clock: Clock, progress: Progress) -> dict[str, Any]:
    gets = min(GETS, 4 * len(indexes)) // GET_BATCH * GET_BATCH
    with clock.running():
        for first in range(0, gets, GET_BATCH):
            wanted = [indexes[(first + n) * 7919 % len(indexes)] for n in range(GET_BATCH)]
            if None in await bank.get(wanted):
                raise RuntimeError("a stored stub was not found")
            if first % 1024 == 0:
                progress("GET", first / gets)
    return clock.of(gets)


async def _download(bank: PrivateBank, count: int, gateways: int, clock: Clock, progress: Progress) -> dict[str, Any]:
    came = 0
    with clock.running():
        for gateway in range(gateways):
            async for stubs in bank.download(address(gateway)):
                came += len(stubs)
                progress("Download", came / count)
    if came != count:
        raise RuntimeError(f"{came} of {count} stubs came")
    return clock.of(count)


def _whose(row: dict[str, Any]) -> str:
    """Whose stubs they were; one gateway's where nothing is said of more."""
    gateways = row.get("gateways", 1)
    return f" of {gateways} gateways" if gateways > 1 else ""


def section(result: dict[str, Any]) -> tuple[str, str]:
    """Text and plot for docs/performance.md."""
    rows = result["rows"]
    lines = ["| stubs | octets each | | per second | CPU each, sidecar, µs | Redis, µs |", "|---|---|---|---|---|---|"]
    for row in rows:
        for step in STEPS:
            first = (
                [f"{row['stubs']:,}{_whose(row)}", f"{row['octets_per_stub']:.0f}"] if step == STEPS[0] else ["", ""]
            )
            cpu = row[step]["cpu_us"]
            cells = [*first, step, f"{row[step]['per_s']:,}", str(cpu["sidecar"]), str(cpu["redis"])]
            lines.append("| " + " | ".join(cells) + " |")
    text = (
        "## The bank\n\nOne process with a Redis of its own beside it and the shipped redis.conf, every bundle on disk "
        f"before it is confirmed. Stubs have one CHILD_SA and a virtual IP; look-ups go {GET_BATCH} at a time.\n\n"
        + "\n".join(lines)
        + "\n\nSidecar and Redis work at the same time: with a core for each, the larger of both CPU times sets the "
        "rate.\n\n![the bank](bench/bank.svg)\n"
    )
    plot = bars(
        "The bank: CPU per stub",
        "µs",
        [
            (
                f"{step}, {row['stubs']:,} stubs{_whose(row)}",
                [row[step]["cpu_us"]["sidecar"], row[step]["cpu_us"]["redis"]],
            )
            for row in rows
            for step in STEPS
        ],
        ["sidecar", "redis"],
    )
    return text, plot
