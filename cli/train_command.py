"""`varidepth train RECIPE.yaml`"""

import argparse
import json
import os
from pathlib import Path

import transformers

from ..training.training_checkpoints import how_to_resume
from ..training.training_plan import plan_training
from ..training.training_recipe import TrainingRecipe, shipped_training_recipes
from ..training.training_run import run_training


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The recipe, and changes to it."""
    parser.add_argument("recipe", help=f"YAML file, or a shipped recipe: {', '.join(shipped_training_recipes())}")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="PART.FIELD=VALUE",
        help="change a field of the recipe",
        dest="changes",
    )
    parser.add_argument("-o", "--output", help="folder for checkpoints and the model (training.output)")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and train nothing")
    parser.add_argument(
        "--resume", action="store_true", help="go on behind the newest checkpoint in the output folder"
    )
    parser.add_argument("--quiet", action="store_true", help="print neither plan nor progress")


def run(args: argparse.Namespace) -> int:
    """Prints the plan, trains, and says what came of it; returns the exit status."""
    # in quotes, since a change is read as YAML
    changes = [*args.changes, *([f"training.output={json.dumps(args.output)}"] if args.output else [])]
    recipe = TrainingRecipe.load(args.recipe, changes)
    speaks = os.environ.get("RANK", "0") == "0"
    if speaks and (args.dry_run or not args.quiet):
        print(plan_training(recipe).table(), flush=True)
    if args.dry_run:
        return 0
    # one line of progress is enough
    transformers.logging.disable_progress_bar()
    try:
        result = run_training(recipe, resume=args.resume, show=not args.quiet)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(how_to_resume(Path(recipe.training.output))) from None
    if speaks:
        losses = [
            f"{name} {value:.4f}"
            for name, value in (("training loss", result.loss), ("evaluation loss", result.eval_loss))
            if value is not None
        ]
        print(", ".join([f"{result.steps} steps", f"{result.tokens} tokens", *losses]))
    return 0
