"""Images in and out."""

import numpy as np
import pytest
import torch
from PIL import Image

from ncsn_fast.data import images
from ncsn_fast.data.images import as_tensor, make_grid, sample_path, save_grid, save_png, to_pil


def field(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def photos(n, height, width, channels, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, height, width, channels), np.uint8)


@pytest.mark.parametrize("channels", [1, 3])
def test_every_kind_of_image_is_read_alike(channels):
    array, shape = photos(2, 5, 7, channels), (channels, 5, 7)
    expected = torch.from_numpy(array).permute(0, 3, 1, 2).float() / 255
    pils = [Image.fromarray(a[..., 0] if channels == 1 else a) for a in array]
    kinds = {
        "float": expected,
        "double": expected.double(),
        "uint8 tensor": torch.from_numpy(array).permute(0, 3, 1, 2),
        "uint8 array": array,
        "PIL list": pils,
        "PIL tuple": tuple(pils),
        "derivative": expected.clone().requires_grad_(),
    }
    for kind, given in kinds.items():
        x = as_tensor(given, shape)
        assert (x.dtype, x.requires_grad) == (torch.float32, False), kind
        assert torch.equal(x, expected), kind
    assert torch.equal(as_tensor(pils[1], shape), expected[1:])


def test_modes_of_pil_images_are_converted():
    grey, colour = photos(1, 4, 4, 1)[0, ..., 0], photos(1, 4, 4, 3)[0]
    as_colour = as_tensor(Image.fromarray(grey), (3, 4, 4))
    assert torch.equal(as_colour, torch.from_numpy(grey / np.float32(255)).expand(1, 3, 4, 4))
    opaque = Image.fromarray(colour).convert("RGBA")
    assert torch.equal(as_tensor(opaque, (3, 4, 4)), as_tensor(colour[None], (3, 4, 4)))
    luma = np.asarray(Image.fromarray(colour).convert("L"))
    expected = torch.from_numpy(luma / np.float32(255))[None, None]
    assert torch.equal(as_tensor(Image.fromarray(colour), (1, 4, 4)), expected)


IN_RANGE = [(0.0, 1.0, 0.0), (-1e-4, 1.0001, 0.0), (-0.5, 1.5, 0.1)]
OUT_OF_RANGE = {
    "minus one": ((-1.0, 1.0), r"got -1 to 1: map images in \[-1, 1\] with \(x \+ 1\) / 2"),
    "bytes": ((0.0, 255.0), "got 0 to 255: divide by 255"),
    "sixteen bits": ((0.0, 65535.0), r"got 0 to 6\.55.*: divide by 65535"),
    "standardised": ((-2.1, 2.6), r"got -2\.1 to 2\.6: scale them"),
}


@pytest.mark.parametrize(("low", "high", "noise"), IN_RANGE)
def test_ranges_that_images_may_have(low, high, noise):
    images.check_range(torch.tensor([low, high]), noise)
    images.check_range(torch.zeros(0, 3, 4, 4))


@pytest.mark.parametrize("case", OUT_OF_RANGE)
def test_ranges_are_named_with_their_remedy(case):
    (low, high), words = OUT_OF_RANGE[case]
    with pytest.raises(ValueError, match=rf"images must be in \[0, 1\]; {words}"):
        images.check_range(torch.linspace(low, high, 9))


def test_callers_images_are_decoded_as_files_are(tmp_path):
    """Orientation, alpha and depth: the rules are those of tests/data/test_decode.py."""
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = photos(1, 4, 6, 3)[0]
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    with Image.open(tmp_path / "a.png") as image:
        turned = as_tensor(image, (3, 6, 4))
    expected = np.rot90(pixels, -1).copy()
    assert torch.equal(turned, as_tensor(expected[None], (3, 6, 4)))
    deep = Image.fromarray(pixels[..., 0].astype(np.uint16) << 8)
    assert torch.equal(as_tensor(deep, (1, 4, 6)), as_tensor(pixels[None, ..., :1], (1, 4, 6)))
    assert float(as_tensor(Image.new("RGBA", (6, 4)), (3, 4, 6)).min()) == 1  # on white
    with pytest.raises(ValueError, match=r"PIL image 1 has floating-point pixels, .* got 0 to 9"):
        as_tensor([deep, Image.fromarray(np.float32([[0, 9]]))], (1, 4, 6))


def test_no_images_are_images_too():
    assert as_tensor(torch.zeros(0, 3, 4, 4), (3, 4, 4)).shape == (0, 3, 4, 4)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (torch.zeros(3, 4, 4), r"images \(N, 3, 4, 4\); got \(3, 4, 4\)"),
        (torch.zeros(2, 1, 4, 4), r"images \(N, 3, 4, 4\); got \(2, 1, 4, 4\)"),
        (torch.zeros(2, 3, 4, 5), r"got \(2, 3, 4, 5\)"),
        (torch.full((1, 3, 4, 4), torch.nan), "NaN or infinite"),
        (torch.full((1, 3, 4, 4), -torch.inf), "NaN or infinite"),
        (torch.zeros(1, 3, 4, 4, dtype=torch.int64), "floating point in .* or uint8; got"),
        (torch.zeros(1, 3, 4, 4, dtype=torch.bool), "floating point in .* or uint8; got"),
        (np.zeros((1, 4, 4, 3)), r"arrays of images must be uint8 \(N, H, W, C\); got float64"),
        (np.zeros((4, 4, 3), np.uint8), r"must be uint8 \(N, H, W, C\); got uint8 \(4, 4, 3\)"),
        (np.zeros((1, 3, 4, 4), np.uint8), r"images \(N, 3, 4, 4\); got \(1, 4, 3, 4\)"),
        (Image.new("RGB", (5, 4)), r"got \(1, 3, 4, 5\)"),
        ([Image.new("L", (4, 4)), Image.new("L", (5, 4))], "images of different sizes"),
        ([], "must be a tensor, a uint8 array or PIL images; got list"),
        ("photo.png", "got str"),
        (None, "got NoneType"),
    ],
)
def test_what_is_no_image_is_refused(given, words):
    with pytest.raises(ValueError, match=words):
        as_tensor(given, (3, 4, 4))


def test_quantisation_rounds_to_nearest_and_clips():
    x = torch.tensor([-3.0, 0, 0.49 / 255, 0.51 / 255, 1.49 / 255, 0.5, 254.51 / 255, 1, 7])
    expected = [0, 0, 0, 1, 1, 128, 255, 255, 255]
    assert images.to_uint8(x[None, None, None])[0, 0, :, 0].tolist() == expected


def test_bytes_survive_the_round_trip():
    array = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    np.testing.assert_array_equal(images.to_uint8(as_tensor(array, (1, 16, 16))), array)


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
def test_pil_images_are_the_bytes(channels, mode):
    x = field(2, channels, 5, 7)
    for image, array in zip(to_pil(x), images.to_uint8(x), strict=True):
        assert (image.mode, image.size) == (mode, (7, 5))
        np.testing.assert_array_equal(np.asarray(image).reshape(5, 7, channels), array)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("n", "columns", "rows"), [(5, 2, 3), (1, 1, 1), (6, 3, 2), (2, 4, 1)])
def test_grids_hold_every_image_in_its_place(n, columns, rows, channels):
    x, gap, scale = field(n, channels, 3, 5), 2, 2
    sheet = make_grid(x, columns, scale=scale, gap=gap)
    assert sheet.shape == (rows * (6 + gap) + gap, columns * (10 + gap) + gap, 3)
    left = sheet.copy()
    for i, tile in enumerate(images.to_uint8(x)):
        top, side = gap + i // columns * 8, gap + i % columns * 12
        for dy in range(scale):
            for dx in range(scale):
                seen = sheet[top + dy : top + 6 : scale, side + dx : side + 10 : scale]
                np.testing.assert_array_equal(seen, np.broadcast_to(tile, (3, 5, 3)))
        left[top : top + 6, side : side + 10] = 255
    assert (left == 255).all()


@pytest.mark.parametrize(
    ("size", "scale"), [((8, 8), 6), ((5, 40), 2), ((48, 3), 1), ((64, 64), 1)]
)
def test_small_images_are_enlarged_and_grids_are_square(size, scale):
    sheet = make_grid(torch.zeros(7, 1, *size))
    assert sheet.shape[:2] == tuple(3 * (s * scale + 2) + 2 for s in size)


def test_a_grid_of_nothing_is_refused():
    with pytest.raises(ValueError, match="at least one image"):
        make_grid(torch.zeros(0, 3, 4, 4))


@pytest.mark.parametrize("channels", [1, 3])
def test_png_files_hold_the_bytes(tmp_path, channels):
    array, path = photos(1, 5, 7, channels)[0], tmp_path / "deep" / "er" / "a.png"
    save_png(array, path)
    with Image.open(path) as image:
        assert (image.format, image.mode) == ("PNG", {1: "L", 3: "RGB"}[channels])
        np.testing.assert_array_equal(np.asarray(image).reshape(5, 7, channels), array)
    assert [p.name for p in path.parent.iterdir()] == ["a.png"]


def test_grids_are_written_as_they_are_returned(tmp_path):
    grid = save_grid(field(3, 1, 4, 4), str(tmp_path / "grid"), 2)
    with Image.open(tmp_path / "grid") as image:
        np.testing.assert_array_equal(np.asarray(image), grid)


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    save_png(photos(1, 4, 4, 3)[0], path)
    before = path.read_bytes()

    def fail(self, target, format):
        target.write_bytes(b"half an im")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(OSError, match=r"cannot write .*a\.png: No space left .* Nothing was chang"):
        save_png(photos(1, 4, 4, 3, seed=1)[0], path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("index", "name"),
    [
        (0, "000000/000000.png"),
        (999, "000000/000999.png"),
        (1000, "001000/001000.png"),
        (54_321, "054000/054321.png"),
        (1_234_567, "1234000/1234567.png"),
    ],
)
def test_paths_of_samples(tmp_path, index, name):
    assert sample_path(tmp_path, index) == tmp_path / name


@pytest.mark.parametrize("channels", [2, 4])
def test_pictures_are_grey_or_rgb(channels):
    images = torch.rand(2, channels, 4, 4)
    for make in (make_grid, to_pil):
        with pytest.raises(ValueError, match=f"grey or RGB; got {channels} channels"):
            make(images)
