"""What a person touches: commands, examples, benchmarks."""
