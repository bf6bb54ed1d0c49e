"""The sheet shows the tensors of a run's own batches."""

import numpy as np
import pytest
import torch
from PIL import Image

from vision_attn.data.datamodule import ImageDataModule
from vision_attn.data.mixing import MixingConfig
from vision_attn.errors import UsageError
from vision_attn.training import preview


@pytest.fixture
def folder(tmp_path):
    generator = np.random.default_rng(0)
    for name in "ab":
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(8):
            pixels = generator.integers(0, 256, (20, 24, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / name / f"{i}.png")
    return tmp_path / "photos"


@pytest.fixture
def drawn(monkeypatch):
    """The rows of panels of each sheet that is drawn."""
    sheets = []
    draw = preview.picture_grid
    monkeypatch.setattr(
        preview, "picture_grid", lambda path, rows, **options: sheets.append(rows) or draw(path, rows, **options)
    )
    return sheets


def module(root, **options):
    return ImageDataModule(
        path=str(root), **{"image_size": 16, "batch_size": 4, "num_workers": 0, "validation_share": 0.25, **options}
    )


@pytest.mark.parametrize("mixing", [None, MixingConfig(mixup_alpha=1.0)])
def test_training_pictures_are_those_of_the_runs_batches(folder, tmp_path, drawn, mixing):
    data = module(folder, mixing=mixing)
    path = preview.preview_sheet(data, tmp_path / "sheet.png", photos=5, epochs=2)
    with Image.open(path) as sheet:
        assert sheet.size[0] > 300
    panels = [panel for row in drawn[0] for panel in row]
    assert len(panels) == 5 * 3
    loader = data.train_dataloader()
    seen = []
    for epoch in range(2):
        loader.sampler.set_epoch(epoch)
        batches = [data.mixed(batch, epoch) for batch in loader]
        seen.append({int(index): (batch, row) for batch in batches for row, index in enumerate(batch.indices)})
    for number, index in enumerate(list(seen[0])[:5]):
        whole, *later = panels[3 * number : 3 * number + 3]
        assert np.array_equal(whole.picture, data.splits["train"].read(index))
        for panel, epoch in zip(later, seen, strict=True):
            batch, row = epoch[index]
            assert np.array_equal(panel.picture, batch.images[row].permute(1, 2, 0).numpy())
            label = batch.labels[row]
            if mixing is None:
                assert panel.caption == (data.classes[label],)
            elif 0 < label[0] < 1:
                assert f"{label[0]:.0%} a" in panel.caption
                assert f"{label[1]:.0%} b" in panel.caption


def test_evaluation_pictures_are_spread_over_the_split(folder, tmp_path, drawn):
    data = module(folder, eval_image_size=24, validation_share=0.5)
    preview.preview_sheet(data, tmp_path / "sheet.png", split="validation", photos=3)
    panels = drawn[0][0]
    assert [panel.caption[0] for panel in panels[1::2]] == ["a", "b", "b"]
    batch = next(iter(data.val_dataloader()))
    assert np.array_equal(panels[1].picture, batch.images[0].permute(1, 2, 0).numpy())
    assert panels[1].picture.shape == (24, 24, 3)


def test_a_photo_that_an_epoch_leaves_out_is_told(folder, tmp_path, drawn):
    # Four of twelve photos are seen in an epoch.
    data = module(folder, batch_size=5, balance="weighted")
    preview.preview_sheet(data, tmp_path / "sheet.png", photos=10, epochs=3)
    captions = [panel.caption for row in drawn[0] for panel in row]
    assert ("not drawn",) in captions


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "valid"}, "known split, got 'valid': did you mean 'validation'"),
        ({"split": "validation", "epochs": 2}, "expected 1 epoch for validation"),
        ({"split": "test"}, "expected test photos, got none"),
    ],
)
def test_a_sheet_that_cannot_be_is_refused(folder, tmp_path, options, message):
    with pytest.raises(UsageError, match=message):
        preview.preview_sheet(module(folder), tmp_path / "sheet.png", **options)
    (tmp_path / "there.png").write_text("x")
    with pytest.raises(UsageError, match="expected a new file"):
        preview.preview_sheet(module(folder), tmp_path / "there.png")


def test_labels_are_told_by_their_shares():
    classes = ("a", "b", "c", "d", "e")
    told = preview._told
    assert told(torch.tensor(1), classes) == ("b",)
    assert told(torch.tensor([0.0, 0.25, 0.75, 0.0, 0.0]), classes) == ("75% c", "25% b")
    assert told(torch.tensor([1.0, 0.0, 1.0, 0.0, 0.0]), classes) == ("a, c",)
    assert told(torch.tensor([0.0, 0.0, 0.0, 0.0, 0.0]), classes) == ("no label",)
    assert told(torch.tensor([0.5, 0.4, 0.3, 0.2, 0.1]), classes)[-1] == "and 2 more"
