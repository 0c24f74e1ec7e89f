"""Metrics of `/metrics`, in Prometheus' text format."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    """The counters of one server, in a separate registry."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "lgnet_requests", "Requests answered, by path and status", ["path", "code"], registry=self.registry
        )
        self.seconds = Histogram(
            "lgnet_seconds", "Seconds by phase of a request", ["phase"], buckets=_SECONDS, registry=self.registry
        )
        self.batches = Histogram(
            "lgnet_batch_windows", "Windows in one network run", buckets=(1, 2, 4, 8, 16, 32), registry=self.registry
        )
        self.network = Histogram(
            "lgnet_network_seconds", "Seconds of one network run", buckets=_SECONDS, registry=self.registry
        )
        self.model = Gauge(
            "lgnet_model_info", "Models and what runs them", ["model", "backend"], registry=self.registry
        )

    def watch(self, depth: Callable[[], int], usage: Callable[[], tuple[int, int]]) -> None:
        """Gauges whose values are read on request."""
        Gauge("lgnet_queue_depth", "Requests that wait or run", registry=self.registry).set_function(depth)
        Gauge("lgnet_pictures", "Open pictures", registry=self.registry).set_function(lambda: usage()[0])
        Gauge("lgnet_pictures_bytes", "Bytes of open pictures", registry=self.registry).set_function(
            lambda: usage()[1]
        )

    def phases(self, seconds: dict[str, float]) -> None:
        """Count the phases of one request."""
        for name, value in seconds.items():
            self.seconds.labels(name).observe(value)

    def run(self, windows: int, seconds: float) -> None:
        """Count one run of the network."""
        self.batches.observe(windows)
        self.network.observe(seconds)

    def text(self) -> bytes:
        """The text of the page."""
        return generate_latest(self.registry)
