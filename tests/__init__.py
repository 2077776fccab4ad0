"""A package, so that `python -m tests.benchmarks.…` finds these: wheels of data bring packages of the same name."""
