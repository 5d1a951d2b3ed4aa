"""docs/protocol.md: every rule names its tests, the figures and the table of timers are those of the code."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from bridge.bank import interface
from bridge.client import gateway_probe, ike_transport, move_handler, race, stub_keeper, sync_request
from bridge.config import ClientConfig, GatewayConfig
from bridge.gateway import admission, announced_failure, announcer, client_stubs, decision, drain_run
from bridge.ike import cookie, keys
from bridge.ike.transforms import Suite
from bridge.stub import bank_keys, child_sa
from bridge.stub.readable import READABLE
from docs_support import DOCS, missing_tests

PAGE = DOCS / "protocol.md"
_TEST = re.compile(r"`test_\w+\.py::test_\w+`")
_RULE = re.compile(r"\b(MUST|MAY)\b")


def untested(text: str) -> Iterator[str]:
    """Lines with a rule that is not in a table row with a test in its last cell. RFC 8174: capitals alone are rules."""
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split(" | ")] if line.startswith("|") else []
        if _RULE.search(line):
            tested = len(cells) == 2 and _TEST.search(cells[1]) and not _TEST.sub("", cells[1]).strip(", ")
            if not tested or not _RULE.search(cells[0]):
                yield line


def rules(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("|") and _RULE.search(line)]


def test_every_rule_has_its_test() -> None:
    text = PAGE.read_text()
    # says what a rule is
    explained = [line for line in text.splitlines() if line.startswith("A rule is a sentence with MUST")]
    assert list(untested(text)) == explained
    assert len(rules(text)) > 70
    assert missing_tests(PAGE) == []


@pytest.mark.parametrize(
    "line",
    [
        "A client MUST send it.",
        "A client MAY send it.",
        "| A client MUST send it | |",
        "| A client MUST send it | somewhere |",
        "| A client MUST send it | `test_a.py::test_b`, and others |",
    ],
)
def test_a_rule_without_a_test_is_found(line: str) -> None:
    assert list(untested(line)) == [line]


def test_a_rule_with_a_test_that_does_not_exist_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("| A client MUST send it | `test_protocol_page.py::test_nothing_of_the_sort` |\n")
    assert list(untested(page.read_text())) == []
    assert missing_tests(page) == ["test_protocol_page.py::test_nothing_of_the_sort"]


def test_the_proposal_is_laid_out_as_its_figure_shows() -> None:
    said = PAGE.read_text().partition("\n### SAi1\n")[2].partition("\nAn AEAD has")[0]
    octets = b""
    for row in re.findall(r"^    \|(.+)\|$", said, re.MULTILINE):
        fields = [field.strip() for field in row.split("|")]
        # each column of the figure is two characters wide
        widths = [(len(field) + 1) // 16 for field in row.split("|")]
        values = [int(re.findall(r"\d+", field)[-1]) for field in fields]
        if fields[0].startswith("Next"):
            values = [34, 0, 0, values[-1]]
            widths = [1, 0, 1, 2]
        if fields[0].startswith("AF"):
            values[0] = 0x8000 | 14
        if fields[0].startswith("Type"):
            values[0] = int(re.findall(r"\d+", fields[0])[0])
        octets += b"".join(value.to_bytes(width) for value, width in zip(values, widths, strict=True))
    proposal = Suite(12, 128, 12, 5, 31).proposal()
    assert octets == bytes((34, 0)) + (4 + len(proposal)).to_bytes(2) + proposal


def test_every_kind_of_key_in_the_bank_is_on_the_page() -> None:
    names = {name: value for name, value in vars(bank_keys).items() if name.isupper() and isinstance(value, str)}
    keys = {value for value in names.values() if value.startswith("ike:")}
    keys |= {f"ike:{value}:" for name, value in names.items() if name.endswith("_KIND") and ":" not in value}
    rows = re.findall(r"^\| `(ike:[^`]+)` \|", PAGE.read_text(), re.MULTILINE)
    assert {key for key in keys if not any(row.startswith(key) for row in rows)} == set()


def test_the_readable_fields_of_a_stub_are_on_the_page() -> None:
    said = re.findall(
        r"`(\w+)`", PAGE.read_text().partition("The cleartext fields of a stub are texts: ")[2].partition(". ")[0]
    )
    assert said == list(READABLE)


def seconds(text: str) -> list[float]:
    """The numbers of a default."""
    return [float(number) for number in re.findall(r"[\d.]+", text)]


FIXED: dict[str, float | tuple[float, ...]] = {
    "and how long after either": admission.HOLD_SECONDS,
    "unconfirmed SAs of one stub": decision.ATTEMPTS_PER_STUB,
    "a secret makes cookies": cookie.SECRET_SECONDS,
    "each further one waits longer by the factor": ike_transport.BACK_OFF,
    "and asks the next one beside it after (RFC 8305)": race.NEXT_SECONDS,
    "cookies taken in one attempt": sync_request.MAX_COOKIES,
    "octets of a nonce": keys.NONCE_OCTETS,
    "CHILD_SAs in one round trip": child_sa.AT_ONCE,
    "octets of a stub that a client holds": client_stubs.HELD_OCTETS,
    "and how long it is good for": client_stubs.HELD_SECONDS,
    "between two answers to GET Stub of one SA": client_stubs.ANSWER_SECONDS,
    "answers to GET Stub a second": client_stubs.ANSWERS_A_SECOND,
    "the client waits after a change before it asks with GET Stub": stub_keeper.SETTLE_SECONDS,
    "then sends it again after": stub_keeper.RETRANSMIT_SECONDS,
    "and asks a gateway that did not answer again after at least": stub_keeper.RETRY_MIN,
    "a gateway sends Move again after": drain_run.ASK_SECONDS,
    "and gives a moving client up after": drain_run.MOVE_SECONDS,
    "and is written so many times in that time": interface.BEATS,
    "each Announcement waits for a report": announcer.ATTEMPTS,
    "sessions that are announced first": announcer.TRIAL,
    "those with traffic have before the others at most": announced_failure.HEAD_START,
    "and the rest after": announcer.TRIAL_SECONDS,
    "the next gateway's turn to announce a session comes after": announcer.TURN_SECONDS,
    "a client that is coming is waited for": announcer.ARRIVE_SECONDS,
    "a pause of announcements about a gateway that lives": announcer.PAUSE_SECONDS,
    "between two answers to Probes about one SA, which go to the address of its peer only": client_stubs.PROBED_SECONDS,
    "Probes to the gateway of the SA": gateway_probe.PROBES,
    "a client that moved answers that Move for": move_handler.ANSWER_SECONDS,
}


def test_timers_and_limits_are_those_of_the_code() -> None:
    table = PAGE.read_text().partition("\n## Timers and limits\n")[2]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line[:1] == "|"][2:]
    configs = {
        "sync": GatewayConfig().sync,
        "bank": GatewayConfig().bank,
        "resume": ClientConfig().resume,
        "failover": GatewayConfig().failover,
        "announce": ClientConfig().announce,
    }
    fixed = {}
    for what, where, default in rows:
        if where == "fixed":
            fixed[what] = seconds(default)
        else:
            section, _, key = where.strip("`").partition(".")
            assert seconds(default) == [getattr(configs[section], key)], where
    assert fixed == {what: list(value) if isinstance(value, tuple) else [value] for what, value in FIXED.items()}
