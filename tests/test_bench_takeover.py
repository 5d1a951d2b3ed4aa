"""`bench takeover`: its ordinary clients answer a real gateway that takes their sessions over."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from bank_support import stub_of
from bridge.bench import vrrp
from bridge.bench.aims import aims
from bridge.bench.cli import bench
from bridge.bench.ordinary import Ordinary, with_known_keys
from bridge.bench.rig import rig
from bridge.bench.takeover import SHARED, section, takeover
from bridge.bench.vrrp import returned
from bridge.ike.encrypted_payload import protect, unprotect
from bridge.ike.message import ExchangeType, PayloadType
from bridge.lab.demo import Traffic

SESSIONS = 40
CLIENTS = 2
WHOLE = {
    "clients": 20,
    "continued": 19,
    "detection_ms": 1080,
    "silence_ms": {"p50": 1260, "max": 1381},
    "beyond_ms": {"p50": 180, "max": 301},
}
"""a result of the run with keepalived"""


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
    result["vrrp"] = WHOLE
    text, plot = section(result)
    assert f"{SESSIONS} sessions" in text
    assert "| beyond VRRP's detection, 1,080 ms | 180 ms | 301 ms |" in text
    assert "19 of 20 clients continued" in text
    assert plot.startswith("<svg")


@pytest.mark.lab
def test_real_clients_go_on_when_keepalived_moves_the_address() -> None:
    with vrrp.vrrp_lab(CLIENTS) as whole:
        result = vrrp.measure(whole, lambda what, share: None)
    assert (result["clients"], result["continued"]) == (CLIENTS, CLIENTS)
    # traffic comes back after the address
    assert result["beyond_ms"]["max"] > 0


def test_the_time_beyond_detection_begins_when_the_address_comes_and_ends_with_an_answer_of_the_other_gateway() -> None:
    """Killing all of a gateway takes a while, in which it may still answer."""
    quick = Traffic({1: 99.9, 2: 100.5, 3: 101.6}, 3)
    late = Traffic({1: 99.9, 2: 101.2, 3: 102.0}, 3)
    lost = Traffic({1: 99.9, 2: 101.2}, 3)
    [first] = returned([quick], began=100.0, killed=100.6, came=101.0)
    assert first == pytest.approx((1.1, 0.6))
    # the address came before charon was gone
    [first] = returned([late, lost], began=100.0, killed=101.3, came=101.0)
    assert first == pytest.approx((1.3, 1.0))


def test_clients_whose_traffic_did_not_come_back_leave_no_aim_met() -> None:
    nothing = {"p50": 0, "max": 0}
    failed = {**WHOLE, "continued": 0, "silence_ms": nothing, "beyond_ms": nothing}
    result = {"sessions": 1, "failures": 0, "keyed_ms": {"first": 1, "last": 1}, "vrrp": failed}
    assert [aim.met for aim in aims({"takeover": result}) if aim.what.startswith("keepalived")] == [False, False]


def test_the_aims_name_what_was_missed() -> None:
    result = {"sessions": 10_000, "failures": 0, "keyed_ms": {"first": 101, "last": 5000}, "vrrp": WHOLE}
    found = {aim.what: (aim.wanted, aim.measured, aim.met) for aim in aims({"takeover": result})}
    assert found == {
        "takeover, 10,000 sessions: without new keys": ("0", "0", True),
        "takeover, 10,000 sessions: first client": ("100 ms", "101 ms", False),
        "takeover, 10,000 sessions: last client": ("5 s", "5.0 s", True),
        "keepalived, 20 clients: did not continue": ("0", "1", False),
        "keepalived, 20 clients: longest silence, beyond VRRP's detection": ("300 ms", "301 ms", False),
    }


def test_a_plot_of_one_part_is_refused(tmp_path: Path) -> None:
    done = CliRunner().invoke(bench, ["takeover", "--only", "vrrp", "--plot", str(tmp_path / "plot.svg")])
    assert done.exit_code == 2
    assert "--only" in done.output
