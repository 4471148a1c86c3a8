"""Makes the seed whose answers a program can check: resources/seed/rules/*.jsonl, of topics and templates written by hand.

    python -m tests.benchmarks.rules_seed

A topic gives words, facts, steps, a note and an opinion. Each kind of task below turns them into a prompt, a gold answer and the
rules that gold follows; gold that does not ends the script. Train, dev and test have topics and templates of their own, and dev
and test also have combinations of rules that train does not have.
"""

import dataclasses
import json
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

from synpo_assets.method.rules import followed, read_constraints

SEED = Path(__file__).parents[2] / "resources" / "seed"
# Words that a sentence of a fact can do without.
COMMON = ("the", "is", "and", "a", "to", "very", "of")
Rules = dict[str, object]
Task = tuple[str, str, Rules]


@dataclasses.dataclass(frozen=True)
class Ask:
    """A template to be filled with a topic; `draw` makes the choices."""

    template: str
    topic: dict[str, Any]
    fact: str
    text: str  # Two or three facts: answers of one sentence alone would teach brevity.
    items: list[str]
    start: str
    end: str
    draw: random.Random

    def prompt(self, **fields: object) -> str:
        """The template, filled."""
        known = {"topic": self.topic["topic"], "n": len(self.items), "task": self.topic["how_to"][0], "fact": self.fact}
        return self.template.format(**known | fields)

    @property
    def steps(self) -> list[str]:
        """The steps of the topic's task, in order."""
        return list(self.topic["how_to"][1])


def _lines(items: list[str], mark: str = "- ") -> str:
    return "\n".join(f"{mark.format(place)}{item}" for place, item in enumerate(items, start=1))


def _words(text: str) -> list[str]:
    return text.rstrip(".").replace(",", "").split()


def dashes(ask: Ask) -> Task:
    n = len(ask.items)
    return ask.prompt(), _lines(ask.items), {"dashes_exactly": n, "lines_exactly": n}


def numbered(ask: Ask) -> Task:
    return ask.prompt(n=len(ask.steps)), _lines(ask.steps, "{}. "), {"numbered_exactly": len(ask.steps)}


def commas(ask: Ask) -> Task:
    return ask.prompt(), ", ".join(ask.items), {"comma_items_exactly": len(ask.items)}


def json_list(ask: Ask) -> Task:
    return ask.prompt(), json.dumps(ask.items), {"json_list_of": len(ask.items)}


def json_object(ask: Ask) -> Task:
    gold = {"topic": ask.topic["topic"], "fact": ask.fact}
    return ask.prompt(), json.dumps(gold), {"json_object_with": list(gold)}


def one_sentence(ask: Ask) -> Task:
    return ask.prompt(), ask.fact, {"sentences_at_most": 1}


def words_at_most(ask: Ask) -> Task:
    most = len(ask.text.split()) + ask.draw.choice([0, 1, 2, 4])
    return ask.prompt(n=most, m=most + 1), ask.text, {"words_at_most": most}


def words_at_least(ask: Ask) -> Task:
    gold = " ".join(ask.topic["facts"])
    least = len(gold.split()) - ask.draw.choice([0, 1, 2, 3])
    return ask.prompt(n=least), gold, {"words_at_least": least}


def starts_with(ask: Ask) -> Task:
    gold = f"{ask.start} {ask.text[0].lower()}{ask.text[1:]}"
    return ask.prompt(start=ask.start), gold, {"starts_with": ask.start}


def ends_with(ask: Ask) -> Task:
    return ask.prompt(end=ask.end), f"{ask.text} {ask.end}", {"ends_with": ask.end}


def contains(ask: Ask) -> Task:
    word = max(ask.draw.sample(_words(ask.fact), 3), key=len).lower()
    return ask.prompt(word=word), ask.text if ask.fact in ask.text else ask.fact, {"contains": word}


def avoids(ask: Ask) -> Task:
    word = ask.draw.choice([word for word in COMMON if word not in ask.text.lower().replace(".", " ").split()])
    return ask.prompt(word=word), ask.text, {"avoids": word}


def lowercase(ask: Ask) -> Task:
    return ask.prompt(), ask.text.lower(), {"all_lowercase": None}


def uppercase(ask: Ask) -> Task:
    return ask.prompt(), ask.text.upper(), {"all_uppercase": None}


def in_quotes(ask: Ask) -> Task:
    return ask.prompt(), f'"{ask.text}"', {"in_quotes": None}


def question(ask: Ask) -> Task:
    topic, (task, _) = ask.topic["topic"], ask.topic["how_to"]
    wordings = ("How do you {1}?", "What do you like most about {0}?", "What should a beginner know about {0}?")
    gold = ask.draw.choice(wordings).format(topic, task)
    return ask.prompt(), gold, {"question_marks_exactly": 1, "sentences_at_most": 1}


def classify(ask: Ask) -> Task:
    opinion, label = ask.topic["review"]
    return ask.prompt(text=opinion), label, {"is_one_of": label}


def extract(ask: Ask) -> Task:
    text, asked, found = ask.topic["note"]
    return ask.prompt(text=text, question=asked), found, {"contains": found, "words_at_most": len(found.split()) + 4}


def arithmetic(ask: Ask) -> Task:
    left, more = ask.draw.randint(3, 40), ask.draw.randint(2, 9)
    gold = left + more if "{a}" in ask.template else left
    return ask.prompt(a=left, b=more, sum=left + more, unit=ask.topic["unit"]), str(gold), {"is_one_of": gold}


def sort(ask: Ask) -> Task:
    ordered = sorted(ask.items)
    rules: Rules = {"in_order": "|".join(ordered), "comma_items_exactly": len(ordered)}
    return ask.prompt(shuffled=", ".join(ask.items)), ", ".join(ordered), rules


def steps(ask: Ask) -> Task:
    shuffled = "\n".join(ask.draw.sample(ask.steps, len(ask.steps)))
    rules: Rules = {"in_order": "|".join(ask.steps), "lines_exactly": len(ask.steps)}
    return ask.prompt(shuffled=shuffled), "\n".join(ask.steps), rules


def rewrite(ask: Ask) -> Task:
    upper = "lowercase" not in ask.template and "without any capital" not in ask.template
    kept: Rules = {"contains": " ".join(_words(ask.fact)[:3])}
    return (
        ask.prompt(),
        ask.fact.upper() if upper else ask.fact.lower(),
        ({"all_uppercase": None} if upper else {"all_lowercase": None}) | kept,
    )


def dashes_lowercase(ask: Ask) -> Task:
    return ask.prompt(), _lines(ask.items), {"dashes_exactly": len(ask.items), "all_lowercase": None}


def sentence_uppercase(ask: Ask) -> Task:
    return ask.prompt(), ask.fact.upper(), {"all_uppercase": None, "sentences_at_most": 1}


def sentence_in_quotes(ask: Ask) -> Task:
    return ask.prompt(), f'"{ask.fact}"', {"in_quotes": None, "sentences_at_most": 1}


def json_lowercase(ask: Ask) -> Task:
    return ask.prompt(), json.dumps(ask.items), {"json_list_of": len(ask.items), "all_lowercase": None}


def lowercase_contains(ask: Ask) -> Task:
    word = max(_words(ask.fact), key=len).lower()
    return ask.prompt(word=word), ask.fact.lower(), {"contains": word, "all_lowercase": None}


def sentence_contains(ask: Ask) -> Task:
    word = max(_words(ask.fact), key=len).lower()
    return ask.prompt(word=word), ask.fact, {"contains": word, "sentences_at_most": 1}


def short_with_end(ask: Ask) -> Task:
    gold = f"{ask.text} {ask.end}"
    most = len(gold.split()) + 2
    return ask.prompt(m=most, end=ask.end), gold, {"words_at_most": most, "ends_with": ask.end}


def numbered_lowercase(ask: Ask) -> Task:
    return ask.prompt(), _lines(ask.items, "{}. "), {"numbered_exactly": len(ask.items), "all_lowercase": None}


KINDS: tuple[Callable[[Ask], Task], ...] = (
    dashes, numbered, commas, json_list, json_object, one_sentence, words_at_most, words_at_least, starts_with, ends_with,
    contains, avoids, lowercase, uppercase, in_quotes, question, classify, extract, arithmetic, sort, steps, rewrite,
    dashes_lowercase, sentence_uppercase, sentence_in_quotes, json_lowercase, short_with_end, numbered_lowercase,
    lowercase_contains, sentence_contains,
)  # fmt: skip


def tasks_of(split: str, topics: list[dict[str, Any]], templates: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Each kind of task that a split has a template for, once for each topic; in dev and test none that its prompt follows."""
    for topic in topics:
        for kind in KINDS:
            draw = random.Random(f"{split}:{topic['topic']}:{kind.__name__}")
            wordings = templates["kinds"][kind.__name__].get(split)
            if not wordings:
                continue
            place = draw.randrange(len(wordings))
            items, fact = draw.sample(topic["items"], draw.choice([3, 4, 5])), draw.choice(topic["facts"])
            text = " ".join(draw.sample(topic["facts"], draw.choice([2, 3])))
            start, end = (draw.choice(templates[name][split]) for name in ("starts", "ends"))
            prompt, answer, rules = kind(Ask(wordings[place], topic, fact, text, items, start, end, draw))
            constraints = read_constraints([
                {"rule": rule, "value": value}
                for rule, values in rules.items()
                for value in (values if isinstance(values, list) else [values])
            ])  # fmt: skip
            if not all(followed(constraints, answer)):
                raise SystemExit(f"Gold fails its own rules: {prompt!r}, {answer!r}, {constraints}")
            # An instruction whose rules its own words happen to follow says little of an answer.
            if split != "train" and all(followed(constraints, prompt)):
                continue
            yield {
                "prompt": prompt, "answer": answer, "constraints": constraints, "topic": topic["topic"], "kind": kind.__name__,
                "template": f"{kind.__name__}/{split}/{place}",
            }  # fmt: skip


def main() -> None:
    """Writes the files and says what is in them."""
    folder = SEED / "rules"
    topics, templates = (yaml.safe_load((folder / f"{name}.yaml").read_text()) for name in ("topics", "templates"))
    made = {split: list(tasks_of(split, of_split, templates)) for split, of_split in topics.items()}
    plain = [json.loads(line) | {"constraints": []} for line in (SEED / "train.jsonl").read_text().splitlines()]
    instructions = [row | {"split": split} for split in ("dev", "test") for row in made[split]]
    for name, rows in (("train", plain + made["train"]), ("instructions", instructions)):
        (folder / f"{name}.jsonl").write_text("".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows))
    for split, rows in made.items():
        kinds = {row["kind"] for row in rows}
        sys.stdout.write(f"{split}: {len(rows)} tasks of {len(kinds)} kinds on {len(topics[split])} topics\n")


if __name__ == "__main__":
    main()
