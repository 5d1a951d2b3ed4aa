"""What the sidecars export over HTTP, and the level of their logs."""

from __future__ import annotations

import asyncio
import urllib.request
from collections.abc import Iterator
from functools import partial

import pytest
import structlog
from prometheus_client.parser import text_string_to_metric_families

from bridge.client.metrics import ClientMetrics
from bridge.gateway.admission import Demand
from bridge.gateway.metrics import GatewayMetrics
from bridge.gateway.refusal import Refusal
from bridge.service import log
from bridge.service.metrics import Metrics


def scrape(port: int) -> dict[str, float]:
    """Every sample, labels in the name."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        families = text_string_to_metric_families(answer.read().decode())
        return {
            sample.name + "".join(f"[{value}]" for value in sample.labels.values()): sample.value
            for family in families
            for sample in family.samples
        }


async def scraped(metrics: Metrics, port: int) -> dict[str, float]:
    server = metrics.serve(f"127.0.0.1:{port}")
    try:
        return await asyncio.to_thread(scrape, port)
    finally:
        await server.close()


async def test_values_are_read_on_the_event_loop_alone(unused_tcp_port: int) -> None:
    seen: list[asyncio.AbstractEventLoop] = []
    metrics = Metrics()

    def read() -> float:
        seen.append(asyncio.get_running_loop())
        return 7.0

    metrics.gauge("gauge", "a value", read)
    metrics.total("counter", "a count", read)
    found = await scraped(metrics, unused_tcp_port)
    assert found["ike_sa_sync_gauge"] == found["ike_sa_sync_counter_total"] == 7.0
    assert set(seen) == {asyncio.get_running_loop()}


async def test_what_has_not_happened_yet_is_there_as_zero(unused_tcp_port: int) -> None:
    metrics = GatewayMetrics()
    metrics.expect(Refusal, Demand)
    found = await scraped(metrics, unused_tcp_port)
    assert {found[f"ike_sa_sync_refusals_total[{reason}]"] for reason in Refusal} == {0.0}
    assert {found[f"ike_sa_sync_cookies_total[{reason}]"] for reason in Demand} == {0.0}
    assert found["process_resident_memory_bytes"] > 0
    assert not any(name.endswith("_created") for name in found)


async def test_the_outcomes_of_a_client_are_counted_with_their_reasons(unused_tcp_port: int) -> None:
    metrics = ClientMetrics()
    metrics.outcome("fallback", "refused")
    metrics.outcome("failed", "no-ike-sa")
    assert metrics.values()["moves_total[fallback,refused]"] == 1
    found = await scraped(metrics, unused_tcp_port)
    assert found["ike_sa_sync_moves_total[no-ike-sa][failed]"] == 1


async def test_the_values_for_status_are_those_of_the_sidecar_alone() -> None:
    assert not any(name.startswith("process") for name in GatewayMetrics().values())


async def test_what_nobody_asked_for_is_not_read() -> None:
    metrics = GatewayMetrics()
    read: list[str] = []

    def value(name: str) -> float:
        read.append(name)
        return 1.0

    for name in ("wanted", "other"):
        metrics.gauge(name, "a gauge", partial(value, name))
        metrics.total(f"{name}_sum", "a total", partial(value, name))
    assert metrics.values("wanted").keys() == {"wanted", "wanted_sum_total"}
    assert read == ["wanted", "wanted"]
    everything = metrics.values()
    assert {"wanted", "wanted_sum_total", "other", "other_sum_total", "requests_total"} <= everything.keys()
    assert metrics.values("refusals", "requests").keys() == {
        name for name in everything if name.startswith(("refusals", "requests"))
    }


@pytest.fixture
def _own_log() -> Iterator[None]:
    """Its stderr is closed after the test: what logs later must not write there."""
    yield
    structlog.reset_defaults()


@pytest.mark.usefixtures("_own_log")
def test_the_level_of_the_log_changes_while_loggers_are_in_use(capsys: pytest.CaptureFixture[str]) -> None:
    log.configure("warning")
    logger = structlog.get_logger()
    logger.info("first")
    log.set_level("debug")
    logger.debug("second", spi_i="00")
    log.set_level("error")
    logger.warning("third")
    logger.error("fourth")
    said = capsys.readouterr().err
    assert [line.split("event=")[1].split()[0] for line in said.splitlines()] == ["second", "fourth"]
    assert log.level() == "error"


def test_an_unknown_level_changes_nothing() -> None:
    log.set_level("info")
    with pytest.raises(log.LevelError, match="loud"):
        log.set_level("loud")
    assert log.level() == "info"
