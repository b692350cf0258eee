"""Several processes draw one request: each sample once, with the bits that one process gives it."""

import errno
import fcntl
import os
import resource
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from paths import ROOT
from PIL import Image

from ncsn_fast import engines, sample
from ncsn_fast.cli import command, shard, shards
from ncsn_fast.cli.command import UsageError
from ncsn_fast.cli.shard import Shard
from ncsn_fast.cli.shards import DistributedState
from ncsn_fast.data.files import atomic_write

LAUNCH = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
PATIENCE = 120  # seconds, for processes that should be done in a few


@pytest.fixture(autouse=True)
def folder(tiny_folder, monkeypatch) -> Path:
    """Works where ./model is the tiny model, in no launch."""
    monkeypatch.chdir(tiny_folder.parent)
    for name in (*LAUNCH, "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    return tiny_folder.parent


def words(*more: str, n: int = 22) -> list[str]:
    """A request of six micro-batches, the last one incomplete; indices cross a folder's border."""
    settings = f"--model model --engine eager --quiet --n {n} --start 990 --batch-size 4"
    return [*settings.split(), *more]


def contents(folder: str) -> dict[str, bytes]:
    """Every file below a folder, by its name there."""
    files = (path for path in Path(folder).rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def environment(**more: str) -> dict[str, str]:
    """For processes on one thread that import this checkout."""
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **more}


def torchrun(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Two ranks, as the README starts them."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return subprocess.run(
        [*launcher, "--nproc-per-node", "2", "-m", "--", "ncsn_fast.sample", *arguments],
        env=environment(), capture_output=True, text=True, timeout=PATIENCE, check=False,
    )  # fmt: skip


@pytest.mark.parametrize("n", [1, 3, 4, 5, 22, 64, 1001])
@pytest.mark.parametrize("size", [1, 4, 256])
@pytest.mark.parametrize("count", [1, 2, 3, 7, 40])
def test_every_sample_is_in_one_block_of_whole_micro_batches(n, size, count):
    blocks = [Shard(i, count).block(n, size) for i in range(count)]
    assert [i for block in blocks for i in block] == list(range(n))
    lengths = [-(-len(block) // size) for block in blocks]  # in micro-batches
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[0] - lengths[-1] <= 1
    assert all(block.start % size == 0 for block in blocks if block)


@pytest.mark.parametrize(("text", "part"), [("0/1", Shard()), ("07/12", Shard(7, 12))])
def test_shard_of_text(text, part):
    assert shard.parse(text) == part


USAGE = {
    "no fraction": ("--shard 3", "--shard must be I/K, as in 0/8"),
    "negative": ("--shard=-1/4", "--shard must be I/K"),
    "no number": ("--shard a/b", "--shard must be I/K"),
    "from one": ("--shard 4/4", "parts are 0/4 to 3/4; got '4/4'"),
    "of none": ("--shard 0/0", "parts are of at least one"),
    "grid of a part": ("--shard 0/2 --out g.png", "without --shard, with --out-dir samples"),
}


@pytest.mark.parametrize("case", USAGE)
def test_usage_errors(case, capsys):
    line, text = USAGE[case]
    assert command.run(lambda: sample.main(words(*line.split()))) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert text in said


@pytest.mark.parametrize(
    ("launch", "line", "text"),
    [
        (LAUNCH, "--shard 0/2", "--shard 0/2 within a launch of 2 ranks"),
        ({"WORLD_SIZE": "2"}, "", "WORLD_SIZE is 2, but RANK and LOCAL_RANK not set"),
        ({**LAUNCH, "RANK": "2"}, "", "below WORLD_SIZE; got RANK=2, WORLD_SIZE=2"),
        ({**LAUNCH, "RANK": "x"}, "", "got RANK=x"),
    ],
)
def test_launches_that_cannot_be(launch, line, text, monkeypatch, capsys):
    for name, value in launch.items():
        monkeypatch.setenv(name, value)
    assert command.run(lambda: sample.main(words(*line.split()))) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert text in said
    assert not Path("samples").exists()


def test_other_peoples_variables_are_no_launch(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("RANK", "0")
    with shards.distributed(None) as state:
        assert (state.group, state.is_main_process, state.totals(3, 4)) == (None, True, [3, 4])


def test_each_rank_has_a_gpu_of_its_own(monkeypatch):
    taken: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    group = object()
    ranks = [DistributedState(Shard(i, 4), group, i % 2, 2) for i in range(4)]  # two machines
    assert [rank.device("auto", None) for rank in ranks] == ["cuda:0", "cuda:1"] * 2
    assert ranks[1].device("eager", "cuda") == "cuda:1"
    assert taken == [0, 1, 0, 1, 1]
    assert ranks[1].device("auto", "cpu") == "cpu"
    assert ranks[1].device("cpu", None) is None
    assert DistributedState(Shard(1, 4)).device("auto", "cuda:1") == "cuda:1"  # of a job array
    with pytest.raises(UsageError, match=r"--device cuda:1 would put all ranks on one GPU"):
        ranks[0].device("auto", "cuda:1")
    with pytest.raises(UsageError, match=r"3 ranks on this machine, but torch sees 2 GPUs.*cpu"):
        DistributedState(Shard(0, 3), group, 0, 3).device("auto", None)
    assert engines.pick("auto", "cpu")[1].type == "cpu"


def test_shards_give_the_files_of_one_process(capsys):
    assert sample.main(words("--out-dir", "one")) == 0
    for i in (1, 0):
        assert sample.main(words("--shard", f"{i}/2")) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[1:] == [
        "samples: 10 samples written, 0 were there (shard 1/2 of 22 samples)",
        "samples: 12 samples written, 0 were there (shard 0/2 of 22 samples)",
    ]
    assert contents("samples") == contents("one")
    assert sample.main(words("--out-dir", "samples", "--out", "grid.png")) == 0
    assert sample.main(words("--out", "direct.png")) == 0
    assert Path("grid.png").read_bytes() == Path("direct.png").read_bytes()
    assert "samples: 0 samples written, 22 were there" in capsys.readouterr().out


def test_other_numbers_of_shards_go_on_and_clear_what_a_kill_left(capsys):
    assert sample.main(words("--out-dir", "one")) == 0
    assert sample.main(words("--shard", "0/3")) == 0
    dead, alive = (Path(f"samples/001000/.{i:06d}.png.x1_.tmp") for i in (1002, 1010))
    for leftover in (dead, alive):
        leftover.parent.mkdir(exist_ok=True)
        leftover.write_bytes(b"half a pict")
    with open(alive) as writer:
        fcntl.flock(writer, fcntl.LOCK_EX)
        assert sample.main(words("--shard", "1/2")) == 0  # 1002 .. 1011
        assert not dead.exists()
        assert alive.exists()
    capsys.readouterr()
    assert sample.main(words("--out-dir", "samples")) == 0
    assert capsys.readouterr().out == "samples: 4 samples written, 18 were there\n"
    assert contents("samples") == contents("one")


def test_more_shards_than_micro_batches(capsys, caplog):
    with caplog.at_level("INFO"):
        assert sample.main(words("--shard", "7/8")) == 0
    assert "6 micro-batches of 4 for 8 processes: 2 of them have nothing to draw" in caplog.text
    assert "samples: 0 samples written, 0 were there (shard 7/8" in capsys.readouterr().out
    assert list(contents("samples")) == ["settings.json"]


def test_plan_is_that_of_the_part(capsys):
    assert sample.main(words("--shard", "1/2", "--plan")) == 0
    said = capsys.readouterr().out
    assert said.startswith("part 1/2 of 22 samples")
    assert "ald: 10 samples, 9 network evaluations each, 3 micro-batches of 4" in said
    assert not Path("samples").exists()


@pytest.mark.parametrize("i", [0, 1])
def test_every_shard_refuses_a_mixture(i):
    assert sample.main(words("--out-dir", "samples", n=1)) == 0
    before = contents("samples")
    with pytest.raises(ValueError, match="drawn with another seed"):
        sample.main(words("--shard", f"{i}/2", "--seed", "5"))
    Path("samples/settings.json").write_text("[1")
    with pytest.raises(ValueError, match=r"settings\.json does not say .* take a new --out-dir"):
        sample.main(words("--shard", f"{i}/2"))
    assert contents("samples").keys() == before.keys()


@pytest.mark.parametrize("links", [True, False])
def test_one_of_many_writers_wins(links, monkeypatch):
    def refuse(*paths):
        raise OSError(errno.EPERM, "Operation not permitted")

    if not links:
        monkeypatch.setattr(os, "link", refuse)
    path, seen, start = Path("claims/settings.json"), [], threading.Barrier(8)

    def claim(i: int) -> None:
        start.wait()
        with atomic_write(path, overwrite=False) as temporary:
            temporary.write_text(f"{i}" * 1000)
        if links:  # without them, a reader can come before the winner's bytes
            seen.append(path.read_text())

    threads = [threading.Thread(target=claim, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == (8 if links else 0)
    assert set(seen) <= {path.read_text()}
    assert path.read_text() in {f"{i}" * 1000 for i in range(8)}
    assert [p.name for p in path.parent.iterdir()] == ["settings.json"]


def test_grid_of_more_files_than_may_be_open():
    assert sample.main(words("--out-dir", "out", n=64)) == 0
    used, limits = len(os.listdir("/proc/self/fd")), resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (used + 20, limits[1]))
        assert sample.main(words("--out-dir", "out", "--out", "grid.png", n=64)) == 0
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


@pytest.mark.slow
def test_ranks_of_torchrun_give_the_files_and_the_grid_of_one_process(folder, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))  # a machine not measured yet
    request = [w if w != "eager" else "auto" for w in words("--out", "grid.png")]
    done = torchrun(*request)
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stdout.splitlines() if "sample" in line]
    assert said[0] == "samples: 22 samples written, 0 were there, by 2 ranks"
    assert said[1].startswith("grid.png: 22 samples, 9 network evaluations each (ald)")
    assert len(said) == 2
    assert done.stderr.count("(our kernels)") == 1  # what was picked; of one rank
    alone = [sys.executable, "-m", "ncsn_fast.sample", *request, "--out-dir", "one"]
    subprocess.run([*alone, "--out", "one.png"], env=environment(), check=True, timeout=PATIENCE)
    assert contents("samples") == contents("one")
    assert Path("grid.png").read_bytes() == Path("one.png").read_bytes()

    refused = torchrun(*request, "--seed", "5")
    assert refused.returncode == 1
    assert "error: samples holds samples drawn with another seed" in refused.stderr
    assert contents("samples") == contents("one")


def start_ranks(*arguments: str) -> list[subprocess.Popen[str]]:
    """Two ranks without torchrun, as other launchers start them: nobody kills the survivor."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    return [
        subprocess.Popen(
            [sys.executable, "-m", "ncsn_fast.sample", *arguments],
            env=environment(RANK=str(i), LOCAL_RANK=str(i), WORLD_SIZE="2",
                            MASTER_ADDR="127.0.0.1", MASTER_PORT=port),
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for i in range(2)
    ]  # fmt: skip


def test_ranks_give_the_files_and_the_grid_of_one_process():
    ranks = start_ranks(*words("--out", "grid.png"))
    said = [rank.communicate(timeout=PATIENCE)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], said
    assert sample.main(words("--out-dir", "one", "--out", "one.png")) == 0
    assert contents("samples") == contents("one")
    assert Path("grid.png").read_bytes() == Path("one.png").read_bytes()


@pytest.mark.slow
def test_killed_rank_stops_the_other_and_one_process_goes_on(capsys):
    request = words("--n-steps-each", "20", n=32)
    assert sample.main([*request, "--out-dir", "one"]) == 0
    ranks = start_ranks(*request)
    try:
        until = time.monotonic() + PATIENCE
        while not any(int(path.stem) >= 1006 for path in Path("samples").rglob("*.png")):
            assert time.monotonic() < until
            assert ranks[1].poll() is None
            time.sleep(0.005)
        ranks[1].kill()
        said = ranks[0].communicate(timeout=PATIENCE)[1].splitlines()
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()
    assert ranks[0].returncode == 1
    assert said[-1].startswith("error: another rank has stopped, or")
    assert "the same command goes on" in said[-1]
    drawn = len(list(Path("samples").rglob("*.png")))
    assert 16 < drawn < 32
    for picture in Path("samples").rglob("*.png"):
        Image.open(picture).load()
    capsys.readouterr()
    assert sample.main([*request, "--out-dir", "samples"]) == 0
    expected = f"samples: {32 - drawn} samples written, {drawn} were there\n"
    assert capsys.readouterr().out == expected
    assert contents("samples") == contents("one")


@pytest.mark.slow
def test_failure_of_a_rank_is_said_once_by_each():
    ranks = start_ranks(*words("--epsilon", "1e38"))
    said = [rank.communicate(timeout=PATIENCE)[1].splitlines() for rank in ranks]
    assert [rank.returncode for rank in ranks] == [1, 1]
    assert all(lines[-1].startswith("error: ") for lines in said)
    assert any("is no longer finite" in lines[-1] for lines in said)
    assert not any("Traceback" in line for lines in said for line in lines)
