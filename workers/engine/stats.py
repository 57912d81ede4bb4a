"""Counters of what an engine has done. Imports nothing, so that it costs nothing to import."""

from dataclasses import dataclass


@dataclass(slots=True)
class EngineStats:
    """Counters since the engine was made, and at the end its state after the last step."""

    num_steps: int = 0
    step_seconds: float = 0.0  # time spent in steps, added by the caller that drives the engine
    num_prompt_tokens: int = 0  # requested: the sum of all prompts
    num_computed_tokens: int = 0  # prompt tokens that went through the model
    num_generated_tokens: int = 0
    num_decode_slots: int = 0  # max_num_seqs for each step in which a row generated
    num_empty_slots: int = 0  # of these, slots without a row
    num_scored_positions: int = 0  # hidden states that went through the vocabulary for scores
    num_rows: int = 0
    num_finished_rows: int = 0
    num_finished_tokens: int = 0  # prompt tokens of finished rows, as requested
    num_errors: int = 0
    num_preemptions: int = 0
    num_shrunk_steps: int = 0  # steps for which the device had no memory; they are tried again smaller
    max_kv_bytes: int = 0
    num_running: int = 0  # samples that hold memory
    num_waiting: int = 0  # rows that have not begun
    kv_bytes: int = 0  # in use
    kv_capacity_bytes: int = 0
