"""From a job file to a job that can be planned or run: every check, before anything starts.

May import every room below the plan. Starts nothing but the checking child.
"""
