"""The fused instance normalisation++ against its float64 specification, on adversarial inputs."""

import pytest
import torch
from norm_cases import INPUTS, noise_like, parameters, worst

from ncsn_fast import _C, ops
from ncsn_fast.ops import backends, checks, reference

LEVELS = _C.isa_levels()
LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
EPSILON = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-7}


@pytest.mark.parametrize("per_sample", [False, True], ids=["shared", "conditional"])
@pytest.mark.parametrize("elu", [False, True], ids=["linear", "elu"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", EPSILON)
@pytest.mark.parametrize("name", INPUTS)
def test_within_twice_eager(name, dtype, layout, elu, per_sample):
    x = INPUTS[name]().to(dtype).contiguous(memory_format=LAYOUTS[layout])
    affine = parameters(*x.shape[:2], per_sample)
    exact = reference.instance_norm_plus(x.double(), *affine, elu=elu)
    eager = reference.instance_norm_plus(x, *affine, elu=elu)
    ours = ops.instance_norm_plus(x, *affine, elu=elu)
    # Floor: two roundings of the largest output.
    floor = 2 * EPSILON[dtype] * exact.abs().max().item()
    assert worst(ours, exact) <= 2 * worst(eager, exact) + floor
    assert ours.dtype == dtype
    assert ours.is_contiguous(memory_format=LAYOUTS[layout])
    for level in LEVELS:
        with ops.isa(level):
            assert torch.equal(ops.instance_norm_plus(x, *affine, elu=elu), ours), level


def test_mixed_dtypes_into_a_buffer():
    x = (noise_like(2, 24, 6, 6) - 2.3).contiguous(memory_format=torch.channels_last)
    affine = parameters(2, 24)
    full = ops.instance_norm_plus(x, *affine, elu=True)
    half = torch.empty_like(x, dtype=torch.bfloat16)
    assert ops.instance_norm_plus_out(x, *affine, half, elu=True) is half
    assert torch.equal(half, full.bfloat16())
    wide = torch.empty_like(x)
    ops.instance_norm_plus_out(x.bfloat16(), *affine, wide)
    assert torch.equal(wide, ops.instance_norm_plus(x.bfloat16().float(), *affine))
    ops.instance_norm_plus_out(x, *affine, x, elu=True)
    assert torch.equal(x, full)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("value", [0.1, -2.3, 1e3])
def test_constant_channels_give_the_shift_exactly(layout, value):
    x = (value * torch.arange(1, 6)[None, :, None, None]).expand(2, 5, 33, 35)
    affine = alpha, gamma, beta = parameters(2, 5)
    y = ops.instance_norm_plus(x.contiguous(memory_format=LAYOUTS[layout]), *affine)
    assert torch.equal(y, y[:, :, :1, :1].expand_as(y))
    mean = x[0, :, 0, 0].double()
    mean_hat = (mean - mean.mean()) / (mean.var() + 1e-5).sqrt()
    torch.testing.assert_close(y[0, :, 0, 0].double(), gamma * alpha * mean_hat + beta)


def test_one_channel_and_one_pixel_are_finite():
    for shape in ((2, 1, 4, 4), (2, 6, 1, 1), (1, 1, 1, 1)):
        y = ops.instance_norm_plus(noise_like(*shape), *parameters(*shape[:2]))
        assert y.isfinite().all()


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 0, 4, 4), (2, 3, 0, 4)])
def test_empty(shape):
    assert ops.instance_norm_plus(torch.empty(shape), *parameters(*shape[:2])).shape == shape


def test_nan_stays_in_its_sample():
    x = noise_like(3, 8, 6, 6)
    clean = ops.instance_norm_plus(x, *parameters(3, 8), elu=True)
    x[1, 2, 3, 4] = float("nan")
    y = ops.instance_norm_plus(x, *parameters(3, 8), elu=True)
    assert y[1].isnan().all()
    assert torch.equal(y[[0, 2]], clean[[0, 2]])


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[:, ::2],
        lambda x: x[:, :, 1:, :-2],
        lambda x: x.transpose(2, 3),
        lambda x: x.contiguous(memory_format=torch.channels_last)[:, 3:],
        lambda x: x[:1].expand(4, -1, -1, -1),
    ],
    ids=["every second channel", "cropped", "transposed", "sliced channels-last", "expanded"],
)
def test_other_memory_formats(view):
    x = view(noise_like(2, 12, 8, 10) - 2.3)
    affine = parameters(*x.shape[:2])
    y = ops.instance_norm_plus(x, *affine)
    assert torch.equal(y, ops.instance_norm_plus(x.contiguous(), *affine))


def test_parameters_may_be_strided_low_precision_and_mixed():
    x = noise_like(2, 6, 5, 5)
    alpha, gamma, beta = parameters(2, 6)
    expected = ops.instance_norm_plus(x, alpha.bfloat16().float(), gamma, beta)
    strided = torch.stack((gamma, gamma), dim=1)[:, 0]
    mixed = beta.expand(2, 6)
    assert torch.equal(ops.instance_norm_plus(x, alpha.bfloat16(), strided, mixed), expected)


@pytest.fixture
def set_threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(5, 64, 24, 24), (1, 128, 32, 32), (2, 3, 150, 150)])
def test_independent_of_threads_and_batch(layout, shape, set_threads):
    x = (noise_like(*shape) - 2.3).contiguous(memory_format=LAYOUTS[layout])
    affine = parameters(*shape[:2])
    set_threads(1)
    y = ops.instance_norm_plus(x, *affine, elu=True)
    for threads in (2, 3, 4):
        set_threads(threads)
        assert torch.equal(ops.instance_norm_plus(x, *affine, elu=True), y)
        alone = [ops.instance_norm_plus(x[i : i + 1], *affine, elu=True) for i in range(len(x))]
        assert torch.equal(torch.cat(alone), y)


def test_elu_is_accurate_over_its_whole_range():
    # scale 1 and shift 0 up to rounding, so that the output is elu of a known number
    z = torch.cat((-torch.logspace(-8, 2, 4095), torch.tensor([0.0])))
    x = torch.stack((z, -z)).reshape(1, 1, 2, 4096)
    zero, gamma = torch.zeros(1), (x.double().var(correction=0) + 1e-5).sqrt().float().reshape(1)
    linear = ops.instance_norm_plus(x, zero, gamma, zero)
    curved = ops.instance_norm_plus(x, zero, gamma, zero, elu=True)
    exact = torch.nn.functional.elu(linear.double())
    error = ((curved - exact).abs() / exact.abs().clamp(min=1e-30))[exact != 0]
    assert error.max() < 1.5 * EPSILON[torch.float32]
    assert (linear < -18).any()


# Derivatives -------------------------------------------------------------------------------------


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("elu", [False, True])
def test_gradients_of_the_float64_rule(elu, per_sample):
    x = (noise_like(2, 3, 3, 2) - 2.3).double().requires_grad_()
    affine = [p.double().requires_grad_() for p in parameters(2, 3, per_sample)]

    def op(*inputs):
        return ops.instance_norm_plus(*inputs, elu=elu)

    assert torch.autograd.gradcheck(op, (x, *affine))
    assert torch.autograd.gradgradcheck(op, (x, *affine))


@pytest.mark.parametrize("shape", [(2, 1, 3, 2), (2, 3, 1, 1)])
def test_gradients_of_degenerate_shapes(shape):
    x = noise_like(*shape).double().requires_grad_()
    affine = [p.double().requires_grad_() for p in parameters(*shape[:2])]
    assert torch.autograd.gradcheck(ops.instance_norm_plus, (x, *affine))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("per_sample", [False, True])
def test_float32_gradients_against_float64(layout, per_sample):
    x = (noise_like(3, 8, 6, 6) - 2.3).contiguous(memory_format=LAYOUTS[layout])
    inputs = (x, *parameters(3, 8, per_sample))
    weights = noise_like(*x.shape, seed=9)

    def gradients(call, dtype):
        leaves = [t.to(dtype).requires_grad_() for t in inputs]
        loss = (call(*leaves, elu=True) * weights.to(dtype)).sum()
        return torch.autograd.grad(loss, leaves)

    exact = gradients(reference.instance_norm_plus, torch.float64)
    eager = gradients(reference.instance_norm_plus, torch.float32)
    ours = gradients(ops.instance_norm_plus, torch.float32)
    for mine, other, truth in zip(ours, eager, exact, strict=True):
        floor = 8 * EPSILON[torch.float32] * truth.abs().max().item()
        assert worst(mine, truth) <= 2 * worst(other, truth) + floor


def test_gradients_are_those_of_the_formula_by_torchs_variance():
    def formula(x, alpha, gamma, beta):
        variance, mean = torch.var_mean(x, dim=(2, 3), correction=0)
        spread, centre = torch.var_mean(mean, dim=1, keepdim=True)
        alpha, gamma, beta = (p[:, :, None, None] for p in (alpha, gamma, beta))
        hat = ((mean - centre) / (spread + 1e-5).sqrt())[:, :, None, None]
        root = (variance + 1e-5).sqrt()[:, :, None, None]
        y = gamma * ((x - mean[:, :, None, None]) / root + alpha * hat) + beta
        return torch.where(y > 0, y, torch.expm1(y.clamp(max=0)))

    x = noise_like(4, 16, 14, 14).contiguous(memory_format=torch.channels_last)
    weights = noise_like(*x.shape, seed=9).contiguous(memory_format=torch.channels_last)
    leaves = [t.requires_grad_() for t in (x, *parameters(4, 16, per_sample=True))]
    expected = torch.autograd.grad((formula(*leaves) * weights).sum(), leaves)
    ours = torch.autograd.grad((ops.instance_norm_plus(*leaves, elu=True) * weights).sum(), leaves)
    for mine, theirs in zip(ours, expected, strict=True):
        assert (mine - theirs).norm() <= 1e-6 * theirs.norm()
    assert ours[0].is_contiguous(memory_format=torch.channels_last)


# PyTorch's own machinery -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(layout, dtype):
    x = noise_like(2, 4, 5, 3).to(dtype).contiguous(memory_format=LAYOUTS[layout])
    affine = [p.to(torch.float64 if dtype == torch.float64 else p.dtype) for p in parameters(2, 4)]
    inputs = [t.requires_grad_() for t in (x, *affine)]
    op = torch.ops.ncsn_fast.instance_norm_plus.default
    torch.library.opcheck(op, (*inputs, True, 1e-5))


def test_compiles_without_graph_breaks():
    def model(x, *affine):
        return ops.instance_norm_plus(x * 2, *affine, elu=True) + 1

    x, affine = noise_like(2, 4, 5, 3), parameters(2, 4)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, *affine), model(x, *affine))
    leaf = x.clone().requires_grad_()
    compiled(leaf, *affine).square().sum().backward()
    twin = x.clone().requires_grad_()
    model(twin, *affine).square().sum().backward()
    torch.testing.assert_close(leaf.grad, twin.grad)


def test_exports():
    class Model(torch.nn.Module):
        def forward(self, x, alpha, gamma, beta):
            return ops.instance_norm_plus(x, alpha, gamma, beta, elu=True)

    inputs = (noise_like(2, 4, 5, 3), *parameters(2, 4))
    program = torch.export.export(Model(), inputs)
    assert "ncsn_fast.instance_norm_plus" in str(program.graph)
    assert torch.equal(program.module()(*inputs), Model()(*inputs))


def test_under_autocast_the_input_type_is_kept():
    x, affine = noise_like(2, 8, 6, 6), parameters(2, 8)
    weight = noise_like(8, 8, 1, 1)
    with torch.autocast("cpu", torch.bfloat16):
        y = torch.nn.functional.conv2d(x, weight)
        z = ops.instance_norm_plus(y, *affine)
    assert y.dtype == z.dtype == torch.bfloat16
    assert torch.equal(z, ops.instance_norm_plus(y, *affine))


def test_dispatch_modes_see_the_op():
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as mode:
        ops.instance_norm_plus(noise_like(1, 2, 3, 3), *parameters(1, 2))
    assert mode is not None
    with torch._subclasses.FakeTensorMode() as fake:
        x = fake.from_tensor(noise_like(1, 2, 3, 3))
        affine = [fake.from_tensor(p) for p in parameters(1, 2)]
        assert isinstance(ops.instance_norm_plus(x, *affine), torch._subclasses.FakeTensor)


def test_float64_and_the_reference_backend_are_the_reference():
    x, affine = noise_like(2, 4, 5, 3), parameters(2, 4)
    doubled = ops.instance_norm_plus(x.double(), *affine)
    assert torch.equal(doubled, reference.instance_norm_plus(x.double(), *affine))
    with ops.backend("reference"):
        y = ops.instance_norm_plus(x, *affine, elu=True)
    assert torch.equal(y, reference.instance_norm_plus(x, *affine, elu=True))


# Refusals ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"x": torch.zeros(4, 5, 5)}, ValueError, r"\(N, C, H, W\); got \(4, 5, 5\)"),
        ({"x": torch.zeros(2, 4, 5, 5).half()}, TypeError, "float32, bfloat16 or float64; got"),
        ({"x": torch.zeros(2, 4, 5, 5).int()}, TypeError, "torch.int32"),
        ({"alpha": torch.zeros(3)}, ValueError, r"\(4,\) or \(2, 4\).*got \[\(3,\)"),
        ({"gamma": torch.zeros(3, 4)}, ValueError, r"\(3, 4\)"),
        ({"beta": torch.zeros(4, device="meta")}, ValueError, "must be on cpu"),
    ],
)
def test_refusals(change, error, text):
    x, (alpha, gamma, beta) = torch.zeros(2, 4, 5, 5), parameters(2, 4)
    arguments = {"x": x, "alpha": alpha, "gamma": gamma, "beta": beta} | change
    with pytest.raises(error, match=text):
        ops.instance_norm_plus(**arguments)


def test_refuses_a_buffer_of_another_layout():
    x = noise_like(2, 4, 5, 5)
    out = torch.empty_like(x, memory_format=torch.channels_last)
    with pytest.raises(ValueError, match="both contiguous or both channels-last"):
        ops.instance_norm_plus_out(x, *parameters(2, 4), out)


def test_refuses_unknown_levels_and_backends():
    with pytest.raises(ValueError, match="'sse9'"), ops.isa("sse9"):
        pass
    with pytest.raises(ValueError, match="triton, cuda; got 'tpu'"), ops.backend("tpu"):
        pass


@pytest.fixture
def lacking(monkeypatch, caplog):
    """Sets which families cannot run, and forgets what has been warned of."""
    caplog.set_level("WARNING", logger="ncsn_fast")

    def lack(*families: str) -> None:
        backends._warn.cache_clear()
        texts = {"triton": "Triton is not installed", "cuda": "built without CUDA"}
        monkeypatch.setattr(backends, "missing", lambda f: texts[f] if f in families else "")

    yield lack
    backends._warn.cache_clear()


def test_a_backend_that_was_asked_for_runs_or_raises(lacking, caplog):
    lacking()
    for name in ("triton", "cuda"):
        with ops.backend(name):
            assert backends.family("cuda") == name
    lacking("triton", "cuda")
    for name, text in (("triton", "Triton is not installed"), ("cuda", "built without CUDA")):
        with ops.backend(name), pytest.raises(RuntimeError, match=f"'{name}'.*{text}"):
            backends.family("cuda")
    with ops.backend("triton"), pytest.raises(RuntimeError, match="not installed"):
        backends.has_triton("noise")
    assert not caplog.records


@pytest.mark.parametrize(("lost", "found"), [("triton", "cuda"), ("cuda", "triton")])
def test_the_other_family_runs_with_one_warning(lost, found, lacking, caplog):
    lacking()
    assert backends.family(lost) == lost
    lacking(lost)
    for _ in range(3):
        assert backends.family(lost) == backends.family(found) == found
    assert [f"use the '{found}' kernels" in record.message for record in caplog.records] == [True]
    assert backends.has_triton("noise") == (found == "triton")
    lacking("triton", "cuda")
    with pytest.raises(RuntimeError, match=r"not installed.*without CUDA.*backend\(\"reference"):
        backends.family("triton")


def test_what_this_machine_lacks_comes_with_a_remedy():
    assert backends.missing("triton") == "" or "pip install triton" in backends.missing("triton")
    built = ops.available()["cuda_built"]
    assert built == ("NCSN_FAST_CUDA=1" not in backends.missing("cuda"))


def test_torch_func_transforms_run_the_reference():
    torch.manual_seed(0)
    x, *parameters = torch.randn(3, 4, 5, 5) - 2.3, *torch.randn(3, 4)

    def energy(image):
        return ops.instance_norm_plus(image[None], *parameters, elu=True).square().sum()

    each = torch.func.vmap(torch.func.grad(energy))(x)
    leaf = x.clone().requires_grad_()
    ops.instance_norm_plus(leaf, *parameters, elu=True).square().sum().backward()
    torch.testing.assert_close(each, leaf.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("lost", ["_interpreter", "_in_dispatch_mode"])
def test_a_torch_that_hides_its_state_costs_speed_alone(lost, monkeypatch):
    x, (alpha, gamma, beta) = torch.randn(2, 8, 4, 4), torch.randn(3, 8)
    expected = reference.instance_norm_plus(x, alpha, gamma, beta, elu=True)
    monkeypatch.setattr(checks, lost, checks._yes)
    assert checks.in_transform() == (lost == "_interpreter")
    assert not checks.is_unobserved(x) or lost == "_interpreter"
    y = ops.instance_norm_plus(x, alpha, gamma, beta, elu=True)
    torch.testing.assert_close(y, expected)
