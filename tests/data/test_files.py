"""Files that a kill or a full disk leaves whole, and files that are not what they seem."""

import errno
import importlib.util
import os
import pwd
import signal
import stat
import sys
import time
from pathlib import Path

import pytest
from killing import killed_at_each_call

from ncsn_fast.data import files, limits
from ncsn_fast.data.files import atomic_write, atomic_write_all, open_regular, remove_leftovers


def write(path: Path, text: str, *, overwrite: bool = True) -> None:
    with atomic_write(path, overwrite=overwrite) as temporary:
        temporary.write_text(text)


@pytest.mark.parametrize("overwrite", [True, False])
def test_a_kill_at_any_call_leaves_old_or_new_and_the_next_call_clears_up(tmp_path, overwrite):
    path, kills = tmp_path / "grid.png", 0
    for _ in killed_at_each_call(lambda: write(path, "new", overwrite=overwrite), tmp_path):
        kills += 1
        assert not path.exists() or path.read_text() == "new"
        path.unlink(missing_ok=True)
        write(path, "later")
        assert os.listdir(tmp_path) == [path.name]
        path.unlink()
    assert kills > 6
    assert os.listdir(tmp_path) == [path.name]


def test_all_or_a_last_one_that_is_old(tmp_path):
    """The last file names the others: where it is new, they are."""
    paths = [tmp_path / name for name in ("a", "b", "c")]

    def write_all(text: str) -> None:
        with atomic_write_all(*paths) as temporaries:
            for temporary in temporaries:
                temporary.write_text(text)

    kills, mixed = 0, 0
    write_all("old")
    for _ in killed_at_each_call(lambda: write_all("new"), tmp_path):
        kills += 1
        found = [path.read_text() for path in paths]
        assert found == sorted(found)  # new ones first
        mixed += len(set(found)) > 1
        write_all("old")
        assert sorted(os.listdir(tmp_path)) == ["a", "b", "c"]
    assert kills > 15
    assert mixed == 2  # between the first and the last rename there is nothing else
    assert {path.read_text() for path in paths} == {"new"}


def test_a_full_disk_leaves_all_as_they_were(tmp_path, full_disk):
    paths = tmp_path / "a", tmp_path / "b"
    with (  # noqa: PT012
        full_disk(100),
        pytest.raises(OSError, match=r"cannot write .*a and .*b: File too large"),
        atomic_write_all(*paths) as (a, b),
    ):
        a.write_bytes(bytes(50))
        b.write_bytes(bytes(200))
    assert os.listdir(tmp_path) == []
    paths[1].mkdir()
    with (
        pytest.raises(OSError, match=r"cannot write .*: Is a directory\. Nothing was changed"),
        atomic_write_all(*paths),
    ):
        pass
    assert os.listdir(tmp_path) == ["b"]


def test_what_a_living_process_writes_stays(tmp_path):
    path = tmp_path / "0.png"
    child = os.fork()
    if child == 0:
        with atomic_write(path):
            time.sleep(60)
        os._exit(0)
    while not os.listdir(tmp_path):
        time.sleep(0.01)
    (temporary,) = tmp_path.iterdir()
    time.sleep(0.05)  # its lock comes after its name
    remove_leftovers(tmp_path)
    write(path, "mine")
    assert set(tmp_path.iterdir()) == {temporary, path}
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    remove_leftovers(tmp_path, {"1.png"})
    assert temporary.exists()
    remove_leftovers(tmp_path)
    assert os.listdir(tmp_path) == [path.name]
    remove_leftovers(tmp_path / "nowhere")


def test_only_temporary_files_are_cleared(tmp_path):
    kept = {".notes.tmp", "a.b.tmp", ".a.png.X-1.tmp", ".a.png.x1_.tmp~"}
    for name in (*kept, ".a.png.x1_.tmp"):
        (tmp_path / name).touch()
    (tmp_path / ".b.y1.tmp").mkdir()
    remove_leftovers(tmp_path)
    assert set(os.listdir(tmp_path)) == {*kept, ".b.y1.tmp"}


def test_a_writer_whose_file_was_cleared_before_its_lock_takes_another(tmp_path, monkeypatch):
    flock, seen = files.fcntl.flock, []

    def slow(descriptor, how):
        if not seen:
            seen.append(next(tmp_path.iterdir()))
            seen[0].unlink()
        flock(descriptor, how)

    monkeypatch.setattr(files.fcntl, "flock", slow)
    with atomic_write(tmp_path / "a") as temporary:
        assert temporary != seen[0]
        temporary.write_text("a")
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_files_have_the_mode_that_the_umask_leaves_and_nobody_changes_it(
    tmp_path, monkeypatch, umask
):
    before = os.umask(umask)
    try:
        monkeypatch.setattr(os, "umask", lambda mask: pytest.fail("the umask is the process's"))
        write(tmp_path / "a", "a")
        write(tmp_path / "once", "a", overwrite=False)
        with atomic_write(tmp_path / "own", mode=0o604) as temporary:
            assert stat.S_IMODE(temporary.stat().st_mode) == 0o604
            temporary.write_text("a")
    finally:
        monkeypatch.undo()
        os.umask(before)
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("a", "once", "own")]
    assert modes == [0o666 & ~umask, 0o666 & ~umask, 0o604]


def write_both(*paths):
    """Writes two files that belong together."""
    with atomic_write_all(*paths) as temporaries:
        for temporary in temporaries:
            temporary.write_text("new")


def failing_fsync(monkeypatch, number):
    """Makes fsync of folders fail with this error number."""
    real = os.fsync

    def fsync(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)


def test_a_folder_that_cannot_be_flushed_is_told_as_it_is(tmp_path, monkeypatch):
    failing_fsync(monkeypatch, errno.EIO)
    with pytest.raises(
        files.WrittenError, match=r"^the file was written, .* not be flushed"
    ) as told:
        write(tmp_path / "a", "new")
    assert "othing was changed" not in str(told.value)
    assert (tmp_path / "a").read_text() == "new"
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS])
def test_file_systems_that_flush_no_folders_are_left_alone(tmp_path, monkeypatch, number):
    failing_fsync(monkeypatch, number)
    write(tmp_path / "a", "new")
    write_both(tmp_path / "b", tmp_path / "c")
    assert sorted(os.listdir(tmp_path)) == ["a", "b", "c"]


def test_of_several_files_those_that_were_written_are_told(tmp_path, monkeypatch):
    replace, done = os.replace, []

    def once(source, target):
        if done:
            raise OSError(errno.EACCES, os.strerror(errno.EACCES))
        done.append(replace(source, target))

    monkeypatch.setattr(os, "replace", once)
    words = rf"^{tmp_path}/a was written, but {tmp_path}/b could not be: Permission denied"
    with pytest.raises(files.WrittenError, match=words):
        write_both(tmp_path / "a", tmp_path / "b")
    assert os.listdir(tmp_path) == ["a"]


def test_only_regular_files_within_the_limit_are_opened(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero"), tmp_path):
        with pytest.raises(OSError, match=rf"{path} is a .*, not a file"):
            open_regular(path, limits.JSON_BYTES)
    path = tmp_path / "file"
    path.write_bytes(bytes(101))
    with open_regular(path, limits.JSON_BYTES) as file:
        assert file.read() == bytes(101)
    monkeypatch.setenv(limits.JSON_BYTES.variable, "100")
    with pytest.raises(OSError, match=r"file declares 101 bytes, .*NCSN_FAST_MAX_JSON_BYTES=101"):
        open_regular(path, limits.JSON_BYTES)
    with pytest.raises(FileNotFoundError):
        open_regular(tmp_path / "nowhere", limits.JSON_BYTES)


@pytest.mark.parametrize("home", [None, "nowhere"])
def test_users_without_a_home_have_a_folder_of_their_own(home, tmp_path, monkeypatch):
    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    if home is not None:
        monkeypatch.setenv("HOME", str(tmp_path / home))
    monkeypatch.setattr(pwd, "getpwuid", lambda uid: {}[uid])
    monkeypatch.setattr(files.tempfile, "tempdir", str(tmp_path))
    own = tmp_path / f"ncsn_fast-{os.getuid()}"
    for _ in range(2):
        assert files.cache_folder() == own / ".cache" / "ncsn_fast"
    assert stat.S_IMODE(own.stat().st_mode) == 0o700
    own.chmod(0o755)
    with pytest.raises(OSError, match="not this user's alone; set HOME or XDG_CACHE_HOME"):
        files.cache_folder()
    own.rmdir()
    own.symlink_to(tmp_path)
    with pytest.raises(OSError, match="not this user's alone"):
        files.cache_folder()
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert files.cache_folder() == Path("/caches/ncsn_fast")


def test_other_systems_are_refused_by_name(monkeypatch):
    """Windows has no fcntl."""
    monkeypatch.setitem(sys.modules, "fcntl", None)
    spec = importlib.util.spec_from_file_location("files_elsewhere", files.__file__)
    with pytest.raises(ImportError, match="ncsn_fast needs a POSIX system"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
