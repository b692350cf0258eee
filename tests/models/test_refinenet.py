"""The networks: golden outputs, published keys and sizes, and how a ScoreModel is conditioned."""

import dataclasses
import functools
import json
import math

import golden
import numpy as np
import pytest
import torch

from ncsn_fast import ModelConfig, ScoreModel, ops
from ncsn_fast.inference.cost import network_flop
from ncsn_fast.models.architectures import ARCHITECTURES
from ncsn_fast.models.layers import ACTIVATIONS, NORMS, VarianceNorm
from ncsn_fast.models.refinenet import RefineNet

GOLDEN = [
    "ncsnv2_32",
    "ncsnv2_28_gray",
    "ncsnv2_deeper_32",
    "ncsnv2_deepest_64",
    "ncsn_32",
    "ncsn_deeper_32",
    "ncsnv2_low_sigma",
    "ncsnv2_deepest_low_sigma",
]
LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
TINY = ModelConfig(image_size=(8, 8), ngf=4, n_sigmas=4, sigma_begin=2.0, sigma_end=0.05)


@functools.cache
def golden_case(name):
    meta, arrays = golden.read(name)
    size = meta["image_size"]
    x = golden.uniform(meta["input_seed"], meta["batch"], meta["channels"], size, size)
    return golden.model(meta), x, torch.from_numpy(arrays["labels"]), arrays["output"]


def tiny(seed=0, **fields):
    torch.manual_seed(seed)
    return ScoreModel(dataclasses.replace(TINY, **fields)).eval()


def field(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 1.3 - 0.2


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", ["kernels", "reference"])
@pytest.mark.parametrize("name", GOLDEN)
def test_golden_outputs(name, backend, layout):
    model, x, level, expected = golden_case(name)
    model = model.to(memory_format=LAYOUTS[layout])
    x = x.contiguous(memory_format=LAYOUTS[layout])
    with torch.inference_mode(), ops.backend(backend):
        golden.assert_matches(model.score_at(x, level), expected)


@pytest.mark.parametrize("name", ["ncsnv2_28_gray", "ncsn_32"])
def test_golden_outputs_with_derivatives_recorded(name):
    """The path of training goes through the dispatcher and autograd, that of sampling does not."""
    model, x, level, expected = golden_case(name)
    golden.assert_matches(model.score_at(x, level).detach(), expected)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_keys_shapes_and_order_are_the_published_ones(arch):
    published = json.loads((golden.FOLDER / "keys_networks.json").read_text())[arch]
    published.pop("sigmas", None)
    net = RefineNet(arch, channels=3, ngf=8, n_levels=10)
    ours = [(key, list(value.shape)) for key, value in net.state_dict().items()]
    assert ours == list(published.items())
    assert [key for key, _ in net.named_parameters()] == list(published)


@pytest.mark.parametrize(
    ("arch", "channels", "ngf", "n_levels", "count"),
    [
        ("ncsnv2", 3, 128, 232, 29_694_083),
        ("ncsnv2_deeper", 3, 128, 1086, 83_445_379),
        ("ncsnv2_deepest", 3, 128, 2311, 94_132_611),
        ("ncsn", 3, 128, 10, 30_117_635),
        ("ncsn", 1, 64, 10, 7_638_657),
    ],
)
def test_parameter_counts(arch, channels, ngf, n_levels, count):
    with torch.device("meta"):
        net = RefineNet(arch, channels=channels, ngf=ngf, n_levels=n_levels)
    assert sum(p.numel() for p in net.parameters()) == count


@pytest.mark.parametrize(
    ("arch", "size", "gflop"),
    [
        ("ncsnv2", 32, 19.8),
        ("ncsn", 32, 19.8),
        ("ncsnv2", 64, 79.1),
        ("ncsnv2_deeper", 96, 169.9),
        ("ncsnv2_deeper", 128, 302.0),
        ("ncsnv2_deepest", 256, 839.0),
    ],
)
def test_flop_of_a_forward(arch, size, gflop):
    with torch.device("meta"):
        model = ScoreModel(ModelConfig(arch=arch, image_size=(size, size), n_sigmas=10))
    assert network_flop(model) / 1e9 == pytest.approx(gflop, abs=0.05)


def test_flop_by_hand():
    """3x3 and 1x1 convolutions of the tiny network, counted from the table of its stages."""
    f, full, half = 4, 64, 16
    begin_end = 2 * 9 * 3 * f * full
    res1 = 4 * 9 * f * f * full
    res2 = (9 * f * f + 9 * f * 2 * f + f * 2 * f) * full + 2 * 9 * 4 * f * f * half
    res34 = 2 * 5 * 9 * 4 * f * f * half
    wide, narrow = 9 * 4 * f * f * half, 9 * f * f
    refine1 = (4 + 2 + 2) * wide
    refine2 = (8 + 2 + 2 + 2) * wide
    refine3 = 8 * wide + 2 * 9 * 2 * f * f * half + 4 * narrow * half
    refine4 = 8 * narrow * full - 4 * narrow * (full - half)  # its lower input is at half size
    refine4 += narrow * (full + half) + (2 + 6) * narrow * full
    macs = begin_end + res1 + res2 + res34 + refine1 + refine2 + refine3 + refine4
    assert network_flop(tiny()) == 2 * macs


@pytest.mark.parametrize(
    ("arch", "multiple"),
    [("ncsnv2", 2), ("ncsn", 2), ("ncsnv2_deeper", 4), ("ncsn_deeper", 4), ("ncsnv2_deepest", 8)],
)
def test_sizes(arch, multiple):
    model = tiny(arch=arch)
    ok = field(2, 3, 2 * multiple, 3 * multiple)
    assert model.score_at(ok, 1).shape == ok.shape
    for height, width in ((3 * multiple + 1, 2 * multiple), (2 * multiple, multiple + 1), (0, 8)):
        with pytest.raises(ValueError, match=rf"multiples of {multiple}; got {height}x{width}"):
            model(torch.zeros(1, 3, height, width), torch.zeros(1, dtype=torch.int64))


def test_images_of_another_number_of_channels_are_refused():
    with pytest.raises(ValueError, match=r"expected images \(N, 3, H, W\); got \(1, 1, 8, 8\)"):
        tiny()(torch.zeros(1, 1, 8, 8))


def test_transposed_weights_on_a_transposed_image():
    """Height and width play the same part: catches a swap that square images cannot show."""
    model, flipped = tiny(), tiny()
    state = {k: v.mT if v.ndim == 4 else v for k, v in model.net.state_dict().items()}
    flipped.net.load_state_dict(state)
    x = field(2, 3, 6, 14)
    torch.testing.assert_close(flipped(x.mT).mT, model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("norm", NORMS)
def test_every_act_and_norm_trains_a_step(norm, act):
    model, x, level = tiny(act=act, norm=norm).train(), field(2, 3, 8, 8), torch.tensor([0, 3])
    loss = model.score_at(x, level).square().mean()
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    assert all(bool(g.isfinite().all()) for g in gradients)
    # A step along the gradient that should lower the loss by one per mille, to first order.
    rate = 1e-3 * loss.item() / sum(float(g.square().sum()) for g in gradients)
    with torch.no_grad():
        for p, g in zip(model.parameters(), gradients, strict=True):
            p -= rate * g
    after = model.score_at(x, level).square().mean().item()
    assert 1 - after / loss.item() == pytest.approx(1e-3, rel=0.3)


@pytest.mark.parametrize(
    ("act", "norm"),
    [(a, "InstanceNorm++") for a in ACTIVATIONS] + [("elu", n) for n in NORMS],
)
def test_acts_and_norms_are_told_apart(act, norm):
    ours = tiny(act=act, norm=norm)(field(1, 3, 8, 8))
    plain = tiny()(field(1, 3, 8, 8))
    assert torch.equal(ours, plain) == ((act, norm) == ("elu", "InstanceNorm++"))


def test_variance_norm_formula():
    torch.manual_seed(0)
    norm, x = VarianceNorm(3), field(2, 3, 5, 7) - 2.3
    n = 35
    spread = ((x - x.mean((2, 3), keepdim=True)) ** 2).sum((2, 3), keepdim=True) / (n - 1)
    expected = x / (spread + 1e-5).sqrt() * norm.alpha[:, None, None]
    torch.testing.assert_close(norm(x), expected)


@pytest.mark.parametrize("norm", [n for n in NORMS if n != "InstanceNorm++"])
def test_conditional_networks_need_instance_norm_plus(norm):
    with pytest.raises(ValueError, match=r"need norm 'InstanceNorm\+\+'; got"):
        tiny(arch="ncsn", norm=norm)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"arch": "unet"}, r"arch must be one of ncsnv2, .*; got 'unet'"),
        ({"act": "gelu"}, r"act must be one of elu, .*; got 'gelu'"),
        ({"norm": "LayerNorm"}, r"norm must be one of InstanceNorm\+\+, .*; got 'LayerNorm'"),
        ({"ngf": 0}, r"ngf must be an integer from 1 on; got 0"),
        ({"ngf": 4.5}, "ngf must be an integer from 1 on; got 4.5"),
        ({"channels": True}, "channels must be an integer"),
        ({"n_sigmas": 0}, r"n_sigmas must be an integer from 1 on; got 0"),
        ({"image_size": (64,)}, r"image_size must be \(height, width\); got \(64,\)"),
        ({"image_size": (64, 0)}, "image_size must be positive"),
        ({"image_size": (8, 9)}, "image_size must be multiples of 2 for ncsnv2; got 8x9"),
        ({"arch": "ncsnv2_deeper", "image_size": (8, 10)}, "multiples of 4 for ncsnv2_deeper"),
        ({"epsilon": np.float32("nan")}, "epsilon must be positive .* got nan"),
        ({"sigma_begin": 10**400}, "sigma_begin must be a number"),
        ({"sigma_begin": np.True_}, "sigma_begin must be a number; got True"),
        ({"scale_input": np.float64(1)}, "scale_input must be one of True, False; got 1.0"),
        ({"epsilon": "small"}, "epsilon must be a number; got 'small'"),
        ({"sigma_end": None}, "sigma_end must be a number; got None"),
        ({"norm": ["InstanceNorm"]}, r"norm must be one of .*; got \['InstanceNorm'\]"),
        ({"scale_input": 1}, "scale_input must be one of True, False; got 1"),
        ({"sigma_end": 3.0}, r"expected 0 < sigma_end <= sigma_begin"),
        ({"epsilon": 0.0}, r"epsilon must be positive"),
        ({"langevin_form": "book"}, r"langevin_form must be 'code' or 'paper'"),
    ],
)
def test_bad_configurations_are_refused(fields, words):
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(TINY, **fields)


def test_a_ladder_of_another_length_is_refused():
    with pytest.raises(ValueError, match="expected 4 sigmas; got 3"):
        ScoreModel(TINY, torch.tensor([3.0, 2.0, 1.0]))


def test_numbers_of_numpy_are_taken_and_survive_json(tmp_path):
    given = {"ngf": np.int64(4), "image_size": (np.int32(8), np.uint8(8)), "epsilon": np.float32(1)}
    given |= {"sigma_begin": 2, "scale_input": np.True_}
    config = dataclasses.replace(TINY, **given)
    kinds = {name: type(getattr(config, name)) for name in given}
    assert list(kinds.values()) == [int, tuple, float, float, bool]
    plain = dataclasses.replace(TINY, ngf=4, image_size=(8, 8), epsilon=1.0, sigma_begin=2.0)
    assert ScoreModel(config).config == plain
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == plain


def test_config_survives_json():
    config = dataclasses.replace(TINY, image_size=(8, 12), langevin_form="paper")
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(ValueError, match="unknown model config fields: colour"):
        ModelConfig.from_dict({"colour": 3})
    for name, value in (("ngf", 4.0), ("image_size", [8]), ("scale_input", 1), ("epsilon", True)):
        with pytest.raises(ValueError, match=f"field '{name}' must be"):
            ModelConfig.from_dict({name: value})


@pytest.mark.parametrize("arch", ["ncsnv2", "ncsn"])
def test_score_and_score_at_agree_at_trained_levels(arch):
    model, x = tiny(arch=arch), field(4, 3, 8, 8)
    level = torch.tensor([3, 0, 2, 1])
    per_sample = model.score(x, model.sigmas[level])
    assert torch.equal(per_sample, model.score_at(x, level))
    for i, k in enumerate(level.tolist()):
        alone = model.score(x[i : i + 1], float(model.sigmas[k]))
        torch.testing.assert_close(alone, per_sample[i : i + 1], rtol=1e-4, atol=1e-5)


def test_unconditional_score_at_any_sigma():
    model, x = tiny(), field(3, 3, 8, 8)
    for sigma in (0.0123, 0.7, 31.0):
        torch.testing.assert_close(model.score(x, sigma), model(x) / sigma)
    assert torch.equal(model(x, torch.tensor([3, 0, 1])), model(x))


def test_conditional_score_takes_the_nearest_level_in_log_sigma():
    model, x = tiny(arch="ncsn"), field(1, 3, 8, 8)
    upper, lower = model.sigmas[1].item(), model.sigmas[2].item()
    middle = math.sqrt(upper * lower)
    assert not torch.allclose(model.score_at(x, 1), model.score_at(x, 2))
    assert torch.equal(model.score(x, middle * 1.001), model.score_at(x, 1))
    assert torch.equal(model.score(x, middle * 0.999), model.score_at(x, 2))
    many = torch.tensor([[1e9, middle * 1.001], [middle * 0.999, 1e-9]])
    assert model.nearest_level(many).tolist() == [[0, 1], [2, 3]]


@pytest.mark.parametrize("arch", ["ncsnv2", "ncsn"])
def test_tweedie(arch):
    model, x = tiny(arch=arch), field(2, 3, 8, 8)
    sigma = torch.tensor([0.5, 0.05])
    expected = x + sigma.square()[:, None, None, None] * model.score(x, sigma)
    assert torch.equal(model.denoise(x, sigma), expected)
    torch.testing.assert_close(model.denoise(x, 0.5)[:1], expected[:1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda m, x: m.score(x, 0.0), "sigma must be positive and finite"),
        (lambda m, x: m.denoise(x, -1.0), "sigma must be positive and finite"),
        (lambda m, x: tiny(arch="ncsn")(x), r"conditioned on the noise level: pass level \(N,\)"),
        (lambda m, x: m.score(x, math.nan), "sigma must be positive and finite"),
        (lambda m, x: m.score(x, math.inf), "sigma must be positive and finite"),
        (lambda m, x: m.score(x, torch.ones(3)), r"sigma must be a number or \(2,\); got"),
        (lambda m, x: m.score_at(x, 4), r"level must be in \[0, 4\)"),
        (lambda m, x: m.score_at(x, -1), r"level must be in \[0, 4\)"),
        (
            lambda m, x: m.score_at(x, torch.zeros(3, dtype=torch.int64)),
            r"level must be an index or \(2,\)",
        ),
    ],
)
def test_bad_conditions_are_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call(tiny(), field(2, 3, 8, 8))


@pytest.mark.parametrize("arch", ["ncsnv2", "ncsn"])
def test_one_channel_one_sigma_and_an_empty_batch(arch):
    model = tiny(arch=arch, channels=1, ngf=1, n_sigmas=1)
    x = field(2, 1, 8, 8)
    assert bool(model.score_at(x, 0).isfinite().all())
    assert torch.equal(model.score(x, 2.0), model.score_at(x, 0))
    assert model.score(torch.zeros(0, 1, 8, 8), 1.0).shape == (0, 1, 8, 8)


def test_scale_input():
    scaled, plain = tiny(), tiny(scale_input=False)
    x = field(2, 3, 8, 8)
    assert torch.equal(scaled(x), plain(2 * x - 1))


def test_the_network_computes_in_float64():
    model, x = tiny(), field(1, 3, 8, 8)
    exact = tiny().double()(x.double())
    error = (model(x) - exact).abs().max() / exact.abs().max()
    assert 0 < error < 1e-5
