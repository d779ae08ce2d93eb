"""Measurements, run by hand: `python -m benchmarks.run`. No test is timed."""
