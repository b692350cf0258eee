"""The ops on a GPU, by each family of kernels, against float64 and the CPU's bits."""

import pytest
import torch
from group_norm_cases import GROUPS, options, slack
from norm_cases import INPUTS, noise_like, parameters, sensitivity, worst

from ncsn_fast import ops
from ncsn_fast.ops import backends, reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available(), reason="needs an NVIDIA GPU and CUDA's torch"
    ),
]

LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(params=["triton", "cuda"])
def family(request):
    """Everything in the test runs on this family of kernels."""
    if backends.missing(request.param):
        pytest.skip(backends.missing(request.param))
    with ops.backend(request.param):
        yield request.param


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", INPUTS)
def test_within_twice_eager(name, dtype, layout, family):
    x = INPUTS[name]().to(dtype).contiguous(memory_format=LAYOUTS[layout])
    affine = parameters(*x.shape[:2])
    exact = reference.instance_norm_plus(x.double(), *affine, elu=True)
    inputs = [t.cuda() for t in (x, *affine)]
    eager = reference.instance_norm_plus(*inputs, elu=True)
    ours = ops.instance_norm_plus(*inputs, elu=True)
    floor = 2 * torch.finfo(dtype).eps * exact.abs().max().item() + 4 * sensitivity(x, *affine[:2])
    assert worst(ours, exact) <= 2 * worst(eager, exact) + floor
    assert ours.dtype == dtype
    assert ours.is_contiguous(memory_format=LAYOUTS[layout])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", INPUTS)
def test_group_norm_within_twice_eager(name, dtype, layout, family):
    x = INPUTS[name]().to(dtype).contiguous(memory_format=LAYOUTS[layout])
    groups, named = GROUPS[name], options(*x.shape[:2], "all")
    exact = reference.group_norm(x.double(), groups, **named, activation="silu")
    rows = {key: t.cuda() for key, t in named.items()} | {"activation": "silu"}
    eager = reference.group_norm(x.cuda(), groups, **rows)
    ours = ops.group_norm(x.cuda(), groups, **rows)
    floor = 2 * torch.finfo(dtype).eps * exact.abs().max().item() + 4 * slack(x, groups, named)
    assert worst(ours, exact) <= 2 * worst(eager, exact) + floor
    assert ours.dtype == dtype
    assert ours.is_contiguous(memory_format=LAYOUTS[layout])


@pytest.mark.parametrize("per_sample", [False, True], ids=["shared", "conditional"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients(dtype, layout, per_sample, family):
    x = (noise_like(4, 24, 16, 16) - 2.3).to(dtype).contiguous(memory_format=LAYOUTS[layout])
    inputs, weights = (x, *parameters(4, 24, per_sample)), noise_like(*x.shape, seed=9).to(dtype)

    def gradients(call, device, double):
        leaves = [t.to(device) for t in inputs]
        leaves = [(t.double() if double else t).requires_grad_() for t in leaves]
        loss = (call(*leaves, elu=True) * weights.to(device)).sum()
        return torch.autograd.grad(loss, leaves)

    exact = gradients(reference.instance_norm_plus, "cpu", True)
    eager = gradients(reference.instance_norm_plus, "cuda", False)
    ours = gradients(ops.instance_norm_plus, "cuda", False)
    for mine, theirs, truth in zip(ours, eager, exact, strict=True):
        floor = 16 * torch.finfo(dtype).eps * truth.abs().max().item()
        assert worst(mine, truth) <= 2 * worst(theirs, truth) + floor
        assert mine.dtype == theirs.dtype
    assert ours[0].is_contiguous(memory_format=LAYOUTS[layout])


def test_the_backend_of_the_forward_call_is_that_of_its_gradient():
    """Gradients are computed in threads of autograd, outside of any `with ops.backend`."""
    x, affine = noise_like(2, 8, 6, 6).cuda(), [p.cuda() for p in parameters(2, 8)]
    results = []
    for call in (ops.instance_norm_plus, reference.instance_norm_plus):
        leaf = x.clone().requires_grad_()
        with ops.backend("reference"):
            y = call(leaf, *affine)
        y.square().sum().backward()
        results.append(leaf.grad)
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


def test_second_derivatives():
    x = (noise_like(2, 3, 3, 2) - 2.3).double().cuda().requires_grad_()
    affine = [p.double().cuda().requires_grad_() for p in parameters(2, 3)]
    assert torch.autograd.gradcheck(ops.instance_norm_plus, (x, *affine))
    assert torch.autograd.gradgradcheck(ops.instance_norm_plus, (x, *affine))

    def second(call, tensors):
        leaves = [t.detach().requires_grad_() for t in tensors]
        first = torch.autograd.grad(call(*leaves).square().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), leaves)

    exact = second(reference.instance_norm_plus, (x, *affine))
    ours = second(ops.instance_norm_plus, [t.detach().float() for t in (x, *affine)])
    for mine, truth in zip(ours, exact, strict=True):
        scale = truth.abs().max()
        torch.testing.assert_close(mine.double() / scale, truth / scale, rtol=0, atol=1e-3)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(layout, dtype):
    x = noise_like(2, 4, 5, 3).to(dtype).contiguous(memory_format=LAYOUTS[layout])
    inputs = [t.cuda() for t in (x, *parameters(2, 4))]
    if dtype == torch.float64:
        inputs = [t.double() for t in inputs]
    backward = torch.ops.ncsn_fast.instance_norm_plus_backward.default
    torch.library.opcheck(backward, (inputs[0], *inputs, True, 1e-5))
    forward = torch.ops.ncsn_fast.instance_norm_plus.default
    torch.library.opcheck(forward, (*(t.requires_grad_() for t in inputs), True, 1e-5))
    for op in (torch.ops.ncsn_fast.normal.default, torch.ops.ncsn_fast.uniform.default):
        torch.library.opcheck(op, (3, torch.arange(2, device="cuda"), 0, 5, (3, 5)))


def test_a_compiled_network():
    torch.manual_seed(0)
    convolution = torch.nn.Conv2d(3, 8, 3, padding=1).cuda()
    affine = [p.cuda().requires_grad_() for p in parameters(2, 8)]

    def model(x):
        return ops.instance_norm_plus(convolution(x), *affine, elu=True).square().mean()

    x, results = noise_like(2, 3, 16, 16).cuda(), []
    with torch.backends.cudnn.flags(allow_tf32=False):  # else the two may round differently
        for call in (torch.compile(model, fullgraph=True), model):
            loss = call(x)
            results.append((loss, *torch.autograd.grad(loss, [convolution.weight, *affine])))
    for compiled, eager in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_the_input_type_is_kept(dtype, family):
    x, affine = noise_like(2, 8, 6, 6).cuda(), [p.cuda() for p in parameters(2, 8)]
    with torch.autocast("cuda", dtype):
        y = torch.nn.functional.conv2d(x, noise_like(8, 8, 1, 1).cuda())
        z = ops.instance_norm_plus(y, *affine)
    assert y.dtype == z.dtype == dtype


@pytest.mark.parametrize("shape", [(3, 32, 32), (3, 17, 29), (1,)], ids=str)
@pytest.mark.parametrize("kind", [ops.uniform, ops.normal], ids=["uniform", "normal"])
def test_noise_has_the_bits_of_the_cpu(kind, shape):
    samples = torch.tensor([2**32 - 1, 5, 0])
    on_gpu = kind(2**32 - 1, samples.cuda(), 1, 2**32 - 1, shape)
    assert torch.equal(on_gpu.cpu(), kind(2**32 - 1, samples, 1, 2**32 - 1, shape))


def test_both_families_update_to_the_same_bits(family):
    x, f, h = (noise_like(3, 3, 17, 29, seed=k) for k in range(3))
    row, key = (0.9, 0.37, -0.21, 0.63, 0.11, -1.3), {"seed": 7, "step": 2**32 - 1}
    on_cpu = ops.sampler_update(x, f, h, row, samples=torch.arange(3), **key)
    moved = (t.cuda() for t in (x, f, h))
    on_gpu = ops.sampler_update(*moved, row, samples=torch.arange(3).cuda(), **key)
    assert all(torch.equal(a.cpu(), b) for a, b in zip(on_gpu, on_cpu, strict=True))
