"""Writing a folder of latents: by any number of processes, and over any number of starts, to the same bytes.

Each part of the source is encoded whole by one process: its shards, then a small record, each appearing whole or not at
all. An extraction that is started again goes on with the parts that have no record; on the same kind of device and
number of CPU threads, the bytes do not tell. Knows nothing of how processes are launched (it is given rank, world and a
barrier) or samples encoded (`encode`). Letters: C latent channels, N samples.
"""

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import logging
import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from ..files import write_durably, write_json
from .codec import LatentCodec
from .encode import EncodeSettings, PartEncoder
from .facts import check_made_from
from .manifest import FORMAT_VERSION, LABELS, MANIFEST, Manifest, Shard
from .sources import ImageSource

logger = logging.getLogger(__name__)

UNFINISHED = "unfinished"  # folder of plan and records, gone at the end
PLAN = "plan.json"
PATIENCE = 90.0  # seconds for a network file system to show what another machine wrote
# What decides bytes, and yet does not make finished latents unfit.
_ONLY_WHILE_UNFINISHED = ("vae_config_sha256", "packages")
_PACKAGES = ("diffusers", "numpy", "pillow", "safetensors", "torch")


@dataclasses.dataclass(frozen=True)
class _Record:
    """What the manifest must know of a finished part."""

    plan: str  # sha256 of the plan that it was made by
    shards: tuple[Shard, ...]
    class_counts: tuple[int, ...]
    sums: tuple[float, ...]  # (C,), of the stored latents
    square_sums: tuple[float, ...]  # (C,)
    broken: tuple[str, ...]


class Extraction:
    """The making of one folder of latents.

    Args:
        source: The images or clips, the same ones at every start.
        codec: Encodes them, on the device of its VAE.
        out: The folder to make, on a file system that all processes see; new, empty, or of an earlier start.
        settings: What decides the bytes besides source and VAE.
        vae_id: Where the VAE can be found again (a folder or a Hub id); recorded.
        source_settings: What of the source is read; recorded.
        decode_threads: Threads that read and crop samples while the VAE works.
        max_broken: How many broken images or videos are skipped (named in the log and the manifest) before giving up:
            by each process while it runs, and by all of them at the end.

    Raises:
        ValueError: The VAE cannot encode samples of that size.
    """

    def __init__(
        self,
        source: ImageSource,
        codec: LatentCodec,
        out: Path,
        settings: EncodeSettings,
        *,
        vae_id: str,
        source_settings: Mapping[str, str | None] | None = None,
        decode_threads: int = 4,
        max_broken: int = 0,
    ) -> None:
        self.encoder = PartEncoder(source, codec, settings, decode_threads, max_broken)
        self.source, self.out = source, out
        values = dataclasses.asdict(settings)
        batch_size = values.pop("batch_size")
        self._facts: dict[str, Any] = {  # what the manifest says, too
            "source": source.description,
            "source_fingerprint": source.fingerprint,
            "source_settings": dict(source_settings or {}),
            "class_names": source.class_names,
            "latent_shape": self.encoder.latent_shape,
            **values,
            "vae_id": vae_id,
            "vae_sha256": codec.stored_fingerprint(),
            "vae_config_sha256": codec.config_fingerprint(),
            "packages": {name: importlib.metadata.version(name) for name in _PACKAGES},
        }
        # All that must stay the same between two starts, for them to end with the same bytes.
        self._plan = {**self._facts, "batch_size": batch_size, "num_parts": source.num_parts}
        self._plan_sha256 = hashlib.sha256(json.dumps(self._plan).encode()).hexdigest()

    def run(self, rank: int = 0, world: int = 1, barrier: Callable[[], object] = lambda: None) -> None:
        """Encode what is missing and write the manifest; all processes call it.

        Args:
            rank: This process; 0 writes plan and manifest, and shows the progress of its own parts.
            world: How many processes there are.
            barrier: Returns when every process has called it.

        Raises:
            ValueError: The folder holds something else, or latents made with other settings; too many samples are
                broken; latents are not finite in the VAE's or the stored dtype.
        """
        with self._locked() if rank == 0 else contextlib.nullcontext():
            self._run(rank, world, barrier)

    def _run(self, rank: int, world: int, barrier: Callable[[], object]) -> None:
        if rank == 0:
            self._start()
        barrier()
        missing = self._missing_parts()
        barrier()  # nobody finishes a part before everybody has listed the missing ones
        if rank == 0:
            parts = f"{len(missing)} of {self.source.num_parts} part(s)"
            if world > self.source.num_parts:
                logger.warning(
                    "%d processes for %d part(s) of %s, each done by one of them: lower data.shard_size (the size of a "
                    "part), or, of tars and streamed files, give more and smaller ones (a part each)",
                    *(world, self.source.num_parts, self.source.description),
                )
            logger.info("%s: %s of %s to encode", self.out, parts, self.source.description)
        mine = missing[rank::world]
        title = "latents" if world == 1 else f"latents (process 0 of {world})"
        with tqdm(desc=title, unit=self.encoder.settings.noun, disable=rank > 0 or not mine) as bar:
            for done, part in enumerate(mine, start=1):
                self._encode_part(part, bar.update)
                bar.total = round(bar.n / done * len(mine))  # parts differ, and nobody counts a tar's images beforehand
                bar.refresh()
        barrier()
        if rank == 0:
            self._finish()

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the folder for this launch: another one would delete its temporary files as those of a killed one."""
        unfinished = self.out / UNFINISHED
        if not unfinished.is_dir():
            if (self.out / MANIFEST).is_file():
                yield  # nothing will be written
                return
            if self.out.exists() and (not self.out.is_dir() or any(self.out.iterdir())):
                raise ValueError(f"expected a new or empty folder for the latents, got {self.out}; give another")
            unfinished.mkdir(parents=True)
        try:
            with FileLock(unfinished / "lock", blocking=False):
                yield
        except Timeout as error:
            raise ValueError(f"another process is extracting into {self.out}: let it finish, or end it") from error

    def _start(self) -> None:
        """Write the plan, unless parts have been finished after an earlier one."""
        if (self.out / MANIFEST).is_file():
            return
        unfinished = self.out / UNFINISHED
        for path in [*self.out.glob("*.tmp"), *unfinished.glob("*.tmp")]:  # of a process that was killed
            path.unlink()
        if not any(unfinished.glob("[0-9]*.json")):
            for path in self.out.glob("*.safetensors"):  # of parts without a record, maybe after another plan
                path.unlink()
            write_json(unfinished / PLAN, self._plan)

    def _missing_parts(self) -> list[int]:
        """Parts without a record, after comparing the plan: this process may have another VAE or other packages."""
        if (self.out / MANIFEST).is_file():
            facts = {key: value for key, value in self._facts.items() if key not in _ONLY_WHILE_UNFINISHED}
            check_made_from(self.out, dataclasses.asdict(Manifest.load(self.out)), facts)
            return []
        path = self.out / UNFINISHED / PLAN
        if not path.is_file():
            raise ValueError(f"expected {path}, which the main process wrote: do all machines see the same folder?")
        check_made_from(self.out, json.loads(path.read_text(encoding="utf-8")), self._plan, finished=False)
        return [part for part in range(self.source.num_parts) if not self._record_path(part).is_file()]

    def _record_path(self, part: int) -> Path:
        return self.out / UNFINISHED / f"{part:05d}.json"

    def _encode_part(self, part: int, advance: Callable[[int], object]) -> None:
        """Write the shards of a part, then its record; `advance` is told the number of samples of every batch."""
        broken_before = len(self.encoder.broken)
        shards: list[Shard] = []
        class_counts = np.zeros(len(self.source.class_names), dtype=np.int64)
        sums = np.zeros((2, self.encoder.latent_shape[0]))
        with contextlib.closing(self.encoder.shards(part, advance)) as made:
            for encoded in made:
                path = self.out / Shard.name(part, len(shards))
                shards.append(write_shard(path, encoded.latents, encoded.labels))
                class_counts += np.bincount(encoded.labels.numpy(), minlength=len(class_counts))
                sums += encoded.sums
                del encoded  # before the next one is made
        record = _Record(
            plan=self._plan_sha256,
            shards=tuple(shards),
            class_counts=tuple(class_counts.tolist()),
            sums=tuple(sums[0].tolist()),
            square_sums=tuple(sums[1].tolist()),
            broken=tuple(self.encoder.broken[broken_before:]),
        )
        write_json(self._record_path(part), dataclasses.asdict(record))

    def _finish(self) -> None:
        """Write all labels and the manifest from the records; only then remove those."""
        if not (self.out / MANIFEST).is_file():
            records = self._read_records()
            shards = tuple(shard for record in records for shard in record.shards)
            broken = [key for record in records for key in record.broken]
            self.encoder.check_broken(broken)
            if not shards:
                noun = self.encoder.settings.noun
                raise ValueError(f"no {noun} of {self.source.description} could be read ({len(broken)} broken ones)")
            labels = torch.cat([load_file(self.out / shard.file)["labels"] for shard in shards])
            mean, std = self._statistics(records)
            Manifest(
                **self._facts,
                format_version=FORMAT_VERSION,
                class_counts=tuple(np.sum([record.class_counts for record in records], axis=0).tolist()),
                latents_mean=mean,
                latents_std=std,
                shards=shards,
                labels_sha256=write_labels(self.out, labels),
                broken=tuple(broken),
            ).save(self.out)
        shutil.rmtree(self.out / UNFINISHED, ignore_errors=True)

    def _read_records(self) -> list[_Record]:
        paths = [self._record_path(part) for part in range(self.source.num_parts)]
        deadline = time.monotonic() + PATIENCE
        while missing := [part for part, path in enumerate(paths) if not path.is_file()]:
            if time.monotonic() > deadline:
                raise ValueError(
                    f"parts {missing} never arrived in {self.out}: do all machines see the same folder? Start again to "
                    "encode them"
                )
            time.sleep(1)
        records = []
        for path in paths:
            fields = json.loads(path.read_text(encoding="utf-8"))
            shards = tuple(Shard(**shard) for shard in fields.pop("shards"))
            plan = fields.pop("plan")
            if plan != self._plan_sha256:
                raise ValueError(
                    f"{path} was written by a process of an earlier extraction with other settings, which maybe still "
                    f"runs: end it, delete {self.out} and start again"
                )
            records.append(_Record(plan, shards, **{key: tuple(value) for key, value in fields.items()}))
        return records

    def _statistics(self, records: Sequence[_Record]) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation of the stored latents per channel, over all samples, views and cells."""
        samples = sum(shard.count for record in records for shard in record.shards)
        count = samples * self.encoder.stored_shape[0] * math.prod(self.encoder.latent_shape[1:])
        mean = np.sum([record.sums for record in records], axis=0) / count
        square = np.sum([record.square_sums for record in records], axis=0) / count
        return tuple(mean.tolist()), tuple(np.sqrt(np.maximum(square - mean**2, 0)).tolist())


def write_shard(path: Path, latents: torch.Tensor, labels: torch.Tensor) -> Shard:
    """Write one file of latents durably.

    Args:
        path: File to write or replace.
        latents: (count, V, P, C, *s), in the stored dtype.
        labels: (count,) int64.

    Returns:
        What the manifest says of it.
    """
    digest = write_durably(path, lambda temporary: save_file({"latents": latents, "labels": labels}, temporary))
    return Shard(path.name, len(labels), digest)


def write_labels(folder: Path, labels: torch.Tensor) -> str:
    """Write `labels.safetensors` durably.

    Args:
        folder: The folder of latents.
        labels: (N,) int64, of all shards in order.

    Returns:
        sha256 of the file.
    """
    return write_durably(folder / LABELS, lambda temporary: save_file({"labels": labels}, temporary))
