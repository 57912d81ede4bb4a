"""The engine and all that it needs: prompts, models, sampling, scoring, training. No Ray, no storage.

The rooms, from the top; each may import those below it:

    engine      runs a model over many rows at once      training    trains adapters
    scoring     what is scored of a row, and the scores
    prompts     from text and chats to segments of token ids
    sampling    draws tokens, and decides when an answer ends
    models      finds, checks, loads and runs models
    devices     what this machine has
    rows        what a row asks for and what it gets
    errors      why a row has no answer, and why a model cannot be used
"""

import logging
import os

# torch reads these when it is loaded. Threads that wait in a loop take the processor from those that they wait for:
# three engines on two cores took 180 seconds for what takes 8 when threads sleep. Threads that sleep at once make a
# step of few tokens a quarter longer, as each of its hundreds of calls wakes them. They wait some microseconds first.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "3000")
# transformers imports torchao wherever it is installed, and torchao warns if there is no card.
for _name in ("torchao", "torch.utils._pytree"):
    logging.getLogger(_name).setLevel(logging.ERROR)
