"""Speed of a training run: how long it takes, and what it does not reach in its time."""

from __future__ import annotations

import time
from collections.abc import Callable

from ncsn_fast.training.averages import decays
from ncsn_fast.training.configs import TrainConfig


class Pace:
    """Seconds of a step, by a clock that starts now.

    They are measured from the end of the first step on, which compiles and allocates, and from the
    end of the first minute on once that is over: caches are filled then.
    """

    SOON, STEPS, SETTLED = 10.0, 10, 60.0  # seconds or steps after the first; seconds

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self.began = clock, clock()
        self._mark: tuple[float, int] | None = None
        self._settled, self._speed = False, 0.0

    def minutes(self) -> float:
        """Returns the minutes since the start."""
        return (self._clock() - self.began) / 60

    def seconds_per_step(self, step: int) -> float | None:
        """Returns the seconds of a step, after `step` of them; None while nothing can be said."""
        now = self._clock()
        over = now - self.began >= self.SETTLED
        if self._mark is None:
            self._mark, self._settled = (now, step), over
            return None
        since, first = self._mark
        if step > first and (
            self._settled or step - first >= self.STEPS or now - since >= self.SOON
        ):
            self._speed = (now - since) / (step - first)
        if over and not self._settled:
            self._mark, self._settled = (now, step), True
        return self._speed or None

    def left(self, step: int, steps: int, minutes: float = 0.0) -> float | None:
        """Returns the seconds left at a step of `steps`; None while nothing can be said.

        Args:
            minutes: after which the run is stopped, finished or not; 0 for never.
        """
        speed = self.seconds_per_step(step)
        if speed is None:
            return None
        needed = speed * (steps - step)
        return min(needed, max(0.0, 60 * (minutes - self.minutes()))) if minutes > 0 else needed


def unreached(config: TrainConfig, step: int) -> list[str]:
    """Returns what a run has not reached when it ends at a step, in words; no snapshots."""
    found = []
    if step < config.warmup:
        found.append(f"the learning rate has risen (--warmup {config.warmup})")
    slowest = max((decay.settled(config.batch_size) for decay in decays(config)), default=0)
    if step < slowest:
        found.append(f"the average forgets the initial weights (step {slowest}; --ema-warmup)")
    return found


def foretell(config: TrainConfig, step: int, speed: float, minutes: float) -> tuple[str, str]:
    """Returns how long a run takes, and a warning where --max-minutes end it too early, or "".

    Args:
        step: the present one.   speed: seconds of a step.   minutes: since the start.
    """
    left = config.steps - step
    text = f"about {_duration(speed * left)} for the {left} steps left, at {speed:.2g} s each"
    reached = step + int(60 * (config.max_minutes - minutes) / speed)
    if config.max_minutes <= 0 or reached >= config.steps:
        return text, ""
    reached = max(reached, step)
    text += f"; --max-minutes {config.max_minutes:g} ends them near step {reached}"
    events = unreached(config, reached)
    if reached < config.snapshot_every:
        events.append(
            f"the first checkpoint and samples (--snapshot-every {config.snapshot_every})"
        )
    if not events:
        return text, ""
    return text, (
        f"--max-minutes {config.max_minutes:g} ends this run near step {reached}, before "
        f"{' and '.join(events)}: give it more minutes, a smaller network, or less of these"
    )


def _duration(seconds: float) -> str:
    minutes = seconds / 60
    hours = f" ({minutes / 60:.1f} hours)" if minutes >= 120 else ""
    return f"{minutes:.0f} min{hours}" if minutes >= 10 else f"{minutes:.1f} min"
