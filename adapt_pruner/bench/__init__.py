"""Benchmark of the kernels: every op by every provider, beside what the memory can do in the same run."""

from adapt_pruner.bench.kernels import BenchResult, bench_kernels
from adapt_pruner.bench.results import Comparison, Row, compare, read_csv

__all__ = ["BenchResult", "Comparison", "Row", "bench_kernels", "compare", "read_csv"]
