"""Other formats to Parquet and outputs to other formats: JSON lines, CSV, Hugging Face datasets, OpenAI batch files.

Nothing is changed on the way without a word: what a format cannot hold is refused by file and line, or counted. Knows
no Ray; of a model only the bytes of its tokens, for log-probabilities in `openai`.
"""
