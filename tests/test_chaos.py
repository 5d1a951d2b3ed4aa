"""A few rounds of random disturbances of a whole installation; `make chaos` runs many."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

import pytest

from bridge.lab import Lab
from chaos.disturbances import KINDS, plan
from chaos.run import Chaos
from chaos.world import World

SEED = 11
ROUNDS = 3
MOST = 2
"""disturbances in a round"""

pytestmark = pytest.mark.lab


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with Lab() as lab:
        made = World(lab)
        made.begin()
        yield made


@pytest.mark.alone
def test_after_each_round_every_session_is_at_one_gateway_and_the_bank_has_its_stub(world: World) -> None:
    # a round takes ten seconds, and what it takes until all holds again
    chaos = Chaos(world, SEED, print, most=MOST)
    chaos.begin()
    for number in range(1, ROUNDS + 1):
        chaos.round(number)
    report = chaos.end()
    assert not report.violations, report.text()
    assert report.rounds == ROUNDS


def test_a_seed_and_a_round_say_what_happens(world: World) -> None:
    def events(seed: int) -> list[tuple[float, str]]:
        return [(event.at, event.text) for event in plan(world, Random(f"{seed}/1"), 3)]

    assert events(1) == events(1)
    assert [events(seed) for seed in range(9)] != [events(1)] * 9
    for kind in KINDS:
        assert all(0 <= event.at <= 10 for event in kind(world, Random(1)))
