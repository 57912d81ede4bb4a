"""Drawing tokens: adjusting logits, the draw, forms, and when a sample ends.

May import `workers.models`, `workers.devices`, `workers.rows`, `workers.errors` and `attention`.
"""
