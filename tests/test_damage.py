"""Damages are worse in one known way, end as before, and are the same under one seed."""

import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from synpo_assets.method.damage import DAMAGES, all_damages, damaged, ending, parts_of
from tests.nano import seed_rows

SENTENCES = st.lists(
    st.lists(st.sampled_from(["the", "salt", "river", "7", "12", "runs", "400", "Anna's"]), min_size=1, max_size=6).map(
        lambda words: " ".join(words).capitalize() + "."
    ),
    min_size=1,
    max_size=5,
).map(" ".join)
LISTS = st.tuples(
    st.sampled_from(["-", "1.", "*"]),
    st.lists(st.sampled_from(["boil 2 eggs", "wait", "eat it.", "rest 5 days"]), min_size=1),
).map(lambda made: "\n".join(f"{made[0].replace('1', str(place))} {item}" for place, item in enumerate(made[1], 1)))
ANSWERS = st.one_of(SENTENCES, LISTS, st.text(max_size=60))
GOLD = [row["answer"] for row in seed_rows()]


@given(ANSWERS, ANSWERS, st.integers(0, 9), st.integers(0, 9))
def test_a_damage_changes_the_text_but_not_how_it_ends(text, other, seed, another):
    for name in DAMAGES:
        worse = damaged(name, text, other, seed)
        assert worse == damaged(name, text, other, seed)
        assert (worse is None) == (damaged(name, text, other, another) is None), "whether it applies is no draw"
        if worse is not None:
            assert worse != text
            assert ending(worse) == ending(text)
            assert name in all_damages(text, other, seed)


def words(text):
    return re.findall(r"\w+", text.lower())


def test_of_another_answer_only_the_mark_at_the_start_of_an_item_goes():
    for other in ("Pay your rent - on time.", "- Pay your rent - on time."):
        assert (
            damaged("off_topic_sentence", "- apples\n- pears", other, 0)
            == "- apples\n- Pay your rent - on time\n- pears"
        )


@given(st.sampled_from(GOLD), st.sampled_from(GOLD), st.integers(0, 9))
def test_each_damage_of_a_gold_answer_is_the_one_that_it_is_called_by(text, other, seed):
    found = all_damages(text, other, seed)
    assert all(len(found[name]) < len(text) for name in ("lost_item", "shortened") if name in found)
    if "shortened" in found:
        assert text.startswith(found["shortened"])
    assert len(found["repeated_item"]) > len(text)
    assert set(words(found["repeated_item"])) >= set(words(text)) - {str(number) for number in range(99)}
    if "changed_number" in found:
        masked = [re.sub(r"\d", "0", each) for each in (text, found["changed_number"])]
        assert masked[0] == masked[1]
        changed = [re.findall(r"\d+", each) for each in (text, found["changed_number"])]
        assert sum(one != now for one, now in zip(*changed, strict=True)) == 1
    for name in ("swapped_order", "swapped_words"):
        if name in found:
            assert sorted(words(found[name])) == sorted(words(text))
    if "off_topic_sentence" in found:
        assert len(found["off_topic_sentence"].split()) >= len(text.split()) + 3


def test_most_gold_answers_can_be_damaged_in_most_ways():
    applied = [all_damages(text, other, 0) for text, other in zip(GOLD, GOLD[1:] + GOLD[:1], strict=True)]
    counts = {name: sum(name in found for found in applied) for name in DAMAGES}
    assert all(counts[name] >= 0.2 * len(GOLD) for name in DAMAGES), counts
    assert counts["swapped_words"] > 0.9 * len(GOLD)


@pytest.mark.parametrize(("text", "other", "two"), [
    ("水在零度结冰。冰比水轻。所以冰浮在水上。", "请按时付房租。", "水在零度结冰。冰比水轻。"),
    ("Лёд легче воды. Поэтому он плавает. Вода тяжелее льда.", "Плати за жильё вовремя.", "Лёд легче воды. Поэтому он плавает."),
    ("الجليد أخف من الماء. لذلك يطفو. الماء أثقل من الجليد.", "ادفع الإيجار في موعده.", "الجليد أخف من الماء. لذلك يطفو."),
    ("बर्फ पानी से हल्की है। इसलिए वह तैरती है। पानी भारी है।", "किराया समय पर चुकाएँ।", "बर्फ पानी से हल्की है। इसलिए वह तैरती है।"),
    ("Öl schwimmt. Äpfel auch. Über Steine staunt er.", "Überweise die Miete bald.", "Öl schwimmt. Äpfel auch."),
])  # fmt: skip
def test_sentences_of_other_scripts_are_damaged_one_by_one(text, other, two):
    parts, gaps = parts_of(text)
    assert len(parts) == 3
    assert "".join(f"{gap}{part}" for gap, part in zip(gaps, parts, strict=True)) == text
    assert damaged("shortened", text, other, 0) == parts[0]
    assert text.startswith(two)
    seen = {seed: damaged("repeated_item", text, other, seed) for seed in range(30)}
    assert set(seen.values()) == {text.replace(part, f"{part}{gaps[1]}{part}") for part in parts}
    added = {damaged("off_topic_sentence", text, other, seed) for seed in range(30)}
    assert added == {text.replace(part, f"{other}{gaps[1]}{part}") for part in parts}
    assert {"lost_item", "shortened", "repeated_item", "swapped_order", "off_topic_sentence"} <= set(
        all_damages(text, other, 0)
    )


@pytest.mark.parametrize("part", ["{}. Wait {} minutes\n", "It rains {} or {} days. "])
def test_a_long_answer_takes_no_damage_long(part):
    text = "".join(part.format(number, number) for number in range(1, 10_001)).rstrip()
    began = time.process_time()
    assert len(all_damages(text, "Pay your rent on time.", seed=0)) == len(DAMAGES)
    assert time.process_time() - began < 5
