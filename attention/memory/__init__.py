"""Memory for keys and values: a budget in bytes, and what nodes and generating rows get of it.

Imports torch, and nothing else of Segue.
"""
