"""Side-by-side measurements: ``pytest bench/ --benchmark-only``, ``python -m bench.run``."""
