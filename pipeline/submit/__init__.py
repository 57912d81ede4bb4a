"""Jobs handed to a cluster's queue.

May import `pipeline.jobfile`, `pipeline.train` and `pipeline.processes`.
"""
