"""The engine: rows in, answers out, by continuous batching over the tree.

May import every other room of `workers` but `workers.training`.
"""
