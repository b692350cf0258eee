"""Feature extractors: the digits', the FID's Inception network, and users' programs."""

import hashlib
import math
from pathlib import Path

import numpy as np
import pytest
import safetensors
import safetensors.torch
import tiny
import torch
from torch import nn

from ncsn_fast.checkpoints.torch_file import CheckpointError
from ncsn_fast.data import datasets
from ncsn_fast.evaluation.evaluator import Evaluator
from ncsn_fast.evaluation.features import (
    AT_ONCE,
    DIGIT_FEATURES,
    MNIST_FEATURES,
    DigitNet,
    function_extractor,
    load_extractor,
)
from ncsn_fast.models import inception
from ncsn_fast.models.inception import FIDInception

IMAGES = torch.randint(
    256, (AT_ONCE + 3, 3, 20, 20), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
)


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    """Random weights of the Inception network, with norms that keep activations alive."""
    torch.manual_seed(0)
    return FIDInception().state_dict()


def test_digits_extractor_is_small_and_names_held_out_digits_as_its_file_says():
    extractor = load_extractor("digits")
    assert DIGIT_FEATURES.stat().st_size < 100_000
    assert extractor.sha256 == hashlib.sha256(DIGIT_FEATURES.read_bytes()).hexdigest()
    assert (extractor.name, extractor.num_features, extractor.classes) == ("digits", 32, 10)
    assert sum(p.numel() for p in DigitNet().parameters()) == 21_546
    images, labels = datasets.digits("held-out", 16)
    right = float((extractor(images)[1].argmax(1) == labels).double().mean())
    with safetensors.safe_open(DIGIT_FEATURES, "pt") as file:
        assert right == pytest.approx(float(file.metadata()["held_out_accuracy"]), abs=1.1 / 360)
    assert right > 0.98


def test_mnists_extractor_is_small_and_names_other_peoples_digits():
    """Those of scikit-learn, in other hands, and 8x8 pixels once."""
    extractor = load_extractor("mnist")
    assert MNIST_FEATURES.stat().st_size < 300_000
    assert (extractor.name, extractor.num_features, extractor.classes) == ("mnist", 32, 10)
    with safetensors.safe_open(MNIST_FEATURES, "pt") as file:
        assert float(file.metadata()["held_out_accuracy"]) >= 0.99
    images, labels = datasets.digits("held-out", 20)
    padded = torch.nn.functional.pad(images, (4, 4, 4, 4))
    assert float((extractor(padded)[1].argmax(1) == labels).double().mean()) > 0.7


def test_digits_extractor_has_features_of_mean_square_one_on_what_it_learnt():
    features, _ = load_extractor("digits")(datasets.digits("train", 16)[0])
    assert float(features.square().mean()) == pytest.approx(1, rel=1e-4)
    assert float(features.std(dim=0).min()) > 0.1  # none is dead


def test_digits_extractor_takes_any_size_and_grey_is_three_equal_channels():
    extractor = load_extractor("digits")
    images, labels = datasets.digits("held-out", 28)
    features, logits = extractor(images)
    assert float((logits.argmax(1) == labels).double().mean()) > 0.95
    torch.testing.assert_close(extractor(images.repeat(1, 3, 1, 1))[0], features)


@pytest.mark.parametrize("images", [torch.zeros(2, 3, 8, 8), torch.zeros(2, 2, 8, 8).byte()])
def test_extractors_take_uint8_grey_or_rgb(images):
    with pytest.raises(ValueError, match=r"uint8 images \(N, 1 or 3, H, W\)"):
        load_extractor("digits")(images)


@pytest.mark.parametrize(("classes", "count"), [(1000, 23_834_568), (1008, 23_850_960)])
def test_inception_has_the_parameters_of_inception_v3(classes, count):
    """torchvision's InceptionV3 without its auxiliary head, and 8 classes more."""
    with torch.device("meta"):
        network = FIDInception(classes)
    assert sum(p.numel() for p in network.parameters()) == count
    assert len(network.state_dict()) == 94 * 6 + 2  # convolutions with their norms, classifier


def test_inception_names_and_shapes_are_the_usual_ones(weights):
    shapes = {
        "Conv2d_1a_3x3.conv.weight": (32, 3, 3, 3), "Conv2d_4a_3x3.bn.running_var": (192,),
        "Mixed_5b.branch_pool.conv.weight": (32, 192, 1, 1),
        "Mixed_5c.branch5x5_2.conv.weight": (64, 48, 5, 5),
        "Mixed_6a.branch3x3dbl_3.conv.weight": (96, 96, 3, 3),
        "Mixed_6c.branch7x7_2.conv.weight": (160, 160, 1, 7),
        "Mixed_6e.branch7x7dbl_2.conv.weight": (192, 192, 7, 1),
        "Mixed_7a.branch7x7x3_4.conv.weight": (192, 192, 3, 3),
        "Mixed_7b.branch3x3_2a.conv.weight": (384, 384, 1, 3),
        "Mixed_7c.branch3x3dbl_3b.conv.weight": (384, 384, 3, 1),
        "fc.weight": (1008, 2048), "fc.bias": (1008,),
    }  # fmt: skip
    assert {key: tuple(weights[key].shape) for key in shapes} == shapes


def test_inception_maps_have_the_published_sizes(weights):
    """35x35x288 before Mixed_6a, 17x17x768 before Mixed_7a, 8x8x2048 at the end."""
    network = FIDInception().eval()
    network.load_state_dict(weights)
    seen: dict[str, tuple[int, ...]] = {}
    for name, module in network.named_children():
        module.register_forward_hook(
            lambda _, inputs, output, name=name: seen.update({name: tuple(output.shape[1:])})
        )
    with torch.no_grad():
        features, logits = network(torch.rand(1, 3, 32, 32))
    assert (features.shape, logits.shape) == ((1, 2048), (1, 1008))
    expected = {
        "Conv2d_1a_3x3": (32, 149, 149), "Conv2d_2a_3x3": (32, 147, 147),
        "Conv2d_2b_3x3": (64, 147, 147), "Conv2d_3b_1x1": (80, 73, 73),
        "Conv2d_4a_3x3": (192, 71, 71), "Mixed_5b": (256, 35, 35), "Mixed_5d": (288, 35, 35),
        "Mixed_6a": (768, 17, 17), "Mixed_6e": (768, 17, 17), "Mixed_7a": (1280, 8, 8),
        "Mixed_7c": (2048, 8, 8),
    }  # fmt: skip
    assert {name: seen[name] for name in expected} == expected


def test_average_pools_of_inception_do_not_count_their_padding():
    x = torch.ones(1, 1, 4, 4)
    assert torch.equal(inception.POOLS["average"](x), x)
    pools = {name: {pool for pool, _ in block} for name, block in inception.MIXED.items()}
    assert pools["Mixed_7b"] == pools["Mixed_5b"] == {"", "average"}
    assert pools["Mixed_7c"] == {"", "maximum"}


def test_inception_sees_images_in_minus_one_to_one(weights):
    """A constant image of 1 reaches the first convolution as 1, one of 0 as -1."""
    network = FIDInception().eval()
    seen = []
    network.Conv2d_1a_3x3.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        network(torch.stack([torch.zeros(3, 8, 8), torch.ones(3, 8, 8)]))
    assert seen[0].shape == (2, 3, 299, 299)
    torch.testing.assert_close(seen[0][0], torch.full((3, 299, 299), -1.0))
    torch.testing.assert_close(seen[0][1], torch.ones(3, 299, 299))


def test_inception_logits_have_no_bias(weights):
    """As the published inception score has them: a change of the bias changes nothing."""
    network = FIDInception().eval()
    network.load_state_dict(weights)
    assert float(weights["fc.bias"].abs().max()) > 0
    with torch.no_grad():
        features, logits = network(IMAGES[:1].float() / 255)
        torch.testing.assert_close(logits, features @ weights["fc.weight"].T)
        network.fc.bias += 100 * torch.randn(1008)
        assert torch.equal(network(IMAGES[:1].float() / 255)[1], logits)


def test_inception_from_files(weights, tmp_path):
    kept = {k: v for k, v in weights.items() if not k.endswith("num_batches_tracked")}  # as usual
    torch.save(kept, tmp_path / "inception.pth")
    safetensors.torch.save_file(kept, tmp_path / "inception.safetensors")
    extractor = load_extractor(tmp_path / "inception.safetensors")
    assert (extractor.name, extractor.num_features, extractor.classes) == ("inception", 2048, 1008)
    assert extractor.inception
    network = FIDInception().eval()
    network.load_state_dict(weights)
    with torch.no_grad():
        features, logits = network(IMAGES[:1].float() / 255)
    found = extractor(IMAGES[:1])
    torch.testing.assert_close(found[0], features)
    torch.testing.assert_close(found[1], logits)
    other = load_extractor(tmp_path / "inception.pth").state_dict()
    assert all(torch.equal(value, other[key]) for key, value in extractor.state_dict().items())


def test_weights_that_do_not_fit_are_named(weights, tmp_path):
    path = tmp_path / "wrong.safetensors"
    wrong = {**weights, "AuxLogits.fc.bias": torch.zeros(3), "fc.bias": torch.zeros(1000)}
    del wrong["Mixed_5b.branch1x1.conv.weight"]
    safetensors.torch.save_file(wrong, path)
    with pytest.raises(CheckpointError) as refused:
        load_extractor(path)
    for words in (
        "missing Mixed_5b.branch1x1.conv.weight", "unexpected AuxLogits.fc.bias",
        "fc.bias of shape (1000,) instead of (1008,)",
    ):  # fmt: skip
        assert words in str(refused.value)


def means(images):
    """Features: the three channel means, of levels in 0 .. 255."""
    return images.float().mean(dim=(2, 3))


def detector(images):
    """Logits, too."""
    return means(images), means(images) / 255


def test_functions():
    plain = function_extractor(f"{__name__}:means", means)
    assert (plain.name, plain.num_features, plain.classes) == (f"{__name__}:means", 3, 0)
    assert not plain.inception
    assert plain.sha256 == hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    torch.testing.assert_close(plain(IMAGES)[0], means(IMAGES))
    assert plain(IMAGES)[1] is None
    both = function_extractor("elsewhere:detector", detector)
    assert (both.classes, both.sha256) == (3, "")
    features, logits = both(IMAGES)
    torch.testing.assert_close(features, means(IMAGES))
    torch.testing.assert_close(logits, means(IMAGES) / 255)


def flat(images):
    """Takes maps as they lie in memory, as many programs do."""
    return images.view(-1).view(images.shape[0], -1).float().mean(dim=1, keepdim=True)


def test_functions_get_grey_images_with_channels_of_their_own():
    grey = IMAGES[:, :1]
    found, _ = function_extractor("m:flat", flat)(grey)
    torch.testing.assert_close(found, grey.float().mean(dim=(1, 2, 3))[:, None])


def test_functions_that_give_no_features_are_refused():
    with pytest.raises(ValueError, match=r"features must be \(2, ...\); got \(2, 3, 32, 32\)"):
        function_extractor("m:identity", nn.Identity())


def test_functions_that_fail_say_so_in_one_line():
    def picky(images):
        """Takes one size only."""
        return images.float().reshape(-1, 3 * 299 * 299)

    with pytest.raises(ValueError, match=r"failed on uint8 images \(2, 3, 32, 32\): ") as failed:
        function_extractor("m:picky", picky)
    assert "\n" not in str(failed.value)
    assert "shape" in str(failed.value)


@pytest.mark.parametrize(("name", "text"), [
    ("nowhere.safetensors", "does not exist"), ("words.txt", "must end so: .*.safetensors"),
    ("words.pt", "is code, and is not read: let a function load it"),
    ("words.pth", "or is no checkpoint"), ("words.safetensors", "is the file complete"),
])  # fmt: skip
def test_files_that_are_no_extractors(name, text, tmp_path):
    if not name.startswith("nowhere"):
        (tmp_path / name).write_text("words")
    with pytest.raises(CheckpointError, match=text):
        load_extractor(tmp_path / name)


def test_code_in_a_pth_file_is_not_run(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save({"fc.bias": Bomb()}, tmp_path / "bomb.pth")
    with pytest.raises(CheckpointError, match="refused"):
        load_extractor(tmp_path / "bomb.pth")
    assert not (tmp_path / "ran").exists()


def test_logits_of_the_digits_are_spread_over_the_classes():
    _, logits = load_extractor("digits")(datasets.digits("train", 16)[0])
    share = logits.softmax(1).mean(0).numpy()
    entropy = -(share * np.log(share)).sum()
    assert math.log(10) - 0.01 < entropy <= math.log(10)


def test_a_reference_of_arrays_is_images(tmp_path):
    """An .npz file may hold statistics, or images."""
    images, labels = datasets.digits("held-out", 8)
    path = tmp_path / "images.npz"
    np.savez(path, images=images[:, 0].numpy(), labels=labels.numpy())
    model, extractor = tiny.model(), load_extractor("digits")
    sources = (str(path), "digits:held-out")
    found = [Evaluator(extractor, source, model, 10, progress=False) for source in sources]
    assert found[0].reference == {"source": str(path), "n": 360}
    mu = [each.fidelity.statistics(real=True).mu for each in found]
    np.testing.assert_array_equal(mu[0], mu[1])
