"""What a machine has: devices, precisions, memory for keys and values, the sizes of known cards.

May import `workers.rows`, `workers.errors` and `attention`.
"""
