"""Models: where they are, whether they are supported, how they are loaded, and how they run over the tree.

May import `workers.devices`, `workers.rows` and `attention`.
"""
