"""What a row asks for and what it gets: parameters, forms, requests, outputs.

May import `workers.errors` and `attention`. Every other room may import this one.
"""
