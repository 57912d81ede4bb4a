"""Drawing tokens: adjusting logits, the draw, forms, and when a sample ends.

May import `workers.rows`, `workers.devices` and `attention`.
"""
