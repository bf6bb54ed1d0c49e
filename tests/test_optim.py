"""Learning rates: over time and over layers."""

import math

import pytest
import timm
import torch
from torch import nn

from vision_attn.errors import UsageError
from vision_attn.layers.attach import attach_attention
from vision_attn.training.freezing import layers_of
from vision_attn.training.optim import OptimConfig, create_optimizer, create_schedule


def rates(steps=20, per_epoch=5, **options):
    config = OptimConfig(lr=1.0, **{"warmup_epochs": 0, "min_lr": 0.1, **options})
    optimizer = create_optimizer(nn.Linear(2, 2), config)
    schedule = create_schedule(optimizer, config, total_steps=steps, steps_per_epoch=per_epoch)
    found = []
    for step in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        schedule.step_update(step + 1)
    return found


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"schedule": "none", "warmup_epochs": 1}, lambda t: 1.0),
        ({"schedule": "constant"}, lambda t: 1.0),
        ({"schedule": "linear"}, lambda t: 1 - 0.9 * t / 20),
        ({"schedule": "poly"}, lambda t: 0.1 + 0.9 * (1 - t / 20) ** 0.9),
        ({"schedule": "cosine"}, lambda t: 0.1 + 0.45 * (1 + math.cos(math.pi * t / 20))),
        # A third of 20 steps is 7.
        ({"schedule": "step"}, lambda t: 0.1 ** (t // 7)),
        ({"schedule": "step", "schedule_options": {"decay_epochs": 2, "decay_rate": 0.5}}, lambda t: 0.5 ** (t // 10)),
        # timm takes a milestone one step early.
        ({"schedule": "multistep"}, lambda t: 0.1 ** ((t >= 9) + (t >= 14))),
        ({"schedule": "multistep", "schedule_options": {"decay_milestones": [1, 2]}}, None),
        ({"schedule": "wsd", "schedule_options": {"decay_epochs": 0.5}}, None),
        ({"schedule": "rsqrt", "schedule_options": {"decay_epochs": 1}, "warmup_epochs": 1}, None),
        ({"schedule": "tanh"}, None),
    ],
)
def test_the_rate_over_time(options, expected):
    found = rates(**options)
    if expected is not None:
        assert found == pytest.approx([expected(t) for t in range(20)], abs=1e-6)
    if options["schedule"] == "wsd":
        assert found[:11] == pytest.approx([1.0] * 11)
        assert found[11] < 1
    if options.get("schedule_options", {}).get("decay_milestones"):
        assert (found[3], found[8], found[19]) == pytest.approx((1.0, 0.1, 0.01))
    if options["schedule"] in ("tanh", "rsqrt"):
        top = found.index(max(found))
        assert found[top:] == sorted(found[top:], reverse=True)


def test_the_rate_warms_up_before_any_schedule():
    for schedule in ("constant", "linear", "step"):
        assert rates(schedule=schedule, warmup_epochs=1)[:5] == pytest.approx([0.2, 0.36, 0.52, 0.68, 0.84])


NETWORKS = {
    "resnet10t": ("conv1", "layer1.0", "layer4.0", "fc", "layer?"),
    "tf_efficientnet_lite0": ("conv_stem", "blocks.0.0", "blocks.6.0", "classifier", "blocks.?"),
    "vit_tiny_patch16_224": ("patch_embed", "blocks.0", "blocks.11", "head", "blocks.*"),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_layers_have_their_share_of_the_rate_and_attached_blocks_that_of_their_place(name):
    stem, first, last, head, where = NETWORKS[name]
    network = timm.create_model(name, num_classes=3)
    # The patches of the last block of a ViT are read by nothing.
    places = [f"blocks.{i}" for i in range(11)] if where == "blocks.*" else where
    attach_attention(network, "eca", where=places)
    layers = layers_of(network)
    assert sorted(name for layer in layers for name in layer) == sorted(name for name, _ in network.named_parameters())
    optimizer = create_optimizer(network, OptimConfig(lr=1.0, layer_decay=0.5))
    scales = {id(p): group["lr_scale"] for group in optimizer.param_groups for p in group["params"]}
    scale = {name: scales[id(p)] for name, p in network.named_parameters()}
    of = {place: {scale[n] for n in scale if n.startswith(f"{place}.") and ".attached_" not in n} for place in
          (stem, first, last, head)}  # fmt: skip
    assert of[head] == {1.0}
    assert of[last] == {0.5}
    assert of[first] == {0.5 ** (len(layers) - 2)}
    assert of[stem] == {0.5 ** (len(layers) - 1)}
    blocks = [n for n in scale if ".attached_" in n]
    assert blocks
    for n in blocks:
        place = n.split(".attached_")[0]
        around = [
            value for other, value in scale.items() if other.startswith(f"{place}.") and ".attached_" not in other
        ]
        assert scale[n] == max(around), n
    # The network is left as it was.
    assert "group_matcher" not in vars(network)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": "cosin"}, "did you mean 'cosine'"),
        ({"schedule_options": {"decay_epoch": 3}}, "did you mean 'decay_epochs'"),
        ({"schedule": "plateau"}, "choose one of|did you mean"),
    ],
)
def test_schedules_that_are_none_are_refused(options, message):
    with pytest.raises(UsageError, match=message):
        OptimConfig(**options)


def test_options_that_a_schedule_cannot_use_are_refused():
    config = OptimConfig(schedule="wsd", schedule_options={"decay_epochs": 99})
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    with pytest.raises(UsageError, match="options that the schedule wsd takes"):
        create_schedule(optimizer, config, total_steps=20, steps_per_epoch=5)
