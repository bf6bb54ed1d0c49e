"""Does a model use what a map shows? Parts of the photo are removed, and the model is asked again.

Parts are cells: blocks of the image that are removed whole, for single pixels out of place are a texture that a network
never saw. Many maps of an image are judged at once, their photos in parts share full batches, and the two ends of every
curve, the whole photo and nothing of it, are asked once.

`removal_curves` serves deletion and insertion (Petsiuk, Das and Saenko, "RISE", BMVC 2018) and both perturbation tests
(Samek et al. 2017; Chefer, Gur and Wolf, CVPR 2021); `group_effects` and `saco` are SaCo (Wu et al., CVPR 2024).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from vision_attn.errors import UsageError
from vision_attn.metrics import baselines

Predict = Callable[[Tensor], Tensor]
"""From images (n, 3, H, W), normalised, to probabilities (n, classes)."""


def cell_scores(maps: Tensor, cells: tuple[int, int]) -> Tensor:
    """Returns the relevance of each cell, row by row, (B, rows * columns).

    Along an axis where the map has at least as many values as there are cells, a cell's score is the mean of the map
    over the cell, exact also where borders do not meet; along one where it has fewer, the map is interpolated linearly
    between the centres of its values, at the centre of the cell.

    Args:
        maps: (B, h, w).
        cells: (rows, columns) into which the image is divided evenly.

    Raises:
        UsageError: shapes do not fit, or a map has values that are not finite.

    Example:
        >>> cell_scores(torch.tensor([[[1.0, 3.0, 5.0, 5.0]]]), (1, 2))
        tensor([[2., 5.]])
    """
    if maps.dim() != 3 or 0 in maps.shape[1:]:
        raise UsageError(f"expected maps (B, h, w), got {tuple(maps.shape)}: add a batch dimension with maps[None]")
    _check_cells(cells)
    maps = maps.to(torch.promote_types(maps.dtype, torch.float32))
    if not maps.isfinite().all():
        raise UsageError("expected finite maps, got NaN or infinite values: leave those maps out and say so")
    for axis, count in ((1, cells[0]), (2, cells[1])):
        if maps.shape[axis] != count:
            maps = (maps.movedim(axis, -1) @ _resampling(maps.shape[axis], count, maps).T).movedim(-1, axis)
    return maps.flatten(1)


def removal_order(scores: Tensor, *, seed: int = 0) -> Tensor:
    """Returns the cells from most to least relevant, int64 (..., n).

    Cells that score alike stand in random order. By position, the top of the photo would go first: a map of zeros, or
    the zeros of any map that was cut at 0, would be judged as "the sky is relevant" is. The order of ties follows from
    `seed` and is the same for all rows, so in every batch, and for the methods that are compared.

    Args:
        scores: (..., n), finite.
        seed: Of the order of ties.

    Raises:
        UsageError: a score is not finite.

    Example:
        >>> removal_order(torch.tensor([0.1, 0.5, 0.3]))
        tensor([1, 2, 0])
    """
    if not scores.isfinite().all():
        raise UsageError("expected finite scores, got NaN or infinite values: leave those maps out and say so")
    shuffled = torch.randperm(scores.shape[-1], generator=torch.Generator().manual_seed(seed)).to(scores.device)
    return shuffled[scores[..., shuffled].argsort(dim=-1, descending=True, stable=True)]


@dataclass(frozen=True)
class Curves:
    """What a model answers while cells go and come, for M maps of each of B images.

    Attributes:
        fractions: (S + 1,) from 0 to 1, the share of the cells that is removed (deletion) or shown (insertion); of the
            pixels, where the cells are equally large.
        deletion: (B, M, S + 1), the target's probability while the most relevant cells are removed first.
        insertion: (B, M, S + 1), the same while the most relevant are shown first, on the baseline.
        deletion_kept: (B, M, S + 1) booleans: is the target still the class of the highest probability?
        insertion_kept: (B, M, S + 1), the same.
    """

    fractions: Tensor
    deletion: Tensor
    insertion: Tensor
    deletion_kept: Tensor
    insertion_kept: Tensor


def removal_curves(
    predict: Predict,
    images: Tensor,
    orders: Tensor,
    targets: Tensor,
    *,
    cells: tuple[int, int],
    fill: Tensor,
    steps: int = 10,
    batch_size: int = 64,
) -> Curves:
    """Returns deletion and insertion curves for M maps of each image.

    After step s, round(s n / S) of the n cells are removed, or shown. Step 0 of deletion is the last of insertion, and
    the other way round; these two are asked once an image, so that B images with M maps cost 2 B + 2 B M (S - 1)
    forward passes: 2 S for one photo and one map. All go through the model in full batches across images, maps and
    both curves, and only one batch of photos in parts exists at a time. A batch that does not fit the memory of the
    accelerator (`torch.OutOfMemoryError`) is halved, down to one.

    Source: Petsiuk, Das and Saenko, "RISE: Randomized Input Sampling for Explanation of Black-box Models", BMVC 2018.
    There single pixels go, deletion onto black and insertion onto a blurred photo.

    Args:
        predict: From images (n, 3, H, W) to probabilities (n, classes). Called without gradients.
        images: (B, 3, H, W).
        orders: (B, M, n), the cells from most to least relevant, as `removal_order` gives them.
        targets: (B,), the class asked about.
        cells: (rows, columns) of the image; n = rows * columns. A pixel belongs to the cell that holds its centre.
        fill: (B, 3, H, W), what stands where cells are removed, as `baselines.fill` gives it.
        steps: S, at most n.
        batch_size: Images in one forward pass, at most.

    Raises:
        UsageError: shapes do not fit, `orders` are no orders, or `predict` gives no probability for each class.
    """
    asked = _Asked(predict, images, orders, targets, cells, fill)
    count = cells[0] * cells[1]
    if not 1 <= steps <= count:
        raise UsageError(f"expected 1 to {count} steps, as many as cells, got {steps}: ask for fewer, or more cells")
    removed = torch.tensor([(2 * step * count + steps) // (2 * steps) for step in range(steps + 1)])
    ends = [(image, 0, 0, last) for image in range(asked.images) for last in (0, count)]
    inner = removed[1:-1].tolist()
    between = [
        (image, one, *spans)
        for image in range(asked.images)
        for one in range(asked.maps)
        for spans in [(0, k) for k in inner] + [(k, count) for k in inner]
    ]
    probability, kept = asked.answers(ends + between, batch_size)
    deletion, insertion = _assembled(probability, asked, steps)
    deletion_kept, insertion_kept = _assembled(kept, asked, steps)
    fractions = (removed.double() / count).to(probability)
    return Curves(fractions, deletion, insertion, deletion_kept, insertion_kept)


def area(curves: Tensor, fractions: Tensor) -> Tensor:
    """Returns the area under curves by the trapezoidal rule, (...,), over the fraction, not the number of the step.

    Args:
        curves: (..., S + 1).
        fractions: (S + 1,), rising from 0 to 1.

    Example:
        >>> area(torch.tensor([1.0, 0.5, 0.0]), torch.tensor([0.0, 0.2, 1.0]))
        tensor(0.3500)
    """
    if fractions.dim() != 1 or len(fractions) < 2 or curves.shape[-1:] != fractions.shape:
        raise UsageError(
            f"expected curves (..., S + 1) and as many fractions (S + 1,), got {tuple(curves.shape)} and "
            f"{tuple(fractions.shape)}: take both from the same Curves"
        )
    return torch.trapezoid(curves, fractions.to(curves), dim=-1)


def perturbation_areas(curves: Curves) -> tuple[Tensor, Tensor]:
    """Returns how often the target stays the predicted class while parts go: (positive, negative), each (B, M).

    Positive: the most relevant parts go first, a good map has a low value. Negative: the least relevant go first, a
    good map has a high one. Each is the mean over the steps between the ends, as in Chefer et al., CVPR 2021, of one
    image; the mean over images is the area under the curve of the accuracy. Removing the least relevant share f is
    showing the most relevant 1 - f, so that nothing is asked again.

    These are the steps and the baseline of `curves`. `perturbation` is the protocol of 2021 itself. Where a model
    answered NaN, nothing was kept or lost, and the value is NaN.

    Args:
        curves: From `removal_curves`, of at least 2 steps.
    """
    if len(curves.fractions) < 3:
        raise UsageError("expected curves of at least 2 steps, got 1: there is nothing between whole and empty photos")
    return _share_kept(curves.deletion_kept, curves.deletion), _share_kept(curves.insertion_kept, curves.insertion)


def perturbation(
    predict: Predict,
    images: Tensor,
    maps: Tensor,
    targets: Tensor,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    steps: int = 10,
    seed: int = 0,
    batch_size: int = 64,
) -> tuple[Tensor, Tensor]:
    """Returns positive and negative perturbation by the protocol of 2021: (positive, negative), each (B,), 0 to 1.

    Maps are interpolated to pixels; the 10, 20, ... 90 % most (least) relevant pixels are set to 0 *before*
    normalisation, which is black; a step counts 1 where the target is still the predicted class; an image's value is
    the mean over the nine steps. The published areas are means over images, in percent.

    Source: Chefer, Gur and Wolf, "Transformer Interpretability Beyond Attention Visualization", CVPR 2021, and their
    code (hila-chefer/Transformer-Explainability, `baselines/ViT/pertubation_eval_from_hdf5.py`), with these traps:

    - there black is -mean/std with mean and std of 0.5, the ones of their ViT: give those of your model;
    - there its `--neg` is true whatever is passed to it (`type=bool`), and the step count takes whole pixels downwards,
      where the nearest count is taken here: at most one pixel of difference;
    - there the accuracy is that of the label, also for the map of the predicted class, and photos that the model has
      wrong from the start count as 0 at every step: give labels as `targets` for their numbers, or predictions for "is
      the prediction kept?";
    - there topk breaks ties as it likes; here at random, from `seed`.

    Args:
        predict: From images (n, 3, H, W) to probabilities (n, classes).
        images: (B, 3, H, W), normalised.
        maps: (B, h, w), one for each image.
        targets: (B,), the class that has to stay.
        mean: Per colour, of the normalisation.
        std: The same.
        steps: 10 for the protocol.
        seed: Of ties.
        batch_size: Images in one forward pass, at most.
    """
    if len(maps) != len(images):
        raise UsageError(
            f"expected one map for each of {len(images)} images, got maps {tuple(maps.shape)}: judge methods one by one"
        )
    pixels = (images.shape[-2], images.shape[-1])
    curves = removal_curves(
        predict,
        images,
        removal_order(cell_scores(maps.to(images.device), pixels), seed=seed)[:, None],
        targets,
        cells=pixels,
        fill=baselines.fill(images, "black", mean=mean, std=std),
        steps=steps,
        batch_size=batch_size,
    )
    positive, negative = perturbation_areas(curves)
    return positive[:, 0], negative[:, 0]


def group_effects(
    predict: Predict,
    images: Tensor,
    orders: Tensor,
    targets: Tensor,
    *,
    cells: tuple[int, int],
    fill: Tensor,
    groups: int = 10,
    batch_size: int = 64,
    whole: Tensor | None = None,
) -> Tensor:
    """Returns how far the target's probability falls when one group of cells alone is removed, (B, M, K).

    Groups are runs of the order, most relevant first, as equal as they can be: where K does not divide the number of
    cells, the first ones hold one cell more. B images with M maps cost B M K forward passes, and B more without
    `whole`.

    Args:
        predict: From images (n, 3, H, W) to probabilities (n, classes). Called without gradients.
        images: (B, 3, H, W).
        orders: (B, M, n), the cells from most to least relevant.
        targets: (B,), the class asked about.
        cells: (rows, columns) of the image.
        fill: (B, 3, H, W), what stands where cells are removed; the photo's own mean colour in SaCo.
        groups: K, from 2 to n.
        batch_size: Images in one forward pass, at most.
        whole: (B,), the target's probability on the whole images, where it is known.

    Raises:
        UsageError: as `removal_curves`.
    """
    asked = _Asked(predict, images, orders, targets, cells, fill)
    _check_groups(groups, cells[0] * cells[1])
    if whole is not None and whole.shape != (asked.images,):
        raise UsageError(f"expected one probability for each of {asked.images} images, got {tuple(whole.shape)}")
    parts = torch.arange(cells[0] * cells[1]).tensor_split(groups)
    bounds = [(int(part[0]), int(part[-1]) + 1) for part in parts]
    removed = [(image, one, *span) for image in range(asked.images) for one in range(asked.maps) for span in bounds]
    unknown_ends = [(image, 0, 0, 0) for image in range(asked.images)] if whole is None else []
    probability, _ = asked.answers(unknown_ends + removed, batch_size)
    before = probability[: asked.images] if whole is None else whole.to(probability)
    return before[:, None, None] - probability[len(unknown_ends) :].view(asked.images, asked.maps, groups)


def saco_groups(scores: Tensor, orders: Tensor, *, groups: int = 10) -> Tensor:
    """Returns the relevance of the groups that `group_effects` removes, (..., K): the mean over each one's cells.

    Wu et al. sum over the pixels of a group. Their groups are equally large, and then the mean is the same but for a
    factor, which `saco` does not see. Where they are not, sums would order groups by their size.

    Args:
        scores: (..., n), as `cell_scores` gives them.
        orders: (..., n), as `removal_order` gives them.
        groups: K.
    """
    _check_groups(groups, scores.shape[-1])
    ranked = scores.gather(-1, orders)
    return torch.stack([part.mean(-1) for part in ranked.tensor_split(groups, -1)], -1)


def saco(salience: Tensor, effects: Tensor) -> Tensor:
    """Returns the salience-guided faithfulness coefficient (SaCo) of each map, (...,), in [-1, 1].

    It is 1 where every group of more relevance moves the prediction more, -1 where every one moves it less, and about
    0 for noise:

    Σ_{i<j} |s_i - s_j| sign((s_i - s_j) (e_i - e_j)) / Σ_{i<j} |s_i - s_j|, with s the salience of a group and e its
    effect: pairs count by how far apart the map says that they are.

    Source: Wu, Kang, Tang, Hong and Yan, "On the Faithfulness of Vision Transformer Explanations", CVPR 2024, algorithm
    1, arXiv 2404.01415. Where we deviate:

    - two groups of the very same effect count 0 for the pair; there they count as agreeing, so that every map gets 1
      for a model that answers the same whatever is removed, as a saturated softmax does;
    - a map whose groups are all alike says nothing and gets NaN; there it is an error.

    Only differences of salience enter, so that negative values need no care: evidence against the class is less
    relevant than none, and its removal has to raise the probability.

    Args:
        salience: (..., K), of each group.
        effects: (..., K), the fall of the probability when it is removed.

    Raises:
        UsageError: shapes differ, or there are fewer than 2 groups.

    Example:
        >>> saco(torch.tensor([3.0, 2.0, 0.0]), torch.tensor([0.5, 0.1, 0.2]))
        tensor(0.3333)
    """
    if salience.shape != effects.shape or salience.dim() < 1 or salience.shape[-1] < 2:
        raise UsageError(
            f"expected salience and effects (..., K) of at least 2 groups, got {tuple(salience.shape)} and "
            f"{tuple(effects.shape)}: give one effect for each group"
        )
    dtype = torch.promote_types(salience.dtype, torch.promote_types(effects.dtype, torch.float32))
    salience, effects = salience.to(dtype), effects.to(salience.device, dtype)
    apart = salience[..., :, None] - salience[..., None, :]
    agrees = (effects[..., :, None] - effects[..., None, :]).sign()
    # Every pair stands twice in both sums, with the same sign.
    return (apart * agrees).sum((-2, -1)) / apart.abs().sum((-2, -1))


# ------------------------------------------------------------------------------------------------ photos in parts


class _Asked:
    """Photos, what stands where parts are removed, and the model that is asked about them.

    A question is (image, map, first, last): the image without the cells of ranks first to last - 1 in the map's order.
    """

    def __init__(
        self, predict: Predict, images: Tensor, orders: Tensor, targets: Tensor, cells: tuple[int, int], fill: Tensor
    ) -> None:
        _check_cells(cells)
        _check_photos(images, orders, targets, cells, fill)
        self.images, self.maps = orders.shape[:2]
        self._predict, self._photos, self._fill, self._cells = predict, images, fill, cells
        self._targets = targets.to(images.device).long()
        self._last_target = int(self._targets.max())
        self._ranks = _ranks(orders.to(images.device))
        self._rows, self._columns = (
            _cell_of_pixels(length, count).to(images.device)
            for length, count in zip(images.shape[-2:], cells, strict=True)
        )

    def answers(self, questions: list[tuple[int, int, int, int]], batch_size: int) -> tuple[Tensor, Tensor]:
        """Returns for each question the target's probability, and whether the target is the predicted class."""
        if not isinstance(batch_size, int) or batch_size < 1:
            raise UsageError(f"expected a batch size of at least 1, got {batch_size!r}")
        asked = torch.tensor(questions, device=self._photos.device).view(-1, 4)
        probability, kept, start = [], [], 0
        while start < len(asked):
            some = asked[start : start + batch_size]
            try:
                found = self._ask(some)
            except torch.OutOfMemoryError:
                if len(some) == 1:
                    raise
                batch_size = len(some) // 2
                continue
            probability.append(found[0])
            kept.append(found[1])
            start += len(some)
        return torch.cat(probability), torch.cat(kept)

    @torch.no_grad()
    def _ask(self, questions: Tensor) -> tuple[Tensor, Tensor]:
        answer = self._predict(self._in_parts(questions))
        if answer.dim() != 2 or len(answer) != len(questions) or answer.shape[1] <= self._last_target:
            raise UsageError(
                f"expected probabilities of {len(questions)} images for more than {self._last_target} classes from "
                f"predict, got {tuple(answer.shape)}: give a function of images (n, 3, H, W), and targets below classes"
            )
        target = self._targets[questions[:, 0]]
        probability = answer.gather(-1, target[:, None])[:, 0]
        return probability.to(torch.promote_types(answer.dtype, torch.float32)), answer.argmax(-1) == target

    def _in_parts(self, questions: Tensor) -> Tensor:
        """Returns the photos of some questions, (n, 3, H, W)."""
        image, one, first, last = questions.T
        ranks = self._ranks[image, one]
        removed = (ranks >= first[:, None]) & (ranks < last[:, None])
        pixels = removed.view(-1, *self._cells)[:, self._rows][:, :, self._columns]
        return torch.where(pixels[:, None], self._fill[image], self._photos[image])


def _assembled(values: Tensor, asked: _Asked, steps: int) -> tuple[Tensor, Tensor]:
    """Returns deletion and insertion, (B, M, S + 1), from the answers about ends and all that is between."""
    ends = values[: 2 * asked.images].view(asked.images, 1, 2).expand(-1, asked.maps, -1)
    whole, nothing = ends.split(1, -1)
    going, coming = values[2 * asked.images :].view(asked.images, asked.maps, 2, steps - 1).unbind(2)
    return torch.cat([whole, going, nothing], -1), torch.cat([nothing, coming, whole], -1)


def _share_kept(kept: Tensor, probability: Tensor) -> Tensor:
    """Returns the mean over the steps between the ends, NaN where the model's answer was none."""
    return kept.to(probability).where(probability.isfinite(), torch.nan)[..., 1:-1].mean(-1)


def _resampling(length: int, count: int, like: Tensor) -> Tensor:
    """Returns the weights, (count, length), that make `count` cells of `length` values: means, or interpolation."""
    if length < count:
        values = torch.eye(length, dtype=like.dtype, device=like.device)
        return F.interpolate(values[None], size=count, mode="linear", align_corners=False)[0].T
    # In units of 1 / (count * length) of the axis, so that all borders are whole numbers.
    cell = torch.arange(count, device=like.device)[:, None] * length
    value = torch.arange(length, device=like.device) * count
    overlap = torch.minimum(cell + length, value + count) - torch.maximum(cell, value)
    return overlap.clamp(min=0).to(like) / length


def _cell_of_pixels(length: int, count: int) -> Tensor:
    """Returns which of `count` cells holds the centre of each of `length` pixels, (length,)."""
    return (2 * torch.arange(length) + 1) * count // (2 * length)


def _ranks(orders: Tensor) -> Tensor:
    """Returns the rank of each cell, (B, M, n), 0 for the most relevant.

    Raises:
        UsageError: an order does not hold each cell once.
    """
    count = orders.shape[-1]
    places = torch.arange(count, device=orders.device).expand_as(orders)
    if orders.is_floating_point() or not torch.equal(orders.sort(-1).values, places):
        raise UsageError(f"expected orders that hold each of 0 to {count - 1} once, got others: use removal_order")
    return torch.empty(orders.shape, dtype=torch.int64, device=orders.device).scatter_(-1, orders.long(), places)


# ------------------------------------------------------------------------------------------------ bad input


def _check_cells(cells: tuple[int, int]) -> None:
    if len(cells) != 2 or not all(isinstance(count, int) and count >= 1 for count in cells):
        raise UsageError(f"expected cells as (rows, columns), each at least 1, got {cells!r}: 14 x 14 is usual")


def _check_groups(groups: int, count: int) -> None:
    if not 2 <= groups <= count:
        raise UsageError(f"expected 2 to {count} groups, as many as cells, got {groups}: ask for fewer, or more cells")


def _check_photos(images: Tensor, orders: Tensor, targets: Tensor, cells: tuple[int, int], fill: Tensor) -> None:
    count = cells[0] * cells[1]
    if images.dim() != 4 or not len(images) or fill.shape != images.shape:
        raise UsageError(
            f"expected images (B, 3, H, W) and a fill of that shape, got {tuple(images.shape)} and "
            f"{tuple(fill.shape)}: take the fill from baselines.fill(images, ...)"
        )
    if cells[0] > images.shape[2] or cells[1] > images.shape[3]:
        raise UsageError(
            f"expected cells of at least a pixel, got {cells[0]} x {cells[1]} in {images.shape[2]} x "
            f"{images.shape[3]} pixels: ask for fewer"
        )
    if orders.dim() != 3 or len(orders) != len(images) or not orders.shape[1] or orders.shape[2] != count:
        raise UsageError(
            f"expected orders (B, M, {count}) for {len(images)} images of {cells[0]} x {cells[1]} cells, got "
            f"{tuple(orders.shape)}: for one map of each image give orders[:, None]"
        )
    if targets.shape != (len(images),) or targets.is_floating_point() or (targets < 0).any():
        raise UsageError(
            f"expected targets ({len(images)},), a class index of at least 0 for each image, got {targets.dtype} "
            f"{tuple(targets.shape)}: {targets.tolist()}"
        )
