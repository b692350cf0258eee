"""The pickles of EDM (Karras et al. 2022), read as data.

Such a file holds modules. A module is the source text of its class, which the authors' loader
executes and this one ignores; the name of the class; the arguments of its constructor; and its
attributes, with parameters, buffers and submodules among them. A tensor's storage is a file of
torch.save, in bytes, which is read as data, too.
"""

from __future__ import annotations

import dataclasses
import io
import math
import mmap
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ncsn_fast.checkpoints.torch_file import CheckpointError
from ncsn_fast.data import limits, pickle_data
from ncsn_fast.data.files import open_regular
from ncsn_fast.data.pickle_data import Instance, Name, PickleError

_TORCH_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # the first pickle of torch.save's files
_MAGIC_NUMBER, _PROTOCOL = 119547037146038801333356, 1001
_DTYPES = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}  # fmt: skip
_DEEPEST = 16  # modules within modules; networks have four
_ORIGINAL = ("img_resolution", "img_channels", "label_dim", "use_fp16")  # order of parameters


@dataclasses.dataclass(frozen=True)
class PickledNetwork:
    """A network of EDM as its file describes it.

    Attributes:
        class_name: of the wrapper, such as EDMPrecond.
        arguments: of its constructor.
        state: its parameters and buffers by name.
    """

    class_name: str
    arguments: dict[str, Any]
    state: dict[str, Tensor]


def is_edm(path: Path) -> bool:
    """Tells whether a file is a bare pickle, not one of torch.save, of EDM by its words or name."""
    try:
        with open_regular(path, limits.WEIGHTS_BYTES) as file:
            start = file.read(2**16)
    except OSError:
        return False
    bare = start[:1] == b"\x80" and not start.startswith(_TORCH_MAGIC)
    return bare and (path.suffix == ".pkl" or b"torch_utils.persistence" in start)


def read_edm(path: Path) -> PickledNetwork:
    """Reads the averaged network of a file, without running code in it.

    Raises:
        CheckpointError: the file is damaged, holds more than such networks do, or another thing.
    """
    try:
        with (
            open_regular(path, limits.WEIGHTS_BYTES) as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,
            warnings.catch_warnings(action="ignore"),  # views of bytes: no one writes to them
        ):
            found = pickle_data.load(content, _BUILDERS)
            return _network(found, len(content))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} does not exist") from error
    except PickleError as error:
        raise CheckpointError(
            f"{path} holds more than a network of EDM, or another thing ({error}), and reading it "
            "could run code: refused. Re-save its state dict with torch.save."
        ) from error
    except Exception as error:  # damaged bytes make the reader raise nearly anything
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(
            f"cannot read {path} as a pickle of EDM ({reason:.200}); is the file complete?"
        ) from error


def _network(found: Any, size: int) -> PickledNetwork:
    network = found.get("ema") if isinstance(found, dict) else found
    if not isinstance(network, Instance) or not isinstance(network.state, dict):
        raise PickleError("it holds no network, alone or as its entry 'ema'")
    state = dict(_tensors(network))
    if sum(tensor.nbytes for tensor in state.values()) > size:
        raise PickleError("its tensors claim more bytes than the file has")
    state = {name: tensor.clone() for name, tensor in state.items()}
    positional = network.state.get("_init_args", ())
    named = network.state.get("_init_kwargs", {})
    if not isinstance(positional, tuple) or not isinstance(named, dict):
        raise PickleError("the arguments of its constructor are no arguments")
    arguments = {**dict(zip(_ORIGINAL, positional, strict=False)), **named}
    odd = [f"{name!r:.40}" for name, value in arguments.items() if not _is_argument(name, value)]
    if odd:
        raise PickleError(f"the argument {odd[0]} of its constructor is no number, text or list")
    return PickledNetwork(network.kind, arguments, state)


def _is_argument(name: Any, value: Any) -> bool:
    simple = (type(None), bool, int, float, str)
    values = value if type(value) in (list, tuple) else [value]
    return isinstance(name, str) and all(type(item) in simple for item in values)


def _tensors(
    module: Any, prefix: str = "", seen: set[int] | None = None
) -> Iterator[tuple[str, Tensor]]:
    """All parameters and buffers of a module, by the names of a state dict."""
    seen = set() if seen is None else seen
    if not isinstance(module, Instance) or not isinstance(module.state, dict):
        raise PickleError(f"its {prefix.rstrip('.') or 'network'} is no module")
    if id(module) in seen or prefix.count(".") > _DEEPEST:
        raise PickleError("its modules hold each other")
    seen.add(id(module))
    skipped = module.state.get("_non_persistent_buffers_set") or ()
    for kind in ("_parameters", "_buffers"):
        for name, value in module.state.get(kind, {}).items():
            if value is not None and name not in skipped:
                if not isinstance(value, Tensor):
                    raise PickleError(f"its {prefix}{name} is no tensor")
                yield f"{prefix}{name}", value
    for name, child in module.state.get("_modules", {}).items():
        if child is not None:
            yield from _tensors(child, f"{prefix}{name}.", seen)


def _persistent_object(described: Any) -> Instance:
    """A module of theirs: the text of its class, described["module_src"], stays unread."""
    if not isinstance(described, dict) or described.get("type") != "class":
        raise PickleError("a module is not described as their code does it")
    return Instance(str(described.get("class_name")), (), described.get("state"))


def _empty_dict(*arguments: Any) -> dict[Any, Any]:
    if arguments:
        raise PickleError("a dict is made from something else")
    return {}


def _scalar(dtype: Any, content: Any) -> Any:
    """A number of NumPy's; its dtype has the state (version, byte order, ...)."""
    code = dtype.arguments[0] if isinstance(dtype, Instance) and dtype.arguments else None
    if not isinstance(code, str) or not re.fullmatch(r"[fiub][1248]", code):
        raise PickleError("a scalar is no number")
    order = dtype.state[1] if isinstance(dtype.state, tuple) and len(dtype.state) > 1 else "|"
    kind = np.dtype(f"{order if order in ('<', '>') else '|'}{code}")
    return np.frombuffer(content, kind, count=1)[0].item()


def _parameter(tensor: Any, *_: Any) -> Tensor:
    if not isinstance(tensor, Tensor):
        raise PickleError("a parameter is no tensor")
    return tensor


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> Tensor:
    """A view of a storage, within its bounds and with each of its elements at most once."""
    numbers = (offset, *size, *stride)
    if not isinstance(storage, Tensor) or any(type(n) is not int or n < 0 for n in numbers):
        raise PickleError("a tensor is not described as torch does it")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if math.prod(size) > storage.numel() or (math.prod(size) and last >= storage.numel()):
        raise PickleError("a tensor is larger than its storage")
    return storage.as_strided(size, stride, offset)


def _storage(content: Any) -> Tensor:
    """The numbers of torch.save's file of one storage, as a vector that shares their bytes."""
    if not isinstance(content, bytes):
        raise PickleError("a storage is not in bytes")
    file = io.BytesIO(content)
    magic, protocol, system = (pickle_data.load(file, {}) for _ in range(3))
    described = pickle_data.load(file, _STORAGES, persistent=lambda found: ("storage", found))
    pickle_data.load(file, {})  # the keys of the storages: one
    if (magic, protocol) != (_MAGIC_NUMBER, _PROTOCOL) or not system.get("little_endian"):
        raise PickleError("a storage is no little-endian file of torch.save")
    _, (kind, name, _, _, numel, view) = described
    if kind != "storage" or not isinstance(name, Name) or view is not None:
        raise PickleError("a storage is not described as torch.save does it")
    dtype = _DTYPES[name.name]
    stored = int.from_bytes(file.read(8), "little")
    if type(numel) is not int or numel != stored:
        raise PickleError(f"a storage has {stored} elements, and is said to have {numel!r:.20}")
    start = file.tell()
    if start + numel * dtype.itemsize != len(content):
        raise PickleError("a storage is longer or shorter than its elements")
    if numel == 0:
        return torch.empty(0, dtype=dtype)
    return torch.frombuffer(content, dtype=dtype, count=numel, offset=start)


_STORAGES = {f"torch.{name}": _empty_dict for name in _DTYPES}
_BUILDERS: dict[str, pickle_data.Builder] = {
    "torch_utils.persistence._reconstruct_persistent_obj": _persistent_object,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor": _tensor,
    "torch.storage._load_from_bytes": _storage,
    **{
        name: pickle_data.instance_of(name)
        for name in (
            "numpy.dtype",
            "torch.nn.modules.container.ModuleDict",
            "torch.nn.modules.container.ModuleList",
            "torch.nn.modules.container.Sequential",
        )
    },
    "numpy.core.multiarray.scalar": _scalar,
    "numpy._core.multiarray.scalar": _scalar,
    "collections.OrderedDict": _empty_dict,
    "dnnlib.util.EasyDict": _empty_dict,
}
