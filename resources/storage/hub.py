"""Publishing a folder: to the Hugging Face hub, or to a directory in its place."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from resources.common.errors import FinalError
from resources.common.text import one_line
from resources.settings.publishing import Publishing
from resources.storage.files import replace_directory, temporary_directory_beside
from resources.storage.output_files import refuse_inside_a_home

RepositoryKind = Literal["dataset", "model"]
# The tag that every card of ours has: a folder without such a card is somebody else's.
TAG = "synpo"


def check_destination(publishing: Publishing, kind: RepositoryKind) -> None:
    """Makes sure, before anything is written, that there is somewhere to publish to."""
    if publishing.dry_run:
        return
    if publishing.directory:
        refuse_inside_a_home(Path(publishing.directory) / "any", "publishing.directory")
        try:
            Path(publishing.directory).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise FinalError(
                f"The directory {publishing.directory} (publishing.directory) cannot be made: {error.strerror or error}. "
                "Choose another."
            ) from None
        return
    setting = f"publishing.{kind}_repository"
    if getattr(publishing, f"{kind}_repository") is None:
        raise FinalError(
            f"There is nowhere to publish to: set {setting} or publishing.directory, or keep publishing.dry_run."
        )
    from huggingface_hub import get_token

    if get_token() is None:
        raise FinalError(
            f"There is no token for the hub, which {setting} needs: set HF_TOKEN, or log in with `hf auth login`."
        )


def publish(
    publishing: Publishing,
    folder: Path,
    name: str,
    repository: str | None,
    kind: RepositoryKind,
    replaced: Sequence[str],
) -> str:
    """Publishes a finished folder as the settings say, under `name` where that is in a directory.

    Files of an earlier upload that match `replaced` are removed from the hub where the folder has none of that name.

    Returns:
        Where it was published: a path, the address of a commit, or `nowhere (dry run)`.
    """
    if publishing.dry_run:
        return "nowhere (dry run)"
    if publishing.directory:
        return str(_copy(folder, Path(publishing.directory) / name))
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    assert repository is not None  # `check_destination` has seen to it.
    hub = HfApi(library_name="synpo")
    try:
        hub.create_repo(repository, repo_type=kind, private=publishing.private, exist_ok=True)
        commit = hub.upload_folder(
            repo_id=repository,
            repo_type=kind,
            folder_path=folder,
            commit_message="Published by SynPO",
            delete_patterns=list(replaced),
        )
    except HfHubHTTPError as error:
        if error.response.status_code >= 500:
            raise
        raise FinalError(f"The hub does not take {repository}: {one_line(str(error))}") from None
    return commit.commit_url


def _copy(folder: Path, place: Path) -> Path:
    card = place / "README.md"
    if place.exists() and not (card.exists() and f"\n- {TAG}\n" in card.read_text(encoding="utf-8")):
        raise FinalError(f"{place} was not published from here: move it away, or choose another publishing.directory.")
    with temporary_directory_beside(place) as temporary:
        shutil.copytree(folder, temporary, dirs_exist_ok=True)
        replace_directory(temporary, place)
    return place
