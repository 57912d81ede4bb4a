"""The engine: a model, its prompts, continuous batching over the tree. No Ray."""

import logging
import os

# Read when torch is loaded. Threads that wait for each other in a loop keep a processor from those they wait for: three
# engines on two cores took 180 seconds for what takes 8 when threads sleep. Threads that sleep at once make a step of
# few tokens a quarter longer, since each of its hundreds of calls wakes them. Some microseconds of waiting are between.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "3000")
# transformers imports torchao wherever it is installed, which then warns of the cards that are not there.
for _name in ("torchao", "torch.utils._pytree"):
    logging.getLogger(_name).setLevel(logging.ERROR)
