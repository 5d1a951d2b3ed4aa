"""The version probe and its answer (bridge.ike.version_probe)."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bridge.ike.version_probe import answers_version_probe, build_version_probe

SPI = bytes.fromhex("6eeccdf2859daddb")
CHARON = bytes.fromhex("6eeccdf2859daddb00000000000000002920252000000000000000240000000800000005")
"""what charon 5.9.8 answered to a probe"""


def test_it_is_a_bare_header_of_major_version_3_with_the_spi_alone() -> None:
    assert build_version_probe(SPI).hex() == "6eeccdf2859daddb" + "00" * 8 + "00302508" + "00000000" + "0000001c"


def test_charons_answer_is_known() -> None:
    assert answers_version_probe(CHARON, SPI)


@pytest.mark.parametrize("offset", [0, 7, 17, 19, 27, 35])
def test_another_spi_version_direction_length_or_notification_is_none(offset: int) -> None:
    altered = bytearray(CHARON)
    altered[offset] ^= 0x20
    assert not answers_version_probe(bytes(altered), SPI)


@given(st.binary(max_size=80))
def test_nothing_makes_it_raise(octets: bytes) -> None:
    assert not answers_version_probe(octets, SPI)
    answers_version_probe(SPI + octets, SPI)
