"""Training a part of a network, by steps, from a teacher, with averages, and what is looked for before."""

import copy
import math

import numpy as np
import pytest
import pytorch_lightning as pl
import timm
import torch
from pytorch_lightning.callbacks import EMAWeightAveraging
from torch import nn
from torch.nn import functional as F

from vision_attn.data.datamodule import Batch, ImageDataModule
from vision_attn.errors import UsageError
from vision_attn.export.artefact import save_model
from vision_attn.layers.attach import attach_attention
from vision_attn.models.factory import create_model, timm_preprocessing
from vision_attn.training.distillation import Teacher, TeacherConfig, distillation_losses
from vision_attn.training.freezing import Tuning, TuningConfig, check_blocks_learn
from vision_attn.training.module import Classifier
from vision_attn.training.optim import OptimConfig, create_optimizer
from vision_attn.training.tuning import (
    FinderConfig,
    find_batch_size,
    find_lr,
    smoothed,
    steepest,
)
from vision_attn.viz.plots import learning_rates

pytestmark = [
    # Lightning's advice, and what its and torch's versions have to say to each other.
    pytest.mark.filterwarnings("ignore:.*LeafSpec"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:Found .* in eval mode"),
]

VIT = {"depth": 2, "embed_dim": 32, "num_heads": 2}


def data(**options):
    return ImageDataModule(
        "shapes",
        options={"size": 32, "train": 24, "validation": 8, "test": 8},
        image_size=32,
        **{"batch_size": 8, "num_workers": 0, "train_transforms": ["HorizontalFlip"], **options},
    )


def classifier(**options):
    torch.manual_seed(0)
    return Classifier(
        **{
            "name": "va_vit_micro_stem8_64",
            "num_classes": 8,
            "image_size": 32,
            "options": VIT,
            "optim": OptimConfig(lr=0.01, warmup_epochs=0),
            **options,
        }
    )


def trainer(folder, epochs=1, **options):
    return pl.Trainer(
        **{
            "accelerator": "cpu",
            "max_epochs": epochs,
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": False,
            "limit_val_batches": 0,
            "default_root_dir": folder,
            "use_distributed_sampler": False,
            **options,
        }
    )


def modules(names):
    return {
        ".".join(name.split(".")[:2]) if name.startswith(("layer", "blocks")) else name.split(".")[0] for name in names
    }


def test_a_linear_probe_moves_the_classifier_alone():
    model = classifier(name="resnet10t", options=None, image_size=None, tuning=TuningConfig("linear_probe")).train()
    before = {key: tensor.clone() for key, tensor in model.network.state_dict().items()}
    optimizer = create_optimizer(model.network, OptimConfig(lr=0.1))
    model.network(torch.randn(4, 3, 32, 32)).square().sum().backward()
    optimizer.step()
    after = model.network.state_dict()
    assert {key for key in before if not torch.equal(before[key], after[key])} == {"fc.weight", "fc.bias"}


@pytest.mark.parametrize(
    ("name", "blocks", "trained"),
    [
        ("resnet10t", 1, {"layer4.0", "fc"}),
        ("resnet10t", 3, {"layer2.0", "layer3.0", "layer4.0", "fc"}),
        ("vit_tiny_patch16_224", 2, {"blocks.10", "blocks.11", "norm", "head"}),
    ],
)
def test_the_last_blocks_are_trained(name, blocks, trained):
    network = timm.create_model(name, num_classes=2)
    tuning = Tuning(network, TuningConfig("last_blocks", blocks=blocks))
    assert modules(tuning.trained(0)) == trained
    assert {n for n, p in network.named_parameters() if p.requires_grad} == tuning.trained(0)
    count = sum(p.numel() for p in network.parameters() if p.requires_grad)
    assert f"({count:,} of " in tuning.line(network)


def test_blocks_are_unfrozen_from_the_head_down_and_frozen_names_stay():
    network = timm.create_model("resnet10t", num_classes=2)
    tuning = Tuning(network, TuningConfig("gradual", blocks=2, every=3), ["layer3."])
    steps = [modules(tuning.trained(epoch)) for epoch in (0, 2, 3, 5, 6, 9, 99)]
    assert steps[0] == steps[1] == {"fc"}
    assert steps[2] == steps[3] == {"fc", "layer4.0"}
    assert steps[4] == {"fc", "layer4.0", "layer2.0", "layer1.0"}
    assert steps[5] == steps[6] == steps[4] | {"conv1", "bn1"}
    assert tuning.last_change == 9


def test_a_gradual_run_moves_what_is_unfrozen_and_goes_on_after_a_stop(tmp_path):
    gradual = {"tuning": TuningConfig("gradual"), "options": {**VIT, "depth": 1}}
    seen = []

    class Watch(pl.Callback):
        def on_train_epoch_end(self, trainer, module):
            seen.append({key: tensor.clone() for key, tensor in module.network.state_dict().items()})

    whole = classifier(**gradual)
    first = {key: tensor.clone() for key, tensor in whole.network.state_dict().items()}
    trainer(tmp_path, 3, callbacks=[Watch()]).fit(whole, datamodule=data())
    moved = [
        {key.split(".")[0] for key in before if not torch.equal(before[key], after[key])}
        for before, after in zip([first, *seen], seen, strict=False)
    ]
    assert moved[0] == {"head"}
    assert moved[1] == {"head", "norm", "blocks"}
    assert moved[2] == {"head", "norm", "blocks", "patch_embed", "cls_token", "pos_embed"}
    half = trainer(tmp_path, 3, callbacks=[_StopAfter(1)])
    half.fit(classifier(**gradual), datamodule=data())
    half.save_checkpoint(tmp_path / "half.ckpt")
    resumed = classifier(**gradual)
    trainer(tmp_path, 3).fit(resumed, datamodule=data(), ckpt_path=tmp_path / "half.ckpt")
    for key, tensor in whole.network.state_dict().items():
        assert torch.equal(tensor, resumed.network.state_dict()[key]), key


class _StopAfter(pl.Callback):
    def __init__(self, epochs):
        self.epochs = epochs

    def on_train_epoch_end(self, trainer, module):
        trainer.should_stop = trainer.current_epoch + 1 >= self.epochs


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TuningConfig(blocks=0), "tuning.blocks of at least 1"),
        (lambda: classifier(tuning=TuningConfig("last_blocks", blocks=9)), "blocks below 3"),
        (lambda: classifier(tuning=TuningConfig("linear_probe"), freeze=["head"]), "left to train"),
        (lambda: classifier(freeze=["blokcs.0"]), "choose among blocks"),
        (lambda: Tuning(nn.Linear(2, 2), TuningConfig("gradual")), "a classifier"),
        (lambda: TeacherConfig("x", weight=0), "weight within"),
        (lambda: TeacherConfig("x", temperature=0), "temperature above"),
        (lambda: FinderConfig(min_lr=2.0), "min_lr < tune.max_lr"),
        (lambda: FinderConfig(max_trials=0), "max_trials of at least 1"),
        (lambda: FinderConfig(steps=3), "steps of at least 20"),
    ],
)
def test_what_cannot_be_trained_is_refused(make, message):
    with pytest.raises(UsageError, match=message):
        make()


def test_new_blocks_that_would_never_learn_are_refused():
    network = timm.create_model("resnet10t", num_classes=2)
    attach_attention(network, "cbam", where="layer?")
    with pytest.raises(UsageError, match=r"the new one at layer1\.0\.attached_cbam"):
        check_blocks_learn(network, Tuning(network, TuningConfig("last_blocks", blocks=1)))
    network = timm.create_model("resnet10t", num_classes=2)
    attach_attention(network, "cbam", where="layer?")
    # They will learn in time.
    check_blocks_learn(network, Tuning(network, TuningConfig("gradual")))


def test_distillation_is_the_papers_by_hand():
    generator = np.random.default_rng(0)
    student, teacher = generator.normal(size=(2, 5, 3))

    def softmax(z):
        e = np.exp(z - z.max(-1, keepdims=True))
        return e / e.sum(-1, keepdims=True)

    p, q = softmax(student / 4), softmax(teacher / 4)
    expected = 16 * (q * (np.log(q) - np.log(p))).sum(-1)
    found = distillation_losses(torch.tensor(student), torch.tensor(teacher), temperature=4)
    np.testing.assert_allclose(found.numpy(), expected)
    best = teacher.argmax(-1)
    hard = distillation_losses(torch.tensor(student), torch.tensor(teacher), temperature=4, hard=True)
    np.testing.assert_allclose(hard.numpy(), -np.log(softmax(student)[range(5), best]))
    # Several labels: each class is yes or no.
    p, q = 1 / (1 + np.exp(-student / 4)), 1 / (1 + np.exp(-teacher / 4))
    expected = 16 * (q * np.log(q / p) + (1 - q) * np.log((1 - q) / (1 - p))).mean(-1)
    found = distillation_losses(torch.tensor(student), torch.tensor(teacher), temperature=4, multi_label=True)
    np.testing.assert_allclose(found.numpy(), expected)
    hard = distillation_losses(torch.tensor(student), torch.tensor(teacher), hard=True, multi_label=True)
    reference = F.binary_cross_entropy_with_logits(torch.tensor(student), torch.tensor(teacher > 0).double())
    assert float(hard.mean()) == pytest.approx(float(reference))


@pytest.fixture(scope="module")
def teacher_folder(tmp_path_factory):
    torch.manual_seed(1)
    network = create_model("resnet10t", num_classes=8)
    network.pretrained_cfg["mean"], network.pretrained_cfg["std"] = (0.1, 0.2, 0.3), (0.5, 0.4, 0.3)
    return save_model(
        tmp_path_factory.mktemp("teacher") / "export",
        network.eval(),
        architecture="resnet10t",
        classes=data().classes,
        preprocessing=timm_preprocessing(network, 64),
    )


def test_a_teacher_is_asked_in_its_own_size_and_colours_and_is_kept_nowhere(teacher_folder):
    model = classifier(teacher=TeacherConfig(str(teacher_folder), weight=0.3, temperature=2.0))
    plain = classifier()
    assert list(model.state_dict()) == list(plain.state_dict())
    assert len(list(model.parameters())) == len(list(plain.parameters()))
    assert copy.deepcopy(model).teacher is model.teacher
    images = torch.full((2, 3, 32, 32), 51, dtype=torch.uint8)
    labels = torch.tensor([1, 7])
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.1, 0.2, 0.3), (0.5, 0.4, 0.3)))
    with torch.no_grad():
        taught = model.teacher.network((torch.full((2, 3, 64, 64), 0.2) - mean) / std)
    logits = model(model.normalize(images))
    distilled = distillation_losses(logits, taught, temperature=2.0)
    weights = torch.tensor([1.0, 3.0])
    each = F.cross_entropy(logits, labels, label_smoothing=0.1, reduction="none")
    expected = ((0.7 * each + 0.3 * distilled) * weights).sum() / 4
    model.log = lambda *args, **kwargs: None
    model.train()
    found = model.training_step(Batch(images, labels, labels, weights), 0)
    torch.testing.assert_close(found, expected)
    found.backward()
    assert not any(p.requires_grad or p.grad is not None for p in model.teacher.network.parameters())
    assert not model.teacher.network.training


def test_a_teacher_of_other_classes_is_refused(teacher_folder):
    teacher = Teacher(TeacherConfig(str(teacher_folder)))
    teacher.check_classes(data().classes)
    with pytest.raises(UsageError, match="a teacher of the classes a, b"):
        teacher.check_classes(("a", "b"))
    with pytest.raises(UsageError, match="check the path"):
        Teacher(TeacherConfig("runs/nowhere/export"))


@pytest.mark.slow
def test_the_weight_average_is_that_of_parameters_and_statistics(tmp_path):
    model = classifier(name="resnet10t", options=None, image_size=None, tuning=TuningConfig("last_blocks", blocks=2))
    averages = {}

    class ByHand(pl.Callback):
        # Before the average is put in place at the end: this callback is told of each step first.
        def on_train_batch_end(self, trainer, module, *args):
            for key, tensor in module.network.state_dict().items():
                now = tensor.double()
                averages[key] = now.clone() if key not in averages else 0.8 * averages[key] + 0.2 * now

    frozen = {k: v.clone() for k, v in model.network.state_dict().items() if k.startswith(("conv1", "bn1", "layer1"))}
    trainer(tmp_path, callbacks=[ByHand(), EMAWeightAveraging(decay=0.8)]).fit(model, datamodule=data())
    state = model.network.state_dict()
    for key, value in averages.items():
        if "num_batches" not in key:
            torch.testing.assert_close(state[key].double(), value, atol=1e-6, rtol=1e-5)
    assert frozen
    for key, value in frozen.items():
        # The average of equal numbers is rounded.
        torch.testing.assert_close(state[key], value, atol=1e-6, rtol=1e-6)
    assert not torch.equal(state["layer4.0.bn1.running_mean"], torch.zeros_like(state["layer4.0.bn1.running_mean"]))


@pytest.mark.slow
def test_a_compiled_run_leaves_plain_keys_and_a_network_that_runs_call_by_call():
    model = classifier(compile=True)
    keys = list(model.state_dict())
    model.on_fit_start()
    assert model.network._compiled_call_impl is not None
    assert list(model.state_dict()) == keys
    assert copy.deepcopy(model).network._compiled_call_impl is None
    model.on_fit_end()
    assert model.network._compiled_call_impl is None


@pytest.mark.parametrize("options", [{}, {"tuning": TuningConfig("gradual")}])
def test_looking_for_a_learning_rate_leaves_all_as_it_was(tmp_path, options):
    model, photos = classifier(**options, optim=OptimConfig(lr=0.003, layer_decay=0.5)), data()
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    wanted = [p.requires_grad for p in model.parameters()]
    random, rates = torch.get_rng_state(), []
    step = model.on_before_optimizer_step

    def watched(optimizer):
        step(optimizer)
        rates.append({round(group["lr"] / group["lr_scale"], 12) for group in optimizer.param_groups})

    model.on_before_optimizer_step = watched
    config = FinderConfig(lr=True, steps=20, min_lr=1e-5, max_lr=0.1)
    found = find_lr(model, photos, config, trainer={"accelerator": "cpu"})
    assert len(found.rates) == len(found.losses) == 20
    # Each layer has its share of one rate, and the rates are Lightning's.
    assert all(len(at) == 1 for at in rates)
    assert [at.pop() for at in rates] == pytest.approx(list(found.rates))
    assert found.rates[0] == pytest.approx(1e-5)
    assert all(later > earlier for earlier, later in zip(found.rates, found.rates[1:], strict=False))
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[key]), key
    assert wanted == [p.requires_grad for p in model.parameters()]
    assert torch.equal(random, torch.get_rng_state())
    assert model.lr == 0.003
    del model.on_before_optimizer_step
    again = find_lr(model, photos, config, trainer={"accelerator": "cpu"})
    assert again == found
    assert learning_rates(tmp_path / "lr_finder.png", found.rates, found.losses, found.best).is_file()


def test_the_steepest_fall_is_that_over_the_logarithm():
    rates = np.geomspace(1e-6, 1, 61)
    # A fall in the middle, at 1e-3, and a rise after 0.1; noise at the lowest rates.
    losses = 2 - 1 / (1 + np.exp(-4 * (np.log10(rates) + 3))) + np.where(rates > 0.1, rates, 0)
    losses[:20] += 1e-3 * (-1.0) ** np.arange(20)
    assert steepest(rates, losses) == pytest.approx(1e-3, rel=0.3)
    assert steepest(rates, np.arange(61.0)) is None
    assert steepest(rates, np.full(61, math.nan)) is None
    assert smoothed([3.0, 1.0], share=0.5) == pytest.approx([3.0, (0.5 * 1.5 + 0.5) / 0.75])


@pytest.mark.slow
def test_batch_sizes_are_doubled_until_the_photos_or_the_trials_end(monkeypatch):
    model, photos = classifier(), data(batch_size=4)
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    # 24 photos: 4, 8, 16.
    assert find_batch_size(model, photos, FinderConfig(), trainer={"accelerator": "cpu"}) == 16
    assert find_batch_size(model, photos, FinderConfig(max_trials=2), trainer={"accelerator": "cpu"}) == 8
    assert photos.batch_size == 4
    step = model.training_step

    def small_memory(batch, batch_idx):
        if len(batch.images) > 8:
            raise RuntimeError("CUDA out of memory.")
        return step(batch, batch_idx)

    monkeypatch.setattr(model, "training_step", small_memory)
    assert find_batch_size(model, photos, FinderConfig(), trainer={"accelerator": "cpu"}) == 8
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[key]), key


@pytest.mark.parametrize(
    ("name", "options"),
    [("vit_tiny_patch16_224", {"depth": 1}), ("swin_tiny_patch4_window7_224", {"depths": [1, 1, 1, 1]})],
)
def test_a_checkpoint_of_224_is_trained_at_160(name, options):
    torch.manual_seed(0)
    state = create_model(name, num_classes=2, image_size=224, **options).state_dict()
    model = Classifier(name, num_classes=8, image_size=160, options=options, checkpoint=state)
    assert model.network(torch.zeros(1, 3, 160, 160)).shape == (1, 8)
    kept = [
        key for key, tensor in model.network.state_dict().items() if key in state and torch.equal(tensor, state[key])
    ]
    left = set(model.network.state_dict()) - set(kept)
    assert all("head" in key or "pos_embed" in key or "relative_position" in key or "attn_mask" in key for key in left)
