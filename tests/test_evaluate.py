"""Which explanation to believe: on models whose evidence is planted, so that the right answer is known."""

import csv
import json
import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from planted_models import (
    color_finder,
    draw_color_pair,
    held_out,
    normalized,
    shapes_cnn,
    shortcut_cnn,
    shortcut_vit,
    tag_reader,
)

import vision_attn as va
from vision_attn.cli import main
from vision_attn.data.planted import draw_shortcut, tag_place
from vision_attn.errors import UsageError
from vision_attn.evaluate import Protocol, evaluate_explanations, evaluate_photos
from vision_attn.evaluate.photos import choose_photos
from vision_attn.evaluate.places import NAMES, hide_places, place_mask
from vision_attn.evaluate.scoring import Scorer, why_unusable
from vision_attn.evaluate.writing import lines, tables, to_dict

LITTLE = Protocol(steps=4, groups=4, cells=(8, 8), precision="float32", sanity_photos=2)
FEW = Protocol(steps=2, groups=2, cells=(4, 4), precision="float32", sanity_photos=0)
COUNT = 20


def sharp_tag_reader():
    """The tag reader, so sure of itself that there is something to lose."""
    model = tag_reader()
    with torch.no_grad():
        model.head.weight.mul_(6)
        model.head.bias.mul_(6)
    return model


@pytest.fixture(scope="module")
def shortcuts(tmp_path_factory):
    """A folder of tagged pictures, with the masks of the objects."""
    root = tmp_path_factory.mktemp("shortcuts")
    for index in range(COUNT):
        drawn = draw_shortcut(index, split="test", size=64)
        for folder, pixels in (("photos", drawn.image), ("masks", object_mask(drawn) * np.uint8(255))):
            (root / folder).mkdir(exist_ok=True)
            Image.fromarray(pixels).save(root / folder / f"{index}.png")
    return root


def object_mask(drawn):
    return np.any(list(drawn.masks.values()), axis=0)


def gradient_times_input(model, images, target):
    images = images.clone().requires_grad_()
    chosen = model(images).gather(-1, target[:, None]).sum()
    return (torch.autograd.grad(chosen, images)[0] * images).sum(1).clamp(min=0)


@pytest.fixture(scope="module")
def caught(shortcuts):
    """The evaluation of the model that reads the tag."""
    return evaluate_photos(
        sharp_tag_reader(),
        [shortcuts / "photos"],
        shortcuts / "out",
        methods=["occlusion"],
        options={"window": 16, "stride": 8},
        masks=shortcuts / "masks",
        protocol=LITTLE,
        progress=False,
    )


# ------------------------------------------------------------------------------------------------ planted evidence


def test_a_model_that_reads_a_tag_is_caught_and_its_corner_named(caught):
    places = caught.evaluation.places
    assert NAMES[places.named] == "the bottom right corner"
    assert "the model itself, which reads the bottom right corner" in caught.evaluation.verdict[2]
    assert "whose object is elsewhere" in caught.evaluation.verdict[2]
    assert places.object_effect.mean == pytest.approx(0, abs=0.05)
    others = [effect.mean for place, effect in enumerate(places.effects) if place != places.named]
    assert max(map(abs, others)) < 1e-6


def test_a_map_of_what_the_model_reads_beats_the_controls_and_is_not_on_the_object(caught):
    cells = caught.evaluation.cells
    assert caught.evaluation.recommended == "occlusion"
    assert {metric: cells["occlusion", metric].verdict for metric in ("deletion", "insertion", "saco")} == {
        "deletion": "better",
        "insertion": "better",
        "saco": "better",
    }
    assert cells["occlusion", "mass_in_mask"].verdict == "worse"
    assert cells["occlusion", "pointing_game"].estimate.mean < 0.05
    assert "that the model looks at what the masks show (occlusion, which is faithful," in caught.evaluation.verdict[2]


def test_class_specific_maps_separate_two_objects_and_others_cannot(tmp_path):
    for index in range(COUNT):
        drawn = draw_color_pair(index)
        labels = np.zeros(drawn.image.shape[:2], np.uint8)
        for label, mask in drawn.masks.items():
            labels[mask] = label + 1
        for folder, pixels in (("photos", drawn.image), ("masks", labels)):
            (tmp_path / folder).mkdir(exist_ok=True)
            Image.fromarray(pixels).save(tmp_path / folder / f"{index}.png")
    found = evaluate_photos(
        color_finder(),
        [tmp_path / "photos"],
        tmp_path / "out",
        methods=["integrated_gradients"],
        options={"steps": 4},
        masks=tmp_path / "masks",
        protocol=FEW,
        progress=False,
    ).evaluation
    assert found.cells["integrated_gradients", "separation"].estimate.mean > 0.95
    assert found.cells["integrated_gradients", "separation"].verdict == "better"
    for control in ("random", "center", "edges"):
        one = found.cells[control, "separation"].estimate
        assert (one.mean, one.low, one.high) == pytest.approx((0.5, 0.5, 0.5), abs=1e-6)
    assert all(scores["integrated_gradients"]["mass_in_mask"].mean > 0.95 for scores in found.classes.values())


def test_places_are_a_partition_of_the_image_of_any_size():
    for size in ((64, 64), (50, 31)):
        assert (torch.stack([place_mask(place, size) for place in range(9)]).sum(0) == 1).all()
    rows, columns = tag_place(64)
    assert place_mask(8, (64, 64))[rows, columns].all()


def test_hiding_a_place_takes_what_the_model_reads_there():
    images = normalized([draw_shortcut(index) for index in range(2)])
    weight = torch.zeros(64, 64)
    weight[:10, 30:34] = 1.0  # in the middle of the top edge
    effects = hide_places(
        lambda some: (some.sum(1) * weight).sum((1, 2))[:, None],
        images,
        torch.zeros(2, dtype=torch.long),
        (images.sum(1) * weight).sum((1, 2)),
        torch.zeros_like(images),
        batch_size=5,
    )
    expected = torch.zeros(2, 9)
    expected[:, 1] = (images.sum(1) * weight).sum((1, 2))
    torch.testing.assert_close(effects, expected, atol=1e-3, rtol=1e-4)


# ------------------------------------------------------------------------------------------------ in memory


def test_batches_in_memory_and_a_function_for_a_method():
    batches = [normalized([draw_shortcut(index) for index in range(start, start + 10)]) for start in (0, 10)]
    found = evaluate_explanations(
        sharp_tag_reader(),
        [(images, None) for images in batches],
        [gradient_times_input],
        protocol=replace(LITTLE, sanity_photos=0),
    )
    assert found.recommended == "gradient_times_input"
    assert found.photos == 20
    assert found.sanity is None
    assert "mass_in_mask" not in found.metrics


def test_a_network_that_has_its_place_built_in_shows_it_with_random_weights_too():
    images = normalized([draw_shortcut(index) for index in range(10)])
    found = evaluate_explanations(sharp_tag_reader(), [images], [gradient_times_input], protocol=LITTLE)
    assert found.sanity.randomized["center"][-1] == pytest.approx(1)
    assert found.recommended is None
    assert "gradient_times_input (stays the same with random weights" in found.verdict[2]


def test_masks_of_a_batch_are_the_objects():
    drawn = [draw_shortcut(index) for index in range(COUNT)]
    masks = torch.from_numpy(np.stack([object_mask(one) for one in drawn]))
    found = evaluate_explanations(sharp_tag_reader(), [(normalized(drawn), None, masks)], "random", protocol=FEW)
    share = float(masks.float().mean())
    assert found.cells["random", "mass_in_mask"].estimate.mean == pytest.approx(share, abs=0.02)


def test_maps_that_order_nothing_are_counted_and_left_out():
    calls = iter(range(100))

    def broken(model, images, target):
        maps = torch.stack([image.abs().sum(0) for image in images])
        if next(calls) == 0:
            maps[0, 0, 0] = math.nan
            maps[1] = 3.0
        return maps

    images = normalized([draw_shortcut(index) for index in range(12)])
    found = evaluate_explanations(sharp_tag_reader(), [images], [broken], protocol=FEW)
    assert found.failed == {"broken": {"NaN": 1, "constant": 1}}
    assert found.cells["broken", "deletion"].estimate.count == 10
    assert found.cells["center", "deletion"].estimate.count == 12
    assert any("broken gave no map that can be used on 2 of 12 photos" in remark for remark in found.remarks)


def test_a_constant_or_broken_map_is_unusable():
    assert why_unusable(torch.ones(2, 2)) == "constant"
    assert why_unusable(torch.tensor([[1.0, math.inf]])) == "NaN"
    assert why_unusable(torch.tensor([[1.0, 2.0]])) == ""


def test_what_is_scored_does_not_depend_on_the_batch():
    images = normalized([draw_shortcut(index) for index in range(3)])
    options = {"protocol": FEW, "batch_size": 7}
    whole = Scorer(sharp_tag_reader(), {"random": {}, "center": {}}, **options).score(images, ["a", "b", "c"])
    one = Scorer(sharp_tag_reader(), {"random": {}, "center": {}}, **options).score(images[1:2], ["b"])[0]
    assert one.scores["random"] == pytest.approx(whole[1].scores["random"], abs=1e-6)
    assert one.places == pytest.approx(whole[1].places, abs=1e-6)


def test_a_network_of_few_patches_is_taken_apart_finer():
    scorer = Scorer(sharp_tag_reader(), {"center": {}}, Protocol())
    images = torch.zeros(1, 3, 64, 48)
    scorer.layout = va.TokenLayout(prefix=(), grid=(2, 2))
    assert scorer.cells(images) == (14, 12)
    scorer.layout = va.TokenLayout(prefix=(), grid=(4, 3))
    assert scorer.cells(images) == (4, 3)
    assert replace(scorer, protocol=LITTLE).cells(images) == (8, 8)


def test_fewer_photos_than_an_interval_needs_are_refused(tmp_path, shortcuts):
    images = normalized([draw_shortcut(0)])
    with pytest.raises(UsageError, match="expected at least 10 photos for 95 % intervals, got 1: give more photos"):
        evaluate_explanations(sharp_tag_reader(), [images], ["center"], protocol=FEW)
    with pytest.raises(UsageError, match="got 4: give more photos"):
        evaluate_photos(sharp_tag_reader(), [shortcuts / "photos"], tmp_path / "out", samples=4)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"steps": 1}, "steps as a whole number of at least 2"),
        ({"cells": (1, 9)}, "expected cells as"),
        ({"cells": (2, 2)}, "at least 10 cells"),
        ({"baseline": "blurr"}, "did you mean 'blur'"),
        ({"precision": "float64"}, "expected a known precision"),
    ],
)
def test_a_protocol_that_cannot_be_is_refused(options, words):
    with pytest.raises(UsageError, match=words):
        Protocol(**options)


# ------------------------------------------------------------------------------------------------ on disk


def test_everything_is_written_and_says_the_same(caught, shortcuts):
    evaluation = caught.evaluation
    assert all(path.parent == caught.out and path.is_file() for path in caught.files)
    written = {"table.csv", "evaluation.json", "verdict.txt", "curves.png", "distances.png"}
    assert {path.name for path in caught.files} == written
    with (caught.out / "table.csv").open(encoding="utf-8") as file:
        rows = {(row["method"], row["metric"]): row for row in csv.DictReader(file) if not row["class"]}
    cell = evaluation.cells["occlusion", "deletion"]
    row = rows["occlusion", "deletion"]
    assert float(row["mean"]) == pytest.approx(cell.estimate.mean, rel=1e-4)
    assert row["in_words"] == cell.words
    assert rows["center", "deletion"]["control"] == "True"
    told = json.loads((caught.out / "evaluation.json").read_text(encoding="utf-8"))
    assert told == json.loads(json.dumps(to_dict(evaluation, caught.health)))
    assert told["places"]["named"] == "the bottom right corner"
    assert told["settings"]["protocol"]["seed"] == 0
    assert "torch" in told["settings"]["versions"]
    assert len(tables(evaluation)) == 3
    assert evaluation.verdict[0] in lines(evaluation)


def test_a_stopped_evaluation_goes_on_and_ends_the_same(caught, shortcuts, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(caught.out, out)
    kept = (out / "photos.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (out / "photos.jsonl").write_text("".join(kept[:7]) + kept[7][:100], encoding="utf-8")
    again = evaluate_photos(
        sharp_tag_reader(),
        [shortcuts / "photos"],
        out,
        methods=["occlusion"],
        options={"window": 16, "stride": 8},
        masks=shortcuts / "masks",
        protocol=LITTLE,
        progress=False,
    )
    assert again.done_before == 7
    assert again.evaluation.verdict == caught.evaluation.verdict
    for key, cell in caught.evaluation.cells.items():
        assert again.evaluation.cells[key].estimate.mean == pytest.approx(cell.estimate.mean, nan_ok=True), key


def test_other_settings_do_not_mix(caught, shortcuts):
    with pytest.raises(UsageError, match=r"with which .* was begun"):
        evaluate_photos(
            sharp_tag_reader(),
            [shortcuts / "photos"],
            caught.out,
            methods=["occlusion"],
            protocol=LITTLE,
            progress=False,
        )


def test_photos_are_chosen_by_the_seed_and_keep_their_order(tmp_path):
    photos = [tmp_path / f"{number:02}.png" for number in range(50)]
    chosen = choose_photos(photos, 10, 3)
    assert chosen == choose_photos(photos, 10, 3) == sorted(chosen)
    assert chosen != choose_photos(photos, 10, 4)
    assert choose_photos(photos, 50, 3) == photos


@pytest.fixture
def opened(monkeypatch):
    """The command line's door opens the tag reader."""
    monkeypatch.setattr("vision_attn.cli.evaluate.open_named_model", lambda options: sharp_tag_reader())


ARGUMENTS = ["--methods", "center", "--steps", "2", "--groups", "2", "--cells", "4", "--sanity-photos", "0"]


def run(*arguments):
    return main(["evaluate", "MODEL", *map(str, arguments), *ARGUMENTS])


def test_the_command_prints_table_verdict_and_files(opened, shortcuts, tmp_path, capsys):
    assert run(shortcuts / "photos", "--out", tmp_path / "out", "--masks", shortcuts / "masks", "--samples", 18) == 0
    told = capsys.readouterr().out
    for words in (
        "the photo taken apart, 18 photos, mean and 95 % interval",
        "where the object is, 18 photos",
        "center (control)",
        "No method was asked for, only the controls, on 18 photos.",
        "the bottom right corner",
        "no figure of the attention",
        "18 photos in",
        "evaluation.json",
    ):
        assert words in told
    assert run(shortcuts / "photos", "--out", tmp_path / "out", "--masks", shortcuts / "masks", "--samples", 18) == 0
    assert "18 were measured before" in capsys.readouterr().out


def test_a_photo_that_cannot_be_read_is_named_and_the_others_measured(opened, shortcuts, tmp_path, capsys):
    shutil.copytree(shortcuts / "photos", tmp_path / "photos")
    (tmp_path / "photos" / "0.png").write_bytes(b"no picture")
    assert run(tmp_path / "photos", "--out", tmp_path / "out") == 3
    captured = capsys.readouterr()
    assert "19 photos in" in captured.out
    assert "0.png" in captured.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--methods", "rollouts"], "did you mean 'rollout'"),
        (["--methods", "rollout"], "expected"),
        (["--target", "circel"], "did you mean 'circle'"),
        (["--mask-classes", "names.txt"], "expected --masks with --mask-classes"),
        (["--masks", "nowhere"], "nowhere"),
        (["--cells", "65"], "expected no more cells than the 64 x 64 pixels"),
        (["--option", "window=3"], "expected"),
    ],
)
def test_what_a_person_gets_wrong_is_one_line(opened, shortcuts, tmp_path, capsys, arguments, words):
    given = ["evaluate", "MODEL", str(shortcuts / "photos"), "--out", str(tmp_path / "out"), *ARGUMENTS, *arguments]
    assert main(given) == 2
    told = capsys.readouterr().err
    assert words in told and told.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_masks_that_do_not_fit_are_refused_before_anything_runs(opened, shortcuts, tmp_path, capsys):
    shutil.copytree(shortcuts / "masks", tmp_path / "masks")
    Image.new("L", (60, 64), 255).save(tmp_path / "masks" / "3.png")
    assert run(shortcuts / "photos", "--out", tmp_path / "out", "--masks", tmp_path / "masks") == 2
    assert "3.png" in capsys.readouterr().err
    (tmp_path / "masks" / "3.png").unlink()
    assert run(shortcuts / "photos", "--out", tmp_path / "out", "--masks", tmp_path / "masks") == 2
    assert "3.png" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    skipped = ["--masks", tmp_path / "masks", "--missing-masks", "skip"]
    assert run(shortcuts / "photos", "--out", tmp_path / "out", *skipped) == 0
    assert "1 photos have no mask" in capsys.readouterr().out


def test_the_public_names_are_these():
    assert va.evaluate_photos is evaluate_photos
    assert va.evaluate_explanations is evaluate_explanations


# ------------------------------------------------------------------------------------------------ trained models


def write_pictures(root, drawn, masks):
    for index, (picture, mask) in enumerate(zip(drawn, masks, strict=True)):
        for folder, pixels in (("photos", picture.image), ("masks", mask)):
            (root / folder).mkdir(exist_ok=True)
            Image.fromarray(pixels).save(root / folder / f"{index:03}.png")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["cnn", "vit"])
def test_a_network_that_learned_a_shortcut_is_caught(kind, tmp_path):
    model = {"cnn": shortcut_cnn, "vit": shortcut_vit}[kind]()
    drawn = held_out("true", 40)
    write_pictures(tmp_path, drawn, [object_mask(one) * np.uint8(255) for one in drawn])
    done = evaluate_photos(
        model, [tmp_path / "photos"], tmp_path / "out", masks=tmp_path / "masks", protocol=LITTLE, progress=False
    )
    places = done.evaluation.places
    assert NAMES[places.named] == "the bottom right corner"
    assert places.effects[places.named].mean > 5 * abs(places.object_effect.mean)
    assert "the model itself, which reads the bottom right corner" in done.evaluation.verdict[2]
    assert (done.health is None) == (kind == "cnn")


@pytest.mark.slow
def test_a_network_that_learned_shapes_reads_no_fixed_place(tmp_path):
    drawn = held_out("plain", 40)
    write_pictures(tmp_path, drawn, [one.mask * np.uint8(255) for one in drawn])
    done = evaluate_photos(
        shapes_cnn(),
        [tmp_path / "photos"],
        tmp_path / "out",
        methods="grad_cam",
        masks=tmp_path / "masks",
        protocol=LITTLE,
        progress=False,
    )
    assert done.evaluation.places.named is None
    assert done.evaluation.places.object_effect.low > 0.1
    assert done.evaluation.cells["grad_cam", "mass_in_mask"].verdict == "better"


@pytest.mark.slow
def test_of_two_shapes_a_map_for_a_class_finds_its_own(tmp_path):
    drawn = held_out("pairs", 40)
    labels = []
    for one in drawn:
        values = np.zeros(one.image.shape[:2], np.uint8)
        for label, mask in one.masks.items():
            values[mask] = label + 1
        labels.append(values)
    write_pictures(tmp_path, drawn, labels)
    found = evaluate_photos(
        shapes_cnn(),
        [tmp_path / "photos"],
        tmp_path / "out",
        methods="grad_cam,integrated_gradients",
        options={"integrated_gradients.steps": 8},
        masks=tmp_path / "masks",
        protocol=FEW,
        progress=False,
    ).evaluation
    assert found.cells["grad_cam", "separation"].verdict == "better"
    for control in found.controls:
        assert found.cells[control, "separation"].estimate.mean == pytest.approx(0.5, abs=1e-6)
