"""Each release's charon answers a version probe (bridge.ike.version_probe), and knows no SA of it."""

from __future__ import annotations

import os

import pytest

from bridge.ike.version_probe import answers_version_probe, build_version_probe
from bridge.lab import Lab, standard
from bridge.lab.releases import RELEASES
from probe_support import send

pytestmark = [pytest.mark.lab, pytest.mark.releases]


@pytest.mark.parametrize("release", RELEASES)
def test_a_charon_answers_a_version_probe_and_keeps_nothing_of_it(release: str) -> None:
    with Lab() as lab:
        topology = standard(lab, start=False, releases={"gw1": release})
        topology.gw1.charon.start()
        spi = os.urandom(8)
        [answer] = send(topology, build_version_probe(spi), to=topology.gw1)
        assert answers_version_probe(answer, spi)
        assert not topology.gw1.charon.sas()
