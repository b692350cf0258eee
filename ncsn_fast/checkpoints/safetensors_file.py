"""Files of safetensors, and the SHA-256 that says which file it was."""

from __future__ import annotations

import hashlib
from pathlib import Path

import safetensors.torch
from torch import Tensor

from ncsn_fast.checkpoints.torch_file import CheckpointError
from ncsn_fast.data import limits
from ncsn_fast.data.files import open_regular

_LENGTH_BYTES = 8  # of the header, little-endian, at the start of a file


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], str]:
    """Tensors of a file, and its SHA-256, hexadecimal; CheckpointError for whatever goes wrong."""
    try:
        with open_regular(path, limits.WEIGHTS_BYTES) as file:
            header = int.from_bytes(file.read(_LENGTH_BYTES), "little")
            limits.HEADER_BYTES.check(header, f"the header of {path}")
            file.seek(0)
            content = file.read()
        state = safetensors.torch.load(content)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} does not exist") from error
    except Exception as error:  # damaged bytes make the reader raise nearly anything
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"cannot read {path} ({reason}); is the file complete?") from error
    return state, hashlib.sha256(content).hexdigest()
