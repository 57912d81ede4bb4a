"""Attention over the tree on GPUs, by torch's kernel for sequences of different lengths.

May import the rest of `attention`, except `attention.cpu` and the reference.
"""
