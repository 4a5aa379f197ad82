"""`Trainer` as it is: resumed, compiled, smoothed, accumulated and checkpointed training is the same training."""

import pytest
import torch
from real_text import source_config, text_blocks, training_arguments
from test_training import (
    EXPERT,
    MOD,
    MODES,
    assert_same_gradients,
    build,
    pad_rows,
    ragged_batch,
    rows_of,
)
from transformers import AutoModelForCausalLM, Trainer

from varidepth import MoDConfig, MoDForCausalLM, MoRConfig, MoRForCausalLM
from varidepth.training.routing_health import RoutingHealthCallback


# each keeps something between steps that is no weight
STATEFUL = {
    "mor-warmup": {**EXPERT, "capacity_warmup_steps": 6},
    "mor-predictor": MODES["expert-predictor"],
    "mor-loss-free": {**MODES["token"], "balancing_update_rate": 0.01},
    "mod-running-mean": {**MOD, "inference_rule": "ema_threshold", "capacity_warmup_steps": 3},
    "mod-stochastic": {"capacity": 0.5, "routing": "stochastic"},
}


def recorded_gradients(model, tmp_path, parts: int, **settings) -> dict[str, torch.Tensor]:
    """Gradients that the optimizer sees, of the ragged batch in `parts` micro-batches."""
    seen = {}

    class Recording(torch.optim.SGD):
        def step(self, closure=None):
            seen.update({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})

    args = training_arguments(
        tmp_path, max_steps=1, max_grad_norm=0.0, per_device_train_batch_size=4 // parts,
        gradient_accumulation_steps=parts, train_sampling_strategy="sequential", **settings,
    )  # fmt: skip
    rows = [{name: value[0] for name, value in row.items()} for row in rows_of(ragged_batch())]
    optimizers = (Recording(model.parameters(), lr=0.0), None)
    Trainer(model=model, args=args, train_dataset=rows, data_collator=pad_rows, optimizers=optimizers).train()
    return seen


def made(fields, layers: int = 6):
    """A tiny model in training mode whose routers, if it has some, spread the tokens."""
    torch.manual_seed(0)
    source = source_config(num_hidden_layers=layers)
    if "capacity" in fields:
        model = MoDForCausalLM(MoDConfig.from_backbone(source, **fields))
    else:
        model = MoRForCausalLM(MoRConfig.from_backbone(source, num_recursions=2, **fields))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "routers" in name:
                parameter.normal_(std=0.5)
    return model.train()


@pytest.mark.parametrize("fields", STATEFUL.values(), ids=STATEFUL)
def test_resumed_training_is_exact(fields, tmp_path):
    """Five steps against two, a checkpoint, and three more in a new model: weights and buffers to the last bit."""
    settings = {"max_steps": 5, "save_strategy": "steps", "save_steps": 2}
    whole = Trainer(model=made(fields), args=training_arguments(tmp_path, **settings), train_dataset=text_blocks())
    whole.train()
    checkpoint = tmp_path / "trainer" / "checkpoint-2"
    torch.manual_seed(99)
    resumed = Trainer(
        model=AutoModelForCausalLM.from_pretrained(checkpoint),
        args=training_arguments(tmp_path, **settings),
        train_dataset=text_blocks(),
    )
    resumed.train(resume_from_checkpoint=str(checkpoint))
    found, expected, half = (
        model.state_dict() for model in (resumed.model, whole.model, AutoModelForCausalLM.from_pretrained(checkpoint))
    )
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    for name in ("routers.weight", "predictors.weight", "balancing_bias", "routing_step", "threshold_ema"):
        assert f"model.{name}" not in half or not torch.equal(half[f"model.{name}"], expected[f"model.{name}"]), name


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("mode", ["expert", "token", "mod", "mod-mlp-masked"])
def test_accumulated_checkpointed_and_smoothed(mode, smoothing, tmp_path):
    """Through the whole trainer, and with a loss that is made outside of the model."""
    settings = {"label_smoothing_factor": smoothing}
    expected = recorded_gradients(build(**MODES[mode]), tmp_path, 1, **settings)
    checkpointing = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    for parts, more in ((4, {}), (4, checkpointing)):
        assert_same_gradients(recorded_gradients(build(**MODES[mode]), tmp_path, parts, **settings, **more), expected)


@pytest.mark.parametrize("fields", [EXPERT, MOD], ids=["mor", "mod"])
def test_compiled_training_is_the_same(fields, tmp_path):
    """Routing waits for the device to know what to skip, which breaks the graph; losses and logs are as in eager."""
    runs = []
    for settings in ({}, {"torch_compile": True, "torch_compile_backend": "eager"}):
        torch._dynamo.reset()
        model = made(fields, layers=4)
        trainer = Trainer(
            model=model, args=training_arguments(tmp_path, max_steps=3, **settings), train_dataset=text_blocks()
        )
        RoutingHealthCallback().attach(trainer)
        trainer.train()
        logs = [entry for entry in trainer.state.log_history if "loss" in entry]
        runs.append(([(e["loss"], e["routing/entropy_1"]) for e in logs], model.model.routers.weight))
    assert torch._dynamo.utils.counters["frames"]["ok"] > 0
    torch.testing.assert_close(runs[1], runs[0], rtol=1e-3, atol=1e-4)
