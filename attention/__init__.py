"""Attention over a tree of segments: the rule, the tree, its memory, and the backends that run it. Torch alone."""

from attention.segments import Segment
from attention.tree import SegmentTree

__all__ = ["Segment", "SegmentTree"]
