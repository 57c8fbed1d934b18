"""A merged reward model as one graph: token ids and attention mask in, rewards out, any batch and any length.

The reward is read at the last token that the mask keeps, and positions are counted from the first one, so that
padding on either side changes nothing and no id need be known as padding.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from lora_rm.console import say
from lora_rm.data.batches import pad_rows
from lora_rm.errors import MergeError, first_line
from lora_rm.export.proof import NUM_PADDED
from lora_rm.model.quantization import StoredLinear
from lora_rm.model.reward_model import RewardModel
from lora_rm.verify import measure_change

Batch: TypeAlias = dict[str, list[list[int]]]
"""`input_ids` and `attention_mask`, as a runtime without torch takes them."""


class RewardGraph(nn.Module):
    """Backbone and float32 head; inputs (B, T) int64, rewards (B,) float32."""

    def __init__(self, backbone: Any, head: Tensor) -> None:
        """Args: a transformers decoder, and the head's weight (1, H)."""
        super().__init__()
        self.backbone = backbone
        self.head = nn.Parameter(head, requires_grad=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Rewards (B,) of a batch (B, T), padded on any side."""
        positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)
        hidden = self.backbone(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=positions, use_cache=False
        ).last_hidden_state
        number = torch.arange(input_ids.shape[1], device=input_ids.device)
        last = (attention_mask * number).argmax(-1)
        pooled = hidden[torch.arange(hidden.shape[0], device=hidden.device), last]
        return (pooled.float() * self.head).sum(-1)  # no matrix product: those may be quantised later


def load_graph(merged: Path) -> RewardGraph:
    """Opens a merged model in float32 on the CPU."""
    say("Opening the merged model in float32 ...")
    model = RewardModel.load_merged(merged, device="cpu", compute_dtype="float32").eval()
    for module in model.modules():
        if isinstance(module, StoredLinear):  # a graph holds float32 weights, and no casts
            module.__class__ = nn.Linear  # type: ignore[assignment]
            module.float()
    return RewardGraph(model.backbone, model.head.detach().clone()).eval()


def trace(graph: RewardGraph) -> Any:
    """The graph as a `torch.export.ExportedProgram` with free batch and length.

    Raises:
        MergeError: If the model's code cannot be traced, say because its position encoding looks at the length.
    """
    say("Tracing the model ...")
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length")
    shape = {0: batch, 1: length}
    ids = torch.ones(2, 7, dtype=torch.long)  # neither 1, which would be taken for fixed
    try:
        with torch.no_grad():
            program = torch.export.export(graph, (ids, torch.ones_like(ids)), dynamic_shapes=(shape, shape))
    except Exception as error:  # torch raises many kinds, its own and Python's
        reason = first_line(error)
        raise MergeError(
            f"{type(graph.backbone).__name__} cannot be written as one graph ({reason}). "
            "Use --to huggingface, vllm or gguf."
        ) from None
    # lines of source code with their paths: they would tell the folders of this machine to whoever gets the file
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            node.meta.pop("stack_trace", None)
    return program


def batches(rows: Sequence[Sequence[int]]) -> dict[str, list[Batch]]:
    """The same answers in four kinds of shapes: alone, and the first of them padded right, left, and on both sides.

    Padded places hold each row's first token: any id will do, and one with a meaning shows a forgotten mask.
    """
    some = rows[:NUM_PADDED]

    def groups(size: int) -> list[Sequence[Sequence[int]]]:
        return [some[start : start + size] for start in range(0, len(some), size)]

    def padded(group: Sequence[Sequence[int]], left: float = 0.0, more: int = 0) -> Batch:
        ids, mask = pad_rows(group, None, left=left, more=more)
        return {"input_ids": ids, "attention_mask": mask}

    return {
        "one by one": [padded([row]) for row in rows],
        "padded right, 8 together": [padded(group) for group in groups(8)],
        "padded left, 8 together": [padded(group, 1.0) for group in groups(8)],
        "padded on both sides, 3 together": [padded(group, 0.5, more=5) for group in groups(3)],
    }


@torch.inference_mode()
def noise_floor(graph: RewardGraph, parity: Mapping[str, Any]) -> float:
    """Largest difference of rewards in float32 between alone and padded, as a share of the spread."""
    say("Measuring the noise of float32 ...")
    kinds = batches([answer["ids"] for answer in parity["answers"][:NUM_PADDED]])
    alone, *others = (
        [
            reward
            for batch in kind
            for reward in graph(*(torch.tensor(batch[name]) for name in batch)).tolist()
        ]
        for kind in kinds.values()
    )
    spread = parity["spread"] or 1.0
    return max(measure_change(alone, other, spread=spread).largest for other in others)
