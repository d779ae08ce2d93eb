"""Hugging Face data sets as an image source: from the Hub, from local files or from a folder of `save_to_disk`.

The only file that imports `datasets` (extra `hf`). The library fetches, caches and splits; images are decoded by
`read_image` as everywhere else, and no code from a data set's repository runs. Knows nothing of what becomes of them.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import HfApi, constants
from PIL import Image

from .images import BrokenImageError, read_image
from .sources import Sample, check_label, choose_class_names, count_parts, number_names

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict, Features, IterableDataset


class HuggingFaceSource:
    """One split of a Hugging Face data set with an image and a label column.

    Parts are ranges of rows; of a streamed data set, its files. Class names are those of a `ClassLabel` column; other
    label columns must be integers.

    Args:
        name: Name on the Hub, or a folder: of data files (Parquet and others), or of `Dataset.save_to_disk`.
        split: Which split.
        streaming: Read the files as they come, instead of downloading and caching them all first.
        image_key: Column of images or of encoded image bytes.
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
        dataset = _load(name, split, streaming, part_size)
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

    def samples(self, part: int) -> Iterator[Sample]:
        """Yield the samples of one part, in the data set's order; they hold an image's bytes or where it lies.

        Args:
            part: Which part.

        Yields:
            The samples.

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
                raise ValueError(f"{key} lies outside its file, at {image['path']}; set data.streaming to false")
            yield Sample(key, label, partial(_read, image["bytes"], image["path"], key))


def _read(content: bytes | None, path: str | None, key: str) -> Image.Image:
    """Decode an image that lies in its row or in a file beside the data set."""
    if content is not None:
        return read_image(content, key)
    file = Path(path or "")
    if not file.is_file():
        raise BrokenImageError(f"{key}: no image in the row and no file {path!r} beside it")
    return read_image(file, key)


def _load(name: str, split: str, streaming: bool, part_size: int) -> "Dataset | IterableDataset":
    """Open one split, or raise a ValueError."""
    import datasets

    is_saved = any((Path(name) / file).is_file() for file in ("state.json", "dataset_dict.json"))
    try:
        if is_saved:
            dataset = _split_of(datasets.load_from_disk(name), split).with_format(None)
        else:
            _check_hub(name)
            dataset = datasets.load_dataset(name, split=split, streaming=streaming)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(f"cannot open hf:{name}, split {split!r}: {error}") from error
    if streaming and is_saved:
        return dataset.to_iterable_dataset(count_parts(len(dataset), part_size))
    return dataset


def _split_of(saved: "Dataset | DatasetDict", split: str) -> "Dataset":
    """The split of what `save_to_disk` wrote: all splits, or one that may not know its name and then is "train"."""
    splits = saved if isinstance(saved, dict) else {str(saved.split or "train"): saved}
    if split not in splits:
        raise ValueError(f"it has {', '.join(splits)} (data.source_split)")
    return splits[split]


def _check_hub(name: str) -> None:
    """Raise a ValueError where the Hub is needed and does not answer: the library itself would try for 20 s or more."""
    if constants.HF_HUB_OFFLINE or Path(name).exists():
        return
    try:
        HfApi().dataset_info(name, timeout=5)
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
    if not isinstance(image, datasets.Image) and getattr(image, "dtype", None) not in ("binary", "large_binary"):
        raise ValueError(f"data.image_key: expected images or bytes in {source}, got {image_key!r}, which is {image}")
    if not getattr(label, "dtype", "").startswith(("int", "uint")):  # a ClassLabel is int64
        raise ValueError(f"data.label_key: expected integers in {source}, got {label_key!r}, which is {label}")
