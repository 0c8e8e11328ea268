"""What Prometheus reads at /metrics: counts and times by version, and what engine and fleet are doing at that moment."""

from collections.abc import Iterable
from threading import Lock

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric

from lora_tune.serving.swap import Fleet

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
MAX_VERSIONS = 64
"""Versions with figures of their own; a server that swaps for months must not grow by each."""

_OTHER = "other"
_SECONDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_PREFIX = "lora_tune"


class Metrics:
    """The figures of one server; every method may be called from any thread."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._registry = CollectorRegistry()
        self._lock = Lock()
        self._labels: list[str] = []
        self._answers = self._counter("answers", "Answers by how they ended.", "finish")
        self._prompt = self._counter("prompt_tokens", "Tokens of prompts.")
        self._reused = self._counter(
            "prompt_tokens_reused", "Of these, tokens whose keys and values were there already."
        )
        self._generated = self._counter("generated_tokens", "Tokens sent in answers.")
        self._shadowed = self._counter("shadow_answers", "Answers that were made beside and thrown away.", "finish")
        self._shadow_tokens = self._counter("shadow_generated_tokens", "Tokens of these.")
        self._first = self._histogram("time_to_first_token_seconds", "From admission to the first token.")
        self._whole = self._histogram("answer_seconds", "From admission to the last token.")
        self._registry.register(_Now(fleet))

    def first_token(self, version: str, seconds: float) -> None:
        """Count an answer's first token."""
        self._first.labels(self._label(version)).observe(seconds)

    def asked(self, version: str, n_prompt: int) -> None:
        """Count a request's prompt."""
        self._prompt.labels(self._label(version)).inc(n_prompt)

    def answered(self, version: str, finish: str, *, n_tokens: int, n_reused: int, seconds: float) -> None:
        """Count an answer that has ended."""
        label = self._label(version)
        self._answers.labels(label, finish).inc()
        self._generated.labels(label).inc(n_tokens)
        self._reused.labels(label).inc(n_reused)
        self._whole.labels(label).observe(seconds)

    def shadow_answered(self, version: str, finish: str, n_tokens: int) -> None:
        """Count an answer that was thrown away."""
        label = self._label(version)
        self._shadowed.labels(label, finish).inc()
        self._shadow_tokens.labels(label).inc(n_tokens)

    def text(self) -> bytes:
        """Return everything as Prometheus reads it."""
        return generate_latest(self._registry)

    def _label(self, version: str) -> str:
        """Return the label that a version counts under; those of versions that are gone make room."""
        with self._lock:
            if version in self._labels:
                return version
            if len(self._labels) >= MAX_VERSIONS:
                loaded = {found.id for found in self._fleet.versions()} | {self._fleet.base.name}
                gone = next((label for label in self._labels if label not in loaded), None)
                if gone is None:
                    return _OTHER
                self._labels.remove(gone)
                self._forget(gone)
            self._labels.append(version)
            return version

    def _forget(self, label: str) -> None:
        for figure in (self._prompt, self._reused, self._generated, self._shadow_tokens, self._first, self._whole):
            figure.remove_by_labels({"version": label})
        for figure in (self._answers, self._shadowed):
            figure.remove_by_labels({"version": label})

    def _counter(self, name: str, help_text: str, *labels: str) -> Counter:
        return Counter(f"{_PREFIX}_{name}", help_text, ("version", *labels), registry=self._registry)

    def _histogram(self, name: str, help_text: str) -> Histogram:
        return Histogram(f"{_PREFIX}_{name}", help_text, ("version",), buckets=_SECONDS, registry=self._registry)


class _Now:
    """What is read when somebody looks."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    def collect(self) -> Iterable[Metric]:
        """Return the figures of this moment."""
        fleet, facts = self._fleet, self._fleet.engine.facts()
        gauges = {
            "answers_running": ("Answers that are being made.", facts.n_running),
            "answers_waiting": ("Answers that wait for their turn.", facts.n_waiting),
            "adapter_slots_used": ("Places for adapters that are taken.", facts.n_adapters),
            "adapter_slots": ("Places for adapters.", facts.max_adapters),
            "cache_bytes": ("Held for keys and values.", facts.cache_bytes),
            "adapter_bytes": ("Held for adapters.", facts.adapter_bytes),
            "ready": ("1 when requests are taken.", int(fleet.ready())),
        }
        for name, (words, value) in gauges.items():
            yield GaugeMetricFamily(f"{_PREFIX}_{name}", words, value=value)
        counts = {
            "engine_generated_tokens": (
                "Tokens that the engine made, probes and shadows too.",
                facts.n_tokens_generated,
            ),
            "engine_prefilled_tokens": ("Prompt tokens that the engine read.", facts.n_tokens_prefilled),
            "swaps": ("How often a name has come to mean another version.", fleet.swaps()),
        }
        for name, (words, value) in counts.items():
            yield CounterMetricFamily(f"{_PREFIX}_{name}", words, value=value)
        held = GaugeMetricFamily(f"{_PREFIX}_in_flight", "Requests that hold a version.", labels=["version"])
        for version, n_requests in fleet.in_flight().items():
            held.add_metric([version], n_requests)
        yield held
