"""A client's metrics."""

from __future__ import annotations

from bridge.service.metrics import Metrics


class ClientMetrics(Metrics):
    """Counters of the client."""

    def __init__(self) -> None:
        super().__init__()
        self._outcomes = self.counter("moves", "attempts to move, by outcome", ("result", "reason"))
        # a rate needs a value before the first
        for result, reason in (
            ("resumed", ""),
            ("fallback", "refused"),
            ("fallback", "no-traffic"),
            ("failed", "no-answer"),
        ):
            self._outcomes.labels(result, reason)
        self.exchange_seconds = self.histogram("exchange_seconds", "request sent to answer accepted")
        self.total_seconds = self.histogram("total_seconds", "request sent to the CHILD_SAs up")

    def outcome(self, result: str, reason: str | None) -> None:
        """Count one attempt."""
        self._outcomes.labels(result, reason or "").inc()
