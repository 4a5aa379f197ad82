"""Finding and checking what is converted: a local folder, a Hub id, or a GGUF file."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.configuration_utils import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from .checkpoint_files import TERMS, TOKENIZER_FILES
from .errors import ConversionError
from .expert_layout import stack_experts
from .recipe_fields import CONFIGS
from .tensor_source import TensorSource, open_weights, read_json


_OTHER_PATTERNS = ["*.json", "*.jinja", "merges.txt", "vocab.txt", "*.model", "README.md", *TERMS]
_COMMIT = re.compile(r"[0-9a-f]{40}")
# computed from the configuration; old checkpoints carry it
DERIVED = re.compile(r"(^|\.)rotary_emb\.inv_freq$")
# in the place of a model type: config.json says `gpt2`, which it is not
OFFICIAL_JRT = "official JRT-RNN"


@dataclass
class SourceCheckpoint:
    """What a conversion starts from.

    Attributes:
        folder: where the files are.
        name: how to call it: the Hub id, or the name of the folder or file.
        config: the configuration as transformers reads it.
        weights: the tensors.
        base_model: Hub id, if known.
        license: `license`, `license_name` and `license_link` of the source's model card, those that it has.
        revision: of a Hub repository; its commit where the cache tells it, else what was asked for.
        gguf: the GGUF file the weights come from.
        tokenizer: a tokenizer that no file holds (GGUF).
    """

    folder: Path
    name: str
    config: PreTrainedConfig
    weights: TensorSource
    base_model: str | None = None
    license: dict[str, str] = field(default_factory=dict)
    gguf: Path | None = None
    tokenizer: Any = None
    raw_config: dict[str, Any] = field(default_factory=dict)
    revision: str | None = None

    @property
    def companions(self) -> list[Path]:
        """Tokenizer files, which are copied as they are."""
        if self.gguf is not None:
            return []
        return [self.folder / name for name in TOKENIZER_FILES if (self.folder / name).is_file()]


def open_source(source: str | Path, *, revision: str | None = None, allowed: tuple[str, ...]) -> SourceCheckpoint:
    """Opens a checkpoint folder, a GGUF file or a Hub repository.

    Args:
        source (`str` or `Path`): a folder, a file ending in .gguf, or a Hub id such as "org/name".
        revision (`str`, *optional*): branch, tag or commit of a Hub repository.
        allowed (`tuple[str, ...]`): model types that may be opened, `OFFICIAL_JRT` among them.

    Raises:
        ConversionError: if it cannot be found or read, or is of another model type.
    """
    path = Path(source)
    hub_id = None
    if not path.exists():
        path, hub_id = _download(str(source), revision), str(source)
        if path.parent.name == "snapshots" and _COMMIT.fullmatch(path.name):
            revision = path.name
    elif revision is not None:
        raise ConversionError(f"`revision` is {revision!r}, but {path.name} is local; leave the revision out.")
    checkpoint = _open_path(path, hub_id or path.resolve().name, hub_id, allowed)
    checkpoint.revision = revision
    return checkpoint


def _open_path(path: Path, name: str, hub_id: str | None, allowed: tuple[str, ...]) -> SourceCheckpoint:
    if path.is_file():
        return _open_gguf(path, name, hub_id, allowed)
    weights = open_weights(path)
    if weights is None:
        ggufs = sorted(path.glob("*.gguf"))
        if len(ggufs) == 1:
            return _open_gguf(ggufs[0], name, hub_id, allowed)
        found = f"{len(ggufs)} GGUF files; give the path of one of them" if ggufs else "no weights; " + _LAYOUTS
        raise ConversionError(f"The source {name} holds {found}.")
    raw = read_json(path / "config.json")
    config = _read_config(raw, allowed)
    return SourceCheckpoint(path, name, config, weights, hub_id, _license_of(path), raw_config=raw)


_LAYOUTS = "a checkpoint holds model.safetensors, pytorch_model.bin, an index with shards, or one GGUF file"


def _download(source: str, revision: str | None) -> Path:
    """Fetches a Hub snapshot: safetensors if there are any, else PyTorch weights."""
    if source.endswith(".gguf") or source.startswith((".", "/", "~")) or source.count("/") > 1 or "\\" in source:
        raise ConversionError(f"The source {source!r} does not exist; give a folder, a GGUF file or a Hub id.")
    try:
        folder = Path(
            snapshot_download(source, revision=revision, allow_patterns=_OTHER_PATTERNS + ["model*.safetensors"])
        )
        if not any(folder.glob("*.safetensors")):
            snapshot_download(source, revision=revision, allow_patterns=["pytorch_model*.bin"])
        return folder
    except HFValidationError as error:
        raise ConversionError(
            f"The source {source!r} is neither an existing path nor a Hub id; give a folder, a GGUF file or a Hub id."
        ) from error
    except GatedRepoError as error:
        raise ConversionError(
            f"The Hub repository {source!r} is gated; accept its terms on its page and log in with `hf auth login`."
        ) from error
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        what = f"revision {revision!r} of {source!r}" if revision else repr(source)
        raise ConversionError(
            f"There is no folder {source!r} here, and the Hub has no repository {what} that you may read; check the "
            "name, or log in with `hf auth login`."
        ) from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        raise ConversionError(
            f"There is no folder {source!r} here, and the Hub cannot be reached to look for it; give a local folder "
            "or go online."
        ) from error


def is_official_jrt(raw_config: Mapping[str, Any]) -> bool:
    """Whether a config.json is one of the official code of JRT-RNN and Based: GPT-2's, with mixers of its own."""
    mixers = (raw_config.get(key) for key in ("mixer", "alt_mixer", "alt_mixer_2"))
    return raw_config.get("model_type") == "gpt2" and any(isinstance(mixer, dict) for mixer in mixers)


def _read_config(raw: Mapping[str, Any], allowed: tuple[str, ...]) -> PreTrainedConfig:
    model_type = raw.get("model_type")
    if not isinstance(model_type, str):
        raise ConversionError("config.json has no `model_type`; give a checkpoint in the Hugging Face format.")
    _check_type(OFFICIAL_JRT if is_official_jrt(raw) else model_type, allowed)
    if raw.get("quantization_config") is not None:
        method = raw["quantization_config"].get("quant_method", "unknown")
        raise ConversionError(f"The source is quantized ({method}); convert the unquantized checkpoint instead.")
    try:
        return CONFIG_MAPPING[model_type].from_dict(dict(raw))
    except Exception as error:  # the config classes raise a dozen types, some multi-line
        raise ConversionError(f"config.json is no valid {model_type} configuration: {_one_line(error)}.") from error


def _check_type(model_type: str, allowed: tuple[str, ...]) -> None:
    if model_type in allowed:
        return
    if model_type == "jrt":
        raise ConversionError("The source is a JRT-RNN of this package, which cannot be made into another model.")
    if model_type in CONFIGS:
        raise ConversionError(
            f"The source is a {CONFIGS[model_type].__name__.removesuffix('Config')} already; convert its vanilla "
            "source, or `varidepth unroll` it first."
        )
    if model_type == OFFICIAL_JRT:
        raise ConversionError("The source is an official JRT-RNN checkpoint; run `varidepth convert` on it first.")
    if allowed == (OFFICIAL_JRT,):
        raise ConversionError(
            f"The source is a {model_type!r} model, but only an official JRT-RNN or Based checkpoint becomes a "
            "JRT-RNN, and no attention model does; use `--to mor` or `--to mod`, or train one from scratch."
        )
    raise ConversionError(
        f"The source is a {model_type!r} model, but only these can be read here: {', '.join(allowed)}."
    )


def _open_gguf(path: Path, name: str, hub_id: str | None, allowed: tuple[str, ...]) -> SourceCheckpoint:
    """Reads a GGUF file as transformers does: all of it, dequantized to float32, in memory."""
    if path.suffix != ".gguf":
        raise ConversionError(f"The source {name} is a file, but only .gguf files can be read; give the folder.")
    with open(path, "rb") as file:
        if file.read(4) != b"GGUF":
            raise ConversionError(f"The file {path.name} is no GGUF file (it does not start with 'GGUF').")
    try:
        import gguf  # noqa: F401  transformers' own message names the wrong remedy for the tokenizer
    except ImportError as error:
        raise ConversionError("Reading GGUF files needs the `gguf` package; pip install gguf.") from error
    try:
        model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    except Exception as error:  # struct, value, key and index errors of three libraries
        raise ConversionError(
            f"The GGUF file {path.name} cannot be read by transformers ({_one_line(error)}): it is damaged or of an "
            "unsupported architecture; download it again or use the safetensors checkpoint."
        ) from error
    _check_type(model.config.model_type, allowed)
    _drop_invented_token(tokenizer, model.config.vocab_size)
    # the loaded config says "quantized", which is no longer true
    raw = {key: value for key, value in model.config.to_dict().items() if key not in _GGUF_TRACES}
    config = CONFIG_MAPPING[raw["model_type"]].from_dict(raw)
    tensors = dict(model.state_dict())
    if config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    return SourceCheckpoint(
        path.parent, name, config, TensorSource(tensors), hub_id, _license_of(path.parent), path, tokenizer, raw
    )


def _drop_invented_token(tokenizer: Any, vocab_size: int) -> None:
    """transformers adds GPT-2's end token to every byte-level vocabulary of a GGUF file, even beyond the embedding."""
    if tokenizer.get_vocab().get(_INVENTED_TOKEN) != vocab_size:
        return
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["id"] < vocab_size]
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(content))


_INVENTED_TOKEN = "<|endoftext|>"
_GGUF_TRACES = ("quantization_config", "_pre_quantization_dtype", "auto_map", "_name_or_path")


def vanilla_weights(source: SourceCheckpoint) -> TensorSource:
    """The weights under the names of the family's `ForCausalLM`, in the order of that model.

    Raises:
        ConversionError: if a tensor is missing, unknown or of another shape than the configuration says, or a tied
            head differs from the embedding.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(source.config)
    tied = bool(source.config.tie_word_embeddings)
    expected = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    names = {name: name for name in source.weights.infos if not DERIVED.search(name)}
    if names and not any(name.startswith("model.") for name in names):  # saved from the bare model
        names = {name: name if name in expected else f"model.{name}" for name in names}
    weights = stack_experts(source.weights.rename(names), source.config.model_type)
    if tied:
        expected.pop("lm_head.weight", None)
        if "lm_head.weight" in weights.infos and "model.embed_tokens.weight" in weights.infos:
            if not weights.equal("lm_head.weight", "model.embed_tokens.weight"):
                raise ConversionError(
                    "config.json ties the head to the embedding, but the two differ in the weights; set "
                    "`tie_word_embeddings` to what is true."
                )
            weights = weights.rename({name: name for name in weights.infos if name != "lm_head.weight"})
    check_tensors(weights, expected)
    return weights.rename({name: name for name in expected})


def check_tensors(
    weights: TensorSource,
    expected: Mapping[str, tuple[int, ...]],
    remedy: str = "give a plain checkpoint (merge adapters first)",
) -> None:
    """Compares names and shapes with what the model expects; `remedy` is what to do about a tensor too many.

    Raises:
        ConversionError: at the first difference.
    """
    missing = [name for name in expected if name not in weights.infos]
    unknown = [name for name in weights.infos if name not in expected]
    if missing:
        raise ConversionError(
            f"The weights lack {missing[0]}{and_more(missing)}; config.json describes a larger model, or the "
            "checkpoint is incomplete."
        )
    if unknown:
        raise ConversionError(
            f"The weights hold {unknown[0]}{and_more(unknown)}, which the model of config.json does not have; "
            f"{remedy}."
        )
    for name, shape in expected.items():
        if weights.infos[name].shape != shape:
            raise ConversionError(
                f"The tensor {name} has shape {list(weights.infos[name].shape)}, but config.json says {list(shape)}; "
                "one of the two is of another model."
            )


def check_tokenizer(source: SourceCheckpoint) -> None:
    """Refuses a tokenizer with ids that the embedding lacks.

    Raises:
        ConversionError: if it has, or the tokenizer cannot be read.
    """
    if source.tokenizer is not None:
        highest = max(source.tokenizer.get_vocab().values())
    elif (source.folder / "tokenizer.json").is_file():
        content = read_json(source.folder / "tokenizer.json")
        vocabulary = (content.get("model") or {}).get("vocab") or {}
        ids = list(vocabulary.values()) if isinstance(vocabulary, dict) else [len(vocabulary) - 1]
        ids += [token["id"] for token in content.get("added_tokens") or []]
        highest = max(ids, default=-1)
    elif source.companions:
        try:
            highest = max(AutoTokenizer.from_pretrained(source.folder).get_vocab().values())
        except Exception as error:  # every tokenizer class raises its own
            raise ConversionError(f"The tokenizer of {source.name} cannot be read: {_one_line(error)}.") from error
    else:
        return
    if highest >= source.config.vocab_size:
        raise ConversionError(
            f"The tokenizer has ids up to {highest}, but the embedding has {source.config.vocab_size} rows "
            "(`vocab_size`); give the tokenizer that belongs to the weights."
        )


def _license_of(folder: Path) -> dict[str, str]:
    """What a model card says about the license; empty without a readable one."""
    return card_data(folder, "license", "license_name", "license_link")


def card_data(folder: Path, *names: str) -> dict[str, str]:
    """Those of these fields that the metadata of a folder's model card has, as a single string."""
    try:
        found = ModelCard.load(folder / "README.md").data.to_dict()
    except Exception:  # a card is free text: a broken one is no reason to stop
        return {}
    return {name: found[name] for name in names if isinstance(found.get(name), str)}


def generation_settings(source: SourceCheckpoint) -> dict[str, Any] | None:
    """Content of generation_config.json without version stamps; None if the source has none."""
    path = source.folder / "generation_config.json"
    if source.gguf is not None or not path.is_file():
        return None
    return {
        key: value
        for key, value in read_json(path).items()
        if key not in ("transformers_version", "_from_model_config")
    }


def and_more(names: Sequence[str]) -> str:
    """How many names follow the first one, for a sentence that has named it."""
    return f" and {len(names) - 1} more" if len(names) > 1 else ""


def _one_line(error: BaseException) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:300].rstrip(". ")
