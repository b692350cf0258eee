"""Networks that users bring, by every method, on every engine that runs them."""

import itertools
import os

import engine_cases
import own_networks
import pytest
import torch
import trt_cases
from cross_section import SLOW, cross_section

from ncsn_fast import EngineUnavailable, Sampler, engines, wrap
from ncsn_fast.samplers.methods import METHODS

JUMPS = ("adaptive", "ode", "mala", "hmc")  # roundings decide their steps, and whether they accept
# Of methods whose default is more than the samples need to tell networks apart.
STEPS = {"euler": 12, "em": 60}
BESIDE_CPU = ("cuda", "ort", "compile", "trt")


@pytest.fixture(scope="module")
def samplers(tmp_path_factory):
    """Samplers by (network, engine, dtype), built once each; GPUs are doubles on the CPU."""
    made = {}
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setitem(engines.ENGINES, "cuda", engine_cases.CudaOnCpu)
    # The double's caches are for its own engines: others keep what they have timed.
    kept = {name: os.environ.get(name) for name in ("XDG_CACHE_HOME", "XDG_CONFIG_HOME")}
    trt_cases.install(monkeypatch, tmp_path_factory.mktemp("trt"), "11.4")
    own = {name: os.environ[name] for name in kept}

    def set_folders(values):
        for name, value in values.items():
            os.environ.pop(name, None)
            os.environ.update({} if value is None else {name: value})

    def get(name, engine, dtype=None):
        if (name, engine, dtype) not in made:
            of = own_networks.model(name)
            made[name, engine, dtype] = Sampler(of, engine=engine, dtype=dtype, device="cpu")
            if engine == "trt":
                set_folders(own)
                made[name, engine, dtype].engine_for(2)
                set_folders(kept)
        return made[name, engine, dtype]

    set_folders(kept)
    yield get
    monkeypatch.undo()


@pytest.fixture(scope="module")
def expected_of(samplers):
    """Samples of eager by (network, method), and the largest error against them."""
    known = {}

    def get(name, method):
        if (name, method) not in known:
            x = drawn(samplers(name, "eager"), method, **few(method))
            bound = (0.1 if method in JUMPS else 5e-3) * max(1.0, float(x.abs().max()))
            known[name, method] = x, bound
        return known[name, method]

    return get


def few(method):
    return {"steps": STEPS[method]} if method in STEPS else {}


def drawn(sampler, method, n=2, **options):
    labels = [0, 2][:n] if sampler.model.n_classes else None
    return sampler.sample(n, method=method, seed=5, labels=labels, progress=False, **options)


@pytest.mark.parametrize(("name", "method"), cross_section([*own_networks.CASES], [*METHODS]))
def test_our_engine_draws_eagers_samples(samplers, name, method):
    expected = drawn(samplers(name, "eager"), method, **few(method))
    found = drawn(samplers(name, "cpu", "fp32"), method, **few(method))
    assert expected.isfinite().all()
    scale = max(1.0, float(expected.abs().max()))
    assert (found - expected).abs().max() <= (0.1 if method in JUMPS else 5e-3) * scale


def beside_cpu():
    """Returns the whole product; fast are a few of our engine for GPUs."""
    chosen = cross_section([*own_networks.CASES], ["ald", "fast", "pc", "heun", "ode"])
    fast = {("cuda", *each.values) for each in chosen if not each.marks}
    product = itertools.product(BESIDE_CPU, own_networks.CASES, METHODS)
    return [pytest.param(*values, marks=[SLOW] * (values not in fast)) for values in product]


@pytest.mark.parametrize(("engine", "name", "method"), beside_cpu())
def test_other_engines_draw_eagers_samples(samplers, expected_of, engine, name, method):
    expected, bound = expected_of(name, method)
    found = drawn(samplers(name, engine, "fp32"), method, **few(method))
    assert expected.isfinite().all()
    assert (found - expected).abs().max() <= bound


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[SLOW] * (n in ("diffusers", "classes"))) for n in own_networks.CASES],
)
def test_auto_takes_our_engine_and_names_every_operation(samplers, name):
    sampler = samplers(name, "auto")
    x = drawn(sampler, "fast")
    assert x.isfinite().all()
    assert sampler.engine_class.name in ("cpu", "eager")
    told = samplers(name, "cpu", "fp32").engine_for(2).describe()
    assert "operations in fp32" in told


class Unexportable(torch.nn.Module):
    def forward(self, x):
        return x * float(x.sum())  # a number that depends on the image


class FixedNumber(torch.nn.Module):
    def forward(self, x):
        return x * len(x)  # a constant of the exported network


@pytest.mark.usefixtures("samplers")
@pytest.mark.parametrize("engine", ["cpu", "cuda", "ort", "trt"])
def test_what_cannot_be_exported_is_refused_with_the_reason(engine):
    of = wrap(Unexportable(), predicts="epsilon", image_shape=(1, 8, 8), sigma_min=0.1, sigma_max=2)
    message = rf"'{engine}' does not run networks with a forward that torch.export .*'eager'"
    with pytest.raises(EngineUnavailable, match=message):
        Sampler(of, engine=engine, device="cpu")


def test_a_graph_for_any_number_of_images_is_refused_before_the_work_starts(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    of = wrap(FixedNumber(), predicts="epsilon", image_shape=(1, 8, 8), sigma_min=0.1, sigma_max=2)
    message = "'ort' does not run networks with a forward that fixes the number of images, as len"
    with pytest.raises(EngineUnavailable, match=message):
        Sampler(of, engine="ort", device="cpu")


@pytest.mark.parametrize("engine", ["cpu", "cuda"])
def test_guidance_on_our_engines(samplers, engine):
    eager, ours = samplers("classes", "eager"), samplers("classes", engine, "fp32")
    for method in ("fast", "ald", "pc"):
        expected = drawn(eager, method, guidance=2.0)
        assert (drawn(ours, method, guidance=2.0) - expected).abs().max() < 5e-3
        assert (drawn(ours, method) - expected).abs().max() > 1e-3


@pytest.mark.parametrize("engine", ["cpu", "cuda"])
def test_other_sizes_of_micro_batches(samplers, engine):
    """Networks are exported once, for any number of images."""
    ours, eager = samplers("unet", engine, "fp32"), samplers("unet", "eager")
    for n in (1, 3, 5):
        x = ours.sample(n, method="fast", progress=False)
        torch.testing.assert_close(
            x, eager.sample(n, method="fast", progress=False), rtol=0, atol=5e-3
        )
