"""From a dataset to committed shards: plan, run, commit. The only package that imports Ray."""
