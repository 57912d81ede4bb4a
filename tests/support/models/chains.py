"""Hypothesis strategies for prompts that share beginnings: chains of segments drawn from a small alphabet."""

from hypothesis import strategies as st

from segue.attention.segments import Segment, canonical_segments

tokens = st.lists(st.integers(3, 6), min_size=1, max_size=6).map(tuple)
segments = st.builds(Segment, tokens, st.booleans())


@st.composite
def chains(draw: st.DrawFn, max_rows: int = 6, mask: str = "segment") -> list[tuple[Segment, ...]]:
    """Rows that extend, repeat or branch off one another at segment borders and inside causal runs."""
    rows: list[tuple[Segment, ...]] = []
    for _ in range(draw(st.integers(1, max_rows))):
        kept: tuple[Segment, ...] = ()
        if rows and draw(st.booleans()):
            base = draw(st.sampled_from(rows))
            kept = base[: draw(st.integers(0, len(base)))]
        own = draw(st.lists(segments, min_size=0 if kept else 1, max_size=3))
        rows.append(canonical_segments([*kept, *own], mask=mask))
    return rows
