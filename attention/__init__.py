"""Attention over a tree of segments: the rule, the tree, its memory, and the backends that run it. Torch alone."""

from segue.attention.segments import Segment
from segue.attention.tree.tree import SegmentTree

__all__ = ["Segment", "SegmentTree"]
