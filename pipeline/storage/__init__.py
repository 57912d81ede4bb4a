"""Bytes by name: the stores that outputs are written to, remote file systems, and models in a bucket.

May import fsspec, s3fs, `pipeline.problems` and the names of model sources. Knows no Arrow, no Ray, no rows.
"""
