"""Selection of a sampler's noise levels from the user's options and the model's own levels."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from ncsn_fast.diffusion.spacing import Schedule, check_ladder, spaced

if TYPE_CHECKING:  # the command line reads the fields of Levels before torch is imported
    from ncsn_fast.models.score import ScoreModel
    from ncsn_fast.samplers.program import Column


@dataclasses.dataclass(frozen=True)
class Levels:
    """User's options for the noise levels; None leaves an option to the method.

    Attributes:
        steps: number of noise levels.   sigmas: all of them, descending.
        schedule, rho: spacing between the ends of the model's ladder (schedule.spaced).
        sigma_start: noise level to start at, instead of the model's first.
        sigma_min, sigma_max: range that the levels are limited to, beside that of the model.
        usual: the method's number of levels if the user gives none; None for the model's.
        given: all options of the method that the user gives, those of levels among them.
    """

    steps: int | None = None
    sigmas: ArrayLike | None = None
    schedule: Schedule | None = None
    rho: float | None = None
    sigma_start: float | None = None
    sigma_min: float | None = None
    sigma_max: float | None = None
    usual: int | None = None
    given: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        from ncsn_fast.ops.noise import check_integer

        if self.steps is not None:
            check_integer("steps", self.steps)

    def beside(self, steps: int) -> list[str]:
        """Returns what the user asks for that a table of so many steps, fitted whole, has not."""
        other = [] if self.steps in (None, steps) else [f"steps={self.steps}"]
        return other + [name for name in self.given if name != "denoise"]

    def own(self, model: ScoreModel) -> Column:
        """Returns the model's ladder from sigma_start on.

        For a level-conditioned network it starts at a trained level.
        """
        own = model.sigmas.double().cpu().numpy()
        start = self.sigma_start
        if start is None:
            return own
        if not own[-1] <= start < math.inf:
            raise ValueError(
                f"sigma_start must be at least {own[-1]:.4g}, the model's last noise level; "
                f"got {start}"
            )
        most = model.parameterisation.sigma_limit
        if start > most * (1 + 1e-6):
            raise ValueError(
                f"sigma_start must be at most {most:.4g}, the last noise that this model knows; "
                f"got {start}"
            )
        below = own[own <= start * (1 + 1e-6)]
        if model.conditional or below[0] >= start * (1 - 1e-6):
            return below
        return np.append(start, below)

    def like_the_model(self, model: ScoreModel) -> Column:
        """Returns the user's ladder, else the model's, spaced geometrically if `steps` differs.

        It is also spaced geometrically if sigma_start lies between two levels, for methods that
        need one common ratio.
        """
        if self.sigmas is not None and self.steps is not None:
            raise ValueError("give either steps or sigmas, not both")
        given = self._given()
        if given is not None:
            return given
        own = self.own(model)
        if self.steps is None or self.steps == len(own):
            between = not np.isclose(model.sigmas.double().cpu().numpy(), own[0], rtol=1e-5).any()
            return np.geomspace(own[0], own[-1], len(own)) if between else own
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1; got {self.steps}")
        return np.geomspace(own[0], own[-1], self.steps)

    def between_the_ends(self, model: ScoreModel) -> Column:
        """Returns the user's ladder, else `steps` levels between the ends of the model's.

        The default of `steps` is `usual`, reduced in proportion if sigma_start shortens the range,
        and limited to the trained levels of a level-conditioned network. The default of `schedule`
        is trained levels if the network is conditioned on them or if all of them are used, else
        geometric. For a network that rounds to the levels of a discrete chain, all are its nearest.
        """
        given = self._given()
        if given is not None:
            return given
        own, steps, schedule = self._limited(model), self.steps, self.schedule
        if steps is None:
            steps = len(own) if self.usual is None else self._share(model, self.usual)
            if model.conditional or len(own) == 1:
                steps = min(steps, len(own))
        if schedule is None:
            trained = steps == len(own) or (model.conditional and 0 < steps < len(own))
            schedule = "ladder" if trained else "geometric"
        return model.parameterisation.known_levels(spaced(own, steps, schedule, self.rho))

    def _limited(self, model: ScoreModel) -> Column:
        """Returns the model's ladder from sigma_start on, cut at sigma_max and sigma_min.

        For a level-conditioned network it keeps trained levels only. ValueError for an empty range.
        """
        own = self.own(model)
        high = own[0] if self.sigma_max is None else min(own[0], self.sigma_max)
        low = own[-1] if self.sigma_min is None else max(own[-1], self.sigma_min)
        inside = own[(low <= own) & (own <= high)]
        empty = len(inside) == 0 if model.conditional else not 0 < low <= high
        given = [value for value in (self.sigma_min, self.sigma_max) if value is not None]
        if empty or not all(value > 0 for value in given):
            raise ValueError(
                f"expected sigma_min <= sigma_max in a range that has levels of this model's, "
                f"{own[-1]:.4g} to {own[0]:.4g}; got {self.sigma_min} and {self.sigma_max}"
            )
        return inside if model.conditional else np.unique([low, *inside, high])[::-1].copy()

    def _given(self) -> Column | None:
        """Returns the user's own ladder, or None; ValueError if another option comes with it."""
        if self.sigmas is None:
            return None
        others = {f.name for f in dataclasses.fields(self)} - {"sigmas", "usual", "given"}
        if any(getattr(self, name) is not None for name in others):
            raise ValueError(
                "sigmas are a whole schedule; give no steps, schedule or rho with them, and no "
                "sigma_start"
            )
        return check_ladder(np.asarray(self.sigmas))

    def _share(self, model: ScoreModel, usual: int) -> int:
        """Returns `usual` steps scaled to the remaining range in log sigma; at least 1."""
        if self.sigma_start is None:
            return usual
        own = model.sigmas.double().cpu().numpy()
        whole, left = (math.log(ladder[0] / own[-1]) for ladder in (own, self.own(model)))
        return max(1, math.ceil(usual * left / whole)) if whole > 0 else 1
