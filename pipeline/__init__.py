"""From a dataset to committed shards: check, plan, run, commit; also trainings and other formats. Only this package
imports Ray.

Rooms, each of which may import those after it: submit and formats, train, run, plan, ready, prompts, dataset, ledger,
processes, jobfile, storage, problems.
"""
