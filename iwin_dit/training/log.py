"""The numbers of a run: metrics.jsonl, always, and the tracker where there is one."""

import json
from pathlib import Path

from accelerate import Accelerator

from .config import Config


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
            lines = self.path.read_text().splitlines(keepends=True) if self.path.is_file() else []
            self.path.write_text("".join(line for line in lines if json.loads(line)["step"] <= step))
        if config.log.tracker != "none":
            accelerator.init_trackers(config.log.tracker)

    def write(self, step: int, **values: float) -> None:
        """Record values of a step.

        Args:
            step: Optimizer steps done.
            values: Numbers by name.
        """
        if self.accelerator.is_main_process:
            with self.path.open("a") as file:
                file.write(json.dumps({"step": step, "images": step * self.batch_size, **values}) + "\n")
        self.accelerator.log(values, step=step)
