"""The U-Nets of score_sde and EDM: published outputs, keys and numbers, and their settings."""

import dataclasses
import itertools
import math

import golden
import numpy as np
import pytest
import torch
import unets
from torch import nn

from ncsn_fast import ScoreModel, ops
from ncsn_fast.models.published_unets import PUBLISHED_UNETS
from ncsn_fast.models.score_unet import build
from ncsn_fast.models.unet_architectures import (
    UNETS,
    DDPMConfig,
    DDPMppConfig,
    DhariwalUNetConfig,
    NCSNppConfig,
    SongUNetConfig,
)
from ncsn_fast.models.unet_blocks import Block, FilteredConv, Positional, Resample
from ncsn_fast.models.unet_config import edm_config
from ncsn_fast.models.unet_table import Style, table

TOLERANCE = 2e-5  # of max |output|
WRAPPED = [
    "edm_ncsnpp_ve_16", "edm_ncsnpp_edm_16", "edm_ddpmpp_edm_16", "edm_ddpmpp_vp_16",
    "edm_ddpmpp_cond_edm_16", "edm_adm_cond_edm_16", "edm_adm_iddpm_16", "edm_tiny_vp",
]  # fmt: skip
_SCORE_SDE = {
    "num_res_blocks": 1, "image_size": 16, "attn_resolutions": (8,), "ch_mult": (1, 2, 2)
}  # fmt: skip
SCORE_SDE = {
    "ncsnpp_cont_16": NCSNppConfig(nf=16, **_SCORE_SDE),
    "ncsnpp_ffhq_style_16": NCSNppConfig(
        nf=16, progressive="output_skip", progressive_input="input_skip", **_SCORE_SDE
    ),
    "ncsnpp_discrete_16": NCSNppConfig(nf=16, embedding_type="positional", **_SCORE_SDE),
    "ddpmpp_cont_16": DDPMppConfig(nf=16, **_SCORE_SDE),
    "ddpm_16": DDPMConfig(nf=32, **_SCORE_SDE),
}  # fmt: skip
ADAPTIVE = DhariwalUNetConfig(
    img_resolution=16, model_channels=64, num_blocks=1, channel_mult=(1, 2), attn_resolutions=(8,)
)


def relative_error(actual, expected):
    assert tuple(actual.shape) == expected.shape
    return np.abs(actual.double().numpy() - expected).max() / np.abs(expected).max()


@pytest.fixture(scope="module", params=WRAPPED)
def wrapped(request):
    """Metadata and arrays of a file of EDM, and its model."""
    meta, arrays = golden.read(request.param)
    model = ScoreModel(edm_config(meta["precond"], meta["kwargs"]))
    unets.draw_weights(model.net, "model.")
    return meta, {k: torch.from_numpy(v) for k, v in arrays.items()}, model.eval()


@torch.no_grad()
def test_edms_networks_compute_the_published_outputs(wrapped):
    """F for the published c_noise, and D(x; sigma), through our own parameterisation."""
    meta, a, model = wrapped
    iddpm = meta["precond"] == "iDDPMPrecond"
    assert sum(p.numel() for p in model.net.parameters()) == meta["parameters"]
    assert len(model.net.state_dict()) + iddpm == meta["state_tensors"]
    labels = a.get("class_labels")
    form = model.parameterisation.linear_form(a["sigma"] / 2)
    inner = (form.scale / 2).float().view(-1, 1, 1, 1)
    f = model.net(inner * a["x"], a["c_noise"].float(), labels)
    assert relative_error(f, a["model_output"][:, :3].numpy()) <= TOLERANCE
    classes = None if labels is None else labels.argmax(1)
    x, sigma = (a["x"] + 1) / 2, a["sigma"] / 2  # [0, 1] is [-1, 1] there
    denoised = 2 * model.denoise(x, sigma, classes) - 1
    assert relative_error(denoised, a["output"].numpy()) <= TOLERANCE
    if labels is not None:
        unlabelled = 2 * model.denoise(x, sigma) - 1
        assert relative_error(unlabelled, a["output_unlabelled"].numpy()) <= TOLERANCE
    if "augment_labels" in a:
        f = model.net(inner * a["x"], a["c_noise"].float(), labels, a["augment_labels"])
        skip, out = ((c * a["sigma"]).view(-1, 1, 1, 1) for c in (form.skip / 2, form.out))
        both = (1 + skip) * a["x"] + out * f
        assert relative_error(both, a["output_augment"].numpy()) <= TOLERANCE


def test_the_ends_of_edms_wrappers(wrapped):
    meta, _, model = wrapped
    ends = {
        "VPPrecond": (1.0004976e-3, 152.166970), "VEPrecond": (0.02, 100.0),
        "iDDPMPrecond": (meta["sigma_min"], meta["sigma_max"]), "EDMPrecond": (0.002, 80.0),
    }[meta["precond"]]  # fmt: skip
    found = (2 * model.config.sigma_end, 2 * model.config.sigma_begin)
    assert found == pytest.approx(ends, rel=1e-6 if meta["precond"] != "iDDPMPrecond" else 0)
    assert model.sigmas[[-1, 0]].tolist() == pytest.approx([end / 2 for end in ends])


@pytest.mark.parametrize("name", SCORE_SDE)
@torch.no_grad()
def test_the_networks_of_score_sde_compute_the_published_outputs(name):
    meta, arrays = golden.read(name)
    net = build(SCORE_SDE[name]).eval()
    unets.draw_weights(net)
    assert sum(p.numel() for p in net.parameters()) == meta["n_params"]
    assert len(net.state_dict()) + 1 == meta["n_state"]  # and sigmas
    x, c = (torch.from_numpy(arrays[k]) for k in ("x", "cond"))
    f = net(x, c)
    sigma = torch.ones(2)  # VE networks divide by it
    if name == "ncsnpp_discrete_16":
        sigma = torch.from_numpy(np.geomspace(50, 0.01, 1000))[c].float()
    elif name.startswith("ncsnpp"):
        sigma = c
    assert relative_error(f / sigma.view(-1, 1, 1, 1), arrays["output"]) <= TOLERANCE


@pytest.mark.parametrize(
    ("name", "style", "direction"),
    [
        ("edm_block_adm_up", DhariwalUNetConfig().style, "up"),
        ("edm_block_song_down", SongUNetConfig.ncsnpp().style, "down"),
    ],
)
@torch.no_grad()
def test_single_blocks_of_small_inputs(name, style, direction):
    """Where the eps of norms shows."""
    meta, arrays = golden.read(name)
    block = Block(24, 32, 16, style, direction=direction, heads=meta["num_heads"]).eval()
    unets.draw_weights(block)
    assert len(block.state_dict()) == meta["state_tensors"]
    out = block(*(torch.from_numpy(arrays[k]) for k in ("x", "emb")))
    assert relative_error(out, arrays["output"]) <= TOLERANCE


@pytest.mark.parametrize("name", PUBLISHED_UNETS)
def test_sizes_of_the_published_networks(name):
    row = PUBLISHED_UNETS[name]
    with torch.device("meta"):
        net = build(row.network)
    found = sum(p.numel() for p in net.parameters())
    assert row.n_parameters in (0, found)
    tensors = {
        "cifar10_ncsnpp": 571, "cifar10_ncsnpp_continuous": 572, "vp_ddpm_cifar10": 309
    }  # fmt: skip
    assert tensors.get(name) in (None, len(net.state_dict()) + 1)
    assert not any(buffer.is_meta and buffer.numel() < 99 for _, buffer in constants(net))


def constants(net):
    kept = net.state_dict()
    return [(name, buffer) for name, buffer in net.named_buffers() if name not in kept]


def kinds(name):
    """Parts of score_sde's list by index, as the published index maps name them."""
    with torch.device("meta"):
        net = build(PUBLISHED_UNETS[name].network)
    parts = {}
    for key in net.state_dict():
        _, index, *rest = key.split(".")
        parts.setdefault(int(index), set()).add(rest[0])
    known = {
        "W": "fourier", "weight": "layer", "GroupNorm_1": "block", "NIN_3": "attention",
        "Conv2d_0": "residual", "Conv_0": "conv",
    }  # fmt: skip
    return {
        index: next(kind for part, kind in known.items() if part in names)
        for index, names in sorted(parts.items())
    }


def indices(found, kind):
    return [index for index, name in found.items() if name == kind]


def test_modules_lie_where_the_published_ones_do():
    found = kinds("cifar10_ncsnpp_continuous")
    assert indices(found, "fourier") == [0]
    assert indices(found, "layer") == [1, 2, 3, 57, 58]
    assert indices(found, "residual") == [9, 19, 25]
    assert indices(found, "attention") == [11, 13, 15, 17, 31, 50]
    found = kinds("ffhq_256_ncsnpp_continuous")
    assert indices(found, "conv") == [7, 11, 15, 19, 25, 29]
    assert indices(found, "attention") == [21, 23, 33, 50]
    assert indices(found, "layer")[3:] == [
        38, 39, 44, 45, 51, 52, 57, 58, 63, 64, 69, 70, 75, 76
    ]  # fmt: skip
    assert max(found) == 76
    found = kinds("vp_cifar10_ddpmpp_continuous")
    assert indices(found, "attention") == [9, 11, 13, 15, 27, 46]
    found = kinds("vp_ddpm_cifar10")
    assert indices(found, "conv") == [5, 10, 13, 22, 26, 31]
    assert indices(found, "attention") == [7, 9, 17, 30]


def test_parameters_come_in_the_published_order():
    """score_sde's moving averages are lists in this order, without the fixed frequencies."""
    net = unets.network_of(unets.model("ncsnpp").net)
    named = list(net.named_parameters())
    assert [name for name, p in named if not p.requires_grad] == ["all_modules.0.W"]
    assert [name for name, _ in named[5:18]] == [
        "all_modules.3.weight", "all_modules.3.bias",
        "all_modules.4.GroupNorm_0.weight", "all_modules.4.GroupNorm_0.bias",
        "all_modules.4.Conv_0.weight", "all_modules.4.Conv_0.bias",
        "all_modules.4.Dense_0.weight", "all_modules.4.Dense_0.bias",
        "all_modules.4.GroupNorm_1.weight", "all_modules.4.GroupNorm_1.bias",
        "all_modules.4.Conv_1.weight", "all_modules.4.Conv_1.bias",
        "all_modules.5.GroupNorm_0.weight",
    ]  # fmt: skip
    keys = [*build(SongUNetConfig.ncsnpp(img_resolution=16, label_dim=2, augment_dim=9,
                                         num_blocks=1)).state_dict()]  # fmt: skip
    assert keys[:10] == [
        "map_noise.freqs", "map_label.weight", "map_label.bias", "map_augment.weight",
        "map_layer0.weight", "map_layer0.bias", "map_layer1.weight", "map_layer1.bias",
        "enc.16x16_conv.weight", "enc.16x16_conv.bias",
    ]  # fmt: skip
    assert "enc.8x8_aux_residual.resample_filter" in keys
    assert "dec.2x2_in0.qkv.weight" in keys
    assert keys[-2:] == ["dec.16x16_aux_conv.weight", "dec.16x16_aux_conv.bias"]


FIR = Style(("",) * 6, filter=(1.0, 3.0, 3.0, 1.0))


def test_resampling_by_hand():
    x = torch.arange(16.0).view(1, 1, 4, 4)
    down, up = Resample("down", FIR)(x), Resample("up", FIR)(x)
    assert down.flatten().tolist() == [2.734375, 3.9375, 7.546875, 8.75]
    first = [0, 0.1875, 0.5625, 0.9375, 1.3125, 1.6875, 2.0625, 1.6875]
    assert up[0, 0, 0].tolist() == first
    assert up.sum().item() == 421.875
    square = Style(("",) * 6)
    assert Resample("down", square)(x).flatten().tolist() == [2.5, 4.5, 10.5, 12.5]
    assert Resample("up", square)(x)[0, 0, :2, :4].tolist() == [[0, 0, 1, 1]] * 2
    # The square as the filter (1, 1) is the same, as a convolution.
    loose = Style(("",) * 6, filter=(2.0, 2.0))
    for direction in ("down", "up"):
        torch.testing.assert_close(Resample(direction, loose)(x), Resample(direction, square)(x))


@pytest.mark.parametrize("taps", [(1.0, 3.0, 3.0, 1.0), (1.0, 1.0), (1.0, 2.0, 5.0, 2.0, 1.0, 1.0)])
def test_a_filtered_convolution_is_the_published_one(taps):
    """EDM's order: the convolution with more padding, then the filter at every second pixel."""
    style = Style(("",) * 6, filter=taps)
    conv = FilteredConv(3, 5, style).double()
    nn.init.normal_(conv.bias)
    x = torch.randn(2, 3, 8, 12, dtype=torch.float64)
    f = torch.tensor(taps, dtype=torch.float64)
    kernel = (f.outer(f) / f.sum() ** 2).expand(5, 1, -1, -1)
    padding = (len(taps) - 1) // 2 + 1
    y = nn.functional.conv2d(x, conv.weight, padding=padding)
    y = nn.functional.conv2d(y, kernel, stride=2, groups=5) + conv.bias[:, None, None]
    torch.testing.assert_close(conv(x), y, rtol=1e-6, atol=1e-6)  # the filter is float32


def test_positional_features_by_hand():
    features = Positional(8, endpoint=True, cos_first=False)(torch.tensor([12.5]))
    expected = [
        -0.0663219, 0.54819005, 0.02692718, 0.00125, 0.99779828, 0.83635379, 0.9996374, 0.99999922
    ]  # fmt: skip
    torch.testing.assert_close(features[0], torch.tensor(expected), rtol=1e-6, atol=1e-6)
    last = Positional(8, endpoint=False, cos_first=True)(torch.tensor([100.0]))[0]
    assert last[3].item() == pytest.approx(math.cos(100 / 1000), abs=1e-6)
    assert last[7].item() == pytest.approx(math.sin(100 / 1000), abs=1e-6)


@pytest.mark.parametrize("name", unets.TINY)
def test_rows_of_a_table_fit_each_other(name):
    """Each row takes what the last one gives, and the decoder takes all that was kept."""
    shape = unets.TINY[name][0].shape
    rows = table(shape)
    kept = [row.cout for row in rows if row.kept]
    taken = [row.skip for row in rows if row.skip]
    assert taken == kept[::-1]
    blocks = [row for row in rows if row.kind == "block"]
    assert all(a.cout == b.cin for a, b in itertools.pairwise(blocks))
    assert rows[-1].resolution == shape.resolution
    assert [row.kind for row in rows].count("output") == (2 if shape.output else 1)


def test_labels_as_numbers_and_as_rows():
    net = unets.network_of(unets.model("edm-ddpmpp").net)
    x, c = torch.randn(3, 1, 8, 8), torch.tensor([-1.0, 0.0, 1.0])
    with torch.no_grad():
        rows = net(x, c, torch.tensor([[1.0, 0, 0], [0, 0, 1], [0, 0, 0]]))
        torch.testing.assert_close(net(x, c, torch.tensor([0, 2, 3])), rows, rtol=0, atol=0)
        torch.testing.assert_close(net(x, c)[2], rows[2], rtol=1e-5, atol=1e-6)
        assert (net(x, c)[0] - rows[0]).abs().max() > 1e-3


def test_classes_are_left_out_in_training():
    settings, _ = unets.TINY["edm-ddpmpp"]
    values = {**settings.to_dict(), "label_dropout": 1.0}
    net = build(SongUNetConfig.from_kwargs(values))
    unets.draw_weights(net)
    x, c, labels = torch.randn(2, 1, 8, 8), torch.zeros(2), torch.tensor([0, 1])
    with torch.no_grad():
        dropped = net.train()(x, c, labels)
        torch.testing.assert_close(dropped, net(x, c))
        assert (net.eval()(x, c, labels) - dropped).abs().max() > 1e-3


def test_new_networks_begin_near_zero_and_learn_everywhere():
    net = build(unets.TINY["edm-adm"][0])
    x, c = torch.randn(2, 1, 8, 8), torch.zeros(2)
    f = net(x, c, torch.tensor([0, 1]))
    assert 0 < f.abs().max() < 1e-2
    f.square().sum().backward()
    assert all(p.grad is not None for p in net.parameters())


@pytest.mark.parametrize("config", [*SCORE_SDE.values(), ADAPTIVE], ids=lambda c: c.arch)
def test_training_on_a_cpu_takes_no_norm_of_pytorchs(config):
    torch.manual_seed(0)
    net = build(dataclasses.replace(config, dropout=0.0)).train()
    unets.draw_weights(net, "")
    x, condition = torch.rand(2, 3, 16, 16), torch.tensor([0.3, 2.0])

    def gradients(backend):
        with ops.backend(backend), torch.profiler.profile() as profile:
            loss = net(x, condition).square().mean()
            found = torch.autograd.grad(loss, [p for p in net.parameters() if p.requires_grad])
        names = {event.name for event in profile.events()}
        return torch.cat([g.flatten() for g in found]), names

    (ours, ran), (theirs, _) = gradients("kernels"), gradients("reference")
    assert "ncsn_fast::group_norm_backward" in ran
    assert not {name for name in ran if "native_group_norm" in name}
    assert (ours - theirs).norm() <= 1e-4 * theirs.norm()  # both are float32


def test_inputs_that_no_network_takes():
    net = unets.network_of(unets.model("ncsnpp").net)
    x, sigma = torch.zeros(2, 1, 8, 8), torch.ones(2)
    for wrong, text in (
        ((torch.zeros(2, 3, 8, 8), sigma), r"expected images \(N, 1, H, W\)"),
        ((torch.zeros(2, 1, 9, 8), sigma), "multiples of 2"),
        ((x,), "conditioned on the noise level"),
        ((x, torch.ones(3)), r"c must be \(2,\)"),
    ):
        with pytest.raises(ValueError, match=text):
            net(*wrong)


@pytest.mark.parametrize(
    ("arch", "values", "text"),
    [
        ("ncsnpp", {"nf": 128.0}, "nf of ncsnpp must be an integer"),
        ("ncsnpp", {"nf": True}, "nf of ncsnpp must be an integer"),
        ("ncsnpp", {"ch_mult": [1, "2"]}, "ch_mult of ncsnpp must be a list of integers"),
        ("ncsnpp", {"ch_mult": []}, "number of levels"),
        ("ncsnpp", {"progressive": "residual"}, "one of none, output_skip"),
        ("ncsnpp", {"fir": False}, "needs fir true"),
        ("ncsnpp", {"fir_kernel": [1, 2, 1]}, "even number of positive taps"),
        ("ncsnpp", {"colour": 1}, "unknown settings of ncsnpp: colour"),
        ("ncsnpp", {"image_size": 36}, "multiple of 8"),
        ("ncsnpp", {"image_size": 8192}, "NCSN_FAST_MAX_IMAGE_SIZE"),
        ("ncsnpp", {"nf": 2**20}, "NCSN_FAST_MAX_WIDTH"),
        ("ncsnpp", {"num_res_blocks": 10**6}, "NCSN_FAST_MAX_BLOCKS"),
        ("ncsnpp", {"num_res_blocks": -1}, "number of blocks"),
        ("ddpm", {"nf": 24}, "32 equal groups"),
        ("songunet", {"dropout": 1.5}, "probabilities"),
        ("songunet", {"dropout": math.nan}, "probabilities"),
        ("songunet", {"label_dim": -1}, "numbers of labels"),
        ("songunet", {"label_dim": 10**9}, "NCSN_FAST_MAX_WIDTH"),
        ("dhariwal", {"model_channels": 0}, "every width"),
    ],
)
def test_settings_that_no_network_has(arch, values, text):
    with pytest.raises(ValueError, match=text):
        UNETS[arch].from_kwargs(values)


@pytest.mark.parametrize("arch", UNETS)
def test_settings_are_written_and_read_back(arch):
    settings = UNETS[arch]()
    assert UNETS[arch].from_kwargs(settings.to_dict()) == settings
