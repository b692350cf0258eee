"""Folders of diffusers: what the network predicts, against the package's own schedulers."""

import copy
import json
import logging

import golden
import pytest
import torch

import ncsn_fast
from ncsn_fast import CheckpointError, Sampler, convert

diffusers = pytest.importorskip("diffusers")

NETWORK = {
    "sample_size": 16, "in_channels": 3, "out_channels": 3, "block_out_channels": (32, 32),
    "layers_per_block": 1, "norm_eps": 1e-6,
}  # fmt: skip
# As in google/ncsnpp-*.
NCSNPP = {
    "time_embedding_type": "fourier", "center_input_sample": True, "norm_num_groups": None,
    "attention_head_dim": None, "mid_block_scale_factor": 2**0.5, "downsample_padding": 1,
    "down_block_types": ("SkipDownBlock2D", "AttnSkipDownBlock2D"),
    "up_block_types": ("AttnSkipUpBlock2D", "SkipUpBlock2D"),
}  # fmt: skip
DDPM = {
    "norm_num_groups": 8, "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}  # fmt: skip
X = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def nets():
    """The two networks, with weights that nothing of is zero."""
    made = {}
    for name, more in (("ncsnpp", NCSNPP), ("ddpm", DDPM)):
        torch.manual_seed(0)
        made[name] = diffusers.UNet2DModel(**{**NETWORK, **more}).eval()
        for p in made[name].parameters():
            p.data += 0.02 * torch.randn_like(p)
    return made


def written(folder, net, scheduler, *, at="unet", safe=True):
    """A pipeline's folder."""
    net.save_pretrained(folder / at, safe_serialization=safe)
    scheduler.save_pretrained(folder / ("scheduler" if at else ""))
    return folder


def close(actual, expected):
    golden.assert_matches(actual.detach(), expected.detach().numpy())


def as_labels(kind):
    scheduler = diffusers.DDPMScheduler
    if kind == "cosine":
        return scheduler(beta_schedule="squaredcos_cap_v2", prediction_type="epsilon")
    if kind == "ddim":
        return diffusers.DDIMScheduler(beta_schedule="scaled_linear", prediction_type="sample")
    if kind == "euler":
        return diffusers.EulerDiscreteScheduler(prediction_type="v_prediction")
    return scheduler(prediction_type="v_prediction" if kind == "v" else "epsilon")


@pytest.mark.parametrize("at", ["unet", ""], ids=["pipeline", "bare"])
@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
def test_score_of_ve(tmp_path, nets, at, safe, caplog):
    scheduler = diffusers.ScoreSdeVeScheduler(sigma_max=348.0)
    net = nets["ncsnpp"]
    with caplog.at_level(logging.INFO):
        model = ncsn_fast.load(written(tmp_path, net, scheduler, at=at, safe=safe))
    assert "predicts score, after" in caplog.text
    sigma = torch.tensor([0.05, 20.0])
    with torch.inference_mode():
        close(model.score(X, sigma), net(X, sigma).sample)
    assert float(model.sigmas[0]) == pytest.approx(348)
    assert float(model.sigmas[-1]) == pytest.approx(0.01)
    assert model.image_shape == (3, 16, 16)
    if at:  # the folder of the network, beside that of the scheduler
        assert ncsn_fast.load(tmp_path / "unet").digest() == model.digest()


@pytest.mark.parametrize("kind", ["linear", "cosine", "v", "ddim", "euler"])
def test_score_of_ddpm(tmp_path, nets, kind):
    scheduler, net = as_labels(kind), nets["ddpm"]
    model = ncsn_fast.load(written(tmp_path, net, scheduler))
    step = torch.tensor([10, 700])
    a = scheduler.alphas_cumprod[step].view(-1, 1, 1, 1)
    sigma = ((1 - a) / a).sqrt()
    u = a.sqrt() * (2 * X - 1)  # a state of the chain
    with torch.inference_mode():
        out = net(u, step).sample
        predicted = scheduler.config.prediction_type
        if predicted == "epsilon":
            noise = out
        elif predicted == "sample":
            noise = (u - a.sqrt() * out) / (1 - a).sqrt()
        else:
            noise = a.sqrt() * out + (1 - a).sqrt() * u
        # In [0, 1] the noise is half as large, and the score twice.
        found = model.score(X, sigma.flatten() / 2) * sigma / 2
        error = (found + noise).abs().max() / noise.abs().max()
    assert error < 2e-4  # of the timestep, which is found from sigma
    assert len(model.sigmas) >= 100


def test_score_of_edm(tmp_path, nets):
    scheduler, net = diffusers.EDMEulerScheduler(sigma_data=0.6, sigma_max=40.0), nets["ddpm"]
    model = ncsn_fast.load(written(tmp_path, net, scheduler))
    sigma = torch.tensor([0.05, 20.0])
    u, each = 2 * X - 1, sigma.view(-1, 1, 1, 1)
    with torch.inference_mode():
        inner = scheduler.precondition_inputs(u, each)
        out = net(inner, scheduler.precondition_noise(sigma)).sample
        denoised = scheduler.precondition_outputs(u, out, each)
        close(2 * model.denoise(X, sigma / 2) - 1, denoised)
    assert float(model.sigmas[0]) == pytest.approx(20)


def test_classes_and_whole_timesteps(tmp_path):
    """Of tables; the last class may be that of none, which guidance needs."""
    torch.manual_seed(0)
    net = diffusers.UNet2DModel(
        **{**NETWORK, **DDPM}, num_class_embeds=4, time_embedding_type="learned",
        num_train_timesteps=1000,
    ).eval()  # fmt: skip
    folder = written(tmp_path, net, diffusers.DDPMScheduler())
    model = ncsn_fast.load(folder)
    assert (model.n_classes, model.config.no_class) == (4, False)
    step, labels = torch.tensor([700, 10]), torch.tensor([3, 1])
    sigma = torch.from_numpy(model.parameterisation.process.sigmas)[step].float().view(-1, 1, 1, 1)
    with torch.inference_mode():
        expected = net((2 * X - 1) / (1 + sigma**2).sqrt(), step, labels).sample
        found = -model.score(X, sigma.flatten() / 2, labels) * sigma / 2
    close(found, expected)
    guided = ncsn_fast.load(folder, n_classes=3)
    assert (guided.n_classes, guided.config.no_class) == (3, True)
    images = Sampler(guided, engine="eager").sample(
        2, labels=[0, 2], guidance=2.0, method="euler", steps=2, progress=False
    )
    assert images.isfinite().all()
    with pytest.raises(CheckpointError, match="n_classes must be at most 4, its num_class_embeds"):
        ncsn_fast.load(folder, n_classes=5)
    out = guided.save_pretrained(tmp_path / "out")
    assert ncsn_fast.load(out).digest() == guided.digest()


def test_names_of_older_versions(tmp_path, nets):
    net = nets["ncsnpp"]
    folder = written(tmp_path, net, diffusers.ScoreSdeVeScheduler(), safe=False)
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = {}
    for key, value in net.state_dict().items():
        for new, old in names.items():
            key = key.replace(f".{new}.", f".{old}.")
        state[key] = value
    assert sum(".query." in key for key in state) > 0
    path = folder / "unet" / "diffusion_pytorch_model.bin"
    torch.save(state, path)
    with torch.inference_mode():
        close(ncsn_fast.load(folder).score(X, 1.0), net(X, torch.tensor(1.0)).sample)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, nets):
    made = tmp_path_factory.mktemp("pipeline")
    return written(made, nets["ncsnpp"], diffusers.ScoreSdeVeScheduler(sigma_max=50.0))


def test_sampling_is_the_same_in_every_process(folder):
    model, again = ncsn_fast.load(folder), ncsn_fast.load(folder)
    assert model.digest() == again.digest()
    sampler = Sampler(model, engine="eager", device="cpu")
    images = sampler.sample(1, method="euler", steps=2, progress=False)
    assert images.shape == (1, 3, 16, 16)


def test_what_can_be_given(folder):
    model = ncsn_fast.load(folder, image_size=8, sigma_begin=9, n_sigmas=5, epsilon=1e-4)
    assert model.image_shape == (3, 8, 8)
    assert (len(model.sigmas), float(model.sigmas[0])) == (5, 9)
    with pytest.raises(CheckpointError, match=r"files say what ngf is; image_size, n_classes, s"):
        ncsn_fast.load(folder, ngf=3)


def test_convert_gives_a_folder_that_builds_the_network(tmp_path, folder, capsys):
    out = tmp_path / "out"
    assert convert.main([str(folder), str(out), "--sigma-begin", "20"]) == 0
    assert "model.safetensors" in capsys.readouterr().out
    model, given = ncsn_fast.load(out), ncsn_fast.load(folder, sigma_begin=20.0)
    assert torch.equal(model.score(X, 0.3), given.score(X, 0.3))
    assert model.digest() == given.digest()
    assert ncsn_fast.load(out).digest() == model.digest()


def change(folder, place, **values):
    path = folder / place
    found = json.loads(path.read_text())
    for name, value in values.items():
        if value is KeyError:
            del found[name]
        else:
            found[name] = value
    path.write_text(json.dumps(found))


UNET, SCHEDULER = "unet/config.json", "scheduler/scheduler_config.json"
REFUSED = {
    "conditional": (UNET, {"_class_name": "UNet2DConditionModel"}, "not 'UNet2DConditionModel'"),
    "classes": (UNET, {"class_embed_type": "identity"}, "class_embed_type 'identity' are not read"),
    "no number": (UNET, {"num_class_embeds": "ten"}, "num_class_embeds must be a positive integer"),
    "table": (UNET, {"num_class_embeds": 10}, "missing class_embedding.weight"),
    "widths": (UNET, {"block_out_channels": "wide"}, "must be positive integers"),
    "no widths": (UNET, {"block_out_channels": []}, "must be positive integers"),
    "wide": (UNET, {"block_out_channels": [16, 10**9]}, "block_out_channels declares"),
    "layers": (UNET, {"layers_per_block": 10**6}, "are more than the .* tensors of its file"),
    "blocks": (UNET, {"down_block_types": ["Evil", "Evil"]}, "Evil"),
    "no size": (UNET, {"sample_size": None}, "its sample_size is None; give image_size"),
    "size": (UNET, {"sample_size": 10**9}, "sample_size .* declares"),
    "other": (UNET, {"layers_per_block": 2}, "do not fit network 'UNet2DModel': missing"),
    "channels": (UNET, {"in_channels": 1, "out_channels": 1}, r"has shape .* expected"),
    "scheduler": (SCHEDULER, {"_class_name": "LCMUniverse"}, "'LCMUniverse' is not known"),
    "sigma": (SCHEDULER, {"sigma_max": "high"}, "cannot use"),
    "flow": (SCHEDULER, {"beta_schedule": "linear", "_class_name": "X",
                         "prediction_type": "flow"}, "prediction_type must be one of"),
    "betas": (SCHEDULER, {"beta_schedule": "sigmoid", "_class_name": "X"}, "must be one of linear"),
    "own betas": (SCHEDULER, {"beta_schedule": "linear", "_class_name": "X",
                              "trained_betas": [0.1]}, "betas of its own"),
    "long": (SCHEDULER, {"beta_schedule": "linear", "_class_name": "X",
                         "num_train_timesteps": 10**12}, "a discrete chain declares"),
    "edm": (SCHEDULER, {"_class_name": "EDMEulerScheduler",
                        "prediction_type": "v_prediction"}, "must be 'epsilon'"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_refusals(tmp_path, nets, kind):
    place, values, said = REFUSED[kind]
    made = written(tmp_path, nets["ncsnpp"], diffusers.ScoreSdeVeScheduler())
    change(made, place, **values)
    with pytest.raises(CheckpointError, match=said) as raised:
        ncsn_fast.load(made)
    assert str(tmp_path) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_missing_files(tmp_path, nets):
    made = written(tmp_path, nets["ncsnpp"], diffusers.ScoreSdeVeScheduler())
    (made / SCHEDULER).unlink()
    with pytest.raises(CheckpointError, match=r"holds no scheduler/scheduler_config\.json, which"):
        ncsn_fast.load(made)
    diffusers.ScoreSdeVeScheduler().save_pretrained(made)
    assert ncsn_fast.load(made).image_shape == (3, 16, 16)
    (made / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="unet holds neither diffusion_pytorch_model"):
        ncsn_fast.load(made)


def test_without_the_package_the_extra_is_named(folder, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "diffusers", None)
    with pytest.raises(CheckpointError, match=r"pip install 'ncsn_fast\[diffusers\]'"):
        ncsn_fast.load(folder)


def test_a_copy_of_the_model_is_its_own(folder):
    model = copy.deepcopy(ncsn_fast.load(folder))
    with torch.inference_mode():
        assert torch.isfinite(model.score(X, 1.0)).all()
