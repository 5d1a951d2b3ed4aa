"""What the sidecars count, for Prometheus and for `ike-sa-sync status`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

from bridge.config import parse_host_port

PREFIX = "ike_sa_sync"
_SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)


class Metrics:
    """A registry of one process. `serve` makes it readable over HTTP."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()

    def counter(self, name: str, text: str, labels: tuple[str, ...] = ()) -> Counter:
        return Counter(name, text, labels, namespace=PREFIX, registry=self.registry)

    def histogram(self, name: str, text: str) -> Histogram:
        return Histogram(name, text, namespace=PREFIX, registry=self.registry, buckets=_SECONDS)

    def gauge(self, name: str, text: str, read: Callable[[], float]) -> None:
        """A value that is read when it is asked for."""
        Gauge(name, text, namespace=PREFIX, registry=self.registry).set_function(read)

    def serve(self, address: str | None) -> Callable[[], None]:
        """Serve at `address` (host:port); returns what stops it. Raises OSError when the port is taken."""
        if address is None:
            return lambda: None
        host, port = parse_host_port(address)
        server, thread = start_http_server(port, host, registry=self.registry)

        def stop() -> None:
            server.shutdown()
            server.server_close()
            thread.join(timeout=2)

        return stop

    def values(self) -> dict[str, Any]:
        """All counters and gauges, by name without the prefix, labels in brackets."""
        found: dict[str, Any] = {}
        for family in self.registry.collect():
            for sample in family.samples:
                if sample.name.endswith(("_created", "_bucket")):
                    continue
                labels = ",".join(sample.labels.values())
                name = sample.name.removeprefix(f"{PREFIX}_")
                found[f"{name}[{labels}]" if labels else name] = sample.value
        return found


class GatewayMetrics(Metrics):
    """Counters of the gateway."""

    def __init__(self) -> None:
        super().__init__()
        self.requests = self.counter("requests", "IKE_SA_INIT requests with IKE_SA_SYNC")
        self.malformed = self.counter("malformed_requests", "IKE_SA_INIT requests that could not be parsed")
        self.retransmissions = self.counter("retransmissions", "requests that were seen before")
        self.resumed = self.counter("resumptions", "rebuilt IKE_SAs that were confirmed")
        self._refused = self.counter("refusals", "requests with IKE_SA_SYNC that went on to charon", ("reason",))
        self._cookies = self.counter(
            "cookies", "requests with IKE_SA_SYNC that were answered with a cookie", ("reason",)
        )
        self.removed = self.counter("unconfirmed_removed", "rebuilt IKE_SAs removed because none confirmed them")
        self.bank_errors = self.counter("bank_errors", "failed look-ups in the bank")
        self.bank_seconds = self.histogram("bank_get_seconds", "time to fetch the stubs of one batch of requests")
        self.install_seconds = self.histogram("install_seconds", "time to install and activate one batch of IKE_SAs")

    def refused(self, reason: str) -> None:
        """Count a request that went on to charon."""
        self._refused.labels(str(reason)).inc()

    def challenged(self, reason: str) -> None:
        """Count a request that has to come again with a cookie."""
        self._cookies.labels(str(reason)).inc()


class ClientMetrics(Metrics):
    """Counters of the client."""

    def __init__(self) -> None:
        super().__init__()
        self._outcomes = self.counter("moves", "attempts to move, by outcome", ("result", "reason"))
        self.exchange_seconds = self.histogram("exchange_seconds", "request sent to answer accepted")
        self.total_seconds = self.histogram("total_seconds", "request sent to the CHILD_SAs up")

    def outcome(self, result: str, reason: str | None) -> None:
        """Count one attempt."""
        self._outcomes.labels(result, reason or "").inc()
