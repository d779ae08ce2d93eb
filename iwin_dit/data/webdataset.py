"""WebDataset tars as an image source: members that share a key are a sample, `0001.jpg` beside `0001.cls`.

Local tars only, read from front to end with the standard library; nothing is extracted to disk. The webdataset library
is not used, since its decoders unpickle. Knows nothing of what becomes of the images.
"""

import operator
import re
import tarfile
from collections.abc import Iterator
from functools import partial
from itertools import groupby, product
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from .images import EXTENSIONS, read_image
from .sources import Item, check_label, files_fingerprint

_PICKLES = {"pyd", "pkl", "pickle", "pth", "pt"}  # what the webdataset library would unpickle
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_BUFFER = 2**20  # bytes per read of a tar


class _Member(NamedTuple):
    """A file of a tar: its sample, what it is of that sample, and its content where that is wanted."""

    key: str  # the path up to the first dot of the last part
    extension: str  # what follows, in lower case, without the dot
    content: bytes


class WebDataset:
    """Images and labels in tars; each tar is a part.

    A sample's members must follow each other, as in every WebDataset. Members of other extensions are left alone, and
    so are directories and names without a key or an extension (`.DS_Store`). The fingerprint is of the tars' names and
    sizes.

    Args:
        pattern: Path of a tar, with ranges (`{00000..00099}`, every one of which must exist) or as a glob (`*.tar`).
        image_extension: Extension of the images ("jpg"); None: any that names an image, once in a sample.
        label_extension: Extension of the labels, text files that hold one integer.
        class_names: Names by label.

    Raises:
        ValueError: A tar is missing, or none matches the pattern.
    """

    def __init__(
        self, pattern: str, image_extension: str | None, label_extension: str, class_names: tuple[str, ...]
    ) -> None:
        self.description = pattern
        self.class_names = class_names
        self.num_ignored = 0
        self._tars = find_tars(pattern)
        self.fingerprint = files_fingerprint((tar.name, tar.stat().st_size) for tar in self._tars)
        self.num_parts = len(self._tars)
        self._image_extensions = (
            {extension.removeprefix(".") for extension in EXTENSIONS} if image_extension is None else {image_extension}
        )
        self._label_extension = label_extension

    def items(self, part: int) -> Iterator[Item]:
        """Yield the images of one tar in its order.

        Args:
            part: Which tar.

        Yields:
            The images; they hold their bytes.

        Raises:
            ValueError: The tar is damaged, has a member that is refused, a sample without exactly one image and one
                label, a label out of range, or no sample.
        """
        tar = self._tars[part]
        wanted = self._image_extensions | {self._label_extension}
        found = False
        for key, members in groupby(_members(tar, wanted), key=lambda member: member.key):
            found = True
            yield self._item(f"{tar}/{key}", list(members))
        if not found:
            raise ValueError(f"no samples in {tar}")

    def _item(self, key: str, members: list[_Member]) -> Item:
        images = [member for member in members if member.extension in self._image_extensions]
        labels = [member.content for member in members if member.extension == self._label_extension]
        if len(images) != 1 or len(labels) != 1:
            raise ValueError(
                f"expected one image (.{', .'.join(sorted(self._image_extensions))}) and one label "
                f"(.{self._label_extension}), one after the other, for {key}; found "
                f"{', '.join('.' + member.extension for member in members)} (data.image_key and data.label_key choose)"
            )
        text = labels[0].strip()
        if not re.fullmatch(rb"-?\d{1,18}", text):
            raise ValueError(f"expected an integer in {key}.{self._label_extension}, got {text[:40]!r}")
        name = f"{key}.{images[0].extension}"
        label = check_label(int(text), len(self.class_names), name)
        return Item.of_one(name, label, partial(read_image, images[0].content, name))


def find_tars(pattern: str) -> list[Path]:
    """List the tars of a pattern, in the order of its ranges or, for a glob, of the names.

    Args:
        pattern: As for `WebDataset`.

    Returns:
        The paths, at least one; all are files.

    Raises:
        ValueError: One is missing, or none matches.
    """
    if _RANGE.search(pattern):
        # "a-{08..10}.tar" splits into "a-", "08", "10", ".tar": text and bounds by turns.
        pieces = _RANGE.split(pattern)
        bounds = zip(pieces[1::3], pieces[2::3], strict=True)
        numbers = [[f"{i:0{len(first)}}" for i in range(int(first), int(last) + 1)] for first, last in bounds]
        names = ["".join(map(operator.add, pieces[::3], (*chosen, ""))) for chosen in product(*numbers)]
        tars = [Path(name) for name in names]
    elif Path(pattern).is_file():
        tars = [Path(pattern)]
    else:
        anchor = Path(pattern).anchor
        tars = sorted(Path(anchor).glob(pattern.removeprefix(anchor)))
    missing = [str(tar) for tar in tars if not tar.is_file()]
    if missing:
        raise ValueError(f"{len(missing)} of the {len(tars)} tars of {pattern!r} are missing: {', '.join(missing[:5])}")
    if not tars:
        raise ValueError(f"expected tars, got {pattern!r}, which matches no file")
    return tars


def _members(tar: Path, wanted: set[str]) -> Iterator[_Member]:
    """Yield the files of `tar` whose extension is wanted; refuse the whole tar at a member it should not have."""
    try:
        with tarfile.open(tar, "r|", bufsize=_BUFFER) as archive:
            for info in archive:
                _check_member(tar, info)
                folder, slash, name = info.name.rpartition("/")
                stem, _, extension = name.partition(".")
                if info.isfile() and stem and extension.lower() in wanted:
                    file = archive.extractfile(info)
                    assert file is not None  # only for what is not a file
                    yield _Member(folder + slash + stem, extension.lower(), file.read())
            end = archive.offset
    except tarfile.TarError as error:
        raise ValueError(f"{tar} is truncated or not a tar: {error}; get it again") from error
    with tar.open("rb") as raw:  # tarfile takes a damaged header for the end, which is a block of zeros
        raw.seek(end)
        if raw.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise ValueError(f"{tar} is truncated or damaged: no end mark at byte {end}; get it again")


def _check_member(tar: Path, info: tarfile.TarInfo) -> None:
    """Raise a ValueError for a member that has no place in a data set, wherever it would have been used."""
    path = PurePosixPath(info.name.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts:
        problem = "its path leaves the tar"
    elif not (info.isfile() or info.isdir()) or info.issparse():
        problem = "it is a link, a device or a sparse file"
    elif info.isfile() and _PICKLES & set(path.name.lower().split(".")[1:]):
        problem = "it may be a pickle, which can run code"
    else:
        return
    raise ValueError(f"refused {tar}: member {info.name!r}: {problem}")
