"""Fine-tuning jobs, from the job file to an adapter: alone in one process, or in a group of Ray Train.

May import every room of the pipeline but `submit` and `formats`, and `workers.training`. Only `group` and `finetune`
use Ray.
"""
