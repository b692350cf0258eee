"""The ops as CUDA tensors take them, on CPU tensors that are sent to interpreted Triton kernels."""

import philox_numpy
import pytest
import torch
from group_norm_cases import options
from norm_cases import noise_like, parameters
from torch import Tensor
from triton_common import FLOATS, assert_close

from ncsn_fast import ops
from ncsn_fast.ops import checks, cuda, noise, reference

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy: masked lanes overflow

LAYOUTS = (torch.contiguous_format, torch.channels_last)
SHAPE = (2, 6, 5, 4)
FULL = (0.9, 0.37, -0.21, 0.63, 0.11, -1.3)


@pytest.fixture(autouse=True)
def calls(monkeypatch) -> list[str]:
    """Sends every op to the CUDA side; names of its functions in the order they were called."""
    names: list[str] = []

    def counted(name: str):
        function = getattr(cuda, name)

        def call(*arguments):
            names.append(name)
            return function(*arguments)

        return call

    for name in (
        "group_norm", "instance_norm_plus", "instance_norm_plus_backward", "fill", "sampler_update"
    ):  # fmt: skip
        monkeypatch.setattr(cuda, name, counted(name))
    monkeypatch.setattr(checks, "on_gpu", lambda x: True)
    return names


def inputs(dtype: torch.dtype = torch.float32, layout=LAYOUTS[0], per_sample=False) -> list[Tensor]:
    x = (noise_like(*SHAPE) - 2.3).to(dtype).contiguous(memory_format=layout)
    return [x, *parameters(*SHAPE[:2], per_sample)]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_forward(layout, dtype, calls):
    x, *affine = inputs(dtype, layout)
    ours = ops.instance_norm_plus(x, *affine, elu=True)
    exact = reference.instance_norm_plus(x.double(), *affine, elu=True)
    assert_close(ours, reference.instance_norm_plus(x, *affine, elu=True), exact)
    assert ours.is_contiguous(memory_format=layout)
    assert calls == ["instance_norm_plus"]
    sliced = x[:, :, :, ::2]
    twin = ops.instance_norm_plus(sliced.contiguous(memory_format=layout), *affine)
    assert torch.equal(ops.instance_norm_plus(sliced, *affine), twin)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_group_norm(layout, dtype, calls):
    x, named = inputs(dtype, layout)[0], options(*SHAPE[:2], "all") | {"activation": "silu"}
    ours = ops.group_norm(x, 3, **named)
    exact = reference.group_norm(x.double(), 3, **named)
    assert_close(ours, reference.group_norm(x, 3, **named), exact)
    assert ours.is_contiguous(memory_format=layout)
    assert calls == ["group_norm"]


@pytest.mark.parametrize(
    ("dtype", "per_sample"), [*((dtype, False) for dtype in FLOATS), (FLOATS[0], True)]
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients(per_sample, layout, dtype, calls):
    tensors, weights = inputs(dtype, layout, per_sample), noise_like(*SHAPE, seed=9).to(dtype)

    def gradients(call, kind):
        leaves = [t.to(kind).requires_grad_() for t in tensors[:1]]
        leaves += [t.clone().to(torch.promote_types(kind, t.dtype)) for t in tensors[1:]]
        leaves = [t.requires_grad_() for t in leaves]
        return torch.autograd.grad((call(*leaves, elu=True) * weights.to(kind)).sum(), leaves)

    exact = gradients(reference.instance_norm_plus, torch.float64)
    eager = gradients(reference.instance_norm_plus, dtype)
    ours = gradients(ops.instance_norm_plus, dtype)
    assert calls == ["instance_norm_plus", "instance_norm_plus_backward"]
    for mine, theirs, truth in zip(ours, eager, exact, strict=True):
        precision = torch.finfo(dtype).eps
        assert_close(mine, theirs, truth, floor=6 * precision * truth.abs().max().item())
    assert ours[0].is_contiguous(memory_format=layout)


def test_an_expanded_gradient():
    results = []
    for call in (ops.instance_norm_plus, reference.instance_norm_plus):
        leaf, *affine = inputs()
        call(leaf.requires_grad_(), *affine).sum().backward()
        results.append(leaf.grad)
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


def test_gradients_that_are_differentiated_are_the_reference(calls):
    def second(call, tensors):
        leaves = [t.requires_grad_() for t in tensors]
        loss = call(*leaves, elu=True).square().sum()
        first = torch.autograd.grad(loss, leaves, create_graph=True)
        assert "instance_norm_plus_backward" not in calls
        return torch.autograd.grad(sum(g.square().sum() for g in first), leaves)

    exact = second(reference.instance_norm_plus, [t.double() for t in inputs()])
    ours = second(ops.instance_norm_plus, inputs())
    for mine, truth in zip(ours, exact, strict=True):
        scale = truth.abs().max()
        torch.testing.assert_close(mine.double() / scale, truth / scale, rtol=0, atol=1e-4)


def test_what_runs_the_reference(calls):
    """float64, the backend of that name, and the gradients of what ran under it."""
    x, *affine = inputs()
    doubled = x.double().requires_grad_()
    ops.instance_norm_plus(doubled, *affine).square().sum().backward()
    leaf = x.clone().requires_grad_()
    with ops.backend("reference"):
        y = ops.instance_norm_plus(leaf, *affine)
        ops.normal(1, torch.arange(2), 0, 0, (4,))
    y.square().sum().backward()
    assert calls == []
    torch.testing.assert_close(leaf.grad.double(), doubled.grad, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("layout", "dtype"), [(LAYOUTS[0], torch.float64), (LAYOUTS[1], torch.float32)]
)
def test_opcheck(layout, dtype):
    tensors = [t.to(dtype) for t in inputs(layout=layout)]
    grad = noise_like(*SHAPE, seed=9).to(dtype)
    backward = torch.ops.ncsn_fast.instance_norm_plus_backward.default
    torch.library.opcheck(backward, (grad, *tensors, True, 1e-5))
    forward = torch.ops.ncsn_fast.instance_norm_plus.default
    torch.library.opcheck(forward, (*(t.requires_grad_() for t in tensors), True, 1e-5))


def test_compiled_training_calls_the_kernels(calls):
    def model(x, *affine):
        return ops.instance_norm_plus(x * 2, *affine, elu=True) + 1

    compiled, results = torch.compile(model, fullgraph=True, backend="aot_eager"), []
    for call in (compiled, model):
        leaf, *affine = inputs()
        call(leaf.requires_grad_(), *affine).square().sum().backward()
        results.append(leaf.grad)
    assert calls == ["instance_norm_plus", "instance_norm_plus_backward"] * 2
    torch.testing.assert_close(*results)


def test_noise(calls):
    samples = torch.tensor([5, 2**32 - 1])
    uniforms = ops.uniform(2**32 - 1, samples, 1, 7, (3, 5))
    normals = ops.normal(3, samples, 1, 7, (3, 5))
    assert calls == ["fill", "fill"]
    assert torch.equal(uniforms, noise.uniform(2**32 - 1, samples, 1, 7, (3, 5)))
    exact = noise.normal(3, samples, 1, 7, (3, 5))
    assert philox_numpy.ulp_distance(normals.numpy(), exact.numpy()).max() <= 4
    assert ops.normal(3, samples[:0], 1, 7, (3, 5)).shape == (0, 3, 5)
    with pytest.raises(ValueError, match="largest sample index must be in"):
        ops.normal(3, torch.tensor([0, 2**32]), 1, 7, (3, 5))
    with pytest.raises(ValueError, match="seed must be in"):
        ops.uniform(-1, samples, 1, 7, (3, 5))


@pytest.mark.parametrize("kind", ["plain", "everything"])
def test_update_by_triton(kind, calls, monkeypatch):
    x, f, h, known = (noise_like(2, 3, 5, 4, seed=k) for k in range(4))
    options = {"samples": torch.tensor([2**32 - 1, 5]), "seed": 2**32 - 1, "step": 2**32 - 1}
    if kind == "everything":
        f = noise_like(2, 6, 5, 4, seed=7).double()[:, ::2]
        mask = (noise_like(2, 3, 5, 8, seed=5) > 0)[..., ::2]
        options |= {"mask": mask, "known": known.double(), "c_ref": 0.4, "ref_step": 3}
        options |= {"noise_weights": noise_like(2, 2, seed=8).double()}
    results = []
    for gpu in (True, False):
        monkeypatch.setattr(checks, "on_gpu", lambda x, gpu=gpu: gpu)
        net_input, flags = torch.zeros_like(x), torch.zeros(2, dtype=torch.int32)
        with ops.backend("triton"):
            new, history = ops.sampler_update(
                x, f, h, FULL, net_input=net_input, nonfinite=flags, **options
            )
        results.append((new, history, net_input, flags))
    assert calls == ["sampler_update"]
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=8 * 2.0**-22)
