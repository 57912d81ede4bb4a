"""The input: its files, their columns, and their rows with provenance.

May import `pipeline.storage`, `pipeline.jobfile` and `pipeline.processes`. Ray only in `ray_source`.
"""
