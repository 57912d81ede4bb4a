"""Runs between control tokens: the ids of the whole text, and never a control token's."""

import json

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from segue.workers.prompts.tokenizer import Piece, RunTokenizer, control_ids, run_tokenizer

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def _bpe(*merges: str, **options: object) -> Tokenizer:
    """A byte-level BPE with the given merges, written "a b"."""
    vocabulary = {character: number for number, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    for merge in merges:
        vocabulary.setdefault(merge.replace(" ", ""), len(vocabulary))
    pairs = [tuple(merge.split(" ")) for merge in merges]
    tokenizer = Tokenizer(models.BPE(vocabulary, pairs, **options))  # type: ignore[arg-type]
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _with_vocabulary(tokenizer: Tokenizer, **ids: int) -> Tokenizer:
    serialised = json.loads(tokenizer.to_str())
    serialised["model"]["vocab"].update(ids)
    return Tokenizer.from_str(json.dumps(serialised))


def _wrap(
    tokenizer: Tokenizer, *special: str, plain: tuple[AddedToken, ...] = (), **names: str
) -> PreTrainedTokenizerFast:
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in special])
    tokenizer.add_tokens(list(plain))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def _same_as_whole(tokenizer: PreTrainedTokenizerFast, runs: RunTokenizer, text: str) -> bool:
    return list(runs.encode(runs.split(text))[0]) == tokenizer(text, add_special_tokens=False)["input_ids"]


def test_control_token_as_run_stays_text_and_as_piece_is_a_token() -> None:
    runs = RunTokenizer(_wrap(_bpe(), "<x>"))
    control = runs.control_ids["<x>"]
    assert runs.encode(runs.split("a<x>b"))[0][1] == control
    as_text = runs.encode([Piece("a<x>b")])[0]
    assert len(as_text) == 5
    assert control not in as_text


def test_control_token_in_the_models_own_vocabulary_is_out_of_reach() -> None:
    """With ignore_merges a model looks whole words up before it merges."""
    tokenizer = _with_vocabulary(_bpe(ignore_merges=True), **{"<x>": 256})
    runs = RunTokenizer(_wrap(tokenizer, "<x>"))
    assert runs.control_ids["<x>"] == 256
    assert 256 not in runs.encode([Piece("<x>")])[0]


def test_control_token_that_merges_spell_is_out_of_reach_of_text() -> None:
    """Qwen's merges write `<s>`, which is HTML to them; a model made of it may have a control token of that name."""
    tokenizer = _wrap(_bpe("< x", "<x >", "<x> a", "b c"), "<x>")
    runs = RunTokenizer(tokenizer)
    control = runs.control_ids["<x>"]
    assert control not in runs.encode([Piece("a<x>b")])[0]
    assert _same_as_whole(tokenizer, runs, "a<xbc<x>a")


def test_control_piece_of_a_unigram_model_is_out_of_reach() -> None:
    pieces = [("<unk>", 0.0), ("</s>", -1.0), *((letter, -5.0) for letter in f"</>{LETTERS}")]
    tokenizer = _wrap(Tokenizer(models.Unigram(pieces, unk_id=0)), "</s>", unk_token="<unk>")
    runs = RunTokenizer(tokenizer)
    assert 1 not in runs.encode([Piece("a</s>b")])[0]
    assert 1 in runs.encode(runs.split("a</s>b"))[0]


def test_white_space_tokens_stay_tokens_of_ordinary_text_under_their_own_ids() -> None:
    """GPT-NeoX writes runs of spaces with added tokens that follow its control tokens."""
    blanks = (AddedToken("  ", normalized=False), AddedToken("\n\n", normalized=False))
    tokenizer = _wrap(_bpe(), "<x>", "<y>", plain=blanks)
    runs = RunTokenizer(tokenizer)
    text = "a  b<x>\n\nc<y>  "
    assert _same_as_whole(tokenizer, runs, text)
    assert {258, 259} <= set(runs.encode(runs.split(text))[0])
    assert set(runs.control_ids) == {"<x>", "<y>"}


def test_token_that_swallows_white_space_gives_the_ids_of_the_whole_text() -> None:
    tokenizer = _bpe()
    tokenizer.add_special_tokens([AddedToken("<l>", lstrip=True, normalized=False)])
    tokenizer.add_special_tokens([AddedToken("<r>", rstrip=True, normalized=False)])
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    runs = RunTokenizer(wrapped)
    text = "a \n<l> b <r>\n c<r>"
    assert _same_as_whole(wrapped, runs, text)
    assert control_ids(runs.split(text)) == (256, 257, 257)


def test_longer_control_token_wins_over_its_prefix() -> None:
    tokenizer = _wrap(_bpe(), "<x", "<x>")
    runs = RunTokenizer(tokenizer)
    assert [piece.text for piece in runs.split("a<x>b<xc")] == ["a", "<x>", "b", "<x", "c"]


def test_control_spans_find_what_a_normalizer_would_make_a_token() -> None:
    tokenizer = _bpe()
    tokenizer.normalizer = normalizers.NFKC()  # type: ignore[assignment]
    wrapped = _wrap(tokenizer, plain=(AddedToken("<tool>", normalized=True),))
    runs = RunTokenizer(wrapped)
    assert runs.control_spans("ab＜tool＞") == [(2, 8, 256)]
    assert 256 not in runs.encode([Piece("ab＜tool＞")])[0]


def test_tokenizer_whose_runs_differ_from_the_whole_is_refused() -> None:
    """A space put before the whole text only, not before what follows a token found in normalized text."""
    tokenizer = _bpe()
    tokenizer.normalizer = normalizers.Prepend("_")  # type: ignore[assignment]
    with pytest.raises(ValueError, match="run by run"):
        RunTokenizer(_wrap(tokenizer, plain=(AddedToken("<tool>", normalized=True),)))


def test_slow_tokenizer_is_refused() -> None:
    with pytest.raises(ValueError, match="fast tokenizer"):
        RunTokenizer(object())  # type: ignore[arg-type]


def test_token_that_straddles_a_border_comes_after_it() -> None:
    runs = RunTokenizer(_wrap(_bpe("b c", "bc d"), "<x>"))
    pieces = runs.split("abcd<x>e")
    texts = [len(ids) for ids in runs.encode(pieces, [2])]
    assert texts == [1, 3]
    assert [len(ids) for ids in runs.encode(pieces, [1, 4, 7])] == [1, 1, 1, 1]


def test_border_inside_a_character_of_several_tokens_cannot_happen() -> None:
    """Byte-level tokens of one character stand together: all of them end where the character ends."""
    runs = RunTokenizer(_wrap(_bpe(), "<x>"))
    assert [len(ids) for ids in runs.encode([Piece("é👋a")], [1, 2])] == [2, 4, 1]


def test_added_prefix_is_what_the_tokenizer_adds_to_text() -> None:
    tokenizer = _bpe()
    tokenizer.add_special_tokens(["<x>", "<y>"])
    tokenizer.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
        single="<x> $A <y>", special_tokens=[("<x>", 256), ("<y>", 257)]
    )
    runs = RunTokenizer(PreTrainedTokenizerFast(tokenizer_object=tokenizer))
    assert (runs.prefix_ids, runs.suffix_ids) == ((256,), (257,))


def test_run_tokenizer_is_made_once_and_again_for_a_tokenizer_that_was_changed():
    tokenizer, other = _wrap(_bpe(), "<x>"), _wrap(_bpe(), "<x>")
    runs = run_tokenizer(tokenizer)
    assert run_tokenizer(tokenizer) is runs
    assert run_tokenizer(other) is not runs
    tokenizer.add_special_tokens({"additional_special_tokens": ["<y>"]})
    assert set(run_tokenizer(tokenizer).control_ids) == {"<x>", "<y>"}
    with pytest.raises(ValueError, match="fast tokenizer"):
        run_tokenizer(object())  # type: ignore[arg-type]
