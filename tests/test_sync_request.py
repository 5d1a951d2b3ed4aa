"""The client's side of the round trip (bridge.client.sync_request), with a gateway of the test's own."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from bridge.charon.ha_message import IkeId
from bridge.charon.ike_sa import IkeSa
from bridge.client.ike_transport import IkeTransport
from bridge.client.sync_request import MAX_COOKIES, Answer, NoAnswerError, RefusedError, SyncRequester, Target
from bridge.config import ResumeConfig
from bridge.ike.message import ExchangeType, Flag, NotifyType, PayloadType, build, encode_notify, parse
from bridge.ike.nat_detection import Addresses
from bridge.ike.resumption_answer import build_refusal, build_response
from bridge.ike.resumption_request import parse_request, verify_request
from bridge.ike.transforms import Suite
from bridge.net.packet import Datagram
from bridge.stub.child_sa import NOTHING
from bridge.stub.types import Endpoint

SUITE = Suite(12, 128, 12, 5, 31)
SK_D = b"d" * 32
GATEWAY, OLD_GATEWAY = "127.0.0.9", "192.0.2.1"
SOON = ResumeConfig(answer_timeout=0.3, retransmit=0.05, refusal_grace=0.05)
OFTEN = ResumeConfig(answer_timeout=60.0, retransmit=0.02)
PATIENT = ResumeConfig(answer_timeout=30.0, retransmit=20.0, refusal_grace=20.0)

Answers = Callable[[bytes, int], list[bytes]]
"""what a gateway answers to a request, and to which in order of arrival it is"""


def true_answer(request: bytes, *, sk_d: bytes = SK_D, spi_r: bytes = b"R" * 8, nat: Addresses | None = None) -> bytes:
    parsed = parse_request(request)
    assert parsed is not None
    return build_response(parsed, spi_r=spi_r, nonce=b"r" * 32, prf=SUITE.prf, sk_d_old=sk_d, lifetime=3600, nat=nat)


def answer_with(request: bytes, *payloads: tuple[int, bytes]) -> bytes:
    return build(
        spi_i=request[:8],
        spi_r=bytes(8),
        exchange=ExchangeType.IKE_SA_INIT,
        flags=Flag.RESPONSE,
        message_id=0,
        payloads=list(payloads),
    )


def refusal(request: bytes) -> bytes:
    return answer_with(request, (PayloadType.NOTIFY, encode_notify(NotifyType.NO_PROPOSAL_CHOSEN)))


def cookie(request: bytes, value: bytes) -> bytes:
    return answer_with(request, (PayloadType.NOTIFY, encode_notify(NotifyType.COOKIE, value)))


class Gateway:
    """Takes the client's requests, and answers as it is told."""

    def __init__(self, answers: Answers = lambda *_: [], config: ResumeConfig = SOON, port: int = 4500) -> None:
        self.requests: list[bytes] = []
        self.ways: list[tuple[str, int, str, int, bool]] = []
        self._answers = answers
        self._transport = IkeTransport(self)
        self._asker = SyncRequester(self._transport, config, lambda _: None, lambda *_: NOTHING)
        self.sa = IkeSa(
            IkeId.of(b"initiate", b"responds", True),
            SUITE,
            SK_D,
            up=True,
            local=Endpoint("127.0.0.1", port),
            remote=Endpoint(OLD_GATEWAY, port),
        )

    def send(self, src: str, sport: int, dst: str, dport: int, payload: bytes, marker: bool) -> None:
        self.requests.append(payload)
        self.ways.append((src, sport, dst, dport, marker))
        for octets in self._answers(payload, len(self.requests)):
            self._transport.datagram(Datagram(dst, dport, src, sport, octets, marker))

    async def asked(self) -> Answer:
        return await self._asker.ask(self.sa, Target(GATEWAY, "home"))

    async def asked_in_vain(self) -> list[bytes]:
        """The requests of an attempt that nobody answers."""
        before = len(self.requests)
        with pytest.raises(NoAnswerError):
            await self.asked()
        return self.requests[before:]


async def test_a_retransmission_has_the_same_octets() -> None:
    gateway = Gateway(lambda octets, n: [true_answer(octets)] if n == 3 else [], OFTEN)
    await gateway.asked()
    assert len(gateway.requests) == 3
    assert len(set(gateway.requests)) == 1


async def test_every_attempt_has_an_spi_a_nonce_and_a_public_value_of_its_own() -> None:
    gateway = Gateway()
    first, second = [(await gateway.asked_in_vain())[0] for _ in range(2)]
    assert first[:8] != second[:8]
    assert bytes(8) not in (first[:8], second[:8])
    for kind in (PayloadType.NONCE, PayloadType.KE):
        bodies = []
        for octets in (first, second):
            payload = parse(octets).only(kind)
            assert payload is not None
            bodies.append(payload.body)
        assert bodies[0] != bodies[1]
        assert len(bodies[0]) == len(bodies[1]) >= 32


async def test_every_request_proves_itself() -> None:
    for octets in await Gateway().asked_in_vain():
        request = parse_request(octets)
        assert request is not None
        assert verify_request(request, SUITE.prf, SK_D)
        assert (request.sync.gateway, request.sync.spi) == (OLD_GATEWAY, b"responds")


@pytest.mark.parametrize(
    ("port", "to", "marker"),
    [(4500, 4500, True), (500, 500, False), (1500, 500, False), (41234, 4500, True), (4500, 4501, True)],
)
async def test_a_request_takes_the_ports_of_the_old_sa(port: int, to: int, marker: bool) -> None:
    gateway = Gateway(port=port)
    gateway.sa.remote = Endpoint(OLD_GATEWAY, to)
    await gateway.asked_in_vain()
    assert set(gateway.ways) == {("127.0.0.1", port, GATEWAY, to, marker)}


@pytest.mark.parametrize("behind", ["client", "gateway"])
async def test_a_client_that_finds_a_nat_on_port_500_asks_again_from_4500(behind: str) -> None:
    ends = ["127.0.0.1", GATEWAY]
    ends[behind == "gateway"] = "203.0.113.7"

    def answers(octets: bytes, n: int) -> list[bytes]:
        port = (500, 4500)[n - 1]
        return [true_answer(octets, nat=(ends[1], port, ends[0], port))]

    gateway = Gateway(answers, PATIENT, port=500)
    answer = await gateway.asked()
    assert gateway.ways == [
        ("127.0.0.1", 500, GATEWAY, 500, False),
        ("127.0.0.1", 4500, GATEWAY, 4500, True),
    ]
    first, second = gateway.requests
    assert first[:8] != second[:8] == answer.ike_id.spi_i
    assert (answer.nat_here, answer.nat_there) == (behind == "client", behind == "gateway")
    assert (answer.local, answer.remote) == (Endpoint("127.0.0.1", 4500), Endpoint(GATEWAY, 4500))


async def test_without_a_nat_an_sa_stays_on_port_500() -> None:
    def answers(octets: bytes, _: int) -> list[bytes]:
        return [true_answer(octets, nat=(GATEWAY, 500, "127.0.0.1", 500))]

    gateway = Gateway(answers, PATIENT, port=500)
    answer = await gateway.asked()
    assert len(gateway.requests) == 1
    assert (answer.local, answer.remote) == (Endpoint("127.0.0.1", 500), Endpoint(GATEWAY, 500))


async def test_a_cookie_goes_in_front_of_the_same_request() -> None:
    value = bytes(range(64))
    gateway = Gateway(lambda octets, n: [cookie(octets, value)] if n == 1 else [true_answer(octets)], PATIENT)
    await gateway.asked()
    bare, full = (parse(octets) for octets in gateway.requests)
    assert (full.payloads[0].type, full.payloads[0].body) == (
        PayloadType.NOTIFY,
        encode_notify(NotifyType.COOKIE, value),
    )
    rest = full.payloads[1:]
    assert [(one.type, one.body) for one in bare.payloads[1:]] == [(one.type, one.body) for one in rest[1:]]
    # but for the proof, which covers the cookie
    assert bare.payloads[0].type == rest[0].type == PayloadType.SYNC
    assert bare.payloads[0].body[:-32] == rest[0].body[:-32]
    assert bare.payloads[0].body[-32:] != rest[0].body[-32:]
    assert bare.header.spi_i == full.header.spi_i


async def test_a_proven_refusal_ends_the_attempt_immediately_and_says_why() -> None:
    def answers(octets: bytes, _: int) -> list[bytes]:
        parsed = parse_request(octets)
        assert parsed is not None
        assert parsed.refusable
        return [build_refusal(parsed, "connection-missing", prf=SUITE.prf, sk_d_old=SK_D)]

    gateway = Gateway(answers, PATIENT)
    async with asyncio.timeout(2):
        with pytest.raises(RefusedError) as caught:
            await gateway.asked()
    assert caught.value.why == "connection-missing"


async def test_a_refusal_without_a_valid_proof_does_not_keep_the_true_answer_out() -> None:
    def answers(octets: bytes, n: int) -> list[bytes]:
        parsed = parse_request(octets)
        assert parsed is not None
        forged = build_refusal(parsed, "no-stub", prf=SUITE.prf, sk_d_old=b"e" * 32)
        return [forged, build_refusal(parsed), true_answer(octets)]

    assert await Gateway(answers, PATIENT).asked()


async def test_a_refusal_without_a_proof_ends_the_attempt_when_its_grace_is_over() -> None:
    def answers(octets: bytes, _: int) -> list[bytes]:
        parsed = parse_request(octets)
        assert parsed is not None
        return [build_refusal(parsed)]

    began = asyncio.get_running_loop().time()
    with pytest.raises(RefusedError) as caught:
        await Gateway(answers, SOON).asked()
    assert asyncio.get_running_loop().time() - began >= SOON.refusal_grace
    assert caught.value.why is None


async def test_no_more_than_four_cookies_are_taken_in_one_attempt() -> None:
    gateway = Gateway(lambda octets, n: [cookie(octets, b"forged %d" % n) if n < 8 else true_answer(octets)], OFTEN)
    await gateway.asked()
    assert len(gateway.requests) == 8
    assert len(set(gateway.requests)) == 1 + MAX_COOKIES == 5


async def test_an_unproven_answer_is_ignored_and_the_true_one_taken() -> None:
    def answers(octets: bytes, _: int) -> list[bytes]:
        forged = true_answer(octets, sk_d=b"?" * 32, spi_r=b"F" * 8)
        nothing_proved = answer_with(octets, (PayloadType.NONCE, b"r" * 32))
        return [forged, nothing_proved[:8] + b"F" * 8 + nothing_proved[16:], octets, b"", true_answer(octets)]

    answer = await Gateway(answers, PATIENT).asked()
    assert answer.ike_id.spi_r == b"R" * 8


async def test_unproven_answers_alone_are_none() -> None:
    gateway = Gateway(lambda octets, _: [true_answer(octets, sk_d=b"?" * 32)])
    assert await gateway.asked_in_vain()


async def test_after_a_normal_response_a_proven_one_is_still_taken() -> None:
    answer = await Gateway(lambda octets, _: [refusal(octets), true_answer(octets)], PATIENT).asked()
    assert answer.ike_id.spi_r == b"R" * 8


async def test_a_normal_response_ends_the_attempt_when_its_grace_is_over() -> None:
    gateway = Gateway(
        lambda octets, _: [refusal(octets)], ResumeConfig(answer_timeout=60.0, retransmit=60.0, refusal_grace=0.1)
    )
    began = asyncio.get_running_loop().time()
    with pytest.raises(RefusedError):
        await gateway.asked()
    assert 0.1 <= asyncio.get_running_loop().time() - began < 60
