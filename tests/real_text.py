"""Real English text for tests: the pydoc topics, a small tokenizer for them, and a source model of its size."""

import functools
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainingArguments

from varidepth.training.text_blocks import load_documents, token_blocks


VOCABULARY = 400
SPECIAL = ["<pad>", "<s>", "</s>"]


@functools.cache
def text_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE trained on a part of the topics."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(load_documents()[:10], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        clean_up_tokenization_spaces=False,
    )


@functools.cache
def text_blocks(length: int = 48):
    """Blocks of a few topics."""
    return token_blocks(load_documents()[:6], text_tokenizer(), length)


def source_config(**fields) -> LlamaConfig:
    small = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": True,
    }
    return LlamaConfig(**{**small, **fields})


def save_source(folder: Path) -> Path:
    """A vanilla checkpoint of random weights with its tokenizer."""
    torch.manual_seed(11)
    # far enough from a uniform distribution that there is something to distil
    LlamaForCausalLM(source_config(initializer_range=0.2)).save_pretrained(folder)
    text_tokenizer().save_pretrained(folder)
    return folder


SHORT_TRAINING = {
    "max_steps": 4,
    "per_device_train_batch_size": 4,
    "learning_rate": 3e-3,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "disable_tqdm": True,
    "seed": 0,
}


def training_arguments(folder: Path, **fields) -> TrainingArguments:
    """Of a run of some steps on the CPU."""
    return TrainingArguments(output_dir=str(folder / "trainer"), **{**SHORT_TRAINING, **fields})
