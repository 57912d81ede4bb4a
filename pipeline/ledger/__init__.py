"""What a job writes into its output folder, and what that proves: plan, units, shards, completeness, verification.

The commit protocol lives here: a unit is done when its shard exists, a job is done when `_SUCCESS` exists. May import
`pipeline.storage`, `pipeline.jobfile`, `pipeline.processes` without Ray, and data types of `workers`. Knows no Ray and
no model.
"""
