"""Parameters of a call of Sampler: from keyword arguments, and to a sampler."""

import pytest
import torch
from drawing import tiny

from ncsn_fast.inference.sampling_params import SamplingCall


def test_keywords_are_shared_parameters_or_options_of_the_method():
    call = SamplingCall.from_keywords({"start": 3, "output": "np", "eta": 0.5, "options": 1})
    assert call == SamplingCall(start=3, output="np", options={"eta": 0.5, "options": 1})
    assert torch.equal(call.samples(2), torch.tensor([3, 4]))


def test_a_call_builds_its_method():
    call = SamplingCall(method="euler", steps=4, options={"sigma_start": 2.0})
    assert call.build(tiny()).nfe == 4
    assert call.build(tiny(), sigma_start=0.5).sigma[0] == 0.5
    with pytest.raises(ValueError, match="'euler' has no option options; it has sigmas"):
        SamplingCall.from_keywords({"method": "euler", "options": {}}).build(tiny())
