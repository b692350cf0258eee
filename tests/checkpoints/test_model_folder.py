"""Model folders, run folders, and files that are not what they claim to be."""

import copy
import hashlib
import json
import os
import pickle
import shutil
import stat
import tracemalloc
import zipfile
from pathlib import Path

import pytest
import safetensors.torch
import tiny
import torch
import unets
from killing import killed_at_each_call

import ncsn_fast
from ncsn_fast import CheckpointError, ScoreModel
from ncsn_fast.checkpoints import model_folder, torch_file, training_run
from ncsn_fast.checkpoints.model_folder import CONFIG_NAME, WEIGHTS_NAME
from ncsn_fast.data import files
from ncsn_fast.diffusion.parameterisation import DiscreteVP
from ncsn_fast.training.journal import Journal
from ncsn_fast.training.trainer import Trainer

X = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def same_weights(a: ScoreModel, b: ScoreModel) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


@pytest.mark.parametrize("arch", ["ncsnv2", "ncsn"])
def test_model_folder_round_trip(tmp_path, arch):
    model = tiny.model(arch=arch, langevin_form="paper", scale_input=False)
    folder = model.save_pretrained(tmp_path / "deep" / "model")
    for loaded in (ScoreModel.from_pretrained(folder), ncsn_fast.load(str(folder))):
        assert loaded.config == model.config
        assert same_weights(loaded, model)
        assert not loaded.training
        assert all(p.requires_grad for p in loaded.parameters())
        assert torch.equal(loaded.score_at(X, 1), model.score_at(X, 1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_folder_of_low_precision_loads_as_float32(tmp_path, dtype):
    model = tiny.model()
    loaded = ncsn_fast.load(model_folder.save_model(model, tmp_path, dtype=dtype))
    assert torch.equal(loaded.sigmas, model.sigmas)
    rounded = {k: v.to(dtype).float() for k, v in model.net.state_dict().items()}
    assert all(torch.equal(v, rounded[k]) for k, v in loaded.net.state_dict().items())


def test_load_takes_models_and_files_of_a_folder(tiny_folder):
    model = tiny.model()
    assert ncsn_fast.load(model) is model
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        assert same_weights(ncsn_fast.load(tiny_folder / name), model)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"n_sigmas": 5}, "n_sigmas is 5, but the weights have sigmas of shape"),
        ({"n_sigmas": 10**15}, "n_sigmas is 1000000000000000"),
        ({"ngf": 6}, r"begin_conv.* has shape \(4.*\); expected \(6"),
        ({"ngf": 10**4}, "expected"),  # much memory: refused before anything is allocated
        ({"arch": "ncsnv2_deeper", "image_size": [8, 8]}, "missing net.refine5.*and .* more"),
        ({"arch": "vgg"}, "arch must be one of"),
        ({"colour": 1}, "unknown model config fields: colour"),
        ({"ngf": "4"}, "'ngf' must be int; got '4'"),
        ({"epsilon": float("nan")}, "the number NaN is not finite"),
        ({"epsilon": -1.0}, "epsilon must be positive"),
        ({"image_size": [9, 9]}, "image_size must be multiples of 2 for ncsnv2; got 9x9"),
        ({"image_size": 8}, "image_size"),
        ({"sigma_end": 7.0}, "sigma_end <= sigma_begin"),
        ({"sigma_begin": 90.0}, "says 90 to 0"),
    ],
)
def test_config_that_does_not_fit(tiny_folder, change, text):
    path = tiny_folder / CONFIG_NAME
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(CheckpointError, match=text):
        ncsn_fast.load(tiny_folder)


@pytest.mark.parametrize("content", [b"", b"[1]", b"{", b"\xff\xfe\x00", b"[" * 100_000])
def test_config_that_is_no_object(tiny_folder, content):
    (tiny_folder / CONFIG_NAME).write_bytes(content)
    with pytest.raises(CheckpointError, match=CONFIG_NAME):
        ncsn_fast.load(tiny_folder)


BAD_WEIGHTS = {
    "missing": (lambda s: s.pop("net.begin_conv.bias"), "missing net.begin_conv.bias"),
    "extra": (lambda s: s.update(bonus=torch.ones(1)), "unexpected bonus"),
    "shape": (lambda s: s.update({"net.end_conv.bias": torch.ones(2)}), r"shape \(2,\); expected"),
    "type": (lambda s: s.update({"net.end_conv.bias": torch.ones(1).int()}), "type torch.int32"),
    "nan": (lambda s: s["net.end_conv.weight"][0, 0].fill_(torch.nan), "end_conv.weight holds NaN"),
    "inf": (lambda s: s["net.end_conv.bias"].fill_(torch.inf), "end_conv.bias holds NaN or inf"),
    "no sigmas": (lambda s: s.pop("sigmas"), "the weights have no sigmas"),
    "rising": (lambda s: s.update(sigmas=s["sigmas"].flip(0)), "descending; got sigmas.0.=0.01"),
    "negative": (lambda s: s["sigmas"].neg_(), "sigmas must be positive"),
    "zero": (lambda s: s["sigmas"][3:].zero_(), "sigmas must be positive"),
}


@pytest.mark.parametrize("kind", BAD_WEIGHTS)
def test_weights_that_do_not_fit(tiny_folder, kind):
    damage, text = BAD_WEIGHTS[kind]
    path = tiny_folder / WEIGHTS_NAME
    state = {k: v.clone() for k, v in safetensors.torch.load_file(path).items()}
    damage(state)
    safetensors.torch.save_file(state, path)
    with pytest.raises(CheckpointError, match=text):
        ncsn_fast.load(tiny_folder)


@pytest.mark.parametrize("keep", [0, 7, 100, 0.5, 0.999])
def test_truncated_weights(tiny_folder, keep):
    path = tiny_folder / WEIGHTS_NAME
    content = path.read_bytes()
    path.write_bytes(content[: keep if isinstance(keep, int) else int(keep * len(content))])
    with pytest.raises(CheckpointError, match="is the file complete"):
        ncsn_fast.load(tiny_folder)


def test_sources_that_are_no_model(tmp_path, tiny_folder):
    (tiny_folder / WEIGHTS_NAME).unlink()
    with pytest.raises(CheckpointError, match="not a complete model folder"):
        ncsn_fast.load(tiny_folder)
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text(tiny.train_config(snapshot_every=70).to_json())
    with pytest.raises(CheckpointError, match="no checkpoint yet: it saves every 70 steps"):
        ncsn_fast.load(run)
    with pytest.raises(CheckpointError, match="does not exist; a model is"):
        ncsn_fast.load(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"neither a run .* nor a model folder"):
        ncsn_fast.load(tmp_path / "empty")
    with pytest.raises(CheckpointError, match="carries its own configuration"):
        ncsn_fast.load(tiny_folder, epsilon=1e-5)
    with pytest.raises(ValueError, match="'ema' or 'raw'"):
        ncsn_fast.load(tiny_folder, weights="best")


class Evil:
    """A pickle that makes a folder when it is read."""

    def __init__(self, trace):
        self.trace = str(trace)

    def __reduce__(self):
        return os.mkdir, (self.trace,)


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
def test_code_in_a_pickle_is_not_run(tmp_path, form):
    path, trace = tmp_path / "evil.pth", tmp_path / "trace"
    contents = [{"module.begin_conv.weight": torch.ones(4, 3, 3, 3)}, Evil(trace)]
    if form == "pickle":
        path.write_bytes(pickle.dumps(contents))
    else:
        torch.save(contents, path, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(CheckpointError, match=r"could run code: refused\. Re-save"):
        ncsn_fast.load(path)
    assert not trace.exists()
    torch.load(path, weights_only=False) if form != "pickle" else pickle.loads(path.read_bytes())
    assert trace.exists()  # the file was armed


def test_a_few_numbers_cannot_ask_for_much_memory(tmp_path):
    path = tmp_path / "bomb.pth"
    huge = torch.ones(1).expand(10**7, 3, 3, 3)
    torch.save([{"module.begin_conv.weight": huge, "module.sigmas": torch.ones(1)}, {}], path)
    with pytest.raises(CheckpointError, match="not a plain dense tensor"):
        ncsn_fast.load(path)


def test_a_record_that_inflates_is_refused_before_it_does(tmp_path):
    path, bomb = tmp_path / "small.pth", tmp_path / "bomb.pth"
    torch.save([{"module.sigmas": torch.ones(4)}, {}], path)
    with zipfile.ZipFile(path) as records, zipfile.ZipFile(bomb, "w") as archive:
        for info in records.infolist():
            data = records.read(info)
            if info.filename.endswith("data/0"):
                archive.writestr(info.filename, bytes(2**24), zipfile.ZIP_DEFLATED)
            else:
                archive.writestr(info.filename, data)
    assert bomb.stat().st_size < 2**16
    tracemalloc.start()
    with pytest.raises(CheckpointError, match=r"records are compressed, which torch\.save"):
        ncsn_fast.load(bomb)
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


def test_records_that_share_bytes_are_refused(tmp_path):
    """One record under many names would make a small file take any amount of memory."""
    path = tmp_path / "small.pth"
    torch.save([{"module.sigmas": torch.ones(1000)}, {}], path)
    with zipfile.ZipFile(path, "a") as archive:
        entry = next(info for info in archive.infolist() if info.filename.endswith("data/0"))
        for i in range(50):
            again = copy.copy(entry)
            again.filename = f"{entry.filename}{i}"
            archive.filelist.append(again)
        archive._didModify = True  # writes the directory anew
    with pytest.raises(CheckpointError, match="claim more bytes than the file has"):
        ncsn_fast.load(path)


class Zeros:
    """A pickle of a hundred bytes that asks for a gigabyte of zeros."""

    def __reduce__(self):
        return bytearray, (2**30,)


@pytest.mark.parametrize("contents", [Zeros(), [Zeros(), {}], {"x": b"text"}])
@pytest.mark.parametrize("new", [True, False])
def test_a_pickle_cannot_ask_for_memory_or_time(tmp_path, contents, new):
    path = tmp_path / "zeros.pth"
    torch.save(contents, path, _use_new_zipfile_serialization=new)
    assert path.stat().st_size < 2000
    tracemalloc.start()
    with pytest.raises(CheckpointError, match="it holds bytes, which no state dict does"):
        ncsn_fast.load(path)
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


def test_pipes_are_not_waited_for(tmp_path, tiny_folder):
    for path in (tiny_folder / CONFIG_NAME, tiny_folder / WEIGHTS_NAME):
        content = path.read_bytes()
        path.unlink()
        os.mkfifo(path)
        with pytest.raises(CheckpointError, match=rf"{path.name} is a pipe or device, not a file"):
            ncsn_fast.load(tiny_folder)
        path.unlink()
        path.write_bytes(content)
    with pytest.raises(CheckpointError, match="null is a pipe or device, not a file"):
        torch_file.read_torch(Path("/dev/null"))


def test_a_long_header_is_refused(tiny_folder):
    path = tiny_folder / WEIGHTS_NAME
    path.write_bytes((2**25).to_bytes(8, "little") + bytes(2**25))
    with pytest.raises(CheckpointError, match=r"header .* declares 33,554,432 bytes"):
        ncsn_fast.load(tiny_folder)


@pytest.mark.parametrize(("change", "text"), [
    ({"image_size": [65536, 65536]}, "image_size 65536x65536 declares 65,536 pixels, and at most"),
    ({"ngf": 10**18}, "channels 1, ngf 1000000000000000000 declares 1,000,000,000,000,000,000 ch"),
    ({"channels": 2**62}, r"channels 4611686018427387904, ngf \d+ declares"),
    ({"n_steps_each": 10**7}, "n_steps_each 10000000 declares 40,000,000 steps, and at most"),
    ({"n_steps_each": -1}, "n_steps_each must be an integer from 0 on; got -1"),
    ({"ngf": 0}, "ngf must be an integer from 1 on; got 0"),
    ({"epsilon": 10**30}, "the integer 10{19}... has more than 64 bits"),
    ({"epsilon": float("inf")}, "the number Infinity is not finite"),
])  # fmt: skip
def test_configs_that_ask_for_much(tiny_folder, change, text):
    path = tiny_folder / CONFIG_NAME
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(CheckpointError, match=f"cannot use .*{CONFIG_NAME}: .*{text}"):
        ncsn_fast.load(tiny_folder)


def test_limits_can_be_raised(tiny_folder, monkeypatch):
    path = tiny_folder / CONFIG_NAME
    path.write_text(json.dumps({**json.loads(path.read_text()), "n_steps_each": 10**6}))
    monkeypatch.setenv("NCSN_FAST_MAX_STEPS", "4000000")
    assert ncsn_fast.load(tiny_folder).config.n_steps_each == 10**6


@pytest.mark.parametrize("size", [(64,), 64, [64, 64], (64.0, 64), (True, 64)])
def test_image_sizes_that_are_none(size):
    with pytest.raises(ValueError, match=r"image_size must be \(height, width\); got"):
        ncsn_fast.ModelConfig(image_size=size)
    with pytest.raises(ValueError, match=r"image_size must be positive; got \(0, 8\)"):
        ncsn_fast.ModelConfig(image_size=(0, 8))


def test_config_speaks_of_its_weights(tiny_folder, tmp_path):
    other = tiny.model(seed=1).save_pretrained(tmp_path / "other")
    mine = json.loads((tiny_folder / CONFIG_NAME).read_text())
    weights = (tiny_folder / WEIGHTS_NAME).read_bytes()
    assert mine[model_folder.DIGEST] == hashlib.sha256(weights).hexdigest()
    (tiny_folder / WEIGHTS_NAME).write_bytes((other / WEIGHTS_NAME).read_bytes())
    with pytest.raises(CheckpointError, match=r"config.json is not of the weights in .* Write it"):
        ncsn_fast.load(tiny_folder)
    del mine[model_folder.DIGEST]  # as folders were written before
    (tiny_folder / CONFIG_NAME).write_text(json.dumps(mine))
    assert same_weights(ncsn_fast.load(tiny_folder), tiny.model(seed=1))


def test_a_kill_at_any_call_never_mixes_two_models(tiny_folder):
    old, new = tiny.model(), tiny.model(seed=1, epsilon=7e-5)
    models, seen = {"old": old, "new": new}, []
    for _ in killed_at_each_call(lambda: new.save_pretrained(tiny_folder), tiny_folder):
        try:
            found = ncsn_fast.load(tiny_folder)
        except CheckpointError as error:
            seen.append("refused" if "is not of the weights in" in str(error) else str(error))
        else:
            same = [k for k, m in models.items() if m.config == found.config]
            seen += [k for k in same if same_weights(found, models[k])] or ["mixed"]
        old.save_pretrained(tiny_folder)
        assert {p.name for p in tiny_folder.iterdir()} == {CONFIG_NAME, WEIGHTS_NAME}
    assert seen == sorted(seen, key=["old", "refused", "new"].index)
    assert seen.count("refused") == 1
    assert seen.count("old") > 8
    assert ncsn_fast.load(tiny_folder).config == new.config


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run folder with checkpoints of steps 1 and 2, and its trainer."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    config = tiny.train_config(ema=0.5)
    trainer = Trainer(config, tiny.model().config, torch.device("cpu"))
    journal = Journal(folder, config)
    for _ in range(2):
        trainer.train_step(torch.randint(256, (8, 1, 8, 8), dtype=torch.uint8))
        journal.save(trainer)
    journal.close()
    return folder, trainer


@pytest.fixture
def run(trained, tmp_path):
    """A copy of it, for tests that change it."""
    folder, trainer = trained
    return shutil.copytree(folder, tmp_path / "run"), trainer


def test_run_folder(run):
    folder, trainer = run
    assert training_run.read_run(folder).step == 2
    assert same_weights(ncsn_fast.load(folder), trainer.averaged())
    raw = ncsn_fast.load(folder, weights="raw")
    assert same_weights(raw, trainer.model)
    assert not same_weights(raw, trainer.averaged())
    newest = training_run.checkpoint_paths(folder)[-1]
    assert same_weights(ncsn_fast.load(newest), trainer.averaged())


def test_newest_run(run, tmp_path):
    folder, _ = run
    older = shutil.copytree(folder, tmp_path / "older")
    for path in training_run.checkpoint_paths(older):
        os.utime(path, (1, 1))
    (tmp_path / "empty").mkdir()
    assert training_run.newest_run(tmp_path) == folder
    assert training_run.newest_run(tmp_path / "nowhere") is None


def test_damaged_newest_checkpoint_names_the_one_before(run):
    folder, _ = run
    older, newest = training_run.checkpoint_paths(folder)
    newest.write_bytes(newest.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match=f"{newest.name} .*complete.*from {older.name}"):
        ncsn_fast.load(folder)
    newest.unlink()
    assert training_run.read_run(folder).step == 1


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (lambda c: c.pop("optimizer"), "not a checkpoint of ncsn_fast.train"),
        (lambda c: c.update(step="2"), "not a checkpoint of ncsn_fast.train"),
        (lambda c: c.update(step=-5), "step must be a number from 0 on; got -5"),
        (lambda c: c.update(step=True), "step must be a number from 0 on; got True"),
        (lambda c: c.update(n_images="x"), "n_images must be a number from 0 on; got 'x'"),
        (lambda c: c.update(train_config="null"), "train_config: expected a JSON object; got None"),
        (lambda c: c.update(train_config="["), "train_config"),
        (
            lambda c: c.update(model_config=c["model_config"].replace("5e-05", "1e400")),
            "the number 1e400 is not finite",
        ),
        (
            lambda c: c["optimizer"]["state"][0].update(exp_avg=torch.ones(1).expand(10**12)),
            "optimizer entry is not of plain dense tensors",
        ),
        (lambda c: c.update(model={"a": 1}), "not a state dict"),
        (lambda c: c.update(model_config="{"), "cannot use"),
        (lambda c: c["ema"]["sigmas"].fill_(torch.nan), "holds NaN"),
    ],
)
def test_foreign_run_checkpoint(run, damage, text):
    path = training_run.checkpoint_paths(run[0])[-1]
    contents = torch.load(path, weights_only=True)
    damage(contents)
    torch.save(contents, path)
    with pytest.raises(CheckpointError, match=text):
        ncsn_fast.load(run[0])


def test_full_disk_keeps_the_old_model(tiny_folder, full_disk):
    before = {path.name: path.read_bytes() for path in tiny_folder.iterdir()}
    with (
        full_disk(1000),
        pytest.raises(OSError, match=rf"cannot write .*{WEIGHTS_NAME}.*make room"),
    ):
        tiny.model(seed=1).save_pretrained(tiny_folder)
    assert {path.name: path.read_bytes() for path in tiny_folder.iterdir()} == before


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_atomic_write_leaves_the_old_file(tmp_path, error):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(type(error)), files.atomic_write(path) as temporary:  # noqa: PT012
        temporary.write_text("half")
        raise error
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_atomic_write_makes_an_ordinary_file(tmp_path):
    path = tmp_path / "new" / "file"
    with files.atomic_write(path) as temporary:
        temporary.write_text("new")
        inode = temporary.stat().st_ino
    assert path.read_text() == "new"
    assert path.stat().st_ino == inode  # renamed, not copied: never half there
    assert list(path.parent.iterdir()) == [path]
    usual = path.with_name("usual")
    usual.touch()
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(usual.stat().st_mode)
    for target in (path / "below", path.parent):
        with pytest.raises(OSError, match="cannot write"), files.atomic_write(target):
            pass


def test_a_subclass_is_refused_as_it_would_not_load(tmp_path):
    class Doubled(ncsn_fast.ScoreModel):
        def forward(self, x, condition=None):
            return 2 * super().forward(x, condition)

    model = Doubled(tiny.model().config)
    with pytest.raises(TypeError, match=r"what Doubled adds; save its state_dict\(\)"):
        model.save_pretrained(tmp_path / "model")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("steps", [10**12, -1, 1.5, "many"])
def test_a_chain_of_any_length_is_not_computed(tmp_path, steps):
    folder = unets.model("ddpm").save_pretrained(tmp_path / "unet")
    process = DiscreteVP(50)
    options = {"predicts": "epsilon", "sees": "timestep", "process": process}
    net = torch.nn.Bilinear(1, 1, 1)
    net.forward = lambda x, c: x
    wrapped = ncsn_fast.wrap(net, image_shape=(1, 4, 4), **options)
    for place, own in ((folder, None), (wrapped.save_pretrained(tmp_path / "wrapped"), net)):
        described = place / CONFIG_NAME
        values = json.loads(described.read_text())
        values["parameterisation"]["process"]["n"] = steps
        described.write_text(json.dumps(values))
        with pytest.raises(CheckpointError, match=r"a discrete chain declares|steps of a chain"):
            ncsn_fast.load(place, net=own)
