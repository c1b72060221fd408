"""A checkpoint's modules as ONNX graphs: names, dynamic axes, and the `nuwa` operators kept whole.

Each graph is a wrapper module with a tensors-only signature, exported by torch.onnx. Attention is
translated to one opaque node, whose function body (operators.py) is attached afterwards: the
exporter would inline it. Says nothing about whether the numbers are right; verify.py does.

Legend: T positions of a call, S slots, C condition slots, n neighbour columns, m cross columns,
W candidates to sort, B batch, M text length, d decoder width.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx
import torch
from onnxscript import INT32, values
from onnxscript.onnx_types import TensorType
from torch import Tensor, nn
from torch.export import Dim

from nuwa.spec.manifest import GRAPHS, decoder_step_names, text_encoder_names
from nuwa.spec.plan import cache_entries
from nuwa.training import nearby  # noqa: F401  registers torch.ops.nuwa
from nuwa.training.checkpoint import Checkpoint
from nuwa.training.decode import DecoderStep, TextConditions
from nuwa.training.vqgan import VQGAN, to_bytes, to_signed

from . import operators
from .fold import FoldedNUWA, fold

OPSET = 20
DTYPES = {"fp32": torch.float32, "fp16": torch.float16}
