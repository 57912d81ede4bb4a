"""Jobs handed to a cluster's queue: the job file as the cluster gets it, and Ray's Jobs API.

May import `pipeline.jobfile`, `pipeline.ledger`, `pipeline.processes` and `pipeline.train`. Plans and runs nothing.
"""
