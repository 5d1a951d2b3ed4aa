"""What a client makes of an announcement that its gateway has failed (bridge.client.gateway_probe)."""

from __future__ import annotations

import asyncio

from bridge.charon.ha_message import IkeId
from bridge.charon.ike_sa import IkeSa
from bridge.client.gateway_probe import AGAIN_SECONDS, PROBES, GatewayProbe
from bridge.client.ike_transport import IkeTransport
from bridge.client.outcome import Outcome, Result
from bridge.ike.message import ExchangeType, Flag, NotifyType, PayloadType, build
from bridge.ike.stub_exchange import (
    MoveStatus,
    StubMessage,
    StubSa,
    build_announcement,
    build_here,
    move_message_id,
    parse_stub_message,
    verify,
)
from bridge.ike.transforms import Suite
from bridge.net.packet import Datagram
from bridge.stub.types import Endpoint

CLIENT, GATEWAY, SURVIVOR = "192.0.2.10", "192.0.2.1", "192.0.2.2"
SK_D = b"d" * 32
SUITE = Suite(12, 128, 12, 5, 31)
NOW = move_message_id(1_800_000_000)
OLD = StubSa(b"initiate", b"responds", False, (GATEWAY, b"responds"), SUITE.prf, SK_D)


def invalid_major_version(spi_i: bytes) -> bytes:
    """As charon answers an IKE header of version 3."""
    return build(
        spi_i=spi_i,
        spi_r=bytes(8),
        exchange=ExchangeType.INFORMATIONAL,
        flags=Flag.RESPONSE,
        message_id=0,
        payloads=[(PayloadType.NOTIFY, b"\0\0" + NotifyType.INVALID_MAJOR_VERSION.to_bytes(2))],
    )


class Client:
    """A client with one session at GATEWAY. `alive`: its gateway's sidecar answers probes, with this status; `daemon`:
    the address that answers version probes."""

    def __init__(
        self, *, alive: MoveStatus | None = None, daemon: str = "", targets: tuple[str, ...] = (GATEWAY, SURVIVOR)
    ) -> None:
        self.sa = IkeSa(
            IkeId.of(b"initiate", b"responds", True),
            SUITE,
            SK_D,
            up=True,
            local=Endpoint(CLIENT, 4500),
            remote=Endpoint(GATEWAY, 4500),
            connection="home",
        )
        self.alive, self.daemon, self.busy = alive, daemon, False
        self.probed = self.versions = 0
        self.moves: list[str | None] = []
        self.stays: list[bool] = []
        """for each of them, whether the session stays where no gateway resumes it"""
        self.outcomes: list[Outcome] = []
        """of the first moves; those after them succeed"""
        self.left = False
        self.back_after = self.left_after = 0
        """the failed move after which its gateway answers again, or charon has moved the session by itself"""
        self.reports: list[MoveStatus] = []
        self._announced: StubMessage | None = None
        self._transport = IkeTransport(self)
        self._probe = GatewayProbe(
            self,
            self._transport,
            lambda spis: self.sa if spis == b"initiateresponds" and not self.left else None,
            lambda sa: targets,
            self._begin,
            uniform=lambda *_: 0.0,
            probe_seconds=0.01,
        )

    def _begin(self, sa: IkeSa, to: str | None, *, stay: bool) -> asyncio.Task[Outcome] | None:
        if self.busy:
            return None
        self.moves.append(to)
        self.stays.append(stay)
        outcome = self.outcomes.pop(0) if self.outcomes else Outcome(Result.RESUMED, "home", to)

        async def move() -> Outcome:
            if outcome.result is not Result.FAILED:
                self.left = True
            elif self.back_after == len(self.moves):
                self.alive = MoveStatus.HERE
            elif self.left_after == len(self.moves):
                self.left = True
            return outcome

        return asyncio.create_task(move())

    def send(self, src: str, sport: int, dst: str, dport: int, payload: bytes, marker: bool) -> None:
        assert (src, sport, dport, marker) == (CLIENT, 4500, 4500, True)
        if payload[17] == 0x30:
            assert dst == GATEWAY
            self.versions += 1
            if self.daemon:
                answer = invalid_major_version(payload[:8])
                self._transport.datagram(Datagram(self.daemon, 4500, CLIENT, 4500, answer, True))
            return
        message = parse_stub_message(payload)
        assert message.move is not None
        if message.move.status is MoveStatus.PROBE:
            assert dst == GATEWAY
            assert verify(message, SUITE.prf, SK_D)
            self.probed += 1
            if self.alive is not None:
                self.hears(build_here(OLD, message, self.alive), GATEWAY)
        else:
            assert dst == SURVIVOR
            assert verify(message, SUITE.prf, SK_D, before=self._announced)
            self.reports.append(message.move.status)

    def hears(self, octets: bytes, src: str) -> None:
        self._probe.received(parse_stub_message(octets), Datagram(src, 4500, CLIENT, 4500, octets, True))

    async def announced(self, message_id: int = NOW, sa: StubSa = OLD) -> None:
        octets = build_announcement(sa, SURVIVOR, message_id)
        self._announced = parse_stub_message(octets)
        self.hears(octets, SURVIVOR)
        await self.settled()

    async def settled(self) -> None:
        if self._probe._tasks:
            await asyncio.wait(self._probe._tasks)


async def test_a_gateway_that_does_not_answer_is_left_for_the_one_that_announces() -> None:
    client = Client()
    await client.announced()
    assert client.probed == PROBES
    assert client.moves == [SURVIVOR]
    assert client.reports == [MoveStatus.MOVING]


async def test_a_gateway_that_answers_is_stayed_with_and_the_one_that_announced_gets_a_report() -> None:
    client = Client(alive=MoveStatus.HERE)
    await client.announced()
    assert client.moves == []
    assert client.reports == [MoveStatus.GATEWAY_LIVES]
    assert client.probed == 1


async def test_a_gateway_whose_daemon_alone_answers_is_stayed_with_and_the_report_says_so() -> None:
    client = Client(daemon=GATEWAY)
    await client.announced()
    assert client.moves == []
    assert client.reports == [MoveStatus.DAEMON_ANSWERS]
    # its sidecar had all the time; charon logs each version probe, and one answer is enough
    assert (client.probed, client.versions) == (PROBES, 1)


async def test_the_answer_of_another_host_keeps_no_client() -> None:
    client = Client(daemon=SURVIVOR)
    await client.announced()
    assert client.moves == [SURVIVOR]
    assert client.versions == PROBES


async def test_a_gateway_that_says_itself_that_it_has_lost_the_sa_is_left_immediately_whatever_its_daemon_answers() -> (
    None
):
    client = Client(alive=MoveStatus.NOT_HERE, daemon=GATEWAY)
    await client.announced()
    assert client.moves == [SURVIVOR]
    assert client.reports == [MoveStatus.MOVING]
    assert client.probed == 1


async def test_a_proven_answer_counts_before_an_unproven_one() -> None:
    client = Client(alive=MoveStatus.HERE, daemon=GATEWAY)
    await client.announced()
    assert client.reports == [MoveStatus.GATEWAY_LIVES]


async def test_an_announcement_that_is_not_proved_has_no_effect_and_no_answer() -> None:
    client = Client()
    await client.announced(sa=OLD.__class__(b"initiate", b"responds", False, OLD.index, SUITE.prf, b"?" * 32))
    assert (client.probed, client.moves, client.reports) == (0, [], [])


async def test_an_announcement_by_a_gateway_that_is_not_configured_is_refused_without_a_probe() -> None:
    client = Client(targets=(GATEWAY,))
    await client.announced()
    assert (client.probed, client.moves) == (0, [])
    assert client.reports == [MoveStatus.NOT_CONFIGURED]


async def test_the_same_announcement_again_brings_the_report_again_and_no_probe() -> None:
    client = Client(alive=MoveStatus.HERE)
    await client.announced()
    await client.announced()
    assert client.probed == 1
    assert client.reports == [MoveStatus.GATEWAY_LIVES] * 2


async def test_an_older_announcement_is_not_accepted() -> None:
    client = Client(alive=MoveStatus.HERE)
    await client.announced(NOW)
    await client.announced(NOW - 1)
    assert client.probed == 1
    assert client.reports == [MoveStatus.GATEWAY_LIVES]


async def test_an_answer_to_another_probe_keeps_no_client() -> None:
    client = Client()
    stale = Client(alive=MoveStatus.HERE)
    captured: list[bytes] = []
    stale.hears = lambda octets, src: captured.append(octets)  # type: ignore[method-assign]
    octets = build_announcement(OLD, SURVIVOR, NOW)
    stale._probe.received(parse_stub_message(octets), Datagram(SURVIVOR, 4500, CLIENT, 4500, octets, True))
    await stale.settled()
    original = client.send

    def send(src: str, sport: int, dst: str, dport: int, payload: bytes, marker: bool) -> None:
        original(src, sport, dst, dport, payload, marker)
        client.hears(captured[0], GATEWAY)

    client.send = send  # type: ignore[method-assign]
    await client.announced()
    assert client.moves == [SURVIVOR]


async def test_a_session_that_moves_already_says_so() -> None:
    client = Client()
    client.busy = True
    await client.announced()
    assert client.reports == [MoveStatus.BUSY]


def failed(reason: str) -> Outcome:
    return Outcome(Result.FAILED, "home", SURVIVOR, reason=reason)


async def test_a_session_that_is_not_resumed_by_the_gateway_that_announced_goes_to_any_that_takes_it() -> None:
    client = Client()
    client.outcomes = [failed("refused"), failed("no-answer")]
    await client.announced()
    assert client.moves == [SURVIVOR, None, None]
    assert client.stays == [True, True, True]
    assert client.probed == 3 * PROBES
    assert client.reports == [MoveStatus.MOVING, MoveStatus.REFUSED]


async def test_a_session_that_no_gateway_resumes_is_set_up_again_at_last() -> None:
    client = Client()
    client.outcomes = [failed("no-answer")] * len(AGAIN_SECONDS)
    await client.announced()
    assert client.stays == [True] * len(AGAIN_SECONDS) + [False]
    assert client.reports == [MoveStatus.MOVING, MoveStatus.NO_ANSWER]


async def test_a_session_whose_gateway_answers_after_all_stays() -> None:
    client = Client()
    client.outcomes = [failed("refused"), failed("refused")]
    client.back_after = 1
    await client.announced()
    assert client.moves == [SURVIVOR]


async def test_a_session_that_charon_moved_meanwhile_is_left_alone() -> None:
    client = Client()
    client.outcomes = [failed("refused")]
    client.left_after = 1
    await client.announced()
    assert client.moves == [SURVIVOR]


async def test_an_announcement_from_another_hosts_address_is_not_answered() -> None:
    client = Client()
    client.hears(build_announcement(OLD, SURVIVOR, NOW), "198.51.100.9")
    await client.settled()
    assert (client.probed, client.moves, client.reports) == (0, [], [])
