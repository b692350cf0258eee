"""Networks that users bring, by every method, on every engine that runs them."""

import engine_cases
import own_networks
import pytest
import torch
from cross_section import cross_section

from ncsn_fast import EngineUnavailable, Sampler, engines, wrap
from ncsn_fast.samplers.methods import METHODS

JUMPS = ("adaptive", "ode", "mala", "hmc")  # roundings decide their steps, and whether they accept


@pytest.fixture(scope="module")
def samplers():
    """Samplers by (network, engine, dtype), built once each."""
    made = {}
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setitem(engines.ENGINES, "cuda", engine_cases.CudaOnCpu)

    def get(name, engine, dtype=None):
        if (name, engine, dtype) not in made:
            of = own_networks.model(name)
            made[name, engine, dtype] = Sampler(of, engine=engine, dtype=dtype, device="cpu")
        return made[name, engine, dtype]

    yield get
    monkeypatch.undo()


def drawn(sampler, method, n=2, **options):
    labels = [0, 2][:n] if sampler.model.n_classes else None
    return sampler.sample(n, method=method, seed=5, labels=labels, progress=False, **options)


@pytest.mark.parametrize(("name", "method"), cross_section([*own_networks.CASES], [*METHODS]))
def test_our_engine_draws_eagers_samples(samplers, name, method):
    expected = drawn(samplers(name, "eager"), method)
    found = drawn(samplers(name, "cpu", "fp32"), method)
    assert expected.isfinite().all()
    scale = max(1.0, float(expected.abs().max()))
    assert (found - expected).abs().max() <= (0.1 if method in JUMPS else 5e-3) * scale


@pytest.mark.parametrize(
    ("name", "method"), cross_section([*own_networks.CASES], ["ald", "fast", "pc", "heun", "ode"])
)
def test_our_engine_for_gpus_draws_eagers_samples(samplers, name, method):
    expected = drawn(samplers(name, "eager"), method)
    found = drawn(samplers(name, "cuda", "fp32"), method)
    bound = (0.1 if method in JUMPS else 5e-3) * max(1.0, float(expected.abs().max()))
    assert (found - expected).abs().max() <= bound


@pytest.mark.slow
@pytest.mark.parametrize("name", own_networks.CASES)
def test_compiled_samples_are_eagers(samplers, name):
    expected = drawn(samplers(name, "eager"), "fast")
    assert (drawn(samplers(name, "compile"), "fast") - expected).abs().max() < 5e-3


@pytest.mark.parametrize("name", own_networks.CASES)
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


@pytest.mark.usefixtures("samplers")
@pytest.mark.parametrize("engine", ["cpu", "cuda"])
def test_what_cannot_be_exported_is_refused_with_the_reason(engine):
    of = wrap(Unexportable(), predicts="epsilon", image_shape=(1, 8, 8), sigma_min=0.1, sigma_max=2)
    message = rf"'{engine}' does not run networks with a forward that torch.export .*'eager'"
    with pytest.raises(EngineUnavailable, match=message):
        Sampler(of, engine=engine, device="cpu")


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
