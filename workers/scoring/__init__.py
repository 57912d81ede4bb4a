"""Log-likelihoods: what is scored of a row, and the scores of tokens.

May import `workers.prompts`, `workers.sampling`, `workers.rows`, `workers.errors` and `attention`. Only `likelihood`
imports torch: planning needs the other modules.
"""
