"""The method's pure functions, with generated data where a property says more than an example."""

import functools
import itertools
import random
import time
from collections import Counter

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from resources.common.processes import map_batches
from synpo_assets.method.ids import content_id
from synpo_assets.method.keywords import (
    Keywords,
    drawn_rows,
    keyword_set,
    paragraph_keyword_sets,
    paragraphs_of,
    training_keywords,
)
from synpo_assets.method.pairs import MESSAGES, as_preferences, join_sides, repetition, select_pairs
from synpo_assets.method.prompts import Contamination, NearDuplicates, PromptFilter, draw_until_enough, ngrams
from synpo_assets.method.responses import response_table
from synpo_assets.method.seed import seed_rows as check_seed
from synpo_assets.method.templates import (
    generator_instruction,
    generator_target,
    improver_instruction,
    parse_question,
)
from synpo_assets.method.words import words_of
from tests.nano import seed_rows
from tests.stand_ins import scored

PARAGRAPHS = [row["text"] for row in seed_rows("corpus")]
PROMPTS = [row["prompt"] for row in seed_rows()]
TEXT = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), min_size=1)


def test_ids_depend_on_kind_and_content_alone():
    assert content_id("prompt", "a") == content_id("prompt", "a")
    assert len({content_id("prompt", "a"), content_id("pair", "a"), content_id("prompt", "b")}) == 3
    assert content_id("pair", "ab", "c") != content_id("pair", "a", "bc")


def test_names_and_stopwords_are_no_keywords():
    text = "Maria Lopez, a baker, keeps a starter of flour and water. A rose grows beside the oven."
    found = Keywords("en").of(text, 20)
    assert {"maria", "lopez", "the", "and"}.isdisjoint(found)
    assert {"baker", "flour", "rose"} <= set(found)
    assert "maria" in Keywords("en", drop_personal_names=False).of(text, 20)


def test_as_many_keywords_as_asked_for_are_found():
    letters = "bcdfghklmnprstvz"
    words = [f"{a}a{b}e{a}o" for a in letters for b in letters][:120]
    assert len(Keywords("en").of(" ".join(words), 120)) == 120
    assert Keywords("en").of(" ".join(words), 120)[:20] == Keywords("en").of(" ".join(words), 20)


def test_training_keywords_are_two_own_and_one_foreign():
    extractor = Keywords()
    drawn = training_keywords(PROMPTS[:40], extractor, 2, 1, random_seed=1)
    assert sum(keywords is None for keywords in drawn) < 4
    foreign_places = set()
    for prompt, keywords in zip(PROMPTS, drawn, strict=False):
        if keywords is not None:
            own = [word for word in keywords if word in words_of(prompt)]
            assert len(keywords) == len(set(keywords)) == 3
            assert len(own) >= 2
            foreign_places |= {place for place, word in enumerate(keywords) if word not in own}
    assert foreign_places == {0, 1, 2}, "the noise keyword must not give itself away by its place"
    assert drawn == training_keywords(PROMPTS[:40], extractor, 2, 1, random_seed=1)
    assert drawn != training_keywords(PROMPTS[:40], extractor, 2, 1, random_seed=2)


class WordsAsKeywords:
    def of(self, text, count):
        return text.split()[:count]


def test_noise_is_found_in_the_only_prompt_that_has_some_and_drawn_from_all_alike():
    for seed in range(20):
        first, second, short = training_keywords(["a b", "b a", "c"], WordsAsKeywords(), 2, 1, seed)
        assert set(first) == set(second) == {"a", "b", "c"}
        assert short is None
        assert training_keywords(["a b", "b a", ""], WordsAsKeywords(), 2, 1, seed) == [None, None, None]
    prompts = ["a b", "c d", "e f", "g h"]
    noise = Counter(
        (set(training_keywords(prompts, WordsAsKeywords(), 2, 1, seed)[0]) - {"a", "b"}).pop() for seed in range(600)
    )
    assert set(noise) == set("cdefgh")
    assert all(70 < times < 130 for times in noise.values()), noise


def test_keywords_of_a_large_seed_take_no_copy_of_it_for_each_of_its_rows():
    started = time.process_time()
    few = training_keywords([f"{n}a {n}b" for n in range(2_000)], WordsAsKeywords(), 2, 1, 1)
    middle = time.process_time()
    many = training_keywords([f"{n}a {n}b" for n in range(20_000)], WordsAsKeywords(), 2, 1, 1)
    assert None not in few + many
    assert time.process_time() - middle < 40 * (middle - started), (
        "ten times the rows took more than forty times as long"
    )


def keyword_sets(paragraphs, per_paragraph, processes=1, batch=15):
    extract = functools.partial(Keywords().of_each, count=3 * per_paragraph)
    return paragraph_keyword_sets(map_batches(extract, paragraphs, batch, processes), 3, random_seed=1)


def test_keyword_sets_come_from_one_paragraph_and_are_all_different():
    # Each stands there twice, and two of their sets are drawn twice.
    paragraphs = PARAGRAPHS[:25] * 2
    sets = list(keyword_sets(paragraphs, 2))
    assert len(sets) > len(paragraphs)
    assert len({frozenset(words) for _, words in sets}) == len(sets)
    for paragraph, words in sets:
        assert len(set(words)) == 3
        assert all(word in paragraph.lower() for word in words)
    assert list(keyword_sets(paragraphs, 2, processes=2)) == sets


@pytest.mark.parametrize("processes", [1, 2])
def test_the_corpus_is_streamed(processes):
    assert len(list(itertools.islice(keyword_sets(itertools.cycle(PARAGRAPHS), 1, processes), 5))) == 5


@pytest.mark.parametrize(
    ("document", "paragraphs"),
    [
        ("one paragraph", ["one paragraph"]),
        ("of a web page\nwhose lines\nare paragraphs\n", ["of a web page", "whose lines", "are paragraphs"]),
        ("wrapped\nlines\n\nand more\n \n\nof them", ["wrapped\nlines", "and more", "of them"]),
        ("\r\nwritten\r\n\r\nelsewhere", ["written", "elsewhere"]),
    ],
)
def test_paragraphs_of_a_document(document, paragraphs):
    assert paragraphs_of(document) == paragraphs


def test_a_keyword_set_is_the_same_in_any_order():
    one, other = keyword_set("p", ["a", "b"]), keyword_set("p", ["b", "a"])
    assert one["keyword_set_id"] == other["keyword_set_id"]


@given(st.integers(1, 200), st.integers(1, 6), st.integers(1, 60))
def test_iterations_draw_different_rows_until_the_pool_is_used_up(pool, iterations, count):
    drawn = [drawn_rows(pool, iteration, count, 7) for iteration in range(1, iterations + 1)]
    for rows in drawn:
        assert len(set(rows)) == len(rows) == min(count, pool)
    if iterations * count <= pool:
        assert len(set(itertools.chain(*drawn))) == iterations * count


@given(TEXT.filter(lambda text: text.strip() and "<" not in text), TEXT.filter(lambda text: "<" not in text))
def test_what_the_generator_learns_can_be_parsed_back(prompt, answer):
    assert parse_question(generator_target(prompt, answer)) == prompt.strip()


@pytest.mark.parametrize("text", ["", "no tags", "<question>open", "<question></question>", "</question>a<question>",
                                  "<question>a<question>b</question>"])  # fmt: skip
def test_malformed_questions_are_not_parsed(text):
    assert parse_question(text) is None


def test_templates_hold_their_parts_in_order():
    asked = generator_instruction(["pan", "oil", "heat"])[0]["content"]
    places = [asked.index(part) for part in ("exactly one question", "Requirements", "pan, oil, heat", "Output format")]
    assert places == sorted(places)
    asked = improver_instruction("PROMPT", "RESPONSE")[0]["content"]
    places = [asked.index(part) for part in ("editor", "PROMPT", "RESPONSE", "Rewritten answer")]
    assert places == sorted(places)


def test_curly_braces_in_text_are_text():
    assert "{{ secret }}" in improver_instruction("{{ secret }}", "x")[0]["content"]


def prompt_filter(held_out=(), language=None, **options):
    defaults = {"min_words": 3, "max_words": 12, "language": language}
    return PromptFilter(**(defaults | options), near_duplicates=NearDuplicates(0.7),
                        contamination=Contamination(held_out, 5))  # fmt: skip


def question(text):
    return f"OUTPUT\n<question>{text}</question>"


def test_each_rule_drops_and_counts():
    def fits(prompt):
        return "Pneumonoultramicroscopicsilicovolcanoconiosis" not in prompt

    prompts = prompt_filter(["How do I keep my bread fresh for a week?"], language="en", fits=fits)
    assert prompts.keep(question("How can a beginner learn to knit scarves?")) is not None
    for written in [
        "nothing", question("Why?"), question("word " * 13), question("Wie lange muss man Kartoffeln im Topf kochen?"),
        question("Please tell me how do I keep my bread fresh today"),
        question("How can a beginner learn to knit scarves?"),
        question("What is Pneumonoultramicroscopicsilicovolcanoconiosis and who has it?"),
    ]:  # fmt: skip
        assert prompts.keep(written) is None
    assert dict(prompts.dropped) == dict.fromkeys(
        ["unparsable", "too_short", "too_long", "other_language", "contaminated", "near_duplicate", "over_context"], 1
    )
    assert prompts.matches == [
        ("Please tell me how do I keep my bread fresh today", "How do I keep my bread fresh for a week?")
    ]


def shared_pairs(one, other):
    """The Jaccard similarity of the word pairs of two texts of two words or more."""
    pairs = [set(itertools.pairwise(text.split())) for text in (one, other)]
    return len(pairs[0] & pairs[1]) / len(pairs[0] | pairs[1])


def test_texts_well_above_the_similarity_are_found():
    known = NearDuplicates(0.7)
    texts = [[f"w{number}x{place}" for place in range(20)] for number in range(400)]
    changed = [" ".join([*words[:-1], "other"]) for words in texts]
    for words, other in zip(texts, changed, strict=True):
        known.add(" ".join(words))
        assert shared_pairs(" ".join(words), other) == 0.9
    found = [known.find(other) == " ".join(words) for words, other in zip(texts, changed, strict=True)]
    assert sum(found) >= 0.95 * len(texts)


@given(
    st.lists(st.lists(st.sampled_from("abcd"), min_size=2, max_size=12).map(" ".join), min_size=1, max_size=12),
    st.lists(st.sampled_from("abcd"), min_size=2, max_size=12).map(" ".join),
    st.sampled_from([0.5, 0.55, 0.7, 0.9, 1.0]),
)
@settings(deadline=None)
def test_what_is_found_is_similar_enough_and_a_copy_is_always_found(texts, asked, similarity):
    known = NearDuplicates(similarity)
    assert known.find(asked) is None
    for text in texts:
        known.add(text)
    found = known.find(asked)
    assert found is None or (found in texts and shared_pairs(found, asked) >= similarity)
    for text in texts:
        assert known.find(text.upper()) is not None


def test_a_short_held_out_prompt_is_compared_as_a_whole():
    held_out = Contamination(["Define entropy briefly"], 8)
    assert held_out.find("DEFINE entropy, briefly!") == "Define entropy briefly"
    assert held_out.find("Now define entropy briefly, please") is None
    assert held_out.find("Define enthalpy briefly") is None


def test_of_several_held_out_prompts_the_same_one_comes_first_and_then_the_alphabet():
    held_out = ["x a b c", "d a b c", "Q a b c"]
    assert Contamination(held_out, 3).find("x a b c") == "x a b c"
    assert Contamination(held_out, 3).find("y a b c") == Contamination(held_out[::-1], 3).find("y a b c") == "Q a b c"


def test_prompts_without_a_word_are_not_the_same():
    assert Contamination(["?!", "🙂"], 3).find("...") is None


WORDS = st.lists(st.sampled_from("abc"), max_size=7)


@given(st.lists(WORDS, max_size=6), WORDS, st.integers(2, 5))
def test_short_held_out_prompts_drop_their_equals_alone_and_longer_ones_what_shares_a_run(held_out, words, ngram):
    def runs(of):
        return {tuple(of[start : start + ngram]) for start in range(len(of) - ngram + 1)}

    asked = [" ".join(each).upper() + "?" for each in held_out]
    by_hand = {
        prompt for prompt, each in zip(asked, held_out, strict=True)
        if (words and each == words) or (len(each) >= ngram and runs(each) & runs(words))
    }  # fmt: skip
    found = Contamination(asked, ngram).find(", ".join(words))
    assert found in by_hand if by_hand else found is None
    short = [prompt for prompt, each in zip(asked, held_out, strict=True) if len(each) < ngram]
    found = Contamination(short, ngram).find(", ".join(words))
    assert (found is not None) == bool(words and len(words) < ngram and words in held_out)


@given(st.lists(st.sampled_from("abcdef"), max_size=12), st.integers(1, 4))
def test_ngrams_cover_the_text(words, size):
    runs = ngrams(words, size)
    assert {word for run in runs for word in run} == set(words)


@given(st.integers(1, 30), st.integers(0, 60), st.floats(0, 1))
@settings(deadline=None, max_examples=30)
def test_drawing_stops_when_enough_or_used_up(wanted, available, valid_share):
    asked = []

    def write(rows):
        asked.extend(rows)
        good = [row["row"] % 100 < valid_share * 100 for row in rows]
        return [{"text": question(f"unique prompt {row['row']} about {'x' * (row['row'] + 1)}") if ok else ""}
                for row, ok in zip(rows, good, strict=True)]  # fmt: skip

    prompts = prompt_filter()
    kept, used = draw_until_enough([{"row": number} for number in range(available)], wanted, write, prompts.keep)
    assert used == len(asked) <= available
    assert len(kept) <= wanted
    assert len(kept) == wanted or used == available
    assert [row["row"] for row in kept] == sorted(row["row"] for row in kept)


@pytest.mark.parametrize("valid_share", [0.3, 0.6, 0.9])
def test_two_rounds_of_drawing_are_mostly_enough(valid_share):
    draw, rounds = random.Random(1), []

    def write(rows):
        rounds.append(len(rows))
        return [{"text": "valid" if draw.random() < valid_share else ""} for _ in rows]

    kept, _ = draw_until_enough([{"row": number} for number in range(5000)], 1000, write, lambda text: text or None)
    assert len(kept) == 1000
    assert len(rounds) == 2
    assert sum(rounds) < 1.25 * 1000 / valid_share


@given(st.lists(st.sampled_from(["a", "b", "c"]), max_size=20), st.integers(1, 3))
def test_repetition_is_a_share_and_grows_when_text_is_repeated(words, size):
    text = " ".join(words)
    assert 0 <= repetition(text, size) <= 1
    assert repetition(f"{text} {text}", size) >= repetition(text, size)


def responses(side, texts, sha="sha", ending="stop", first=0):
    completions = pl.DataFrame({"text": texts, "input_tokens": 1, "output_tokens": 1, "finish_reason": ending})
    numbers = range(first, first + len(texts))
    prompts = pl.DataFrame(
        {"prompt_id": [f"prompt-{n}" for n in numbers], "prompt": [f"question {n}" for n in numbers]}
    )
    return response_table(prompts, completions, f"{sha}-{side}", 1)


def test_sides_are_joined_by_prompt_and_not_by_place():
    chosen, rejected = responses("r", ["c0", "c1", "c2"]), responses("0", ["r0", "r1", "r2"])
    joined = join_sides(chosen, rejected.reverse())
    assert joined.select("prompt", "chosen_response", "rejected_response").rows() == [
        ("question 0", "c0", "r0"), ("question 1", "c1", "r1"), ("question 2", "c2", "r2")
    ]  # fmt: skip
    assert joined["chosen_checkpoint_sha"].unique().to_list() == ["sha-r"]
    assert joined["rejected_checkpoint_sha"].unique().to_list() == ["sha-0"]


@given(
    st.lists(st.tuples(st.sampled_from(["", "same", "good words here", "loop loop loop loop loop"]), st.floats(-2, 2),
                       st.floats(-2, 2)), min_size=1, max_size=25),
    st.floats(-1, 1), st.integers(1, 10),
)  # fmt: skip
@settings(deadline=None, max_examples=50)
def test_kept_pairs_obey_every_rule_and_every_other_one_is_counted(rows, threshold, count):
    joined = join_sides(responses("r", [text for text, _, _ in rows]), responses("0", ["same"] * len(rows)))
    asked = scored(joined, pl.Series([score for _, score, _ in rows]), pl.Series([s for _, _, s in rows]))
    kept, dropped = select_pairs(asked, threshold, 0.5, 1, count, random_seed=3)
    assert kept.height + sum(dropped.values()) == len(rows)
    assert kept.height <= count
    for row in kept.to_dicts():
        assert row["margin"] == row["chosen_score"] - row["rejected_score"] > threshold
        assert row["chosen_response"] == "good words here"
    again, _ = select_pairs(asked, threshold, 0.5, 1, count, random_seed=3)
    assert again.equals(kept)


def test_the_margin_must_exceed_the_threshold():
    joined = join_sides(responses("r", ["good words"]), responses("0", ["other"]))
    asked = scored(joined, 1.0, 0.5)
    assert select_pairs(asked, 0.5, 0.5, 3, 9, 0)[0].is_empty()
    assert select_pairs(asked, 0.4, 0.5, 3, 9, 0)[0].height == 1


def test_preferences_are_conversational():
    joined = join_sides(responses("r", ["better"]), responses("0", ["worse"]))
    kept, _ = select_pairs(scored(joined, 1.0, 0.0), 0, 1, 3, 1, 0)
    row = as_preferences(kept).row(0, named=True)
    assert row["prompt"] == [{"role": "user", "content": "question 0"}]
    assert row["chosen"] == [{"role": "assistant", "content": "better"}]
    assert row["rejected"] == [{"role": "assistant", "content": "worse"}]


def test_the_sample_and_its_ids_never_change():
    chosen, rejected = ([f" {side} {n}\t" for n in range(8)] for side in ("better", "worse"))
    joined = join_sides(responses("r", chosen), responses("0", rejected))
    asked = scored(joined, pl.Series(range(8), dtype=pl.Float64), 1.5)
    kept, dropped = select_pairs(asked, 0, 1, 3, 3, random_seed=5)
    assert dropped == {"cut": 0, "empty_side": 0, "equal_sides": 0, "repetition": 0, "margin": 2, "not_sampled": 3}
    frame = as_preferences(kept)
    assert frame.select("prompt_id", "pair_id").rows() == [
        ("prompt-2", "pair-39105081ba634b9f"), ("prompt-3", "pair-c39306ac4199d88f"), ("prompt-5", "pair-cd13b75f76c40d55")
    ]  # fmt: skip
    assert frame.schema["prompt"] == frame.schema["chosen"] == frame.schema["rejected"] == MESSAGES
    assert as_preferences(kept.clear()).schema == frame.schema


def test_bad_seed_rows_are_named_by_line():
    train = [
        {"prompt": "good", "answer": "a"}, {"prompt": "", "answer": "a"}, {"prompt": "x"}, {"prompt": True, "answer": "a"},
        {"prompt": "Good ", "answer": "b"}, {"prompt": "shared", "answer": "a"}, {},
    ]  # fmt: skip
    good, bad = check_seed(list(enumerate(train, 1)), [(1, {"prompt": "shared", "answer": "a"})], "prompt", "answer")
    assert [(row["split"], row["prompt"]) for row in good] == [("held_out", "shared"), ("train", "good")]
    assert [(row.line, row.reason) for row in bad] == [
        (2, "the prompt is empty"), (3, "the answer is missing"),
        (4, "the prompt is a truth value, where text or chat messages are needed"),
        (5, "the same prompt stands in line 1 of train"), (6, "the same prompt stands in line 1 of held_out"),
        (7, "the line is no JSON object in UTF-8, or an empty one"),
    ]  # fmt: skip


def test_seed_rows_may_be_chat_messages():
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    good, bad = check_seed([(1, {"m": chat})], [], "m", "m")
    assert bad == []
    assert (good[0]["prompt"], good[0]["answer"]) == ("hi", "hello")
    second_round = [{"role": "user", "content": "more"}, {"role": "assistant", "content": "no"}]
    good, bad = check_seed([(1, {"m": chat + second_round})], [], "m", "m")
    assert good == []
    assert bad[0].reason == "the prompt is a conversation of 4 turns: a row is one question and its answer"
