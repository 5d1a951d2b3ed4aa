"""What the sidecars count, for Prometheus and for `ike-sa-sync status`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
)
from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

from bridge.config import parse_host_port
from bridge.service.metrics_server import MetricsServer

PREFIX = "ike_sa_sync"
_SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)

disable_created_metrics()  # type: ignore[no-untyped-call]


class Metrics:
    """A registry of one process. `serve` makes it readable over HTTP."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._totals = _Totals()
        self._others: list[tuple[str, Collector]] = []
        """counters, histograms and gauges, by name without the prefix"""
        self.registry.register(self._totals)
        ProcessCollector(registry=self.registry)

    def counter(self, name: str, text: str, labels: tuple[str, ...] = ()) -> Counter:
        made = Counter(name, text, labels, namespace=PREFIX, registry=self.registry)
        self._others.append((name, made))
        return made

    def histogram(self, name: str, text: str) -> Histogram:
        made = Histogram(name, text, namespace=PREFIX, registry=self.registry, buckets=_SECONDS)
        self._others.append((name, made))
        return made

    def gauge(self, name: str, text: str, read: Callable[[], float]) -> None:
        """A value that is read when it is asked for."""
        made = Gauge(name, text, namespace=PREFIX, registry=self.registry)
        made.set_function(read)
        self._others.append((name, made))

    def total(self, name: str, text: str, read: Callable[[], float]) -> None:
        """A value that only grows, counted elsewhere and read when it is asked for; `_total` is added to its name."""
        self._totals.add(name, text, read)

    def serve(self, address: str) -> MetricsServer:
        """Serve at `address` (host:port) from now on. Raises OSError when the port is taken."""
        server = MetricsServer(self.registry, *parse_host_port(address))
        server.start()
        return server

    def values(self, *starts: str) -> dict[str, Any]:
        """All counters and gauges, by name without the prefix, labels in brackets; or those whose name begins with one
        of `starts`: no other is read, which for some means to ask the kernel."""
        wanted = starts or ("",)
        found: dict[str, Any] = {}
        families = chain(
            self._totals.those(wanted),
            *(collector.collect() for name, collector in self._others if name.startswith(wanted)),
        )
        for family in families:
            for sample in family.samples:
                if sample.name.endswith("_bucket"):
                    continue
                labels = ",".join(filter(None, sample.labels.values()))
                name = sample.name.removeprefix(f"{PREFIX}_")
                found[f"{name}[{labels}]" if labels else name] = sample.value
        return found


class _Totals(Collector):
    """Counters that live elsewhere."""

    def __init__(self) -> None:
        self._reads: list[tuple[str, str, Callable[[], float]]] = []

    def add(self, name: str, text: str, read: Callable[[], float]) -> None:
        self._reads.append((name, text, read))

    def collect(self) -> Iterator[Metric]:
        return self.those(("",))

    def those(self, starts: tuple[str, ...]) -> Iterator[Metric]:
        for name, text, read in self._reads:
            if name.startswith(starts):
                yield CounterMetricFamily(f"{PREFIX}_{name}", text, value=read())
