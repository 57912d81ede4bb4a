"""The tree of prompt segments and who owns its keys: nodes, the blocks of a step, what is kept and evicted.

May import `attention.segments` and `attention.memory`.
"""
