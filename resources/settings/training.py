"""How models are trained."""

from typing import Literal, Self

import dagster as dg
from pydantic import ConfigDict, Field, model_validator

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
