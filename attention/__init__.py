"""Attention over a tree of segments: the rule, the tree, its memory, and the backends that compute it.

Imports torch and nothing else. What is exported here imports not even torch, since planning does without it.
"""

from segue.attention.segments import Segment
from segue.attention.tree.tree import SegmentTree

__all__ = ["Segment", "SegmentTree"]
