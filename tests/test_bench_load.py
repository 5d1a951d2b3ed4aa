"""The benchmarks' simulated clients (bridge.bench.generator) at a real gateway."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from bridge.bench.rig import Rig, rig
from bridge.bench.sessions import Children
from bridge.bench.storm import resumptions
from bridge.lab.daemon import wait_until

COUNT = 20


@pytest.fixture(scope="module")
def built() -> Iterator[Rig]:
    with rig() as made:
        made.take_model()
        made.kill_first_gateway()
        yield made


def child_sas(built: Rig) -> int:
    """How many CHILD_SAs the gateway's charon has."""
    return sum(len(sa["child-sas"]) for sa in built.target.charon.sas())


def test_simulated_clients_resume_with_forward_secrecy(built: Rig) -> None:
    seen = resumptions(built, COUNT, COUNT, forward_secrecy=True)
    assert seen["failures"] == 0, seen
    assert built.order("end", None) == {"ended": COUNT}
    wait_until(lambda: not built.target.charon.sas(), "a gateway without IKE_SAs")


@pytest.mark.parametrize(("form", "each"), [(Children.NONE, 0), (Children.AT_ONCE, 1), (Children.CREATE, 1)])
def test_simulated_clients_resume_with_the_child_sas_they_ask_for_and_go(built: Rig, form: Children, each: int) -> None:
    seen = resumptions(built, COUNT, COUNT, form)
    assert seen["failures"] == 0, seen
    assert len(built.target.charon.sas()) == COUNT
    assert child_sas(built) == each * COUNT
    assert built.order("end", None) == {"ended": COUNT}
    wait_until(lambda: not built.target.charon.sas(), "a gateway without IKE_SAs")
