"""The tree of prompt segments: its nodes, who owns their keys, what is kept and evicted, and the blocks of a step.

Only this package writes the fields of a node. May import `attention.memory` and `attention.segments`.
"""
