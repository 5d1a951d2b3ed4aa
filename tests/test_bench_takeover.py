"""`bench takeover`: its ordinary clients answer a real gateway that takes their sessions over."""

from __future__ import annotations

import pytest

from bank_support import stub_of
from bridge.bench.ordinary import Ordinary, with_known_keys
from bridge.bench.rig import rig
from bridge.bench.takeover import SHARED, section, takeover
from bridge.ike.encrypted_payload import protect, unprotect
from bridge.ike.message import ExchangeType, PayloadType

SESSIONS = 40


def test_an_ordinary_client_answers_a_request_once_and_the_same_again() -> None:
    stub, outgoing, incoming = with_known_keys(stub_of(), "192.0.2.1")
    [child] = stub.children
    client = Ordinary(stub.spi_i, stub.spi_r, "10.0.0.1", child, outgoing, incoming, 7)

    def request(message_id: int, exchange: int, payloads: list[tuple[int, bytes]]) -> bytes:
        iv = bytes(incoming.iv_length)
        return protect(
            incoming, spi_i=stub.spi_i, spi_r=stub.spi_r, exchange=exchange, flags=0, message_id=message_id,
            payloads=payloads, iv=iv,
        )  # fmt: skip

    asked = request(0, ExchangeType.CREATE_CHILD_SA, [(PayloadType.TS_I, b"i"), (PayloadType.TS_R, b"r")])
    answer = client.request(asked, 1.0)
    assert answer is not None
    _, payloads = unprotect(outgoing, answer)
    assert [one.type for one in payloads] == [PayloadType.SA, PayloadType.NONCE, PayloadType.TS_I, PayloadType.TS_R]
    assert client.request(asked, 2.0) == answer
    assert client.request(request(2, ExchangeType.INFORMATIONAL, []), 3.0) is None
    assert (client.asked, client.keyed) == (1.0, 0.0)
    assert client.request(request(1, ExchangeType.INFORMATIONAL, [(PayloadType.DELETE, bytes(8))]), 4.0)
    assert client.keyed == 4.0


@pytest.mark.lab
def test_a_gateway_takes_their_sessions_over_and_resumes_others() -> None:
    with rig(shared=SHARED) as built:
        built.take_model()
        result = takeover(built, SESSIONS, lambda what, share: None)
    assert (result["failures"], result["not_taken"]) == (0, [])
    # and the session of the model, if its client has not given it up before
    assert result["taken"] in (SESSIONS, SESSIONS + 1)
    assert result["resumptions"]["failures"] == 0
    text, plot = section(result)
    assert f"{SESSIONS} sessions" in text
    assert plot.startswith("<svg")
