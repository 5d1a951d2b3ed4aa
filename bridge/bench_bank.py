"""`ike-sa-sync bench bank`: what a bank takes, in octets and in time, with a Redis of its own beside it."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Sequence
from typing import Any, Final

import click
import uvloop
from msgspec import Struct
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from bridge import cli
from bridge.bank.private import PrivateBank
from bridge.bank.writer import Writer
from bridge.ike.transforms import Suite
from bridge.seal import Keyring
from bridge.stub import Child, Endpoint, Identity, Index, Selector, Stub

BUNDLE: Final = 512
GETS: Final = 40_000
GET_BATCH: Final = 32
"""look-ups in one round trip: a gateway asks for all requests that wait"""
LIFETIME: Final = 14_400


class Figures(Struct):
    """What one run measured."""

    stubs: int
    octets_per_stub: float
    initiate_per_s: float
    get_per_s: float
    download_per_s: float


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
            Child(
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
                local_ts=(Selector(7, 0, 0, 65535, False, "10.10.0.0", "10.10.255.255"),),
                remote_ts=(Selector(7, 0, 0, 65535, True, vip, vip),),
                initiator=False,
            ),
        ),
        established=now,
        rekey_at=now + LIFETIME - 1440,
        reauth_at=0,
        expires=now + LIFETIME,
        revision=now * 1000,
    )


async def measure(count: int, directory: str, progress: Progress) -> Figures:
    """Fill an empty bank with `count` stubs of one gateway, look up, download."""
    gateway = "192.0.2.1"
    keyring = Keyring({os.urandom(4): os.urandom(32)})
    bank = PrivateBank(directory, keyring, get_timeout=10.0)
    await bank.start()
    try:
        empty = await _memory(bank)
        indexes, seconds = await _initiate(bank, count, gateway, progress)
        octets = (await _memory(bank) - empty) / count
        gets = await _get(bank, indexes, progress)
        downloads = await _download(bank, gateway, count, progress)
    finally:
        await bank.close()
    return Figures(count, round(octets, 1), round(count / seconds), round(gets), round(downloads))


async def _memory(bank: PrivateBank) -> int:
    return int((await bank.info())["used_memory"])


async def _initiate(bank: PrivateBank, count: int, gateway: str, progress: Progress) -> tuple[Sequence[Index], float]:
    """Through the writer, as a gateway does; making the stubs is not counted."""
    task = progress.add_task(f"Initiate, {count:,} stubs", total=count)
    writer, indexes, seconds = Writer(bank), [], 0.0
    now = int(time.time())
    for first in range(0, count, 20 * BUNDLE):
        stubs = [make_stub(number, gateway, now) for number in range(first, min(first + 20 * BUNDLE, count))]
        indexes += [stub.index for stub in stubs]
        began = time.perf_counter()
        for stub in stubs:
            writer.submit(stub)
        await writer.flush()
        seconds += time.perf_counter() - began
        progress.update(task, completed=len(indexes))
    await writer.close()
    if writer.counters.stored != count:
        raise RuntimeError(f"{writer.counters.stored} of {count} stubs were stored")
    return indexes, seconds


async def _get(bank: PrivateBank, indexes: Sequence[Index], progress: Progress) -> float:
    task = progress.add_task("GET", total=GETS)
    began = time.perf_counter()
    for first in range(0, GETS, GET_BATCH):
        wanted = [indexes[(first + n) * 7919 % len(indexes)] for n in range(GET_BATCH)]
        if None in await bank.get(wanted):
            raise RuntimeError("a stored stub was not found")
        progress.update(task, completed=first + GET_BATCH)
    return GETS / (time.perf_counter() - began)


async def _download(bank: PrivateBank, gateway: str, count: int, progress: Progress) -> float:
    task = progress.add_task("Download", total=count)
    began, came = time.perf_counter(), 0
    async for stubs in bank.download(gateway):
        came += len(stubs)
        progress.update(task, completed=came)
    if came != count:
        raise RuntimeError(f"{came} of {count} stubs came")
    return count / (time.perf_counter() - began)


@click.command("bank")
@click.option("--stubs", "counts", multiple=True, type=click.IntRange(1), default=(100_000,), show_default=True)
@cli.json_option
def bench_bank(counts: tuple[int, ...], as_json: bool) -> None:
    """Measure the bank: octets a stub, Initiate, GET and Download a second, in one process.

    Starts a Redis of its own with the shipped redis.conf. --stubs may be given several times, to compare sizes.
    """
    figures = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), disable=as_json) as progress:
        for count in counts:
            with tempfile.TemporaryDirectory(prefix="ike-sa-sync-bench-") as directory:
                figures.append(uvloop.run(measure(count, directory, progress)))
    rows: list[dict[str, Any]] = [{name: getattr(each, name) for name in each.__struct_fields__} for each in figures]
    if as_json:
        cli.print_json(rows)
        return
    table = cli.table("stubs", "octets a stub", "Initiate/s", "GET/s", "Download/s")
    for row in rows:
        table.add_row(*(f"{value:,}" for value in row.values()))
    cli.show(table)
