"""The engine: a model, its prompts, continuous batching over the tree. No Ray."""

import logging
import os

# Read when torch is loaded. Threads that wait for each other in a loop keep a processor from those they wait for: three
# engines on two cores took 180 seconds for what takes 8 when threads sleep instead, and 5 alone, either way.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
for _name in (
    "torchao",
    "torch.utils._pytree",
):  # torchao, which transformers imports wherever it is, warns of other cards
    logging.getLogger(_name).setLevel(logging.ERROR)
