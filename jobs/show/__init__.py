"""What commands show to people: tables, pictures, the report.

May import `jobs.analysis` and `pipeline`.
"""
