"""The one round trip with one gateway, on the client's side (draft-xu-ike-sa-sync-01 section 3.1).

Before the keys are proved, no content of a message is trusted but the responder's nonce (protocol rule 6): an answer
without a proof, a refusal among them, ends the attempt only after the time in which a proven one could still come. A
proven refusal ends it immediately.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import structlog

from bridge.charon.ha_message import IkeId
from bridge.charon.ike_sa import IkeSa
from bridge.client.ike_transport import BACK_OFF, IkeTransport
from bridge.config import ResumeConfig
from bridge.ike.key_confirmation import Confirmation
from bridge.ike.key_exchange import KeyExchange, can_exchange, fresh_public_value
from bridge.ike.keys import NONCE_OCTETS
from bridge.ike.message import MalformedMessage
from bridge.ike.nat_detection import nat_hash
from bridge.ike.resumption_answer import Response, parse_response, verify_refusal, verify_response
from bridge.ike.resumption_request import build_request
from bridge.ike.sync_messages import CookieChallenge, OrdinaryResponse, SyncRefusal, SyncResponse
from bridge.ike.sync_payload import Attribute
from bridge.net.packet import PORT_IKE, PORT_NAT_T, Datagram
from bridge.stub.child_sa import NewChild, Offer, granted
from bridge.stub.types import Endpoint

log = structlog.get_logger()

MAX_COOKIES = 4
"""taken in one attempt: the first may be forged, or the gateway's secret change meanwhile"""


class RefusedError(Exception):
    """The gateway did not resume; `why` is its reason, where it gave and proved one."""

    def __init__(self, why: str | None = None) -> None:
        super().__init__("refused")
        self.why = why


class NoAnswerError(Exception):
    """The gateway did not answer."""


class Target(NamedTuple):
    """A gateway to ask."""

    address: str
    connection: str
    """charon's connection to it"""
    sources: tuple[str, ...] = ()
    """the addresses among local_addrs of that connection"""


@dataclass(slots=True, eq=False)
class Answer:
    """A proven answer, and what belongs to it."""

    ike_id: IkeId
    nonce_i: bytes = field(repr=False)
    nonce_r: bytes = field(repr=False)
    local: Endpoint
    remote: Endpoint
    nat_here: bool
    nat_there: bool
    exchange: float
    """seconds from the request to the accepted answer"""
    sealed_stub: bytes | None = field(repr=False)
    lifetime: int | None
    children: tuple[NewChild, ...]
    """CHILD_SAs that come up with it"""
    g_ir: bytes = field(default=b"", repr=False)
    """with forward secrecy"""
    auth_lifetime: int | None = None
    """seconds until the client has to authenticate again"""
    gateways: tuple[str, ...] = ()
    """addresses of other gateways that resume too"""


class SyncRequester:
    """Asks gateways to resume. `sealed_stub` gives the stub that the client holds of an IKE_SA, `offer` the CHILD_SAs
    of one that may come up in the exchange."""

    def __init__(
        self,
        transport: IkeTransport,
        config: ResumeConfig,
        sealed_stub: Callable[[IkeSa], bytes | None],
        offer: Callable[[IkeSa, Target, Endpoint], Offer],
        *,
        random: Callable[[int], bytes] = os.urandom,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._transport = transport
        self._config = config
        self._sealed_stub = sealed_stub
        self._offer = offer
        self._random = random
        self._clock = clock

    async def ask(self, sa: IkeSa, gateway: Target) -> Answer:
        """Raises NoAnswerError or RefusedError."""
        assert sa.local is not None
        assert sa.remote is not None
        answer = await self._ask_from(sa.local.port, sa.remote.port, sa, gateway)
        if answer.local.port == PORT_IKE and (answer.nat_here or answer.nat_there):
            # RFC 7296 section 2.23 wants the SA on port 4500, and only a request from there shows the gateway what the
            # NAT makes of that port; what it rebuilt for this answer goes with the next one's confirmation
            log.info("nat-detected", gateway=gateway.address, **sa.id.logged)
            answer = await self._ask_from(PORT_NAT_T, PORT_NAT_T, sa, gateway)
        return answer

    async def _ask_from(self, local_port: int, port: int, sa: IkeSa, gateway: Target) -> Answer:
        """One attempt, from this port of the client to this one of the gateway."""
        assert sa.local is not None
        spi_i, nonce = self._random(8), self._random(NONCE_OCTETS)
        source = _source_address(gateway)
        if source is None or source in sa.local_vips:
            # a tunnel that covers its own gateways: the kernel would send into it
            source = sa.local.address
        local = Endpoint(source, local_port)
        index = sa.index_there()
        offered = self._offer(sa, gateway, local)
        cookies: list[bytes] = []
        requests: list[bytes] = []
        exchange = self._exchange(sa.suite.group)
        ke_value = exchange.public if exchange is not None else fresh_public_value(sa.suite.group)
        with self._transport.answers(spi_i) as answers:
            began = self._clock()
            deadline = began + self._config.answer_timeout
            wait, refusal = self._config.retransmit, None
            while (now := self._clock()) < deadline:
                request = build_request(
                    spi_i=spi_i,
                    suite=sa.suite,
                    ke_value=ke_value,
                    nonce=nonce,
                    sync_index=(index.gateway, index.spi),
                    prf=sa.suite.prf,
                    sk_d_old=sa.sk_d,
                    nat=(local.address, local.port, gateway.address, port),
                    cookie=cookies[-1] if cookies else None,
                    children=offered.requested,
                    old_children=offered.old_spis,
                    sealed_stub=self._sealed_stub(sa),
                    refusable=True,
                    forward_secrecy=exchange is not None,
                )
                if request not in requests:
                    requests.append(request)
                self._transport.send(local, Endpoint(gateway.address, port), request)
                until, wait = min(now + wait, deadline), wait * BACK_OFF
                while (left := (refusal or until) - self._clock()) > 0:
                    try:
                        async with asyncio.timeout(left):
                            datagram = await answers.get()
                    except TimeoutError:
                        break
                    if datagram.src != gateway.address:
                        continue
                    answer = self._judge(datagram, requests, sa)
                    if isinstance(answer, SyncRefusal):
                        raise RefusedError(answer.reason)
                    if isinstance(answer, SyncResponse):
                        g_ir = self._g_ir(answer, exchange)
                        return self._accepted(answer, offered, spi_i, nonce, local, datagram, began, g_ir)
                    if isinstance(answer, CookieChallenge):
                        # the answer to a retransmission holds the same one once more
                        if len(cookies) < MAX_COOKIES and answer.cookie not in cookies:
                            cookies.append(answer.cookie)
                            break
                        continue
                    if isinstance(answer, OrdinaryResponse) and refusal is None:
                        refusal = self._clock() + self._config.refusal_grace
                if refusal is not None and self._clock() >= refusal:
                    raise RefusedError
            raise NoAnswerError

    def _judge(self, datagram: Datagram, requests: list[bytes], sa: IkeSa) -> Response | None:
        """What an answer to the last of `requests` is; one that is proven may be to any of them, for nothing shows
        whether a cookie came from the gateway."""
        try:
            answer = parse_response(datagram.ike, requests[-1])
        except MalformedMessage as error:
            log.debug("answer-malformed", gateway=datagram.src, reason=str(error), **sa.id.logged)
            return None
        if isinstance(answer, SyncResponse):
            proven = any(verify_response(answer, request, sa.suite.prf, sa.sk_d) for request in requests)
        elif isinstance(answer, SyncRefusal):
            proven = any(verify_refusal(answer, request, sa.suite.prf, sa.sk_d) for request in requests)
        else:
            return answer
        if not proven:
            log.warning("answer-proof-wrong", gateway=datagram.src, **sa.id.logged)
            return None
        return answer

    async def confirm(self, confirmation: Confirmation, answer: Answer) -> bool:
        """Carry the first protected exchange of the SA that `answer` is of; whether the gateway answered in time."""
        return await self._transport.exchange(
            answer.local,
            answer.remote,
            confirmation.request,
            confirmation.is_answered_by,
            retransmit=self._config.retransmit,
            timeout=self._config.answer_timeout,
        )

    def _accepted(
        self,
        answer: SyncResponse,
        offered: Offer,
        spi_i: bytes,
        nonce: bytes,
        local: Endpoint,
        datagram: Datagram,
        began: float,
        g_ir: bytes,
    ) -> Answer:
        remote = Endpoint(datagram.src, datagram.sport)
        here, there = answer.nat_destination, answer.nat_source
        spi_r = answer.spi_r
        return Answer(
            ike_id=IkeId.of(spi_i, spi_r, True),
            nonce_i=nonce,
            nonce_r=answer.nonce,
            local=local,
            remote=remote,
            nat_here=bool(here) and nat_hash(spi_i, spi_r, local.address, local.port) not in here,
            nat_there=bool(there) and nat_hash(spi_i, spi_r, remote.address, remote.port) not in there,
            exchange=self._clock() - began,
            sealed_stub=answer.sync.first(Attribute.SEALED_STUB) if answer.sync else None,
            lifetime=answer.lifetime,
            auth_lifetime=answer.auth_lifetime,
            children=granted(offered, answer.sync.children if answer.sync else (), nonce, answer.nonce),
            gateways=answer.sync.gateways if answer.sync else (),
            g_ir=g_ir,
        )

    def _exchange(self, group: int) -> KeyExchange | None:
        """This client's half of the exchange that forward secrecy needs; None where it is not asked for. Raises
        RefusedError where it is wanted and cannot be had."""
        if not self._config.forward_secrecy:
            return None
        if not can_exchange(group):
            if self._config.forward_secrecy == "preferred":
                return None
            raise RefusedError("forward-secrecy-impossible")
        return KeyExchange(group)

    def _g_ir(self, answer: SyncResponse, exchange: KeyExchange | None) -> bytes:
        """g^ir of a proven answer; empty without forward secrecy. Raises RefusedError for an answer that lacks what was
        asked for: it is the gateway's own, for PROOF covers question and answer."""
        if exchange is None or (answer.key_exchange is None and self._config.forward_secrecy == "preferred"):
            return b""
        if answer.key_exchange is None:
            raise RefusedError("forward-secrecy-missing")
        group, public_value = answer.key_exchange
        try:
            if group != exchange.group:
                raise ValueError
            return exchange.shared(public_value)
        except ValueError:
            raise RefusedError("public-value-wrong") from None


def _source_address(gateway: Target) -> str | None:
    """The local address towards a gateway: that which its connection is configured to, else the kernel's choice; None
    where there is no route."""
    family = socket.AF_INET6 if ":" in gateway.address else socket.AF_INET
    try:
        # refused on a host without this address family
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            for configured in gateway.sources:
                # refused for what is none of this host's addresses now
                with contextlib.suppress(OSError):
                    probe.bind((configured, 0))
                    return str(probe.getsockname()[0])
            probe.connect((gateway.address, PORT_IKE))
            return str(probe.getsockname()[0])
    except OSError:
        return None
