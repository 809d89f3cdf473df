"""Compression that follows the load: detail is given up before anybody waits long, and comes back when the load ends.

The load is the time for which a request that comes now would wait for its first token: those that wait for theirs, be
it for a turn, for the encoder or for the LLM stage's prefill, times the mean time between two first tokens (Little's
law). The gateway knows both by itself, so it is never stale, and is the same for a slow machine and for a fast one.

At level 0 a request is as the checkpoint has it. Levels 1 to n go evenly from the gentle end of each bound to the
tight one. The level is at once k where the wait is above k times `tighten_at` of the time that is wanted, so that a
burst costs detail before it costs time, and rises by one in each `tighten_after_s` in which the wait is above it; it
falls by one for each `relax_after_s` in which the wait was at most `relax_at` of that time. What is between the two
changes nothing: that gap, and the slower fall, keep it from swinging.

An image whose visual tokens are known with more detail keeps them: to encode it anew would cost the encoder what the
load has none of, and the language model the prefix that it may still hold. Its `threshold` tightens all the same.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Annotated, Self

from services.checkpoint.config import FocusLlavaConfig
from services.common.settings import Count, Range, Share, require
from services.gateway.admission import AdmittedChat

Seconds = Annotated[float, Range(0, above=True)]
_REMEMBERED = 16
"""First tokens over which the mean time between two of them goes."""


@dataclass(frozen=True, kw_only=True)
class LoadCompression:
    """How far compression may go under load. Each bound is (gentle, tight); None leaves that sampler alone."""

    map_share: tuple[Share, Share] | None = None
    """The largest share of a feature map's tokens that the vision-guided sampler leaves."""
    threshold: tuple[Share, Share] | None = None
    """gamma of Eq. 9, for the text-guided sampler."""
    levels: Count = 3
    """Steps from the gentle end to the tight one. Each is a cache entry of its own for an image."""
    first_token_s: Seconds = 1.0
    """Time within which a first token is wanted. A server without load must need less than `relax_at` of it."""
    tighten_at: Share = 0.6
    """Share of `first_token_s`: a longer wait has the level rise; twice as long is level 2, and so on."""
    relax_at: Share = 0.3
    """Share of `first_token_s`: a wait that is no longer has the level fall."""
    tighten_after_s: Seconds = 0.25
    relax_after_s: Seconds = 1.0

    def __post_init__(self) -> None:
        bounds = {"map_share": self.map_share, "threshold": self.threshold}
        require(any(bounds.values()), "map_share", None, "[gentle, tight], for it or for threshold")
        for name, bound in bounds.items():
            require(bound is None or bound[0] >= bound[1], name, bound, "[gentle, tight], the tight one not larger")
        require(self.relax_at < self.tighten_at, "relax_at", self.relax_at, f"less than tighten_at, {self.tighten_at}")

    def check(self, config: FocusLlavaConfig) -> None:
        """Raises InvalidInput for a sampler that the checkpoint has off, or a threshold above its own."""
        for name, sampler in (("map_share", config.vision_sampler), ("threshold", config.text_sampler)):
            bound = getattr(self, name)
            require(bound is None or sampler.enabled, f"load_compression.{name}", bound,
                    "none: the checkpoint has this sampler off")  # fmt: skip
        own = config.text_sampler.threshold
        require(self.threshold is None or self.threshold[0] <= own, "load_compression.threshold", self.threshold,
                f"at most {own}, which the checkpoint has")  # fmt: skip

    def gentler(self, level: int) -> tuple[float | None, ...]:
        """Each `map_share` that leaves more than that of a level, the most first; None is the sampler's own choice."""
        shares = (self.at(gentle).map_share for gentle in range(level))
        return tuple(dict.fromkeys(shares)) if self.map_share else ()

    def at(self, level: int) -> Compression:
        """What a level sets, 0 to `levels`."""
        if level == 0:
            return Compression()
        part = (level - 1) / (self.levels - 1) if self.levels > 1 else 1.0

        def between(bound: tuple[float, float] | None) -> float | None:
            return None if bound is None else round(bound[0] + part * (bound[1] - bound[0]), 4)

        return Compression(level=level, map_share=between(self.map_share), threshold=between(self.threshold))


@dataclass(frozen=True, kw_only=True)
class Compression:
    """What the load sets for a request; None leaves it as the checkpoint has it."""

    level: int = 0
    map_share: float | None = None
    threshold: float | None = None

    def as_used(self, shares: Iterable[float | None]) -> Compression:
        """The same, but without a `map_share` that none of the images, whose shares these are, was read with."""
        return self if self.map_share in set(shares) else dataclasses.replace(self, map_share=None)


class LoadController:
    """The level of one gateway replica, from how many of its requests wait. One event loop uses it."""

    def __init__(self, settings: LoadCompression | None, clock: Callable[[], float] = time.monotonic):
        """settings: None keeps the level at 0."""
        self.settings, self._clock = settings, clock
        self.waiting = 0
        """Requests without a first token."""
        self._between_s = 0.0
        """Mean time between two of the last first tokens, while requests waited; 0 before there were any."""
        self._first_tokens, self._last_at = 0, clock()
        """First tokens so far, and when the last one came, or the first of those that wait."""
        self._level = 0
        self._calm_since: float | None = clock()
        """Since when the wait is at most `relax_at`, or the level last fell; None while it is longer."""
        self._tightened_at = -float("inf")

    @property
    def level(self) -> int:
        """The level now."""
        if self.settings is not None:
            self._follow(self.settings)
        return self._level

    def wait(self) -> Waiting:
        """An admitted request, as an async context around its answer."""
        return Waiting(self)

    @property
    def wait_s(self) -> float:
        """For how long a request that comes now would wait for its first token, in seconds."""
        return self.waiting * self._between_s

    def change(self, by: int) -> None:
        """Counts requests that begin to wait, or leave without a first token."""
        if not self.waiting:
            self._last_at = self._clock()
        self.waiting += by
        if self.settings is not None:
            self._follow(self.settings)

    def first_token(self) -> None:
        """Counts a first token, which ends its request's wait."""
        now = self._clock()
        self._first_tokens += 1
        self._between_s += (now - self._last_at - self._between_s) / min(self._first_tokens, _REMEMBERED)
        self._last_at = now
        self.change(-1)

    def _follow(self, settings: LoadCompression) -> None:
        now, wait_s = self._clock(), self.wait_s
        if self._calm_since is not None:  # nothing was called in this calm
            steps = int((now - self._calm_since) / settings.relax_after_s)
            self._level = max(0, self._level - steps)
            self._calm_since += steps * settings.relax_after_s
        if wait_s > settings.relax_at * settings.first_token_s:
            self._calm_since = None
        elif self._calm_since is None:
            self._calm_since = now
        tight_s = settings.tighten_at * settings.first_token_s
        if wait_s > tight_s:
            level = math.ceil(wait_s / tight_s) - 1
            if now - self._tightened_at >= settings.tighten_after_s:
                level = max(level, self._level + 1)
            if level > self._level:
                self._level, self._tightened_at = min(settings.levels, level), now

    def gentler(self, compression: Compression) -> tuple[float | None, ...]:
        """Each `map_share` whose tokens of an image, where they are known, do for a request with this compression."""
        return self.settings.gentler(compression.level) if self.settings else ()

    def compress(self, admitted: AdmittedChat) -> tuple[AdmittedChat, Compression]:
        """The request as the load has it, and what was set. One that names a setting of a sampler stays as it is."""
        level = self.level
        if not level or self.settings is None or not admitted.images or _names_its_own(admitted):
            return admitted, Compression()
        force = self.settings.at(level)
        images = tuple(image.with_map_share(force.map_share) for image in admitted.images)
        samplers = dataclasses.replace(admitted.samplers, threshold=force.threshold)
        return dataclasses.replace(admitted, images=images, samplers=samplers), force


class Waiting:
    """An admitted request. It waits from the start of the block until its first token, or the block's end."""

    def __init__(self, load: LoadController):
        self._load, self._waits = load, False

    async def __aenter__(self) -> Self:
        self._waits = True
        self._load.change(+1)
        return self

    async def __aexit__(self, *exc: object) -> None:
        if self._waits:
            self._waits = False
            self._load.change(-1)

    def first_token(self) -> None:
        """Its first token is there."""
        if self._waits:
            self._waits = False
            self._load.first_token()


def _names_its_own(admitted: AdmittedChat) -> bool:
    samplers = admitted.samplers
    switched = not (samplers.vision_sampler and samplers.text_sampler)
    set_by_request = samplers.threshold is not None or samplers.keep_ratio is not None
    return switched or set_by_request or any(image.options.map_share is not None for image in admitted.images)
