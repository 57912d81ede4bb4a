"""Trains adapters under the segment mask.

May import every room but `workers.engine`, and `attention`. `params` and `batches` import no torch.
"""
