"""What training makes small and what evaluation counts: against torch, timm, torchvision and numbers by hand."""

import pytest
import torch
from timm.loss import BinaryCrossEntropy
from torch.nn import functional as F
from torchvision.ops import sigmoid_focal_loss

from vision_attn.data.datamodule import Batch
from vision_attn.errors import UsageError
from vision_attn.training.losses import Loss, LossConfig, class_weights, make_metrics, shares
from vision_attn.training.module import Classifier

GENERATOR = torch.Generator().manual_seed(0)
LOGITS = 3 * torch.randn(7, 4, generator=GENERATOR)
LABELS = torch.tensor([0, 1, 2, 3, 3, 0, 1])
SEVERAL = (torch.rand(7, 4, generator=GENERATOR) < 0.4).float()
MIXED = torch.rand(7, 4, generator=GENERATOR).softmax(-1)


def loss_of(config=None, **options):
    return Loss(config or LossConfig(), num_classes=4, **options)


def test_cross_entropy_is_torchs_with_smoothing_and_class_weights():
    weights = torch.tensor([1.0, 2.0, 0.5, 3.0])
    ours = loss_of(LossConfig(class_weights=weights.tolist()), label_smoothing=0.1)(LOGITS, LABELS)
    torch.testing.assert_close(ours, F.cross_entropy(LOGITS, LABELS, weight=weights, label_smoothing=0.1))
    ours = loss_of(label_smoothing=0.1)(LOGITS, MIXED)
    torch.testing.assert_close(ours, F.cross_entropy(LOGITS, MIXED, label_smoothing=0.1))


def test_a_mixed_label_has_the_mixed_loss():
    loss, other = loss_of(label_smoothing=0.2), LABELS.flip(0)
    mixed = 0.3 * shares(LABELS, 4) + 0.7 * shares(other, 4)
    expected = 0.3 * loss(LOGITS, LABELS) + 0.7 * loss(LOGITS, other)
    torch.testing.assert_close(loss(LOGITS, mixed), expected)


@pytest.mark.parametrize("threshold", [None, 0.2])
def test_the_binary_loss_of_one_label_is_timms(threshold):
    ours, reference = (
        loss_of(LossConfig("bce", target_threshold=threshold), label_smoothing=0.1),
        BinaryCrossEntropy(smoothing=0.1, target_threshold=threshold),
    )
    torch.testing.assert_close(ours(LOGITS, LABELS), reference(LOGITS, LABELS))
    smooth = 0.9 * MIXED + 0.1 / 4  # which timm leaves to its Mixup
    torch.testing.assert_close(ours(LOGITS, MIXED), reference(LOGITS, smooth))


def test_the_binary_loss_of_several_labels_is_timms():
    ours = loss_of(multi_label=True, label_smoothing=0.1)
    assert ours.name == "bce"
    torch.testing.assert_close(ours(LOGITS, SEVERAL), BinaryCrossEntropy(0.1, smooth_dense=True)(LOGITS, SEVERAL))
    weights = torch.tensor([1.0, 2.0, 0.5, 3.0])
    ours = loss_of(LossConfig(class_weights=weights.tolist()), multi_label=True)(LOGITS, SEVERAL)
    torch.testing.assert_close(ours, F.binary_cross_entropy_with_logits(LOGITS, SEVERAL, weight=weights))


def test_the_focal_loss_of_several_labels_is_torchvisions():
    ours = loss_of(LossConfig("focal", gamma=1.5, alpha=0.3), multi_label=True)(LOGITS, SEVERAL)
    torch.testing.assert_close(ours, sigmoid_focal_loss(LOGITS, SEVERAL, alpha=0.3, gamma=1.5, reduction="mean"))
    ours = loss_of(LossConfig("focal"), multi_label=True)(LOGITS, SEVERAL)
    torch.testing.assert_close(ours, sigmoid_focal_loss(LOGITS, SEVERAL, alpha=-1, gamma=2, reduction="mean"))


def test_the_focal_loss_of_one_label_is_that_of_the_softmax():
    p = LOGITS.softmax(-1)[range(7), LABELS]
    expected = (-((1 - p) ** 2) * p.log()).mean()
    torch.testing.assert_close(loss_of(LossConfig("focal"))(LOGITS, LABELS), expected)
    same = loss_of(LossConfig("focal", gamma=0), label_smoothing=0.1)(LOGITS, LABELS)
    torch.testing.assert_close(same, F.cross_entropy(LOGITS, LABELS, label_smoothing=0.1))


def test_class_weights_by_hand():
    balanced = class_weights(LossConfig(class_weights="balanced"), num_classes=3, class_counts=[1, 2, 9])
    torch.testing.assert_close(balanced, torch.tensor([12 / 3, 12 / 6, 12 / 27]))
    effective = class_weights(LossConfig(class_weights="effective", beta=0.5), num_classes=2, class_counts=[1, 2])
    # E = (1 - 0.5^n) / (1 - 0.5) = 1 and 1.5; 1/E = 1 and 2/3, times 2 / (5/3).
    torch.testing.assert_close(effective, torch.tensor([1.2, 0.8]))


@pytest.mark.parametrize(("name", "several"), [("cross_entropy", False), ("bce", False), ("focal", True)])
def test_a_photos_weight_is_that_of_copies(name, several):
    loss = loss_of(LossConfig(name, class_weights=[1.0, 2.0, 0.5, 3.0]), multi_label=several, label_smoothing=0.1)
    labels, weights = SEVERAL if several else LABELS, torch.tensor([2.0, 1, 0, 1, 3, 1, 1])
    copies = weights.long()
    expected = loss(LOGITS.repeat_interleave(copies, 0), labels.repeat_interleave(copies, 0))
    torch.testing.assert_close(loss(LOGITS, labels, weights), expected)
    assert loss(LOGITS, labels, torch.zeros(7)) == 0


def test_the_sigmoids_class_weight_is_that_of_the_photos_class():
    weights = torch.tensor([1.0, 2.0, 0.5, 3.0])
    ours = loss_of(LossConfig("bce", class_weights=weights.tolist()))(LOGITS, LABELS)
    each = F.binary_cross_entropy_with_logits(LOGITS, F.one_hot(LABELS, 4).float(), reduction="none").mean(-1)
    torch.testing.assert_close(ours, (each * weights[LABELS]).sum() / weights[LABELS].sum())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LossConfig(gamma=-1), "gamma of at least 0"),
        (lambda: LossConfig(alpha=2), "alpha within"),
        (lambda: LossConfig(beta=1), "beta within"),
        (lambda: LossConfig(target_threshold=1), "target_threshold within"),
        (lambda: loss_of(LossConfig("cross_entropy"), multi_label=True), "use bce or focal"),
        (lambda: loss_of(LossConfig("focal", alpha=0.2)), "several labels only"),
        (lambda: loss_of(LossConfig("focal", target_threshold=0.2)), "one label only"),
        (lambda: loss_of(LossConfig(class_weights=[1.0])), "expected 4 numbers"),
        (lambda: loss_of(LossConfig(class_weights="balanced")), "every class .* got None"),
        (lambda: loss_of(LossConfig(class_weights="effective"), class_counts=[3, 0, 1, 1]), r"got \[3, 0, 1, 1\]"),
    ],
)
def test_a_loss_that_does_not_go_with_the_labels_is_refused(make, message):
    with pytest.raises(UsageError, match=message):
        make()


def test_average_precision_leaves_out_classes_that_no_photo_has():
    scores = torch.tensor([[0.9, 0.1, 0.5], [0.8, 0.7, 0.5], [0.3, 0.6, 0.5]])
    labels = torch.tensor([[1, 0, 0], [0, 1, 0], [1, 0, 0]])
    metrics = make_metrics(3, multi_label=True)
    metrics.update(scores[:2], labels[:2])
    metrics.update(scores[2:], labels[2:])
    found = metrics.compute()
    # Class 0: found at ranks 1 and 3, (1/1 + 2/3) / 2; class 1: at rank 1; class 2: none.
    assert found["map"] == pytest.approx(((1 + 2 / 3) / 2 + 1) / 2)
    # At one half only the first photo's labels are all right.
    assert found["exact"] == pytest.approx(1 / 3)


def several_labels():
    torch.manual_seed(0)
    model = Classifier("resnet10t", num_classes=4, multi_label=True).eval()
    model.logged = {}
    model.log_dict = lambda values, **kwargs: model.logged.update(values)
    model.forward = lambda images: LOGITS[images[:, 0, 0, 0].long()]
    return model


def batch(rows, labels, indices):
    images = torch.tensor(rows, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 1, 1)
    return Batch(images, labels, torch.tensor(indices), torch.ones(len(rows)))


def test_photos_with_several_labels_are_judged_by_each_class():
    model = several_labels()
    model.normalize = lambda images: images
    # Rows of filling, whose labels are wrong, count nowhere.
    model.validation_step(batch([0, 1, 2, 3, 0], torch.cat((SEVERAL[:4], 1 - SEVERAL[:1])), [0, 1, 2, 3, -1]), 0)
    model.validation_step(batch([4, 5, 6, 4], torch.cat((SEVERAL[4:], 1 - SEVERAL[4:5])), [4, 5, 6, -1]), 1)
    model.validation_step(batch([0, 0], 1 - SEVERAL[:2], [-1, -1]), 2)
    model.on_validation_epoch_end()
    right = (LOGITS > 0) == SEVERAL.bool()
    assert model.monitor == "val/map"
    assert model.logged["val/exact"] == pytest.approx(float(right.all(-1).float().mean()))
    assert model.logged["val/loss"] == pytest.approx(float(F.binary_cross_entropy_with_logits(LOGITS, SEVERAL)))
    assert model.val_confusion.compute().sum() == 7 * 4
    probabilities, indices = model.predict_step(batch([2, 5, 0], SEVERAL[:3], [2, 5, -1]), 0)
    torch.testing.assert_close(probabilities, LOGITS[[2, 5]].sigmoid())
    assert indices.tolist() == [2, 5]


def test_evaluation_is_of_plain_cross_entropy_whatever_was_trained_with():
    model = Classifier("resnet10t", num_classes=4, loss=LossConfig("focal", class_weights=[1.0, 2, 3, 4])).eval()
    logged = {}
    model.log_dict = lambda values, **kwargs: logged.update(values)
    model.normalize, model.forward = (lambda images: images), (lambda images: LOGITS)
    model.test_step(batch(range(7), LABELS, range(7)), 0)
    model.on_test_epoch_end()
    assert logged["test/loss"] == pytest.approx(float(F.cross_entropy(LOGITS, LABELS)))
    assert model.monitor == "val/top1"
    # The class weights come from the config, not from checkpoints.
    assert not any(key.startswith("loss") for key in model.state_dict())
