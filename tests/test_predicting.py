"""`vision-attn predict MODEL PHOTOS`: a row for each photo, with probabilities that hold."""

import csv
import math

import numpy as np
import pytest
import torch
from PIL import Image

from vision_attn.data.reading import read_image
from vision_attn.data.transforms import Preprocessing, eval_transforms
from vision_attn.errors import UsageError
from vision_attn.export import save_model
from vision_attn.look import predict_photos
from vision_attn.models.factory import create_model, load_model, open_model

CLASSES = ("cat, big", "dog", 'a "mouse"', "Übel")


def saved(folder, **facts):
    torch.manual_seed(0)
    model = create_model("va_vit_micro_stem8_64", num_classes=4, image_size=64, depth=1).eval()
    # Logits that are not all near 0, so that a temperature shows.
    torch.nn.init.normal_(model.get_classifier().weight)
    return save_model(
        folder,
        model,
        architecture="va_vit_micro_stem8_64",
        classes=CLASSES,
        preprocessing=Preprocessing((64, 64), transforms=eval_transforms(64)),
        model_args={"img_size": [64, 64], "depth": 1},
        **facts,
    )


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    coarse = [rng.integers(0, 256, (5, 7, 3), dtype=np.uint8) for _ in range(4)]
    pictures = [Image.fromarray(one).resize((140, 100), Image.Resampling.BICUBIC) for one in coarse]
    pictures[0].save(folder / "a.jpg", quality=95)
    turned = pictures[1].getexif()
    turned[0x0112] = 6  # lies on its side: to be turned by a quarter
    pictures[1].save(folder / "b.jpg", exif=turned, quality=95)
    deep = np.asarray(pictures[2].convert("L")).astype(np.uint16) * 257
    Image.fromarray(deep).save(folder / "c.png")
    pictures[3].resize((500, 40)).save(folder / "d.png")
    return folder


def rows_of(path):
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def by_hand(model, path, temperature):
    pixels, _ = model.preprocessing(read_image(path))
    with torch.no_grad():
        logits = model(model.preprocessing.normalize(pixels[None]))[0].tolist()
    powers = [math.exp(value / temperature) for value in logits]
    return [power / sum(powers) for power in powers], logits


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_rows_hold_the_best_classes_with_the_softmax_of_logits_over_the_temperature(tmp_path, photos, temperature):
    model = load_model(saved(tmp_path / "export", temperature=temperature))
    assert model.temperature == temperature and model.multi_label is False
    found = predict_photos(model, [photos], tmp_path / "p.csv", top=3, batch_size=3)
    rows = rows_of(found.out)
    assert [row["photo"] for row in rows] == [str(photos / name) for name in ("a.jpg", "b.jpg", "c.png", "d.png")]
    assert list(rows[0]) == [
        *("photo", "prediction", "probability", "prediction_2", "probability_2", "prediction_3", "probability_3")
    ]
    for row in rows:
        shares, _ = by_hand(model, row["photo"], temperature)
        order = sorted(range(4), key=lambda i: -shares[i])
        assert [row[f"prediction{end}"] for end in ("", "_2", "_3")] == [CLASSES[i] for i in order[:3]]
        assert [float(row[f"probability{end}"]) for end in ("", "_2", "_3")] == pytest.approx(
            [shares[i] for i in order[:3]], abs=2e-6
        )
    assert (found.photos, found.top, found.temperature) == (4, 3, temperature)
    assert f"4 photos in {found.seconds:.1f} s" in found.line


def test_of_several_labels_each_class_has_a_probability_by_itself(tmp_path, photos):
    model = load_model(saved(tmp_path / "export", temperature=2.0, multi_label=True))
    assert model.multi_label
    predict_photos(model, [photos / "a.jpg"], tmp_path / "p.csv", top=9)
    (row,) = rows_of(tmp_path / "p.csv")
    _, logits = by_hand(model, photos / "a.jpg", 2.0)
    wanted = sorted((1 / (1 + math.exp(-value / 2)) for value in logits), reverse=True)
    assert [float(row[f"probability{end}"]) for end in ("", "_2", "_3", "_4")] == pytest.approx(wanted, abs=2e-6)
    assert len(row) == 9  # there are no more than four classes


def test_a_flip_averages_the_probabilities_of_photo_and_mirror_image(tmp_path, photos):
    model = load_model(saved(tmp_path / "export", temperature=2.0))
    predict_photos(model, [photos / "a.jpg"], tmp_path / "p.csv", tta="flip", top=4)
    pixels, _ = model.preprocessing(read_image(photos / "a.jpg"))
    images = model.preprocessing.normalize(torch.stack([pixels, pixels.flip(-1)]))
    with torch.no_grad():
        wanted = (model(images).double() / 2.0).softmax(-1).mean(0)
    (row,) = rows_of(tmp_path / "p.csv")
    got = {row[f"prediction{end}"]: float(row[f"probability{end}"]) for end in ("", "_2", "_3", "_4")}
    assert [got[name] for name in CLASSES] == pytest.approx(wanted.tolist(), abs=2e-6)
    with pytest.raises(UsageError, match="test-time augmentation"):
        predict_photos(model, [photos], tmp_path / "q.csv", tta="mirror")
    predict_photos(model, [photos / "a.jpg"], tmp_path / "five.csv", tta="five_crop")


def test_damaged_photos_are_told_and_the_others_are_there(tmp_path, photos):
    model = load_model(saved(tmp_path / "export"))
    (tmp_path / "broken.jpg").write_bytes((photos / "a.jpg").read_bytes()[:900])
    found = predict_photos(model, [tmp_path / "broken.jpg", photos / "a.jpg"], tmp_path / "p.csv")
    assert [row["photo"] for row in rows_of(found.out)] == [str(photos / "a.jpg")]
    assert list(found.damaged) == [tmp_path / "broken.jpg"] and "damaged" in next(iter(found.damaged.values()))
    none = predict_photos(model, [tmp_path / "broken.jpg"], tmp_path / "q.csv")
    assert none.out is None and not (tmp_path / "q.csv").exists() and "nothing was written" in none.line


def test_nothing_is_overwritten_and_what_cannot_be_is_told(tmp_path, photos):
    model = load_model(saved(tmp_path / "export"))
    (tmp_path / "p.csv").write_text("mine")
    with pytest.raises(UsageError, match="which exists"):
        predict_photos(model, [photos], tmp_path / "p.csv")
    assert (tmp_path / "p.csv").read_text() == "mine"
    with pytest.raises(UsageError, match="top of at least 1"):
        predict_photos(model, [photos], tmp_path / "q.csv", top=0)
    with pytest.raises(UsageError, match="does not exist"):
        predict_photos(model, [tmp_path / "nowhere"], tmp_path / "q.csv")
    model.classes = None
    with pytest.raises(UsageError, match="without a classifier"):
        predict_photos(model, [photos], tmp_path / "q.csv")


def test_an_artefact_with_an_impossible_temperature_is_refused(tmp_path):
    folder = saved(tmp_path / "export")
    path = folder / "config.json"
    path.write_text(path.read_text().replace('"temperature": 1.0', '"temperature": 0'))
    with pytest.raises(UsageError, match="temperature 0"):
        load_model(folder)
    path.write_text(path.read_text().replace('    "temperature": 0,\n', ""))
    assert load_model(folder).temperature == 1.0


def test_a_checkpoint_of_a_run_has_the_temperature_of_its_export_where_it_has_its_weights(tmp_path, photos):
    export = saved(tmp_path / "run" / "export", temperature=3.0, multi_label=True)
    (tmp_path / "run" / "config.yaml").write_text(
        "model: {name: va_vit_micro_stem8_64, options: {depth: 1}}\ndata: {image_size: 64, crop_pct: 0.875}\n"
    )
    state = {f"network.{key}": tensor for key, tensor in load_model(export).state_dict().items()}
    (tmp_path / "run" / "checkpoints").mkdir()
    for name in ("best", "last"):
        torch.save({"state_dict": state, "classes": list(CLASSES)}, tmp_path / "run" / "checkpoints" / f"{name}.ckpt")
    best, last = (open_model(tmp_path / "run" / "checkpoints" / f"{name}.ckpt") for name in ("best", "last"))
    assert (best.temperature, best.multi_label, last.temperature, last.multi_label) == (3.0, True, 1.0, True)
    predict_photos(best, [photos / "a.jpg"], tmp_path / "a.csv")
    predict_photos(load_model(export), [photos / "a.jpg"], tmp_path / "b.csv")
    assert (tmp_path / "a.csv").read_text() == (tmp_path / "b.csv").read_text()


def test_a_name_of_timm_is_enough(tmp_path, photos):
    model = open_model("resnet10t", pretrained=False)
    found = predict_photos(model, [photos / "d.png"], tmp_path / "p.csv", top=2)
    (row,) = rows_of(found.out)
    assert row["prediction"] in model.classes and float(row["probability"]) >= float(row["probability_2"])
