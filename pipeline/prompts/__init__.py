"""Rows of the dataset as rows of the plan: prompts rendered and tokenised, in a child process with limits.

May import `pipeline.dataset`, `pipeline.ledger`, `pipeline.processes.limited`, `pipeline.storage`, and the tokenizers
and templates of `workers`. Knows no Ray.
"""
