"""What memory and speed a job would have on a card. Takes from job and plan what `workers.devices.card` needs."""

from segue.pipeline.ledger.manifest import Manifest
from segue.pipeline.problems import JobRefused, Problem, shown
from segue.pipeline.ready.job import ReadyJob
from segue.workers.devices.card import CARDS, Card, MemoryPlan, ModelSize, Workload, memory_plan
from segue.workers.engine.config import EngineConfig


def card_of(name: str | None) -> Card | None:
    """The card of this name. Raises JobRefused if it is not known."""
    if name is None or name in CARDS:
        return CARDS[name] if name else None
    raise JobRefused([Problem("--card", shown(name), f"one of {', '.join(sorted(CARDS))}")])


def capacity(job: ReadyJob, manifest: Manifest, card: Card) -> MemoryPlan:
    """Raises JobRefused if the model is the echo model, or if not even one row fits."""
    facts = job.facts
    if not facts.num_weights:
        raise JobRefused([Problem("--card", shown(card.name), "it left out: the echo model has no weights")])
    work = Workload(
        num_rows=manifest.num_rows,
        tokens_distinct=manifest.stats["tokens_distinct"],
        max_tokens=job.config.sampling_params.max_tokens if job.config.task == "generate" else 0,
        max_num_seqs=job.config.workers.max_num_seqs or EngineConfig().max_num_seqs,
    )
    try:
        return memory_plan(card, ModelSize(facts.num_weights, facts.weight_bytes, facts.kv_bytes_per_token), work)
    except ValueError as error:
        raise JobRefused([Problem("--card", shown(card.name), str(error))]) from None
