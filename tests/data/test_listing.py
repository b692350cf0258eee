"""Which files of a folder or zip are images, and the log line about the others."""

import os
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from ncsn_fast.data import datasets
from ncsn_fast.data.datasets import DataError
from ncsn_fast.data.formats.zip_archive import ZipImages
from ncsn_fast.data.listing import Skipped

SKIPPED = {
    "._a.png": "hidden", "b/._b.JPG": "hidden", ".hidden.png": "hidden",
    ".ipynb_checkpoints/a-checkpoint.png": "hidden", "b/.git/c.png": "hidden",
    "__MACOSX/a.png": "macOS metadata", "b/__MACOSX/a.png": "macOS metadata",
    "notes.txt": "not an image", "b/labels.csv": "not an image", "README": "not an image",
}  # fmt: skip
TAKEN = ["a.png", "b/c.jfif", "b/d.TIF", "b/e.webp", "z.Jpeg"]


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "images"
    for i, name in enumerate(sorted(TAKEN)):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        kind = {"png": "PNG", "tif": "TIFF", "webp": "WEBP"}.get(name.rpartition(".")[2].lower())
        Image.new("L", (4, 4), 20 * i).save(root / name, kind or "JPEG")
    for name in SKIPPED:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"no image")
    return root


def opened(source):
    return datasets.open_images(source, size=4, channels=1)


def names(folder):
    return [p.relative_to(folder).as_posix() for p in opened(folder).paths]


def test_files_of_a_folder(folder, caplog):
    caplog.set_level("INFO", "ncsn_fast")
    assert names(folder) == sorted(TAKEN)
    (said,) = caplog.messages
    assert said.startswith(f"{folder}: {len(TAKEN)} images; skipped: ")
    # A hidden folder counts once.
    for words in ("hidden (5, such", "macOS metadata (2, such", "not an image (3, such as README)"):
        assert words in said


def test_entries_of_a_zip(folder, tmp_path, caplog):
    caplog.set_level("INFO", "ncsn_fast")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            archive.write(path, path.relative_to(folder))
        archive.writestr("album.png/", b"")
        archive.writestr("..\\__MACOSX\\a.png", b"no image")
        link = zipfile.ZipInfo("link.png")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, "a.png")
    images = opened(tmp_path / "a.zip")
    assert [entry.filename for entry in images.entries] == sorted(TAKEN)
    (said,) = caplog.messages
    for words in ("5 images; skipped: ", "link (1, link.png)", "not an image (3, such as "):
        assert words in said
    assert torch.equal(datasets.stack(images), datasets.stack(opened(folder)))


def test_links_are_followed_once(folder, tmp_path, caplog):
    caplog.set_level("INFO", "ncsn_fast")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    Image.new("L", (4, 4)).save(elsewhere / "far.png")
    (folder / "linked").symlink_to(elsewhere)
    (folder / "0.png").symlink_to(elsewhere / "far.png")
    (folder / "aa").symlink_to(folder / "b")  # before b in the order of names
    (elsewhere / "back").symlink_to(folder)
    (folder / "broken.png").symlink_to(tmp_path / "nowhere.png")
    (folder / "circle.png").symlink_to(folder / "circle.png")
    os.mkfifo(folder / "pipe.png")
    assert names(folder) == sorted([*TAKEN, "0.png", "linked/far.png"])
    (said,) = caplog.messages
    for words in (
        "link to a folder already read (2, such as aa)",
        "broken link (2, such as broken.png)",
        "not a file (1, pipe.png)",
    ):
        assert words in said
    (tmp_path / "link").symlink_to(folder)
    assert len(opened(tmp_path / "link")) == len(TAKEN) + 2


def test_folders_deeper_than_python_recurses(tmp_path):
    places = [tmp_path / "/".join("d" * depth) for depth in range(1, 1200)]
    for place in places:
        place.mkdir()
    image = places[-1] / "a.png"
    Image.new("L", (4, 4)).save(image)
    assert opened(tmp_path).paths == [image]
    image.unlink()
    for place in reversed(places):  # pytest's own cleaning recurses
        place.rmdir()


def test_a_folder_that_cannot_be_read_is_named(folder, monkeypatch):
    def refusing(place, scandir=os.scandir):
        if place.name == "b":
            raise PermissionError(13, "Permission denied")
        return scandir(place)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(DataError, match=r"cannot read the folder .*images/b: Permission denied"):
        opened(folder)


def test_nothing_found_says_what_was_skipped(folder):
    for name in TAKEN:
        (folder / name).unlink()
    with pytest.raises(DataError, match=r"holds no images .*skipped: hidden .* not an image "):
        opened(folder)


def test_skipped_files_are_one_line():
    skipped = Skipped()
    assert str(skipped) == "nothing"
    skipped.add("hidden", "a\nb\x1b[2J.png")
    skipped.add("hidden", "c.png")
    assert str(skipped) == "hidden (2, such as a\ufffdb\ufffd[2J.png)"


# Zips that lie


def archive(path, content, name="a.png", method=zipfile.ZIP_DEFLATED, **attributes):
    with zipfile.ZipFile(path, "w", method) as file:
        file.writestr(name, content)
        for key, value in attributes.items():
            setattr(file.filelist[0], key, value)  # what the directory at its end declares
    return path


def test_entries_are_bounded_by_what_they_declare(tmp_path, monkeypatch):
    monkeypatch.setenv("NCSN_FAST_MAX_IMAGE_BYTES", "1MB")
    path = archive(tmp_path / "a.zip", bytes(2 * 10**6))
    with pytest.raises(DataError, match=r"a\.zip!a\.png declares 2,000,000 bytes, and at most"):
        opened(path)[0]
    path = archive(tmp_path / "b.zip", b"", file_size=5 * 10**9)
    with pytest.raises(DataError, match=r"b\.zip!a\.png declares 5,000,000,000 bytes"):
        opened(path)[0]


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_entries_that_hold_more_than_they_declare(tmp_path, method):
    path = archive(tmp_path / "a.zip", bytes(10**7), method=method, file_size=1000)
    with pytest.raises(DataError, match=r"a\.zip!a\.png"):
        opened(path)[0]


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_every_compression_is_read(tmp_path, method, folder):
    content = (folder / "b/c.jfif").read_bytes()
    path = archive(tmp_path / "a.zip", content, "c.jfif", method)
    assert torch.equal(opened(path)[0], datasets.stack(opened(folder))[1])


DIRECTORY = {"version": (6, b"\xe8"), "names": (46, b"\xff"), "method": (10, b"\x63")}


@pytest.mark.parametrize("case", DIRECTORY)
def test_directories_that_cannot_be_read(tmp_path, case):
    path = archive(tmp_path / "a.zip", bytes(100))
    content = bytearray(path.read_bytes())
    entry = content.index(b"PK\x01\x02")
    content[entry + 9] |= 8  # names are UTF-8
    offset, value = DIRECTORY[case]
    content[entry + offset : entry + offset + 1] = value
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"cannot read .*a\.zip"):
        opened(path)[0]


def test_encrypted_entries_are_named(tmp_path):
    path = archive(tmp_path / "a.zip", bytes(100))
    content = bytearray(path.read_bytes())
    for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        content[content.index(signature) + offset] |= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"a\.zip!a\.png: .*(encrypted|password)"):
        opened(path)[0]


def test_two_entries_of_one_name_are_two_images(tmp_path, folder):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
        file.writestr("same.png", (folder / "a.png").read_bytes())
        with pytest.warns(UserWarning, match="Duplicate name"):
            file.writestr("same.png", (folder / "b/e.webp").read_bytes())
    images = ZipImages(tmp_path / "a.zip", datasets.Transform(4, 1))
    levels = [int(np.median(images[i])) for i in range(len(images))]
    assert levels[0] == 0
    assert levels[1] > 0
