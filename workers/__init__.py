"""The engine: a model, its prompts, continuous batching over the tree. No Ray."""
