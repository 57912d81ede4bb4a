"""Memory for keys and values: a budget in bytes, and the places that nodes and generating rows get of it.

May import torch and nothing else of Segue.
"""
