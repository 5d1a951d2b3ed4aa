"""Events of sessions (bridge.gateway.session_hooks) and the program that gets them, without a lab."""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import msgspec
import pytest

from bank_support import GATEWAY, stub_of
from bridge.charon.ike_sa import IkeSa, sa_of
from bridge.charon.sa_listener import Listeners
from bridge.charon.sa_tracker import SaTracker
from bridge.charon.vici_types import ChildInfo, Event, SaInfo
from bridge.check import host
from bridge.config import GatewayConfig, HooksConfig
from bridge.gateway import hook_program, hook_session, previous_gateways, session_hooks, session_journal
from bridge.gateway.hook_program import Call, HookProgram
from bridge.gateway.hook_session import Octets
from bridge.gateway.metrics import GatewayMetrics
from bridge.gateway.previous_gateways import PreviousGateways
from bridge.gateway.session_hooks import SessionHooks
from bridge.gateway.session_journal import SessionJournal
from bridge.stub.codec import decode, encode
from bridge.stub.derivation import Derivation
from bridge.stub.stub import Stub, StubError

HERE = "192.0.2.2"
SHARED = "192.0.2.10"


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    """What a program was told, one event a line; the program is beside it."""
    return tmp_path / "notes"


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_hooks, "SETTLE_SECONDS", 0.1)
    monkeypatch.setattr(session_hooks, "END_SECONDS", 0.1)
    monkeypatch.setattr(previous_gateways, "WATCH_EACH", 0.02)


def program(notes: Path, script: str = "cat >>$NOTES") -> str:
    """A program that does this."""
    path = notes.parent / "program"
    path.write_text(f"#!/bin/sh\nNOTES={notes}\n{script}\n")
    path.chmod(0o755)
    return str(path)


class Gateway:
    """A gateway's sessions, and its SessionHooks."""

    def __init__(
        self, notes: Path, script: str = "cat >>$NOTES", timeout: float = 10.0, state: str | None = None
    ) -> None:
        self.notes = notes
        self.now = 0.0
        self.failed: set[str] = set()
        self.beats: dict[str, float] = {}
        self.metrics = GatewayMetrics()
        self.tracker = SaTracker(Listeners(), wall=lambda: 1000.0, clock=lambda: self.now)
        config = HooksConfig(session=program(notes, script), timeout=timeout)
        previous = PreviousGateways(self.failed.__contains__, self.beats)
        self.hooks = SessionHooks(config, self.tracker, self.metrics, HERE, previous, state)

    def handshake(self, stub: Stub | None = None) -> IkeSa:
        """An IKE_SA comes up."""
        sa = sa_of(stub or stub_of(gateway=HERE))
        self.tracker.sas[sa.id.spis] = sa
        self.tracker.virtual_ips.put(sa.id.spis, sa.remote_vips, self.now)
        self.hooks.changed(sa)
        return sa

    def rekey(self, old: IkeSa) -> IkeSa:
        """The successor of an IKE_SA."""
        sa = sa_of(stub_of(gateway=HERE))
        sa.first_spi = old.first_spi
        self.tracker.sas[sa.id.spis] = sa
        self.hooks.changed(sa)
        return sa

    def end(self, sa: IkeSa) -> None:
        """An IKE_SA ends."""
        del self.tracker.sas[sa.id.spis]
        self.tracker.virtual_ips.drop(sa.id.spis)
        self.hooks.gone(sa)

    def events(self) -> list[dict[str, Any]]:
        return self.events_in(self.notes)

    @staticmethod
    def events_in(notes: Path) -> list[dict[str, Any]]:
        text = notes.read_text() if notes.exists() else ""
        return [json.loads(line) for line in text.splitlines()]

    def told(self) -> list[tuple[str, str]]:
        return [(event["event"], event["session"]) for event in self.events()]


def run(work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(work())


def name(sa: IkeSa) -> str:
    return f"{HERE}/{sa.local_spi.hex()}"


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 - what a program wrote
            await asyncio.sleep(0.01)


def info_of(sa: IkeSa, *figures: tuple[int, int, int]) -> SaInfo:
    """What VICI says of an SA whose CHILD_SAs have these SPIs and octets."""
    assert sa.local is not None
    assert sa.remote is not None
    children = tuple(ChildInfo("net", "INSTALLED", spi, 0, 0, into, out) for spi, into, out in figures)
    ends = (sa.local, sa.remote, (), ())
    return SaInfo(
        "home", sa.id.spi_i, sa.id.spi_r, False, 2, "ESTABLISHED", *ends, 0, None, None, children, "", "", ""
    )  # fmt: skip


def test_a_session_begins_and_ends_once_whatever_its_ike_sa_does(notes: Path) -> None:
    async def work() -> None:
        gateway = Gateway(notes)
        first = gateway.handshake()
        gateway.hooks.changed(first)
        await until(lambda: len(gateway.events()) == 1)
        second = gateway.rekey(first)
        gateway.end(first)
        third = gateway.rekey(second)
        gateway.end(second)
        await asyncio.sleep(0.3)
        gateway.end(third)
        await until(lambda: len(gateway.events()) == 2)
        await gateway.hooks.close()
        assert gateway.told() == [("established", name(first)), ("ended", name(first))]
        assert gateway.events()[1]["spi_r"] == third.id.spi_r.hex()

    run(work)


def test_a_session_that_ends_while_it_begins_ends_after_it_began(notes: Path) -> None:
    async def work() -> None:
        gateway = Gateway(notes)
        sa = gateway.handshake()
        gateway.end(sa)
        await until(lambda: len(gateway.events()) == 2)
        assert [event for event, _ in gateway.told()] == ["established", "ended"]

    run(work)


def test_what_was_removed_before_it_was_confirmed_is_no_session(notes: Path) -> None:
    async def work() -> None:
        gateway = Gateway(notes)
        sa = sa_of(stub_of(gateway=HERE))
        sa.up, sa.adopted = False, True
        gateway.hooks.gone(sa)
        await gateway.hooks.close()
        assert gateway.events() == []

    run(work)


def test_sessions_from_before_the_start_end_with_the_name_that_their_stub_has(notes: Path) -> None:
    async def work() -> None:
        gateway = Gateway(notes)
        stub = msgspec.structs.replace(stub_of(gateway=HERE), session_spi=b"original")
        sa = sa_of(stub)
        sa.adopted = True
        gateway.hooks.known(sa)
        gateway.hooks.changed(sa)
        gateway.tracker.sas[sa.id.spis] = sa
        gateway.end(sa)
        await until(lambda: len(gateway.events()) == 1)
        assert gateway.told() == [("ended", f"{HERE}/{b'original'.hex()}")]

    run(work)


@pytest.mark.parametrize(("fails", "beats"), [(False, False), (False, True), (True, False), (True, True)])
def test_the_end_at_a_previous_gateway_is_reported_here_only_if_that_had_failed(
    notes: Path, fails: bool, beats: bool
) -> None:
    async def work() -> None:
        gateway = Gateway(notes)
        old = msgspec.structs.replace(stub_of(gateway=GATEWAY), session_spi=b"original")
        sa = sa_of(stub_of(gateway=HERE))
        sa.adopted = True
        gateway.tracker.sas[sa.id.spis] = sa
        gateway.tracker.virtual_ips.put(sa.id.spis, sa.remote_vips, 0.0)
        gateway.hooks.resumed(sa, old)
        if beats:
            # it lived when the session left it, whatever comes then
            gateway.beats[GATEWAY] = time.monotonic() + 1
        if fails:
            gateway.failed.add(GATEWAY)
        before = f"{GATEWAY}/{b'original'.hex()}"
        wanted = [("resumed-here", name(sa)), *([("ended", before)] if fails and not beats else [])]
        await until(lambda: len(gateway.events()) == len(wanted))
        await asyncio.sleep(0.1)
        assert gateway.told() == wanted
        assert gateway.events()[0]["previous"] == {"gateway": GATEWAY, "session": before}
        if fails and not beats:
            over = gateway.events()[1]
            assert (over["reason"], over["virtual_ips_in_use"]) == ("gateway-failed", list(old.remote_vips))
        await gateway.hooks.close()

    run(work)


def test_an_address_that_another_session_has_by_then_is_in_use(notes: Path) -> None:
    async def work() -> None:
        gateway = Gateway(notes)
        first = gateway.handshake()
        await until(lambda: len(gateway.events()) == 1)
        gateway.end(first)
        gateway.handshake()
        await until(lambda: len(gateway.events()) == 3)
        over = next(event for event in gateway.events() if event["event"] == "ended")
        assert over["virtual_ips_in_use"] == over["virtual_ips"] == list(first.remote_vips)

    run(work)


def test_octets_are_those_of_all_child_sas_that_the_session_had() -> None:
    octets = Octets()
    sa = sa_of(stub_of(gateway=HERE))
    octets.put(info_of(sa, (1, 100, 10)))
    octets.put(info_of(sa, (1, 150, 15), (2, 1, 2)))
    octets.put(info_of(sa, (2, 50, 5)))
    # as of an earlier time
    octets.put(info_of(sa, (2, 40, 4)))
    assert octets.both == (200, 20)
    for spi in range(3, 3 + hook_session.CHILDREN_MAX):
        octets.put(info_of(sa, (spi, 1, 1)))
    assert octets.both == (200 + hook_session.CHILDREN_MAX, 20 + hook_session.CHILDREN_MAX)


@pytest.mark.parametrize("late", [False, True], ids=["with-its-ike-sa", "later"])
@pytest.mark.parametrize("gone_first", [True, False], ids=["ha-first", "vici-first"])
def test_the_end_has_the_figures_that_vici_reports_last(notes: Path, *, gone_first: bool, late: bool) -> None:
    """charon reports the end of an IKE_SA without CHILD_SAs, then those of its CHILD_SAs, one by one."""

    async def work() -> None:
        gateway = Gateway(notes)
        sa = gateway.handshake()
        await until(lambda: len(gateway.events()) == 1)
        [child] = sa.children
        gateway.hooks._told(info_of(sa, (child.spi_in, 0, 0)))
        if gone_first:
            gateway.end(sa)
        gateway.hooks.down(info_of(sa))
        if not gone_first:
            gateway.end(sa)
        if late:
            # an updown script runs meanwhile
            await asyncio.sleep(2 * session_hooks.END_SECONDS)
        assert len(gateway.events()) == 1
        gateway.tracker.event(Event("child-updown", info_of(sa, (child.spi_in, 1234, 99)), up=False))
        await until(lambda: len(gateway.events()) == 2)
        assert (gateway.events()[1]["octets_in"], gateway.events()[1]["octets_out"]) == (1234, 99)

    run(work)


def test_a_child_sa_that_charon_does_not_report_does_not_keep_the_end_back(
    notes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session_hooks, "COUNT_SECONDS", 0.1)

    async def work() -> None:
        gateway = Gateway(notes)
        sa = gateway.handshake()
        gateway.end(sa)
        gateway.hooks.down(info_of(sa))
        await until(lambda: len(gateway.events()) == 2)
        assert [event for event, _ in gateway.told()] == ["established", "ended"]

    run(work)


def test_without_a_program_nothing_happens(tmp_path: Path) -> None:
    async def work() -> None:
        tracker = SaTracker(Listeners(), wall=lambda: 1000.0, clock=lambda: 0.0)
        hooks = SessionHooks(HooksConfig(), tracker, GatewayMetrics(), HERE, PreviousGateways(lambda _: True, {}), None)
        sa = sa_of(stub_of(gateway=HERE))
        hooks.changed(sa)
        hooks.resumed(sa, stub_of())
        hooks.moving_away(sa, HERE)
        hooks.gone(sa)
        hooks.known(sa)
        assert (hooks.status(), len(hooks), sa.first_spi, tracker.on_info) == (None, 0, b"", [])
        await hooks.close()

    run(work)


def test_the_stub_has_the_name_of_a_rekeyed_session_and_no_other() -> None:
    stub = stub_of()
    assert encode(stub)[0] == 1
    named = msgspec.structs.replace(stub, session_spi=b"original")
    assert encode(named)[0] == 2
    assert decode(encode(named)) == named
    with pytest.raises(StubError):
        decode(encode(msgspec.structs.replace(stub, session_spi=b"short")))
    sa = sa_of(stub)
    sa.first_spi = sa.local_spi
    assert sa.stub(stub.index, with_secret=True, expires=stub.expires).session_spi == b""
    sa.first_spi = b"original"
    assert sa.stub(stub.index, with_secret=True, expires=stub.expires).session_spi == b"original"


# the program


def test_events_of_one_key_are_handed_over_in_order_and_those_of_others_meanwhile(notes: Path) -> None:
    async def work() -> None:
        called = HookProgram(program(notes, "read -r line; sleep 0.2; echo $line >>$NOTES"), 10, GatewayMetrics())
        for number in range(3):
            called.call("one", Call("established", lambda number=number: {"number": number}))  # type: ignore[misc]
        for other in range(4):
            called.call(f"other {other}", Call("established", lambda: {"number": 9}))
        began = asyncio.get_running_loop().time()
        await until(lambda: not len(called))
        # seven calls of 0.2 s
        assert asyncio.get_running_loop().time() - began < 1.3
        numbers = [json.loads(line)["number"] for line in notes.read_text().splitlines()]
        assert [number for number in numbers if number != 9] == [0, 1, 2]

    run(work)


@pytest.mark.parametrize(
    ("script", "kind"),
    [
        ("exit 3", "status"),
        ("sleep 100", "timeout"),
        ("sleep 100 & wait", "timeout"),
        ("trap '' TERM; while :; do :; done", "timeout"),
        (None, "not-started"),
    ],
)
def test_a_program_that_fails_is_counted_and_the_next_event_comes(notes: Path, script: str | None, kind: str) -> None:
    async def work() -> None:
        metrics = GatewayMetrics()
        path = program(notes, script) if script is not None else str(notes / "missing")
        called = HookProgram(path, 0.2, metrics)
        for _ in range(2):
            called.call("one", Call("established", lambda: {"session": "this", "time": 1.0}))
        await until(lambda: not len(called))
        assert metrics.values()[f"hook_failures_total[{kind}]"] == 2
        assert called.last_failure is not None
        assert called.last_failure["session"] == "this"

    run(work)


def test_a_program_that_writes_much_and_reads_nothing_does_not_wait(notes: Path) -> None:
    async def work() -> None:
        metrics = GatewayMetrics()
        called = HookProgram(program(notes, "head -c 1000000 /dev/zero; exit 1"), 5, metrics)
        called.call("one", Call("established", lambda: {"much": "x" * 200_000}))
        await until(lambda: not len(called))
        assert metrics.values()["hook_failures_total[status]"] == 1

    run(work)


def test_a_program_leaves_others_running_that_keep_its_output(notes: Path) -> None:
    async def work() -> None:
        metrics = GatewayMetrics()
        called = HookProgram(program(notes, "sleep 3 & exit 0"), 1, metrics)
        called.call("one", Call("established", dict))
        await until(lambda: not len(called))
        assert "hook_failures_total[timeout]" not in metrics.values()

    run(work)


def test_events_beyond_the_limit_are_dropped_and_counted(notes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def work() -> None:
        monkeypatch.setattr(hook_program, "PENDING_MAX", 2)
        metrics = GatewayMetrics()
        called = HookProgram(program(notes), 5, metrics)
        for _ in range(3):
            called.call("one", Call("established", dict))
        await until(lambda: not len(called))
        assert metrics.values()["hook_failures_total[dropped]"] == 1
        assert len(notes.read_text().splitlines()) == 2

    run(work)


def test_the_event_loop_goes_on_while_programs_run(notes: Path) -> None:
    async def work() -> None:
        called = HookProgram(program(notes, "sleep 0.5"), 5, GatewayMetrics())
        for number in range(20):
            called.call(str(number), Call("established", dict))
        longest, last = 0.0, asyncio.get_running_loop().time()
        while len(called):
            await asyncio.sleep(0.005)
            now = asyncio.get_running_loop().time()
            longest, last = max(longest, now - last), now
        assert longest < 0.4

    run(work)


def test_the_environment_of_the_sidecar_is_not_handed_on(notes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", "/run/secret")

    async def work() -> None:
        called = HookProgram(program(notes, "env >$NOTES; ls -l /proc/$$/fd | wc -l >>$NOTES"), 5, GatewayMetrics())
        called.call("one", Call("established", dict))
        await until(lambda: not len(called))
        assert "NOTIFY_SOCKET" not in notes.read_text()

    run(work)


@pytest.mark.skipif(os.geteuid() != 0, reason="files of root")
def test_check_finds_a_program_that_cannot_run_or_that_others_may_change(tmp_path: Path) -> None:
    def grade() -> str:
        [finding] = host.hooks(GatewayConfig(hooks=HooksConfig(session=str(path))))
        return str(finding.grade)

    path = tmp_path / "program"
    assert host.hooks(GatewayConfig()) == []
    assert grade() == "fail"
    path.write_text("#!/bin/sh\n")
    assert grade() == "fail"
    path.chmod(0o755)
    assert grade() == "ok"
    path.chmod(0o757)
    assert grade() == "fail"
    path.chmod(0o755)
    os.chown(tmp_path, 1, 1)
    assert grade() == "fail"


# the journal


def restarted(
    notes: Path,
    first: Callable[[Gateway], Coroutine[Any, Any, None]],
    *kept: IkeSa,
    killed: bool = False,
    script: str = "cat >>$NOTES",
) -> list[dict[str, Any]]:
    """The events after `first`, of a sidecar that finds these IKE_SAs in charon when it starts again. `script` is the
    program until then."""
    state = str(notes.parent)

    async def before() -> None:
        gateway = Gateway(notes, script, state=state)
        await first(gateway)
        if not killed:
            await gateway.hooks.close()

    async def after() -> None:
        gateway = Gateway(notes, state=state)
        for sa in kept:
            sa.adopted = True
            gateway.tracker.sas[sa.id.spis] = sa
            gateway.hooks.known(sa)
        reconciled = asyncio.Event()
        reconciled.set()
        work = asyncio.create_task(gateway.hooks.run(reconciled))
        await asyncio.sleep(0.2)
        await until(lambda: not len(gateway.hooks))
        work.cancel()
        await gateway.hooks.close()

    run(before)
    seen = len(Gateway.events_in(notes))
    run(after)
    return Gateway.events_in(notes)[seen:]


def test_a_session_that_ended_while_no_sidecar_ran_ends_when_it_is_back(notes: Path) -> None:
    sas: list[IkeSa] = []

    async def first(gateway: Gateway) -> None:
        sas.append(gateway.handshake())
        await until(lambda: len(gateway.events()) == 1)

    [over] = restarted(notes, first)
    assert (over["event"], over["session"], over["reason"]) == ("ended", name(sas[0]), "sidecar-was-away")
    assert (over["virtual_ips"], over["octets_in"]) == (list(sas[0].remote_vips), None)
    assert [child["name"] for child in over["children"]] == ["net"]
    # and only once
    assert restarted(notes, nothing) == []


async def nothing(_: Gateway) -> None:
    """No session."""


def test_a_sidecar_that_is_killed_knows_of_all_beginnings_that_the_program_was_told(notes: Path) -> None:
    sas: list[IkeSa] = []

    async def first(gateway: Gateway) -> None:
        sas.append(gateway.handshake())
        await until(lambda: len(gateway.events()) == 1)

    [over] = restarted(notes, first, killed=True)
    assert (over["event"], over["session"], over["reason"]) == ("ended", name(sas[0]), "sidecar-was-away")
    assert "told" not in over


def test_an_end_that_the_program_was_not_told_is_reported_by_the_next_sidecar(notes: Path) -> None:
    sas: list[IkeSa] = []

    async def first(gateway: Gateway) -> None:
        sas.append(gateway.handshake())
        await until(lambda: len(gateway.events()) == 1)
        gateway.end(sas[0])
        await until(lambda: (notes.parent / "ends").exists())
        await gateway.hooks._journal.write()

    script = f"event=$(cat); case $event in *ended*) >{notes.parent}/ends; exec sleep 100;; esac; echo $event >>$NOTES"
    [over] = restarted(notes, first, killed=True, script=script)
    assert (over["event"], over["session"], over["reason"]) == ("ended", name(sas[0]), "sidecar-was-away")
    # and only once
    assert restarted(notes, nothing) == []


@pytest.mark.parametrize("waits", [True, False])
def test_the_end_at_a_failed_gateway_is_reported_by_the_next_sidecar_if_the_program_had_not_run(
    notes: Path, *, waits: bool
) -> None:
    old = stub_of(gateway=GATEWAY)

    async def first(gateway: Gateway) -> None:
        sa = sa_of(stub_of(gateway=HERE))
        sa.adopted = True
        gateway.tracker.sas[sa.id.spis] = sa
        gateway.failed.add(GATEWAY)
        gateway.hooks.resumed(sa, old)
        await until(lambda: len(gateway.hooks) == (2 if waits else 1) and (notes.parent / "runs").exists())
        await gateway.hooks._journal.write()

    # of the same virtual IP: the end at the gateway before waits for the beginning here, or runs
    blocked = "*resumed-here*" if waits else "*gateway-failed*"
    script = (
        f"event=$(cat); case $event in {blocked}) >{notes.parent}/runs; exec sleep 100;; esac; echo $event >>$NOTES"
    )
    events = restarted(notes, first, killed=True, script=script)
    [over] = [event for event in events if event["gateway"] == GATEWAY]
    assert (over["event"], over["session"], over["reason"]) == ("ended", str(old.index), "gateway-failed")
    assert (over["virtual_ips"], over["octets_in"], over["to"]) == (list(old.remote_vips), None, None)
    assert [event["event"] for event in events if event["gateway"] == HERE] == ["ended"]
    # and only once
    assert restarted(notes, nothing) == []


def test_the_end_at_a_failed_gateway_that_the_program_took_is_not_reported_again(notes: Path) -> None:
    async def first(gateway: Gateway) -> None:
        sa = sa_of(stub_of(gateway=HERE))
        sa.adopted = True
        gateway.tracker.sas[sa.id.spis] = sa
        gateway.failed.add(GATEWAY)
        gateway.hooks.resumed(sa, stub_of(gateway=GATEWAY))
        await until(lambda: not len(gateway.hooks) and len(gateway.events()) == 2)
        await gateway.hooks._journal.write()

    assert {event["gateway"] for event in restarted(notes, first, killed=True)} == {HERE}


@pytest.mark.parametrize("rekeyed", [False, True])
def test_a_session_whose_virtual_ip_becomes_known_later_ends_after_it_began_and_leaves_nothing_open(
    notes: Path, *, rekeyed: bool
) -> None:
    async def first(gateway: Gateway) -> None:
        sa = gateway.handshake(msgspec.structs.replace(stub_of(gateway=HERE), remote_vips=()))
        # what came before it under its name
        held = asyncio.Event()

        async def before() -> None:
            await held.wait()

        assert gateway.hooks._program is not None
        gateway.hooks._program.call(name(sa), Call("earlier", lambda: {"event": "earlier", "session": ""}, before))
        await until(lambda: len(gateway.hooks) == 2)
        if rekeyed:
            old, sa = sa, gateway.rekey(sa)
            gateway.end(old)
        sa.remote_vips = ("10.20.0.9",)
        gateway.end(sa)
        await until(lambda: len(gateway.hooks) == 3 or bool(gateway.events()))
        held.set()
        await until(lambda: not len(gateway.hooks) and len(gateway.events()) == 3)
        assert [event for event, _ in gateway.told()] == ["earlier", "established", "ended"]
        assert gateway.events()[-1]["virtual_ips"] == ["10.20.0.9"]
        await gateway.hooks._journal.write()

    assert restarted(notes, first, killed=True) == []


@pytest.mark.parametrize("goes_on", [True, False])
def test_a_beginning_that_the_program_had_not_taken_is_reported_again_while_the_session_is_there(
    notes: Path, *, goes_on: bool
) -> None:
    sa = sa_of(stub_of(gateway=HERE))

    async def first(gateway: Gateway) -> None:
        gateway.tracker.sas[sa.id.spis] = sa
        gateway.hooks.changed(sa)
        await until(lambda: (notes.parent / "begins").exists())

    script = f">{notes.parent}/begins; exec sleep 100"
    [event] = restarted(notes, first, *([sa] if goes_on else []), killed=True, script=script)
    assert (event["event"], event["session"]) == ("established" if goes_on else "ended", name(sa))


def test_a_session_that_was_told_and_goes_on_is_not_reported_again_after_the_sidecar_was_killed(notes: Path) -> None:
    sa = sa_of(stub_of(gateway=HERE))

    async def first(gateway: Gateway) -> None:
        gateway.tracker.sas[sa.id.spis] = sa
        gateway.hooks.changed(sa)
        await until(lambda: not len(gateway.hooks) and bool(gateway.events()))
        await gateway.hooks._journal.write()

    assert restarted(notes, first, sa, killed=True) == []
    # and a journal that was written anew says the same
    assert restarted(notes, nothing, sa) == []


def test_a_session_that_goes_on_is_not_reported_again(notes: Path) -> None:
    sa = sa_of(stub_of(gateway=HERE))

    async def first(gateway: Gateway) -> None:
        gateway.tracker.sas[sa.id.spis] = sa
        gateway.hooks.changed(sa)
        await until(lambda: len(gateway.events()) == 1)

    assert restarted(notes, first, sa) == []


def test_a_program_that_is_new_is_told_of_the_sessions_that_are_there(notes: Path) -> None:
    sa = sa_of(stub_of(gateway=HERE))
    [begun] = restarted(notes, nothing, sa)
    assert (begun["event"], begun["session"]) == ("established", name(sa))


def test_a_journal_that_was_spoilt_ends_nothing_but_what_it_can_tell(notes: Path) -> None:
    line = json.dumps({"session": "a", "virtual_ips": ["10.0.0.1"], "gateway": HERE, "children": []})
    spoilt = ["{", "[]", "\xff", '{"session": 7}', '{"session": "b"}', '{"session": "c", "virtual_ips": 3}', line[:-9]]
    (notes.parent / "sessions").write_text("\n".join([*spoilt, line, ""]), encoding="latin-1")
    [over] = restarted(notes, nothing)
    assert (over["session"], over["virtual_ips"]) == ("a", ["10.0.0.1"])


def test_the_journal_stays_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_journal, "COMPACT_LINES", 10)

    async def work() -> None:
        journal = SessionJournal(tmp_path)
        for number in range(50):
            await journal.begin(str(number), {"session": str(number), "virtual_ips": []})
            if number >= 2:
                journal.ended(str(number))
            await journal.write()
        assert len((tmp_path / "sessions").read_text().splitlines()) <= 16
        assert [named for named, _ in SessionJournal(tmp_path).before()] == ["0", "1"]
        assert (tmp_path / "sessions").stat().st_mode & 0o777 == 0o600

    run(work)


def test_an_ike_sa_that_was_recovered_in_vain_and_is_reported_again_ends_its_session(notes: Path) -> None:
    async def work() -> None:
        gateway = Gateway(notes)
        stub = stub_of(gateway=HERE)
        gateway.hooks.known(sa_of(stub))
        sa = sa_of(stub)
        gateway.tracker.sas[sa.id.spis] = sa
        gateway.hooks.changed(sa)
        gateway.end(sa)
        await until(lambda: len(gateway.events()) == 1)
        assert gateway.told() == [("ended", name(sa))]

    run(work)


def at_a_shared_address(owner: str, epoch: int, **changes: Any) -> Stub:
    derivation = Derivation(b"i" * 32, b"r" * 32, b"s" * 32, b"", b"", 0, owner=owner, epoch=epoch)
    return msgspec.structs.replace(stub_of(gateway=SHARED), derivation=derivation, **changes)


def test_a_session_that_is_taken_over_has_a_name_at_each_gateway(notes: Path) -> None:
    async def work() -> None:
        gateway = Gateway(notes)
        old = at_a_shared_address(GATEWAY, 1, session_spi=b"original")
        sa = sa_of(msgspec.structs.replace(old, derivation=at_a_shared_address(HERE, 2).derivation))
        gateway.tracker.sas[sa.id.spis] = sa
        gateway.hooks.taken_over(sa, old)
        gateway.failed.add(GATEWAY)
        before = f"{GATEWAY}/{b'original'.hex()}"
        wanted = [("taken-over", name(sa)), ("ended", before)]
        await until(lambda: len(gateway.events()) == len(wanted))
        assert gateway.told() == wanted
        assert gateway.events()[0]["previous"] == {"gateway": GATEWAY, "session": before}
        await gateway.hooks.close()

    run(work)


def test_a_session_that_goes_and_comes_back_within_a_moment_ends_before_it_begins_again(notes: Path) -> None:
    async def work() -> None:
        gateway = Gateway(notes)
        first = gateway.handshake(at_a_shared_address(HERE, 1))
        await until(lambda: len(gateway.events()) == 1)
        gateway.hooks.moving_away(first, None)
        gateway.end(first)
        again = sa_of(at_a_shared_address(HERE, 3, spi_i=first.id.spi_i, spi_r=first.id.spi_r, initiator=False))
        assert again.id.spis == first.id.spis
        gateway.tracker.sas[again.id.spis] = again
        gateway.hooks.taken_over(again, at_a_shared_address(GATEWAY, 2))
        wanted = [("established", name(first)), ("moved-away", name(first)), ("taken-over", name(first))]
        await until(lambda: len(gateway.events()) == len(wanted))
        # as long as its end would have been waited for
        await asyncio.sleep(2 * session_hooks.END_SECONDS)
        assert gateway.told() == wanted
        gateway.end(again)
        await until(lambda: len(gateway.events()) == len(wanted) + 1)
        assert gateway.told()[-1] == ("ended", name(first))
        await gateway.hooks.close()

    run(work)


def test_the_beginning_of_a_session_that_is_over_at_once_is_told_first(notes: Path) -> None:
    async def work() -> None:
        gateway = Gateway(notes)
        first = gateway.handshake(at_a_shared_address(HERE, 1))
        gateway.hooks.moving_away(first, None)
        gateway.end(first)
        again = sa_of(at_a_shared_address(HERE, 3, spi_i=first.id.spi_i, spi_r=first.id.spi_r, initiator=False))
        gateway.hooks.taken_over(again, at_a_shared_address(GATEWAY, 2))
        wanted = ["established", "moved-away", "taken-over"]
        await until(lambda: len(gateway.events()) == len(wanted))
        await asyncio.sleep(2 * (session_hooks.SETTLE_SECONDS + session_hooks.END_SECONDS))
        assert [event for event, _ in gateway.told()] == wanted
        await gateway.hooks.close()

    run(work)
