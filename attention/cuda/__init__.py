"""Attention over the tree on GPUs, by torch's kernel for sequences of different lengths.

May import `attention` but for `attention.cpu`.
"""
