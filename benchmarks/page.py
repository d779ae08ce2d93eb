"""Put the stored results on the page: `python -m benchmarks.page` after new ones were written to benchmarks/results.

On the page, a table stands between `<!-- NAME -->` and `<!-- end -->`, where NAME is a file of the results, or "goals
cpu" or "goals cuda", all goals of a device with what its files say.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.goals import goals_table
from benchmarks.run import SUITES

RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parents[1] / "docs" / "performance.md"


def stored_records(device: str) -> dict[str, Any]:
    """Read the stored results of a device, by what stands before it in their names: SUITE or SUITE-WORD.

    Args:
        device: A key of `DEVICES`.

    Returns:
        Records as they were written; the goals table takes those of a SUITE alone.

    Raises:
        ValueError: If a file holds the record of another device or suite than its name says.
    """
    records = {}
    for path in sorted(RESULTS.glob(f"*-{device}.json")):
        name = path.stem.removesuffix(f"-{device}")
        suite, record = name.partition("-")[0], json.loads(path.read_text())
        if (record.get("suite"), record.get("device")) != (suite, device):
            found = f"--suite {record.get('suite')} --device {record.get('device')}"
            raise ValueError(f"{path} must hold a run of --suite {suite} --device {device}, got {found}")
        records[name] = record
    return records


def render(text: str, records: Mapping[str, Mapping[str, Any]]) -> str:
    """Renew the tables of a page.

    Args:
        text: The page.
        records: By device, then by name (`stored_records`).

    Returns:
        The page, with what the records say.
    """

    def table(match: re.Match[str]) -> str:
        return f"<!-- {match[1]} -->\n{_table(match[1], records)}\n<!-- end -->"

    return re.sub(r"<!-- (\S+\.json|goals \w+) -->\n.*?<!-- end -->", table, text, flags=re.DOTALL)


def _table(name: str, records: Mapping[str, Mapping[str, Any]]) -> str:
    """What stands under a name, which is of a file or of a device's goals."""
    if name.startswith("goals "):
        device = name.removeprefix("goals ")
        return goals_table(device, records[device])
    kind, _, device = name.removesuffix(".json").rpartition("-")
    if kind not in records[device]:
        return "Not measured."
    record = records[device][kind]
    machine = record["machine"]
    commit = (machine["commit"] or "unknown")[:7] + ("-dirty" if str(machine["commit"]).endswith("-dirty") else "")
    origin = f"[JSON](../benchmarks/results/{name}): {machine['device']}, {machine['threads']} threads, commit {commit}"
    return f"{SUITES[record['suite']].tables(record)}\n\n{origin}."


def main() -> None:
    """Rewrite the page."""
    PAGE.write_text(render(PAGE.read_text(), {device: stored_records(device) for device in ("cpu", "cuda")}))


if __name__ == "__main__":
    main()
