"""What runs by itself, and what is published."""

from pydantic import Field, field_validator

from resources.settings.sections import Section


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
