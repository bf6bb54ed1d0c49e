"""An artefact to the Hugging Face hub, from where timm and this package load it."""

import re
import shutil
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vision_attn.errors import UsageError
from vision_attn.export.card import CARD_FILE, LOCAL_FOLDER, LOCAL_TIMM, SAMPLES_FILE, artefact_in
from vision_attn.models.factory import read_config


@dataclass(frozen=True)
class Pushed:
    """What was sent.

    Attributes:
        url: Where it is.
        private: Whether only its owner can see it.
        files: Names of the files.
        note: What is worth knowing: photos among them, or a card that is missing; else empty.
    """

    url: str
    private: bool
    files: tuple[str, ...]
    note: str = ""

    @property
    def line(self) -> str:
        """All of it in a line."""
        seen = "private" if self.private else "public"
        return f"{self.url} ({seen}): {', '.join(self.files)}{'; ' if self.note else ''}{self.note}"


def push_to_hub(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = True,
    samples: bool = True,
    token: str | None = None,
    message: str = "Upload with vision-attn",
) -> Pushed:
    """Uploads an artefact to the hub, and returns what was sent; the folder stays as it is.

    The card's snippets are made to load from there.

    Args:
        folder: An artefact, or the run's folder with the artefact in `export`.
        repo_id: "user/name"; it is made where it is not there.
        private: Whether a new repository is. One that is there has to be so already: what was asked to be private is
            never sent to where anybody can see it.
        samples: Whether the card's sheet of sample photos goes along. They are your photos.
        token: Of the hub; that of `hf auth login` or HF_TOKEN where left out.
        message: Of the commit.

    Raises:
        UsageError: the folder is no artefact, the name is none, or the hub cannot be reached or refuses.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    folder = artefact_in(folder)
    read_config(folder)
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise UsageError(f"expected a repository as user/name, got {repo_id!r}: {_first_line(error)}") from error
    api = HfApi(token=token)
    with tempfile.TemporaryDirectory(prefix="vision-attn-") as staging:
        names = _stage(folder, Path(staging), repo_id, samples=samples)
        made = _asked(folder, lambda: api.create_repo(repo_id, private=private, exist_ok=True, repo_type="model"))
        # The hub may have put the user's name before it.
        found = getattr(made, "repo_id", None) or repo_id
        info = _asked(folder, lambda: api.repo_info(found, repo_type="model"))
        if private and not info.private:
            raise UsageError(
                f"expected a private repository, got {found}, which is there and public: make it private, choose "
                "another name, or ask for a public one; nothing was sent"
            )
        _asked(
            folder,
            lambda: api.upload_folder(repo_id=found, folder_path=staging, commit_message=message, repo_type="model"),
        )
    notes = []
    if SAMPLES_FILE in names:
        notes.append(f"{SAMPLES_FILE} shows photos of your data")
    if CARD_FILE not in names:
        notes.append("there is no model card: write_card makes one")
    url = str(getattr(made, "url", made))
    return Pushed(url, bool(info.private), tuple(names), "; ".join(notes))


def _stage(folder: Path, staging: Path, repo_id: str, *, samples: bool) -> list[str]:
    """Copies what is sent, with a card that fits the hub, and returns the files' names."""
    for path in sorted(folder.iterdir()):
        if path.is_file() and not path.name.startswith(".") and (samples or path.name != SAMPLES_FILE):
            if path.name == CARD_FILE:
                text = path.read_text(encoding="utf-8")
                (staging / CARD_FILE).write_text(hub_card(text, repo_id, samples=samples), encoding="utf-8")
            else:
                shutil.copyfile(path, staging / path.name)
    return sorted(path.name for path in staging.iterdir())


def hub_card(text: str, repo_id: str, *, samples: bool = True) -> str:
    """Returns a card whose snippets load from the hub, without the sheet of samples where that is not sent."""
    from_hub = f'from huggingface_hub import snapshot_download\n\nfolder = snapshot_download("{repo_id}")'
    text = text.replace(f"\n{LOCAL_FOLDER}", from_hub).replace(LOCAL_TIMM, f'"hf-hub:{repo_id}"')
    if not samples:
        text = re.sub(rf"!\[[^\]]*\]\({re.escape(SAMPLES_FILE)}\)\n\n[^\n]*\n\n", "", text)
    return text


def _asked(folder: Path, ask: Callable[[], Any]) -> Any:
    """Returns what the hub answers.

    Raises:
        UsageError: it cannot be reached, or refuses.
    """
    try:
        return ask()
    except Exception as error:  # of the hub's client, of its HTTP library, of the system
        raise UsageError(
            f"expected the hub to take {folder}, got an error ({_first_line(error)}): check the network, the name and "
            "the login (hf auth login); the folder is as it was, so the same command can be given again"
        ) from error


def _first_line(error: BaseException) -> str:
    lines: Iterable[str] = (line.strip() for line in str(error).splitlines())
    return next((line for line in lines if line), type(error).__name__)
