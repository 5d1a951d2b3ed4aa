"""The load generator: thousands of clients in one process and one network namespace.

    python -m bridge.bench.generator GATEWAY PORT BANK_URL KEY_FILE

Any address of CLIENTS is the host's own, so one UDP socket speaks for all of them, each from its own address. Orders
come as JSON, one a line, on standard input; each is answered by one line.

    {"template": ["192.168.50.1", "<SPI hex>"]}     the stub after which sessions are made
    {"make": 1000}                                  make so many sessions, their stubs into the bank
    {"make_at": ["192.168.50.9", 1000]}             the same at a gateway that never was
    {"storm": {"window": 256, "count": 1000, "children": "none"}}
                                                    resume that many of those made, at most `window` at a time, with
                                                    their CHILD_SAs "at-once", by "create" (CREATE_CHILD_SA), or not
    {"stand_by": ["192.168.50.1", 1000, 256]}       resume that many of those made at this gateway, and leave them there
    {"outage": 60.0}                                until all of those have gone on to another gateway, or so many
                                                    seconds: answer Moves and Announcements. A line with "progress"
                                                    comes twice a second
    {"own": ["192.168.50.1", 1000]}                 make so many at the model's address, which gateways share, with this
                                                    gateway as their owner
    {"takeover": ["192.168.50.100", 60.0, 100]}     until all of those have new keys from the gateway that has the
                                                    address, or so many seconds: answer it; so many of them send ESP
    {"end": null}                                   delete the IKE_SAs of the last storm, as clients that go
    {"idle": 2.0}                                   answer the gateway's requests for so many seconds
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections import Counter, deque
from ipaddress import IPv4Address
from typing import Any

from bridge.bank.redis_bank import RedisBank
from bridge.bench.client_socket import ClientSocket
from bridge.bench.ordinary import Ordinary, with_known_keys
from bridge.bench.ordinary_clients import OrdinaryClients
from bridge.bench.sessions import ESP_SPI, Children, Session, State, Unproven, imagine, is_answer
from bridge.bench.standby import Standbys
from bridge.ike.key_exchange import KeyExchange, fresh_public_value
from bridge.ike.message import ExchangeType, MalformedMessage
from bridge.net.packet import EXCHANGE_OFFSET
from bridge.stub.keyring import Keyring
from bridge.stub.stub import Index, Stub

CLIENTS = "10.128.0.0/9"
"""addresses of the simulated clients"""
_FIRST = int(IPv4Address("10.128.0.0")) + 1
STEP = 29
"""between the addresses of two clients"""
STORE_BUNDLE = 1024
PATIENCE = 30.0
"""seconds after which a session that has got no further has failed"""
RETRANSMIT = (0.5, 1.0, 2.0, 4.0, 8.0)
"""seconds after each transmission, as RFC 7296 section 2.4 leaves to the sender"""
READ_AT_ONCE = 64
PROGRESS_SECONDS = 0.5
END_WINDOW = 256
END_SECONDS = 0.1
"""for the answers to so many"""


class Generator:
    """All clients, and the socket they share."""

    def __init__(self, gateway: str, port: int, bank: RedisBank) -> None:
        self._gateway = gateway
        self._port = port
        self._standbys: Standbys | None = None
        self._bank = bank
        self._template: Stub | None = None
        self._made: deque[Session] = deque()
        self._last: list[Session] = []
        self._by_spi: dict[bytes, Session] = {}
        self._number = 0
        self._strange = 0
        self._requests = 0
        self._pending: dict[bytes, Session] = {}
        self._timers: deque[tuple[float, Session]] = deque()
        self._moved_on: list[Session] = []
        self._socket = ClientSocket(port)
        self.ordinary = OrdinaryClients(self._socket)

    async def template(self, gateway: str, spi: str) -> dict[str, Any]:
        """Take the stub that the bank has of a real session as the model."""
        [stub] = await self._bank.get([Index(gateway, bytes.fromhex(spi))])
        if stub is None:
            raise SystemExit("the bank has no stub of the model session")
        self._template = stub
        return {"suite": stub.suite.name}

    async def make(self, count: int, gateway: str | None = None) -> dict[str, Any]:
        """New sessions with their stubs in the bank, requests ready to be sent. `gateway`: of another than the
        model's."""
        assert self._template is not None
        for first in range(0, count, STORE_BUNDLE):
            stubs = []
            for _ in range(min(STORE_BUNDLE, count - first)):
                self._number += 1
                address = str(IPv4Address(_FIRST + self._number * STEP))
                stub = imagine(self._template, self._number, address, time.time(), gateway)
                session = Session.of(stub, os.urandom(8), ESP_SPI + self._number)
                session.ke_value = fresh_public_value(stub.suite.group)
                self._made.append(session)
                stubs.append(stub)
            stored = await self._bank.store(stubs)
            if not all(stored):
                raise SystemExit("the bank refused stubs")
        return {"made": count}

    def storm(
        self, window: int, count: int, children: str, forward_secrecy: bool = False, every: float = 0.0
    ) -> dict[str, Any]:
        """Resume `count` sessions, each confirmed by its first protected exchange; one `every` so many seconds at
        most."""
        sessions = [self._made.popleft() for _ in range(min(count, len(self._made)))]
        for session in sessions:
            session.children = Children(children)
            if forward_secrecy:
                session.exchange = KeyExchange(session.suite.group)
                session.ke_value = session.exchange.public
            session.prepare(self._gateway, self._port, session.ke_value)
        self._last = sessions
        self._strange = self._requests = 0
        retransmitted = 0
        unproven: dict[str, int] = {}
        waiting = deque(sessions)
        pending: dict[bytes, Session] = {}
        timers: deque[tuple[float, Session]] = deque()
        began = due = time.monotonic()
        cpu = time.process_time()
        while waiting or pending:
            now = time.monotonic()
            while waiting and len(pending) < window and now >= due:
                due = due + every if every else now
                session = waiting.popleft()
                pending[session.spi_i] = self._by_spi[session.spi_i] = session
                session.state = State.ASKED
                session.began = session.asked = time.monotonic()
                self._send(session.request, session.address)
                timers.append((session.asked + RETRANSMIT[0], session))
                if len(pending) % READ_AT_ONCE == 0:
                    break
            busy = self._receive(pending, unproven)
            retransmitted += self._retransmit(timers, pending, now)
            if not busy and (not waiting or len(pending) >= window or time.monotonic() < due):
                self._socket.wait(20 if pending else max(int((due - time.monotonic()) * 1000), 0))
        return {
            "sessions": len(sessions),
            "window": window,
            "seconds": max((s.confirmed for s in sessions), default=began) - began,
            "answered_ms": [round((s.answered - s.began) * 1000, 4) for s in sessions if s.answered],
            "confirmed_ms": [round((s.confirmed - s.began) * 1000, 4) for s in sessions if s.confirmed],
            "confirmed": sum(s.state is State.CONFIRMED for s in sessions),
            "states": Counter(s.state.name.lower() for s in sessions),
            "unproven": unproven,
            "retransmitted": retransmitted,
            "strange": self._strange,
            "gateway_requests": self._requests,
            "generator_cpu_s": time.process_time() - cpu,
        }

    def stand_by(self, gateway: str, count: int, window: int) -> dict[str, Any]:
        """Have so many more sessions up at `gateway`, from where they go on later."""
        usual, self._gateway = self._gateway, gateway
        done = self.storm(window, count, Children.NONE)
        self._gateway = usual
        standbys = self._standbys = self._standbys or Standbys(gateway, self._socket.send, self._go_on)
        for session in self._last:
            if session.state is State.CONFIRMED:
                standbys.add(session, os.urandom(8), fresh_public_value(session.suite.group))
        return {"confirmed": done["confirmed"], "states": done["states"], "seconds": done["seconds"]}

    async def own(self, owner: str, count: int) -> dict[str, Any]:
        """New sessions of ordinary clients, with their stubs in the bank."""
        assert self._template is not None
        for first in range(0, count, STORE_BUNDLE):
            stubs = []
            for _ in range(min(STORE_BUNDLE, count - first)):
                self._number += 1
                address = str(IPv4Address(_FIRST + self._number * STEP))
                stub, outgoing, incoming = with_known_keys(
                    imagine(self._template, self._number, address, time.time()), owner
                )
                [child] = stub.children
                self.ordinary.add(
                    Ordinary(stub.spi_i, stub.spi_r, address, child, outgoing, incoming, ESP_SPI + self._number)
                )
                stubs.append(stub)
            if not all(await self._bank.store(stubs)):
                raise SystemExit("the bank refused stubs")
        return {"made": count}

    def _go_on(self, session: Session, gateway: str) -> None:
        if session.state is not State.PREPARED:
            return
        session.prepare(gateway, self._port, session.ke_value)
        self._pending[session.spi_i] = self._by_spi[session.spi_i] = session
        session.state = State.ASKED
        session.began = session.asked = time.monotonic()
        self._moved_on.append(session)
        self._send(session.request, session.address)
        self._timers.append((session.asked + RETRANSMIT[0], session))

    def outage(self, seconds: float) -> dict[str, Any]:
        """Go on with the sessions that stand by as they are told, for so many seconds or until none is left."""
        standbys = self._standbys
        assert standbys is not None
        self._pending, self._timers, self._moved_on = {}, deque(), []
        for standby in standbys.by_spi.values():
            standby.announced = 0.0
        unproven: dict[str, int] = {}
        retransmitted, cpu, said = 0, time.process_time(), 0.0
        end = time.monotonic() + seconds
        while (now := time.monotonic()) < end:
            busy = self._receive(self._pending, unproven)
            busy |= standbys.tick(now)
            retransmitted += self._retransmit(self._timers, self._pending, now)
            if now >= said + PROGRESS_SECONDS:
                said = now
                over = len(self._moved_on) - len(self._pending)
                print(json.dumps({"progress": over / max(len(standbys.by_spi), 1)}), flush=True)
                if over == len(standbys.by_spi):
                    break
            if not busy:
                self._socket.wait(5)
        moved = [session for session in self._moved_on if session.state is State.CONFIRMED]
        return {
            "sessions": len(standbys.by_spi),
            "announced": [standby.announced for standby in standbys.by_spi.values() if standby.announced],
            "asked": [session.began for session in moved],
            "confirmed": [session.confirmed for session in moved],
            "answer_ms": [round((session.answered - session.began) * 1000, 3) for session in moved],
            "contradicted": standbys.contradicted,
            "retransmitted": retransmitted,
            "unproven": unproven,
            "strange": self._strange,
            "generator_cpu_s": time.process_time() - cpu,
        }

    def end(self) -> dict[str, Any]:
        """Delete the IKE_SAs of the last storm."""
        leaving = [session for session in self._last if session.state is State.CONFIRMED]
        for session in leaving:
            session.delete()
        limit = time.monotonic() + PATIENCE
        while left := [session for session in leaving if session.state is State.LEAVING]:
            if time.monotonic() > limit:
                break
            for session in left[:END_WINDOW]:
                self._send(session.protected, session.address)
            self._socket.wait(RETRANSMIT[0] * 1000)
            self.idle(END_SECONDS)
        for session in self._last:
            self._by_spi.pop(session.spi_i, None)
        self._last = []
        return {"ended": len(leaving) - len(left)}

    def idle(self, seconds: float) -> dict[str, Any]:
        """Answer what the gateway asks of sessions that are up."""
        end = time.monotonic() + seconds
        self._requests = 0
        while (left := end - time.monotonic()) > 0:
            if not self._receive({}, {}):
                self._socket.wait(left * 1000)
        return {"gateway_requests": self._requests}

    def _send(self, message: bytes, source: str) -> None:
        self._socket.send(message, source, self._gateway)

    def _receive(self, pending: dict[bytes, Session], unproven: dict[str, int]) -> bool:
        """Take in what is there, up to a limit; whether there was anything."""
        for count in range(READ_AT_ONCE):
            message = self._socket.receive()
            if message is None:
                return count > 0
            session = self._by_spi.get(message[:8])
            if session is None:
                self._strange += 1
                continue
            try:
                if message[EXCHANGE_OFFSET] == ExchangeType.STUB:
                    self._stub_message(session, message)
                else:
                    self._take(session, message, pending)
            except Unproven as error:
                unproven[str(error)] = unproven.get(str(error), 0) + 1
            except MalformedMessage:
                self._strange += 1
        return True

    def _stub_message(self, session: Session, message: bytes) -> None:
        standby = self._standbys.by_spi.get(session.spi_i) if self._standbys is not None else None
        if self._standbys is not None and standby is not None:
            self._standbys.message(standby, message, time.monotonic())

    def _take(self, session: Session, message: bytes, pending: dict[bytes, Session]) -> None:
        if session.state is State.ASKED and is_answer(message):
            reply = session.answer(message, self._gateway, self._port)
            if session.outgoing is not None:
                session.answered = session.asked = time.monotonic()
                session.tries = 0
            if reply is not None:
                self._send(reply, session.address)
        elif session.state in (State.ANSWERED, State.CONFIRMED, State.LEAVING) and not is_answer(message):
            reply = session.protected_message(message)
            if reply is not None:
                self._requests += 1
                self._send(reply, session.address)
            elif session.state is State.CONFIRMED and pending.pop(session.spi_i, None) is not None:
                session.confirmed = time.monotonic()
                # what is left of it: keys to answer the gateway with
                session.request = session.protected = b""

    def _retransmit(self, timers: deque[tuple[float, Session]], pending: dict[bytes, Session], now: float) -> int:
        """Send again what got no answer in time; a session without an answer for PATIENCE is given up."""
        count = 0
        while timers and timers[0][0] <= now:
            _, session = timers.popleft()
            if session.spi_i not in pending:
                continue
            if now - session.began > PATIENCE:
                pending.pop(session.spi_i)
                continue
            wait = RETRANSMIT[min(session.tries, len(RETRANSMIT) - 1)]
            if now - session.asked >= wait:
                session.tries += 1
                session.asked = now
                count += 1
                self._send(session.request if session.state is State.ASKED else session.protected, session.address)
            timers.append((now + RETRANSMIT[0], session))
        return count


async def _serve(gateway: str, port: int, url: str, key_file: str) -> None:
    bank = RedisBank(url, Keyring.load(key_file), get_timeout=5.0, timeout=30.0)
    generator = Generator(gateway, port, bank)
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        [(order, given)] = json.loads(line).items()
        if order == "template":
            answer = await generator.template(*given)
        elif order == "make":
            answer = await generator.make(given)
        elif order == "storm":
            answer = generator.storm(**given)
        elif order == "make_at":
            answer = await generator.make(given[1], given[0])
        elif order == "stand_by":
            answer = generator.stand_by(*given)
        elif order == "outage":
            answer = generator.outage(given)
        elif order == "own":
            answer = await generator.own(*given)
        elif order == "takeover":
            answer = generator.ordinary.takeover(*given)
        elif order == "end":
            answer = generator.end()
        else:
            answer = generator.idle(given)
        print(json.dumps(answer), flush=True)
    await bank.close()


def main() -> None:
    """The process."""
    gateway, port, url, key_file = sys.argv[1:]
    asyncio.run(_serve(gateway, int(port), url, key_file))


if __name__ == "__main__":
    main()
