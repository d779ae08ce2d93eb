"""The record that goes with a number."""

import torch

from iwin_dit.metrics.result import environment


def test_the_environment_names_versions() -> None:
    record = environment()
    assert record["packages"]["torch"] == torch.__version__.split("+")[0]
    assert record["python"].startswith("3.")
    assert "commit" in record
