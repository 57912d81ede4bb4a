"""Attention over the tree on CPUs: compiled kernels, and torch's operations where there is no compiler.

May import `attention` but for `attention.cuda`.
"""
