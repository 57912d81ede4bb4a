"""Log-likelihoods: what is scored of a row, and the scores of tokens.

May import `workers.prompts`, `workers.sampling`, `workers.rows` and `attention`.
"""
