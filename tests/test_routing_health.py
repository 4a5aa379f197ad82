"""Logs of routing health are those of the passes that train, each counted once, whatever is wrapped around them."""

import multiprocessing

import pytest
import torch
from peft import LoraConfig, get_peft_model
from real_text import source_config, text_blocks, training_arguments
from test_training import EXPERT, MOD, MODES, build
from torch.utils.data import Subset
from transformers import LlamaForCausalLM, Trainer, TrainerCallback
from trl import SFTTrainer

from varidepth import MoDConfig, MoDForCausalLM
from varidepth.analysis.routing_statistics import RoutingMeter
from varidepth.training.routing_health import RoutingHealthCallback, log_entries


KINDS = {
    "mor": EXPERT,
    "mor-token": MODES["token"],
    "mor-predictor": MODES["expert-predictor"],
    "mod": {**MOD, "capacity_warmup_steps": 4},
    "mod-masked": MODES["mod-mlp-masked"],
}
# (expert choice; the first recursion of a MoR holds every token)
EXPECTED = {
    "mor": {"share_1", "dead_1", "accuracy_1", "recall_1", "entropy_1"},
    "mor-token": {"share_1", "dead_1", "entropy_0", "max_violation_0"},
}


class Reporter(TrainerCallback):
    """Stands for wandb and its like, which take the logs as they find them."""

    def __init__(self):
        self.reported = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.reported.append(dict(logs))


def trained(model, tmp_path, cls=Trainer, evaluate=False, **settings):
    """Two steps without learning, of two micro-batches each, logged together; returns what a reporter has got."""
    reporter = Reporter()
    settings = {"max_steps": 2, "logging_steps": 2, "per_device_train_batch_size": 2, **settings}
    if evaluate:
        settings |= {"eval_strategy": "steps", "eval_steps": 1}
    args = training_arguments(
        tmp_path, gradient_accumulation_steps=2, train_sampling_strategy="sequential", **settings
    )
    trainer = cls(
        model=model,
        args=args,
        train_dataset=text_blocks(),
        eval_dataset=Subset(text_blocks(), range(8, 12)) if evaluate else None,
        optimizers=(torch.optim.SGD(model.parameters(), lr=0.0), None),
        callbacks=[reporter],
    )
    RoutingHealthCallback().attach(trainer)
    trainer.train()
    (logs,) = [entry for entry in trainer.state.log_history if "loss" in entry]
    (reported,) = [logs for logs in reporter.reported if "loss" in logs]
    health = {name: value for name, value in logs.items() if name.startswith("routing/")}
    assert health == {name: value for name, value in reported.items() if name.startswith("routing/")}
    return health


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def expected_of(kind: str) -> dict[str, float]:
    """The same figures from passes of our own, two rows at a time."""
    model = build(**KINDS[kind])
    meter = RoutingMeter(model)
    for start in range(0, 8, 2):
        output = model(text_blocks().blocks[start : start + 2], output_routing=True)
        meter.update(output, top_k_entered=True)
    return log_entries(meter.result(), meter.avoidable)


def test_logs_are_those_of_the_training_passes(kind, tmp_path):
    health = trained(build(**KINDS[kind]), tmp_path)
    assert health == pytest.approx(expected_of(kind), rel=1e-6)
    assert {"routing/mean_depth", "routing/untouched"} <= health.keys()
    if kind in EXPECTED:
        assert {name.removeprefix("routing/") for name in health} == EXPECTED[kind] | {"mean_depth", "untouched"}
    if kind == "mor":
        assert health["routing/share_1"] == 0.5 and health["routing/mean_depth"] == 1.5


def test_shares_of_stochastic_routing(tmp_path):
    torch.manual_seed(0)
    model = MoDForCausalLM(MoDConfig.from_backbone(source_config(), capacity=0.25, routing="stochastic"))
    health = trained(model, tmp_path)
    shares = {name: value for name, value in health.items() if "share" in name}
    assert shares and set(shares.values()) == {0.25} and not any("accuracy" in name for name in health)


@pytest.mark.parametrize("around", ["checkpointing", "evaluation", "peft", "bf16"])
def test_each_pass_counts_once(around, tmp_path):
    model, settings = build(**EXPERT), {}
    if around == "checkpointing":
        settings = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    elif around == "peft":
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["routers"]))
    elif around == "bf16":
        settings = {"bf16": True}
    health = trained(model, tmp_path, evaluate=around == "evaluation", **settings)
    expected = expected_of("mor")
    assert health.keys() == expected.keys()
    # rounding moves scores, not the shares
    assert health == pytest.approx(expected, rel=1e-6 if around != "bf16" else 0.05)
    base = model.get_base_model() if around == "peft" else model
    assert not base.model._forward_hooks and not base.model._forward_pre_hooks


def test_pads_and_documents_of_trl(tmp_path):
    """The health of one packed row is that of its documents."""
    from test_trl import KINDS as TRL_KINDS
    from test_trl import LENGTHS, trainer_of

    found = []
    for settings in ({}, {"packing": True, "max_length": sum(LENGTHS)}):
        trainer = trainer_of(SFTTrainer, build(**TRL_KINDS["mod"]), tmp_path, **settings)
        RoutingHealthCallback().attach(trainer)
        trainer.train()
        found.append({n: v for n, v in trainer.state.log_history[0].items() if n.startswith("routing/")})
    assert found[0]["routing/share_1"] == pytest.approx(sum(n // 2 for n in LENGTHS) / sum(LENGTHS))
    # positions are counted by row
    alone, packed = ({n: v for n, v in one.items() if "dead" not in n} for one in found)
    assert packed == pytest.approx(alone, rel=1e-5)


def test_a_router_that_has_collapsed_shows(tmp_path):
    """A constant score takes the first tokens of every row: half of the positions are dead."""
    model = build(**EXPERT)
    with torch.no_grad():
        model.model.routers.weight.zero_()
    health = trained(model, tmp_path)
    assert health["routing/dead_1"] == 0.5
    # every score is at the threshold, so that the rule lets everyone in
    assert (health["routing/accuracy_1"], health["routing/recall_1"]) == (0.5, 1.0)
    assert health["routing/entropy_1"] == pytest.approx(0.693147, abs=1e-5)


def test_a_model_without_routers_is_refused(tmp_path):
    for model, message in ((LlamaForCausalLM(source_config()), "no routers"), (build_open(), "routes nothing")):
        trainer = Trainer(model=model, args=training_arguments(tmp_path), train_dataset=text_blocks())
        RoutingHealthCallback().attach(trainer)
        with pytest.raises(ValueError, match=message):
            trainer.train()


def build_open():
    return MoDForCausalLM(MoDConfig.from_backbone(source_config(), capacity=1.0))


def test_ranks_are_added(tmp_path):
    """Two processes that saw rows of different length have the figures of one that saw both."""
    queue, context = None, multiprocessing.get_context("fork")
    queue = context.Queue()
    workers = [context.Process(target=_rank, args=(rank, f"file://{tmp_path}/ranks", queue)) for rank in range(2)]
    for worker in workers:
        worker.start()
    found = [queue.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join(timeout=60)
    meter = RoutingMeter(build(**EXPERT))
    for rank in range(2):
        meter.update(_seen_by(meter.model, rank))
    assert found == [meter.result()] * 2


def _seen_by(model, rank: int):
    with torch.no_grad():
        return model.eval()(text_blocks().blocks[rank : rank + 1, : 20 + 10 * rank], output_routing=True)


def _rank(rank: int, address: str, queue) -> None:
    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    meter = RoutingMeter(build(**EXPERT))
    meter.update(_seen_by(meter.model, rank))
    meter.add_ranks()
    queue.put(meter.result())
