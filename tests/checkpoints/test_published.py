"""The authors' checkpoint files: what is read from them, and what is refused."""

import logging
import zipfile

import golden
import pytest
import safetensors.torch
import tiny
import torch
import unets
from golden import FOLDER

import ncsn_fast
from ncsn_fast import CheckpointError, convert
from ncsn_fast.checkpoints.sampling_settings import with_sampling_settings
from ncsn_fast.diffusion import schedule
from ncsn_fast.models.published_runs import PUBLISHED_RUNS
from ncsn_fast.training.configs import CONFIGS

X = torch.rand(2, 1, 16, 16, generator=torch.Generator().manual_seed(0))


def output(model, meta):
    shape = (meta["batch"], meta["channels"], meta["image_size"], meta["image_size"])
    x = golden.uniform(meta["input_seed"], *shape)
    with torch.inference_mode():
        return model.score_at(x, torch.tensor(meta["labels"]))


@pytest.mark.parametrize("name", ["ncsnv2_original", "ncsn_original"])
def test_golden(name):
    meta, arrays = golden.read(name)
    golden.assert_matches(output(ncsn_fast.load(FOLDER / f"{name}.pth"), meta), arrays["output"])


def test_raw_weights_are_the_other_ones():
    path = FOLDER / "ncsnv2_original.pth"
    saved = torch.load(path, weights_only=True)
    raw, averaged = ncsn_fast.load(path, weights="raw"), ncsn_fast.load(path)
    assert torch.equal(raw.net.begin_conv.weight, saved[0]["module.begin_conv.weight"])
    assert torch.equal(averaged.net.begin_conv.weight, saved[4]["begin_conv.weight"])
    assert not torch.equal(raw.net.begin_conv.weight, averaged.net.begin_conv.weight)
    assert torch.equal(averaged.sigmas, saved[0]["module.sigmas"])


@pytest.mark.parametrize("name", ["ncsnv2_original", "ncsn_original"])
def test_convert(tmp_path, capsys, name):
    meta, arrays = golden.read(name)
    size = ["--image-size", str(meta["image_size"])]
    assert convert.main([str(FOLDER / f"{name}.pth"), str(tmp_path / "out"), *size]) == 0
    assert "model.safetensors" in capsys.readouterr().out
    model = ncsn_fast.load(tmp_path / "out")
    assert model.image_shape == (meta["channels"], meta["image_size"], meta["image_size"])
    golden.assert_matches(output(model, meta), arrays["output"])


def published(model, *, ema=None, legacy=False, path):
    """Writes `model` as the authors would have."""
    state = {f"module.{k}": v for k, v in model.net.state_dict().items()}
    if not model.conditional:
        state["module.sigmas"] = model.sigmas
    entries = [state, torch.optim.Adam(model.parameters()).state_dict()]
    if ema is not None:
        entries += [3, 1234, dict(ema.net.named_parameters())]
    torch.save(entries, path, _use_new_zipfile_serialization=not legacy)
    return path


@pytest.mark.parametrize("norm", ["InstanceNorm++", "InstanceNorm", "VarianceNorm", "BatchNorm"])
def test_norm_is_inferred(tmp_path, norm):
    model, ema = tiny.model(norm=norm), tiny.model(seed=1, norm=norm)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.fill_(0.3)  # only the raw entry holds buffers
    loaded = ncsn_fast.load(published(model, ema=ema, path=tmp_path / "x.pth"))
    assert loaded.config.norm == norm
    expected = model.net.state_dict() | dict(ema.net.named_parameters())
    assert all(torch.equal(v, expected[k]) for k, v in loaded.net.state_dict().items())


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("arch", sorted(golden.ARCHS.values()))
def test_architecture_is_inferred(tmp_path, arch, legacy):
    model = tiny.model(arch=arch, image_size=(16, 16), n_sigmas=3, sigma_begin=1.0)
    loaded = ncsn_fast.load(published(model, legacy=legacy, path=tmp_path / "x.pth"))
    found = loaded.config
    assert (found.arch, found.channels, found.ngf, found.n_sigmas) == (arch, 1, 4, 3)
    assert (found.sigma_begin, found.sigma_end) == pytest.approx((1.0, 0.01))
    assert torch.equal(loaded.score_at(X, 1), model.score_at(X, 1))


def test_tables_without_beta(tmp_path):
    model = tiny.model(arch="ncsn")
    path = published(model, path=tmp_path / "x.pth")
    contents = torch.load(path, weights_only=True)
    for key, table in contents[0].items():
        if key.endswith("embed.weight"):
            contents[0][key] = table[:, : table.shape[1] * 2 // 3].clone()
            beta = model.get_parameter(f"net.{key.removeprefix('module.')}").data
            beta[:, beta.shape[1] * 2 // 3 :] = 0
    torch.save(contents, path)
    assert torch.equal(ncsn_fast.load(path).score_at(X, 1), model.score_at(X, 1))


@pytest.mark.parametrize("name", PUBLISHED_RUNS)
def test_settings_of_the_published_runs(name):
    run = CONFIGS[name]
    found = {k: getattr(run, k) for k in ("arch", "channels", "ngf", "n_sigmas", "sigma_begin")}
    settings = with_sampling_settings({**found, "sigma_end": 0.01})
    assert settings["image_size"] == (run.image_size, run.image_size)
    assert (settings["epsilon"], settings["n_steps_each"]) == (run.epsilon, run.n_steps_each)


def test_overrides_win(tmp_path, caplog):
    path = published(tiny.model(), path=tmp_path / "x.pth")
    with caplog.at_level(logging.INFO):
        ncsn_fast.load(path)
        with_sampling_settings(vars(PUBLISHED_RUNS["church"]) | {"sigma_end": 0.01})
    assert "usual ones, because no published ncsnv2 has these noise levels" in caplog.text
    assert "image size 96, 4 Langevin steps, those of the published run church" in caplog.text
    model = ncsn_fast.load(path, image_size=(24, 24), epsilon=3e-6, sigma_begin=9.0, n_sigmas=6)
    assert model.image_shape == (1, 24, 24)
    assert model.config.epsilon == 3e-6
    assert torch.equal(model.sigmas, schedule.geometric(9.0, 0.01, 6))
    ncsn = published(tiny.model(arch="ncsn"), path=tmp_path / "y.pth")
    assert float(ncsn_fast.load(ncsn, sigma_begin=20.0).sigmas[0]) == 20
    for bad in ({"ngf": 8}, {"colour": 1}, {"sigma_begin": "x"}, {"epsilon": -1.0}, {"ngf": None}):
        with pytest.raises(CheckpointError, match=r"x\.pth"):
            ncsn_fast.load(path, **bad)


KEY = "module.end_conv.bias"
DAMAGES = {
    "missing": (lambda c: c[0].pop(KEY), "missing net.end_conv.bias"),
    "extra": (lambda c: c[0].update({"module.fc.weight": torch.ones(1)}), "unexpected net.fc"),
    "a table": (
        lambda c: c[0].update({"module.x.embed.weight": torch.ones(4, 8)}),
        "unexpected net.x.embed.weight",
    ),
    "shape": (lambda c: c[0].update({KEY: torch.ones(5)}), r"\(5,\); expected \(1,\)"),
    "nan": (lambda c: c[0][KEY].fill_(torch.nan), "end_conv.bias holds NaN"),
    "complex": (lambda c: c[0].update({KEY: torch.ones(1) * 1j}), "type torch.complex64"),
    "sparse": (lambda c: c[0].update({KEY: torch.ones(1).to_sparse()}), "not a plain dense"),
    "no tensor": (lambda c: c[0].update({KEY: 3.0}), "not a state dict of tensors: see"),
    "no sigmas": (lambda c: c[0].pop("module.sigmas"), "not an NCSN or NCSNv2 checkpoint"),
    "empty sigmas": (lambda c: c[0].update({"module.sigmas": torch.ones(0)}), "not an NCSN or"),
    "rising": (lambda c: c[0].update({"module.sigmas": torch.arange(1.0, 5)}), "sigma_begin"),
    "uneven": (
        lambda c: c[0].update({"module.sigmas": torch.tensor([5.0, 1.0, 2.0, 0.01])}),
        "descending",
    ),
    "nan sigmas": (lambda c: c[0]["module.sigmas"].fill_(torch.nan), "sigma"),
    "no network": (
        lambda c: c[0].pop("module.begin_conv.weight"),
        r"Nearest is ncsnv2 of NCSN .* missing begin_conv\.weight$",
    ),
    "flat": (lambda c: c[0].update({"module.begin_conv.weight": torch.ones(4)}), "lacks begin"),
    "three entries": (lambda c: c.append(7), "Nearest is ncsnv2 .*: only the container differs"),
    "bad ema": (lambda c: c.extend([1, 2, {}]), "ema entry is not a state dict"),
    "small ema": (lambda c: c.extend([1, 2, {"end_conv.bias": torch.ones(1)}]), "missing"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_refusals(tmp_path, kind):
    path = published(tiny.model(), path=tmp_path / "x.pth")
    contents = torch.load(path, weights_only=True)
    DAMAGES[kind][0](contents)
    torch.save(contents, path)
    with pytest.raises(CheckpointError, match=DAMAGES[kind][1]) as raised:
        ncsn_fast.load(path)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("contents", [{"a": 1}, 3, None, "text", torch.ones(2), []])
def test_foreign_contents(tmp_path, contents):
    torch.save(contents, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=r"not a published checkpoint .* without weights"):
        ncsn_fast.load(tmp_path / "x.pth")


def test_a_foreign_file_is_told_the_nearest_network(tmp_path):
    unet = tiny.model(
        arch="unet_b", image_size=(28, 28), act="swish", norm="GroupNorm", scale_input=False,
        sigma_min=1.0, sigma_max=25.0,
    )  # fmt: skip
    weights = {k: v for k, v in unet.net.state_dict().items() if not k.startswith("embed")}
    torch.save({"step": 3, "model": {**weights, "head.bias": torch.ones(1)}}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError) as raised:
        ncsn_fast.load(tmp_path / "x.pth")
    said = str(raised.value)
    for known in ("NCSN (2019) and NCSNv2 (2020)", "the score-SDE tutorials", "score_sde_pytorch",
                  "EDM's .pkl", "diffusers' UNet2DModel"):  # fmt: skip
        assert known in said
    assert f"Nearest is unet_a of the score-SDE tutorials, with {len(weights)} of its " in said
    assert said.endswith("keys: missing embed.W; unexpected head.bias")
    torch.save({"fc1.weight": torch.ones(2, 2)}, tmp_path / "y.pth")
    with pytest.raises(CheckpointError, match=r"none of its 1 keys \(fc1\.weight, \.\.\.\) is one"):
        ncsn_fast.load(tmp_path / "y.pth")
    few = {"conv1.weight": torch.ones(1), "fc.weight": torch.ones(1)}
    torch.save(few, tmp_path / "z.pth")
    with pytest.raises(CheckpointError, match=r"Or build its network, .* ncsn_fast\.wrap$"):
        ncsn_fast.load(tmp_path / "z.pth")


OTHER_KINDS = {
    "pointer.pth": (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d\nsize 9\n",
                    "is a pointer of Git LFS, not the file itself: run git lfs pull"),
    "pointer.pkl": (b"version https://git-lfs.github.com/spec/v1\n", "a pointer of Git LFS"),
    "page.pkl": (b"<!DOCTYPE html><title>Not found</title>", "is a web page"),
    "page.pth": (b"\n  <html>", "is a web page or another text"),
    "x.npy": (b"\x93NUMPY\x01\x00v\x00", "holds an array of NumPy"),
    "x.onnx": (b"\x08\x09\x12\x07pytorch", r"Sampler\(model, engine='ort', onnx=path\)"),
    "x.safetensors": (b"\x08\x00\x00\x00\x00\x00\x00\x00{}", "is the file complete"),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHER_KINDS)
def test_files_of_other_kinds_are_told_what_they_are(tmp_path, name):
    content, said = OTHER_KINDS[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=said) as raised:
        ncsn_fast.load(tmp_path / name)
    assert str(tmp_path / name) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_torchscript_is_told_to_be_code(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        for name in ("data.pkl", "code/__torch__/net.py", "version"):
            archive.writestr(f"x/{name}", b"")
    with pytest.raises(CheckpointError, match=r"is of TorchScript, .* code .* state_dict\(\)"):
        ncsn_fast.load(tmp_path / "x.pt")


def test_a_state_dict_of_safetensors(tmp_path):
    model = tiny.model()
    state = {f"module.{k}": v.clone() for k, v in model.net.state_dict().items()}
    path = tmp_path / "x.safetensors"
    safetensors.torch.save_file({**state, "module.sigmas": model.sigmas}, path)
    assert torch.equal(ncsn_fast.load(path).score_at(X, 1), model.score_at(X, 1))
    safetensors.torch.save_file({"fc1.weight": torch.ones(2, 2)}, path)
    with pytest.raises(CheckpointError, match=r"is one of theirs: build its network"):
        ncsn_fast.load(path)


@pytest.mark.parametrize("kind", ["EDM", "diffusers"])
def test_weights_of_other_formats(tmp_path, kind):
    if kind == "EDM":
        net = unets.model("edm-ncsnpp").net
        state = {f"model.{key}": value for key, value in net.state_dict().items()}
        said = r"Nearest is edm-cifar10-32x32-uncond-v. of EDM, whose \.pkl is read, with"
    else:
        state = {"conv_in.weight": torch.ones(1), "down_blocks.0.resnets.0": torch.ones(1)}
        said = "its keys are of a network of diffusers: give the folder"
    torch.save(state, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=said):
        ncsn_fast.load(tmp_path / "x.pth")


@pytest.mark.parametrize("arch", ["ncsnv2", "ncsn"])
def test_the_same_networks_in_a_file_of_score_sde(tmp_path, arch):
    """That code base trains them, too, and saves them in its own container."""
    model, ema = tiny.model(arch=arch), tiny.model(arch=arch, seed=1)
    state = {f"module.{key}": value for key, value in model.net.state_dict().items()}
    if arch == "ncsnv2":
        state["module.sigmas"] = model.sigmas
    average = {"decay": 0.999, "num_updates": 3, "shadow_params": list(ema.net.parameters())}
    torch.save({"model": state, "ema": average, "step": 5, "optimizer": {}}, tmp_path / "x.pth")
    loaded = ncsn_fast.load(tmp_path / "x.pth")
    assert torch.equal(loaded.net.begin_conv.weight, ema.net.begin_conv.weight)
    assert torch.equal(loaded.net.end_conv.bias, ema.net.end_conv.bias)


def test_a_bare_state_dict_loads(tmp_path):
    model = tiny.model()
    state = {f"module.{k}": v for k, v in model.net.state_dict().items()}
    torch.save({**state, "module.sigmas": model.sigmas}, tmp_path / "x.pth")
    assert torch.equal(ncsn_fast.load(tmp_path / "x.pth").score_at(X, 1), model.score_at(X, 1))


def test_a_whole_module_is_refused(tmp_path):
    torch.save([torch.nn.Linear(2, 2), {}], tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match="could run code: refused"):
        ncsn_fast.load(tmp_path / "x.pth")


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_damaged_bytes_load_or_are_refused(tmp_path, legacy):
    path = published(tiny.model(), path=tmp_path / "x.pth", legacy=legacy)
    content = path.read_bytes()
    random = torch.Generator().manual_seed(0)
    refused = 0
    for trial in range(60):
        damaged = bytearray(content)
        if trial < 20:
            damaged = damaged[: trial * len(content) // 20]
        else:
            for at in torch.randint(len(content) // 3, (20,), generator=random).tolist():
                damaged[at] ^= 1 << (at % 8)
        path.write_bytes(damaged)
        try:
            ncsn_fast.load(path)
        except CheckpointError as error:
            refused += 1
            assert str(path) in str(error)  # noqa: PT017
            assert "\n" not in str(error)  # noqa: PT017
    assert refused >= 20
