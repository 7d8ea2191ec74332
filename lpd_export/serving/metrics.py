"""What a server counts, for Prometheus. Knows names and labels, not when anything happens."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.process_collector import ProcessCollector

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)


class Meters:
    """The counters of one server, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self.queue = Gauge(
            "lpd_queue_images", "Images that wait.", ["model"], registry=self.registry
        )
        self.batches = Histogram(
            "lpd_batch_images",
            "Images made together.",
            ["model"],
            buckets=BATCHES,
            registry=self.registry,
        )
        self.stages = Histogram(
            "lpd_stage_seconds",
            "Seconds of an image in the queue, in its batch, in its encoding, and of a request.",
            ["model", "stage"],
            buckets=SECONDS,
            registry=self.registry,
        )
        self.images = Counter(
            "lpd_images", "Images answered.", ["model", "endpoint"], registry=self.registry
        )
        self.left = Counter(
            "lpd_clients_left", "Requests whose client left.", ["model"], registry=self.registry
        )
        self.refusals = Counter(
            "lpd_refusals",
            "Requests answered with an error, by status and code.",
            ["status", "code"],
            registry=self.registry,
        )

    def text(self) -> bytes:
        """As Prometheus reads it."""
        return generate_latest(self.registry)
