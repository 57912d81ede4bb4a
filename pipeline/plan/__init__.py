"""The plan: rows in depth-first order, counted and cut into units.

May import `pipeline.ready` and what is below it. Ray only in `order` and `windows`.
"""
