"""Random numbers of training: functions of seed, step and place, on the stream of training."""

import pytest
import torch

from ncsn_fast.diffusion.objectives import levels_of
from ncsn_fast.ops import noise
from ncsn_fast.training.draws import LARGEST_STEP, Decision, Draws, Part
from ncsn_fast.training.objective import stratified
from ncsn_fast.training.ranks import Ranks, micro_batches


def test_numbers_are_those_of_the_contract():
    draws = Draws(5, 7, torch.tensor([3, 0]))
    z = draws.normal((1, 3, 2))
    torch.testing.assert_close(z, noise.normal(5, torch.tensor([3, 0]), 8, 28, (1, 3, 2)))
    u = noise.uniform(5, torch.tensor([3, 0]), 8, 29, (4,))
    assert torch.equal(draws.decide(Decision.LEVEL), u[:, 0])
    assert torch.equal(draws.decide(Decision.FLIP), u[:, 1])
    dequantisation = noise.uniform(5, torch.tensor([3, 0]), 8, 30, (6,))
    assert torch.equal(draws.uniform((6,), Part.DEQUANTISATION), dequantisation)


def test_the_last_step_fits():
    assert Draws(0, LARGEST_STEP - 1, torch.tensor([0])).normal((4,), Part.HELD_OUT).shape == (1, 4)
    with pytest.raises(ValueError, match="step"):
        Draws(0, LARGEST_STEP, torch.tensor([0])).normal((4,))


def test_levels_are_uniform():
    u = Draws(1, 0, torch.arange(60_000)).decide(Decision.LEVEL)
    counts = torch.bincount(levels_of(u, 6), minlength=6).double()
    assert len(counts) == 6
    chi_square = float(((counts - 10_000).square() / 10_000).sum())
    assert chi_square < 25.7  # 1e-4 quantile for 5 degrees of freedom
    assert int(levels_of(torch.tensor(1 - 2.0**-24), 2**24)) == 2**24 - 1


def test_levels_of_held_out_images_are_spread():
    u = stratified(torch.arange(1000))
    counts = torch.bincount((u * 20).long(), minlength=20)
    assert len(counts) == 20
    assert int((counts - 50).abs().max()) <= 2


@pytest.mark.parametrize("n", [3, 8, 64])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_shares_and_micro_batches_cover_a_batch_once(n, count):
    shares = [Ranks(i, count).share(n) for i in range(count)]
    for parts in (shares, list(micro_batches(n, count))):
        assert [i for part in parts for i in range(n)[part]] == list(range(n))
        sizes = [part.stop - part.start for part in parts]
        assert max(sizes) - min(sizes) <= 1
    assert len(list(micro_batches(2, 5))) == 2
