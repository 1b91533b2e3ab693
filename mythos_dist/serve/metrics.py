"""What a server counts, for Prometheus. Names follow its conventions: base units, `_total` for counters."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

_BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_LOOPS = (1, 2, 4, 6, 8, 12, 16, 24, 32, 48, 64, 128, 256, 512)
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class ServerMetrics:
    """The metrics of one server, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "mythos_requests", "HTTP requests by path and status code.", ["path", "status"], registry=registry
        )
        self.prompt_tokens = Counter("mythos_prompt_tokens", "Tokens of prompts accepted.", registry=registry)
        self.generated_tokens = Counter("mythos_generated_tokens", "Tokens generated.", registry=registry)
        self.finished = Counter(
            "mythos_sequences", "Sequences finished, by the reason.", ["finish_reason"], registry=registry
        )
        self.queue_length = Gauge(
            "mythos_queue_length", "Sequences accepted that have no new token yet.", registry=registry
        )
        self.running = Gauge("mythos_running_sequences", "Sequences that are being generated.", registry=registry)
        self.batch_size = Histogram(
            "mythos_batch_size", "Sequences with new tokens, per decoding step.", buckets=_BATCHES, registry=registry
        )
        self.step_seconds = Histogram(
            "mythos_step_seconds", "Seconds of a decoding step.", buckets=_SECONDS, registry=registry
        )
        self.first_token_seconds = Histogram(
            "mythos_time_to_first_token_seconds",
            "Seconds from the acceptance of a sequence to its first new token.",
            buckets=_SECONDS,
            registry=registry,
        )
        self.loops_per_token = Histogram(
            "mythos_loops_per_token", "Loops used for a generated token.", buckets=_LOOPS, registry=registry
        )
