"""`varidepth inspect CHECKPOINT`: structure, parameters, costs, and the plan it was made by."""

import argparse
import dataclasses
import json
from typing import Any

from ..conversion.inspection import describe, report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Source and format."""
    parser.add_argument(
        "source", help="folder or Hub id of a MoR, MoD or JRT-RNN, or of a vanilla model of a supported family"
    )
    parser.add_argument("--revision", help="branch, tag or commit of a Hub source")
    parser.add_argument("--context", type=int, default=1024, help="tokens in the cache for the costs (default: 1024)")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> None:
    """Prints the description."""
    description = describe(args.source, revision=args.revision, context=args.context)
    content: dict[str, Any] = dataclasses.asdict(description)
    print(json.dumps(content, indent=2) if args.json else report(description))
