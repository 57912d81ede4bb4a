"""Models: where they are, whether they are supported, how they are loaded, and how they run over the tree.

May import `workers.devices`, `workers.rows`, `workers.errors` and `attention`. The modules `source`, `support`,
`facts`, `adapter_record` and `echo` import neither torch nor transformers: planning needs them, and both take seconds.
"""
