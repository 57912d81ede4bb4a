"""Processes and what they tell each other: a child with limits, Ray's sessions, signals, progress, metrics.

May import `pipeline.problems` and `pipeline.jobfile`. Knows no rows.
"""
