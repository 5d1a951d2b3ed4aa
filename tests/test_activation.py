"""Rebuilt IKE_SAs until charon has them active (bridge.gateway.activation), without root and without a lab: whose
requests are answered, held, dropped, and when charon activates what it was given.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from typing import Any

import msgspec
import pytest

from bank_support import stub_of
from bridge.charon.ha_channel import ChannelError
from bridge.charon.ha_message import IkeId
from bridge.charon.ike_sa import IkeSa
from bridge.charon.vici_types import SaInfo
from bridge.gateway import activated, activation, strays
from bridge.ike.encrypted_payload import Protection, protect
from bridge.ike.key_confirmation import Confirmation
from bridge.ike.keys import IkeKeys, Resumption
from bridge.ike.message import ExchangeType, Flag, PayloadType
from bridge.ike.sync_messages import SyncResponse
from bridge.ike.transforms import Encr
from bridge.stub.stub import Stub
from bridge.stub.types import Identity
from role_support import FakeTime, Request, as_packets
from test_responder import SOURCES, Gateway, resume

HERE, ELSEWHERE = SOURCES[0], SOURCES[1]
QUICK = activation.WINDOW_LEAST / 4
"""seconds in which all is done that waits for no window"""

AS_MANY_AS_COME = dict.fromkeys(("cookie_threshold", "source_rate", "max_unconfirmed_per_source"), 1000)
"""settings of `sync`, so that a crowd is served as it comes"""


class Activating(Gateway):
    """A gateway that sees first requests, with charon's news passed on as bridge.gateway.role does."""

    def __init__(self, loop: FakeTime, **sync: Any) -> None:
        super().__init__(loop, able=lambda: self.able, **(AS_MANY_AS_COME | sync))
        self.able = True
        self.clients = 0
        self.charon._listeners.each = (self,)
        self.charon.reconciled.set()

    def verified(self, ike_id: IkeId) -> None:
        self.responder.unconfirmed.verified(ike_id)
        self.responder.activation.verified(ike_id.spis)

    def gone(self, sa: IkeSa) -> None:
        self.responder.unconfirmed.gone(sa)
        self.responder.activation.gone(sa.id.spis)

    def changed(self, sa: IkeSa) -> None: ...
    def down(self, info: SaInfo) -> None: ...

    def client(self, source: str = HERE) -> Client:
        """A client with a session that can be resumed."""
        self.clients += 1
        number = self.clients
        stub = msgspec.structs.replace(
            stub_of(),
            remote_id=Identity(3, b"client%d@example" % number),
            remote_vips=(f"10.20.1.{number}",),
            children=(),
        )
        self.bank.stubs[stub.index] = stub
        return Client(self, stub, source)

    def knows(self) -> None:
        """charon has confirmed an SA of this kind."""
        first = self.client()
        first.resume()
        charon_verifies(self, first)
        self.loop.pass_time(1.0)


class Client:
    """One that resumes, and the keys that it has then."""

    def __init__(self, gateway: Activating, stub: Stub, source: str) -> None:
        self.gateway, self.stub, self.source = gateway, stub, source
        self.spi_r = b""

    def resume(self, seconds: float = QUICK) -> bool:
        """Whether it was answered within so many seconds."""
        self.gateway.receive(self.request())
        self.gateway.loop.pass_time(seconds)
        return self.is_answered()

    def request(self) -> Request:
        """One that asks for the resumption."""
        self.nonce = os.urandom(32)
        self.octets = resume(self.stub, nonce=self.nonce)
        return Request(self.source, self.octets)

    def is_answered(self) -> bool:
        """Whether it was answered; the answer is taken in."""
        answers = [answer for answer in self.gateway.answers(self.octets) if isinstance(answer, SyncResponse)]
        if not answers:
            return False
        [answer] = answers
        self.spi_i, self.spi_r = self.octets[:8], answer.spi_r
        stub = self.stub
        self.resumption = Resumption(stub.suite, stub.sk_d, self.nonce, answer.nonce, self.spi_i, self.spi_r)
        return True

    @property
    def keys(self) -> IkeKeys:
        return self.resumption.keys()

    @property
    def spis(self) -> bytes:
        return self.spi_i + self.spi_r

    def confirmation(self) -> Confirmation:
        return Confirmation(self.stub.suite, self.keys, self.spi_i, self.spi_r, random=os.urandom)

    def message(self, exchange: ExchangeType, message_id: int = 1, payloads: Any = ()) -> bytes:
        ours = Protection.of(self.stub.suite, self.keys, initiator=True)
        return protect(
            ours,
            spi_i=self.spi_i,
            spi_r=self.spi_r,
            exchange=exchange,
            flags=Flag.INITIATOR,
            message_id=message_id,
            payloads=payloads,
            iv=os.urandom(ours.iv_length),
        )

    def send(self, octets: bytes, source: str | None = None) -> Request:
        request = Request(source or self.source, octets)
        self.gateway.receive(request)
        return request

    def received(self) -> list[bytes]:
        """What was sent to it under the SPIs of the SA, protected."""
        return [octets for _, octets in self.gateway.wire.sent if octets[:16] == self.spis and octets[18] == 37]


def charon_verifies(gateway: Activating, client: Client, next_id: int = 2) -> None:
    """charon reports that a request of the client verified."""

    async def report() -> None:
        gateway.charon.tracker.verified(gateway.installer.installed[client.spis].id, next_id)

    gateway.loop.run(report())


@pytest.fixture
def gateway(loop: FakeTime) -> Activating:
    """One whose charon has confirmed an SA of the kind that the clients here have."""
    made = Activating(loop)
    loop.run(made.start())
    made.knows()
    made.installer.toggle_seconds = 0.001
    made.installer.activations.clear()
    made.installer.told.clear()
    made.resumed.clear()
    return made


def test_the_first_sa_of_a_kind_is_active_before_its_client_is_answered_and_confirmed_by_charon(
    loop: FakeTime,
) -> None:
    gateway = Activating(loop)
    loop.run(gateway.start())
    for _ in range(2):
        # until charon has confirmed one, each is the first
        client = gateway.client()
        assert client.resume()
        assert not gateway.installer.landed
        request = client.send(client.confirmation().request)
        assert request.fate == ["accepted"]
        assert client.received() == []
    assert gateway.resumed == []
    charon_verifies(gateway, client)
    loop.pass_time(0.1)
    assert gateway.resumed == [client.stub]
    late = gateway.client()
    assert late.resume()
    assert list(gateway.installer.landed) == [late.spis]


def test_of_another_kind_the_first_one_is_charons_again(gateway: Activating) -> None:
    client = gateway.client()
    client.stub = msgspec.structs.replace(
        client.stub, suite=msgspec.structs.replace(client.stub.suite, encr=Encr.AES_CBC, encr_len=256)
    )
    gateway.bank.stubs[client.stub.index] = client.stub
    assert client.resume()
    assert not gateway.installer.landed


def test_in_another_charon_each_kind_begins_again(gateway: Activating) -> None:
    gateway.installer.where = 2
    assert gateway.client().resume()
    assert not gateway.installer.landed


def test_without_rules_that_show_first_requests_charon_confirms(gateway: Activating) -> None:
    gateway.able = False
    assert gateway.client().resume()
    assert not gateway.installer.landed


def test_a_liveness_check_is_answered_and_confirms_while_charon_has_the_sa_passive(gateway: Activating) -> None:
    client = gateway.client()
    assert client.resume()
    confirmation = client.confirmation()
    request = client.send(confirmation.request)
    assert request.fate == ["dropped"]
    [answer] = client.received()
    assert confirmation.is_answered_by(answer)
    gateway.loop.pass_time(0.02)
    assert gateway.resumed == [client.stub]
    assert list(gateway.installer.landed) == [client.spis]
    # from any moment on charon could continue
    assert gateway.installer.told == [(client.spis, 2)]
    gateway.loop.pass_time(activation.WINDOW_LEAST)
    assert gateway.installer.activations == [1]
    assert gateway.resumed == [client.stub]


def test_the_same_request_gets_the_same_octets_before_and_after_the_activation(gateway: Activating) -> None:
    client = gateway.client()
    assert client.resume()
    octets = client.confirmation().request
    client.send(octets)
    assert client.send(octets).fate == ["dropped"]
    gateway.loop.pass_time(1.0)
    assert not gateway.installer.landed
    assert client.send(octets).fate == ["dropped"]
    assert len(client.received()) == 3
    assert len(set(client.received())) == 1
    # a replay from elsewhere moves nothing and gets nothing
    assert client.send(octets, ELSEWHERE).fate == ["dropped"]
    assert len(client.received()) == 3
    # all else is charon's from the activation on
    assert client.send(client.message(ExchangeType.INFORMATIONAL, 2)).fate == ["accepted"]
    gateway.loop.pass_time(activated.REPEAT_SECONDS + 2)
    assert client.send(octets).fate == ["accepted"]


def test_several_liveness_checks_are_answered_in_turn(gateway: Activating) -> None:
    client = gateway.client()
    assert client.resume()
    for number in (1, 2, 3):
        client.send(client.message(ExchangeType.INFORMATIONAL, number))
    gateway.loop.pass_time(0.02)
    assert gateway.installer.told == [(client.spis, number) for number in (2, 3, 4)]
    assert len(client.received()) == 3
    assert gateway.resumed == [client.stub]


@pytest.mark.parametrize(
    ("exchange", "payloads"),
    [
        pytest.param(ExchangeType.CREATE_CHILD_SA, [(PayloadType.NONCE, bytes(32))], id="CREATE_CHILD_SA"),
        pytest.param(ExchangeType.INFORMATIONAL, [(PayloadType.DELETE, bytes((1, 0, 0, 0)))], id="DELETE"),
    ],
)
@pytest.mark.parametrize("checks", [0, 1])
def test_any_other_request_makes_the_activation_due_and_is_charons_then(
    gateway: Activating, exchange: ExchangeType, payloads: Any, checks: int
) -> None:
    client = gateway.client()
    assert client.resume()
    for number in range(checks):
        client.send(client.message(ExchangeType.INFORMATIONAL, 1 + number))
    octets = client.message(exchange, 1 + checks, payloads)
    request = client.send(octets)
    again = client.send(octets)
    assert (request.fate, again.fate) == ([], ["dropped"])
    gateway.loop.pass_time(QUICK)
    assert gateway.installer.activations == [1]
    assert request.fate == ["accepted"]
    assert len(client.received()) == checks
    # what is only held confirms nothing: charon does, once it has it
    assert gateway.resumed == ([client.stub] if checks else [])
    charon_verifies(gateway, client, 2 + checks)
    gateway.loop.pass_time(0.02)
    assert gateway.resumed == [client.stub]


def test_a_request_that_a_dead_charon_would_have_to_process_confirms_nothing(gateway: Activating) -> None:
    client = gateway.client()
    assert client.resume()
    gateway.channel.up = False
    client.send(client.confirmation().request)
    client.send(client.message(ExchangeType.CREATE_CHILD_SA, 1, [(PayloadType.NONCE, bytes(32))]))
    gateway.loop.pass_time(0.1)
    assert gateway.resumed == []
    assert client.received() == []
    # it can go on with its old stub elsewhere
    assert client.stub.index in gateway.bank.stubs


def crowd(gateway: Activating, size: int) -> list[Client]:
    """So many clients that came at once and were answered."""
    clients = [gateway.client(SOURCES[number % 2]) for number in range(size)]
    gateway.receive(*[client.request() for client in clients])
    gateway.loop.pass_time(QUICK)
    assert all(client.is_answered() for client in clients)
    return clients


def test_in_a_crowd_the_activation_comes_first(gateway: Activating) -> None:
    gateway.loop.pass_time(1.0)
    clients = crowd(gateway, activation.CROWD)
    assert not gateway.installer.landed
    assert sum(gateway.installer.activations) == len(clients)


def test_many_that_wait_for_their_activation_are_no_crowd(gateway: Activating) -> None:
    gateway.loop.pass_time(1.0)
    clients = crowd(gateway, activation.CROWD - 1) + crowd(gateway, activation.CROWD - 1)
    assert gateway.installer.landed.keys() == {client.spis for client in clients}
    assert gateway.installer.activations == []
    for client in clients:
        client.send(client.confirmation().request)
    gateway.loop.pass_time(QUICK)
    assert {stub.index for stub in gateway.resumed} == {client.stub.index for client in clients}


def test_the_first_requests_of_a_crowd_do_not_come_here(loop: FakeTime) -> None:
    tag = b"\x1f\x2e"
    gateway = Activating(loop, tag=tag)
    loop.run(gateway.start())
    gateway.knows()
    loop.pass_time(1.0)
    clients = crowd(gateway, activation.CROWD)
    assert not any(client.spi_r.endswith(tag) for client in clients)
    charon_verifies(gateway, clients[-1])
    loop.pass_time(1.0)
    assert clients[-1].stub in gateway.resumed
    alone = gateway.client()
    assert alone.resume()
    assert alone.spi_r.endswith(tag)
    loop.run(gateway.close())


@pytest.mark.parametrize("why", ["it is late", "each segment has a handshake"])
def test_while_activations_do_not_come_no_client_is_told_that_it_is_resumed(
    gateway: Activating, monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    monkeypatch.setattr(gateway.installer, "wait", lambda: 3600.0)
    if why == "it is late":
        assert gateway.client().resume()
        gateway.loop.pass_time(activation.WINDOW_MOST + activation.LATE_SECONDS)
    else:
        gateway.installer.blocked = True
    for _ in range(3):
        assert not gateway.client().resume()
    monkeypatch.undo()


def test_a_charon_that_was_restarted_is_not_answered_for(gateway: Activating) -> None:
    client = gateway.client()
    assert client.resume()
    octets = client.confirmation().request
    client.send(octets)
    gateway.loop.pass_time(1.0)
    assert len(client.received()) == 1
    gateway.charon.tracker.forget_all()
    client.send(octets)
    assert len(client.received()) == 1


def test_a_liveness_check_from_another_port_is_charons(gateway: Activating) -> None:
    """A NAT that maps the client anew: charon moves the SA, or does not."""
    client = gateway.client()
    assert client.resume()
    request = client.send(client.confirmation().request, ELSEWHERE)
    assert request.fate == []
    gateway.loop.pass_time(QUICK)
    assert request.fate == ["accepted"]
    assert client.received() == []


def test_strays_have_no_answer_and_no_effect(gateway: Activating) -> None:
    client, other = gateway.client(), gateway.client()
    assert client.resume()
    assert other.resume()
    right = client.message(ExchangeType.INFORMATIONAL)
    child = client.message(ExchangeType.CREATE_CHILD_SA, 1, [(PayloadType.NONCE, bytes(32))])
    foreign = other.message(ExchangeType.INFORMATIONAL)
    wrong = {
        "wrong checksum": right[:-1] + bytes((right[-1] ^ 1,)),
        "CREATE_CHILD_SA with a wrong checksum": child[:-1] + bytes((child[-1] ^ 1,)),
        "another SA's": client.spis + foreign[16:],
        "a Message ID to come": client.message(ExchangeType.INFORMATIONAL, 2),
        "cut": right[:40],
    }
    for name, octets in wrong.items():
        assert client.send(octets).fate == ["dropped"], name
    gateway.loop.pass_time(0.01)
    assert (client.received(), gateway.resumed, gateway.installer.told) == ([], [], [])
    assert len(gateway.installer.landed) == 2
    assert client.send(right).fate == ["dropped"]
    assert len(client.received()) == 1
    # an old request again, once the next one was answered
    client.send(client.message(ExchangeType.INFORMATIONAL, 2))
    assert client.send(right).fate == ["dropped"]
    assert len(client.received()) == 2


def test_the_delete_of_an_sa_that_was_rekeyed_reaches_charon(gateway: Activating) -> None:
    client = gateway.client()
    assert client.resume()
    client.send(client.confirmation().request)
    gateway.loop.pass_time(1.0)
    # charon reports that the old one is gone once the new one is there
    gateway.charon.tracker.end(gateway.charon.tracker.sas[client.spis].id)
    assert client.send(client.message(ExchangeType.INFORMATIONAL, 3)).fate == ["accepted"]


def test_requests_about_no_sa_are_dropped_in_a_flood_only(gateway: Activating) -> None:
    client = gateway.client()
    assert client.resume()
    right = client.message(ExchangeType.INFORMATIONAL)
    requests = [client.send(os.urandom(16) + right[16:]) for _ in range(round(strays.RATE) + 10)]
    assert requests[0].fate == ["accepted"]
    assert requests[-1].fate == ["dropped"]
    assert client.send(right).fate == ["dropped"]
    assert len(client.received()) == 1


def test_requests_of_charons_own_sas_that_look_like_it_pass(gateway: Activating) -> None:
    client = gateway.client()
    sa = IkeSa(IkeId.of(b"another1", b"another2", False), client.stub.suite, b"")
    gateway.charon.tracker.sas[sa.id.spis] = sa
    assert client.send(sa.id.spis + os.urandom(40)).fate == ["accepted"]
    # one that this sidecar has still to learn about
    gateway.charon.reconciled.clear()
    assert client.send(os.urandom(56)).fate == ["accepted"]


def test_what_comes_within_a_window_shares_an_activation(gateway: Activating) -> None:
    clients = [gateway.client(source) for source in SOURCES for _ in range(3)]
    for client in clients:
        assert client.resume(0.01)
        client.send(client.confirmation().request)
    assert gateway.installer.activations == []
    gateway.loop.pass_time(activation.WINDOW_LEAST)
    assert gateway.installer.activations == [len(clients)]
    assert len(gateway.resumed) == len(clients)


def test_the_window_grows_with_what_an_activation_takes(gateway: Activating) -> None:
    gateway.installer.toggle_seconds = 1.0
    client = gateway.client()
    assert client.resume()
    gateway.loop.pass_time(activation.WINDOW_MOST * 0.9)
    assert gateway.installer.activations == []
    gateway.loop.pass_time(activation.WINDOW_MOST)
    assert gateway.installer.activations == [1]


def test_an_sa_that_is_not_confirmed_is_active_after_a_window_too_and_removed_in_time(gateway: Activating) -> None:
    client = gateway.client()
    assert client.resume()
    gateway.loop.pass_time(1.0)
    assert gateway.installer.activations == [1]
    assert client.send(client.confirmation().request).fate == ["accepted"]
    gateway.loop.pass_time(20.0)
    assert client.spis not in gateway.installer.installed
    assert gateway.resumed == []


def test_a_charon_that_died_in_the_window_has_nothing_to_answer_and_nothing_is_answered_for_it(
    gateway: Activating,
) -> None:
    client = gateway.client()
    assert client.resume()
    gateway.channel.up = False
    check = client.message(ExchangeType.INFORMATIONAL)
    request = client.send(check)
    assert client.received() == []
    assert request.fate == []

    async def lost() -> None:
        gateway.installer.landed.clear()
        gateway.responder.activation.lost([client.spis])

    gateway.loop.run(lost())
    assert request.fate == ["dropped"]
    assert client.send(check).fate != []
    assert client.received() == []
    assert len(gateway.responder.activation) == 0


def test_an_activation_that_fails_is_tried_again_and_requests_wait_for_it(gateway: Activating) -> None:
    client = gateway.client()
    assert client.resume()
    gateway.installer.failure = ChannelError("cannot find out which handshakes are in progress")
    request = client.send(client.message(ExchangeType.CREATE_CHILD_SA, 1, [(PayloadType.NONCE, bytes(32))]))
    gateway.loop.pass_time(activation.RETRY_SECONDS / 2)
    assert request.fate == []
    gateway.loop.pass_time(activation.RETRY_SECONDS)
    assert request.fate == ["accepted"]
    assert gateway.installer.activations == [1]


def test_a_charon_that_hangs_gets_no_answers_given_in_its_name_for_long(
    gateway: Activating, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gateway.installer, "wait", lambda: 3600.0)
    client = gateway.client()
    assert client.resume()
    client.send(client.confirmation().request)
    gateway.loop.pass_time(activation.OVERDUE_SECONDS + 1)
    # its activation may have to wait
    assert client.send(client.message(ExchangeType.INFORMATIONAL, 2)).fate == ["dropped"]
    assert len(client.received()) == 2
    gateway.installer.reads = False
    assert client.send(client.message(ExchangeType.INFORMATIONAL, 3)).fate == []
    assert len(client.received()) == 2


def test_a_sidecar_that_stops_leaves_what_is_confirmed_active_and_nothing_else(gateway: Activating) -> None:
    confirmed, other = gateway.client(), gateway.client()
    assert confirmed.resume(0.01)
    assert other.resume(0.01)
    confirmed.send(confirmed.confirmation().request)
    gateway.loop.pass_time(0.01)
    before = set(gateway.installer.installed)
    gateway.loop.run(gateway.close())
    assert before - set(gateway.installer.installed) == {other.spis}
    assert gateway.installer.activations == [1]
    assert not gateway.installer.landed


def test_an_sa_whose_session_ended_meanwhile_is_activated_so_that_its_client_gets_a_delete(
    gateway: Activating, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended: list[tuple[set[bytes], bool]] = []

    async def end(spis: set[bytes]) -> int:
        ended.append((spis, bool(gateway.installer.landed)))
        return 1

    monkeypatch.setattr(gateway.charon, "end", end)
    client = gateway.client()
    assert client.resume()
    gateway.bank.over.add(client.stub.index)
    client.send(client.confirmation().request)
    gateway.loop.pass_time(0.02)
    assert gateway.resumed == []
    assert [spis for spis, _ in ended] == [{client.spis}]


def test_of_one_sa_few_requests_are_held(gateway: Activating, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway.installer, "wait", lambda: 3600.0)
    client = gateway.client()
    assert client.resume()
    fates = [
        client.send(client.message(ExchangeType.CREATE_CHILD_SA, 1, [(PayloadType.NONCE, os.urandom(32))])).fate
        for _ in range(activation.HELD_OF_ONE + 3)
    ]
    assert fates == [[]] * activation.HELD_OF_ONE + [["dropped"]] * 3


def test_no_more_than_a_bound_is_held_of_all(gateway: Activating, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway.installer, "wait", lambda: 3600.0)
    monkeypatch.setattr(activation, "HELD_MAX", 2)
    fates = []
    for _ in range(3):
        client = gateway.client()
        assert client.resume(0.01)
        fates.append(client.send(client.message(ExchangeType.CREATE_CHILD_SA)).fate)
    assert fates == [[], [], ["dropped"]]


def test_keys_are_derived_when_the_first_request_comes(gateway: Activating) -> None:
    client = gateway.client()
    assert client.resume()
    entry = gateway.responder.activation._entries[client.spis]
    assert entry.requests is None
    first = client.confirmation().request
    client.send(first)
    derived = entry.requests
    assert derived is not None
    client.send(first)
    assert entry.requests is derived


@pytest.mark.parametrize("turns", [0, 5])
def test_an_sa_that_is_being_removed_is_not_confirmed_any_more(
    gateway: Activating, monkeypatch: pytest.MonkeyPatch, turns: int
) -> None:
    """charon may take long to read what it is told."""
    client = gateway.client()
    assert client.resume()
    gateway.loop.pass_time(1.0)
    removed: list[IkeId] = []

    async def remove(ike_ids: Sequence[IkeId], **options: Any) -> None:
        gateway.responder.unconfirmed.verified(ike_ids[0])
        for _ in range(turns):
            await asyncio.sleep(0)
        removed.extend(ike_ids)

    monkeypatch.setattr(gateway.charon, "remove", remove)
    gateway.loop.pass_time(12.0)
    assert [ike_id.spis for ike_id in removed] == [client.spis]
    assert gateway.resumed == []
    assert client.stub.index in gateway.bank.stubs


def test_a_passive_sa_that_is_being_removed_answers_nothing(
    gateway: Activating, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gateway.installer, "wait", lambda: 3600.0)
    client = gateway.client()
    assert client.resume()
    fates = []

    async def remove(ike_ids: Sequence[IkeId], **_: Any) -> None:
        request = Request(client.source, client.confirmation().request)
        gateway.responder.packets(as_packets([request]))
        fates.append(request.fate)

    monkeypatch.setattr(gateway.charon, "remove", remove)
    gateway.loop.pass_time(12.0)
    assert fates == [["dropped"]]
    assert client.received() == []
    assert gateway.resumed == []


def test_an_sa_that_was_removed_while_charon_took_it_in_is_not_waited_for(gateway: Activating) -> None:
    client, other = gateway.client(), gateway.client()
    assert client.resume(0.01)
    # without a word
    gateway.installer.landed.pop(client.spis)
    gateway.loop.pass_time(1.0)
    assert len(gateway.responder.activation) == 0
    assert other.resume(0.01)
    made = gateway.responder.unconfirmed._by_spis[other.spis]
    gateway.loop.pass_time(1.0)

    async def late() -> None:
        gateway.responder.activation.landed(made)

    gateway.loop.run(late())
    assert len(gateway.responder.activation) == 0
    assert gateway.installer.activations == [1]


def test_a_request_that_is_held_during_an_activation_takes_no_window_from_the_next_sas(gateway: Activating) -> None:
    gateway.installer.toggle_seconds = 0.05
    first, second = gateway.client(), gateway.client()
    assert first.resume(0.01)
    assert second.resume(0.01)
    first.send(first.message(ExchangeType.CREATE_CHILD_SA))
    gateway.loop.pass_time(0.02)
    assert gateway.installer.activating
    request = second.send(second.message(ExchangeType.CREATE_CHILD_SA))
    gateway.loop.pass_time(0.1)
    assert request.fate == ["accepted"]
    gateway.installer.toggle_seconds = 0.001
    third = gateway.client()
    assert third.resume(activation.WINDOW_LEAST / 2)
    assert list(gateway.installer.landed) == [third.spis]
