"""What is measured: `python -m benchmarks.block`. Nothing in the package or in the tests of speed depends on it."""
