"""Linear measurement operators A of images, their adjoints and the solves that guidance needs.

A measurement is y = A x + noise, for images x (B, C, H, W) and y (B, ...). Conditioning an image on
a measurement takes A, its adjoint (<A x, y> = <x, A^T y>) and (A A^T + damping I)^-1, combined in
    correct(x, y) = x + A^T (A A^T + damping I)^-1 (y - A x)
Without damping this is the image nearest to x whose measurement is y. (A^T (A A^T)^-1 is the
pseudo-inverse; the component of x in the null space of A does not change.)

`Mask` (inpainting), `Grey` (colourisation) and `Separable` (block means, Gaussian blur) have closed
forms. `Linear` takes any linear function, obtains its adjoint by autograd unless one is given, and
solves by conjugate gradients.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
from scipy.ndimage import gaussian_filter1d
from torch import Tensor

from ncsn_fast.ops.noise import check_integer
from ncsn_fast.samplers.procedure import SolverError, per_sample

Damping = Tensor | float  # a number, or (B,)
TOLERANCE, MAX_ITERATIONS = 1e-5, 200  # conjugate gradients


class Operator(abc.ABC):
    """Linear map A of images, applied to each sample independently."""

    @abc.abstractmethod
    def apply(self, x: Tensor) -> Tensor:
        """Computes A x, (B, ...), for images x (B, C, H, W)."""

    @abc.abstractmethod
    def adjoint(self, y: Tensor) -> Tensor:
        """Computes A^T y, (B, C, H, W)."""

    def solve(self, r: Tensor, damping: Damping = 0.0) -> Tensor:
        """Computes (A A^T + damping I)^-1 r, shape of r.

        Uses the pseudo-inverse if A A^T is singular.
        """
        damping = _along(damping, r)
        return conjugate_gradients(lambda u: self.apply(self.adjoint(u)) + damping * u, r)

    def correct(self, x: Tensor, y: Tensor, damping: Damping = 0.0) -> Tensor:
        """Computes x + A^T (A A^T + damping I)^-1 (y - A x)."""
        return x + self.adjoint(self.solve(y - self.apply(x), damping))

    def rows(self, index: Tensor, device: torch.device) -> Operator:
        """Returns the operator for some samples (B,), on a device.

        Operators without per-sample data return themselves.
        """
        return self


@dataclasses.dataclass(frozen=True, eq=False)
class Mask(Operator):
    """Selection of the known pixels, with 0 for the others: A = A^T = A A^T.

    Args:
        known: boolean (N, C, H, W), or (1, C, H, W) for all samples; True where measured.
    """

    known: Tensor

    def apply(self, x: Tensor) -> Tensor:
        return torch.where(self.known, x, torch.zeros_like(x))

    def adjoint(self, y: Tensor) -> Tensor:
        return self.apply(y)

    def solve(self, r: Tensor, damping: Damping = 0.0) -> Tensor:
        return self.apply(r) / (1 + _along(damping, r))

    def correct(self, x: Tensor, y: Tensor, damping: Damping = 0.0) -> Tensor:
        """Computes Operator.correct; without damping known pixels equal y bit for bit."""
        if isinstance(damping, float) and damping == 0.0:
            return torch.where(self.known, y, x)
        return torch.where(self.known, x + (y - x) / (1 + _along(damping, x)), x)

    def rows(self, index: Tensor, device: torch.device) -> Mask:
        return Mask((self.known if len(self.known) == 1 else self.known[index]).to(device))


@dataclasses.dataclass(frozen=True)
class Grey(Operator):
    """Grey value of a colour image: y (B, 1, H, W) = sum_c w_c x_c, A A^T = |w|^2.

    Args:
        weights: w, one per channel. The default is the mean, in [0, 1] for images in [0, 1]; the
            published colourisation (Song et al. 2021) constrains sqrt(3) times that, the first
            coordinate in an orthonormal basis of the colours. Luma is (0.299, 0.587, 0.114).
    """

    weights: tuple[float, ...] = (1 / 3, 1 / 3, 1 / 3)

    def __post_init__(self) -> None:
        if not any(self.weights):
            raise ValueError(f"weights must not all be 0; got {self.weights}")

    def apply(self, x: Tensor) -> Tensor:
        if x.shape[1] != len(self.weights):
            raise ValueError(
                f"Grey has weights for {len(self.weights)} channels and the images have "
                f"{x.shape[1]}; give one weight for each channel"
            )
        parts = [w * x[:, c : c + 1] for c, w in enumerate(self.weights)]
        return torch.cat(parts, dim=1).sum(dim=1, keepdim=True)

    def adjoint(self, y: Tensor) -> Tensor:
        return torch.cat([w * y for w in self.weights], dim=1)

    def solve(self, r: Tensor, damping: Damping = 0.0) -> Tensor:
        return r / (sum(w * w for w in self.weights) + _along(damping, r))


@dataclasses.dataclass(frozen=True, eq=False)
class Separable(Operator):
    """Filters along height and width: Y = R X C^T for each channel X (H, W).

    With the SVD R = U S V^T, and likewise of C, A A^T is diagonal in the bases U, with eigenvalues
    s_i^2 s_j^2. Components that the filter attenuates below `cutoff` times the largest are treated
    as unmeasured, because rounding would dominate them: an image keeps them, at the cost of that
    error in A x.

    Args:
        height: R (h, H) float64.   width: C (w, W) float64.
    """

    height: Tensor
    width: Tensor
    cutoff: float = 1e-4

    def apply(self, x: Tensor) -> Tensor:
        return self.height.to(x) @ x @ self.width.to(x).T

    def adjoint(self, y: Tensor) -> Tensor:
        return self.height.to(y).T @ y @ self.width.to(y)

    def solve(self, r: Tensor, damping: Damping = 0.0) -> Tensor:
        u, v, squares = (part.to(r) for part in self._spectrum)
        seen = squares > self.cutoff**2 * squares.max()
        weights = torch.where(seen, 1 / (squares.where(seen, 1.0) + _along(damping, r)), 0.0)
        return u @ ((u.T @ r @ v) * weights) @ v.T

    def rows(self, index: Tensor, device: torch.device) -> Separable:
        return Separable(self.height.to(device), self.width.to(device), self.cutoff)

    @functools.cached_property
    def _spectrum(self) -> tuple[Tensor, Tensor, Tensor]:
        """Returns U of both filters, and the eigenvalues of A A^T, (h, w)."""
        (u, s, _), (v, t, _) = (torch.linalg.svd(m) for m in (self.height, self.width))
        s, t = (torch.cat((a, a.new_zeros(len(b) - len(a)))) for a, b in ((s, u), (t, v)))
        return u, v, s.square()[:, None] * t.square()


def block_mean(factor: int, height: int, width: int) -> Separable:
    """Returns the mean over blocks of factor x factor pixels; A A^T = I / factor^2."""
    factor = check_integer("factor", factor)
    if factor < 1 or height % factor or width % factor:
        raise ValueError(f"factor must divide {height} and {width}; got {factor}")
    block = torch.full((1, factor), 1 / factor, dtype=torch.float64)
    r, c = (torch.kron(torch.eye(n // factor, dtype=block.dtype), block) for n in (height, width))
    return Separable(r, c)


def gaussian_blur(
    std: float,
    height: int,
    width: int,
    boundary: Literal["reflect", "nearest", "constant", "wrap"] = "reflect",
) -> Separable:
    """Returns scipy.ndimage.gaussian_filter with standard deviation `std` in pixels.

    Args:
        height, width: size of the images.
        boundary: SciPy's mode, which sets the values outside: the mirrored image ("reflect": d c b
            a | a b c d), its edge pixels ("nearest"), black ("constant"), or the periodic image
            ("wrap").
    """
    if not 0 < std < np.inf:
        raise ValueError(f"the blur's standard deviation must be positive and finite; got {std}")
    modes = ("reflect", "nearest", "constant", "wrap")
    if boundary not in modes:
        raise ValueError(f"boundary must be one of {', '.join(modes)}; got {boundary!r}")
    r, c = (
        torch.from_numpy(gaussian_filter1d(np.eye(n), std, axis=0, mode=boundary))
        for n in (height, width)
    )
    return Separable(r, c)


class Linear(Operator):
    """Arbitrary linear function of images, such as a convolution with the user's kernel.

    Args:
        apply: images (B, C, H, W) -> measurements (B, ...), linear, sample by sample, on any
            device: checks run on the CPU, so its constants must follow x (`kernel.to(x)`).
        shape: (C, H, W) of the images.
        adjoint: measurements -> images. None: the vector-Jacobian product of `apply`, by autograd.
    """

    def __init__(
        self,
        apply: Callable[[Tensor], Tensor],
        shape: tuple[int, int, int],
        adjoint: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        if bool(apply(torch.zeros(1, *shape)).any()):
            raise ValueError("an operator must be linear; this one does not map 0 to 0")
        self._apply, self.shape, self._adjoint = apply, shape, adjoint

    def apply(self, x: Tensor) -> Tensor:
        return self._apply(x)

    def adjoint(self, y: Tensor) -> Tensor:
        if self._adjoint is not None:
            return self._adjoint(y)
        with torch.inference_mode(False), torch.enable_grad():
            x = torch.zeros(len(y), *self.shape, dtype=y.dtype, device=y.device, requires_grad=True)
            return torch.autograd.grad(self._apply(x), x, y.clone())[0]


def conjugate_gradients(
    matrix: Callable[[Tensor], Tensor],
    r: Tensor,
    *,
    tolerance: float = TOLERANCE,
    max_iterations: int = MAX_ITERATIONS,
) -> Tensor:
    """Solves M u = r for each sample, with a symmetric M >= 0 whose range contains r (B, ...).

    (Hestenes & Stiefel 1952.) Each sample stops on its own, at |M u - r| <= tolerance |r|.

    Raises:
        SolverError: max_iterations did not suffice: M is nearly singular, and needs damping.
    """
    u, left = torch.zeros_like(r), r
    direction, square = left, _dot(left, left)
    enough = tolerance**2 * square
    for _ in range(max_iterations):
        active = square > enough
        if not bool(active.any()):
            return u
        image = matrix(direction)
        curvature = _dot(direction, image)
        step = torch.where(active, square / curvature.where(active, 1.0), 0.0)
        u = u + per_sample(step, u) * direction
        left = left - per_sample(step, u) * image
        last, square = square, _dot(left, left)
        ratio = torch.where(active, square / last.where(active, 1.0), 0.0)
        direction = left + per_sample(ratio, u) * direction
    if not bool((square > enough).any()):
        return u
    worst = float((square / enough).max().sqrt() * tolerance)
    raise SolverError(
        f"conjugate gradients: {max_iterations} iterations leave {worst:.1e} of the residual, not "
        f"{tolerance:.0e}; the operator nearly loses what it should measure: say how noisy the "
        "measurements are (noise > 0), or give the operator a solve of its own",
        int((square > enough).nonzero()[0]),
    )


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Computes the inner product of each sample, (B,) float64."""
    return (a.double() * b.double()).flatten(1).sum(dim=1)


def _along(damping: Damping, like: Tensor) -> Tensor | float:
    """Reshapes a damping (B,) to broadcast against `like` (B, ...); returns a number unchanged."""
    return per_sample(damping, like) if isinstance(damping, Tensor) else damping
