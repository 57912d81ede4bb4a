"""A run: a ready job's missing units through a pool of workers, pass after pass, until the output folder is complete.

May import every room of the pipeline but `train`, `formats` and `submit`, and the engines of `workers`. Uses Ray.
"""
