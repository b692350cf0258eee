"""A family of few-step tables with few parameters, which `tune` searches.

A table of DPM-Solver++(2M) has, in each row, a noise level, an amount of noise eta and a weight of
the history (few_step.dpm_solver_pp). Here these are smooth functions of the row, given by twelve
numbers. The family contains `fast`, `dpmpp` and Euler's method with any number of steps and, on
geometric levels, the second-order solver of the extended reverse SDE with phi = sigma^(1 + eta).
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares

from ncsn_fast.diffusion.spacing import check_ladder
from ncsn_fast.models.tuned_table import TunedTable
from ncsn_fast.samplers.choices import FAST_ETA, FAST_FINAL, FAST_HISTORY
from ncsn_fast.samplers.few_step import rows_of_knots

Vector = NDArray[np.float64]
# Of the search coordinates: lowest, highest, and the spread of the first candidates. Logarithms,
# but for the history's weights.
_RANGES = (
    *[(-1.5, 1.5, 0.1)] * 2,  # bend
    (0.0, 3.5, 0.3),  # last
    *[(-3.0, 2.5, 0.3)] * 4,  # eta
    *[(-0.5, 2.5, 0.15)] * 3,  # history
    (-0.06, 0.06, 0.01),  # s_noise
    (-0.5, 1.5, 0.1),  # final
)
LOWEST, HIGHEST, SPREAD = (np.array(column) for column in zip(*_RANGES, strict=True))


@dataclasses.dataclass(frozen=True)
class TableFamily:
    """Point of the family; the default is `fast`.

    Attributes:
        bend: exponents (r, s) of the spacing: log sigma is linear in (1 - (1 - u)^s)^r, for u from
            1 at the first level to 0 at the last. (1, 1) is geometric; r > 1 puts more levels at
            small noise, s > 1 more at large noise.
        last: the last level, in units of the model's last, at least 1.
        eta, history: amount of noise at four knots, and weight of the extrapolation at three
            (few_step.rows_of_knots).
        s_noise: scale of the noise.
        final: weight of the extrapolation in the step to 0.
    """

    bend: tuple[float, float] = (1.0, 1.0)
    last: float = 1.0
    eta: tuple[float, float, float, float] = FAST_ETA
    history: tuple[float, float, float] = FAST_HISTORY
    s_noise: float = 1.0
    final: float = FAST_FINAL

    def vector(self) -> Vector:
        """Returns the search coordinates, (12,)."""
        positive = (*self.bend, self.last, *(max(e, math.exp(LOWEST[3])) for e in self.eta))
        return np.array(
            [*map(math.log, positive), *self.history, math.log(self.s_noise), self.final]
        )

    @classmethod
    def of_vector(cls, vector: Vector) -> TableFamily:
        """Returns the point with these search coordinates (12,), each moved into its range."""
        v = np.clip(vector, LOWEST, HIGHEST)
        bend, last, eta = np.exp(v[:2]), math.exp(v[2]), np.exp(v[3:7])
        return cls(
            tuple(bend.tolist()), last, tuple(eta.tolist()), tuple(v[7:10].tolist()),
            math.exp(v[10]), float(v[11]),
        )  # fmt: skip

    @classmethod
    def of_table(cls, table: TunedTable, ladder: Vector) -> TableFamily:
        """Returns the point whose table is nearest to given rows, for a model with this ladder."""
        along = np.linspace(0.0, 1.0, table.steps - 1)
        root = _at_knots(along, np.sqrt(table.eta), 4)
        history = _at_knots(along, np.asarray(table.history), 3)
        wanted = np.log(table.sigmas)
        last = max(1.0, table.sigmas[-1] / float(ladder[-1]))

        def gaps(log_bend: Vector) -> Vector:
            point = cls(tuple(np.exp(log_bend).tolist()), last)
            return np.log(point.levels(ladder, table.steps)) - wanted

        bend = np.exp(least_squares(gaps, np.zeros(2), bounds=(LOWEST[:2], HIGHEST[:2])).x)
        found = cls(
            tuple(bend.tolist()), last, tuple((root.clip(min=0) ** 2).tolist()),
            tuple(history.tolist()), table.s_noise, table.final,
        )  # fmt: skip
        return cls.of_vector(found.vector())

    def levels(self, ladder: Vector, steps: int, *, trained: bool = False) -> Vector:
        """Returns that many noise levels between the ends of a ladder (L,), descending.

        Args:
            trained: whether they must be levels of the ladder, the nearest in log sigma.
        """
        own = check_ladder(ladder)
        if steps < 2 or (trained and steps > len(own)):
            most = f" to {len(own)}, the levels that this network knows" if trained else " or more"
            raise ValueError(f"a table to be tuned has 2{most} rows; got {steps}")
        end = min(own[-1] * self.last, math.sqrt(own[0] * own[-1]))
        u = np.linspace(1.0, 0.0, steps)
        r, s = self.bend
        u = u if s == 1 else 1 - (1 - u) ** s
        found = end * (own[0] / end) ** u**r
        found[0], found[-1] = own[0], end
        return _nearest(found, own) if trained else check_ladder(found)

    def table(
        self,
        ladder: Vector,
        steps: int,
        shape: tuple[int, int, int],
        *,
        trained: bool = False,
        mean: Vector | None = None,
        facts: dict[str, Any] | None = None,
    ) -> TunedTable:
        """Returns the rows of this point; see TunedTable for the arguments."""
        eta, history = rows_of_knots(self.eta, self.history, steps)
        return TunedTable(
            sigmas=tuple(self.levels(ladder, steps, trained=trained).tolist()),
            eta=tuple(eta.tolist()),
            history=tuple(history.tolist()),
            s_noise=self.s_noise,
            final=self.final,
            shape=shape,
            mean=None if mean is None else tuple(mean.ravel().tolist()),
            facts=facts or {},
        )


def _at_knots(along: Vector, values: Vector, knots: int) -> Vector:
    """Returns values at evenly spread knots of [0, 1] that interpolate those at `along` best."""
    hats = [np.interp(along, np.linspace(0, 1, knots), one) for one in np.eye(knots)]
    found = np.linalg.lstsq(np.stack(hats, axis=1), values, rcond=None)[0]
    return np.asarray(found, dtype=np.float64)


def _nearest(levels: Vector, ladder: Vector) -> Vector:
    """Returns levels of a ladder, nearest in log sigma, each used once."""
    gaps = np.abs(np.log(levels)[:, None] - np.log(ladder)[None])
    index = gaps.argmin(axis=1)
    for k in range(1, len(index)):  # descending levels have ascending indices
        index[k] = max(index[k], index[k - 1] + 1)
    for k in range(len(index) - 1, -1, -1):
        index[k] = min(index[k], len(ladder) - len(index) + k)
    return ladder[index]
