"""What a row asks for and what it gets: sampling parameters, forms, requests, outputs.

May import `workers.errors` and `attention`. Imports no torch.
"""
