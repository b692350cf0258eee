"""The tutorial's U-Net: golden output, published keys and sizes, its clock, and how it is used."""

import dataclasses
import json
import math

import engine_cases
import golden
import pytest
import torch
from tutorial import CONFIG, A, published, weight

import ncsn_fast
from ncsn_fast import CheckpointError, ModelConfig, Sampler, ScoreModel, convert, ops
from ncsn_fast.checkpoints import model_folder
from ncsn_fast.inference.cost import network_flop
from ncsn_fast.models.architectures import TIME_ARCHS, VERSIONS
from ncsn_fast.models.unet import TimeUNet
from ncsn_fast.samplers import methods
from ncsn_fast.samplers.program import Chains, initial_state, run
from ncsn_fast.training.configs import CONFIGS

CLOCKS = {arch: config.clock() for arch, config in CONFIG.items()}
TIMES = [1e-5, 1e-3, 1e-2, 0.1, 0.5, 0.9, 1.0]
STDS = {  # published constants, from their closed forms
    "unet_a": [1.24071e-4, 1.245452e-3, 4.079247e-3, 0.01913389, 0.46893496, 10.19014, 21.99999773],
    "unet_b": [0.00316233, 0.03167374, 0.10163123, 0.37465710, 1.93080543, 7.13044266, 9.84521456],
}
STDS["unet_c"] = STDS["unet_b"]
RUNS = {"unet_a": "mnist-sde", "unet_b": "mnist-sde-b", "unet_c": "mnist-sde-c"}
archs = pytest.mark.parametrize("arch", TIME_ARCHS)


def tiny(arch="unet_a", seed=0, **changes):
    torch.manual_seed(seed)
    settings = {"arch": arch, "ngf": 4, "n_sigmas": 5, "n_steps_each": 1, **changes}
    return ScoreModel(dataclasses.replace(CONFIG.get(arch, A), **settings)).eval()


def field(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 1.3 - 0.2


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_golden_output(layout):
    meta, arrays = golden.read("tutorial_a_28")
    model = published("unet_a")
    assert list(model.net.state_dict()) == meta["keys"]
    assert (model.config.sigma_min, model.config.sigma_max) == (
        meta["sigma_min"],
        meta["sigma_max"],
    )
    x, t = torch.from_numpy(arrays["x"]), torch.from_numpy(arrays["cond"])
    x = x.contiguous(memory_format=layout)
    with torch.inference_mode():
        golden.assert_matches(model.score_at_time(x, t), arrays["output"])
        golden.assert_matches(model.score(x, model.clock.std(t)), arrays["output"])
        sampler = Sampler(model, engine="eager", batch_size=2)
        golden.assert_matches(sampler.score(x, model.clock.std(t)), arrays["output"])


def test_keys_of_versions_b_and_c():
    """Version a's, with a linear layer after the Fourier features."""
    a, b, c = (list(TimeUNet(version).state_dict()) for version in VERSIONS)
    assert b == c
    assert b == ["embed.0.W", "embed.1.weight", "embed.1.bias", *a[1:]]


@pytest.mark.parametrize(
    ("version", "everything", "trainable", "n_tensors"),
    [
        ("a", 1_049_633, 1_049_505, 38),
        ("b", 1_115_425, 1_115_297, 40),
        # Without the half of three convolutions that sees the skips.
        ("c", 1_115_425 - 9 * (128 * 64 + 64 * 32 + 32), 1_115_297 - 9 * 10_272, 40),
    ],
)
def test_parameter_counts(version, everything, trainable, n_tensors):
    net = TimeUNet(version)
    assert sum(p.numel() for p in net.parameters()) == everything
    assert sum(p.numel() for p in net.parameters() if p.requires_grad) == trainable
    assert len(net.state_dict()) == n_tensors
    frequencies = net.state_dict()["embed.W" if version == "a" else "embed.0.W"]
    assert frequencies.std() == pytest.approx(VERSIONS[version].fourier_scale, rel=0.25)


@pytest.mark.parametrize("low", [False, True])
@pytest.mark.parametrize("version", VERSIONS)
def test_training_is_as_exact_as_with_pytorchs_norms(version, low):
    """While it is trained on a CPU, its norms are ours, else PyTorch's."""
    torch.manual_seed(0)
    net, weights = TimeUNet(version, ngf=8).train(), torch.randn(4, 1, 28, 28)
    net.to(memory_format=torch.channels_last)
    x, t = torch.rand(4, 1, 28, 28), torch.tensor([0.1, 0.4, 0.6, 0.9])

    def gradients(backend, dtype=torch.float32):
        leaves = [p for p in net.to(dtype).parameters() if p.requires_grad]
        with (
            ops.backend(backend),
            torch.autocast("cpu", torch.bfloat16, enabled=low and dtype is torch.float32),
        ):
            y = net(x.to(dtype), t.to(dtype))
        found = torch.autograd.grad((y.to(dtype) * weights).sum(), leaves)
        return torch.cat([g.double().flatten() for g in found])

    ours, theirs = gradients("kernels"), gradients("reference")
    exact = gradients("reference", torch.float64)
    assert not torch.equal(ours, theirs)
    assert (ours - exact).norm() <= 1.5 * (theirs - exact).norm()


def test_flop_of_a_forward():
    dense = 256 * (32 + 64 + 128 + 256 + 128 + 64 + 32)
    assert network_flop(published("unet_a")) / 2 - dense == pytest.approx(16.44e6, rel=1e-3)


def by_hand(net: TimeUNet, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """The layers of version b one by one, in float64, with group norms as formulas."""
    w = {key: value.double() for key, value in net.state_dict().items()}
    f = torch.nn.functional

    def swish(h):
        return h / (1 + (-h).exp())

    phase = 2 * math.pi * t.double()[:, None] * w["embed.0.W"]
    e = torch.cat((phase.sin(), phase.cos()), 1)
    e = swish(e @ w["embed.1.weight"].T + w["embed.1.bias"])

    def after(h, dense, norm, groups):
        h = h + (e @ w[f"{dense}.dense.weight"].T + w[f"{dense}.dense.bias"])[:, :, None, None]
        g = h.reshape(len(h), groups, -1)
        g = (g - g.mean(2, keepdim=True)) / (g.var(2, unbiased=False, keepdim=True) + 1e-5).sqrt()
        g = g.reshape(h.shape)
        return swish(g * w[f"{norm}.weight"][:, None, None] + w[f"{norm}.bias"][:, None, None])

    h1 = after(f.conv2d(x.double(), w["conv1.weight"]), "dense1", "gnorm1", 4)
    h2 = after(f.conv2d(h1, w["conv2.weight"], stride=2), "dense2", "gnorm2", 32)
    h3 = after(f.conv2d(h2, w["conv3.weight"], stride=2), "dense3", "gnorm3", 32)
    h4 = after(f.conv2d(h3, w["conv4.weight"], stride=2), "dense4", "gnorm4", 32)
    up = f.conv_transpose2d
    h = after(up(h4, w["tconv4.weight"], stride=2), "dense5", "tgnorm4", 32)
    h = up(torch.cat((h, h3), 1), w["tconv3.weight"], stride=2, output_padding=1)
    h = after(h, "dense6", "tgnorm3", 32)
    h = up(torch.cat((h, h2), 1), w["tconv2.weight"], stride=2, output_padding=1)
    h = after(h, "dense7", "tgnorm2", 32)
    return up(torch.cat((h, h1), 1), w["tconv1.weight"], w["tconv1.bias"])


def test_version_b_layer_by_layer():
    model, x, t = published("unet_b"), field(3, 1, 28, 28), torch.tensor([1e-3, 0.37, 1.0])
    with torch.inference_mode():
        golden.assert_matches(model(x, t), by_hand(model.net, x, t).numpy())


@archs
def test_sigma_of_every_time(arch):
    clock = CLOCKS[arch]
    torch.testing.assert_close(
        clock.std(torch.tensor(TIMES)), torch.tensor(STDS[arch]).double(), rtol=3e-6, atol=0
    )
    t = torch.tensor([*TIMES, 1e-9], dtype=torch.float64)
    torch.testing.assert_close(clock.time(clock.std(t)), t, rtol=1e-12, atol=0)
    assert clock.time(2 * STDS[arch][-1]) == 1.0  # the last that the network knows
    assert float(clock.std(0.0)) == 0.0


@archs
def test_the_clock_is_the_sde(arch):
    """std^2 grows by g^2: a's is the slope of sigma(t)^2, b's is sigma(t)^2."""
    config, clock = CONFIG[arch], CLOCKS[arch]
    t = torch.linspace(0.01, 1, 20, dtype=torch.float64)
    sigma = config.sigma_min * (config.sigma_max / config.sigma_min) ** t
    slope = (clock.std(t + 1e-6).square() - clock.std(t - 1e-6).square()) / 2e-6
    g2 = sigma.square()
    if arch == "unet_a":
        g2 = g2 * 2 * math.log(config.sigma_max / config.sigma_min)
        torch.testing.assert_close(clock.std(t).square(), sigma.square() - config.sigma_min**2)
    torch.testing.assert_close(slope, g2, rtol=1e-6, atol=0)


@archs
def test_score_at_any_sigma(arch):
    model, x = tiny(arch), field(3, 1, 28, 28)
    for sigma in (0.0123, 0.7, 9.0):
        score, t = model.score(x, sigma).detach(), model.clock.time(sigma)
        golden.assert_matches(score, model.score_at_time(x, t).detach().numpy())
        f = model(x, t.float().expand(3)).detach()
        golden.assert_matches(score, (f / sigma).numpy())
    each = torch.tensor([5.0, 0.3, 0.02])
    together = model.score(x, each).detach()
    for i in range(3):
        alone = model.score(x[i : i + 1], float(each[i])).detach()
        golden.assert_matches(together[i : i + 1], alone.numpy())
    level = torch.tensor([4, 0, 2])
    assert torch.equal(model.score_at(x, level), model.score(x, model.sigmas[level]))
    square = each.square()[:, None, None, None]
    torch.testing.assert_close(model.denoise(x, each), x + square * model.score(x, each))


def test_the_network_sees_the_time():
    # With ngf 4 every group is one channel, whose norm takes away what a time adds to it.
    model, x = tiny(ngf=8), field(1, 1, 28, 28)
    early, late = (model(x, torch.tensor([t])) for t in (0.2, 0.3))
    assert (early - late).abs().max() > 0.01 * early.abs().max()
    assert (model.conditioning, model.conditional) == ("time", False)
    condition = model.condition(torch.tensor([[9.0, 0.1]]))
    assert (condition.shape, condition.dtype) == ((1, 2), torch.float32)


@pytest.mark.parametrize("size", [(28, 36), (44, 28)])
def test_other_sizes_and_channels(size):
    model, x = tiny(image_size=size, channels=3), field(2, 3, *size)
    assert model.score(x, 1.0).shape == x.shape
    assert model.score(x[:0], 1.0).shape == (0, 3, *size)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda m: m(field(1, 1, 28, 28)), r"conditioned on the time: pass t \(N,\)"),
        (lambda m: m(field(2, 1, 28, 28), torch.ones(1)), r"t must be \(2,\) float; got \(1,\)"),
        (lambda m: m(field(1, 1, 28, 28), torch.ones(1).int()), "float; got .* torch.int32"),
        (lambda m: m.score(field(1, 3, 28, 28), 1.0), r"expected images \(N, 1, H, W\)"),
        (lambda m: m.score(field(1, 1, 28, 32), 1.0), "28, 36, 44, .* got 28x32"),
        (lambda m: m.score(field(1, 1, 20, 28), 1.0), "28, 36, 44, .* got 20x28"),
        (lambda m: m.score(field(1, 1, 28, 28), 0.0), "sigma must be positive"),
        (lambda m: m.score_at_time(field(1, 1, 28, 28), 0.0), r"t must be in \(0, 1\]"),
        (lambda m: m.score_at_time(field(1, 1, 28, 28), 1.1), r"t must be in \(0, 1\]"),
        (lambda m: m.score_at_time(field(1, 1, 28, 28), math.nan), r"t must be in \(0, 1\]"),
    ],
)
def test_bad_calls_are_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call(tiny())


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"act": "elu"}, "unet_a has act 'swish'; got 'elu'"),
        ({"norm": "InstanceNorm++"}, "unet_a has norm 'GroupNorm'"),
        ({"scale_input": True}, "unet_a has scale_input False"),
        ({"sigma_max": 0.0}, "0 < sigma_min < sigma_max"),
        ({"image_size": (28, 32)}, "height and width are 28, 36, 44, .* got 28x32"),
        ({"ngf": 0}, "ngf must be an integer from 1 on; got 0"),
        ({"arch": "ncsnv2"}, "sigma_min and sigma_max belong to unet_a, unet_b, unet_c"),
        ({"arch": "unet_d", "sigma_min": 0.0, "sigma_max": 0.0}, "ncsnv2, .*, unet_b, unet_c; got"),
    ],
)
def test_bad_configurations_are_refused(fields, words):
    with pytest.raises(ValueError, match=words):
        tiny(**fields)
    with pytest.raises(ValueError, match="version must be one of a, b, c; got 'd'"):
        TimeUNet("d")
    with pytest.raises(ValueError, match="not conditioned on time"):
        ScoreModel(ModelConfig(ngf=1)).score_at_time(torch.zeros(1, 3, 8, 8), 0.5)


@archs
def test_config_survives_json(arch):
    config = CONFIG[arch]
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert not {"sigma_min", "sigma_max"} & set(ModelConfig().to_dict())


@archs
def test_model_folder_round_trip(tmp_path, arch):
    model, x = tiny(arch), field(2, 1, 28, 28)
    loaded = ncsn_fast.load(model.save_pretrained(tmp_path / "model"))
    assert loaded.config == model.config
    assert loaded.digest() == model.digest()
    assert torch.equal(loaded.score(x, 0.5), model.score(x, 0.5))
    assert [n for n, p in loaded.named_parameters() if not p.requires_grad] == [
        "net.embed.W" if arch == "unet_a" else "net.embed.0.W"
    ]


@archs
def test_folder_of_low_precision_keeps_the_frequencies(tmp_path, arch):
    model, x = published(arch), field(2, 1, 28, 28)
    loaded = ncsn_fast.load(model_folder.save_model(model, tmp_path, dtype=torch.bfloat16))
    key = "embed.W" if arch == "unet_a" else "embed.0.W"
    assert torch.equal(loaded.net.state_dict()[key], model.net.state_dict()[key])
    t = torch.tensor([0.3, 1.0])
    f, rounded = model(x, t), loaded(x, t)
    assert 0 < (rounded - f).norm() / f.norm() < 0.02


def published_file(arch, path, prefix="module.", **changes):
    """The state dict as the tutorial saves it."""
    state = published(arch).net.state_dict()
    torch.save({prefix + key: value for key, value in {**state, **changes}.items()}, path)
    return path


@pytest.mark.parametrize("prefix", ["", "module."])
@archs
def test_published_checkpoints(tmp_path, arch, prefix):
    model = ncsn_fast.load(published_file(arch, tmp_path / "ckpt.pth", prefix))
    run = CONFIGS[RUNS[arch]]
    expected = run.model_config(
        sigma_begin=run.sigma_begin, n_sigmas=run.n_sigmas, epsilon=run.epsilon
    )
    assert model.config == dataclasses.replace(expected, sigma_begin=model.config.sigma_begin)
    assert model.config.sigma_begin == pytest.approx(STDS[arch][-1], rel=1e-8)
    x = field(2, 1, 28, 28)
    assert torch.equal(model.score(x, 0.3), published(arch).score(x, 0.3))


def test_convert_a_published_checkpoint(tmp_path, capsys):
    path, out = published_file("unet_a", tmp_path / "ckpt.pth"), tmp_path / "out"
    assert convert.main([str(path), str(out), "--sigma-max", "10"]) == 0
    assert "model.safetensors" in capsys.readouterr().out
    model = ncsn_fast.load(out)
    assert (model.config.sigma_min, model.config.sigma_max) == (0.01, 10.0)
    assert model.config.sigma_begin == pytest.approx(10.0, rel=1e-5)
    x, t = field(2, 1, 28, 28), torch.tensor([0.2, 0.9])
    assert torch.equal(model(x, t), published("unet_a")(x, t))
    assert not torch.allclose(model.score_at_time(x, t), published("unet_a").score_at_time(x, t))


@pytest.mark.parametrize(
    ("changes", "overrides", "words"),
    [
        ({"conv1.weight": torch.ones(3)}, {}, r"ckpt.pth is not .* lacks conv1.weight"),
        ({"tconv1.bias": torch.ones(2)}, {}, r"tconv1.bias has shape \(2,\); expected \(1,\)"),
        ({"tconv1.bias": torch.ones(1) * torch.nan}, {}, "tconv1.bias holds NaN"),
        ({"embed.0.W": torch.ones(128)}, {}, "unexpected net.embed.0.W"),
        ({"more": torch.ones(1)}, {}, "unexpected net.more"),
        ({"tconv1.bias": 3.0}, {}, "not a state dict of tensors"),
        ({}, {"sigma_min": 30.0}, "ckpt.pth: expected 0 < sigma_min < sigma_max"),
        ({}, {"sigma_min": "x"}, "ckpt.pth"),
        ({}, {"act": "elu"}, "ckpt.pth: unet_a has act 'swish'; got 'elu'"),
        ({}, {"image_size": (32, 32)}, "28, 36, 44, .* got 32x32"),
        ({}, {"sigma_begin": 50.0}, "ckpt.pth: sigma_begin must be at most 22, .* got 50"),
    ],
)
def test_published_checkpoints_that_do_not_fit(tmp_path, changes, overrides, words):
    path = published_file("unet_a", tmp_path / "ckpt.pth", **changes)
    with pytest.raises(CheckpointError, match=words) as raised:
        ncsn_fast.load(path, **overrides)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("engine", ["cpu", "cuda"])
@archs
def test_our_engines_run_it(arch, engine, monkeypatch):
    monkeypatch.setitem(ncsn_fast.engines.ENGINES, "cuda", engine_cases.CudaOnCpu)
    model = tiny(arch)
    assert Sampler(model, device="cpu").engine_class.name == "cpu"
    options = {"method": "fast", "steps": 4, "progress": False}
    ours = Sampler(model, engine=engine, dtype="fp32", device="cpu").sample(2, **options)
    eager = Sampler(model, engine="eager", device="cpu").sample(2, **options)
    torch.testing.assert_close(ours, eager, rtol=0, atol=1e-3)


@pytest.mark.parametrize("method", ["cas", "ald"])
@archs
def test_sampling_is_the_recursion(arch, method):
    """Each row's network call sees the time of the row's sigma."""
    model = tiny(arch)
    with torch.no_grad():
        model.net.tconv1.weight.mul_(0.1)
    sampler = Sampler(model, engine="eager", batch_size=4)
    samples = sampler.sample(4, seed=3, method=method, progress=False)
    program = methods.build(method, model, None, {})
    keys = torch.arange(4)
    chains = Chains(initial_state(program, 3, keys, model.image_shape), 3, keys)
    with torch.inference_mode():
        run(program, lambda x, k: _sigma_times_score(model, x, program.sigma[k]), chains)
    assert not torch.equal(samples[0], samples[1])
    torch.testing.assert_close(samples, chains.x.clamp(0, 1), rtol=1e-3, atol=1e-4)
    alone = Sampler(model, engine="eager").sample(1, seed=3, start=2, method=method, progress=False)
    torch.testing.assert_close(alone[0], samples[2], rtol=1e-3, atol=1e-4)


def _sigma_times_score(model, x, sigma):
    return float(sigma) * model.score(x, float(sigma))


class AddedSkips(torch.nn.Module):
    """The variant of the tutorial in later notebooks, as they write it."""

    def __init__(self, widths=(32, 64, 128, 256), embed=256):
        super().__init__()
        nn, (a, b, c, d) = torch.nn, widths
        features = nn.Module()
        features.W = nn.Parameter(torch.randn(embed // 2) * 30, requires_grad=False)
        self.time_embed = nn.Sequential(features, nn.Linear(embed, embed))
        ins, outs = (1, a, b, c, d, c, b), (a, b, c, d, c, b, a)
        for k, name in enumerate(
            ("conv1", "conv2", "conv3", "conv4", "tconv4", "tconv3", "tconv2")
        ):
            transposed, stride = name[0] == "t", 1 if k == 0 else 2
            more = {"output_padding": int(k > 4)} if transposed else {}
            kind = nn.ConvTranspose2d if transposed else nn.Conv2d
            setattr(self, name, kind(ins[k], outs[k], 3, stride, bias=False, **more))
            dense = nn.Module()
            dense.dense = nn.Linear(embed, outs[k])
            setattr(self, f"dense{k + 1}", dense)
            norm = nn.GroupNorm(4 if k == 0 else 32, outs[k])
            setattr(self, f"{'t' * transposed}gnorm{name[-1]}", norm)
        self.tconv1 = nn.ConvTranspose2d(a, 1, 3)

    def forward(self, x, t):
        phase = t[:, None] * self.time_embed[0].W[None, :] * 2 * math.pi
        e = torch.nn.functional.silu(
            self.time_embed[1](torch.cat([torch.sin(phase), torch.cos(phase)], dim=-1))
        )

        def stage(h, conv, dense, norm):
            h = conv(h) + dense.dense(e)[..., None, None]
            return torch.nn.functional.silu(norm(h))

        h1 = stage(x, self.conv1, self.dense1, self.gnorm1)
        h2 = stage(h1, self.conv2, self.dense2, self.gnorm2)
        h3 = stage(h2, self.conv3, self.dense3, self.gnorm3)
        h = stage(h3, self.conv4, self.dense4, self.gnorm4)
        h = stage(h, self.tconv4, self.dense5, self.tgnorm4) + h3
        h = stage(h, self.tconv3, self.dense6, self.tgnorm3) + h2
        h = stage(h, self.tconv2, self.dense7, self.tgnorm2) + h1
        variance = (25.0 ** (2 * t) - 1) / 2 / math.log(25.0)
        return self.tconv1(h) / variance.sqrt()[:, None, None, None]


@pytest.mark.parametrize("prefix", ["", "module."])
def test_the_variant_with_added_skips(tmp_path, prefix):
    net = AddedSkips()
    net.load_state_dict({k: weight(k, tuple(v.shape)) for k, v in net.state_dict().items()})
    torch.save({prefix + k: v for k, v in net.state_dict().items()}, tmp_path / "ckpt.pth")
    model = ncsn_fast.load(tmp_path / "ckpt.pth")
    assert model.config.arch == "unet_c"
    assert (model.config.sigma_min, model.config.sigma_max) == (1.0, 25.0)
    x, t = field(3, 1, 28, 28), torch.tensor([1e-3, 0.37, 1.0])
    with torch.inference_mode():
        golden.assert_matches(model.score_at_time(x, t), net(x, t).numpy())
        golden.assert_matches(model.score(x, model.clock.std(t)), net(x, t).numpy())
    wider = {**net.state_dict(), "time_embed.1.weight": torch.ones(512, 256)}
    torch.save(wider, tmp_path / "ckpt.pth")
    with pytest.raises(CheckpointError, match=r"embed\.1\.weight has shape \(512, 256\); expected"):
        ncsn_fast.load(tmp_path / "ckpt.pth")
