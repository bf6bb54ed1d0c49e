"""An artefact goes to the hub as it is, and nothing is lost where the hub cannot be had."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import pytest
import timm
import torch

from vision_attn.data.transforms import Preprocessing
from vision_attn.errors import UsageError
from vision_attn.export import push_to_hub, save_model, write_card
from vision_attn.export.card import artefact_in
from vision_attn.models.factory import create_model


class FakeApi:
    """The three calls that are made, and what they were made with."""

    public = False
    calls: list = []
    kept: Path

    def __init__(self, token=None):
        FakeApi.calls.append(("token", token))

    def create_repo(self, repo_id, **options):
        self.calls.append(("create_repo", repo_id, options))
        return SimpleNamespace(repo_id=repo_id, url=f"https://hub/{repo_id}")

    def repo_info(self, repo_id, **options):
        return SimpleNamespace(private=not self.public)

    def upload_folder(self, *, repo_id, folder_path, **options):
        self.calls.append(("upload_folder", repo_id, options))
        shutil.copytree(folder_path, self.kept)


@pytest.fixture(scope="module")
def artefact(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub") / "export"
    torch.manual_seed(0)
    model = create_model("vit_tiny_patch16_224", num_classes=2, img_size=32, depth=1, embed_dim=24, num_heads=3)
    save_model(
        folder,
        model,
        architecture="vit_tiny_patch16_224",
        classes=("a", "b"),
        preprocessing=Preprocessing((32, 32)),
        model_args=model.model_args,
    )
    write_card(folder)
    (folder / ".hidden").write_text("mine")
    return folder


@pytest.fixture
def hub(monkeypatch, tmp_path):
    monkeypatch.setattr(FakeApi, "calls", [])
    monkeypatch.setattr(FakeApi, "public", False)
    FakeApi.kept = tmp_path / "kept"
    monkeypatch.setattr(huggingface_hub, "HfApi", FakeApi)
    return FakeApi


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_what_is_sent_loads_with_timm_and_its_card_names_the_repository(artefact, hub):
    before = contents(artefact)
    pushed = push_to_hub(artefact, "me/clothes", token="secret")
    assert ("token", "secret") in hub.calls
    assert ("create_repo", "me/clothes", {"private": True, "exist_ok": True, "repo_type": "model"}) in hub.calls
    # The folder of the run does as well.
    assert artefact_in(artefact.parent) == artefact_in(artefact) == artefact
    assert pushed.private and pushed.files == ("README.md", "config.json", "model.safetensors")
    assert pushed.line.startswith("https://hub/me/clothes (private): README.md, config.json")
    card = (hub.kept / "README.md").read_text(encoding="utf-8")
    assert 'timm.create_model("hf-hub:me/clothes", pretrained=True)' in card
    assert 'folder = snapshot_download("me/clothes")' in card and '"."' not in card
    compile(card.split("```python\n")[1].split("```")[0], "card", "exec")
    model, sent = (timm.create_model(f"local-dir:{folder}", pretrained=True).eval() for folder in (artefact, hub.kept))
    with torch.no_grad():
        assert torch.equal(model(torch.ones(1, 3, 32, 32)), sent(torch.ones(1, 3, 32, 32)))
    assert contents(artefact) == before


def test_photos_are_told_and_can_be_left_out(artefact, hub, tmp_path):
    folder = tmp_path / "with photos"
    shutil.copytree(artefact, folder)
    (folder / "samples.png").write_bytes(np.zeros(9, np.uint8).tobytes())
    card = (folder / "README.md").read_text(encoding="utf-8")
    sheet = "![validation photos, and where the network looks](samples.png)\n\nValidation photos drawn.\n\n"
    (folder / "README.md").write_text(card.replace("## Data", f"{sheet}## Data"), encoding="utf-8")
    assert "samples.png shows photos of your data" in push_to_hub(folder, "me/x").note
    shutil.rmtree(hub.kept)
    pushed = push_to_hub(folder, "me/x", samples=False)
    assert pushed.note == "" and "samples.png" not in pushed.files and not (hub.kept / "samples.png").exists()
    sent = (hub.kept / "README.md").read_text(encoding="utf-8")
    assert "samples.png" not in sent and "Validation photos drawn" not in sent and "## Data" in sent


def test_what_was_asked_to_be_private_never_goes_where_it_is_public(artefact, hub, monkeypatch):
    monkeypatch.setattr(hub, "public", True)
    with pytest.raises(UsageError, match="which is there and public"):
        push_to_hub(artefact, "me/open")
    assert not hub.kept.exists()
    assert "(public)" in push_to_hub(artefact, "me/open", private=False).line


def test_without_a_network_there_is_one_line_and_all_is_as_it_was(artefact, monkeypatch, tmp_path):
    # A port on this machine at which nobody listens.
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    real = huggingface_hub.HfApi
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda token: real(endpoint="http://127.0.0.1:9", token="hf_x"))
    before = contents(artefact)
    with pytest.raises(UsageError, match=r"expected the hub to take .* got an error .*the same command") as told:
        push_to_hub(artefact, "me/clothes")
    assert "\n" not in str(told.value)
    assert contents(artefact) == before


def test_a_refusal_of_the_hub_is_told_in_one_line(artefact, hub, monkeypatch):
    def refuse(self, repo_id, **options):
        raise OSError("401 Client Error\n\nInvalid username or password.")

    monkeypatch.setattr(hub, "create_repo", refuse)
    with pytest.raises(UsageError, match=r"\(401 Client Error\).*hf auth login"):
        push_to_hub(artefact, "me/clothes")


@pytest.mark.parametrize("name", ["a b", "a/b/c", "", "-x/y"])
def test_a_name_that_is_none_is_refused_before_anything_is_asked(artefact, hub, name):
    with pytest.raises(UsageError, match="expected a repository as user/name"):
        push_to_hub(artefact, name)
    assert hub.calls == []


def test_a_folder_that_is_no_artefact_is_refused(tmp_path, hub):
    with pytest.raises(UsageError, match="expected an artefact"):
        push_to_hub(tmp_path, "me/x")
    assert hub.calls == []
