"""The engine for GPUs on a GPU: graphs against plain calls, bits, waiting, and full memory."""

import networks
import own_networks
import pytest
import torch
from engine_cases import LEVELS, chains_of, model, program_of

from ncsn_fast import ModelConfig, Sampler, SamplingError, ScoreModel, wrap
from ncsn_fast.engines import precision
from ncsn_fast.engines.cuda import kernels as gpu_kernels
from ncsn_fast.engines.cuda.engine import CudaEngine
from ncsn_fast.engines.eager import EagerEngine
from ncsn_fast.inference.runner import Job, run
from ncsn_fast.ops import backends
from ncsn_fast.samplers.program_transforms import interpolation_weights

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU, CUDA's torch"),
]
FAMILIES = [family for family in gpu_kernels.FAMILIES if not backends.missing(family)]
DTYPES = ["fp32", "tf32", "bf16", "fp16"]
CUDA = torch.device("cuda")


def engine(of, dtype="bf16", batch_size=2, kind=CudaEngine, **options):
    return kind(of, device=CUDA, dtype=dtype, batch_size=batch_size, **options)


def chains(of, **options):
    return chains_of(of, device=CUDA, **options)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("arch", ["ncsnv2", "ncsn", "ncsnv2_deepest"])
def test_networks_are_within_their_bounds(arch, dtype, family):
    torch.manual_seed(0)
    of = ScoreModel(ModelConfig(arch=arch, image_size=(32, 32), ngf=64, n_sigmas=LEVELS))
    if (arch, dtype) == ("ncsn", "bf16"):
        dtype = "fp16"  # random weights of the 2019 network are beyond bfloat16
    assert 0 < engine(of, dtype, kernels=family).error <= precision.BOUNDS[dtype]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["ald", "cas"])
@pytest.mark.parametrize("arch", ["ncsnv2", "ncsn"])
def test_graphs_have_the_bits_of_plain_calls(arch, method, family):
    of = model(arch)
    program = program_of(of, method)
    plain = engine(of, "fp16", graph="none", kernels=family)
    for seed in (3, 2**32 - 1):
        expected = plain.run(program, chains(of, seed=seed)).clone()
        assert torch.isfinite(expected).all()
        for graph in ("step", "level", "loop"):
            built = engine(of, "fp16", graph=graph, kernels=family)
            for _ in range(2):  # the second run replays what the first captured
                assert torch.equal(built.run(program, chains(of, seed=seed)), expected)


def test_seeds_levels_and_calls_share_a_graph():
    of = model()
    built, program = engine(of), program_of(of)
    runs = [built.run(program, chains(of, seed=s)).clone() for s in (1, 2, 1)]
    assert torch.equal(runs[0], runs[2])
    assert (runs[0] - runs[1]).abs().max() > 0.01
    assert len(built.loop((16, 16)).graphs) == 2  # two rows, and the denoising one
    assert built.loop((16, 16)).graphs.captures


def test_the_reference_draws_the_same_samples():
    of = model()
    program = program_of(of)
    expected = engine(of, "fp32", kind=EagerEngine).run(program, chains(of))
    x = engine(of, "fp32").run(program, chains(of))
    torch.testing.assert_close(x, expected, rtol=0.0, atol=2e-3)


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_a_sample_does_not_depend_on_its_batch(dtype):
    """Nor on its place, nor on how many there are, nor on the shard that draws it."""
    of = model(ngf=32)
    sampler = Sampler(of, engine="cuda", dtype=dtype, batch_size=4)
    all_ten = sampler.sample(10, seed=5, progress=False)
    assert torch.equal(sampler.sample(3, seed=5, progress=False), all_ten[:3])
    assert torch.equal(sampler.sample(4, seed=5, start=6, progress=False), all_ten[6:])
    fresh = Sampler(of, engine="cuda", dtype=dtype, batch_size=4)
    assert torch.equal(fresh.sample(2, seed=5, start=4, progress=False), all_ten[4:6])


def test_families_and_engines_agree():
    of = model()
    drawn = [
        Sampler(of, engine="cuda", dtype="fp32", kernels=family).sample(3, progress=False)
        for family in FAMILIES
    ]
    drawn += [
        Sampler(of, engine="eager", device=device).sample(3, progress=False)
        for device in ("cuda", "cpu")
    ]
    for other in drawn[1:]:
        torch.testing.assert_close(other, drawn[0], rtol=0.0, atol=2e-3)


def test_nothing_waits_inside_a_level():
    of = model("ncsn")
    built, program = engine(of, "fp16"), program_of(of, n_steps_each=5)
    built.run(program, chains(of))
    with built.context():
        levels = torch.zeros(program.nfe, dtype=torch.int64, device=CUDA)
        run = built.stepper(program, chains(of), levels, None)
        run(0, 5)  # loads the program, which may wait
        torch.cuda.set_sync_debug_mode("error")
        try:
            run(5, 10)
            run(10, 15)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_lost_chains_are_named_with_and_without_a_callback():
    of = model()
    built, program = engine(of, "fp16"), program_of(of)
    init = torch.rand(5, 3, 16, 16)
    init[3, 1, 2, 3] = float("nan")
    job = Job(torch.arange(10, 15), init=init)
    message = r"sample 13 of seed 7 is no longer finite at level 0 \(sigma 5\)"
    for callback in (None, lambda progress: None):
        with pytest.raises(SamplingError, match=message):
            list(run(built, program, job, 7, progress=False, callback=callback))


def test_variants_of_the_update_have_graphs_of_their_own():
    of = model()
    built, program = engine(of), program_of(of)
    first = built.run(program, chains(of)).clone()
    mixed = chains(of)
    mixed.noise_weights = interpolation_weights(2).float().to(CUDA)
    second = built.run(program, mixed)
    assert torch.equal(first[0], second[0])  # weights (1, 0)
    assert not torch.equal(first[1], second[1])
    assert torch.equal(built.run(program, chains(of)), first)


def test_a_full_gpu_halves_the_micro_batch(caplog):
    of = model(image_size=(64, 64), ngf=64)
    expected = Sampler(of, engine="cuda", dtype="fp16", batch_size=128).sample(128, progress=False)
    torch.cuda.empty_cache()
    sampler = Sampler(of, engine="cuda", dtype="fp16", batch_size=256)
    need = sampler.engine_for(256).resized(256).memory()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 0.85 * need) / total)
    try:
        samples = sampler.sample(128, progress=False)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert "going on with 128" in caplog.text
    assert torch.equal(samples, expected)


def test_describe_times_every_operation():
    built = engine(model())
    assert built.describe().count("GFLOP/s") > 70
    assert built.memory() > 0


def users(name):
    if name == "diffusers":
        pytest.importorskip("diffusers")
    return own_networks.model(name)


def labelled(of, seed=3):
    made = chains(of, seed=seed)
    made.labels = torch.tensor([2, 0], device=CUDA) if of.n_classes else None
    return made


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", own_networks.CASES)
def test_users_networks_run_captured_as_by_the_reference(name, family):
    of = users(name)
    program = program_of(of)
    expected = engine(of, "fp32", kind=EagerEngine).run(program, labelled(of))
    plain = engine(of, "fp32", graph="none", kernels=family).run(program, labelled(of)).clone()
    torch.testing.assert_close(plain, expected, rtol=0.0, atol=5e-3 * float(expected.abs().max()))
    for graph in ("step", "level", "loop"):
        built = engine(of, "fp32", graph=graph, kernels=family)
        for _ in range(2):  # the second run replays what the first captured
            assert torch.equal(built.run(program, labelled(of)), plain)
        graphs = built.loop(of.config.image_size).graphs
        assert graphs.captures
        assert len(graphs) > 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["diffusers", "unet", "edm", "classes"])
def test_users_networks_are_within_their_bounds(name, dtype):
    assert 0 < engine(users(name), dtype).error <= precision.BOUNDS[dtype]


@pytest.mark.parametrize("method", ["fast", "ald", "pc"])
@pytest.mark.parametrize("guidance", [None, 2.0])
def test_classes_and_guidance(method, guidance):
    of = own_networks.model("classes")
    drawn = [
        Sampler(of, engine=name, dtype="fp32", device=device).sample(
            3, method=method, labels=[0, 2, 1], guidance=guidance, seed=5, progress=False
        )
        for name, device in (("cuda", "cuda"), ("eager", "cuda"), ("eager", "cpu"))
    ]
    for other in drawn[1:]:
        torch.testing.assert_close(drawn[0], other, rtol=0.0, atol=5e-3)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("arch", ["ncsnv2", "ncsn"])
def test_calls_of_the_network_have_the_bits_of_plain_ones(arch, family):
    of = model(arch)
    x, level = torch.rand(2, 3, 16, 16, device=CUDA), torch.tensor([0, 4], device=CUDA)
    level = level if of.conditional else None
    built, plain = (engine(of, "fp16", graph=graph, kernels=family) for graph in ("level", "none"))
    with built.context():
        expected = plain.network(x, level)
        for _ in range(3):  # one captures, two replay
            assert torch.equal(built.network(x, level), expected)
    assert built.loop((16, 16)).graphs.captures


def test_what_pytorch_runs_is_captured():
    """Grouped and transposed convolutions, layer norm, border, and what only PyTorch has."""
    torch.manual_seed(0)
    of = wrap(networks.Odd(), predicts="epsilon", image_shape=(4, 8, 8), sigma_min=0.1,
              sigma_max=2.0, n_sigmas=3, n_steps_each=2)  # fmt: skip
    program = program_of(of)
    expected = engine(of, "fp32", kind=EagerEngine).run(program, chains(of))
    built = engine(of, "fp32")
    for _ in range(2):
        x = built.run(program, chains(of))
        torch.testing.assert_close(x, expected, rtol=0.0, atol=5e-3 * float(expected.abs().max()))
    assert built.loop((8, 8)).graphs.captures
    kinds = {cost.kind for cost in built.loop((8, 8)).plan.costs}
    named = {"torch", "conv (torch)", "conv_transpose (torch)", "layer_norm (torch)", "pad (torch)"}
    assert named < kinds
    assert "PyTorch's" in built.describe()


def test_what_waits_for_the_gpu_runs_uncaptured():
    of = wrap(networks.Masked(), predicts="epsilon", image_shape=(1, 8, 8), sigma_min=0.1,
              sigma_max=2.0, n_sigmas=3)  # fmt: skip
    program = program_of(of)
    expected = engine(of, "fp32", kind=EagerEngine).run(program, chains(of))
    built = engine(of, "fp32")
    torch.testing.assert_close(
        built.run(program, chains(of)), expected, rtol=0.0, atol=5e-3 * float(expected.abs().max())
    )
    assert built.graph == "none"


def test_nothing_waits_inside_a_level_of_a_users_network():
    of = own_networks.model("unet")
    built, program = engine(of, "bf16"), program_of(of, n_steps_each=5)
    built.run(program, chains(of))
    with built.context():
        levels = built.condition(torch.from_numpy(program.sigma)).to(CUDA)
        run = built.stepper(program, chains(of), levels, None)
        run(0, 5)  # loads the program, which may wait
        torch.cuda.set_sync_debug_mode("error")
        try:
            run(5, 10)
            run(10, 15)
        finally:
            torch.cuda.set_sync_debug_mode("default")
