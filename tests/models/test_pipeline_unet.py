"""Models and pipelines of diffusers, ours for theirs and theirs for us."""

import pytest
import torch
from drawing import tiny

import ncsn_fast
from ncsn_fast import Sampler
from ncsn_fast.models.pipeline_unet import PipelineUNet, betas_of

diffusers = pytest.importorskip("diffusers")

NETWORK = {
    "sample_size": 8, "in_channels": 3, "out_channels": 3, "block_out_channels": (8,),
    "layers_per_block": 1, "norm_num_groups": 4, "down_block_types": ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",),
}  # fmt: skip
U = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    made = diffusers.UNet2DModel(**NETWORK).eval()
    for p in made.parameters():
        p.data += 0.02 * torch.randn_like(p)
    return made


def pipeline_of(net, predicts):
    if predicts == "score":
        scheduler = diffusers.ScoreSdeVeScheduler(sigma_max=50.0)
        return diffusers.ScoreSdeVePipeline(unet=net, scheduler=scheduler)
    scheduler = diffusers.DDPMScheduler(prediction_type=predicts)
    return diffusers.DDPMPipeline(unet=net, scheduler=scheduler)


PREDICTS = ["epsilon", "sample", "v_prediction", "score"]


@pytest.mark.parametrize("predicts", PREDICTS)
def test_a_pipeline_is_a_model(tmp_path, net, predicts):
    pipeline = pipeline_of(net, predicts)
    pipeline.save_pretrained(tmp_path / "pipeline")
    model, read = ncsn_fast.load(pipeline), ncsn_fast.load(tmp_path / "pipeline")
    x = torch.rand(2, 3, 8, 8)
    assert torch.equal(model.score(x, 0.5), read.score(x, 0.5))
    assert next(model.parameters()) is next(net.parameters())
    model.save_pretrained(tmp_path / "ours")
    assert torch.equal(ncsn_fast.load(tmp_path / "ours").score(x, 0.5), model.score(x, 0.5))


@pytest.mark.parametrize("predicts", PREDICTS)
def test_there_and_back_is_the_same_network(net, predicts):
    pipeline = pipeline_of(net, predicts)
    again = PipelineUNet(ncsn_fast.load(pipeline), pipeline.scheduler)
    for t in (3, 500) if predicts != "score" else (0.02, 40.0):
        found, expected = again(U, t).sample, net(U, torch.tensor(t)).sample
        error = (found - expected).abs().max() / expected.abs().max()
        assert error < 1e-3  # the network sees a timestep that is found from sigma
    assert torch.equal(again(U, t, return_dict=False)[0], found)


def test_a_sampler_takes_a_pipeline(net):
    sampler = Sampler(pipeline_of(net, "epsilon"), engine="eager", device="cpu")
    assert sampler.sample(2, method="euler", steps=2, progress=False).shape == (2, 3, 8, 8)
    assert sampler.report.model == "UNet2DModel 3x8x8"


def test_ddim_of_a_pipeline_is_our_euler():
    sampler = Sampler(tiny(), engine="eager", device="cpu")
    scheduler = diffusers.DDIMScheduler(
        trained_betas=betas_of(sampler.model), clip_sample=False, set_alpha_to_one=True
    )
    pipeline = diffusers.DDIMPipeline(unet=PipelineUNet(sampler, scheduler), scheduler=scheduler)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    images = pipeline(2, generator=generator, num_inference_steps=10, output_type="np").images

    kept = scheduler.alphas_cumprod[pipeline.scheduler.timesteps].double()
    u = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    x = (u / float(kept[0]) ** 0.5 + 1) / 2
    sigmas = (((1 - kept) / kept).sqrt() / 2).tolist()
    ours = sampler.sample(2, method="euler", sigmas=sigmas, init=x, progress=False)
    assert (torch.from_numpy(images).permute(0, 3, 1, 2) - ours).abs().max() < 1e-3
    assert ours.std() > 0.05


def test_score_sde_ve_of_a_pipeline_runs():
    model = tiny()
    scheduler = diffusers.ScoreSdeVeScheduler(sigma_max=float(model.sigmas[0]), sigma_min=0.01)
    unet = PipelineUNet(model, scheduler)
    pipeline = diffusers.ScoreSdeVePipeline(unet=unet, scheduler=scheduler)
    pipeline.set_progress_bar_config(disable=True)
    (image,) = pipeline(num_inference_steps=3, output_type="np").images
    assert image.shape == (8, 8, 3)


def test_betas_give_the_levels_of_the_model():
    model = tiny()
    kept = diffusers.DDPMScheduler(trained_betas=betas_of(model, 50)).alphas_cumprod.double()
    levels = ((1 - kept) / kept).sqrt() / 2
    ends = [float(model.sigmas[-1]), float(model.sigmas[0])]
    assert [float(levels[0]), float(levels[-1])] == pytest.approx(ends, rel=1e-3)


def test_what_does_not_fit_is_said(net):
    model = tiny()
    with pytest.raises(ValueError, match="the noise of this scheduler goes to 78"):
        PipelineUNet(model, diffusers.DDPMScheduler())
    with pytest.raises(ValueError, match="scheduler 'EDMEulerScheduler' is not known"):
        PipelineUNet(model, diffusers.EDMEulerScheduler())
    other = diffusers.DDPMScheduler(trained_betas=betas_of(model), prediction_type="flow")
    with pytest.raises(ValueError, match="prediction_type must be one of epsilon"):
        PipelineUNet(model, other)
    half = pipeline_of(diffusers.UNet2DModel(**NETWORK).half(), "epsilon")
    with pytest.raises(ValueError, match=r"parameters must be float32.*call net\.float\(\)"):
        ncsn_fast.load(half)
    with pytest.raises(TypeError, match="makes of a network; got UNet2DModel"):
        ncsn_fast.load(net)
    classes = diffusers.UNet2DModel(**NETWORK, class_embed_type="timestep")
    with pytest.raises(ValueError, match="class_embed_type 'timestep' are not read"):
        ncsn_fast.load(pipeline_of(classes, "epsilon"))
    classes = diffusers.UNet2DModel(**NETWORK, num_class_embeds=3)
    assert ncsn_fast.load(pipeline_of(classes, "epsilon")).n_classes == 3


def test_latent_pipelines_are_refused(net):
    latent = diffusers.LDMPipeline(
        vqvae=diffusers.VQModel(block_out_channels=(32,)), unet=net,
        scheduler=diffusers.DDIMScheduler(),
    )  # fmt: skip
    with pytest.raises(ValueError, match="LDMPipeline has vqvae, too"):
        ncsn_fast.load(latent)
