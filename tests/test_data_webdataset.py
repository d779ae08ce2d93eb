"""WebDataset tars: how members become samples, and which tars are refused."""

import io
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from iwin_dit.data.images import BrokenImageError
from iwin_dit.data.webdataset import WebDataset, find_tars
from tests.corpus import BLUE, RED, encode
from tests.test_data_sources import open_like_a_config

PNG = {colour: encode(Image.new("RGB", (4, 4), colour)) for colour in (RED, BLUE)}
NAMES = ("0", "1", "2")


def write_tar(path: Path, *members: tuple[str, bytes] | tarfile.TarInfo) -> Path:
    """A tar of files, given by name and content, and of other members."""
    with tarfile.open(path, "w") as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                tar.addfile(info, io.BytesIO(member[1]))
    return path


def pair(key: str, colour: tuple[int, int, int] = RED, label: bytes = b"1") -> list[tuple[str, bytes]]:
    return [(f"{key}.png", PNG[colour]), (f"{key}.cls", label)]


def read_tar(path: Path, image: str | None = None, label: str = "cls") -> list[tuple[str, int]]:
    return [(sample.key, sample.label) for sample in WebDataset(str(path), image, label, NAMES).items(0)]


def test_members_that_share_a_key_are_a_sample(tmp_path: Path) -> None:
    directory = tarfile.TarInfo("b")
    directory.type = tarfile.DIRTYPE
    others = [("a.json", b"{}"), (".DS_Store", b"?"), ("README", b"?"), directory]
    write_tar(tmp_path / "x-08.tar", *pair("a", RED, b" 2\n"), *others, *reversed(pair("b/a", BLUE, b"0")))
    write_tar(tmp_path / "x-09.tar", ("c.seg.png", b"?"), ("c.cls", b"1"), ("c.PNG", PNG[BLUE]))
    source = open_like_a_config(tmp_path / "x-{08..09}.tar")
    assert (source.num_parts, source.class_names) == (2, NAMES)
    first, second = (list(source.items(part)) for part in range(2))
    assert [(s.key, s.label) for s in first] == [(f"{tmp_path}/x-08.tar/a.png", 2), (f"{tmp_path}/x-08.tar/b/a.png", 0)]
    assert [(s.key, s.label) for s in second] == [(f"{tmp_path}/x-09.tar/c.png", 1)]
    assert [s.read()[0].getpixel((0, 0)) for s in first + second] == [RED, BLUE, BLUE]


def test_extensions_can_be_chosen(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "x.tar", ("a.jpg", b"?"), ("a.seg.png", PNG[BLUE]), ("a.id.txt", b"2"))
    (sample,) = open_like_a_config(tar, image_key="seg.png", label_key="id.txt").items(0)
    assert (sample.label, sample.read()[0].getpixel((0, 0))) == (2, BLUE)
    (broken,) = open_like_a_config(tar, image_key="jpg", label_key="id.txt").items(0)
    with pytest.raises(BrokenImageError, match=r"x.tar/a.jpg"):
        broken.read()


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("a.png", b"")], r"x.tar/a; found .png \("),
        ([("a.cls", b"1")], "x.tar/a; found .cls "),
        ([*pair("a"), ("a.jpg", b"")], "x.tar/a; found .png, .cls, .jpg "),
        ([*pair("a"), ("a.cls", b"2")], "x.tar/a; found .png, .cls, .cls "),
        ([("a.png", b""), ("b.png", b""), ("a.cls", b"")], "x.tar/a; found .png "),  # not one after the other
        (pair("a", label=b"cat"), r"integer in .*x.tar/a.cls, got b'cat'"),
        (pair("a", label="١".encode()), "integer in"),  # a digit, not of ASCII
        (pair("a", label=b"3"), r"from 0 to 2 \(3 classes\), got 3 in .*x.tar/a.png"),
        (pair("a", label=b"-1"), "got -1 in .*x.tar/a.png"),
        ([("a.txt", b"")], "no samples in .*x.tar"),
    ],
)
def test_samples_that_are_none(members: list[tuple[str, bytes]], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        read_tar(write_tar(tmp_path / "x.tar", *members))


@pytest.mark.parametrize(
    "name",
    ["/etc/x.png", "../../x.png", "a/../x.png", r"..\x.png", "a.pyd", "a.pkl", "a.PICKLE", "a.pth", "a.pt", "a.pkl.gz"],
)
def test_members_that_are_refused(name: str, tmp_path: Path) -> None:
    before = sorted(tmp_path.parent.rglob("*"))
    tar = write_tar(tmp_path / "x.tar", *pair("a"), (name, PNG[RED]))
    with pytest.raises(
        ValueError, match=r"refused .*x.tar: member '.*': (its path leaves|it may be a pickle)"
    ) as error:
        read_tar(tar)
    assert repr(name) in str(error.value)
    tar.unlink()
    assert sorted(tmp_path.parent.rglob("*")) == before  # nothing was written


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE])
def test_members_that_are_no_files_are_refused(kind: bytes, tmp_path: Path) -> None:
    member = tarfile.TarInfo("a.png")
    member.type = kind
    member.linkname = "/etc/passwd"
    with pytest.raises(ValueError, match=r"x.tar: member 'a.png': it is a link, a device"):
        read_tar(write_tar(tmp_path / "x.tar", member, ("a.cls", b"1")))


def test_a_sparse_member_is_refused_before_it_is_filled_with_zeros(tmp_path: Path) -> None:
    member = tarfile.TarInfo("a.png")
    member.pax_headers = {"GNU.sparse.major": "0", "GNU.sparse.map": "0,0", "GNU.sparse.size": str(2**50)}
    with pytest.raises(ValueError, match="or a sparse file"):
        read_tar(write_tar(tmp_path / "x.tar", member, ("a.cls", b"1")))


@pytest.mark.parametrize("size", [0, 100, 512 + 50, 1024, 4 * 512, 5 * 512, 5 * 512 + 3])
def test_a_truncated_tar_is_named(size: int, tmp_path: Path) -> None:
    """Cut in a header, in a member and at the borders between, where the standard library sees nothing wrong."""
    tar = write_tar(tmp_path / "x.tar", *pair("a"), *pair("b"))
    tar.write_bytes(tar.read_bytes()[:size])
    with pytest.raises(ValueError, match=r"x.tar is truncated or"):
        read_tar(tar)


@pytest.mark.parametrize("offset", [100, 4 * 512 + 100])
def test_a_damaged_header_is_no_end(offset: int, tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "x.tar", *pair("a"), *pair("b"))
    content = bytearray(tar.read_bytes())
    content[offset] ^= 1
    tar.write_bytes(content)
    with pytest.raises(ValueError, match=r"x.tar is truncated or"):
        read_tar(tar)


def test_tars_are_found_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = [f"{kind}-{i:02}.tar" for kind in ("1", "2") for i in (8, 9, 10)]
    for name in names:
        Path(name).touch()
    assert [str(tar) for tar in find_tars("{1..2}-{08..10}.tar")] == names
    assert [str(tar) for tar in find_tars("2-{08..10}.tar")] == names[3:]
    assert find_tars(f"{tmp_path}/1-*.tar") == [tmp_path / name for name in names[:3]]
    assert find_tars("1-08.tar") == [Path("1-08.tar")]
    with pytest.raises(ValueError, match=r"2 of the 5 tars of .* are missing: 1-07.tar, 1-11.tar"):
        find_tars("1-{07..11}.tar")
    for pattern in ("3-*.tar", "3.tar", "1-{10..08}.tar"):
        with pytest.raises(ValueError, match="matches no file"):
            find_tars(pattern)
