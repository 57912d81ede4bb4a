"""Numbers made of outputs and plans: accuracies, profiles, what fits a card.

May import `pipeline` and `workers`.
"""
