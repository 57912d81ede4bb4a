"""Attention over the tree on CPUs: by compiled kernels, or by torch's operations where there is no compiler.

May import the rest of `attention`, except `attention.cuda` and the reference.
"""
