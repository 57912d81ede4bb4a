"""The commands of `segue`: arguments in, exit codes and lines of JSON out.

May import `jobs.show`, `jobs.analysis` and `pipeline`.
"""
