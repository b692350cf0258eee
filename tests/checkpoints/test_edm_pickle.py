"""EDM's pickles: read as data, and never run."""

import copyreg
import pickle
import struct
import tracemalloc

import edm_files
import pytest
import torch
from golden import FOLDER
from torch import nn

from ncsn_fast import CheckpointError
from ncsn_fast.checkpoints.edm_pickle import is_edm, read_edm

STATE = {
    "model.map_layer0.weight": torch.arange(6.0).view(2, 3),
    "model.map_layer0.bias": torch.ones(2),
    "model.enc.16x16_conv.weight": torch.full((2, 3, 1, 1), 0.5),
    "model.enc.16x16_conv.resample_filter": torch.ones(1, 1, 2, 2) / 4,
}
ARGUMENTS = {"img_resolution": 16, "img_channels": 3, "channel_mult": [1, 2], "dropout": 0.1}


def network():
    return edm_files.tree("EDMPrecond", ARGUMENTS, STATE)


def written(path, contents, protocol=4):
    path.write_bytes(edm_files.dumps(contents, protocol))
    return path


def test_a_golden_file():
    found = read_edm(FOLDER / "edm_tiny_vp.pkl")
    assert found.class_name == "VPPrecond"
    assert found.arguments["model_channels"] == 8
    assert found.arguments["channel_mult"] == [1, 1]
    assert len(found.state) == 144
    drawn = {k: v for k, v in found.state.items() if not k.endswith("resample_filter")}
    for key, value in drawn.items():
        assert torch.equal(value, edm_files.weight(key, tuple(value.shape))), key


def test_the_source_text_is_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert read_edm(FOLDER / "edm_source_trap.pkl").class_name == "EDMPrecond"
    assert not (tmp_path / "EDM_PWNED").exists()


def test_a_malicious_file_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=r"\(it names posix\.system\), and reading it could"):
        read_edm(FOLDER / "edm_malicious.pkl")
    assert not (tmp_path / "EDM_PWNED").exists()


@pytest.mark.parametrize("protocol", [4, 5])
def test_all_that_a_snapshot_holds(tmp_path, protocol):
    contents = {
        "ema": network(),
        "loss_fn": edm_files.Persistent("EDMLoss"),
        "augment_pipe": None,
        "dataset_kwargs": edm_files.EasyDict(path="cifar10.zip", use_labels=False, xflip=False),
    }
    path = written(tmp_path / "x.pkl", contents, protocol)
    new, old = b"\x8c\x16numpy._core.multiarray", b"\x8c\x15numpy.core.multiarray"
    assert new in path.read_bytes()
    path.write_bytes(path.read_bytes().replace(new, old))  # the name of 2022
    found = read_edm(path)
    assert (found.class_name, found.arguments) == ("EDMPrecond", ARGUMENTS)
    assert set(found.state) == set(STATE)
    assert all(torch.equal(value, STATE[key]) for key, value in found.state.items())
    found.state["model.map_layer0.bias"].fill_(7)  # memory of its own
    assert torch.equal(read_edm(path).state["model.map_layer0.bias"], torch.ones(2))


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.bool]
)
def test_types_and_views(tmp_path, dtype):
    whole = torch.arange(24).view(4, 6).to(dtype)
    state = {"a.freqs": whole.t(), "b.freqs": whole[1:3, 2:], "c.freqs": whole[:0]}
    path = written(tmp_path / "x.pkl", edm_files.tree("EDMPrecond", {}, state))
    found = read_edm(path).state
    assert all(torch.equal(found[key], value) for key, value in state.items())
    assert all(found[key].dtype == dtype for key in state)


def test_positional_arguments_have_names(tmp_path):
    module = network()
    module._init_args, module._init_kwargs = (32, 3, 10), {"model_type": "SongUNet"}
    found = read_edm(written(tmp_path / "x.pkl", {"ema": module}))
    assert found.arguments == {
        "img_resolution": 32, "img_channels": 3, "label_dim": 10, "model_type": "SongUNet"
    }  # fmt: skip


class Call:
    """A pickle that calls something."""

    def __init__(self, function, *arguments):
        self.reduced = function, arguments

    def __reduce__(self):
        return self.reduced


def with_module(change):
    module = network()
    change(module)
    return {"ema": module}


def holding_each_other(module):
    module.model.enc.__dict__["_modules"]["again"] = module.model.enc


def one_storage_often(module):
    storage = torch.ones(1000)._typed_storage()
    rebuild = torch._utils._rebuild_tensor_v2
    views = {f"x{i}": Call(rebuild, storage, 0, (1000,), (1,), False, {}) for i in range(99)}
    module.__dict__["_buffers"] = views


REFUSED = {
    "eval": ({"ema": network(), "x": Call(eval, "1 + 1")}, "it names builtins.eval"),
    "getattr": (Call(getattr, "x", "upper"), "it names builtins.getattr"),
    "bytearray": (Call(bytearray, 10), "it names builtins.bytearray"),
    "a dict of a list": (Call(edm_files.EasyDict, [(1, 2)]), "a dict is made from something else"),
    "another module": (with_module(lambda m: m.add_module("x", nn.Linear(2, 2))), "linear.Linear"),
    "no network": ({"net": network()}, "holds no network"),
    "a tensor": ({"ema": torch.ones(2)}, "holds no network"),
    "a list": ([network()], "holds no network"),
    "cycle": (with_module(holding_each_other), "its modules hold each other"),
    "an argument": (
        with_module(lambda m: m._init_kwargs.update(dropout=torch.ones(40))),
        "the argument 'dropout' of its constructor is no number, text or list",
    ),
    "a nested argument": (
        with_module(lambda m: m._init_kwargs.update(channel_mult=[[1, [2]]])),
        "the argument 'channel_mult' of its constructor",
    ),
    "an argument's name": (
        with_module(lambda m: m._init_kwargs.update({7: 1})),
        "the argument 7 of its constructor",
    ),
    "no tensor": (with_module(lambda m: m._buffers.update(x=3)), "its x is no tensor"),
    "no module": (with_module(lambda m: m._modules.update(x=3)), "its x is no module"),
    "few numbers": (
        with_module(lambda m: m.register_buffer("x", torch.ones(1).expand(10**9))),
        "a tensor is larger than its storage",
    ),
    "one storage often": (
        with_module(one_storage_often),
        "its tensors claim more bytes than the file has",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_refusals(tmp_path, kind):
    contents, said = REFUSED[kind]
    path = written(tmp_path / "x.pkl", contents)
    with pytest.raises(CheckpointError, match=said) as raised:
        read_edm(path)
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)


EMPTY = pickle.dumps({})[:-1]
RAW = {
    "extension": (b"\x80\x02\x82\x01.", "opcode EXT1"),
    "instance": (b"\x80\x02(iposix\nsystem\n.", "opcode INST"),
    "object": (b"\x80\x02(cposix\nsystem\no.", "it names posix.system"),
    "persistent": (b"\x80\x02K\x01Q.", "opcode BINPERSID"),
    "buffer": (b"\x80\x05\x97.", "opcode NEXT_BUFFER"),
    "bytearray": (b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b".", "expected 1099511627776"),
    "bytes": (b"\x80\x04\x8e" + struct.pack("<Q", 2**40) + b".", "expected 1099511627776"),
    "text": (b"\x80\x04\x8d" + struct.pack("<Q", 2**62) + b".", "expected"),
    "memo": (b"\x80\x04}r\xff\xff\xff\xff.", "holds no network"),
    "state of a name": (b"\x80\x02ccollections\nOrderedDict\n}b.", "changes a Name as a Instance"),
    "called twice": (b"\x80\x02ccollections\nOrderedDict\n)R)R.", "calls something that is no"),
    "two objects": (b"\x80\x02}}.", "do not make one object"),
    "nothing": (b"\x80\x02.", "do not make one object"),
    "cut": (b"\x80\x02}", "is the file complete"),
}


@pytest.mark.parametrize("kind", RAW)
def test_crafted_pickles(tmp_path, kind):
    content, said = RAW[kind]
    path = tmp_path / "x.pkl"
    path.write_bytes(content)
    tracemalloc.start()
    with pytest.raises(CheckpointError, match=said):
        read_edm(path)
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


def test_storages_name_nothing_else(tmp_path):
    """A storage is a pickle in the pickle."""
    content = edm_files.dumps({"ema": network()})
    assert content.count(b"ctorch\nFloatStorage\n") == len(STATE)
    path = tmp_path / "x.pkl"
    for other, said in (
        (b"cposix\nsystemTorage\n", "names posix.systemTorage"),
        (b"ctorch\nFloatStorige\n", "names torch.FloatStorige"),
    ):
        path.write_bytes(content.replace(b"ctorch\nFloatStorage\n", other))
        with pytest.raises(CheckpointError, match=said):
            read_edm(path)


def test_registered_extensions_are_not_looked_up(tmp_path):
    copyreg.add_extension("builtins", "eval", 240)
    try:
        path = tmp_path / "x.pkl"
        path.write_bytes(b"\x80\x02\x82\xf0X\x05\x00\x00\x001 + 1\x85R.")
        with pytest.raises(CheckpointError, match="opcode EXT1"):
            read_edm(path)
    finally:
        copyreg.remove_extension("builtins", "eval", 240)


def test_what_is_taken_for_such_a_file(tmp_path):
    torch.save({"x": torch.ones(1)}, tmp_path / "legacy.pkl", _use_new_zipfile_serialization=False)
    torch.save({"x": torch.ones(1)}, tmp_path / "zip.pkl")
    (tmp_path / "renamed").write_bytes((FOLDER / "edm_tiny_vp.pkl").read_bytes())
    (tmp_path / "x.pth").write_bytes(pickle.dumps({"x": 1}))
    assert is_edm(tmp_path / "renamed")
    assert is_edm(FOLDER / "edm_tiny_vp.pkl")
    others = ("legacy.pkl", "zip.pkl", "x.pth", "nowhere.pkl")
    assert not any(is_edm(tmp_path / name) for name in others)
    with pytest.raises(CheckpointError, match="does not exist"):
        read_edm(tmp_path / "nowhere.pkl")
    (tmp_path / "empty.pkl").touch()
    with pytest.raises(CheckpointError, match=r"empty\.pkl"):
        read_edm(tmp_path / "empty.pkl")
