"""Hugging Face data sets as an image source: from the Hub, from local files or from a folder of `save_to_disk`.

The only file that imports `datasets` (extra `hf`). The library fetches, caches and splits; images are decoded by
`read_image` as everywhere else, and no code from a data set's repository runs. Knows nothing of what becomes of them.
"""

import hashlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import HfApi, constants
from PIL import Image

from .images import BrokenImageError, read_image
from .sources import Item, check_label, choose_class_names, count_parts, files_fingerprint, number_names

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict, Features, IterableDataset


class HuggingFaceSource:
    """One split of a Hugging Face data set with an image and a label column.

    Parts are ranges of rows; of a streamed data set, its files. Class names are those of a `ClassLabel` column; other
    label columns must be integers. The fingerprint is the library's; of a streamed data set, the commit on the Hub or
    names and sizes of the local files.

    Args:
        name: Name on the Hub, or a folder: of data files (Parquet and others), or of `Dataset.save_to_disk`.
        split: Which split.
        revision: Commit, branch or tag on the Hub; None takes the newest commit.
        config: Which configuration, of a data set that has several.
        streaming: Read the files as they come, instead of downloading and caching them all first.
        image_key: Column of images, of encoded image bytes, or of structs with `bytes` and `path`.
        label_key: Column of labels.
        class_names: Names by label; by default those of the data set, else the labels as text.
        num_classes: Number of classes, where the data set does not know it.
        part_size: Images per part, if the data set is not streamed from files.

    Raises:
        ImportError: `datasets` is not installed.
        ValueError: The data set cannot be opened, or a column is missing or of another type.
    """

    def __init__(
        self,
        name: str,
        *,
        split: str,
        revision: str | None,
        config: str | None,
        streaming: bool,
        image_key: str,
        label_key: str,
        class_names: tuple[str, ...] | None,
        num_classes: int,
        part_size: int,
    ) -> None:
        try:
            import datasets
        except ImportError as error:
            raise ImportError('Hugging Face data sets need datasets: pip install "iwin-dit[hf]"') from error
        self.description = f"hf:{name}"
        self.num_ignored = 0
        dataset, self.fingerprint = _load(name, split, revision, config, streaming, part_size)
        _check_columns(self.description, dataset.features, image_key, label_key)
        label = dataset.features[label_key]
        if isinstance(label, datasets.ClassLabel):
            self.class_names = choose_class_names(class_names, tuple(label.names), self.description)
        else:
            self.class_names = class_names or number_names(num_classes)
        dataset = dataset.select_columns([image_key, label_key])
        self._dataset = dataset.cast_column(image_key, datasets.Image(decode=False))
        self._split, self._image_key, self._label_key = split, image_key, label_key
        self._part_size = part_size
        self._streamed = isinstance(dataset, datasets.IterableDataset)
        self.num_parts = dataset.num_shards if self._streamed else count_parts(len(dataset), part_size)

    def items(self, part: int) -> Iterator[Item]:
        """Yield the images of one part, in the data set's order; they hold an image's bytes or where it lies.

        Args:
            part: Which part.

        Yields:
            The images.

        Raises:
            ValueError: A label is missing or out of range.
        """
        if self._streamed:
            rows = self._dataset.shard(num_shards=self.num_parts, index=part)
            place, first = f"{self.description}/{self._split} part {part}", 0
        else:
            first = part * self._part_size
            rows = self._dataset.select(range(first, min(first + self._part_size, len(self._dataset))))
            place = f"{self.description}/{self._split}"
        for number, row in enumerate(rows, start=first):
            key = f"{place} row {number}"
            if row[self._label_key] is None:
                raise ValueError(f"{key} has no label (column {self._label_key!r})")
            label = check_label(row[self._label_key], len(self.class_names), key)
            image = row[self._image_key] or {"bytes": None, "path": None}
            if image["bytes"] is None and "://" in (image["path"] or ""):
                remedy = "set data.streaming: false" if self._streamed else "store the images' bytes in the column"
                raise ValueError(f"{key} lies outside the data set, at {image['path']}; {remedy}")
            yield Item.of_one(key, label, partial(_read, image["bytes"], image["path"], key))


def _read(content: bytes | None, path: str | None, key: str) -> Image.Image:
    """Decode an image that lies in its row or in a file beside the data set."""
    if content is not None:
        return read_image(content, key)
    file = Path(path or "")
    if not file.is_file():
        raise BrokenImageError(f"{key}: no image in the row and no file {path!r} beside it")
    return read_image(file, key)


def _load(
    name: str, split: str, revision: str | None, config: str | None, streaming: bool, part_size: int
) -> tuple["Dataset | IterableDataset", str]:
    """Open one split and identify its content, or raise a ValueError."""
    import datasets

    folder = Path(name)
    is_saved = any((folder / file).is_file() for file in ("state.json", "dataset_dict.json"))
    try:
        if revision is not None and folder.exists():
            raise ValueError("data.source_revision is for data sets on the Hub; leave it out")
        if is_saved:
            if config is not None:
                raise ValueError("data.source_config is not for a folder of save_to_disk; leave it out")
            dataset = _split_of(datasets.load_from_disk(name), split).with_format(None)
            fingerprint = dataset._fingerprint
            if streaming:
                dataset = dataset.to_iterable_dataset(count_parts(len(dataset), part_size))
            return dataset, fingerprint
        commit = _commit_on_hub(name, revision)
        dataset = datasets.load_dataset(name, name=config, split=split, revision=revision, streaming=streaming)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        hint = " (data.source_config)" if "Config name is missing" in str(error) else ""
        raise ValueError(f"cannot open hf:{name}, split {split!r}: {error}{hint}") from error
    if not streaming:
        return dataset, dataset._fingerprint  # which depends on the commit, or on the local files and their times
    if not folder.exists():
        return dataset, hashlib.sha256(str(commit).encode()).hexdigest()
    files = [path for path in folder.rglob("*") if path.is_file()]
    return dataset, files_fingerprint((path.relative_to(folder).as_posix(), path.stat().st_size) for path in files)


def _split_of(saved: "Dataset | DatasetDict", split: str) -> "Dataset":
    """The split of what `save_to_disk` wrote: all splits, or one that may not know its name and then is "train"."""
    splits = saved if isinstance(saved, dict) else {str(saved.split or "train"): saved}
    if split not in splits:
        raise ValueError(f"it has {', '.join(splits)} (data.source_split)")
    return splits[split]


def _commit_on_hub(name: str, revision: str | None) -> str | None:
    """Commit of a data set on the Hub, None for a local one and without network.

    A Hub that does not answer is a ValueError: the library itself would try for 20 s or more.
    """
    if constants.HF_HUB_OFFLINE or Path(name).exists():
        return None
    try:
        return HfApi().dataset_info(name, revision=revision, timeout=5).sha
    except Exception as error:  # of the HTTP library, which is another one in each major release of the client
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{reason}; the name may be wrong; HF_HUB_OFFLINE=1 uses what is cached") from error


def _check_columns(source: str, features: "Features | None", image_key: str, label_key: str) -> None:
    """Raise a ValueError if a column is missing or of a wrong type."""
    import datasets

    if features is None:
        raise ValueError(f"{source} does not say which columns it has; set data.streaming to false")
    for setting, key in (("data.image_key", image_key), ("data.label_key", label_key)):
        if key not in features:
            raise ValueError(f"{setting}: expected a column of {source} ({', '.join(features)}), got {key!r}")
    image, label = features[image_key], features[label_key]
    is_struct = isinstance(image, dict) and set(image) == {"bytes", "path"}  # as Parquet from elsewhere has them
    is_bytes = getattr(image, "dtype", None) in ("binary", "large_binary")
    if not (isinstance(image, datasets.Image) or is_struct or is_bytes):
        raise ValueError(f"data.image_key: expected images or bytes in {source}, got {image_key!r}, which is {image}")
    if not getattr(label, "dtype", "").startswith(("int", "uint")):  # a ClassLabel is int64
        raise ValueError(
            f"data.label_key: expected integers in {source}, got {label_key!r}, which is {label}; for text, write "
            f"it again with numbers: dataset.class_encode_column({label_key!r}).save_to_disk(folder)"
        )
