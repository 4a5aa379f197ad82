"""Training recipes: those of the papers have the papers' sizes, and what does not fit is one sentence."""

import pytest
import torch
from real_text import save_source
from transformers import AutoModelForCausalLM

from varidepth.analysis.cost import count_parameters
from varidepth.analysis.paper_flops import paper_training_flops, paper_training_steps
from varidepth.analysis.training_cost import run_flops
from varidepth.training.training_plan import model_config, plan_training
from varidepth.training.training_recipe import TrainingRecipe, shipped_training_recipes
from varidepth.training.training_run import training_arguments


FROM_SCRATCH = [name for name in shipped_training_recipes() if name != "mor_from_smollm2"]
# tokens: arXiv 2507.10524, table 9; parameters without embedding: table 6
MOR = {
    "mor_135m": (42_483_456, 76.18e9),
    "mor_360m": (117_991_680, 29.7e9),
    "mor_730m": (251_695_104, 14.9e9),
    "mor_1.7b": (671_137_792, 6.5e9),
}


@pytest.mark.parametrize("name", FROM_SCRATCH)
def test_the_accountant_counts_the_parameters_of_the_model(name):
    config = model_config(TrainingRecipe.load(name))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert count_parameters(config).total == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", MOR)
def test_mor_has_the_sizes_and_the_budget_of_the_paper(name):
    recipe = TrainingRecipe.load(name)
    config = model_config(recipe)
    non_embedding, tokens = MOR[name]
    assert count_parameters(config).non_embedding == non_embedding
    assert config.capacities == [1.0, 2 / 3, 1 / 3] and config.gating == "weighted" and config.router_alpha == 0.1
    assert recipe.training.batch_tokens == 1024 * 2048
    assert recipe.steps * recipe.training.batch_tokens == pytest.approx(tokens, rel=5e-3)
    assert paper_training_flops(config, recipe.steps) == pytest.approx(16.5e18, rel=2e-4)
    # warm-up: 5 % of the steps of the smallest budget; decay: the last fifth
    assert recipe.schedule.warmup == round(0.05 * paper_training_steps(config, 2e18))
    assert recipe.schedule.decay == round(0.2 * recipe.steps)


@pytest.mark.parametrize(("name", "parameters", "tokens"), [
    ("jrt_360m", 356_578_304, 31.5e9),
    ("jrt_1.3b", 1_375_143_168, 52.4e9),
])  # fmt: skip
def test_jrt_has_the_published_sizes(name, parameters, tokens):
    recipe = TrainingRecipe.load(name)
    assert count_parameters(model_config(recipe)).total == parameters
    assert recipe.steps * recipe.training.batch_tokens == pytest.approx(tokens, rel=2e-3)
    arguments = training_arguments(with_cpu(name))
    assert arguments.warmup_steps == recipe.steps // 100 and arguments.lr_scheduler_kwargs == {"min_lr_rate": 0.1}


def test_mod_has_the_size_and_the_budget_of_the_example():
    recipe = TrainingRecipe.load("mod_220m")
    config = model_config(recipe)
    assert count_parameters(config).total == pytest.approx(220e6, rel=0.01)
    assert config.routed_layers == list(range(1, 26, 2)) and config.capacities == [0.125] * 13
    rows = recipe.steps * recipe.training.batch_tokens // 2048
    assert run_flops(config, 2048, rows, recipe.steps) == pytest.approx(6e18, rel=1e-3)


def with_cpu(name: str) -> TrainingRecipe:
    return TrainingRecipe.load(name, ["training.precision=fp32"])


@pytest.mark.parametrize("name", FROM_SCRATCH)
def test_every_recipe_has_a_plan_and_reads_its_own_yaml(name, tmp_path):
    recipe = TrainingRecipe.load(name)
    plan = plan_training(recipe, processes=4)
    table = plan.table()
    for words in ("parameters", "FLOPs per token", "memory", "checkpoints", "4"):
        assert words in table
    (tmp_path / "copy.yaml").write_text(recipe.to_yaml())
    assert TrainingRecipe.load(tmp_path / "copy.yaml") == recipe
    assert recipe.accumulation(4) * 4 * recipe.training.rows * recipe.training.seq_len == recipe.training.batch_tokens


def test_the_plan_of_a_conversion(tmp_path):
    source = save_source(tmp_path / "source")
    recipe = TrainingRecipe.load("mor_from_smollm2", [f"model.source={source}", "training.seq_len=128"])
    plan = plan_training(recipe, processes=1)
    assert plan.config.model_type == "mor" and plan.config.num_recursions == 2
    assert plan.tokens == recipe.steps * 262_144 == pytest.approx(1e9, rel=1e-3)
    assert "converted to mor" in plan.table() and str(tmp_path) not in recipe.without_paths().to_yaml()


def test_the_trapezoid_rises_stays_and_falls():
    recipe = TrainingRecipe.load("mor_360m", ["training.precision=fp32"])
    arguments = training_arguments(recipe)
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=recipe.optimizer.learning_rate)
    scheduler = get_scheduler(
        arguments.lr_scheduler_type,
        optimizer,
        arguments.warmup_steps,
        arguments.max_steps,
        scheduler_specific_kwargs=arguments.lr_scheduler_kwargs,
    )
    (factor,) = scheduler.lr_lambdas
    assert [factor(step) for step in (0, 43, 86, 5000, 14161 - 2832)] == pytest.approx([0, 0.5, 1, 1, 1])
    assert factor(14161 - 1416) == pytest.approx(0.5) and factor(14161) == pytest.approx(0)


GOOD = {
    "model": {"architecture": "mor", "tokenizer": "x", "config": {"num_hidden_layers": 6, "num_recursions": 2}},
    "optimizer": {"learning_rate": 1e-3},
    "training": {"output": "out", "seq_len": 32, "batch_tokens": 64, "rows": 2, "steps": 3},
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["training.step=3"], r"`step` is no field of `training`; did you mean `steps`\?"),
        (["trainnig.steps=3"], r"`trainnig` is no field of a training recipe; did you mean `training`\?"),
        (["training.steps=many"], "`training.steps` is 'many', but must be of type int"),
        (["training.steps"], "PART.FIELD=VALUE"),
        (["steps=3"], "PART.FIELD=VALUE"),
        (["training.tokens=100"], "exactly one"),
        (["training.steps=null"], "exactly one"),
        (["training.precision=bf8"], "`training.precision` is 'bf8'"),
        (["training.rows=0"], "`training.rows` is 0, but must be at least 1"),
        (["schedule.kind=trapeze"], "`schedule.kind` is 'trapeze'"),
        (["schedule.floor=2"], "`schedule.floor` is 2"),
        (["optimizer.betas=[0.9]"], "two numbers"),
        (["optimizer.learning_rate=0"], "above 0"),
        (["model.source=folder"], "exactly one"),
        (["model.architecture=null"], "exactly one"),
        (["model.conversion=mor_paper"], "`model.conversion` is given, but belongs to a `model.source`"),
        (["model.start_routers=true"], "`model.start_routers` is given, but belongs to a `model.source`"),
        (["model.tokenizer=null"], "`model.tokenizer` is missing"),
        (["arguments.learning_rate=1"], "decided by another part"),
        (["arguments.tf33=true"], r"`tf33` is no field of TrainingArguments; did you mean `tf32`\?"),
        (["data.packing=tight"], "`data.packing` is 'tight'"),
    ],
)
def test_what_does_not_fit_is_one_sentence(changes, message):
    assert TrainingRecipe.make(GOOD).steps == 3
    with pytest.raises(ValueError, match=message) as caught:
        TrainingRecipe.make(GOOD, changes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["model.architecture=morr"], r"did you mean 'mor'\?"),
        (["model.config.num_recursion=3"], r"did you mean `num_recursions`\?"),
        (["model.config.num_hidden_layers=7"], "num_hidden_layers"),
        (["training.batch_tokens=65"], "must be a multiple of the 64 tokens"),
        (["model.architecture=jrt", "model.config={}", "data.packing=documents"], "cannot keep the documents"),
        (["model.architecture=null", "model.tokenizer=null", "model.config={}", "model.source=/no"], "no configur"),
    ],
)
def test_what_cannot_be_planned_is_one_sentence(changes, message):
    with pytest.raises(ValueError, match=message) as caught:
        plan_training(TrainingRecipe.make(GOOD, changes), processes=1)
    assert "\n" not in str(caught.value)


def test_a_missing_part_is_named():
    with pytest.raises(ValueError, match="`optimizer.learning_rate` is missing"):
        TrainingRecipe.make({**GOOD, "optimizer": {}})
    with pytest.raises(ValueError, match="one of jrt_1.3b, jrt_360m"):
        TrainingRecipe.load("mor_9b")
