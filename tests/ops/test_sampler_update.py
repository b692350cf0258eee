"""The fused sampler update against its specification, term by term."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from ncsn_fast import _C, ops
from ncsn_fast.ops import noise, reference
from ncsn_fast.ops.noise import Stream

LEVELS = _C.isa_levels()
LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
SHAPES = [(3, 3, 32, 32), (2, 3, 7, 11), (1, 1, 1, 1), (2, 5, 1, 3), (1, 2, 37, 41)]
FULL = (0.9, 0.37, -0.21, 0.63, 0.11, -1.3, 0.2, -0.7)
KEY = {"seed": 2**32 - 1, "step": 77}


def field(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 1.7 - 0.3


def samples(n: int) -> Tensor:
    return torch.tensor([2**32 - 1, 5, 0])[:n]


def close(ours: Tensor | None, exact: Tensor | None) -> bool:
    """A few roundings of numbers below 8."""
    return ours is exact is None or (ours.double() - exact).abs().max() <= 8 * 2.0**-22


def exact_update(x, f, h, coefficients, **options):
    """The reference in float64; coefficients as the kernel has them, rounded to float32."""
    rounded = tuple(torch.tensor(coefficients, dtype=torch.float32).double().tolist())
    known = options.pop("known", None)
    return reference.sampler_update(
        x.double(),
        f.double(),
        None if h is None else h.double(),
        rounded,
        known=None if known is None else known.double(),
        **options,
    )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("with_history", [False, True])
@pytest.mark.parametrize(
    "kept", [(), (0,), (1,), (0, 1), (0, 1, 3), (2, 4), range(6), (0, 6, 7), range(8)], ids=str
)
def test_every_term(kept, with_history, shape):
    coefficients = tuple(v if i in kept else 0.0 for i, v in enumerate(FULL))
    x, f, h = (field(*shape, seed=k) for k in range(3))
    h = h if with_history else None
    options = {"samples": samples(shape[0]), **KEY}
    ours = ops.sampler_update(x, f, h, coefficients, **options)
    exact = exact_update(x, f, h, coefficients, **options)
    assert all(itertools.starmap(close, zip(ours, exact, strict=True)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("layout", [*LAYOUTS, "sliced"])
def test_network_output_of_any_type_and_layout(layout, dtype):
    x, h = field(3, 3, 7, 11), field(3, 3, 7, 11, seed=1)
    f = field(3, 6, 7, 11, seed=2).to(dtype)[:, ::2]
    if layout != "sliced":
        f = f.contiguous(memory_format=LAYOUTS[layout])
    options = {"samples": samples(3), **KEY}
    expected = ops.sampler_update(x, f.float().contiguous(), h, FULL, **options)
    actual = ops.sampler_update(x, f, h, FULL, **options)
    assert all(itertools.starmap(torch.equal, zip(actual, expected, strict=True)))


def test_second_noise():
    x, f = field(3, 3, 7, 11), field(3, 3, 7, 11, seed=1)
    weights = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])
    options = {"samples": samples(3), "noise_weights": weights, **KEY}
    ours, _ = ops.sampler_update(x, f, None, FULL, **options)
    assert close(ours, exact_update(x, f, None, FULL, **options)[0])
    first, _ = ops.sampler_update(x, f, None, FULL, samples=samples(3), **KEY)
    assert torch.equal(ours[0], first[0])
    assert not torch.equal(ours[1], first[1])


@pytest.mark.parametrize("c_ref", [math.nan, 0.0, 0.7])
@pytest.mark.parametrize("shape", [(2, 3, 7, 11), (2, 3, 32, 32)], ids=str)
def test_known_pixels(shape, c_ref):
    x, f, h, known = (field(*shape, seed=k) for k in range(4))
    mask = field(*shape, seed=5) > 0
    options = {"samples": samples(2), **KEY}
    masked = {"mask": mask, "known": known, "c_ref": c_ref, "ref_step": 12}
    ours, h_ours = ops.sampler_update(x, f, h, FULL, **options, **masked)
    exact, h_exact = exact_update(x, f, h, FULL, **options, **masked)
    free, _ = ops.sampler_update(x, f, h, FULL, **options)
    assert close(ours, exact)
    assert close(h_ours, h_exact)
    assert torch.equal(ours[~mask], free[~mask])
    if math.isnan(c_ref):
        assert torch.equal(ours, free)
    if c_ref == 0.0:
        assert torch.equal(ours[mask], known[mask])
    if c_ref == 0.7:
        z = noise.normal(KEY["seed"], samples(2), Stream.REFERENCE, 12, shape[1:])
        assert close(ours[mask], (known.double() + c_ref * z.double())[mask])


def test_no_noise_where_its_coefficient_is_zero():
    x, f = field(2, 3, 5, 5), field(2, 3, 5, 5, seed=1)
    for seed in (0, 1):
        ours, _ = ops.sampler_update(
            x, f, None, (1, 0.5, 0, 0, 0, 0), seed=seed, samples=samples(2), step=0
        )
        assert torch.equal(ours, x + 0.5 * f)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_next_network_input(shape, layout, dtype):
    x, f = field(*shape), field(*shape, seed=1)
    net_input = torch.full(shape, math.nan, dtype=dtype).contiguous(memory_format=LAYOUTS[layout])
    options = {"samples": samples(shape[0]), **KEY}
    expected, _ = ops.sampler_update(x, f, None, FULL, **options)
    ops.sampler_update_(x, f, None, FULL, **options, net_input=net_input, scale=2.0, shift=-1.0)
    assert torch.equal(x, expected)
    # 2x is exact, so the fused product-sum rounds where PyTorch does.
    assert torch.equal(net_input, (2 * x - 1).to(dtype))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nonfinite_samples_are_flagged(bad):
    x, f = field(3, 3, 32, 33), field(3, 3, 32, 33, seed=1)
    flags = torch.zeros(3, dtype=torch.int32)
    options = {"samples": samples(3), "nonfinite": flags, **KEY}
    ops.sampler_update_(x.clone(), f, None, FULL, **options)
    assert flags.tolist() == [0, 0, 0]
    f[1, 2, 31, 32] = bad
    ops.sampler_update_(x.clone(), f, None, FULL, **options)
    assert flags.tolist() == [0, 1, 0]
    ops.sampler_update_(x.clone(), torch.zeros_like(f), None, FULL, **options)
    assert flags.tolist() == [0, 1, 0]  # it accumulates


def everything(shape: tuple[int, ...], f_dtype: torch.dtype) -> tuple[Tensor, ...]:
    """State, history, next input and flags after an update that uses every feature."""
    n = shape[0]
    x, f, h, known = (field(*shape, seed=k) for k in range(4))
    f = f.to(f_dtype).contiguous(memory_format=torch.channels_last)
    net_input = torch.empty(shape, dtype=torch.bfloat16, memory_format=torch.channels_last)
    flags = torch.zeros(n, dtype=torch.int32)
    ops.sampler_update_(
        x, f, h, FULL, samples=torch.arange(n), noise_weights=field(n, 2, seed=8),
        mask=field(*shape, seed=5) > 0, known=known, c_ref=0.4, ref_step=3, net_input=net_input,
        nonfinite=flags, **KEY,
    )  # fmt: skip
    return x, h, net_input, flags


@pytest.mark.parametrize("f_dtype", [torch.float32, torch.bfloat16])
def test_levels_and_threads_give_the_same_bits(f_dtype):
    shape = (5, 3, 61, 67)
    expected = everything(shape, f_dtype)
    for level in LEVELS:
        with ops.isa(level):
            actual = everything(shape, f_dtype)
        assert all(itertools.starmap(torch.equal, zip(actual, expected, strict=True))), level
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            actual = everything(shape, f_dtype)
            assert all(itertools.starmap(torch.equal, zip(actual, expected, strict=True)))
    finally:
        torch.set_num_threads(before)


def test_reference_backend_agrees():
    expected = everything((3, 3, 7, 11), torch.float32)
    with ops.backend("reference"):
        actual = everything((3, 3, 7, 11), torch.float32)
    torch.testing.assert_close(actual[:2], expected[:2], rtol=0, atol=8 * 2.0**-22)
    torch.testing.assert_close(actual[2:], expected[2:], rtol=2.0**-7, atol=1e-5)


def test_float64_is_the_reference():
    x, f, h = (field(2, 3, 5, 5, seed=k).double() for k in range(3))
    options = {"samples": samples(2), **KEY}
    actual = ops.sampler_update(x, f, h, FULL, **options)
    expected = reference.sampler_update(x, f, h, FULL, **options)
    assert all(itertools.starmap(torch.equal, zip(actual, expected, strict=True)))


def test_split_batches_give_the_same_samples():
    x, f = field(4, 3, 9, 9), field(4, 3, 9, 9, seed=1)
    index = torch.tensor([3, 1, 4, 15])
    whole, _ = ops.sampler_update(x, f, None, FULL, samples=index, **KEY)
    for i in range(4):
        one, _ = ops.sampler_update(
            x[i : i + 1], f[i : i + 1], None, FULL, samples=index[i : i + 1], **KEY
        )
        assert torch.equal(one, whole[i : i + 1])


def test_empty_batch():
    x = torch.empty(0, 3, 4, 4)
    ours, _ = ops.sampler_update(x, x, None, FULL, samples=samples(0), **KEY)
    assert ours.shape == x.shape


def test_inputs_are_left_alone():
    x, f, h = (field(2, 3, 5, 5, seed=k) for k in range(3))
    copies = x.clone(), f.clone(), h.clone()
    ops.sampler_update(x, f, h, FULL, samples=samples(2), **KEY)
    assert all(itertools.starmap(torch.equal, zip((x, f, h), copies, strict=True)))


def op_arguments(x: Tensor, f: Tensor, h: Tensor) -> tuple:
    net_input, flags = torch.empty_like(x), torch.zeros(len(x), dtype=torch.int32)
    index = torch.arange(len(x))
    return x, f, h, FULL, 3, index, 5, None, None, None, math.nan, 0, net_input, 2.0, -1.0, flags


def test_opcheck():
    fields = (field(2, 3, 5, 5, seed=k) for k in range(3))
    torch.library.opcheck(torch.ops.ncsn_fast.sampler_update_.default, op_arguments(*fields))
    for op in (torch.ops.ncsn_fast.normal.default, torch.ops.ncsn_fast.uniform.default):
        torch.library.opcheck(op, (3, torch.arange(2), 0, 5, (3, 5)))


def test_compiles_without_graph_breaks():
    def step(x, f, h, index):
        x, h = x.clone(), h.clone()
        ops.sampler_update_(x, f * 2, h, FULL, seed=3, samples=index, step=5)
        return x, h, ops.normal(3, index, 1, 0, (3, 4))

    arguments = (*(field(2, 3, 5, 5, seed=k) for k in range(3)), torch.arange(2))
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for actual, expected in zip(compiled(*arguments), step(*arguments), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"x": torch.zeros(2, 3, 4, 4).bfloat16()}, TypeError, "float32 .or float64.; got"),
        ({"x": torch.zeros(2, 3, 4, 8)[..., ::2]}, ValueError, "contiguous.*strides"),
        ({"f": torch.zeros(2, 3, 4, 5)}, ValueError, r"\(2, 3, 4, 4\); got \(2, 3, 4, 5\)"),
        ({"f": torch.zeros(2, 3, 4, 4).int()}, ValueError, "floating point.*torch.int32"),
        ({"h": torch.zeros(2, 3, 4, 4).double()}, TypeError, "h must be float32; got"),
        (
            {"coefficients": (1.0, 2.0)},
            ValueError,
            r"or without \(e, r\); got 2 numbers",
        ),
        ({"samples": torch.arange(3)}, ValueError, r"samples must have shape \(2,\)"),
        ({"samples": torch.tensor([0, 2**32])}, ValueError, r"samples\[1\] = 4294967296"),
        ({"seed": 2**32}, ValueError, "seed must be in"),
        ({"mask": torch.ones(2, 3, 4, 4).bool()}, ValueError, "come together"),
        (
            {"mask": torch.ones(2, 3, 4, 4), "known": torch.ones(2, 3, 4, 4)},
            TypeError,
            "mask must be bool",
        ),
        ({"noise_weights": torch.ones(2)}, ValueError, r"shape \(2, 2\)"),
        ({"net_input": torch.ones(2, 3, 4, 4).half()}, TypeError, "float32 or bfloat16"),
        ({"nonfinite": torch.zeros(2)}, TypeError, "int32"),
        ({"f": torch.zeros(2, 3, 4, 4, device="meta")}, ValueError, "f must be on cpu"),
    ],
)
def test_refusals(change, error, text):
    x = torch.zeros(2, 3, 4, 4)
    arguments = {"x": x, "f": x, "h": None, "coefficients": FULL, "samples": samples(2), **KEY}
    arguments |= change
    with pytest.raises(error, match=text):
        ops.sampler_update_(**arguments)


@pytest.mark.gpu
@pytest.mark.skipif(_C.cuda_device_count() == 0, reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("shape", [*SHAPES, (5, 3, 61, 67)], ids=str)
@pytest.mark.parametrize("f_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_cuda_gives_the_bits_of_the_cpu(layout, f_dtype, shape):
    n = shape[0]
    x, f, h, known = (field(*shape, seed=k) for k in range(4))
    f = f.to(f_dtype).contiguous(memory_format=LAYOUTS[layout])
    net_input = torch.zeros(shape, dtype=f_dtype).contiguous(memory_format=LAYOUTS[layout])
    inputs = {
        "x": x, "f": f, "h": h, "samples": torch.arange(n), "noise_weights": field(n, 2, seed=8),
        "mask": field(*shape, seed=5) > 0, "known": known, "net_input": net_input,
        "nonfinite": torch.zeros(n, dtype=torch.int32),
    }  # fmt: skip
    on_gpu = {name: tensor.cuda() for name, tensor in inputs.items()}
    for tensors in (inputs, on_gpu):
        ops.sampler_update_(**tensors, coefficients=FULL, c_ref=0.4, ref_step=3, **KEY)
    for name, expected in inputs.items():
        assert torch.equal(on_gpu[name].cpu(), expected), name
