"""Which layers a pretrained model can do without: the loss when all tokens pass by one of them.

For each layer alone, the model's own routing is set so that nobody enters it (but the first tokens of a text, where
they are to enter always) and everybody enters the others. Layers of which the loss hardly rises are the ones to route.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoTokenizer
from transformers.utils import logging

from ..configuration.configuration_mod import MoDConfig
from ..modeling.modeling_mod import MoDForCausalLM
from ..training.text_blocks import load_documents, token_blocks
from .errors import ConversionError
from .source_checkpoint import SourceCheckpoint
from .tensor_source import TensorSource


MEASURED_TOKENS = 1024
_BLOCK = 256
_CHARACTERS_PER_TOKEN = 12  # more than any tokenizer packs into a token of prose
_NOBODY, _EVERYBODY = 1.0, 0.0  # thresholds on sigmoid(logit)


@dataclass(frozen=True)
class LayerRedundancy:
    """
    Attributes:
        unit: what was passed by: `block`, `attention` or `mlp`.
        text: name of the text.
        tokens: its measured tokens.
        source_loss: loss of the source on them, in nats per token.
        loss_increases: for each layer by how much the loss rises when it is passed by, in nats per token.
    """

    unit: str
    text: str
    tokens: int
    source_loss: float
    loss_increases: tuple[float, ...]

    def least_costly(self, count: int) -> list[int]:
        """The `count` layers whose absence costs least, ascending; never the first."""
        ranked = sorted(range(1, len(self.loss_increases)), key=lambda layer: self.loss_increases[layer])
        return sorted(ranked[:count])


def measure_redundancy(
    source: SourceCheckpoint,
    weights: TensorSource,
    *,
    unit: str,
    always_first: int,
    text: str | None = None,
    quiet: bool = False,
) -> LayerRedundancy:
    """Measures every layer; the source is in memory meanwhile, on a GPU if there is one.

    Args:
        source (`SourceCheckpoint`): a vanilla checkpoint with its tokenizer.
        weights (`TensorSource`): its weights under the names of the model.
        unit (`str`): `block`, `attention` or `mlp`.
        always_first (`int`): the first tokens of every block of text, which never pass by.
        text (`str`, *optional*): a UTF-8 text or `.jsonl` file, or a folder of texts; the `pydoc` topics by default.
        quiet (`bool`): no progress on stderr.

    Raises:
        ConversionError: if there is no tokenizer, or too little text.
    """
    ids = _token_ids(source, text)
    model = _probe(source, weights, unit, always_first)
    depth = model.config.num_hidden_layers
    losses = []
    for passed_by in tqdm([None, *range(depth)], desc="measuring layers", unit="layer", disable=quiet):
        model.config.router_thresholds = [_NOBODY if i == passed_by else _EVERYBODY for i in range(depth)]
        losses.append(_loss(model, ids))
    return LayerRedundancy(
        unit=unit,
        text="the pydoc topics" if text is None else Path(text).name,
        tokens=ids.numel(),
        source_loss=round(losses[0], 6),
        loss_increases=tuple(round(loss - losses[0], 6) for loss in losses[1:]),
    )


def _probe(source: SourceCheckpoint, weights: TensorSource, unit: str, always_first: int) -> Any:
    """The source as a MoD of which every layer can be passed by."""
    config = MoDConfig.from_backbone(
        source.config,
        routed_layers=list(range(source.config.num_hidden_layers)),
        capacity=0.5,  # any below 1: at 1 there would be no routing
        gate="straight_through",
        routing_unit=unit,
        always_route_first=always_first,
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.float32 if device == "cpu" else next(iter(weights.infos.values())).dtype
    state = {name: weights.read(name) for name in weights.infos}
    state["model.routers.weight"] = torch.zeros(config.num_routers, 1, config.hidden_size)
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # loading is the short part
    try:
        model: Any = MoDForCausalLM.from_pretrained(None, config=config, state_dict=state, dtype=dtype)
    finally:
        if shown:
            logging.enable_progress_bar()
    return model.to(device).eval()


def _token_ids(source: SourceCheckpoint, text: str | None) -> torch.Tensor:
    """Blocks of tokens from all parts of the text, of shape `(blocks, length)`."""
    tokenizer = source.tokenizer
    if tokenizer is None and not source.companions:
        raise ConversionError(
            "`routed_layers: auto` measures on text, but the source has no tokenizer; add its tokenizer files or name "
            "the layers."
        )
    if text is not None and not Path(text).exists():
        raise ConversionError(f"`calibration_text` is {text!r}, but there is no such file; give a UTF-8 text file.")
    length = min(_BLOCK, getattr(source.config, "max_position_embeddings", None) or _BLOCK)
    try:
        tokenizer = tokenizer or AutoTokenizer.from_pretrained(source.folder)
        documents = load_documents(text)
        share = _CHARACTERS_PER_TOKEN * MEASURED_TOKENS // len(documents) + 1
        blocks = token_blocks([document[: max(share, 4 * length)] for document in documents], tokenizer, length).blocks
    except ValueError as error:
        raise ConversionError(f"`calibration_text` cannot be used: {error}") from error
    wanted = min(len(blocks), max(1, MEASURED_TOKENS // length))
    chosen = torch.linspace(0, len(blocks) - 1, wanted).long()
    return blocks[chosen]


@torch.no_grad()
def _loss(model: Any, ids: torch.Tensor) -> float:
    total = 0.0
    for row in ids.split(4):
        row = row.to(model.device)
        total += float(model(input_ids=row, labels=row, use_cache=False).loss) * len(row)
    return total / len(ids)
