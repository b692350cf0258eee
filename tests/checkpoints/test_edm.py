"""Models of EDM's files: the golden networks, written as the authors write them."""

import logging

import edm_files
import golden
import numpy as np
import pytest
import torch

import ncsn_fast
from ncsn_fast import CheckpointError, convert
from ncsn_fast.models.score import ScoreModel
from ncsn_fast.models.unet_config import edm_config

NAMES = ["edm_ncsnpp_ve_16", "edm_ddpmpp_vp_16", "edm_adm_cond_edm_16", "edm_adm_iddpm_16"]


def written(name, path, **more):
    """A golden network as a file of the authors."""
    meta, _ = golden.read(name)
    config = edm_config(meta["precond"], meta["kwargs"])
    with torch.device("meta"):
        net = ScoreModel(config).net
    state = {f"model.{k}": edm_files.weight(f"model.{k}", tuple(v.shape))
             for k, v in net.state_dict().items()}  # fmt: skip
    state |= {k: edm_files.resampling_filter(meta) for k in state if k.endswith("resample_filter")}
    if meta["precond"] == "iDDPMPrecond":
        state = {"u": torch.ones(1001), **state}
    network = edm_files.tree(meta["precond"], {**meta["kwargs"], **more}, state)
    path.write_bytes(edm_files.dumps({"ema": network}))
    return path


def denoised(model, arrays):
    """D(x, sigma) in the authors' range, where data are in [-1, 1]."""
    x, sigma = (torch.from_numpy(arrays[key]) for key in ("x", "sigma"))
    with torch.inference_mode():
        labels = None
        if "class_labels" in arrays:
            labels = torch.from_numpy(arrays["class_labels"]).argmax(1)
        return 2 * model.denoise((x + 1) / 2, sigma.float() / 2, labels) - 1


def test_a_golden_file():
    model = ncsn_fast.load(golden.FOLDER / "edm_tiny_vp.pkl")
    _, arrays = golden.read("edm_tiny_vp")
    golden.assert_matches(denoised(model, arrays), arrays["output"])
    assert model.image_shape == (3, 16, 16)


@pytest.mark.parametrize("name", NAMES)
def test_golden_networks(tmp_path, name):
    meta, arrays = golden.read(name)
    model = ncsn_fast.load(written(name, tmp_path / "net.pkl", use_fp16=True))
    error = np.abs(denoised(model, arrays).numpy() - arrays["output"]).max()
    # c_noise of VP is in float32 there: a unit in its last place moves the output by 2e-5.
    bound = 3e-5 if meta["precond"] == "VPPrecond" else golden.TOLERANCE
    assert error <= bound * np.abs(arrays["output"]).max()
    assert model.n_classes == meta["kwargs"].get("label_dim", 0)


def test_the_least_and_the_largest_sigma(tmp_path):
    """The wrapper's range in [-1, 1], within what the sampler of the paper takes."""
    ends = {}
    for name in NAMES:
        model = ncsn_fast.load(written(name, tmp_path / "net.pkl"))
        ends[name] = (2 * model.config.sigma_end, 2 * model.config.sigma_begin)
    assert ends["edm_ncsnpp_ve_16"] == pytest.approx((0.02, 100))
    assert ends["edm_ddpmpp_vp_16"] == pytest.approx((0.0010005, 152.166977), rel=1e-4)
    assert ends["edm_adm_cond_edm_16"] == pytest.approx((0.002, 80))
    assert ends["edm_adm_iddpm_16"] == pytest.approx((0.00642234, 20291.17), rel=1e-3)


def test_what_can_be_given(tmp_path, caplog):
    path = written("edm_ncsnpp_ve_16", tmp_path / "net.pkl")
    with caplog.at_level(logging.INFO):
        model = ncsn_fast.load(path, n_sigmas=7, sigma_begin=20, n_steps_each=2)
    assert "songunet of EDM with VEPrecond" in caplog.text
    assert len(model.sigmas) == 7
    assert float(model.sigmas[0]) == 20
    assert model.config.epsilon != ncsn_fast.load(path).config.epsilon
    assert ncsn_fast.load(path, epsilon=1e-3).config.epsilon == 1e-3
    for bad, said in (
        ({"image_size": (8, 8)}, r"net\.pkl: the file says what image_size is; n_sigmas"),
        ({"sigma_begin": "x"}, r"net\.pkl: sigma_begin must be a positive number"),
    ):
        with pytest.raises(CheckpointError, match=said):
            ncsn_fast.load(path, **bad)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model_type": "Unknown"}, "model_type must be one of SongUNet, DhariwalUNet"),
        ({"img_channels": "3"}, "img_channels must be an integer"),
        ({"colour": 1}, "unknown settings of songunet: colour"),
        ({"num_blocks": 10**9}, "declares"),
        ({"model_channels": 10**9}, "declares"),
        ({"img_resolution": 2**40}, "declares"),
        ({"channel_mult": [1] * 10**4}, "multiple of|declares"),
        ({"model_channels": 32}, r"shape .* expected"),
        ({"num_blocks": 2}, "do not fit network 'songunet': missing"),
        ({"encoder_type": "standard"}, "do not fit network 'songunet': unexpected"),
    ],
)
def test_constructor_arguments_that_do_not_fit(tmp_path, change, said):
    path = written("edm_ncsnpp_ve_16", tmp_path / "net.pkl", **change)
    with pytest.raises(CheckpointError, match=said) as raised:
        ncsn_fast.load(path)
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("steps", "said"),
    [
        (10**12, "a discrete chain declares"),
        (1000.5, "must be an integer"),
        (1, "from 2 on; got 1"),
    ],
)
def test_chains_of_any_length_are_not_computed(tmp_path, steps, said):
    path = written("edm_adm_iddpm_16", tmp_path / "net.pkl", M=steps)
    with pytest.raises(CheckpointError, match=said):
        ncsn_fast.load(path)


def test_another_wrapper(tmp_path):
    state = {"model.x.weight": torch.ones(1)}
    (tmp_path / "x.pkl").write_bytes(edm_files.dumps(edm_files.tree("StyleGAN", {}, state)))
    with pytest.raises(CheckpointError, match=r"wrapper of EDM is one of .* got 'StyleGAN'"):
        ncsn_fast.load(tmp_path / "x.pkl")


def test_convert(tmp_path, capsys):
    path = written("edm_adm_cond_edm_16", tmp_path / "net.pkl")
    assert convert.main([str(path), str(tmp_path / "out")]) == 0
    assert "model.safetensors" in capsys.readouterr().out
    _, arrays = golden.read("edm_adm_cond_edm_16")
    golden.assert_matches(denoised(ncsn_fast.load(tmp_path / "out"), arrays), arrays["output"])
