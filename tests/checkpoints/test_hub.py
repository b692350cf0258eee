"""Models of the Hugging Face Hub, from a server on this machine."""

import logging
import shutil
import subprocess
import sys

import hub_server
import pytest
import tiny
from golden import FOLDER

import ncsn_fast
from ncsn_fast import CheckpointError, Sampler, ScoreModel
from ncsn_fast.checkpoints import hub as hub_module
from ncsn_fast.models.tuned_table import TunedTable

pytest.importorskip("huggingface_hub")


@pytest.fixture(scope="module")
def server():
    with hub_server.serve() as hub:
        yield hub


@pytest.fixture
def hub(server, monkeypatch, tmp_path):
    """The server, without repositories, for a process whose cache is empty."""
    server.repos.clear()
    server.gated.clear()
    server.requests.clear()
    hub_server.use(monkeypatch, server.address, tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    return server


@pytest.fixture
def offline(hub, monkeypatch, tmp_path):
    def go() -> None:
        hub_server.use(monkeypatch, hub.address, tmp_path / "cache", offline=True)
        hub.requests.clear()

    return go


def test_a_model_folder(hub, offline, tmp_path, caplog):
    model = tiny.model()
    hub.add("some/model", model.save_pretrained(tmp_path / "model"))
    with caplog.at_level(logging.INFO):
        assert ncsn_fast.load("some/model").digest() == model.digest()
    assert f"some/model: revision {hub.commit('some/model', 'main')} of the Hub" in caplog.text
    assert Sampler("some/model", engine="eager").model.digest() == model.digest()
    assert ScoreModel.from_pretrained("some/model").digest() == model.digest()
    files = [line for line in hub.requests if line.startswith("GET /some/model/resolve")]
    assert len(files) == 2  # each once: the cache has them
    offline()
    assert ncsn_fast.load("some/model").digest() == model.digest()
    assert hub.requests == []
    with pytest.raises(CheckpointError, match=r"^some/other is neither .* HF_HUB_OFFLINE forbids"):
        ncsn_fast.load("some/other")


def test_revisions(hub, offline, tmp_path):
    old, new = tiny.model(seed=1), tiny.model(seed=2)
    hub.add("some/model", old.save_pretrained(tmp_path / "a"), "v1")
    hub.add("some/model", new.save_pretrained(tmp_path / "b"), "main")
    assert ncsn_fast.load("some/model").digest() == new.digest()
    assert ncsn_fast.load("some/model", revision="v1").digest() == old.digest()
    assert ncsn_fast.load("some/model@v1").digest() == old.digest()
    commit = hub.commit("some/model", "v1")
    assert ncsn_fast.load("some/model", revision=commit).digest() == old.digest()
    for bad in ({"revision": "v2"}, {"source": "some/model@v2"}):
        with pytest.raises(CheckpointError, match="has no such revision"):
            ncsn_fast.load(**{"source": "some/model", **bad})
    offline()
    assert ncsn_fast.load("some/model", revision="v1").digest() == old.digest()
    with pytest.raises(ValueError, match="revision is of a name on the Hub, and digits is none"):
        ncsn_fast.load("digits", revision="v1")


def test_a_pipeline_of_diffusers(hub, tmp_path):
    diffusers = pytest.importorskip("diffusers")
    net = diffusers.UNet2DModel(
        sample_size=16, block_out_channels=(32,), layers_per_block=1, norm_num_groups=8,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
    )  # fmt: skip
    folder = tmp_path / "pipeline"
    net.save_pretrained(folder / "unet")
    net.save_pretrained(folder / "unet", safe_serialization=False)
    diffusers.DDPMScheduler().save_pretrained(folder / "scheduler")
    (folder / "README.md").write_text("about")
    hub.add("google/ncsnpp-like", folder)
    model = ncsn_fast.load("google/ncsnpp-like")
    assert model.digest() == ncsn_fast.load(folder).digest()
    got = {line.split("/main/")[-1] for line in hub.requests if line.startswith("GET /google")}
    assert not any("README" in line or ".bin" in line for line in got)  # what is needed, only


def test_one_checkpoint(hub, tmp_path):
    (tmp_path / "files").mkdir()
    shutil.copy(FOLDER / "edm_tiny_vp.pkl", tmp_path / "files" / "edm.pkl")
    hub.add("some/edm", tmp_path / "files")
    assert ncsn_fast.load("some/edm").image_shape == (3, 16, 16)
    shutil.copy(FOLDER / "edm_tiny_vp.pkl", tmp_path / "files" / "other.pkl")
    hub.add("some/two", tmp_path / "files")
    with pytest.raises(
        CheckpointError, match=r"hf_hub_download\('some/two', 'edm\.pkl'\), and load"
    ):
        ncsn_fast.load("some/two")
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "README.md").write_text("nothing")
    hub.add("some/text", tmp_path / "text")
    with pytest.raises(CheckpointError, match=r"is no model that is known \(README\.md\); a model"):
        ncsn_fast.load("some/text")


def test_no_code_of_a_repository_is_run(hub, tmp_path):
    (tmp_path / "evil").mkdir()
    shutil.copy(FOLDER / "edm_malicious.pkl", tmp_path / "evil" / "edm.pkl")
    hub.add("some/evil", tmp_path / "evil")
    with pytest.raises(CheckpointError, match="could run code: refused"):
        ncsn_fast.load("some/evil")
    assert not (tmp_path / "EDM_PWNED").exists()


def test_a_name_that_is_a_path_stays_a_path(hub, tmp_path):
    model = tiny.model()
    model.save_pretrained(tmp_path / "some" / "model")
    hub.add("some/model", tiny.model(seed=5).save_pretrained(tmp_path / "elsewhere"))
    assert ncsn_fast.load("some/model").digest() == model.digest()
    for source in (
        "some/missing",
        "runs.pth",
        "other/x.pth",
        "./other/x",
        "a/b/c",
        "/other/x",
        "x",
    ):
        with pytest.raises(CheckpointError, match="does not exist; a model is a run folder"):
            ncsn_fast.load(source)
    assert hub.requests == []


def test_errors_are_one_line(hub, tmp_path, monkeypatch):
    hub.add("some/gated", tiny.model().save_pretrained(tmp_path / "model"))
    hub.gated.add("some/gated")
    said = {}
    for name in ("some/gated", "some/missing"):
        with pytest.raises(CheckpointError) as raised:
            ncsn_fast.load(name)
        said[name] = str(raised.value)
    assert "some/gated on the Hub is gated: accept its terms" in said["some/gated"]
    assert "some/missing is neither a file or folder here, nor a repository" in said["some/missing"]
    hub_server.use(monkeypatch, "http://127.0.0.1:9", tmp_path / "cache")
    with pytest.raises(CheckpointError) as raised:
        ncsn_fast.load("some/model")
    said["unreachable"] = str(raised.value)
    assert "the Hub cannot be reached (" in said["unreachable"]
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    for call in (lambda: ncsn_fast.load("some/model"), lambda: tiny.model().push_to_hub("a/b")):
        with pytest.raises(CheckpointError, match=r"pip install 'ncsn_fast\[hub\]'") as raised:
            call()
        said[call] = str(raised.value)
    assert not any("\n" in line for line in said.values())


@pytest.mark.parametrize("revision", [None, "v1"])
def test_push(hub, revision):
    model = tiny.model()
    address = model.push_to_hub("me/new", token="hf_writer", revision=revision)
    assert address == f"{hub.address}/me/new"
    files = hub.repos["me/new"][revision or "main"]
    assert {"config.json", "model.safetensors"} <= set(files)
    assert len(hub.uploads) == 1  # the weights, as a large file
    assert ncsn_fast.load("me/new", revision=revision).digest() == model.digest()
    other = tiny.model(seed=3)
    other.push_to_hub("me/new", token="hf_writer", revision=revision)
    assert ncsn_fast.load("me/new", revision=revision).digest() == other.digest()
    hub.uploads.clear()


def test_a_tuned_model(hub, tmp_path):
    """Its table goes with it, and does not stay with the model that takes its place."""
    model = tiny.model()
    model.tuned = TunedTable((5.0, 0.02), (0.5,), (1.0,), 1.0, tuple(model.image_shape))
    model.push_to_hub("me/new", token="hf_writer")
    assert ncsn_fast.load("me/new").tuned == model.tuned
    model.tuned = None
    model.push_to_hub("me/new", token="hf_writer")
    assert "fast_table.json" not in hub.repos["me/new"]["main"]
    assert ncsn_fast.load("me/new").tuned is None


def test_push_without_permission(hub):
    with pytest.raises(CheckpointError, match="does not let you write me/new: log in") as raised:
        tiny.model().push_to_hub("me/new", token="hf_reader")
    assert "\n" not in str(raised.value)
    assert hub.repos == {}


def test_names():
    assert hub_module.is_name("google/ncsnpp-celebahq-256")
    assert hub_module.is_name("google/ncsnpp-celebahq-256@main")
    assert hub_module.is_name("google/ncsnpp@refs/pr/1")
    for path in ("google", "google/a/b", "~/a", "../a", "a/../b", "google/x.pkl", "a b/c", "a/b@"):
        assert not hub_module.is_name(path)


@pytest.mark.slow
def test_the_commands(hub, tmp_path, monkeypatch):
    """Processes of their own, which read the environment."""
    (tmp_path / "model").mkdir()
    shutil.copy(FOLDER / "edm_tiny_vp.pkl", tmp_path / "model" / "edm.pkl")
    hub.add("some/edm", tmp_path / "model")
    monkeypatch.setenv("HF_ENDPOINT", hub.address)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    for command in (
        ["convert", "some/edm", "out", "--n-sigmas", "7"],
        ["sample", "--model", "some/edm", "--method", "euler", "--steps", "2", "--out", "x.png"],
    ):
        subprocess.run([sys.executable, "-m", f"ncsn_fast.{command[0]}", *command[1:]], check=True)
    model = ncsn_fast.load("out")
    assert model.image_shape == (3, 16, 16)
    assert len(model.sigmas) == 7
    assert (tmp_path / "x.png").exists()
