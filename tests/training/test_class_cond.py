"""Class-conditional training: labels from the data to the network, and what is refused."""

from pathlib import Path

import numpy as np
import pytest
import tiny
import torch

import ncsn_fast
from ncsn_fast import Sampler, train
from ncsn_fast.checkpoints import training_run
from ncsn_fast.cli.command import UsageError
from ncsn_fast.data import datasets
from ncsn_fast.data.datasets import DataError, MemoryImages
from ncsn_fast.training.configs import CONFIGS, TrainConfig
from ncsn_fast.training.ladder import resolve_ladder
from ncsn_fast.training.objective import Objective
from ncsn_fast.training.trainer import Trainer, TrainingError

SMALL = {
    "data": "digits", "image_size": 8, "channels": 1, "ngf": 8, "multiples": (1, 2), "n_blocks": 1,
    "attention": (), "dropout": 0.0, "batch_size": 64, "steps": 6, "log_every": 3,
    "snapshot_every": 3, "grid": 0, "warmup": 0, "workers": 0, "n_sigmas": 8, "class_cond": True,
    "label_dropout": 0.25, "held_out": 20, "accumulate": 2, "flip": False, "keep": 9,
}  # fmt: skip
CLASSES = 10


def config(**changes) -> TrainConfig:
    return TrainConfig(**{**vars(CONFIGS["edm-cifar10"]), **SMALL, **changes})


def trainer(**changes) -> Trainer:
    made = config(**changes)
    images = datasets.open_images("digits", size=8, channels=1)
    return Trainer(made, resolve_ladder(made, images), torch.device("cpu"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run's folder, and the images and labels that its objective was given."""
    runs, seen, forward = tmp_path_factory.mktemp("runs"), [], Objective.forward

    def note(self, x, uniform, noise, labels=None):
        seen.append((x, labels, self.model.training))
        return forward(self, x, uniform, noise, labels)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Objective, "forward", note)
        run, stopped = train.train(config(runs=str(runs)), progress=False)
    assert stopped is None
    return run, seen


def true_labels(x: torch.Tensor) -> torch.Tensor:
    """Returns the labels of images of the digits."""
    digits = datasets.open_images("digits", size=8, channels=1)
    whole = {digits[i].numpy().tobytes(): int(digits.labels[i]) for i in range(len(digits))}
    pixels = (255 * x).round().to(torch.uint8)
    return torch.tensor([whole[row.contiguous().numpy().tobytes()] for row in pixels])


def test_labels_reach_the_network_but_for_the_dropped_share(trained):
    _, seen = trained
    x, labels = (torch.cat(part) for part in zip(*[s[:2] for s in seen if s[2]], strict=True))
    assert len(labels) == SMALL["steps"] * SMALL["batch_size"]
    dropped = labels == CLASSES
    assert torch.equal(labels[~dropped], true_labels(x)[~dropped])
    # Five standard deviations of a binomial share.
    margin = 5 * (0.25 * 0.75 / len(labels)) ** 0.5
    assert float(dropped.float().mean()) == pytest.approx(0.25, abs=margin)


def test_held_out_images_have_their_labels(trained):
    _, seen = trained
    held_out = [s[:2] for s in seen if not s[2]]
    assert sum(len(x) for x, _ in held_out) >= 2 * SMALL["held_out"]  # at each snapshot
    for x, labels in held_out:
        assert torch.equal(labels, true_labels(x))


def test_a_run_is_sampled_by_class(trained):
    run, _ = trained
    model = ncsn_fast.load(run)
    assert model.n_classes == CLASSES
    sampler = Sampler(model, engine="eager")
    options = {"method": "heun", "steps": 3, "progress": False}
    a, b = (sampler.sample(2, labels=label, **options) for label in (3, 8))
    assert torch.isfinite(a).all()
    assert not torch.equal(a, b)
    assert sampler.sample(2, labels=[3, 8], guidance=2.0, **options).shape == (2, 1, 8, 8)


def test_a_grid_has_the_classes_in_turn(trained, tmp_path, monkeypatch):
    given, sample = [], Sampler.sample

    def note(self, *args, **options):
        given.append(options["labels"])
        return sample(self, *args, **options)

    monkeypatch.setattr(Sampler, "sample", note)
    train.train(config(runs=str(tmp_path), steps=1, grid=12), progress=False)
    assert given[0].tolist() == [*range(10), 0, 1]


def test_resumed_is_bit_for_bit_uninterrupted(trained, tmp_path):
    whole = training_run.read_run(trained[0]).contents
    train.train(config(runs=str(tmp_path), steps=3), progress=False)
    run, _ = train.train(config(runs=str(tmp_path)), resume=True, progress=False)
    resumed = training_run.read_run(run).contents
    assert resumed["step"] == whole["step"] == 6
    assert tiny.same(*(
        {k: v for k, v in state.items() if k != "train_config"} for state in (resumed, whole)
    ))  # fmt: skip


def labelled_trainer() -> Trainer:
    """Returns a trainer whose network depends on all of its weights, unlike a new one."""
    made = trainer(label_dropout=0.5)
    with torch.no_grad():
        for weight in made.model.parameters():
            weight.copy_(weight.sign() * weight.abs().clamp(min=1e-2))
    return made


@pytest.mark.parametrize("part", [slice(0, 3), slice(3, 8)])
def test_ranks_use_the_labels_of_their_share(part):
    images = datasets.open_images("digits", size=8, channels=1)
    batch, labels = images.images[:8], images.labels[:8]
    level, whole = labelled_trainer().step_on(batch, slice(0, 8), 8, labels)
    for given, own in ((batch, labels), (batch[part], labels[part])):
        found = labelled_trainer().step_on(given, part, 8, own)
        assert torch.equal(found[0], level[part])
        torch.testing.assert_close(found[1], whole[part], rtol=1e-5, atol=1e-6)
    _, others = labelled_trainer().step_on(batch, slice(0, 8), 8, labels.flip(0))
    assert not torch.allclose(others, whole, rtol=1e-4, atol=1e-4)


def test_data_without_labels_is_refused_before_the_run(tmp_path):
    np.save(tmp_path / "images.npy", np.zeros((30, 8, 8), np.uint8))
    runs = tmp_path / "runs"
    with pytest.raises(DataError, match="the data has no labels: sort the images into one folder"):
        train.train(config(data=str(tmp_path / "images.npy"), runs=str(runs)), progress=False)
    assert not runs.exists()


def test_labels_that_are_no_classes_are_refused():
    images = MemoryImages(torch.zeros(2, 1, 8, 8, dtype=torch.uint8), torch.tensor([0, 3]), ("a",))
    with pytest.raises(DataError, match="numbers of the 1 classes that the data names; got 0 to 3"):
        resolve_ladder(config(), images)


@pytest.mark.parametrize("arch", ["ncsnpp", "ddpmpp"])
def test_networks_without_classes_are_refused(arch):
    with pytest.raises(ValueError, match="arch songunet or dhariwal: start from --config edm"):
        config(arch=arch)


def test_a_step_needs_labels():
    images = torch.zeros(4, 1, 8, 8, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"has 10 classes: give labels \(4,\)"):
        trainer().train_step(images)


def test_a_dry_run_needs_the_data_for_its_classes():
    with pytest.raises(UsageError, match="needs images"):
        train.main(["--config", "edm-cifar10", "--class-cond", "--dry-run"])


def test_a_run_is_resumed_with_its_classes(trained, tmp_path):
    run, _ = trained
    images = datasets.open_images("digits", size=8, channels=1)
    saved = len(images) - SMALL["held_out"]
    labels = np.arange(saved + SMALL["held_out"]) % 3
    np.savez(tmp_path / "other.npz", images=images.images[:, 0].numpy(), labels=labels)
    changed = config(runs=str(Path(run).parent), data=str(tmp_path / "other.npz"))
    with pytest.raises(TrainingError, match="has 10 classes, and the data with these settings 3"):
        train.train(changed, resume=True, progress=False)
