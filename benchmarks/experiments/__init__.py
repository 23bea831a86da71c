"""Compare compression methods, and peers beside them, at equal data, epochs and starting weights.

    python -m benchmarks.experiments run
    python -m benchmarks.experiments page

The first command runs the experiments of `table` that have no result yet, one JSON file for each experiment and seed;
the second writes ``docs/experiments.md`` and its plots from those files.
"""
