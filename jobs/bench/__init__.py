"""Benchmarks: each checks its answers first, times itself and its peers in one run, and ends in one JSON line."""
