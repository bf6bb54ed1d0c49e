"""A traced network as ONNX, and how it runs in onnxruntime."""

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vision_attn.errors import UsageError

LOWEST_OPSET = 18
"""What torch's exporter writes is at least of this one."""

LARGEST = 2**31 - 2**20
"""Bytes: a file of ONNX holds no more than 2 GB with its graph."""


def check(opset: int | None) -> None:
    """Refuses an opset that cannot be had, and a machine that lacks the libraries.

    Raises:
        UsageError: either of it.
    """
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(
            f"expected {' and '.join(missing)} for ONNX, got none installed: pip install 'vision-attn[onnx]'"
        )
    if opset is None:
        return
    import onnx

    highest = onnx.defs.onnx_opset_version()
    if not LOWEST_OPSET <= opset <= highest:
        raise UsageError(f"expected an opset from {LOWEST_OPSET} to {highest}, got {opset}: leave it out for the usual")


def to_bytes(traced: Any, outputs: Sequence[str], facts: Mapping[str, str], opset: int | None) -> tuple[bytes, int]:
    """Returns a traced network as a file of ONNX that says `facts` of itself, and its opset.

    Args:
        traced: An ExportedProgram of one input "images" and a dictionary of outputs.
        outputs: Their names, in order.
        facts: For `metadata_props`.
        opset: The exporter's own where None.

    Raises:
        UsageError: it is too large for one file, or the exporter cannot write it.
    """
    size = sum(tensor.nbytes for tensor in traced.state_dict.values())
    if size > LARGEST:
        raise UsageError(
            f"expected at most 2 GB of weights for one file of ONNX, got {size / 1e9:.1f} GB: use float16, or the "
            "format torch"
        )
    try:
        made = torch.onnx.export(
            traced,
            dynamo=True,
            verbose=False,
            input_names=["images"],
            output_names=list(outputs),
            opset_version=opset,
        )
    except Exception as error:  # each step of the exporter raises its own
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UsageError(
            f"expected a network that torch's ONNX exporter can write, got: {reason}: use the format torch"
        ) from error
    assert made is not None
    proto = made.model_proto
    found = next(entry.version for entry in proto.opset_import if entry.domain == "")
    if opset is not None and found != opset:
        raise UsageError(f"expected opset {opset}, got {found} from the exporter: leave it out, or ask for {found}")
    _name_batch(proto)
    for key, value in facts.items():
        entry = proto.metadata_props.add()
        entry.key, entry.value = key, value
    return proto.SerializeToString(), found


def _name_batch(proto: Any) -> None:
    """Calls the dimension that may be of any size "batch", wherever it stands; the tracer's name for it is a number."""
    old = proto.graph.input[0].type.tensor_type.shape.dim[0].dim_param
    for value in (*proto.graph.input, *proto.graph.output, *proto.graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param == old:
                dim.dim_param = "batch"


def runner(content: bytes) -> Callable[[Tensor], dict[str, Tensor]]:
    """Returns a function from images to outputs by name, which runs a file of ONNX in onnxruntime.

    Raises:
        UsageError: onnxruntime does not take it.
    """
    import onnxruntime

    quiet = onnxruntime.SessionOptions()
    quiet.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(content, quiet, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime has a class of its own for each cause
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UsageError(
            f"expected a graph that onnxruntime loads, got an error ({reason}): nothing was written; try another opset"
        ) from error
    names = [output.name for output in session.get_outputs()]

    def run(images: Tensor) -> dict[str, Tensor]:
        found = session.run(None, {"images": images.numpy()})
        return {name: torch.from_numpy(part) for name, part in zip(names, found, strict=True)}

    return run
