"""Checkpoints of score_sde_pytorch: the golden networks, written as its trainer writes them."""

import logging

import golden
import pytest
import torch
import unets

import ncsn_fast
from ncsn_fast import CheckpointError, convert
from ncsn_fast.checkpoints import score_sde
from ncsn_fast.diffusion import schedule
from ncsn_fast.diffusion.sde import VP
from ncsn_fast.models.published_unets import PUBLISHED_UNETS
from ncsn_fast.models.score_unet import build
from ncsn_fast.models.unet_architectures import DDPMConfig, DDPMppConfig, NCSNppConfig

TINY = {
    "nf": 16, "num_res_blocks": 1, "image_size": 16, "attn_resolutions": (8,), "ch_mult": (1, 2, 2)
}  # fmt: skip
# Golden file -> its network, the published run that has its SDE, and the levels in its file.
GOLDEN = {
    "ncsnpp_cont_16": (NCSNppConfig(**TINY), "cifar10_ncsnpp_continuous"),
    "ncsnpp_discrete_16": (NCSNppConfig(**TINY, embedding_type="positional"), "cifar10_ncsnpp"),
    "ncsnpp_ffhq_style_16": (
        NCSNppConfig(**TINY, progressive="output_skip", progressive_input="input_skip"),
        "ffhq_256_ncsnpp_continuous",
    ),
    "ddpmpp_cont_16": (DDPMppConfig(**TINY), "vp_cifar10_ddpmpp_continuous"),
    "ddpm_16": (DDPMConfig(**{**TINY, "nf": 32}), "vp_ddpm_cifar10_continuous"),
}
SCORE_SDE = {name: run for name, run in PUBLISHED_UNETS.items() if "edm" not in name[:3]
             and not name.startswith("baseline")}  # fmt: skip


def drawn(network):
    net = build(network)
    unets.draw_weights(net)
    return net.eval()


def written(net, path, *, levels=None, ema="shadow", prefix="module."):
    """A file of its trainer, whose raw weights are zeros where there are averaged ones."""
    state = {f"{prefix}{key}": value for key, value in net.state_dict().items()}
    trained = [p.detach() for p in net.parameters() if p.requires_grad]
    average = {
        "shadow": {"decay": 0.999, "num_updates": 3, "shadow_params": trained},
        "list": trained,
        "names": dict(net.state_dict()),
        None: None,
    }[ema]
    if ema is not None:
        kept = {f"{prefix}all_modules.0.W"}
        state = {k: v if k in kept else torch.zeros_like(v) for k, v in state.items()}
    if levels is not None:
        state = {f"{prefix}sigmas": levels.double(), **state}
    torch.save({"optimizer": {"state": {}}, "model": state, "ema": average, "step": 7}, path)
    return path


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_networks(tmp_path, name):
    meta, arrays = golden.read(name)
    network, run = GOLDEN[name]
    low, high = meta["sigma_min"], meta["sigma_max"]
    levels = schedule.geometric(high, low, meta["num_scales"])
    path = written(drawn(network), tmp_path / "checkpoint_24.pth", levels=levels)
    model = ncsn_fast.load(path, run=run, image_size=16)
    x, cond = (torch.from_numpy(arrays[key]) for key in ("x", "cond"))
    with torch.inference_mode():
        if run.startswith("vp"):
            golden.assert_matches(model(x, cond.float()), arrays["output"])
            t = cond.double() / 999
            m, std = VP().mean_scale(t).float(), VP().std(t).float()
            sigma = std / m / 2  # of x in [0, 1]
            inner = (x / m[:, None, None, None] + 1) / 2
            expected = -arrays["output"] / sigma[:, None, None, None].numpy()
            error = (model.score(inner, sigma) - torch.from_numpy(expected)).abs().max()
            assert error <= 1e-4 * abs(expected).max()
        else:
            sigma = cond.float() if "cont" in name or "ffhq" in name else levels[cond.long()]
            golden.assert_matches(model.score(x, sigma), arrays["output"])
    assert model.image_shape == (3, 16, 16)


@pytest.mark.parametrize("name", SCORE_SDE)
def test_every_published_network_is_inferred(name):
    """From its keys and shapes alone, without memory for weights."""
    run = SCORE_SDE[name]
    with torch.device("meta"):
        state = build(run.network).state_dict()
    found = score_sde.layout(state)
    assert found.fits(run)
    for key, value in found.settings.items():
        assert getattr(run.network, key) == value
    assert found.resolutions(run.network.image_size) == run.network.attn_resolutions
    others = [other for other, it in SCORE_SDE.items() if found.fits(it)]
    assert all(SCORE_SDE[other].network.shape == run.network.shape for other in others)


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("ve/cifar10_ncsnpp", "cifar10_ncsnpp"),
        ("vp/cifar10_ncsnpp", "vp_cifar10_ncsnpp"),
        ("vp/cifar10_ddpmpp_continuous", "vp_cifar10_ddpmpp_continuous"),
        ("subvp/cifar10_ddpmpp_continuous", "subvp_cifar10_ddpmpp_continuous"),
        ("subvp/cifar10_ncsnpp_continuous", "subvp_cifar10_ncsnpp_continuous"),
        ("ve/church_ncsnpp_continuous", "church_ncsnpp_continuous"),
        ("downloads", "cifar10_ncsnpp_continuous"),
        ("downloads", "celeba_ncsnpp"),
    ],
)
def test_the_published_folders_tell_the_sde(tmp_path, folder, name, caplog):
    run = SCORE_SDE[name]
    with torch.device("meta"):
        state = build(run.network).state_dict()
    path = tmp_path / folder / "checkpoint_8.pth"
    with caplog.at_level(logging.INFO):
        config = score_sde.infer_config(state, {}, path)
    assert config == run.config()
    assert f"are those of {name}, which has this network" in caplog.text


@pytest.mark.parametrize(("largest", "name"), [(380.0, "church"), (348.0, "celebahq_256")])
def test_the_levels_in_a_file_tell_the_data(tmp_path, largest, name, caplog):
    with torch.device("meta"):
        state = build(SCORE_SDE["church_ncsnpp_continuous"].network).state_dict()
    state["sigmas"] = schedule.geometric(largest, 0.01, 2000)
    with caplog.at_level(logging.INFO):
        config = score_sde.infer_config(state, {}, tmp_path / "x.pth")
    assert config.sigma_begin == pytest.approx(largest)
    state["sigmas"] = schedule.geometric(largest, 0.02, 50)
    config = score_sde.infer_config(state, {}, tmp_path / "x.pth")
    assert (config.n_sigmas, config.sigma_end) == (50, pytest.approx(0.02))
    assert f"those of {name}_ncsnpp_continuous, which" in caplog.text


@pytest.mark.parametrize("ema", ["shadow", "list", "names", None])
@pytest.mark.parametrize("prefix", ["module.", ""])
def test_forms_of_the_average(tmp_path, ema, prefix, caplog):
    net = drawn(NCSNppConfig(**TINY))
    path = written(net, tmp_path / "x.pth", ema=ema, prefix=prefix)
    with caplog.at_level(logging.INFO):
        model = ncsn_fast.load(path)
    for key, value in net.state_dict().items():
        assert torch.equal(model.net.state_dict()[key], value)
    assert ("averaged" if ema else "raw") + " weights" in caplog.text
    raw = ncsn_fast.load(path, weights="raw").net.state_dict()
    assert torch.equal(raw["all_modules.0.W"], net.state_dict()["all_modules.0.W"])
    assert bool(raw["all_modules.3.weight"].any()) is (ema is None)


def test_what_can_be_given(tmp_path, caplog):
    path = written(drawn(NCSNppConfig(**TINY)), tmp_path / "x.pth")
    with caplog.at_level(logging.INFO):
        model = ncsn_fast.load(path)
    assert "cifar10_ncsnpp_continuous, whose network is the nearest" in caplog.text
    assert model.image_shape == (3, 32, 32)  # attention at 16, as in all published networks
    model = ncsn_fast.load(path, image_size=(8, 8), sigma_begin=9, n_sigmas=5)
    assert model.image_shape == (3, 8, 8)
    assert torch.equal(model.sigmas, schedule.geometric(9.0, 0.01, 5))
    assert ncsn_fast.load(path, run="church_ncsnpp_continuous").config.sigma_begin == 380
    for bad, said in (
        ({"run": "cifar"}, "run must be one of cifar10_ncsnpp, "),
        ({"image_size": (8, 16)}, "square images"),
        ({"image_size": 10}, "multiple of 4"),
        ({"image_size": "x"}, "must be an integer"),
        ({"ngf": 3}, "the file says what ngf is; n_sigmas"),
    ):
        with pytest.raises(CheckpointError, match=rf"x\.pth.*{said}"):
            ncsn_fast.load(path, **bad)


def change(state, ema, kind):
    key = "module.all_modules.4.Conv_0.weight"
    if kind == "short list":
        ema.pop()
    elif kind == "other order":
        ema.reverse()
    elif kind == "no tensor":
        ema[3] = 5
    elif kind == "repeated":
        ema[5] = torch.zeros(1).expand(ema[5].shape)
    elif kind == "shape":
        state[key] = state[key][:, :3]
    elif kind == "flat":
        state[key] = state[key].flatten()
    elif kind == "missing module":
        for name in [name for name in state if name.startswith("module.all_modules.5.")]:
            del state[name]
    elif kind == "unknown module":
        state["module.all_modules.99.fc"] = torch.ones(2)
    elif kind == "more":
        state["module.head"] = torch.ones(2)
    elif kind == "nothing":
        for name in list(state):
            if "all_modules.3." not in name:
                del state[name]
    elif kind == "levels":
        state["module.sigmas"] = torch.tensor([1.0, 2.0])


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("short list", r"its ema entry has 215 tensors, and its model 217 parameters, 1 of them"),
        ("other order", r"not in the order of its model's parameters: .* weights='raw'"),
        ("no tensor", "its ema entry is not a state dict of tensors: see"),
        ("repeated", "is not a plain dense tensor"),
        ("shape", r"shape|no multiples"),
        ("flat", "x.pth"),
        ("missing module", "make no U-Net|missing"),
        ("unknown module", "all_modules.99 is no module of its networks: fc"),
        ("more", "its model 218 parameters"),
        ("nothing", "no convolution or no blocks"),
        ("levels", "sigmas must be descending"),
    ],
)
def test_files_that_do_not_fit(tmp_path, kind, said):
    path = written(drawn(NCSNppConfig(**TINY)), tmp_path / "x.pth", ema="list")
    contents = torch.load(path, weights_only=True)
    change(contents["model"], contents["ema"], kind)
    torch.save(contents, path)
    with pytest.raises(CheckpointError, match=said) as raised:
        ncsn_fast.load(path)
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_convert(tmp_path, capsys):
    path = written(drawn(NCSNppConfig(**TINY)), tmp_path / "x.pth")
    out = tmp_path / "out"
    assert convert.main([str(path), str(out), "--image-size", "16", "--sigma-begin", "5"]) == 0
    assert "model.safetensors" in capsys.readouterr().out
    model = ncsn_fast.load(out)
    assert model.image_shape == (3, 16, 16)
    assert float(model.sigmas[0]) == 5
    given = ncsn_fast.load(path, image_size=16, sigma_begin=5.0)
    assert model.digest() == given.digest()
