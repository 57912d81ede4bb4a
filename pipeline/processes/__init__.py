"""Processes and what they tell each other: a child with limits, Ray's sessions and reservations, signals, progress,
metrics.

May import `pipeline.problems`, `pipeline.jobfile` and Ray; `limited` and `interrupt` import no Ray. Knows no rows.
"""
