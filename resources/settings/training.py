"""How models are trained."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from resources.settings.sections import Section


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
    group_by_length: bool = Field(
        False,
        description="Put examples of like length into one batch: less padding, and a less random order: of every 50 batches, "
        "or a quarter of all, the longest come first. Not in the paper.",
    )
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
    """The training of M_t on preference pairs. The paper gives no batch, epochs, learning rate and lengths for it."""

    max_prompt_length: int = Field(ge=4, description="Prompts are cut to this many tokens, from the left.")
    max_completion_length: int | None = Field(
        None, ge=4, description="Each side is cut to this many tokens. None: to what the prompt leaves of max_length."
    )

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.max_prompt_length + (self.max_completion_length or 4) > self.max_length:
            stated = "" if self.max_completion_length is None else f" ({self.max_completion_length})"
            raise ValueError(
                f"max_prompt_length ({self.max_prompt_length}) and max_completion_length{stated} do not fit into max_length "
                f"({self.max_length}): raise it, or lower one of them."
            )
        return self


class SimPO(Section):
    """The loss of the paper (section 2.3): rewards are mean log-probabilities, and no reference model is needed."""

    kind: Literal["simpo"] = "simpo"
    beta: float = Field(
        gt=0, description="Scale of the length-normalised log-probabilities. Paper: searched in {2..12}."
    )
    gamma: float = Field(1.6, ge=0, description="Target reward margin, gamma itself and not gamma/beta. Paper: 1.6.")


class DPO(Section):
    """Rewards are log-ratios to a reference model: the checkpoint that the training starts from (arXiv 2305.18290)."""

    kind: Literal["dpo"] = "dpo"
    beta: float = Field(
        0.1, gt=0, description="Scale of the summed log-ratios, far smaller than that of SimPO. Not in the paper."
    )


class ORPO(Section):
    """The likelihood of prompt and chosen answer, and the odds of chosen over rejected (arXiv 2403.07691)."""

    kind: Literal["orpo"] = "orpo"
    beta: float = Field(0.1, gt=0, description="Weight of the odds, lambda in ORPO's paper. Not in SynPO's.")


class CPOSimPO(Section):
    """SimPO, and the likelihood of the chosen answer as CPO adds it (arXiv 2401.08417)."""

    kind: Literal["cpo_simpo"] = "cpo_simpo"
    beta: float = Field(gt=0, description="As in SimPO. Not in the paper.")
    gamma: float = Field(ge=0, description="As in SimPO. Not in the paper.")
    alpha: float = Field(gt=0, description="Weight of the likelihood, such as 0.05 to 1. Not in the paper.")


Loss = Annotated[SimPO | DPO | ORPO | CPOSimPO, Field(discriminator="kind")]


class TrainingProcesses(Section):
    """How training runs: its processes, what it saves on the way, and who is told of its progress."""

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
    gradient_checkpointing: bool | None = Field(
        None,
        description="Compute activations again in the backward pass: slower by about a third, for much less memory. None: on a GPU "
        "where they would not fit beside the weights.",
    )
    padding_free: bool | None = Field(
        None,
        description="SFT lays the examples of a forward pass end to end in place of padding them to the longest, for the same "
        "loss. None: where engine.attention is a flash_attention, which reads each by itself; others read the row as a whole.",
    )
    report_to: Literal["none", "trackio", "wandb", "mlflow"] = Field(
        "none",
        description="Tracker that gets each training, and the home as one run with a row per iteration, besides the assets' own "
        "metadata.",
    )

    @property
    def spreads(self) -> bool:
        """Whether one training is told to take several processes."""
        return self.accelerate_config is not None or (self.processes or 1) > 1
