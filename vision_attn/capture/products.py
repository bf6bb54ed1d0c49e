"""Products of attention with values, however they are written, as (*lead, Q, K) times (*lead, K, d)."""

import math
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

MATMULS: frozenset[Callable[..., Any]] = frozenset(
    (torch.matmul, torch.bmm, Tensor.matmul, Tensor.bmm, Tensor.__matmul__, Tensor.__rmatmul__)
)


@dataclass(frozen=True)
class Product:
    """A product of two tensors whose left or right factor is attention.

    Args:
        weights: (*lead, Q, K), what multiplies the values.
        values: (*lead, K, d).
        contracted: Which dimensions of the attention, as it came, are the keys.
        rearranged: The same as was done to the attention, for another tensor of its shape.
        restored: (*lead, Q, d) to the shape that the product has in the model.
    """

    weights: Tensor
    values: Tensor
    contracted: tuple[int, ...]
    rearranged: Callable[[Tensor], Tensor]
    restored: Callable[[Tensor], Tensor]


def factors(function: Callable[..., Any], args: Sequence[Any]) -> tuple[list[Tensor], list[str], str] | None:
    """Returns the two factors of a product, a letter for each of their dimensions, and the letters of the result.

    None where it is no product of two tensors of two dimensions at least.
    """
    if function is torch.einsum:
        return _einsum_factors(args)
    tensors = list(args[:2])
    if function is Tensor.__rmatmul__:
        tensors.reverse()
    if len(tensors) != 2 or not all(isinstance(tensor, Tensor) and tensor.dim() > 1 for tensor in tensors):
        return None
    lead = string.ascii_uppercase[: max(tensor.dim() for tensor in tensors) - 2]
    left, right = (lead[len(lead) - tensor.dim() + 2 :] for tensor in tensors)
    return tensors, [f"{left}ik", f"{right}kj"], f"{lead}ij"


def _einsum_factors(args: Sequence[Any]) -> tuple[list[Tensor], list[str], str] | None:
    equation, tensors = args[0], list(args[1:])
    if len(tensors) == 1 and isinstance(tensors[0], (tuple, list)):
        tensors = list(tensors[0])
    if not isinstance(equation, str) or len(tensors) != 2 or any(tensor.dim() < 2 for tensor in tensors):
        return None
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    terms = inputs.split(",")
    if "..." in inputs:
        hidden = [tensor.dim() - len(term.replace("...", "")) for tensor, term in zip(tensors, terms, strict=True)]
        free = [letter for letter in string.ascii_letters if letter not in equation][: max(hidden)]
        lead = "".join(free)
        terms = [term.replace("...", lead[len(lead) - n :]) for term, n in zip(terms, hidden, strict=True)]
    else:
        lead = ""
    if not arrow:
        joined = "".join(terms)
        output = lead + "".join(sorted(letter for letter in set(joined) - set(lead) if joined.count(letter) == 1))
    output = output.replace("...", lead)
    if any(len(set(term)) != len(term) for term in terms):
        return None
    return tensors, terms, output


def find_product(
    attention: Tensor, values: Tensor, letters: tuple[str, str], output: str, num_heads: int | None
) -> Product | None:
    """Returns the product of attention and values in its plain form, or None where it is none.

    It is one where a dimension is summed over, another of the attention alone remains (the queries), and another of
    the values alone (their width). Dimensions of both that remain lead, and so does a dimension of heads or images
    that only one of them has.
    """
    own, theirs = letters
    sizes: dict[str, int] = {}
    for letter, size in (*zip(own, attention.shape, strict=True), *zip(theirs, values.shape, strict=True)):
        sizes[letter] = max(sizes.get(letter, 1), size)
    keys = [letter for letter in own if letter in theirs and letter not in output]
    lead = [letter for letter in output if letter in own and letter in theirs]
    queries = [letter for letter in own if letter in output and letter not in theirs]
    width = [letter for letter in theirs if letter in output and letter not in own]
    if not keys or (set(own) | set(theirs)) - set(output) - set(keys):
        return None
    if len(queries) > 1 and num_heads:
        # One set of values for all heads: the heads stand beside the queries.
        lead += [letter for letter in queries if sizes[letter] == num_heads][:1]
    if len(width) > 1:
        # The same attention for all images: they stand before the keys.
        before = [letter for letter in width if theirs.index(letter) < theirs.index(keys[0])]
        lead = (before[:-1] if len(before) == len(width) else before) + lead
    queries = [letter for letter in queries if letter not in lead]
    width = [letter for letter in width if letter not in lead]
    if not queries or not width:
        return None
    count = {name: [sizes[letter] for letter in part] for name, part in (("lead", lead), ("q", queries), ("d", width))}

    def rearranged(part: Tensor, held: str = own, last: tuple[list[str], list[str]] = (queries, keys)) -> Tensor:
        wanted = [*lead, *last[0], *last[1]]
        part = part.permute(*(held.index(letter) for letter in wanted if letter in held))
        for place, letter in enumerate(wanted):
            part = part if letter in held else part.unsqueeze(place)
        part = part.expand([sizes[letter] for letter in wanted])
        return part.reshape(*count["lead"], *(math.prod(sizes[letter] for letter in group) for group in last))

    def restored(part: Tensor) -> Tensor:
        order = [*lead, *queries, *width]
        part = part.reshape(*count["lead"], *count["q"], *count["d"])
        return part.permute(*(order.index(letter) for letter in output)).contiguous()

    return Product(
        weights=rearranged(attention),
        values=rearranged(values, theirs, (keys, width)),
        contracted=tuple(own.index(letter) for letter in keys),
        rearranged=rearranged,
        restored=restored,
    )
