"""The goals as data, and the table that sets what was measured against them. Must not know how anything is measured."""

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from iwin_dit.nn.windows import global_exchange, plan_window

DEVICES = {"cpu": "CPU", "cuda": "GPU"}
KERNELS = {2: (3, 3), 3: (2, 3, 3)}  # K by rank of the grid
# What the goals are for, beside grid and window, as a record's `settings` have it, where the suite has such an option.
SETTINGS: dict[str, dict[str, Any]] = {
    "cpu": {"threads": 2, "width": 384, "dtype": "float32", "keep_memory": True},
    "cuda": {"width": 1152, "dtype": "bf16"},
}
# And what those of a single suite are for: XL/1 as a whole, 50 steps of a batch of 32.
SUITE_SETTINGS: dict[tuple[str, str], dict[str, Any]] = {
    ("train", "cuda"): {"layers": 28},
    ("sample", "cuda"): {"layers": 28, "images": 32, "steps": 50},
}
KEEPS = {"at least": operator.ge, "at most": operator.le, "less than": operator.lt}


@dataclass(frozen=True)
class Setting:
    """The grid, window and kernel of a result.

    Attributes:
        grid: Axis lengths N.
        window: Window lengths M.
        kernel: Kernel lengths K.
        linked: Fraction of token pairs that one attention and one convolution step link (`global_exchange`).
        planned: Whether `window_size="auto"` chooses this window.
    """

    grid: tuple[int, ...]
    window: tuple[int, ...]
    kernel: tuple[int, ...]
    linked: float
    planned: bool


@dataclass(frozen=True)
class Result:
    """What a suite found, as written to JSON.

    Attributes:
        what: The quantity, as in `Goal`.
        mode: Under which it was measured, a key of `options.MODES`; where nothing is computed, how data was read.
        value: First quartile, median, third quartile.
        setting: None where no grid decides.
    """

    what: str
    mode: str
    value: tuple[float, float, float]
    setting: Setting | None = None


@dataclass(frozen=True)
class Goal:
    """A bound on a quantity.

    Attributes:
        suite: Which measures it.
        what: The quantity; "a / b" is a's time over b's.
        bound: How the median must stand to the number of the device, a key of `KEEPS`.
        cpu: Bound for two CPU cores in float32, width 384; None: no goal.
        cuda: Bound for one H200-class GPU in bf16, XL/1, compiled; None: no goal.
        grid: Of the setting; None where no grid decides.
        window: Of the setting.
    """

    suite: str
    what: str
    bound: Literal["at least", "at most", "less than"]
    cpu: float | None
    cuda: float | None
    grid: tuple[int, ...] | None = None
    window: tuple[int, ...] | None = None

    @property
    def setting(self) -> Setting | None:
        """The setting, with the default kernel of its rank."""
        if self.grid is None or self.window is None:
            return None
        return setting_of(self.grid, self.window, KERNELS[len(self.grid)])

    def applies(self, result: Result) -> bool:
        """Whether a result is of this goal's quantity, in its setting."""
        return result.what == self.what and result.setting == self.setting

    def on(self, device: str) -> float | None:
        """The number for a device, a key of `DEVICES`."""
        return self.cpu if device == "cpu" else self.cuda


GOALS = (
    Goal("block", "Iwin block / its floor", "at most", 1.10, 1.15, (16, 16), (8, 8)),
    Goal("block", "Iwin block / its floor", "at most", 1.13, 1.15, (32, 32), (8, 8)),
    Goal("block", "Iwin block / its floor", "at most", 1.18, 1.25, (64, 64), (16, 16)),
    Goal("video", "global 3-D block / Iwin", "at least", 1.8, None, (16, 16, 16), (8, 8, 8)),
    Goal("video", "global 3-D block / Iwin", "at least", 4, 3, (16, 32, 32), (8, 8, 8)),
    Goal("model", "global model / Iwin", "at least", 1.0, 1.0, (16, 16), (8, 8)),
    Goal("model", "global model / Iwin", "at least", 1.4, 1.1, (32, 32), (8, 8)),
    Goal("model", "global model / Iwin", "at least", 2.6, 1.5, (64, 64), (16, 16)),
    Goal("model", "global model / Iwin", "at least", None, 3.0, (128, 128), (16, 16)),
    Goal("model", "memory of Iwin / of global", "at most", 1.05, 1.05, (64, 64), (16, 16)),
    Goal("model", "memory of Iwin / of global", "less than", None, 1.0, (128, 128), (16, 16)),
    Goal("train", "diffusers' DiT, eager / ours, compiled", "at least", 1.1, 1.2, (16, 16), (8, 8)),
    Goal("train", "diffusers' DiT, compiled / ours, compiled", "at least", 1.0, 1.0, (16, 16), (8, 8)),
    Goal("train", "diffusers' DiT, eager / ours, eager", "at least", None, None, (16, 16), (8, 8)),
    Goal("train", "whole step / bare step", "at most", 1.05, 1.05, (16, 16), (8, 8)),
    Goal("train", "model FLOPs / matrix product peak", "at least", None, 0.55, (16, 16), (8, 8)),
    Goal("sample", "both halves always / guidance interval", "at least", None, 1.3, (16, 16), (8, 8)),
    Goal("sample", "both halves always / guidance interval (0, 0.89)", "at least", None, None, (16, 16), (8, 8)),
    Goal("data", "latents read, 1000/s", "at least", 20, None),
)


def has_goals_settings(record: Mapping[str, Any], suite: str, device: str, mode: str) -> bool:
    """Whether the options a result was measured with are those its suite's goals are for.

    Args:
        record: As written to JSON.
        suite: Of the record.
        device: A key of `DEVICES`.
        mode: Of the result; the goals of a GPU are for compiled code, none is for code without our options.

    Returns:
        Whether they are.
    """
    wanted = SETTINGS[device] | SUITE_SETTINGS.get((suite, device), {})
    settings = record["settings"]
    return all(settings.get(name, value) == value for name, value in wanted.items()) and (
        mode != "compiled-plain" if device == "cpu" else mode == "compiled"
    )


def results_of(record: Mapping[str, Any]) -> list[Result]:
    """Read the results of a record, as it is in memory or in JSON."""
    found = []
    for row in record["results"]:
        setting = row["setting"] and Setting(**{**row["setting"], **{k: tuple(row["setting"][k]) for k in AXES}})
        found.append(Result(row["what"], row["mode"], tuple(row["value"]), setting))
    return found


AXES = ("grid", "window", "kernel")


def setting_of(grid: Sequence[int], window: Sequence[int], kernel: Sequence[int]) -> Setting:
    """Describe a setting.

    Args:
        grid: Axis lengths N; of three, the first is causal.
        window: Window lengths M.
        kernel: Kernel lengths K.

    Returns:
        The setting.
    """
    causal_axes = (0,) if len(grid) == 3 else ()
    exchange = global_exchange(grid, window, kernel, causal_axes)
    planned = plan_window(grid, kernel, causal_axes) == exchange.window
    return Setting(exchange.grid, exchange.window, exchange.kernel, exchange.linked_pairs, planned)


def markdown(rows: Sequence[Sequence[tuple[str, str]]], left: Iterable[str] = ()) -> str:
    """Lay out rows of (column, text) as a Markdown table.

    Args:
        rows: All with the same columns.
        left: Columns of words; the others hold numbers and stand to the right.

    Returns:
        The table.
    """
    names = [name for name, _ in rows[0]]
    lines = [names, *([text for _, text in row] for row in rows)]
    rule = "|".join("---" if name in left else "---:" for name in names)
    head, *body = (f"| {' | '.join(line)} |" for line in lines)
    return "\n".join([head, f"|{rule}|", *body])


def goals_table(device: str, records: Mapping[str, Mapping[str, Any]], suites: Iterable[str] | None = None) -> str:
    """Set results against goals: every goal of the device, and under those of a quantity its other results.

    Args:
        device: A key of `DEVICES`.
        records: As written to JSON, by suite. A goal whose suite is missing is "not measured".
        suites: Whose goals are listed; None lists all.

    Returns:
        A Markdown table.
    """
    found = {suite: results_of(record) for suite, record in records.items()}
    goals = [goal for goal in GOALS if suites is None or goal.suite in suites]
    rows = []
    for what in dict.fromkeys(goal.what for goal in goals):
        mine = [goal for goal in goals if goal.what == what]
        results = [result for result in found.get(mine[0].suite, []) if result.what == what]
        for goal in mine:
            measured = [
                _row(goal, r, device, has_goals_settings(records[goal.suite], goal.suite, device, r.mode))
                for r in results
                if goal.applies(r)
            ]
            rows += measured or ([] if goal.on(device) is None else [_row(goal, None, device)])
        rows += [_row(None, r, device) for r in results if not any(goal.applies(r) for goal in mine)]
    return markdown(rows, left=("what", "all pairs linked", "mode", ""))


def _row(goal: Goal | None, result: Result | None, device: str, comparable: bool = True) -> list[tuple[str, str]]:
    """One line of the table; of a goal that was not measured, or of a result without a goal, what is known."""
    subject = result or goal
    assert subject is not None
    setting = subject.setting
    target = None if goal is None else goal.on(device)
    verdict = "no goal"
    if goal is not None and target is not None:
        if result is None:
            verdict = "not measured"
        elif not comparable:
            verdict = "other setting"
        else:
            verdict = "met" if KEEPS[goal.bound](result.value[1], target) else "**not met**"
    return [
        ("what", subject.what),
        *_place(setting),
        ("mode", "-" if result is None else result.mode),
        ("goal", "-" if goal is None or target is None else f"{goal.bound} {target:g}"),
        ("result (quartiles)", "-" if result is None else spread(result.value)),
        ("", verdict),
    ]


def _place(setting: Setting | None) -> list[tuple[str, str]]:
    """The columns of a setting."""
    if setting is None:
        return [(name, "-") for name in ("tokens", "M", "K", "all pairs linked")]
    return [
        ("tokens", by_axes(setting.grid)),
        ("M", window_text(setting.window, setting.planned)),
        ("K", by_axes(setting.kernel)),
        ("all pairs linked", linked(setting.linked)),
    ]


def window_text(window: Sequence[int], planned: bool) -> str:
    """Write a window, and whether `window_size="auto"` chooses it."""
    return by_axes(window) + (" (auto)" if planned else "")


def spread(value: Sequence[float]) -> str:
    """Write quartiles as median (first to third); a number that was counted and not timed has no spread."""
    low, median, high = value
    return f"{median:.2f}" if low == high else f"{median:.2f} ({low:.2f} to {high:.2f})"


def linked(share: float) -> str:
    """Write the share of linked pairs."""
    return "yes" if share == 1 else f"no, {share:.1%}"


def by_axes(sizes: Sequence[int]) -> str:
    """Write sizes per axis as 8x8x8."""
    return "x".join(map(str, sizes))


def as_dicts(results: Iterable[Result]) -> list[dict[str, Any]]:
    """Results as plain values, for JSON."""
    return [asdict(result) for result in results]
