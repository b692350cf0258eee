"""The adaptive Runge-Kutta method beside SciPy's, and the probability flow on exact scores."""

import itertools
import math

import exact
import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp

from ncsn_fast.samplers.ode import probability_flow
from ncsn_fast.samplers.procedure import SolverError, per_sample
from ncsn_fast.samplers.runge_kutta import ERROR, FIFTH, NODES, STAGES, solve

SCHEDULES = {"course": exact.COURSE, "song": exact.SONG, "vesde": exact.VESDE}


def orbit(t, y):
    """(B, 4): Kepler's problem; steps shrink where the bodies are near."""
    cubed = (y[:, :2] ** 2).sum(1, keepdim=True) ** 1.5
    return torch.cat((y[:, 2:], -y[:, :2] / cubed), dim=1)


def relaxation(t, y):
    """A slope that depends on time and, for large t, is moderately stiff."""
    return -per_sample(1 + t**2, y) * (y - per_sample(torch.cos(3 * t), y))


def scipy_solution(slope, y, start, stop, **options):
    """The same by SciPy for one sample (float64): state and evaluations."""

    def flat(t, state):
        column = torch.from_numpy(state).reshape(1, *y.shape)
        return slope(torch.tensor([t], dtype=torch.float64), column).flatten().numpy()

    found = solve_ivp(flat, (start, stop), y.flatten().numpy(), method="RK45", **options)
    assert found.success
    return torch.from_numpy(found.y[:, -1]).reshape(y.shape), found.nfev


def eccentric(n):
    """Orbits from the far point, from nearly round ones to close encounters."""
    speed = torch.linspace(0.95, 0.35, n, dtype=torch.float64)
    zero, one = torch.zeros_like(speed), torch.ones_like(speed)
    return torch.stack((one, zero, zero, speed), dim=1)


def test_coefficients_are_consistent():
    assert [sum(row) for row in STAGES] == pytest.approx(NODES[1:])
    for power in range(5):  # fifth order, where one node's power says it
        assert sum(b * c**power for b, c in zip(FIFTH, NODES, strict=True)) == pytest.approx(
            1 / (power + 1)
        )
    assert sum(ERROR) == pytest.approx(0, abs=1e-15)


@pytest.mark.parametrize(("start", "stop"), [(0.0, 5.0), (5.0, 0.0), (-1.0, -3.5)])
@pytest.mark.parametrize("slope", [orbit, relaxation])
@pytest.mark.parametrize("rtol", [1e-3, 1e-5, 1e-8])
def test_each_sample_takes_the_steps_that_scipy_takes(slope, start, stop, rtol):
    if slope is relaxation and stop < start:
        stop = start - 0.6  # it grows like exp(t^3 / 3)
    y = eccentric(5)
    found = solve(slope, y, start, stop, rtol=rtol, atol=rtol / 10)
    for row, before in enumerate(y):
        expected, nfe = scipy_solution(slope, before, start, stop, rtol=rtol, atol=rtol / 10)
        assert int(found.nfe[row]) == nfe
        torch.testing.assert_close(found.y[row], expected, rtol=1e-6, atol=1e-7)


def test_a_sample_does_not_know_its_batch():
    y = eccentric(6)
    together = solve(orbit, y, 0.0, 5.0)
    assert len(set(together.nfe.tolist())) > 2
    for row in range(6):
        alone = solve(orbit, y[row : row + 1], 0.0, 5.0)
        assert torch.equal(alone.y[0], together.y[row])
        assert alone.nfe[0] == together.nfe[row]


def test_a_sample_that_is_done_stays_still():
    """What the slope says of it afterwards, NaN here, reaches neither it nor the others."""
    expected = solve(orbit, eccentric(6), 0.0, 5.0)
    evaluations = 0

    def slope(t, y):
        nonlocal evaluations
        evaluations += 1
        done = per_sample(expected.nfe < evaluations, y).bool()
        return torch.where(done, math.nan, orbit(t, y))

    found = solve(slope, eccentric(6), 0.0, 5.0)
    assert evaluations == int(expected.nfe.max()) > 2 * int(expected.nfe.min())
    assert torch.equal(found.y, expected.y)
    assert torch.equal(found.nfe, expected.nfe)


def test_compaction_saves_evaluations_and_changes_nothing():
    sizes = []

    def counted(t, y):
        sizes.append(len(y))
        return orbit(t, y)

    whole = solve(orbit, eccentric(6), 0.0, 5.0)
    compact = solve(counted, eccentric(6), 0.0, 5.0, compact=True)
    assert torch.equal(whole.y, compact.y)
    assert torch.equal(whole.nfe, compact.nfe)
    assert sum(sizes) == int(whole.nfe.sum())  # none wasted
    y = torch.tensor([[-1.0], [-2.0], [1.0]], dtype=torch.float64)
    with pytest.raises(SolverError, match=r"too small.*the first of them row 2"):
        solve(lambda t, y: y**2, y, 0.0, 2.0, compact=True)


def test_float32_is_as_good_as_its_tolerance():
    y = eccentric(4)
    tight = solve(orbit, y, 0.0, 5.0, rtol=1e-10, atol=1e-12).y
    single, double = solve(orbit, y.float(), 0.0, 5.0), solve(orbit, y, 0.0, 5.0)
    assert single.y.dtype == torch.float32
    assert (single.y - tight).abs().max() < 2 * (double.y - tight).abs().max()


def test_first_step_is_the_callers_and_at_most_the_interval():
    decay = solve(lambda t, y: -y, torch.ones(1, 3), 0.0, 0.1, first_step=5.0)
    assert decay.nfe.tolist() == [1 + 6]
    torch.testing.assert_close(decay.y, torch.full((1, 3), math.exp(-0.1)))


def test_still_and_constant_slopes():
    """No scale to choose a step by: SciPy's floor of the step, then growth tenfold."""
    y = torch.tensor([[0.0, 0.0], [3.0, -1.0]], dtype=torch.float64)
    still = solve(lambda t, y: torch.zeros_like(y), y, 0.0, 7.0)
    assert torch.equal(still.y, y)
    _, nfe = scipy_solution(lambda t, y: torch.zeros_like(y), y[0], 0.0, 7.0)
    assert abs(int(still.nfe[0]) - nfe) <= 6
    steady = solve(lambda t, y: torch.ones_like(y), y, 0.0, 7.0)
    torch.testing.assert_close(steady.y, y + 7.0)


def test_empty_batch_and_empty_interval():
    none = solve(orbit, torch.zeros(0, 4), 0.0, 1.0)
    assert none.y.shape == (0, 4)
    assert none.nfe.shape == (0,)
    here = solve(orbit, eccentric(2), 1.0, 1.0)
    assert torch.equal(here.y, eccentric(2))
    assert here.nfe.tolist() == [0, 0]


def test_errors_say_where_it_stopped():
    with pytest.raises(SolverError, match=r"max_steps=3 attempts.*2 samples.*row 0 at t="):
        solve(orbit, eccentric(2), 0.0, 5.0, max_steps=3)
    y = torch.tensor([[-1.0], [1.0]], dtype=torch.float64)  # row 1 ends at t = 1
    with pytest.raises(SolverError, match=r"too small.*1 samples.*row 1"):
        solve(lambda t, y: y**2, y, 0.0, 2.0)
    with pytest.raises(SolverError, match="too small"):
        solve(lambda t, y: torch.full_like(y, math.nan), torch.ones(1, 2), 0.0, 2.0)


@pytest.mark.parametrize(("options", "message"), [
    ({"rtol": 1e-9}, "rtol"), ({"rtol": math.nan}, "rtol"), ({"atol": -1.0}, "atol"),
    ({"first_step": 0.0}, "first_step"), ({"max_steps": 0}, "max_steps"),
])  # fmt: skip
def test_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        solve(orbit, torch.ones(1, 4), 0.0, 1.0, **options)


def test_refuses_states_and_slopes_of_the_wrong_kind():
    with pytest.raises(ValueError, match="float32 or float64"):
        solve(orbit, torch.ones(2, 4, dtype=torch.float16), 0.0, 1.0)
    with pytest.raises(ValueError, match=r"shape of y, \(2, 4\); got \(2,\)"):
        solve(lambda t, y: t, torch.ones(2, 4), 0.0, 1.0)
    with pytest.raises(ValueError, match="finite"):
        solve(orbit, torch.ones(2, 4), 0.0, math.inf)


@pytest.mark.parametrize(("name", "end", "nfe"), [
    ("course", 1e-2, 86), ("course", 1e-3, 86), ("song", 1e-3, 56), ("vesde", 1e-5, 104),
])  # fmt: skip
def test_tutorials_evaluations_on_gaussian_data(name, end, nfe):
    """dx/dt = -g^2 s / 2 from t = 1, tolerances 1e-5: the published samplers' NFE.

    Evaluations vary a little with where a trajectory starts, less the more dimensions it has.
    """
    schedule, data = SCHEDULES[name], exact.Gaussian(mean=0.5, spread=0.5)

    def slope(t, x):
        sigma = schedule.variance(t).sqrt()
        return -0.5 * per_sample(schedule.g2(t), x) * data.score(x, sigma)

    top, low = (math.sqrt(float(schedule.variance(t))) for t in (1.0, end))
    x = data.mean + top * exact.normals(3, 64 * 784, dtype=torch.float64)
    found = solve(slope, x, 1.0, end)
    assert found.nfe.tolist() == [nfe] * 3
    assert (found.y - data.flow(x, top, low)).abs().max() < 3e-5
    few = solve(slope, x[:, :64], 1.0, end)
    for row in range(3):
        expected = scipy_solution(slope, x[row, :64], 1.0, end, rtol=1e-5, atol=1e-5)
        assert int(few.nfe[row]) == expected[1]


@pytest.mark.parametrize(("name", "begin", "nfe"), [("course", 1e-3, 98), ("song", 1e-5, 62)])
@pytest.mark.parametrize("batch", [1, 8])
def test_tutorials_evaluations_of_a_likelihood(name, begin, nfe, batch):
    """Pixels and volume changes of a batch of 28 x 28 images, stepped as one by SciPy's norm."""
    schedule, data, d = SCHEDULES[name], exact.Gaussian(mean=0.5, spread=0.5), 784

    def slope(t, state):
        half_g2, sigma = 0.5 * schedule.g2(t), schedule.variance(t).sqrt()
        change = -half_g2 * data.score(state[:, : batch * d], sigma)
        volume = (half_g2 * d / (0.25 + sigma**2)).expand(1, batch)
        return torch.cat((change, volume), dim=1)

    x = data.mean + data.spread * exact.normals(1, batch * d, dtype=torch.float64)
    state = torch.cat((x, torch.zeros(1, batch, dtype=torch.float64)), dim=1)
    assert solve(slope, state, begin, 1.0).nfe.tolist() == [nfe]


@pytest.mark.parametrize(("variable", "close"), [("sigma", 1e-3), ("log_sigma", 5e-5)])
@pytest.mark.parametrize(("low", "high"), [(0.01, 50.0), (0.01, 22.0), (0.3, 0.4)])
def test_probability_flow_of_gaussian_data(variable, close, low, high):
    data = exact.Gaussian()
    start = data.mean + high * exact.normals(4, 3, 5, 5)
    down, nfe = probability_flow(data.score, start, high, low, variable=variable)
    torch.testing.assert_close(down, data.flow(start, high, low), rtol=0, atol=close)
    assert nfe.dtype == torch.int64
    assert int(nfe.max()) == data.calls
    up, _ = probability_flow(data.score, down, low, high, variable=variable)
    torch.testing.assert_close(up, start, rtol=20 * close, atol=close)


def test_probability_flow_agrees_with_scipy_on_a_mixture():
    """Two modes: the score is not linear, and trajectories near the ridge take more steps."""
    weights, centres = torch.tensor([0.8, 0.2]), torch.tensor([[5.0, 5.0], [-5.0, -5.0]])

    def score(x, sigma):
        variance = (1 + sigma**2)[:, None]
        gaps = centres.to(x.dtype) - x[:, None]
        logits = weights.to(x.dtype).log() - (gaps**2).sum(-1) / (2 * variance)
        return (logits.softmax(1)[..., None] * gaps).sum(1) / variance

    x = 20 * exact.normals(16, 2, dtype=torch.float64)
    tolerance = {"rtol": 1e-7, "atol": 1e-7}
    found, nfe = probability_flow(score, x, 20.0, 0.01, variable="sigma", **tolerance)

    def slope(t, y):
        return -per_sample(t, y) * score(y, t)

    for row in range(16):
        expected, n = scipy_solution(slope, x[row], 20.0, 0.01, **tolerance)
        torch.testing.assert_close(found[row], expected, rtol=1e-6, atol=1e-6)
        assert abs(int(nfe[row]) - n) <= 6
    assert len(set(nfe.tolist())) > 1


def test_the_logarithm_is_the_better_variable():
    """On Gaussian data, from 50 to 0.01: fewer evaluations, and closer. Hence the default."""
    data = exact.Gaussian()
    x = 50 * exact.normals(4, 64, dtype=torch.float64)
    end = data.flow(x, 50.0, 0.01)
    log = probability_flow(data.score, x, 50.0, 0.01)
    plain = probability_flow(data.score, x, 50.0, 0.01, variable="sigma")
    assert log.nfe.max() <= 110  # the published VE sampler: 104
    assert plain.nfe.min() > 130
    assert (log.x - end).abs().max() < 0.2 * (plain.x - end).abs().max()


def test_denoising_ends_at_the_posterior_mean():
    data = exact.Gaussian()
    x = exact.normals(2, 7)
    plain, before = probability_flow(data.score, x, 2.0, 0.1)
    denoised, nfe = probability_flow(data.score, x, 2.0, 0.1, denoise=True)
    shrink = 0.5**2 / (0.5**2 + 0.1**2)
    torch.testing.assert_close(denoised, data.mean + shrink * (plain - data.mean))
    assert torch.equal(nfe, before + 1)


def test_probability_flow_refuses():
    data = exact.Gaussian()
    for ends in itertools.product((1.0, 0.0, -1.0, math.inf, math.nan), repeat=2):
        if ends != (1.0, 1.0):
            with pytest.raises(ValueError, match="must be positive and finite"):
                probability_flow(data.score, torch.ones(1, 2), *ends)
    with pytest.raises(ValueError, match="variable"):
        probability_flow(data.score, torch.ones(1, 2), 2.0, 1.0, variable="t")


def test_moments_of_the_flow_are_those_of_the_data():
    data = exact.Gaussian(mean=0.4, spread=0.2)
    x, _ = probability_flow(data.score, 50 * exact.normals(8, 4096), 50.0, 0.01)
    assert float(x.var()) == pytest.approx(0.2**2, rel=0.03)
    assert float(x.mean()) == pytest.approx(0.4, abs=0.01)
    assert np.isfinite(x.numpy()).all()
