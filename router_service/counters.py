"""What the router counts of itself: requests, tokens and outcomes since start; latency and rate over a bounded window."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from cluster.telemetry.metrics import RouterMetrics
from router_service.core.outcomes import Report

WINDOW_REQUESTS: Final = 4096
RATE_WINDOW_S: Final = 10
UNKNOWN_LAYER: Final = -1


@dataclass(slots=True)
class Account:
    """One request as it is counted. `model` stays empty and `layer` unknown until they are found to be served: labels are bounded by what we serve."""

    request_id: str = ""
    model: str = ""
    layer: int = UNKNOWN_LAYER
    tokens: int = 0
    report: Report | None = None


class Counters:
    """Counts of ended requests. `clock` is monotonic, in seconds; p50 and p99 are of the last successful requests, at most WINDOW_REQUESTS."""

    def __init__(self, clock: Callable[[], float], metrics: RouterMetrics) -> None:
        self._clock = clock
        self._metrics = metrics
        self._started_s = clock()
        self._latencies_s: deque[float] = deque(maxlen=WINDOW_REQUESTS)
        self._tokens_by_second: deque[list[int]] = deque(maxlen=RATE_WINDOW_S + 1)
        self.requests_total = 0
        self.requests_failed = 0
        self.tokens_total = 0
        self.degraded_tokens = 0
        self.outcomes: Counter[str] = Counter()

    def succeeded(self, account: Account, duration_s: float) -> None:
        """Count a request that was answered, with its tokens and outcomes."""
        counts = {} if account.report is None else account.report.counts
        self.requests_total += 1
        self.tokens_total += account.tokens
        self.degraded_tokens += 0 if account.report is None else account.report.degraded_tokens
        for outcome, count in counts.items():
            self.outcomes[outcome] += count
        self._latencies_s.append(duration_s)
        self._add_tokens(account.tokens)
        self._metrics.request_finished(account.model, account.layer, "OK", duration_s, counts, tokens=account.tokens)

    def failed(self, account: Account, code: str, duration_s: float) -> None:
        """Count a request that ended in another status than OK."""
        self.requests_total += 1
        self.requests_failed += 1
        self._metrics.request_finished(account.model, account.layer, code, duration_s, {})

    def refused(self, code: str) -> None:
        """Count a call that was refused before a handler saw it."""
        self.requests_total += 1
        self.requests_failed += 1
        self._metrics.request_refused(code)

    @property
    def uptime_s(self) -> float:
        """Seconds since start."""
        return self._clock() - self._started_s

    @property
    def tokens_per_s(self) -> float:
        """Tokens of the last whole seconds, at most RATE_WINDOW_S, over that time."""
        now = int(self._clock())
        span_s = min(RATE_WINDOW_S, max(1, int(self.uptime_s)))
        return sum(tokens for second, tokens in self._tokens_by_second if now - span_s <= second < now) / span_s

    def latency_s(self, quantile: float) -> float:
        """A quantile (0 to 1) of the window; 0.0 while it is empty."""
        ordered = sorted(self._latencies_s)
        return ordered[min(len(ordered) - 1, int(quantile * len(ordered)))] if ordered else 0.0

    def _add_tokens(self, tokens: int) -> None:
        second = int(self._clock())
        if not self._tokens_by_second or self._tokens_by_second[-1][0] != second:
            self._tokens_by_second.append([second, 0])
        self._tokens_by_second[-1][1] += tokens
