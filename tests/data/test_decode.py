"""The rules of the decoder: orientation, alpha, depth, colours, frames, limits, errors."""

import io
import os
import struct
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ncsn_fast.data import datasets
from ncsn_fast.data.datasets import Transform
from ncsn_fast.data.decode import FORMATS, SUFFIXES, DataError, WarnOnce, decode, parse_colour
from ncsn_fast.data.images import as_tensor

WHITE, BLACK = (255, 255, 255), (0, 0, 0)


def encoded(image, kind="PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def read(source, channels=3, warn=None, **options):
    """The levels that decode gives."""
    warn = warn or WarnOnce()
    return np.asarray(decode(source, channels, name="it", warn=warn, **options))


def noise(*shape, seed=0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def said(caplog) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name == "ncsn_fast.data.decode"]


def png(width: int, height: int, depth: int = 8, colour: int = 0, data: bytes = b"") -> bytes:
    """A PNG that declares a size, whatever it holds."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        crc = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + crc

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(data)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


# Orientation


TURNS = {1: lambda x: x, 2: np.fliplr, 3: lambda x: np.rot90(x, 2), 4: np.flipud,
         5: lambda x: np.rot90(np.fliplr(x)), 6: lambda x: np.rot90(x, -1),
         7: lambda x: np.rot90(np.fliplr(x), -1), 8: np.rot90}  # fmt: skip


def turned(orientation: int, image: Image.Image, kind: str) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(image, kind, exif=exif)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", TURNS)
def test_images_are_turned_as_exif_says(orientation, kind, tmp_path, caplog):
    stored = noise(4, 6, 3)
    content = turned(orientation, Image.fromarray(stored), kind)
    if kind == "WEBP":  # lossy
        stored = np.asarray(Image.open(io.BytesIO(content)))
    path = tmp_path / "a.bin"
    path.write_bytes(content)
    expected = TURNS[orientation](stored)
    for source in (content, path, Image.open(path)):
        np.testing.assert_array_equal(read(source), expected)
    assert said(caplog) == []


@pytest.mark.parametrize("exif", [b"Exif\0\0garbage", b"Exif\0\0II*\0", b"?"])
def test_damaged_exif_costs_the_orientation_only(exif, caplog):
    image = Image.fromarray(noise(4, 6, 3))
    np.testing.assert_array_equal(read(encoded(image, exif=exif)), np.asarray(image))
    (text,) = said(caplog)
    assert "it has damaged EXIF data" in text


# Alpha


def transparent() -> Image.Image:
    """Black strokes on transparent red, one column half transparent."""
    pixels = np.zeros((2, 3, 4), np.uint8)
    pixels[:, 0] = (0, 0, 0, 255)
    pixels[:, 1] = (255, 0, 0, 0)
    pixels[:, 2] = (0, 0, 0, 128)
    return Image.fromarray(pixels)


@pytest.mark.parametrize(
    ("background", "row"),
    [
        ("white", [BLACK, WHITE, (127, 127, 127)]),
        ("black", [BLACK, BLACK, BLACK]),
        ("#ff8000", [BLACK, (255, 128, 0), (127, 64, 0)]),
    ],
)
def test_transparent_pixels_show_the_background(background, row, caplog):
    for source in (transparent(), encoded(transparent()), encoded(transparent(), "TIFF")):
        assert read(source, background=background)[1].tolist() == [list(c) for c in row]
    assert len(said(caplog)) == 3
    assert "it has transparent pixels; it is composited on #" in said(caplog)[0]


def test_every_way_to_be_transparent(caplog):
    """What is black here is transparent, and becomes white; what is grey stays."""
    shown = np.array([[0, 90], [90, 0]], np.uint8)
    alpha = Image.fromarray(np.where(shown == 0, 0, 255).astype(np.uint8))
    grey = Image.fromarray(shown)
    colour = grey.convert("RGB")
    with_alpha = {}
    for mode in ("LA", "La", "PA", "RGBA", "RGBa"):
        image = Image.merge("LA", (grey, alpha)).convert("LA" if mode == "La" else "RGBA")
        with_alpha[mode] = image.convert(mode) if mode != "PA" else Image.merge("LA", (grey, alpha))
    deep = encoded(Image.fromarray(shown.astype(np.uint16) * 257), transparency=0)
    palette = grey.convert("P")
    sources = {
        **with_alpha,
        "grey key": encoded(grey, transparency=0),
        "colour key": encoded(colour, transparency=(0, 0, 0)),
        "16-bit key": deep,
        "palette index": encoded(palette, transparency=0),
        "palette bytes": encoded(palette, transparency=bytes([0] + [255] * 255)),
        "gif": encoded(palette, "GIF", transparency=0),
    }
    expected = np.where(shown == 0, 255, 90)
    for name, source in sources.items():
        np.testing.assert_array_equal(read(source, 1), expected, err_msg=name)
        np.testing.assert_array_equal(read(source, 3)[..., 2], expected, err_msg=name)


def test_colours_that_are_lost_are_said(caplog):
    """Grey pictures are often stored as RGB; they lose nothing."""
    grey, colour = Image.fromarray(noise(4, 4)), Image.fromarray(noise(4, 4, 3))
    read(grey.convert("RGB"), 1)
    read(colour, 3)
    assert said(caplog) == []
    warn = WarnOnce()
    for _ in range(2):
        read(colour, 1, warn=warn)
    (text,) = said(caplog)
    assert text.startswith("it has colours, and is made grey; a model of 3 channels keeps them")


def test_opaque_alpha_loses_nothing(caplog):
    pixels = noise(4, 4, 4)
    pixels[..., 3] = 255
    np.testing.assert_array_equal(read(Image.fromarray(pixels)), pixels[..., :3])
    assert said(caplog) == []


@pytest.mark.parametrize("text", ["whitish", "", "#12", "1" * 200])
def test_what_is_no_colour_is_refused(text):
    with pytest.raises(ValueError, match="background must be a colour such as white"):
        parse_colour(text)


# Depth


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_sixteen_bits_are_their_high_byte(kind, caplog):
    levels = (np.arange(64, dtype=np.uint16) * 1040).reshape(8, 8)
    for source in (encoded(Image.fromarray(levels), kind), Image.fromarray(levels)):
        np.testing.assert_array_equal(read(source, 1), levels >> 8)
        np.testing.assert_array_equal(read(source, 3)[..., 1], levels >> 8)
    assert "16-bit pixels; only their high byte is used" in said(caplog)[0]


def test_thirty_two_bits_are_read_as_sixteen(caplog):
    levels = np.array([[0, 256], [40_000, 65_535]], np.int32)
    assert read(Image.fromarray(levels), 1).tolist() == [[0, 1], [156, 255]]
    for wrong, text in ((-1, "-1 to 65535"), (65_536, "0 to 65536")):
        levels[0, 0], levels[1, 1] = min(wrong, 0), max(wrong, 65_535)
        with pytest.raises(DataError, match=f"integer pixels, .*; got {text}: save it with"):
            read(Image.fromarray(levels), 1)


@pytest.mark.parametrize(
    ("high", "bits", "factor"), [(1023, 10, 64), (4095, 12, 16), (255, 8, 256)]
)
def test_fewer_bits_in_sixteen_are_said(high, bits, factor, caplog):
    levels = np.linspace(0, high, 64).astype(np.uint16).reshape(8, 8)
    np.testing.assert_array_equal(read(encoded(Image.fromarray(levels)), 1), levels >> 8)
    (first,) = [text for text in said(caplog) if "nearly black" in text]
    assert f"16-bit pixels of at most {high}," in first
    assert f"if it holds {bits}-bit data, multiply its pixels by {factor} first" in first


def test_floats_are_refused_unless_between_0_and_1(caplog):
    levels = np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)
    for source in (Image.fromarray(levels), encoded(Image.fromarray(levels), "TIFF")):
        np.testing.assert_array_equal(read(source, 1), np.rint(levels * 255))
    assert "floating-point pixels; they are rounded to 8 bits" in said(caplog)[0]
    for wrong, text in (
        (levels * 255, r"must be in \[0, 1\]; got 0 to 255: divide by 255"),
        (levels * 2 - 1, r"got -1 to 1: map images in \[-1, 1\] with \(x \+ 1\) / 2"),
        (levels * 1e6, r"got 0 to 1e\+06: scale them"),
        (levels * np.nan, "got nan to nan"),
    ):
        with pytest.raises(DataError, match=text):
            read(Image.fromarray(wrong.astype(np.float32)), 1)


def test_sixteen_bit_colours_are_their_high_byte():
    levels = np.random.default_rng(0).integers(0, 65536, (3, 4, 3), np.uint16)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in levels)
    content = png(4, 3, depth=16, colour=2, data=rows)
    np.testing.assert_array_equal(read(content), levels >> 8)


# Colours


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_files_of_printers_colours(kind):
    image = Image.fromarray(noise(8, 8, 3)).convert("CMYK")
    content = encoded(image, kind)
    stored = Image.open(io.BytesIO(content))
    assert stored.mode == "CMYK"
    np.testing.assert_array_equal(read(content), np.asarray(stored.convert("RGB")))
    ink = Image.new("CMYK", (8, 8), (255, 0, 0, 0))
    red, green, blue = read(encoded(ink, kind))[4, 4].tolist()
    assert red < 10
    assert min(green, blue) > 245


@pytest.mark.parametrize("kind", ["PNG", "GIF", "TIFF", "BMP"])
def test_palettes_are_looked_up(kind):
    """Indices far from the levels that they stand for."""
    indices = np.array([[0, 1], [2, 0]], np.uint8)
    colours = [(250, 10, 20), (0, 200, 100), (5, 6, 7)]
    image = Image.fromarray(indices).convert("P")
    image.putpalette([level for colour in colours for level in colour])
    assert read(encoded(image, kind)).tolist() == [[list(colours[i]) for i in r] for r in indices]


def test_modes_become_grey_or_rgb():
    rgb = Image.fromarray(noise(4, 4, 3))
    for mode in ("CMYK", "YCbCr", "HSV"):
        image = rgb.convert(mode)
        np.testing.assert_array_equal(read(image), image.convert("RGB"))
        np.testing.assert_array_equal(read(image, 1), image.convert("RGB").convert("L"))
    lab = Image.new("LAB", (2, 2), (255, 128, 128))
    assert read(lab).min() > 250
    assert read(lab, 1).min() > 250
    one_bit = Image.fromarray(noise(4, 4) > 99)
    assert set(read(one_bit, 1).ravel()) == {0, 255}
    palette = rgb.quantize(8)
    np.testing.assert_array_equal(read(encoded(palette)), palette.convert("RGB"))


def test_callers_images_are_left_as_they_are():
    image = transparent()
    before = image.copy()
    read(image)
    assert (image.mode, image.tobytes()) == (before.mode, before.tobytes())


# Frames


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "PNG"])
def test_the_first_frame_is_taken_and_the_others_said(kind, caplog):
    frames = [Image.new("L", (4, 4), level) for level in (10, 20, 30)]
    content = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
    assert (read(content, 1) == 10).all()
    (text,) = said(caplog)
    assert "it has 3 frames or pages; only the first is used" in text
    chosen = Image.open(io.BytesIO(content))
    chosen.seek(1)
    assert (read(chosen, 1) == 20).all()


# Once


def test_each_loss_is_said_once_for_a_data_set(tmp_path, caplog):
    for i in range(4):
        transparent().save(tmp_path / f"{i}.png")
        Image.fromarray(noise(2, 3).astype(np.uint16) * 257).save(tmp_path / f"deep{i}.png")
    images = datasets.open_images(tmp_path, size=2, channels=3)
    for i in range(len(images)):
        images[i]
    texts = said(caplog)
    assert sorted("transparent" in text for text in texts) == [False, True]
    assert all(text.endswith("(warned once)") for text in texts)
    as_tensor([transparent()] * 3, (3, 2, 3))
    assert len(said(caplog)) == 3


@pytest.mark.parametrize("worker", [0, 1])
def test_one_worker_speaks_for_all(worker, monkeypatch, caplog):
    class Info:
        id = worker

    monkeypatch.setattr(torch.utils.data, "get_worker_info", Info)
    read(transparent())
    assert len(said(caplog)) == 1 - worker


# Bounds


@pytest.mark.parametrize("size", [(100_000, 100_000), (2**31 - 1, 1), (13_000, 13_000)])
def test_sizes_are_refused_before_they_are_decoded(size, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)  # ours, not Pillow's
    content = png(*size, depth=16)
    tracemalloc.start()
    with pytest.raises(DataError, match=r"it \(\d+x\d+\) declares [\d,]+ pixels, and at most 89,"):
        read(content)
    assert tracemalloc.get_traced_memory()[1] < 10**6
    tracemalloc.stop()


def test_the_bound_can_be_raised(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 16)  # whatever Pillow's is
    monkeypatch.setenv("NCSN_FAST_MAX_PIXELS", "99")
    content = encoded(Image.new("L", (10, 10), 7))
    with pytest.raises(DataError, match="NCSN_FAST_MAX_PIXELS=100"):
        read(content)
    monkeypatch.setenv("NCSN_FAST_MAX_PIXELS", "100")
    assert (read(content, 1) == 7).all()


def test_bytes_are_bounded_too(monkeypatch, tmp_path):
    monkeypatch.setenv("NCSN_FAST_MAX_IMAGE_BYTES", "100")
    path = tmp_path / "a.png"
    path.write_bytes(encoded(Image.fromarray(noise(20, 20))))
    for source in (path, path.read_bytes()):
        with pytest.raises(DataError, match=r"it declares \d{3} bytes, and at most 100"):
            read(source)


@pytest.mark.parametrize("size", [(60_000, 1), (1, 60_000), (2_000_000, 1)])
@pytest.mark.parametrize("options", [{"size": 256}, {"size": 128, "centre_crop": 140}])
def test_strips_cost_no_more_than_images(size, options):
    """Resized before the crop, 2 000 000 x 1 would take half a gigapixel at 256."""
    largest = []
    resize = Image.Image.resize

    def seen(image, size, *rest, **more):
        largest.append(size[0] * size[1])
        return resize(image, size, *rest, **more)

    content = png(*size, data=b"".join(b"\0" + bytes([9]) * size[0] for _ in range(size[1])))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Image.Image, "resize", seen)
        pixels = Transform(channels=1, **options)(content)
    assert (pixels == 9).all()
    assert max(largest) <= 16 * options["size"] ** 2


def test_long_images_are_cropped_as_published():
    """Up to 16 to 1 the arithmetic is that of a resize and then a crop."""
    image = Image.fromarray(noise(10, 155, 3))
    whole = image.resize((155 * 16 // 10, 16), Image.Resampling.BILINEAR)
    left = round((whole.width - 16) / 2)
    expected = np.asarray(whole)[:, left : left + 16]
    np.testing.assert_array_equal(Transform(16, 3)(image).permute(1, 2, 0).numpy(), expected)


@pytest.mark.parametrize("size", [10**6, 2**40])
def test_an_image_size_beyond_the_bound_is_refused(size):
    with pytest.raises(DataError, match=f"an image size of {size} declares"):
        Transform(size, 3)


# Errors


BROKEN = {
    "text": b"hello",
    "empty": b"",
    "half": encoded(Image.fromarray(noise(20, 20)))[:200],
    "no end": png(4, 4),
    "EPS": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n%%EndComments\nshowpage\n",
    "no pixels": b"P5 0 4 255\n",
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_images_are_named(case):
    with pytest.raises(DataError, match="it") as raised:
        decode(BROKEN[case], 3, name="b/it\n.png", warn=WarnOnce())
    text = str(raised.value)
    assert "b/it\N{REPLACEMENT CHARACTER}.png" in text
    assert "BytesIO" not in text
    assert "\n" not in text


def test_what_reading_would_wait_for_is_refused(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(DataError, match="it is not a file"):
        read(tmp_path / "a.png")
    with pytest.raises(DataError, match=r"it does not exist"):
        read(tmp_path / "b.png")


@pytest.mark.parametrize("channels", [2, 4, 5])
def test_networks_of_other_channels_are_told_so(channels):
    with pytest.raises(DataError, match=f"has {channels} channels: pass its images as"):
        Transform(8, channels)
    with pytest.raises(DataError, match=f"the model has {channels} channels"):
        as_tensor(Image.new("L", (8, 8)), (channels, 8, 8))


def test_memory_that_is_lacking_is_named(monkeypatch):
    def lacking(image):
        raise MemoryError

    monkeypatch.setattr(Image.Image, "load", lacking)
    with pytest.raises(DataError, match="cannot decode it: out of memory"):
        read(Image.new("L", (4, 4)))


def test_suffixes_are_those_of_the_formats():
    known = Image.registered_extensions()
    assert {suffix: known.get(suffix) for suffix in SUFFIXES} == {
        suffix: "MPO" if suffix == ".mpo" else name
        for name, suffixes in FORMATS.items()
        for suffix in suffixes
    }
    assert Path("photo.JFIF").suffix.lower() in SUFFIXES
