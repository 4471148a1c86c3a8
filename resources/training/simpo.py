"""SimPO on exact token ids: TRL's trainer without its own tokenization.

TRL 1.16 tokenizes the rows of `CPOTrainer` itself: it closes every answer with the EOS token, also those that were cut
and those that already end their turn with another token, and it may put a BOS before prompts that generation renders
without one. Here the rows come with the ids that generation uses.
"""

from typing import Any

from trl.experimental.cpo import CPOTrainer

IGNORED = -100


class SimPOTrainer(CPOTrainer):
    """CPOTrainer for rows with prompt_ids, chosen_ids and rejected_ids; the loss is untouched."""

    def tokenize_row(self, feature: dict[str, Any], model: Any = None) -> dict[str, list[int]]:
        """Lays out prompt and answers as the trainer's collator expects them, the prompt masked in the labels."""
        prompt = feature["prompt_ids"]
        row = {"prompt_input_ids": prompt, "prompt_attention_mask": [1] * len(prompt)}
        for side in ("chosen", "rejected"):
            answer = feature[f"{side}_ids"]
            row[f"{side}_input_ids"] = prompt + answer
            row[f"{side}_attention_mask"] = [1] * (len(prompt) + len(answer))
            row[f"{side}_labels"] = [IGNORED] * len(prompt) + answer
        return row
