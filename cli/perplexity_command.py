"""`varidepth perplexity CHECKPOINT FILE`: held-out loss in nats per token and per byte."""

import argparse
import json
import sys

from ..analysis.perplexity import held_out_loss
from .checkpoint_loading import COMPUTE_HELP, load_checkpoint
from .text_arguments import add_text_arguments, read_documents


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Checkpoint, text and window."""
    parser.add_argument(
        "checkpoint", help="folder or Hub id of a MoR, MoD or JRT-RNN, or of a vanilla model of a supported family"
    )
    add_text_arguments(parser, window=512)
    parser.add_argument("--max-tokens", type=int, help="stop once this many tokens were predicted")
    prefix = "tokens of each window that are read and not scored; a model that reads a prefix needs it"
    parser.add_argument("--prefix-length", type=int, metavar="TOKENS", help=prefix)
    parser.add_argument("--compute", type=float, metavar="SHARE", help=COMPUTE_HELP)
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def run(args: argparse.Namespace) -> None:
    """Prints the loss.

    Raises:
        ValueError: for a text that is missing or empty, or a checkpoint that cannot be read.
    """
    documents = read_documents(args)
    model, tokenizer = load_checkpoint(args.checkpoint, revision=args.revision, dtype=args.dtype, compute=args.compute)
    loss = held_out_loss(
        model,
        tokenizer,
        documents,
        window=args.window,
        batch_size=args.batch_size,
        max_tokens=args.max_tokens,
        prefix_length=args.prefix_length,
        progress=not args.quiet and sys.stderr.isatty(),
    )
    # only routed tokens ask a rule
    routed = getattr(model.config, "routing", None) == "expert_choice"
    rule = model.config.inference_rule if routed else None
    figures = {
        "nats_per_token": loss.nats_per_token,
        "nats_per_byte": loss.nats_per_byte,
        "perplexity": loss.perplexity,
        "tokens": loss.tokens,
        "bytes": loss.bytes,
        "documents": loss.documents,
        "window": args.window,
        "prefix_length": args.prefix_length,
        "inference_rule": rule,
        "compute": getattr(model.config, "compute", None),
    }
    if args.json:
        print(json.dumps(figures, indent=2))
        return
    print(f"loss        {loss.nats_per_token:.4f} nats per token, {loss.nats_per_byte:.4f} nats per byte")
    print(f"perplexity  {loss.perplexity:.2f} per token")
    print(
        f"text        {loss.tokens} tokens, {loss.bytes} bytes, {loss.documents} documents, windows of {args.window}"
    )
    if args.prefix_length is not None:
        print(f"prefix      the first {args.prefix_length} tokens of each window, which are not scored")
    if figures["compute"] is not None:
        print(f"compute     {figures['compute']:g} of all tokens in all layers, by the calibrated curve")
    if rule == "topk":
        print("note        inference_rule is 'topk', which looks at future tokens: no causal model reaches this loss")
