"""GIFs of chains: which state a frame shows, and what the commands write."""

import pytest
import torch
from PIL import Image, ImageSequence

from ncsn_fast import Sampler, edit, sample
from ncsn_fast.cli import command
from ncsn_fast.cli.animation import FRAMES, Panel
from ncsn_fast.inference.monitor import Progress


@pytest.fixture(autouse=True)
def folder(tiny_folder, monkeypatch):
    """Works where ./model is the tiny model."""
    monkeypatch.chdir(tiny_folder.parent)
    return tiny_folder.parent


def tell(panel, sigma, *values, samples=None):
    """Calls a panel with chains of one pixel."""
    samples = range(len(values)) if samples is None else samples
    x = torch.tensor(values, dtype=torch.float32).view(-1, 1, 1, 1) / 255
    panel(Progress("ald", 0, 0, sigma, 0, torch.tensor(list(samples)), x))


def test_frames_are_shares_of_the_way_in_log_sigma():
    panel = Panel(last=0.01)
    for sigma, value in ((100.0, 10), (10.0, 20), (1.0, 30), (0.01, 40)):
        tell(panel, sigma, value, value + 1)
    frames = panel.frames()
    assert frames.shape == (FRAMES, 2, 1, 1, 1)
    quarter = (FRAMES - 1) / 4
    shown = frames[:, 0].flatten().tolist()
    expected = [
        10 if i < round(quarter) else 20 if i < round(2 * quarter) else 30 for i in range(FRAMES)
    ]
    assert shown == [*expected[:-1], 40]
    assert frames[:, 1].flatten().tolist() == [value + 1 for value in shown]


def test_chains_of_two_micro_batches_are_in_order():
    panel = Panel(last=1.0)
    for samples in ((3, 4), (1, 2)):
        tell(panel, 9.0, *(10 * i for i in samples), samples=samples)
        tell(panel, 0.5, *(10 * i + 1 for i in samples), samples=samples)  # below the last: the end
    assert panel.frames()[-1].flatten().tolist() == [11, 21, 31, 41]
    assert panel.frames()[0].flatten().tolist() == [10, 20, 30, 40]


def test_one_level_is_the_end():
    panel = Panel(last=2.0)
    tell(panel, 2.0, 7)
    assert set(panel.frames().flatten().tolist()) == {7}


def frames_of(path):
    with Image.open(path) as gif:
        assert gif.info["loop"] == 0
        return [frame.convert("RGB").copy() for frame in ImageSequence.Iterator(gif)]


@pytest.mark.parametrize("method", ["cas", "adaptive"])
def test_sample_writes_the_way_to_its_grid(method, folder):
    line = f"--model model --engine eager --quiet --n 6 --batch-size 4 --method {method}"
    line += f" --out grid_{method}.png --animate way_{method}.gif"
    assert sample.main(line.split()) == 0
    found, grid = frames_of(f"way_{method}.gif"), Image.open(f"grid_{method}.png").convert("RGB")
    assert len(found) > 2
    assert found[-1].size == grid.size
    assert list(found[-1].getdata()) == list(grid.getdata())  # grey: the palette holds every value
    assert list(found[0].getdata()) != list(grid.getdata())


@pytest.mark.parametrize(
    ("line", "size"),
    [
        ("inpaint --n 2", (1, 2)),
        ("super-resolve --n 2 --factor 2", (1, 2)),
        ("sdedit --n 2", (1, 2)),
        ("guide --classifier digits_of:logits --labels 1 0 --n 3", (3, 3)),
    ],
)
def test_edits_show_the_rows_that_were_drawn(line, size, folder, monkeypatch):
    (folder / "digits_of.py").write_text("def logits(x, sigma):\n    return x.flatten(1)[:, :2]\n")
    monkeypatch.syspath_prepend(str(folder))
    rest = "--model model --engine eager --quiet --method cas --out e.png --animate e.gif"
    assert edit.main([*line.split(), *rest.split()]) == 0
    assert frames_of("e.gif")[-1].size == tuple(50 * n + 2 for n in reversed(size))


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("--animate a.png", "--animate must end in .gif"),
        ("--animate a.gif --out-dir x", "leave out --out-dir and --shard"),
        ("--animate a.gif --shard 0/2", "leave out --out-dir and --shard"),
    ],
)
def test_animations_that_cannot_be(line, words, capsys):
    assert command.run(lambda: sample.main(["--model", "model", *line.split()])) == 2
    assert words in " ".join(capsys.readouterr().err.split())


def test_a_place_that_takes_no_file_is_found_before_the_work(capsys, monkeypatch):
    monkeypatch.setattr(Sampler, "sample", lambda *args, **options: pytest.fail("it drew"))
    line = "--model model --engine eager --animate model/config.json/a.gif"
    assert command.run(lambda: sample.main(line.split())) == 1
    assert "cannot write --animate" in capsys.readouterr().err
