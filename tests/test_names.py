"""Names that are not known: the message suggests the one that was probably meant."""

import pytest
import torch

import ncsn_fast
from ncsn_fast import Sampler
from ncsn_fast.models.score import ModelConfig
from ncsn_fast.names import suggestion


def test_a_suggestion_is_a_name_that_is_much_alike():
    assert suggestion("uper", ["upper", "lower"]) == " (did you mean 'upper'?)"
    assert suggestion("UPPER", ["Upper", "lower"]) == " (did you mean 'Upper'?)"
    assert suggestion("quux", ["upper", "lower"]) == ""
    assert suggestion(3, ["upper"]) == ""


def wrap(**options):
    net = torch.nn.Conv2d(1, 1, 3, padding=1)
    given = {"predicts": "score", "sees": "nothing", **options}
    return ncsn_fast.wrap(net, image_shape=(1, 8, 8), sigma_min=0.1, sigma_max=1, **given)


MISSPELT = {
    "engine": (lambda: Sampler("digits", engine="ort_"), "ort"),
    "option of an engine": (lambda: Sampler("digits", batchsize=3), "batch_size"),
    "model": (lambda: Sampler("digts"), "digits"),
    "method": (lambda: Sampler("digits").sample(method="fats"), "fast"),
    "option of a method": (lambda: Sampler("digits").sample(method="dpmpp", etta=1), "eta"),
    "option of all methods": (lambda: Sampler("digits").sample(step=3), "steps"),
    "published": (lambda: Sampler("digits").sample(published="edm-cifar"), "edm-cifar10"),
    "schedule": (lambda: Sampler("digits").sample(method="fast", schedule="kerras"), "karras"),
    "architecture": (lambda: ModelConfig(arch="ncsnv3"), "ncsnv2"),
    "predicts": (lambda: wrap(predicts="epsilom"), "epsilon"),
    "sees": (lambda: wrap(sees="log-sigma"), "log_sigma"),
}


@pytest.mark.parametrize("kind", MISSPELT)
def test_misspelt_names_get_a_suggestion(kind):
    act, meant = MISSPELT[kind]
    with pytest.raises(ValueError, match=rf"\(did you mean '{meant}'\?\)"):
        act()
