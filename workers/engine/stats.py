"""What an engine has done, in numbers. Knows nothing else, so that it costs nothing to import."""

from dataclasses import dataclass


@dataclass(slots=True)
class EngineStats:
    """Counters since the engine was made, and at the end its state after the last step."""

    num_steps: int = 0
    step_seconds: float = 0.0  # spent in them, by whoever drives the engine
    num_prompt_tokens: int = 0  # requested: the sum of all prompts
    num_computed_tokens: int = 0  # prompt tokens that went through the model
    num_generated_tokens: int = 0
    num_decode_slots: int = 0  # rows that could have generated in the steps in which any did: max_num_seqs each
    num_empty_slots: int = 0  # of these, without a row
    num_scored_positions: int = 0  # hidden states that went through the vocabulary for scores, each once a step
    num_rows: int = 0
    num_finished_rows: int = 0
    num_finished_tokens: int = 0  # prompt tokens of finished rows, as requested
    num_errors: int = 0
    num_preemptions: int = 0
    num_shrunk_steps: int = 0  # tried again smaller, since the device had no memory for them
    max_kv_bytes: int = 0
    num_running: int = 0  # samples that hold memory
    num_waiting: int = 0  # rows that have not begun
    kv_bytes: int = 0  # in use
    kv_capacity_bytes: int = 0
