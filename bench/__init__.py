"""Side-by-side measurements: ``pytest bench/bench_dpo_step.py --out bench/results``."""
