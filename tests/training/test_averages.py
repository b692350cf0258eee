"""Averages by half-life, the loss of held-out images, and the choice among averages."""

import pytest
import tiny
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import ncsn_fast
from ncsn_fast import train
from ncsn_fast.checkpoints import training_run
from ncsn_fast.data.decode import DataError
from ncsn_fast.data.formats.base import MemoryImages
from ncsn_fast.data.held_out import Subset, hold_out
from ncsn_fast.training.averages import Decay
from ncsn_fast.training.trainer import TrainingError

HALFLIVES = ["--ema-halflife", "10", "4000"]


def test_half_life_halves():
    decay = Decay("", halflife=1000.0, warmup=False)
    share = 1.0
    for step in range(1000 // 8):
        share *= decay.at(step, 8)
    assert share == pytest.approx(0.5)


def test_half_life_rises_with_the_images_seen():
    decay = Decay("", halflife=1000.0)
    assert decay.at(0, 64) == pytest.approx(0.5 ** (1 / 0.05))
    assert decay.at(99, 64) == pytest.approx(0.5 ** (64 / 320))
    assert decay.at(10**6, 64) == pytest.approx(0.5 ** (64 / 1000))


def test_each_average_follows_its_recursion():
    t = tiny.trainer(ema_halflife=(10.0, 4000.0))
    found = {name: model.net.end_conv.weight.clone() for name, model in t.averages.models().items()}
    assert list(found) == ["10", "4000"]
    for step in range(3):
        t.train_step(tiny.IMAGES[:8])
        for name, decay in t.averages.decays.items():
            m = decay.at(step, 8)
            found[name] = m * found[name] + (1 - m) * t.model.net.end_conv.weight.detach()
    for name, model in t.averages.models().items():
        torch.testing.assert_close(model.net.end_conv.weight, found[name], rtol=1e-5, atol=1e-7)


def test_the_average_of_least_held_out_loss_is_chosen(in_tmp):
    arguments = [*tiny.arguments(held_out=30, ema=0.5, snapshot_every=2), *HALFLIVES]
    assert train.main(arguments) == 0
    run = in_tmp / "runs" / "digits"
    saved = training_run.read_run(run)
    chosen, other = saved.contents["ema_name"], set(saved.contents["averages"])
    assert {chosen} | other == {"10", "4000"}
    board = EventAccumulator(str(run / "tensorboard")).Reload()
    last = {n: board.Scalars(f"held_out_loss/ema_{n}")[-1].value for n in ("10", "4000")}
    assert chosen == min(last, key=last.get)
    assert board.Scalars("held_out_loss")[-1].value == last[chosen]
    assert [event.step for event in board.Scalars("held_out_loss")] == [2, 4]
    assert tiny.same(ncsn_fast.load(run).state_dict(), saved.contents["ema"])
    assert train.main([*arguments, "--steps", "6", "--resume"]) == 0
    with pytest.raises(TrainingError, match=r"ema_halflife was \[10.0, 4000.0\], is \[\]"):
        train.main([*tiny.arguments(held_out=30, ema=0.5, steps=8), "--resume"])


def test_held_out_losses_do_not_depend_on_the_batch_size():
    small, large = (tiny.trainer(batch_size=n, ema=0).held_out_losses(tiny.IMAGES) for n in (3, 40))
    (levels, losses), (same, others) = small["raw"], large["raw"]
    assert torch.equal(levels, same)
    assert set(levels.tolist()) == {0, 1, 2, 3}
    torch.testing.assert_close(losses, others, rtol=1e-4, atol=1e-4)


class Streamed:
    """Ten images, each of its index, that are not held in memory."""

    labels, classes = torch.arange(10) % 3, ("a", "b", "c")

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.full((1, 1, 1), index, dtype=torch.uint8)


IN_MEMORY = MemoryImages(
    torch.arange(10, dtype=torch.uint8).view(10, 1, 1, 1), Streamed.labels, Streamed.classes
)


@pytest.mark.parametrize("images", [IN_MEMORY, Streamed()], ids=["memory", "streamed"])
def test_held_out_images_are_not_trained_on(images):
    rest, held_out = hold_out(images, 3, seed=1)
    assert isinstance(rest, Subset) == isinstance(images, Streamed)
    kept, taken = ([int(part[i]) for i in range(len(part))] for part in (rest, held_out))
    assert (len(kept), len(taken)) == (7, 3)
    assert sorted(kept + taken) == list(range(10))
    assert (kept, taken) == (sorted(kept), sorted(taken))
    for part, indices in ((rest, kept), (held_out, taken)):
        assert part.labels.tolist() == [i % 3 for i in indices]
        assert part.classes == ("a", "b", "c")
    assert hold_out(images, 0, seed=1)[0] is images
    other = hold_out(images, 3, seed=2)[1]
    assert other.images.tolist() != held_out.images.tolist()
    with pytest.raises(DataError, match="cannot hold out 10 of 10 images"):
        hold_out(images, 10, seed=1)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"autocast": "fp16"}, "autocast must be none or bf16"),
        ({"ema_halflife": (0.0,)}, "ema_halflife must be positive"),
        ({"ema_halflife": (5.0, 5.0)}, "ema_halflife must not repeat"),
        ({"accumulate": 9}, "accumulate must be at most batch_size=8"),
        ({"steps": 2**30 + 1}, "steps must be at most 1073741824"),
        ({"max_minutes": -1.0}, "max_minutes must be at least 0"),
    ],
)
def test_settings_that_cannot_be(settings, words):
    with pytest.raises(ValueError, match=words):
        tiny.train_config(**settings)
