"""Rows of the input as rows of the plan.

May import `pipeline.dataset`, `pipeline.ledger` and `workers`. No Ray.
"""
