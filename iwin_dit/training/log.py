"""The numbers of a run: metrics.jsonl, always, and the tracker where there is one."""

import json
import math
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from .config import Config


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read a metrics.jsonl; a last line that is torn, because the run was killed while writing it, is left out.

    Args:
        path: The file.

    Returns:
        A record per line.

    Raises:
        ValueError: If another line is no JSON.
    """
    lines = path.read_text().splitlines()
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise ValueError(f"{path}, line {number}: expected JSON, got {line[:80]!r}") from error
    return records


class MetricsLog:
    """Writes a line per event to `<run>/metrics.jsonl`, on the main process, and passes it to Accelerate's tracker.

    A resumed run first drops the lines that were written after its checkpoint, so that the file reads like that of an
    uninterrupted one.

    Args:
        config: Names the tracker and the batch size, by which images are counted.
        accelerator: Knows the main process, owns the tracker.
        run: Run folder.
        step: Step that the run starts from.
    """

    def __init__(self, config: Config, accelerator: Accelerator, run: Path, step: int) -> None:
        self.accelerator, self.batch_size, self.path = accelerator, config.train.batch_size, run / "metrics.jsonl"
        if accelerator.is_main_process:
            records = read_metrics(self.path) if self.path.is_file() else []
            staging = self.path.with_name(".metrics.tmp")
            staging.write_text("".join(json.dumps(record) + "\n" for record in records if record["step"] <= step))
            staging.replace(self.path)
        if config.log.tracker != "none":
            accelerator.init_trackers(config.log.tracker)

    def write(self, step: int, **values: float) -> None:
        """Record values of a step.

        Args:
            step: Optimizer steps done.
            values: Numbers by name; one that is not finite is null in the file, for JSON has no word for it.
        """
        if self.accelerator.is_main_process:
            finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
            with self.path.open("a") as file:
                file.write(json.dumps({"step": step, "images": step * self.batch_size, **finite}) + "\n")
        self.accelerator.log(values, step=step)
