"""What is written and what it proves: manifest, units, shards, completeness, verification.

May import `pipeline.storage` and `pipeline.jobfile`. No Ray, no model.
"""
