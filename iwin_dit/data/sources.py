"""Sources: what a data set of images or clips is to this project, the folder of images, and the held-out split.

A source knows where samples and labels come from, in which parts and which order; it decodes nothing before it is asked
to and nothing here knows of sizes, latents, VAEs or models. The other sources (`digits`, `webdataset`, `huggingface`,
`clips`, `moving_digits`) build on this file; `open_source` alone looks back at them. Letter: N number of samples.
"""

import hashlib
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
from PIL import Image

from ..files import list_files
from .images import EXTENSIONS, read_image

if TYPE_CHECKING:
    from .clips import ClipSettings

logger = logging.getLogger(__name__)

BUILT_IN = ("digits", "moving_digits")  # sources that are no files


Picture = Image.Image | list[Image.Image]  # a sample: an image, or the T frames of a clip; RGB and upright


@dataclass(frozen=True)
class Item:
    """What is decoded at once, and not yet is: a labelled image, or a video with all the clips that are cut from it.

    Args:
        key: Names it in messages: a path, a tar and its member, or the row of a data set.
        label: Its class, from 0.
        read: Decodes its samples, in order, frames of any one size. Holds the file's content or path, nothing else. May
            be called in another thread, and raises `BrokenSampleError` for what cannot be used, as a whole.
        count: Number of samples.
    """

    key: str
    label: int
    read: Callable[[], Sequence[Picture]]
    count: int = 1

    @classmethod
    def of_one(cls, key: str, label: int, read: Callable[[], Picture]) -> "Item":
        """An item with one sample, which `read` gives."""
        return cls(key, label, lambda: [read()])

    def sample_key(self, number: int) -> str:
        """Name of one of the samples in messages: of several the third is `key#2`."""
        return self.key if self.count == 1 else f"{self.key}#{number}"


class ImageSource(Protocol):
    """A labelled data set of images or clips in parts, the units of work: any process can do any of them."""

    @property
    def description(self) -> str:
        """Where the samples come from: `data.source` as the user gives it."""

    @property
    def fingerprint(self) -> str:
        """Identify the content, as far as that is known without reading it: other samples, another one."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names by label."""

    @property
    def num_parts(self) -> int:
        """Count the parts, at least 1."""

    @property
    def num_ignored(self) -> int:
        """Count the files whose names say that they are no samples; 0 for sources that are not folders of files."""

    def items(self, part: int) -> Iterator[Item]:
        """Yield the items of one part: always the same ones in the same order, labels in range."""


class ImageFolder:
    """A folder of class folders of images: `root/<class name>/**/*.png`.

    Labels number the class folders in sorted order. Hidden files and folders are left alone, and links are followed.
    Files that are not named as images are left alone, too, and counted in a warning. The fingerprint is of the images'
    paths below `root` and their sizes.

    Args:
        root: The folder that holds the class folders.
        part_size: Images per part; the last part holds the rest.
        class_names: Names by label; by default those of the folders.

    Raises:
        ValueError: The folder is missing, has no class folders or more or fewer than `class_names`, or a class folder
            has no images.
    """

    def __init__(self, root: Path, part_size: int, class_names: tuple[str, ...] | None = None) -> None:
        names = class_folders(root)
        by_class = (sorted(list_files(root / name), key=os.path.split) for name in names)
        files = [(path, label) for label, paths in enumerate(by_class) for path in paths]
        self._images = [(path, label) for path, label in files if path.lower().endswith(EXTENSIONS)]
        counts = np.bincount([label for _, label in self._images], minlength=len(names)).tolist()
        ignored = [path for path, _ in files if not path.lower().endswith(EXTENSIONS)]
        check_class_folders(root, names, counts, ignored, f"images ({', '.join(EXTENSIONS)})")
        self.num_ignored = len(ignored)
        self.description = str(root)
        self.fingerprint = files_fingerprint(
            (Path(path).relative_to(root).as_posix(), Path(path).stat().st_size) for path, _ in self._images
        )
        self.class_names = choose_class_names(class_names, tuple(names), self.description)
        self._part_size = part_size
        self.num_parts = count_parts(len(self._images), part_size)

    def items(self, part: int) -> Iterator[Item]:
        """Yield the images of one part, in the order of class and path."""
        for path, label in self._images[part * self._part_size : (part + 1) * self._part_size]:
            yield Item.of_one(path, label, partial(read_image, Path(path), path))


def class_folders(root: Path) -> list[str]:
    """Names of the class folders in a folder, sorted; a ValueError if it is none, or has none."""
    if not root.is_dir():
        raise ValueError(f"expected a folder of class folders, got {root}, which is not a folder")
    names = sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not names:
        raise ValueError(f"expected class folders in {root} (root/<class name>/...), found no folder there")
    return names


def check_class_folders(root: Path, names: list[str], counts: list[int], ignored: list[str], what: str) -> None:
    """Refuse class folders without samples, and warn of files that are left out.

    Args:
        root: The folder that holds them.
        names: Of the class folders.
        counts: Samples in each.
        ignored: Paths of the files that are no samples.
        what: What they would have to be, as in "named as images (.png)".

    Raises:
        ValueError: A class folder has no samples.
    """
    empty = [name for name, count in zip(names, counts, strict=True) if not count]
    if empty:
        raise ValueError(f"no {what} in these class folders of {root}: {', '.join(empty)}; fill or remove them")
    if ignored:
        logger.warning(
            "%d files in %s are not named as %s and are left out: %s%s",
            *(len(ignored), root, what, ", ".join(ignored[:3]), ", ..." if ignored[3:] else ""),
        )


def files_fingerprint(files: Iterable[tuple[str, int]]) -> str:
    """Identify a set of files by what a listing of them says.

    Args:
        files: Name and size in bytes of each, in any order.

    Returns:
        A sha256 in hex.
    """
    listing = "\n".join(f"{size} {name}" for name, size in sorted(files))
    return hashlib.sha256(listing.encode(errors="surrogateescape")).hexdigest()


def open_source(
    source: str,
    *,
    split: str,
    revision: str | None,
    config: str | None,
    streaming: bool,
    image_key: str | None,
    label_key: str | None,
    class_names: Path | None,
    num_classes: int,
    part_size: int,
    clips: "ClipSettings | None" = None,
) -> ImageSource:
    """Open a source by what the user calls it (`data.source`).

    Args:
        source: Of images, "digits"; a folder of class folders; WebDataset tars as "a.tar", "{00000..00099}.tar" or
            "*.tar"; or "hf:" with the name or folder of a Hugging Face data set. Of clips, "moving_digits" or a folder
            of class folders.
        split: Split of a Hugging Face data set; "train" for the other sources, which have none.
        revision: Commit, branch or tag of a data set on the Hub; None takes the newest.
        config: Configuration of a Hugging Face data set that has several.
        streaming: Read a Hugging Face data set as it comes, instead of downloading it first.
        image_key: Image column of a Hugging Face data set (default "image"), or extension of the images in the tars
            (default: any image extension).
        label_key: Label column of a Hugging Face data set (default "label"), or extension of the labels in the tars
            (default "cls").
        class_names: A text file, a name a line in the order of the labels; by default the names that the source knows,
            else the labels as text.
        num_classes: Number of classes: of the names in `class_names`, and of a source that does not know its own.
        part_size: Samples per part of a source with random access; a tar and a streamed file are a part each.
        clips: How clips are cut; None opens a source of images.

    Returns:
        The source.

    Raises:
        ValueError: It cannot be opened, does not fit `class_names`, or an argument does not apply to it.
        ImportError: It needs a package that is not installed.
    """
    names = None if class_names is None else read_class_names(class_names, num_classes)
    if clips is not None and (source == "digits" or source.startswith("hf:") or source.endswith(".tar")):
        raise ValueError(
            f"expected data.source moving_digits or a folder for clips, got {source!r}, a source of images"
        )
    if clips is None and source == "moving_digits":
        raise ValueError("expected a source of images, got data.source 'moving_digits', which is of clips")
    # Imported where they are used: they build on this file, and bring packages that the other sources do not need.
    if source.startswith("hf:"):
        from .huggingface import HuggingFaceSource

        return HuggingFaceSource(
            source.removeprefix("hf:"),
            split=split,
            revision=revision,
            config=config,
            streaming=streaming,
            image_key=image_key or "image",
            label_key=label_key or "label",
            class_names=names,
            num_classes=num_classes,
            part_size=part_size,
        )
    hub_settings = {
        "source_split": split != "train",
        "source_revision": revision is not None,
        "source_config": config is not None,
        "streaming": streaming,
    }
    _refuse("a Hugging Face data set (hf:...)", source, hub_settings)
    if source.endswith(".tar"):
        from .webdataset import WebDataset

        return WebDataset(
            source,
            image_extension=image_key,
            label_extension=label_key or "cls",
            class_names=names or number_names(num_classes),
        )
    keys = {"image_key": image_key is not None, "label_key": label_key is not None}
    _refuse("tars and Hugging Face data sets", source, keys)
    if source == "digits":
        from .digits import Digits

        return Digits(part_size, names)
    if clips is None:
        return ImageFolder(Path(source), part_size, names)
    if source == "moving_digits":
        from .moving_digits import MovingDigits

        return MovingDigits(part_size, clips, names)
    from .clips import ClipFolder

    return ClipFolder(Path(source), part_size, clips, names)


def _refuse(where: str, source: str, given: dict[str, bool]) -> None:
    """Raise a ValueError that names the settings that are given and would be ignored."""
    settings = [f"data.{name}" for name, is_given in given.items() if is_given]
    if settings:
        raise ValueError(f"{', '.join(settings)} is for {where} alone, not for data.source {source!r}; leave it out")


def count_parts(size: int, part_size: int) -> int:
    """Number of parts that `size` samples make, `part_size` in all but the last."""
    return -(-size // part_size)


def read_class_names(file: Path, num_classes: int) -> tuple[str, ...]:
    """Read a text file of class names, a name a line in the order of the labels.

    Args:
        file: The text file, UTF-8.
        num_classes: How many names it must hold.

    Returns:
        The names.

    Raises:
        ValueError: The file is missing, holds an empty line, or does not hold `num_classes` names.
    """
    if not file.is_file():
        raise ValueError(f"expected a text file of class names, got {file}, which is not a file")
    names = tuple(line.strip() for line in file.read_text(encoding="utf-8").splitlines())
    if len(names) != num_classes or not all(names):
        raise ValueError(
            f"expected {num_classes} class names in {file}, one a line and no empty line; "
            f"got {len(names)} lines, {names.count('')} of them empty"
        )
    return names


def number_names(num_classes: int) -> tuple[str, ...]:
    """Class names where nobody knows any: the labels as text."""
    return tuple(str(label) for label in range(num_classes))


def choose_class_names(given: tuple[str, ...] | None, known: tuple[str, ...], source: str) -> tuple[str, ...]:
    """The names from the user's file, else those that the source knows; a ValueError if their numbers differ."""
    if given is not None and len(given) != len(known):
        raise ValueError(f"data.class_names lists {len(given)} names, but {source} has {len(known)} classes")
    return known if given is None else given


def check_label(label: int, num_classes: int, key: str) -> int:
    """Return the label, or raise a ValueError that names the sample if it is not one of `num_classes` classes."""
    if not 0 <= label < num_classes:
        raise ValueError(
            f"expected a label from 0 to {num_classes - 1} ({num_classes} classes), got {label} in {key}; "
            "mend the data or the number of classes"
        )
    return label


def keyed_permutation(size: int, *key: int) -> np.ndarray:
    """Permutation of `range(size)`, int64, that depends on nothing but its arguments.

    It sorts the raw stream of a bit generator, because numpy promises those streams for good, and not those of its
    `Generator.permutation`.

    Args:
        size: Length of the permutation.
        *key: Integers from 0 to 2**64 - 1. Keys of other numbers, or of more of them, seed other streams.

    Returns:
        The permutation (size,), int64.
    """
    # Of fixed length, and its length first: numpy pads a seed with zeros, and runs the words of large numbers together.
    words = np.array([len(key), *key], dtype="<u8").view("<u4")
    return np.argsort(np.random.PCG64(words).random_raw(size), kind="stable")


def split_indices(
    labels: Sequence[int] | np.ndarray, holdout: float | int, seed: int, group: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """Split a data set into training and held-out samples, the same share of every class.

    The one rule that VAE, latents and evaluation share, so that "held out" means the same samples everywhere.

    Args:
        labels: Class of each sample, N values.
        holdout: Number of held-out samples (int), or their share (float below 1); 0 holds out none.
        seed: Key of the choice.
        group: How many samples, one after the other, belong to one thing, such as the clips of a video: all of them
            come to one side.

    Returns:
        Indices of the training and of the held-out samples, each ascending, int64. Every class keeps a training sample.

    Raises:
        ValueError: `holdout` is out of range, or it or the samples are no whole groups.
    """
    if group > 1:
        grouped = np.asarray(labels).reshape(-1, group) if len(labels) % group == 0 else None
        if grouped is None or (grouped != grouped[:, :1]).any() or (isinstance(holdout, int) and holdout % group):
            raise ValueError(
                f"expected samples and holdout in whole groups of {group} of one class (clips of one video), got "
                f"{len(labels)} samples and a holdout of {holdout}"
            )
        sides = split_indices(grouped[:, 0], holdout // group if isinstance(holdout, int) else holdout, seed)
        train, val = ((side[:, None] * group + np.arange(group)).flatten() for side in sides)
        return train, val
    classes, counts = np.unique(np.asarray(labels), return_counts=True)
    total = round(holdout * len(labels)) if isinstance(holdout, float) else holdout
    spare = counts - 1  # what a class can give and keep a training image
    if not 0 <= total <= spare.sum() or (total == 0) != (holdout == 0):
        raise ValueError(
            f"expected a holdout of 1 to {spare.sum()} samples (of {len(labels)}, every class keeps one for training), "
            f"or 0, got {holdout}, which is {total}"
        )
    quota = spare * total / max(1, spare.sum())  # where every class has one image, nothing can be held out
    share = np.floor(quota).astype(np.int64)
    share[np.argsort(share - quota, kind="stable")[: total - share.sum()]] += 1  # the largest remainders
    held_out = np.zeros(len(labels), dtype=bool)
    for label, count in zip(classes, share, strict=True):
        members = np.flatnonzero(np.asarray(labels) == label)
        held_out[members[keyed_permutation(len(members), seed, int(label))[:count]]] = True
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)
