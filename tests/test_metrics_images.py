"""Sets of images on disk and in memory: what is read, what is refused, what the record says."""

import hashlib
import io
import logging
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

from iwin_dit.data.sources import list_files
from iwin_dit.files import sha256
from iwin_dit.metrics.images import ImageArray, ImageFiles, ImageSet, ImageTensor, ImageZip, open_images
from tests.corpus import encode, png_chunk, png_start


def save(path: Path, size: tuple[int, int] = (5, 4), mode: str = "RGB", seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    bands = len(Image.new(mode, (1, 1)).getbands())
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], bands), dtype=np.uint8)
    Image.fromarray(pixels.squeeze(-1) if bands == 1 else pixels).convert(mode).save(path)
    return path


def pack(folder: Path) -> Path:
    """The files of a folder as a zip beside it."""
    path = folder.with_suffix(".zip")
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.rglob("*.*")):
            archive.write(file, file.relative_to(folder).as_posix())
    return path


def random_images(n: int = 7, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, 4, 5, 3), dtype=np.uint8)


# --- folders and zips


def test_images_come_in_the_order_of_their_paths_bit_for_bit(tmp_path: Path) -> None:
    root = tmp_path / "set"
    paths = [save(root / name, seed=i) for i, name in enumerate(["a/1.png", "a/2.PNG", "b/0.bmp", "c.png"])]
    (root / "notes.txt").write_text("no image")
    (root / "a" / "._1.png").write_text("what macOS leaves behind")
    files, zipped = ImageFiles(root, allow_lossy=False), ImageZip(pack(root), allow_lossy=False)
    assert files.paths == paths
    for images in (files, zipped):
        assert len(images) == 4
        assert images.size == (4, 5)
        batch = images.read(range(4))
        assert batch.shape == (4, 3, 4, 5)
        assert batch.dtype == torch.uint8
        for image, path in zip(batch, paths, strict=True):
            assert np.array_equal(image.permute(1, 2, 0).numpy(), np.asarray(Image.open(path)))
        assert images.read([2, 0, 2]).equal(batch[[2, 0, 2]])
        assert images.read([]).shape == (0, 3, 4, 5)


def test_grayscale_becomes_rgb(tmp_path: Path) -> None:
    for i in range(2):
        save(tmp_path / f"{i}.png", mode="L", seed=i)
    red, green, blue = ImageFiles(tmp_path, allow_lossy=False).read([1])[0]
    assert red.equal(green)
    assert red.equal(blue)


def test_the_hash_is_of_names_and_contents_wherever_they_are_kept_and_whoever_read_them(tmp_path: Path) -> None:
    for folder, seeds in (("a", (0, 1)), ("b", (0, 1)), ("c", (0, 2))):
        for i, seed in enumerate(seeds):
            save(tmp_path / folder / f"{i}.png", seed=seed)
    a, b, c = (ImageFiles(tmp_path / folder, allow_lossy=False) for folder in "abc")
    b.read([1])  # the other one is another process's
    records = [images.record() for images in (a, b, c, ImageZip(pack(tmp_path / "a"), allow_lossy=False))]
    hashes = [record["sha256"] for record in records]
    listing = "".join(f"{sha256(path)}  {path.name}\n" for path in a.paths)
    assert hashes[0] == hashes[1] == hashes[3] == hashlib.sha256(listing.encode()).hexdigest() != hashes[2]
    assert records[0] == {
        "path": str(tmp_path / "a"),
        "n": 2,
        "image_size": [4, 5],
        "stored_as": {"PNG": 2},
        "ignored": 0,
        "sha256": hashes[0],
        "duplicates": 0,
    }


def test_a_folder_is_read_by_one_rule_whatever_is_linked_or_hidden_and_so_is_its_zip(tmp_path: Path) -> None:
    root, elsewhere = tmp_path / "set", tmp_path / "elsewhere"
    names = ["a-b/1.png", "a/b/1.png", "a/1.bmp", "a.png", "z/linked.png", "z/deeper/2.png"]
    for i, name in enumerate(names[:4]):
        save(root / name, seed=i)
    save(elsewhere / "linked.png", seed=4)
    save(elsewhere / "deeper" / "2.png", seed=5)
    (root / "z").symlink_to(elsewhere, target_is_directory=True)
    packed = pack(root)
    with zipfile.ZipFile(packed, "a") as archive:  # as other programs pack, which follow links
        for name in names[4:]:
            archive.write(root / name, name)
    (elsewhere / "deeper" / "back").symlink_to(root, target_is_directory=True)
    (root / "a" / "self").symlink_to(root / "a", target_is_directory=True)
    save(root / ".cache" / "1.png")
    save(root / "a" / ".thumbnails" / "deeper" / "1.png")
    (root / "a" / ".DS_Store").write_text("hidden, and so not counted")
    files, zipped = ImageFiles(root, allow_lossy=False), ImageZip(packed, allow_lossy=False)
    assert files.names == zipped.names == sorted(names)
    assert [path.relative_to(root).as_posix() for path in files.paths] == files.names
    records = [images.record() for images in (files, zipped)]
    assert records[0]["sha256"] == records[1]["sha256"]
    assert [record["duplicates"] for record in records] == [0, 0]
    assert {str(path) for path in files.paths} == set(list_files(root))  # the rule by which latents are made


def test_the_record_says_how_images_are_stored_and_what_was_ignored(tmp_path: Path) -> None:
    root = tmp_path / "set"
    for i, name in enumerate(["0.png", "1.png", "2.bmp", "3.jpg", "4.webp"]):
        save(root / name, seed=i)
    save(root / "5.jpg", seed=5).rename(root / "5.png")
    for name in ("dataset.json", "a.gif"):
        (root / name).write_text("no image of the set")
    for images in (ImageFiles(root, allow_lossy=True), ImageZip(pack(root), allow_lossy=True)):
        record = images.record()
        assert record["stored_as"] == {"BMP": 1, "JPEG": 2, "PNG": 2, "WEBP": 1}
        assert record["ignored"] == 2


def test_copies_are_counted_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = tmp_path / "set"
    for i, seed in enumerate((0, 1, 1, 1, 0)):
        save(root / f"{i}.png", seed=seed)
    images = random_images()
    np.savez(tmp_path / "images.npz", arr_0=images[[0, 1, 1, 1, 0]])
    sets: list[ImageSet] = [
        ImageFiles(root, allow_lossy=False),
        ImageZip(pack(root), allow_lossy=False),
        ImageArray(tmp_path / "images.npz"),
        ImageTensor(torch.from_numpy(images[[0, 1, 1, 1, 0]]).permute(0, 3, 1, 2), "five"),
    ]
    for copies in sets:
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert copies.record()["duplicates"] == 3
        assert f"{copies.name}: 3 of 5 images repeat another one" in caplog.text


@pytest.mark.parametrize("kind", [ImageFiles, ImageZip])
def test_sets_that_cannot_count_are_refused(tmp_path: Path, kind: type[ImageFiles] | type[ImageZip]) -> None:
    def opened() -> ImageSet:
        path = tmp_path / "set"
        return kind(path if kind is ImageFiles else pack(path), allow_lossy=False)

    with pytest.raises(FileNotFoundError, match=r"expected a.*, got .*missing, which is no"):
        kind(tmp_path / "missing", allow_lossy=True)
    (tmp_path / "set").mkdir()
    with pytest.raises(ValueError, match=r"at least 2 images .* got 0"):
        opened()
    save(tmp_path / "set" / "0.png")
    with pytest.raises(ValueError, match=r"at least 2 images .* got 1"):
        opened()
    save(tmp_path / "set" / "1.png", size=(6, 4))
    with pytest.raises(ValueError, match=r"one size in .*, got 1 of 4 x 5, 1 of 4 x 6"):
        opened()


@pytest.mark.parametrize(("suffix", "name"), [("jpg", "JPEG"), ("webp", "WEBP")])
def test_lossy_formats_are_for_references_only(tmp_path: Path, suffix: str, name: str) -> None:
    for i in range(2):
        save(tmp_path / f"{i}.{suffix}")
    assert len(ImageFiles(tmp_path, allow_lossy=True)) == 2
    with pytest.raises(ValueError, match=rf"0\.{suffix} is {name}, a lossy format, .* as PNG or BMP"):
        ImageFiles(tmp_path, allow_lossy=False)


def test_several_jpegs_in_a_file_are_jpeg(tmp_path: Path) -> None:
    for i in range(2):
        image = Image.new("RGB", (5, 4), (i, 0, 0))
        image.save(tmp_path / f"{i}.jpg", format="MPO", save_all=True, append_images=[image])
    with pytest.raises(ValueError, match=r"0\.jpg is MPO, a lossy format"):
        ImageFiles(tmp_path, allow_lossy=False)


def test_a_jpeg_named_png_is_a_jpeg(tmp_path: Path) -> None:
    for i in range(2):
        save(tmp_path / f"{i}.jpg").rename(tmp_path / f"{i}.png")
    with pytest.raises(ValueError, match=r"0\.png is JPEG"):
        ImageFiles(tmp_path, allow_lossy=False)
    with pytest.raises(ValueError, match=r"0\.png in .* is JPEG"):
        ImageZip(pack(tmp_path), allow_lossy=False)


@pytest.mark.parametrize("mode", ["RGBA", "P", "LA", "I;16", "1"])
def test_modes_without_one_meaning_are_refused(tmp_path: Path, mode: str) -> None:
    for i in range(2):
        Image.new(mode, (5, 4)).save(tmp_path / f"{i}.png")
    with pytest.raises(ValueError, match=f"is {mode}: convert it first"):
        ImageFiles(tmp_path, allow_lossy=False)


def test_a_transparent_colour_is_refused(tmp_path: Path) -> None:
    for i in range(2):
        Image.new("RGB", (5, 4)).save(tmp_path / f"{i}.png", transparency=(0, 0, 0))
    with pytest.raises(ValueError, match="transparent colour"):
        ImageFiles(tmp_path, allow_lossy=False)


def oriented(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return exif


@pytest.mark.parametrize("suffix", ["jpg", "webp", "png"])
def test_images_that_viewers_turn_are_refused(tmp_path: Path, suffix: str) -> None:
    root = tmp_path / "set"
    root.mkdir()
    for i in range(3):  # upright, and what means nothing
        Image.new("RGB", (5, 5), (i, 0, 0)).save(root / f"{i}.{suffix}", exif=oriented((1, 0, 9)[i]))
    assert ImageFiles(root, allow_lossy=True).read(range(3)).shape == (3, 3, 5, 5)
    for orientation in range(2, 9):
        Image.new("RGB", (5, 5)).save(root / f"1.{suffix}", exif=oriented(orientation))
        for kind, path in ((ImageFiles, root), (ImageZip, pack(root))):
            message = rf"1\.{suffix}.* is stored turned or mirrored \(EXIF orientation {orientation}\).*"
            with pytest.raises(ValueError, match=message + r"save it upright, or .*`evaluate_fid\.py reference`"):
                kind(path, allow_lossy=True)


def test_a_png_may_say_after_its_pixels_that_it_is_to_be_turned(tmp_path: Path) -> None:
    for i in range(2):
        content = encode(Image.new("RGB", (5, 5), (i, 0, 0)))
        end = content.rindex(b"IEND") - 4
        exif = png_chunk(b"eXIf", oriented(6).tobytes().removeprefix(b"Exif\0\0"))
        (tmp_path / f"{i}.png").write_bytes(content[:end] + exif + content[end:])
    files = ImageFiles(tmp_path, allow_lossy=False)
    with pytest.raises(ValueError, match=r"0\.png is stored turned or mirrored \(EXIF orientation 6\)"):
        files.read([0, 1])


def test_broken_files_are_named(tmp_path: Path) -> None:
    whole, cut = save(tmp_path / "0.png", size=(64, 64)), save(tmp_path / "1.png", size=(64, 64), seed=1)
    cut.write_bytes(cut.read_bytes()[:2000])
    files = ImageFiles(tmp_path, allow_lossy=False)  # the header is whole
    with pytest.raises(ValueError, match=r"1\.png is broken"):
        files.read([0, 1])
    save(cut, size=(32, 32))
    with pytest.raises(ValueError, match=r"1\.png has become another image"):
        files.read([0, 1])
    whole.write_text("no image at all")
    with pytest.raises(ValueError, match=r"0\.png is no usable image"):
        ImageFiles(tmp_path, allow_lossy=False)


def test_decompression_bombs_are_refused(tmp_path: Path) -> None:
    for side in (9_000, 30_000):  # below Pillow's own limits, and above
        for i in range(2):
            (tmp_path / f"{i}.png").write_bytes(png_start(side, side) + png_chunk(b"IDAT", b""))
        with pytest.raises(ValueError, match=r"0\.png is no usable image: .*(expected at most|exceeds limit)"):
            ImageFiles(tmp_path, allow_lossy=False)


def test_a_zip_is_read_and_never_extracted(tmp_path: Path) -> None:
    path, content = tmp_path / "in" / "images.zip", encode(Image.new("RGB", (5, 4), (1, 2, 3)))
    path.parent.mkdir()
    names = ["../../outside.png", "/absolute.png", "b.png", "__MACOSX/._b.png", "dataset.json", "c.png/"]
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, content if not name.endswith("/") else b"")
    images = ImageZip(path, allow_lossy=False)
    assert images.names == ["../../outside.png", "/absolute.png", "b.png"]
    assert images.read(range(3))[:, :, 0, 0].tolist() == [[1, 2, 3]] * 3
    assert [p.name for p in tmp_path.rglob("*")] == ["in", "images.zip"]


def test_a_damaged_zip_is_refused(tmp_path: Path) -> None:
    for i in range(2):
        save(tmp_path / "set" / f"{i}.bmp", size=(64, 64), seed=i)  # whose pixels have no checksum of their own
    path = pack(tmp_path / "set")
    whole = path.read_bytes()
    pixel = whole.rindex((tmp_path / "set" / "1.bmp").read_bytes()[-30:])
    path.write_bytes(whole[:pixel] + b"?" + whole[pixel + 1 :])
    with pytest.raises(ValueError, match=r"1\.bmp in .*set\.zip is broken: Bad CRC"):
        ImageZip(path, allow_lossy=False).read([1])
    path.write_bytes(whole[:-30])
    with pytest.raises(ValueError, match="no zip archive, or not all of one"):
        ImageZip(path, allow_lossy=False)


# --- arrays


@pytest.mark.parametrize("write", [np.savez, np.savez_compressed])
def test_arrays_are_read_by_index_in_any_order(tmp_path: Path, write: type) -> None:
    path, images = tmp_path / "images.npz", random_images(23)
    write(path, arr_0=images, arr_1=np.arange(23))
    array = ImageArray(path)
    assert len(array) == 23
    assert array.size == (4, 5)
    for indices in ([0, 1, 2], [5, 6], [22], [3, 3, 1], range(23), [], [7, 2]):
        batch = array.read(indices)
        assert np.array_equal(batch.permute(0, 2, 3, 1).numpy(), images[list(indices)]), indices
    assert array.record() == {
        "path": str(path),
        "n": 23,
        "image_size": [4, 5],
        "sha256": sha256(path),
        "duplicates": 0,
    }


def test_arrays_are_read_in_several_threads(tmp_path: Path) -> None:
    images = random_images(200)
    np.savez_compressed(tmp_path / "images.npz", arr_0=images)
    array, wrong = ImageArray(tmp_path / "images.npz"), []

    def read(start: int) -> None:
        for i in range(start, 200, 8):
            if not np.array_equal(array.read([i])[0].permute(1, 2, 0).numpy(), images[i]):
                wrong.append(i)

    threads = [threading.Thread(target=read, args=(start,)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"mu": np.zeros(3)}, r"expected images as 'arr_0' in .*, got the arrays \['mu'\]"),
        ({"arr_0": np.zeros((3, 4, 5, 3))}, r"uint8 \(N, H, W, 3\), at least 2 images, got float64 \(3, 4, 5, 3\)"),
        ({"arr_0": np.zeros((3, 3, 4, 5), np.uint8)}, r"got uint8 \(3, 3, 4, 5\)"),
        ({"arr_0": np.zeros((1, 4, 5, 3), np.uint8)}, r"at least 2 images, got uint8 \(1, 4, 5, 3\)"),
        ({"arr_0": np.array([object()] * 3)}, "got object"),
        ({"arr_0": np.asfortranarray(random_images())}, "Fortran order"),
        ({"arr_0": np.zeros((2, 0, 5, 3), np.uint8)}, "got 0 x 5"),
    ],
)
def test_arrays_that_are_no_images_are_refused(tmp_path: Path, arrays: dict[str, np.ndarray], message: str) -> None:
    path = tmp_path / "bad.npz"
    np.savez(path, **arrays)
    with pytest.raises(ValueError, match=message) as caught:
        ImageArray(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("shape", [(1 << 40, 4, 5, 3), (2, 1 << 20, 1 << 20, 3), (5, 4, 5, 3)])
def test_headers_that_lie_about_their_content_are_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    path, header = tmp_path / "bad.npz", io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": shape})
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("arr_0.npy", header.getvalue() + bytes(240))  # four images, whatever the header says
    with pytest.raises(ValueError, match=r"bytes by its header, but the archive holds 240"):
        ImageArray(path)


@pytest.mark.parametrize("write", [np.savez, np.savez_compressed])
def test_damaged_arrays_are_refused(tmp_path: Path, write: type) -> None:
    path, images = tmp_path / "images.npz", random_images(500)
    write(path, arr_0=images)
    content = path.read_bytes()
    middle = len(content) // 2
    path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    with pytest.raises(ValueError, match=r"images\.npz is damaged"):
        ImageArray(path).read(range(500))
    array = ImageArray(path)
    array.read([0, 1])  # this process's share, before the damage
    with pytest.raises(ValueError, match=r"images\.npz is damaged"):
        array.record()
    path.write_bytes(content[:middle])
    with pytest.raises(ValueError, match="no zip archive, or not all of one"):
        ImageArray(path)


# --- tensors and `open_images`


def test_tensors_of_images_and_of_clips() -> None:
    images = torch.from_numpy(random_images()).permute(0, 3, 1, 2)
    tensor = ImageTensor(images, "seven")
    assert tensor.read([4, 1]).equal(images[[4, 1]])
    assert tensor.name == "seven"
    digest = hashlib.sha256(images.contiguous().numpy().tobytes()).hexdigest()
    assert tensor.record() == {"n": 7, "image_size": [4, 5], "sha256": digest, "duplicates": 0}
    clips = images[:6].reshape(3, 2, 3, 4, 5)
    assert ImageTensor(clips, "three").read([2]).equal(clips[2:])
    with pytest.raises(ValueError, match=r"at least 2 uint8 images \(N, 3, H, W\) or clips"):
        ImageTensor(images.float(), "floats")


def test_a_set_is_opened_by_what_it_is(tmp_path: Path) -> None:
    root = tmp_path / "set"
    for i in range(2):
        save(root / f"{i}.jpg", seed=i)
    np.savez(tmp_path / "set.npz", arr_0=random_images())
    opened = [open_images(path, allow_lossy=True) for path in (root, pack(root), tmp_path / "set.npz")]
    assert [type(images) for images in opened] == [ImageFiles, ImageZip, ImageArray]
    assert [images.name for images in opened] == [str(tmp_path / name) for name in ("set", "set.zip", "set.npz")]
    assert all(images.prefetch for images in opened)
    for path in (root, root.with_suffix(".zip")):
        with pytest.raises(ValueError, match="is JPEG"):
            open_images(path, allow_lossy=False)
    with pytest.raises(FileNotFoundError, match="which does not exist"):
        open_images(tmp_path / "missing", allow_lossy=True)
    with pytest.raises(ValueError, match=r"expected a folder of images, a \.zip or an \.npz, got the file"):
        open_images(root / "0.jpg", allow_lossy=True)
