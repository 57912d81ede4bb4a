"""Training adapters under the segment mask.

May import `workers.models`, `workers.devices`, `workers.rows` and `attention`.
"""
