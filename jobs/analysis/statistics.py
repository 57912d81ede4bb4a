"""How exact a measured share is, and whether two shares of the same rows differ. Knows counts only."""

import math

Z_95 = 1.959963984540054  # standard normal, two-sided 95%
MAX_EXACT = 2000  # disagreements up to which the binomial test is computed exactly


def wilson_interval(successes: int, trials: int) -> tuple[float, float]:
    """The 95% score interval of a share (Wilson 1927); (0, 1) for no trials."""
    if not trials:
        return 0.0, 1.0
    share, weight = successes / trials, Z_95**2 / trials
    centre = (share + weight / 2) / (1 + weight)
    half = Z_95 / (1 + weight) * math.sqrt(share * (1 - share) / trials + weight / (4 * trials))
    # At 0 and at 1 rounding could move a limit past the share itself.
    return max(0.0, min(centre - half, share)), min(1.0, max(centre + half, share))


def mcnemar(only_first: int, only_second: int) -> float:
    """The two-sided p-value for two outputs being equally often right on the same rows.

    `only_first` and `only_second` count the rows on which only that output is right. The exact binomial test up to
    MAX_EXACT such rows, beyond that chi-squared with continuity correction.
    """
    total = only_first + only_second
    if total > MAX_EXACT:
        statistic = max(0, abs(only_first - only_second) - 1) ** 2 / total
        return math.erfc(math.sqrt(statistic / 2))
    tail = sum(math.comb(total, k) for k in range(min(only_first, only_second) + 1))
    return min(1.0, 2 * tail / 2**total)
