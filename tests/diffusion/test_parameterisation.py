"""The four coefficients: identities in float64, the table of the module, files."""

import itertools
import json
import math

import numpy as np
import pytest
import torch

from ncsn_fast.diffusion.parameterisation import (
    DiscreteVP,
    Parameterisation,
    from_spec,
    standard,
)
from ncsn_fast.diffusion.sde import VE, VP, SubVP

SIGMAS = torch.tensor([0.011, 0.2, 1.0, 7.0, 49.0], dtype=torch.float64)
VP_MEAN = (1 + SIGMAS.square()).rsqrt()
SUB_VP = SubVP()
SUB_MEAN = SUB_VP.mean_scale(SUB_VP.time(SIGMAS))
D = 0.5
CASES = [
    ("score", None, 1, SIGMAS**2, 1),
    ("score", VP(), 1, SIGMAS**2 * VP_MEAN, VP_MEAN),
    ("score", SUB_VP, 1, SIGMAS**2 * SUB_MEAN, SUB_MEAN),
    ("scaled_score", VE(), 1, SIGMAS, 1),
    ("scaled_score", VP(), 1, SIGMAS, VP_MEAN),
    ("epsilon", None, 1, -SIGMAS, 1),
    ("epsilon", DiscreteVP(), 1, -SIGMAS, VP_MEAN),
    ("denoised", None, 0, 1, 1),
    ("denoised", VP(), 0, 1, VP_MEAN),
    ("v", VP(), VP_MEAN**2, -SIGMAS * VP_MEAN, VP_MEAN),
    (
        "edm", None, D**2 / (SIGMAS**2 + D**2), SIGMAS * D / (SIGMAS**2 + D**2).sqrt(),
        1 / (SIGMAS**2 + D**2).sqrt(),
    ),
]  # fmt: skip


@pytest.mark.parametrize(("predicts", "process", "skip", "out", "inner"), CASES)
def test_coefficients_of_the_table(predicts, process, skip, out, inner):
    known = standard(predicts, sees="sigma", process=process)
    for function, wanted in ((known.c_skip, skip), (known.c_out, out), (known.c_in, inner)):
        wanted = torch.as_tensor(wanted, dtype=torch.float64).expand_as(SIGMAS)
        torch.testing.assert_close(function(SIGMAS), wanted, rtol=1e-13, atol=0)


@pytest.mark.parametrize(("predicts", "process", "skip", "out", "inner"), CASES)
@pytest.mark.parametrize("data_range", [(0.0, 1.0), (-1.0, 1.0), (3.0, 7.0)])
def test_identities(predicts, process, skip, out, inner, data_range):
    """D from F, score from D, noise from D: with x of this package, and the network's own data."""
    known = standard(predicts, sees="sigma", process=process, data_range=data_range)
    low, high = data_range
    generator = torch.Generator().manual_seed(0)
    x0, z = torch.randn(2, len(SIGMAS), dtype=torch.float64, generator=generator)
    x = x0 + SIGMAS * z
    u0, s = low + (high - low) * x0, (high - low) * SIGMAS
    u = u0 + s * z
    m = known.c_in(s) if predicts != "edm" else None
    target = {
        "score": lambda: -z / (s * m),
        "scaled_score": lambda: -z,
        "epsilon": lambda: z,
        "denoised": lambda: u0,
        "v": lambda: m * z - s * m * u0,
        "edm": lambda: (u0 - known.c_skip(s) * u) / known.c_out(s),
    }[predicts]()
    form = known.linear_form(SIGMAS)
    torch.testing.assert_close(form.scale * x + form.shift, known.c_in(s) * u)
    # The best denoiser of a single image knows it, and the score is -z / sigma.
    f = form.skip * x + form.out * target + form.const
    torch.testing.assert_close(f, -z, rtol=1e-9, atol=1e-9)
    denoised = known.c_skip(s) * u + known.c_out(s) * target
    torch.testing.assert_close(denoised, u0, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(x + SIGMAS * f, x0, rtol=1e-9, atol=1e-8)


@pytest.mark.parametrize(
    ("sees", "process", "wanted"),
    [
        ("sigma", None, SIGMAS),
        ("log_sigma", None, SIGMAS.log()),
        ("log_half_sigma", None, (SIGMAS / 2).log()),
        ("log_sigma/4", None, SIGMAS.log() / 4),
        ("time", VP(), 999 * VP().time(SIGMAS)),
        ("time", SUB_VP, 999 * SUB_VP.time(SIGMAS)),
    ],
)
def test_what_the_network_sees(sees, process, wanted):
    known = standard("epsilon", sees=sees, process=process, time_scale=999.0)
    assert known.condition(SIGMAS).dtype == torch.float32
    torch.testing.assert_close(known.condition(SIGMAS).double(), wanted, rtol=1e-6, atol=0)
    assert standard("epsilon", sees="nothing").condition(SIGMAS) is None
    levels = standard("score", sees="level", sigmas=(40.0, 5.0, 0.3, 0.01))
    assert levels.condition(SIGMAS).tolist() == [3, 2, 2, 1, 0]
    unit = standard("epsilon", sees="sigma", data_range=(-1, 1))
    torch.testing.assert_close(unit.condition(SIGMAS).double(), 2 * SIGMAS, rtol=1e-6, atol=0)


@pytest.mark.parametrize("betas", ["linear", "scaled_linear", "cosine"])
def test_discrete_chains(betas):
    chain = DiscreteVP(200, 1e-3, 0.1, betas)
    beta = np.linspace(1e-3, 0.1, 200)
    if betas == "scaled_linear":
        beta = np.linspace(math.sqrt(1e-3), math.sqrt(0.1), 200) ** 2
    if betas == "cosine":
        level = [math.cos((i / 200 + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(201)]
        beta = [min(1 - b / a, 0.999) for a, b in itertools.pairwise(level)]
    kept = np.cumprod(1 - np.asarray(beta))
    np.testing.assert_allclose(chain.sigmas, np.sqrt((1 - kept) / kept), rtol=1e-12)
    np.testing.assert_allclose(chain.time(chain.sigmas), np.arange(200), atol=1e-9)
    between = math.sqrt(chain.sigmas[10] * chain.sigmas[11])
    assert chain.time(between) == pytest.approx(10.5)
    np.testing.assert_allclose(chain.noise_level(10.5), between)
    rounded = DiscreteVP(200, 1e-3, 0.1, betas, rounded=True)
    assert rounded.time(torch.tensor([between * 1.001])).tolist() == [11]
    assert chain.time(torch.tensor([1e-9, 1e9])).tolist() == [0, 199]  # nothing beyond the ends


def test_ddpms_last_noise():
    """Ho et al. 2020: 1000 betas from 1e-4 to 0.02 leave abar = 4.04e-5."""
    assert 1 / (1 + DiscreteVP().sigmas[-1] ** 2) == pytest.approx(4.04e-5, rel=2e-3)


PROCESSES = [None, VE(0.02, 90.0), VP(), SubVP(0.2, 10.0), DiscreteVP(rounded=True)]


@pytest.mark.parametrize("process", PROCESSES, ids=str)
def test_files_hold_them(process):
    known = standard("epsilon", sees="sigma", process=process, data_range=(-1, 1))
    again = from_spec(json.loads(json.dumps(known.spec)))
    assert again.spec == known.spec
    for mine, theirs in zip(again.linear_form(SIGMAS), known.linear_form(SIGMAS), strict=True):
        assert torch.equal(mine, theirs)
    assert again.sigma_limit == known.sigma_limit


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"predicts": "noise"}, "predicts must be one of"),
        ({"sees": "clock"}, "sees must be one of"),
        ({"process": {"kind": "os.system"}}, "process must be one of ve, vp"),
        ({"process": {"kind": "vp", "beta_min": -1.0}}, "0 < beta_min"),
        ({"process": {"kind": "vp", "gamma": 1.0}}, "gamma"),
        ({"data_range": [1, 0]}, "data_range must be two numbers, the lower first"),
        ({"sigma_data": -1}, "sigma_data must be positive"),
        ({"more": 1}, "more"),
    ],
)
def test_files_that_hold_none(change, text):
    spec = {**standard("epsilon", sees="sigma").spec, **change}
    with pytest.raises((ValueError, TypeError), match=text):
        from_spec(spec)


def test_a_last_level_is_known():
    assert standard("epsilon", sees="time", process=VE(0.01, 30.0)).sigma_limit == pytest.approx(30)
    half = standard("epsilon", sees="time", process=VE(0.01, 30.0), data_range=(-1, 1))
    assert half.sigma_limit == pytest.approx(15)
    own = Parameterisation(torch.ones_like, torch.clone, torch.ones_like)
    assert own.sigma_limit == math.inf
    assert own.condition(SIGMAS) is None
