"""Feature extractors for FID, KID and inception scores, with the SHA-256 of their weights.

Figures of two extractors cannot be compared, so each carries the extractor's name and the hash of
its weights. None is ever downloaded.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ncsn_fast.checkpoints.safetensors_file import read_safetensors
from ncsn_fast.checkpoints.shipped import ASSETS
from ncsn_fast.checkpoints.torch_file import CheckpointError, check_tensors, read_torch
from ncsn_fast.models.inception import FEATURES as INCEPTION_FEATURES
from ncsn_fast.models.inception import FIDInception
from ncsn_fast.models.shapes import shapes_only
from ncsn_fast.names import suggestion

DIGIT_FEATURES = ASSETS / "digit_features" / "model.safetensors"
MNIST_FEATURES = ASSETS / "mnist_features" / "model.safetensors"
AT_ONCE = 16  # images per batch: at 299 x 299, each needs about 15 MB
WEIGHTS, TORCHSCRIPT = (".safetensors", ".pth"), (".pt", ".ts", ".torchscript")


class DigitNet(nn.Module):
    """Digit classifier: images (N, C, H, W) in [0, 1] -> 32 features, 10 logits.

    Images are converted to grey and resized to the size of its training digits
    (tools/train_features.py). Features are scaled to a mean square of 1 on those.

    Args:
        size: of an image, a multiple of 4.   widths: channels of the two convolutions.
        pool: after each of them, of squares of 2x2.
    """

    def __init__(
        self,
        size: int = 16,
        widths: tuple[int, int] = (16, 32),
        pool: Callable[..., Tensor] = F.avg_pool2d,
    ) -> None:
        super().__init__()
        self.size, self.pool = (size, size), pool
        self.conv1 = nn.Conv2d(1, widths[0], 3, padding=1)
        self.conv2 = nn.Conv2d(*widths, 3, padding=1)
        self.features = nn.Linear(widths[1] * (size // 4) ** 2, 32)
        self.classes = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.mean(dim=1, keepdim=True)
        if x.shape[-2:] != self.size:
            x = F.interpolate(x, self.size, mode="bilinear", antialias=True)
        x = self.pool(F.elu(self.conv1(x)), 2)
        x = self.pool(F.elu(self.conv2(x)), 2)
        features = F.leaky_relu(self.features(x.flatten(1)), 0.1)
        return features, self.classes(features)


class Classifier(NamedTuple):
    """Classifier of digits that ships: its weights, and the settings of its network."""

    file: Path
    size: int
    widths: tuple[int, int]
    pool: Callable[..., Tensor]

    def network(self) -> DigitNet:
        """Returns the network, with random weights."""
        return DigitNet(self.size, self.widths, self.pool)


CLASSIFIERS = {
    "digits": Classifier(DIGIT_FEATURES, 16, (16, 32), F.avg_pool2d),
    "mnist": Classifier(MNIST_FEATURES, 28, (20, 40), F.max_pool2d),
}


class UserFunction(nn.Module):
    """A user's function: uint8 images (N, 3, H, W) -> features (N, F), or (features, logits).

    Calls raise ValueError where it fails.
    """

    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, images: Tensor) -> tuple[Any, Any]:
        try:
            found = self.function(images)
        except Exception as error:  # it may raise anything
            reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
            raise ValueError(
                f"the extractor failed on uint8 images {tuple(images.shape)}: {reason}"
            ) from error
        return found if isinstance(found, tuple) and len(found) == 2 else (found, None)


class Extractor(nn.Module):
    """A feature extractor with the identity of its weights.

    Attributes:
        place: a scalar on the device of the weights.
        name: digits, mnist, inception, or MODULE:NAME of a function.
        sha256: of the file that holds the weights, or the function.
        num_features: number of features F.   classes: number of logits; 0 if it has none.
        inception: whether features can be Inception's, so that distances may be called FID.
    """

    place: Tensor

    def __init__(self, network: nn.Module, name: str, sha256: str) -> None:
        super().__init__()
        self.network, self.name, self.sha256 = network.eval().requires_grad_(False), name, sha256
        self.register_buffer("place", torch.zeros(()))
        features, logits = self(torch.zeros(2, 3, 32, 32, dtype=torch.uint8))
        self.num_features = features.shape[1]
        self.inception = self.num_features == INCEPTION_FEATURES
        self.classes = 0 if logits is None else logits.shape[1]

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Returns features (N, F) and logits (N, K) or None, float32, of uint8 (N, 1 or 3, H, W).

        Grey images are repeated in three channels.
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
            raise ValueError(
                f"an extractor takes uint8 images (N, 1 or 3, H, W); got {images.dtype} "
                f"{tuple(images.shape)}"
            )
        n, _, height, width = images.shape
        images = images.to(self.place.device).expand(n, 3, height, width).contiguous()
        levels = isinstance(self.network, UserFunction)
        with torch.no_grad():
            parts = [
                self._checked(self.network(part if levels else part.float() / 255), len(part))
                for part in images.split(AT_ONCE)
            ]
        features, logits = zip(*parts, strict=True)
        return torch.cat(features), None if logits[0] is None else torch.cat(logits)

    def _checked(self, found: tuple[Any, Any], n: int) -> tuple[Tensor, Tensor | None]:
        features, logits = found
        for what, x in (("features", features), ("logits", logits)):
            if what == "logits" and x is None:
                continue
            if not isinstance(x, Tensor) or x.ndim != 2 or len(x) != n:
                got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
                raise ValueError(f"extractor {self.name}: {what} must be ({n}, ...); got {got}")
            if not bool(torch.isfinite(x).all()):
                raise ValueError(f"extractor {self.name}: {what} hold NaN or infinite values")
        return features.float(), None if logits is None else logits.float()

    def describe(self) -> dict[str, Any]:
        """Returns the facts to state with every figure, for JSON."""
        return {"name": self.name, "sha256": self.sha256, "features": self.num_features}


def load_extractor(source: str | Path) -> Extractor:
    """Loads the extractor `digits` or `mnist`, or the FID's Inception network from a file.

    Neither holds code.

    Raises:
        CheckpointError: an unreadable file, or weights that do not fit, with the keys that differ.
    """
    if known := CLASSIFIERS.get(str(source)):
        network = _with_weights(known.network(), known.file)
        return Extractor(network, str(source), sha256(known.file))
    path = Path(source).expanduser()
    if path.suffix in WEIGHTS and path.is_file():
        with shapes_only():
            network = FIDInception()
        return Extractor(_with_weights(network, path), "inception", sha256(path))
    what = "must end so" if path.is_file() else "does not exist"
    code = " (a TorchScript file is code, and is not read: let a function load it)"
    raise CheckpointError(
        f"extractor {path} {what}{suggestion(str(source), CLASSIFIERS)}: it is "
        f"{' or '.join(CLASSIFIERS)}, weights of the FID's Inception network "
        f"({', '.join(WEIGHTS)}), or MODULE:NAME, a function of yours"
        f"{code if path.suffix in TORCHSCRIPT else ''}"
    )


def function_extractor(name: str, function: Callable[[Tensor], Any]) -> Extractor:
    """The extractor that a Python function is.

    Args:
        name: MODULE:NAME; its SHA-256 is that of the module's file.
        function: uint8 images (N, 3, H, W) on the device of the call -> features (N, F), or
            (features, logits (N, K)).

    Raises:
        ValueError: it fails, or gives something else.
    """
    file = getattr(sys.modules.get(name.partition(":")[0]), "__file__", None)
    return Extractor(UserFunction(function), name, sha256(Path(file)) if file else "")


def sha256(path: Path) -> str:
    """Returns the SHA-256 of a file, hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _with_weights(network: nn.Module, path: Path) -> nn.Module:
    """Loads a file's weights into a network, checking every key and shape."""
    if path.suffix == ".pth":
        state = check_tensors(read_torch(path), str(path))
    else:
        state, _ = read_safetensors(path)
    # Files made before torch 0.4.1 lack these counters, which matter in training only.
    counters = {k for k in network.state_dict() if k.endswith("num_batches_tracked")}
    expected = {k: v.shape for k, v in network.state_dict().items() if k not in counters}
    found = {k: v.shape for k, v in state.items() if not k.endswith("num_batches_tracked")}
    wrong = [
        *(f"missing {key}" for key in sorted(expected.keys() - found.keys())),
        *(f"unexpected {key}" for key in sorted(found.keys() - expected.keys())),
        *(
            f"{key} of shape {tuple(shape)} instead of {tuple(expected[key])}"
            for key, shape in sorted(found.items())
            if shape != expected.get(key, shape)
        ),
    ]
    if wrong:
        more = f" and {len(wrong) - 6} more" if len(wrong) > 6 else ""
        raise CheckpointError(f"{path} does not fit: {'; '.join(wrong[:6])}{more}")
    ready = {k: state[k].to(torch.float32).contiguous() for k in expected}
    ready |= {k: torch.tensor(0) for k in counters}
    network.load_state_dict(ready, assign=True)
    return network
