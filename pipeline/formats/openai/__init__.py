"""OpenAI's batch files, as vLLM takes them: requests in, results and errors out. Knows no model and no Ray."""
