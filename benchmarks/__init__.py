"""Measurements, run by hand: `python -m benchmarks.block`. No test is timed."""
