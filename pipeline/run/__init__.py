"""The run: units through a pool of workers, passes until nothing is missing, the search for bad rows.

May import `pipeline.plan` and what is below it.
"""
