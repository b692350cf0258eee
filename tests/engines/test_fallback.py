"""What runs where the fastest way is not precise enough: algorithm, type, then engine, in turn."""

import dataclasses
import logging

import pytest
import torch
from cross_section import SLOW, cross_section
from engine_cases import CPU, TYPES, model

from ncsn_fast import EngineError, ModelConfig, Sampler, ScoreModel
from ncsn_fast.engines import precision
from ncsn_fast.engines.base import PrecisionError
from ncsn_fast.engines.cpu import autotune
from ncsn_fast.engines.cpu.engine import CpuEngine
from ncsn_fast.engines.cpu.layers import Layer
from ncsn_fast.engines.cpu.plan import CpuPlan
from ncsn_fast.engines.eager import EagerEngine

SPEED = {"fp32 direct": 1.0, "fp32 winograd": 2.0, "bf16 direct": 1.5, "bf16 winograd": 4.0}


@pytest.fixture(autouse=True)
def choice(monkeypatch):
    """A processor on which Winograd is faster, and bfloat16 too if it has it."""
    ways = {way: speed for way, speed in SPEED.items() if way.split()[0] in TYPES}
    monkeypatch.setattr(autotune, "fastest", lambda *a, **k: autotune.Choice(ways))
    gains = {True: 2.0, False: 0.5}
    monkeypatch.setattr(
        autotune, "gains", lambda ls, *a: {x: gains[isinstance(x, Layer)] for x in ls}
    )
    monkeypatch.delenv("NCSN_FAST_CONVOLUTIONS", raising=False)


def built(caplog, of, **options):
    """The engine of a sampler, and the warnings of its build."""
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        engine = Sampler(of, device="cpu", batch_size=2, **options).engine_for(1)
    return engine, [record.getMessage() for record in caplog.records]


def unbalanced():
    """One channel between two convolutions is 4096 times the others, and its weights as much less.

    In real arithmetic nothing changes; in Winograd's fixed point the others lose their digits.
    """
    of = model(ngf=32)
    blocks = [of.net.res1[0], of.net.res1[1], of.net.res2[1], of.net.res3[0]]
    with torch.no_grad():
        for block in blocks:
            block.normalize2.gamma[3] *= 4096
            block.normalize2.beta[3] *= 4096
            block.conv2.weight[:, 3] /= 4096
    return of


@pytest.mark.parametrize(
    ("arch", "convolutions"), cross_section(["ncsnv2", "ncsn"], ["direct", "winograd"])
)
def test_where_float32_is_at_its_limit_float64_judges(arch, convolutions, monkeypatch):
    monkeypatch.setitem(precision.BOUNDS, "fp32", 1e-9)
    of = model(arch, ngf=32)
    engine = CpuEngine(of, device=CPU, dtype="fp32", batch_size=2, convolutions=convolutions)
    reference = EagerEngine(of, device=CPU, dtype="fp32", batch_size=2)
    x, levels = precision.probes(of, len(of.sigmas))
    seen = levels if of.conditional else None
    own = precision.relative_error(reference.output(x, seen), reference.exact(x, seen)).max()
    assert 1e-9 < engine.error <= 4 * own
    add = CpuPlan._add_convolution

    def wrong(self, op, of):
        if op.name == "end_conv":
            of = dataclasses.replace(of, weight=of.weight * (1 + 1e-3))
        return add(self, op, of)

    monkeypatch.setattr(CpuPlan, "_add_convolution", wrong)
    with pytest.raises(PrecisionError, match=rf"'cpu' in fp32 \({convolutions}\) differs from"):
        CpuEngine(of, device=CPU, dtype="fp32", batch_size=2, convolutions=convolutions)


@pytest.mark.parametrize("seed", [0, *(pytest.param(k, marks=SLOW) for k in (1, 2))])
def test_auto_runs_networks_that_are_hardly_trained(seed, caplog):
    """Their norms divide by small variances: two orders of float32 sums differ by 3e-5 and more."""
    torch.manual_seed(seed)
    config = ModelConfig(arch="ncsn_deeper", image_size=(8, 8), channels=1, ngf=16, n_sigmas=6)
    engine, warnings = built(caplog, ScoreModel(config))
    assert engine.output(torch.rand(2, 1, 8, 8), torch.tensor([0, 5])).isfinite().all()
    assert len(warnings) <= 1


def test_float64_is_float64():
    of = model("ncsn")
    x, levels = precision.probes(of, 3)
    exact = EagerEngine(of, device=CPU, dtype="fp32", batch_size=2).exact(x, levels)
    assert exact.dtype is torch.float64
    doubled = of.double()
    with torch.inference_mode():
        assert torch.allclose(doubled(x.double(), levels), exact, rtol=1e-12)


def test_the_algorithm_is_given_up_before_the_type(caplog):
    of = unbalanced()
    engine, warnings = built(caplog, of)
    assert (engine.name, engine.dtype, engine.convolutions) == ("cpu", "bf16", "direct")
    (warning,) = warnings
    assert warning.startswith("engine 'cpu' in bf16 (winograd) differs from the reference by ")
    assert warning.endswith(
        "Engine 'cpu' computes in bf16 (direct) instead, which takes about 2.7 times as long; "
        "a trained model usually passes"
    )
    with pytest.raises(PrecisionError, match=r"engine='auto' and omit dtype and convolutions: it"):
        built(caplog, of, convolutions="winograd", dtype="bf16", engine="cpu")


def test_the_type_is_given_up_before_the_engine(monkeypatch, caplog):
    monkeypatch.setitem(precision.BOUNDS, "bf16", 1e-4)
    for name in ("auto", "cpu"):
        engine, (warning,) = built(caplog, model(), engine=name)
        assert (engine.name, engine.dtype, engine.convolutions) == ("cpu", "fp32", "winograd")
        assert "'cpu' in bf16 (winograd) differs" in warning
        assert "computes in fp32 (winograd) instead, which takes about 2 times" in warning
        words = r"in bf16 \(direct\) differs .*; use engine='auto' and omit dtype: it takes"
        with pytest.raises(PrecisionError, match=words):
            built(caplog, model(), engine=name, dtype="bf16")


def test_auto_ends_in_eager(monkeypatch, caplog):
    for name in CpuEngine.dtypes:
        monkeypatch.setitem(precision.BOUNDS, name, 1e-12)
    monkeypatch.setattr(precision, "_FLOAT32_MULTIPLE", 0)
    for dtype in (None, "fp32"):
        engine, (warning,) = built(caplog, model(), dtype=dtype)
        assert (engine.name, engine.dtype) == ("eager", "fp32")
        assert "'cpu' in fp32 (direct) differs" in warning
        assert "Engine 'eager' computes in fp32 instead, which is slower" in warning
    with pytest.raises(PrecisionError, match=r"; use engine='auto': it takes the fastest"):
        built(caplog, model(), engine="cpu", dtype="fp32")
    sampler = Sampler(model(), device="cpu", batch_size=2)
    sampler.sample(1, progress=False)
    assert (sampler.engine_class, sampler.dtype) == (EagerEngine, "fp32")
    assert sampler.report.engine == "eager"
    with pytest.raises(PrecisionError, match=r"engine='auto' and omit convolutions"):
        built(caplog, model(), convolutions="direct")


def test_auto_passes_over_an_engine_that_breaks(monkeypatch, caplog):
    def broken(*arguments):
        raise RuntimeError("could not create a primitive")

    monkeypatch.setattr(CpuPlan, "run", broken)
    engine, (warning,) = built(caplog, model())
    assert engine.name == "eager"
    assert warning == (
        "could not create a primitive. Engine 'eager' computes in fp32 instead, which is slower"
    )
    with pytest.raises(RuntimeError, match=r"^could not create a primitive$"):
        built(caplog, model(), engine="cpu")


def test_a_damaged_model_ends_the_call_at_once(caplog):
    of = model()
    with torch.no_grad():
        of.net.end_conv.bias[1] = torch.nan
    with pytest.raises(EngineError, match="own output is not finite"):
        built(caplog, of)
    assert not caplog.records
