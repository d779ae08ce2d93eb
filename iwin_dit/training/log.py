"""The numbers of a run: what is measured while it trains, metrics.jsonl, always, and the tracker where there is one."""

import contextlib
import json
import logging
import math
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker
from PIL import Image

from .config import Config
from .validation import TIME_BINS, loss_summary

logger = logging.getLogger(__name__)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read a metrics.jsonl; a last line that is torn, because the run was killed while writing it, is left out.

    Args:
        path: The file.

    Returns:
        A record per line.

    Raises:
        ValueError: If another line is no JSON.
    """
    lines = _read_lines(path)
    for number, (line, record) in enumerate(lines[:-1], start=1):
        if record is None:
            raise ValueError(f"{path}, line {number}: expected JSON, got {line[:80]!r}")
    return [record for _, record in lines if record is not None]


def _read_lines(path: Path) -> list[tuple[str, dict[str, Any] | None]]:
    """Every line and the record it holds, None where it holds none."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    return [(line, _parse(line)) for line in lines]


def _parse(line: str) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except json.JSONDecodeError:
        return None
    return record if isinstance(record, dict) and "step" in record else None


class MetricsLog:
    """Writes a line per event to `<run>/metrics.jsonl`, on the main process, and passes it to Accelerate's tracker.

    A resumed run first drops the lines that were written after its checkpoint, so that the file reads like that of an
    uninterrupted one, and, with a warning, those that cannot be read. A tracker that fails is named once in the log and
    left alone from then on: no reason to stop training.

    Args:
        config: Names the tracker and the batch size, by which images are counted.
        accelerator: Knows the main process, owns the tracker.
        run: Run folder.
        step: Step that the run starts from.
    """

    def __init__(self, config: Config, accelerator: Accelerator, run: Path, step: int) -> None:
        self.accelerator, self.batch_size, self.path = accelerator, config.train.batch_size, run / "metrics.jsonl"
        self._torn: int | None = None  # where a write that failed began
        if accelerator.is_main_process:
            self._go_back_to(step)
        self.tracking = config.log.tracker != "none"
        self._track(lambda: self._start(config, run, step))

    def write(self, step: int, **values: float | Sequence[float]) -> None:
        """Record values of a step.

        Args:
            step: Optimizer steps done.
            values: Numbers by name, or lists of them, which a tracker gets one by one as name/0, name/1 and so on; one
                that is not finite is null in the file, for JSON has no word for it.
        """
        if self.accelerator.is_main_process:
            record = {name: _finite(value) for name, value in values.items()}
            try:
                self._append(json.dumps({"step": step, "images": step * self.batch_size, **record}) + "\n")
            except OSError as error:  # a full disk, say: weights are worth more than a line
                logger.warning("%s: the line of step %d is lost: %s", self.path, step, error)
        flat: dict[str, float] = {}
        for name, value in values.items():
            if isinstance(value, Sequence):
                flat |= {f"{name}/{i}": part for i, part in enumerate(value)}
            else:
                flat[name] = value
        self._track(lambda: self.accelerator.log(flat, step=step))

    def show(self, step: int, name: str, picture: Path) -> None:
        """Pass a picture to the tracker, on the main process; TensorBoard and W&B play a GIF that moves.

        Args:
            step: Optimizer steps done.
            name: What it shows.
            picture: PNG or GIF file.
        """

        def pass_on() -> None:
            for tracker in self.accelerator.trackers:
                _show(tracker, step, name, picture)

        self._track(pass_on)

    def close(self) -> None:
        """Let the tracker finish."""
        self._track(lambda: [tracker.finish() for tracker in self.accelerator.trackers])
        self.accelerator.trackers = []  # else Accelerate finishes them once more, and raises what they raise

    def _go_back_to(self, step: int) -> None:
        lines = _read_lines(self.path) if self.path.is_file() else []
        for number, (line, record) in enumerate(lines, start=1):
            if record is None:
                logger.warning("%s, line %d is dropped: expected JSON, got %r", self.path, number, line[:80])
        staging = self.path.with_name(".metrics.tmp")
        staging.write_text("".join(f"{line}\n" for line, record in lines if record and record["step"] <= step))
        staging.replace(self.path)

    def _append(self, line: str) -> None:
        """Write a line where the last whole one ends."""
        with self.path.open("a") as file:
            if self._torn is None:
                self._torn = file.tell()
            else:
                file.truncate(self._torn)
            file.write(line)
        self._torn = None

    def _start(self, config: Config, run: Path, step: int) -> None:
        """Start the tracker: event files in `<run>/tensorboard`, or a run of W&B, the same one when resumed."""
        # what a resumed run wrote after its checkpoint leaves TensorBoard's curves, too
        options: dict[str, Any] = {"purge_step": step + 1} if step else {}
        if config.log.tracker == "wandb":
            identity = run / "wandb-id"
            if self.accelerator.is_main_process and not identity.is_file():
                identity.write_text(uuid.uuid4().hex)
            options = {"dir": str(run), "name": run.name, "resume": "allow", "config": config.to_dict()}
            options["id"] = identity.read_text() if self.accelerator.is_main_process else None
        project = "iwin-dit" if config.log.tracker == "wandb" else config.log.tracker
        self.accelerator.init_trackers(project, init_kwargs={config.log.tracker: options})

    def _track(self, call: Callable[[], object]) -> None:
        if not self.tracking:
            return
        try:
            call()
        except Exception:  # whatever a tracker's client raises when its server, disk or network is gone
            self.tracking = False
            logger.warning("the tracker failed and is off from now on; metrics.jsonl goes on", exc_info=True)


def _show(tracker: GeneralTracker, step: int, name: str, picture: Path) -> None:
    """Pass a picture on as it is: what Accelerate offers for TensorBoard takes apart what moves."""
    if tracker.name != "tensorboard":
        tracker.log_images({name: [str(picture)]}, step=step)
        return
    from torch.utils.tensorboard.summary import Summary  # type: ignore[attr-defined]  # tensorboard's own

    with Image.open(picture) as opened:
        width, height = opened.size
    image = Summary.Image(encoded_image_string=picture.read_bytes(), width=width, height=height, colorspace=3)
    tracker.tracker.file_writer.add_summary(Summary(value=[Summary.Value(tag=name, image=image)]), step)


def _finite(value: float | Sequence[float]) -> float | list[float | None] | None:
    if isinstance(value, Sequence):
        return [part if math.isfinite(part) else None for part in value]
    return value if math.isfinite(value) else None


class Meter:
    """Loss, speed, time left and memory since the last reading.

    Args:
        accelerator: The processes.
        batch_size: Images per step.
        step: Step that the run starts from.
        steps: Its last step.
    """

    def __init__(self, accelerator: Accelerator, batch_size: int, step: int, steps: int) -> None:
        self.accelerator, self.batch_size, self.step, self.steps = accelerator, batch_size, step, steps
        self.sums = torch.zeros(2, TIME_BINS, device=accelerator.device)
        self.clock = time.perf_counter()

    def add(self, sums: torch.Tensor) -> None:
        """Add a step's losses, (2, TIME_BINS) of `by_time`."""
        self.sums += sums

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out the time of what is no training."""
        started = time.perf_counter()
        yield
        self.clock += time.perf_counter() - started

    def read(self, step: int) -> dict[str, Any]:
        """Read and start again; all processes together.

        Args:
            step: Optimizer steps done.

        Returns:
            Numbers by name: losses, images per second over all processes, hours left, GiB of memory of this process (on
            a GPU the peak of what torch allocated, on a CPU what is resident).
        """
        speed = (step - self.step) * self.batch_size / (time.perf_counter() - self.clock)
        values = {
            **loss_summary(self.accelerator.reduce(self.sums, "sum")),
            "images_per_second": speed,
            "hours_left": (self.steps - step) * self.batch_size / speed / 3600,
            "memory_gib": _memory(self.accelerator.device) / 1024**3,
        }
        self.sums.zero_()
        self.step, self.clock = step, time.perf_counter()
        return values


def _memory(device: torch.device) -> int:
    """Bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return psutil.Process().memory_info().rss
