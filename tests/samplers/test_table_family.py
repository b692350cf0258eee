"""The family of few-step tables: which samplers it contains, and how method fast uses a table."""

import dataclasses
import itertools
import logging
import math

import numpy as np
import pytest
import tiny
import torch
from gaussian import Data, moments
from scipy.integrate import quad

from ncsn_fast.diffusion.spacing import karras, polynomial
from ncsn_fast.models.tuned_table import TunedTable
from ncsn_fast.samplers import few_step, methods
from ncsn_fast.samplers.choices import FAST_STEPS
from ncsn_fast.samplers.program import initial_state
from ncsn_fast.samplers.table_family import HIGHEST, LOWEST, TableFamily

OWN = np.geomspace(9.0, 0.01, 49)
SHAPE = (1, 8, 8)
COLUMNS = ("sigma", "level", "a", "b", "g", "c", "p", "q", "e", "r")


def program(steps, **point):
    return few_step.tuned(TableFamily(**point).table(OWN, steps, SHAPE))


def assert_equal(found, expected, columns=COLUMNS):
    for column in columns:
        np.testing.assert_array_equal(getattr(found, column), getattr(expected, column), column)


@pytest.mark.parametrize("steps", [2, 3, 10, FAST_STEPS])
def test_the_family_contains_fast_and_dpmpp(steps):
    geometric = polynomial(OWN[0], OWN[-1], steps, 1.0)
    assert_equal(program(steps), few_step.fast(geometric))
    for eta in (0.0, 1.0, 4.0):
        point = {"eta": (eta,) * 4, "history": (1.0,) * 3, "final": 0.0}
        assert_equal(program(steps, **point), few_step.dpm_solver_pp(geometric, eta=eta))
        assert_equal(program(steps, **point), few_step.fast(geometric, eta=eta))
    bent = few_step.fast(polynomial(OWN[0], OWN[-1], steps))
    assert_equal(program(steps, bend=(1.5, 1.0)), bent)


def test_the_point_of_a_table_is_found_again():
    point = TableFamily(
        (1.3, 0.7), 4.0, (0.3, 1.9, 12.0, 5.9), (0.5, 1.2, 1.5), s_noise=1.01, final=0.3
    )
    table = point.table(OWN, 10, SHAPE)
    found = TableFamily.of_table(table, OWN)
    np.testing.assert_allclose(found.vector(), point.vector(), rtol=1e-5, atol=1e-6)
    few = TableFamily.of_table(point.table(OWN, 3, SHAPE), OWN)  # fewer rows than knots
    np.testing.assert_allclose(few.table(OWN, 3, SHAPE).sigmas, point.levels(OWN, 3), rtol=1e-5)


@pytest.mark.parametrize("steps", [2, 10])
def test_the_family_contains_euler(steps):
    """Up to the rounding of 1 - e^-h; the history is written, and has no weight."""
    expected = few_step.euler(polynomial(OWN[0], OWN[-1], steps, 1.0))
    found = program(steps, eta=(0.0,) * 4, history=(0.0,) * 3, final=0.0)
    assert_equal(found, expected, ("sigma", "level", "a", "g", "c"))
    np.testing.assert_allclose(found.b, expected.b, rtol=1e-14)


def er_sde_2(ladder, phi):
    """Rows (keep, weights of D_i and of D_{i-1}, noise) of ER-SDE-Solver-2 (Cui et al. 2023)."""
    rows = []
    for i, (now, after) in enumerate(itertools.pairwise(ladder)):
        ratio, pull = phi(after) / phi(now), 0.0
        if i > 0:
            whole = after - now + quad(lambda s, a=after: phi(a) / phi(s), after, now)[0]
            pull = whole / (now - ladder[i - 1])
        noise = math.sqrt(max(0.0, after**2 - (now * ratio) ** 2))
        rows.append((ratio, 1 - ratio + pull, -pull, noise))
    return np.array(rows)


def rows_of(found):
    """The same of a program without the step to 0, whose b and q multiply D - x, not D."""
    of_denoised = found.b / found.sigma
    return np.stack([found.a - of_denoised, of_denoised, found.g, found.c], axis=1)


PHIS = {
    "flow": lambda s: s,
    "sde": lambda s: s**2,
    "er_sde_5": lambda s: s * (math.exp(s**0.3) + 10),
}


@pytest.mark.parametrize("name", PHIS)
def test_tables_contain_the_second_order_er_sde(name):
    phi, ladder = PHIS[name], karras(9.0, 0.01, 12)
    expected = er_sde_2(ladder, phi)
    h = np.log(ladder[:-1] / ladder[1:])
    weight = 1 - expected[:, 0]
    history = np.append(0.0, -expected[1:, 2] / weight[1:] * 2 * h[:-1] / h[1:])
    # A flow's eta, -log of a ratio, is 0 up to rounding, and must not be below.
    eta = np.maximum(-np.log(expected[:, 0]) / h - 1, 0.0)
    found = few_step.dpm_solver_pp(ladder, eta=eta, history=history, denoise=False)
    np.testing.assert_allclose(rows_of(found), expected, rtol=1e-8, atol=1e-7)


def test_the_family_contains_er_sde_2_of_constant_eta():
    """On geometric levels its weight of the history is the same in every step."""
    eta, steps = 1.0, 10
    ladder = polynomial(OWN[0], OWN[-1], steps, 1.0)
    expected = er_sde_2(ladder, lambda s: s ** (1 + eta))
    (history,) = {round(float(x), 9) for x in -expected[1:, 2] / (1 - expected[1:, 0]) * 2}
    found = few_step.tuned(
        TableFamily(eta=(eta,) * 4, history=(history,) * 3).table(OWN, steps, SHAPE), denoise=False
    )
    np.testing.assert_allclose(rows_of(found), expected, rtol=1e-7, atol=1e-7)


def test_levels_bend_and_keep_their_ends():
    for bend in ((0.3, 1.0), (1.0, 4.0), (3.0, 0.3)):
        found = TableFamily(bend=bend, last=4.0).levels(OWN, 10)
        assert (found[0], found[-1]) == (OWN[0], 4 * OWN[-1])
        assert (np.diff(found) < 0).all()
    low, high = (TableFamily(bend=b).levels(OWN, 10) for b in ((2.0, 1.0), (1.0, 2.0)))
    middle = TableFamily().levels(OWN, 10)[5]
    assert low[5] < middle < high[5]
    assert TableFamily(last=1e6).levels(OWN, 3)[-1] == pytest.approx(0.3)  # half way at most


def test_levels_of_a_network_that_knows_few():
    own = np.geomspace(9, 0.01, 6)
    for bend in ((1.0, 1.0), (4.0, 1.0), (1.0, 4.0)):
        for steps in (2, 4, 6):
            found = TableFamily(bend=bend).levels(own, steps, trained=True)
            assert len(set(found)) == steps
            assert set(found) <= set(own)
            assert (np.diff(found) < 0).all()
    with pytest.raises(ValueError, match=r"2 to 6, the levels that this network knows.*got 7"):
        TableFamily().levels(own, 7, trained=True)
    with pytest.raises(ValueError, match="2 or more rows; got 1"):
        TableFamily().levels(own, 1)


def test_search_coordinates():
    point = TableFamily((1.2, 0.8), 5.5, (1.0, 5.3, 4.2, 0.5), (1.46, 0.6, 1.34), 1.01)
    again = TableFamily.of_vector(point.vector())
    for field in dataclasses.fields(TableFamily):
        np.testing.assert_allclose(getattr(again, field.name), getattr(point, field.name))
    for end in (LOWEST, HIGHEST):
        np.testing.assert_allclose(TableFamily.of_vector(end * 99 + end).vector(), end)
        TableFamily.of_vector(end).table(OWN, 10, SHAPE)  # a sampler, up to the ends of the box
    assert len(TableFamily().vector()) == 12
    assert (TableFamily().vector() >= LOWEST).all()


TABLE = TableFamily(last=3.0, eta=(1.0, 2.0, 2.0, 0.5)).table(tiny.model().sigmas.numpy(), 5, SHAPE)


@pytest.fixture
def model():
    found = tiny.model()
    found.tuned = TABLE
    return found


@pytest.mark.parametrize("steps", [None, 5])
def test_fast_uses_the_models_table(model, steps, caplog):
    found = methods.build("fast", model, steps, {})
    assert_equal(found, few_step.tuned(TABLE))
    assert (found.name, found.nfe, caplog.text) == ("fast", 5, "")
    assert methods.build("fast", model, steps, {"denoise": False}).nfe == 4


@pytest.mark.parametrize(
    ("steps", "options", "asked"),
    [
        (7, {}, "steps=7"),
        (5, {"eta": 4.0}, "eta"),
        (None, {"s_noise": 1.0, "schedule": "karras"}, "s_noise, schedule"),
        (None, {"sigmas": [5.0, 1.0]}, "sigmas"),
        (None, {"sigma_start": 1.0}, "sigma_start"),
    ],
)
def test_fast_says_where_it_does_not(model, steps, options, asked, caplog):
    caplog.set_level(logging.WARNING)
    found = methods.build("fast", model, steps, options)
    assert f"has 5 steps and takes no {asked}: method fast runs its default table" in caplog.text
    model.tuned = None
    assert_equal(found, methods.build("fast", model, steps, options))


def test_a_start_around_the_mean():
    mean = np.linspace(0, 1, 64).round(4)
    table = TableFamily().table(tiny.model().sigmas.numpy(), 5, SHAPE, mean=mean)
    with_mean, without = (
        few_step.tuned(table),
        few_step.tuned(dataclasses.replace(table, mean=None)),
    )
    x, y = (initial_state(p, 3, torch.arange(2), SHAPE) for p in (with_mean, without))
    torch.testing.assert_close(x - y, torch.from_numpy(mean).float().view(1, *SHAPE).expand_as(x))
    assert with_mean.head(2).mean is with_mean.mean
    with pytest.raises(ValueError, match=r"mean is \(1, 8, 8\); expected \(1, 4, 4\)"):
        initial_state(with_mean, 3, torch.arange(2), (1, 4, 4))


def test_noise_levels_are_those_of_the_chains():
    """On data of one point, whose variance in the chain is the noise."""
    table = TunedTable((9.0, 2.0, 0.5, 0.1), (1.0, 3.0, 0.0), (1.0, 0.5, 1.2), 1.02, SHAPE)
    for rows, expected in enumerate(table.noise_levels()[1:], start=1):
        _, variance = moments(few_step.tuned(table).head(rows), Data(variance=0.0))
        assert math.sqrt(variance) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"eta": [1.0]}, r"expected a number or one for each level; got shape \(1,\)"),
        ({"eta": [1.0, -1.0]}, r"must be at least 0; got \[1.0, -1.0\] and 1.0"),
        ({"history": math.inf}, "history must be finite; got inf"),
    ],
)
def test_bad_rows_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        few_step.dpm_solver_pp([2.0, 1.0], **options)
