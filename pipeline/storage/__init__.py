"""Bytes in folders and buckets: files that appear whole, once.

May import `pipeline.problems`. Only fsspec and s3fs; no Arrow tables, no Ray.
"""
