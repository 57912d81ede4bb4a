"""Fine-tuning jobs, from the plan to an adapter.

May import `pipeline.run` and what is below it.
"""
