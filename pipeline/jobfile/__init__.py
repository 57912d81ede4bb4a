"""A job file and everything it may say, as frozen data.

May import `workers` for the meaning of its sections. No Arrow, no Ray.
"""
