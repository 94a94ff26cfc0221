"""Room 02: how fast requests may leave."""

from __future__ import annotations

import threading
import time
from collections import deque

__all__ = ["Pace"]


class Pace:
    """At most so many requests and tokens within any minute, and nothing before a common pause ends.

    An exact sliding window (ours): a token bucket would let twice the limit through in its first minute. It is a
    second longer than a minute, because requests travel for different times and the server counts arrivals.
    """

    def __init__(self, requests: int | None, tokens: int | None, window_s: float = 61.0) -> None:
        self.requests, self.tokens, self.window = requests, tokens, window_s
        self._sent: deque[list[float]] = deque()  # [time, tokens, still counted]
        self._sum = 0.0
        self._not_before = 0.0
        self._lock = threading.Lock()

    def wait(self, tokens: float, stop: threading.Event) -> list[float] | None:
        """Block until a request of so many tokens may be sent; None if `stop` was set meanwhile."""
        if self.tokens is not None:
            tokens = min(tokens, self.tokens)  # a request above the limit goes alone rather than never
        while not stop.is_set():
            with self._lock:
                now = time.monotonic()
                delay = self._delay(now, tokens)
                if delay <= 0:
                    counted = self.requests is not None or self.tokens is not None
                    entry = [now, tokens, counted]
                    if counted:
                        self._sent.append(entry)
                        self._sum += tokens
                    return entry
            stop.wait(min(delay, 1.0))
        return None

    def settle(self, entry: list[float], tokens: float) -> None:
        """Replace a request's estimated tokens by the tokens that it took."""
        with self._lock:
            if entry[2]:
                self._sum += tokens - entry[1]
            entry[1] = tokens

    def pause(self, seconds: float) -> bool:
        """Send nothing for so long: the server asked for it. False if it is already longer than that (or nearly)."""
        with self._lock:
            now = time.monotonic()
            longer = now + seconds > max(self._not_before, now) + 1
            self._not_before = max(self._not_before, now + seconds)
            return longer

    def _delay(self, now: float, tokens: float) -> float:
        while self._sent and self._sent[0][0] <= now - self.window:
            entry = self._sent.popleft()
            self._sum -= entry[1]
            entry[2] = False
        delay = self._not_before - now
        if self._sent:
            full = self.requests is not None and len(self._sent) >= self.requests
            if full or (self.tokens is not None and self._sum + tokens > self.tokens):
                delay = max(delay, self._sent[0][0] + self.window - now)
        return delay
