"""How many rows of a job are done, how many have an error, and whether the errors end the run.

What planning found is judged against the whole job, before a worker starts. What workers find counts beside it. Both
end a job for good only when it is certain to be over its limit. Knows numbers; no Ray, no store.
"""

from dataclasses import dataclass

from segue.pipeline.jobfile.schema import MIN_ROWS_FOR_ERROR_RATE
from segue.pipeline.ledger.totals import is_over_limit
from segue.pipeline.run.receipt import Receipt


@dataclass(slots=True)
class Tally:
    """Rows so far: those that were committed when the run began, and those in receipts of this run."""

    num_rows: int  # of the whole job, planned or not
    max_error_rate: float
    rows_before: int = 0
    errors_before: int = 0  # that workers found
    planned_errors: int = 0  # that planning found, in the plan as it is now
    rows: int = 0
    errors: int = 0  # that workers found
    computed_rows: int = 0  # rows that workers computed: in the others planning had found an error
    computed: int = 0  # tokens
    commits: int = 0

    @property
    def all_rows(self) -> int:
        return self.rows_before + self.rows

    @property
    def all_errors(self) -> int:
        return self.planned_errors + self.errors_before + self.errors

    @property
    def is_over_limit(self) -> bool:
        """Whether the job has more errors than it may, however its other rows end."""
        return is_over_limit(self.num_rows, self.all_errors, self.max_error_rate)

    @property
    def is_hopeless(self) -> bool:
        """Whether this run computed many rows and answered none: then the model, not the rows, is to blame. If these
        rows are odd ones after all, the next run goes on, since it begins with others."""
        return self.max_error_rate < 1 and MIN_ROWS_FOR_ERROR_RATE <= self.computed_rows == self.errors

    @property
    def reason(self) -> str:
        """Why the errors end this run, or "" if they do not."""
        of_all = (
            f"of the job's {self.num_rows:,} rows, more than limits.max_error_rate, {self.max_error_rate:g}, allows"
        )
        if is_over_limit(self.num_rows, self.planned_errors, self.max_error_rate):
            return f"planning found an error in {self.planned_errors:,} {of_all}"
        if self.is_over_limit:
            return f"there is an error in {self.all_errors:,} {of_all}"
        if self.is_hopeless:
            return f"this run computed {self.computed_rows:,} rows and not one of them was answered"
        return ""

    def add(self, receipt: Receipt) -> None:
        self.rows += receipt.num_rows
        self.computed += receipt.num_computed_tokens
        self.computed_rows += receipt.num_rows - receipt.num_planned_errors
        self.errors += sum(receipt.errors.values()) - receipt.num_planned_errors
        self.commits += receipt.status == "committed"

    def allows_in_unit(self, num_rows: int, num_errors: int) -> bool:
        """Whether a unit may have so many errors that each cost processes, in view of the rows that are done. Without
        this a unit whose every row ends its worker would be searched for days."""
        found = self.errors_before + self.errors + num_errors
        return not is_over_limit(self.all_rows + num_rows, found, self.max_error_rate)
