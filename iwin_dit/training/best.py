"""The best checkpoint of a run, by the first metric of the evaluations in training.

    runs/<name>/best.json  evaluations/step-00001000.json

Owns who beats whom, and how it is found again. What the evaluations measure is evaluation.py's, which checkpoints are
removed checkpoint.py's.
"""

import dataclasses
import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..files import write_json

logger = logging.getLogger(__name__)

BEST = "best.json"
EVALUATIONS = "evaluations"
SCORE = "score"  # key of a Score in the record of an evaluation


@dataclass(frozen=True)
class Score:
    """What decides whether a checkpoint is the best.

    Attributes:
        step: Steps done.
        metric: Name under which the value is logged, such as "fid_5000".
        value: The value.
        greater_is_better: Which way the metric counts.
        settings: What it was measured with, the reference by its sha256; values compare under the same alone.
    """

    step: int
    metric: str
    value: float
    greater_is_better: bool
    settings: dict[str, Any]

    def beats(self, other: "Score | None") -> bool:
        """Whether this is the best from now on; where metric or settings have changed, the later one is."""
        if other is None or (self.metric, self.settings) != (other.metric, other.settings):
            return True
        return self.value > other.value if self.greater_is_better else self.value < other.value


def record_path(run: Path, step: int) -> Path:
    """Return where the record of an evaluation is.

    Args:
        run: Run folder.
        step: Steps done.

    Returns:
        The file, whether or not it is there.
    """
    return run / EVALUATIONS / f"step-{step:08d}.json"


def write_best(run: Path, score: Score, checkpoint: Path) -> None:
    """Write best.json, once the checkpoint stands.

    Args:
        run: Run folder.
        score: Of the checkpoint.
        checkpoint: Its folder, in the run's.
    """
    path = checkpoint.relative_to(run).as_posix()  # a run may be renamed
    write_json(run / BEST, {**dataclasses.asdict(score), "checkpoint": path})


def restore_best(run: Path, standing: Mapping[int, Path]) -> Score | None:
    """Find the best of the checkpoints that stand, from best.json and the evaluations, as if they came one by one.

    Where best.json says something else, it is written anew: the run was killed just before that, or went back to an
    earlier checkpoint, or the best was removed.

    Args:
        run: Run folder.
        standing: The whole checkpoints by step, up to the one that training goes on from.

    Returns:
        The score of the best; None where no checkpoint that stands was evaluated.
    """
    recorded = _read(run / BEST)
    scores = [recorded, *(_read(path, SCORE) for path in _records(run).values())]
    best: Score | None = None
    for score in sorted((s for s in scores if s is not None and s.step in standing), key=lambda score: score.step):
        if score.beats(best):
            best = score
    if best is None:
        (run / BEST).unlink(missing_ok=True)
    elif best != recorded:
        write_best(run, best, standing[best.step])
    return best


def drop_evaluations_after(run: Path, step: int) -> None:
    """Remove the records of later evaluations, which the run that goes on from `step` does not follow.

    Args:
        run: Run folder.
        step: The step loaded.
    """
    for recorded, path in _records(run).items():
        if recorded > step:
            path.unlink()


def _records(run: Path) -> dict[int, Path]:
    """The records of evaluations by step; other files there are no concern of the run."""
    found = ((re.fullmatch(r"step-(\d{8,})\.json", path.name), path) for path in (run / EVALUATIONS).glob("*.json"))
    return {int(match[1]): path for match, path in found if match}


def _read(path: Path, key: str | None = None) -> Score | None:
    """Read a score, which may lie under a key; None where there is none, with a warning where it cannot be read."""
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        content = content if key is None else content[key]
        return Score(**{field.name: content[field.name] for field in dataclasses.fields(Score)})
    except (ValueError, KeyError, TypeError) as error:
        logger.warning("%s is left out: expected the score of an evaluation, got something else (%r)", path, error)
        return None
