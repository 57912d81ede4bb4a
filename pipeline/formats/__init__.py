"""Other formats to Parquet and outputs to other formats: JSON lines, CSV, Hugging Face datasets, OpenAI batch files.

May import `pipeline.ledger`, `pipeline.dataset` and `pipeline.storage`. Knows no model and no Ray.
"""
