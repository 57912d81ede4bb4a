"""Other formats to Parquet, and results to other formats.

May import `pipeline.ledger`, `pipeline.dataset` and `pipeline.storage`.
"""
