"""JRT-RNN under an unmodified Trainer and PEFT: it learns; accumulated, checkpointed and resumed it is the same."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from real_text import VOCABULARY, text_blocks, text_tokenizer, training_arguments
from test_training import gradients
from tiny_jrt import tiny_jrt, tokens
from torch.utils.data import Subset
from transformers import AutoModelForCausalLM, DataCollatorForLanguageModeling, Trainer

from varidepth.training.jrt_collator import JRTCollator


PREFIX = 24


def text_model(**fields):
    sizes = {"vocab_size": VOCABULARY + 1, "mask_token_id": VOCABULARY, "initializer_range": 0.1}
    return tiny_jrt(prefix_length=PREFIX, **{**sizes, **fields}).train()


def trainer_of(model, folder, rows=64, collator="jrt", **settings) -> Trainer:
    if collator == "jrt":
        collator = JRTCollator.from_model_config(model.config, seed=0)
    data = Subset(text_blocks(), range(rows))
    return Trainer(
        model=model, args=training_arguments(folder, **settings), train_dataset=data, data_collator=collator
    )


def losses_of(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def logits_of(model, **inputs) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=text_blocks().blocks[:2, :40], **inputs).logits


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}")


def test_recall_is_learned(tmp_path):
    """Two pairs of a key and a value, one of the keys again, and its value, on pairs that were not trained on."""
    generator = torch.Generator().manual_seed(0)

    def recalls(count: int) -> torch.Tensor:
        keys = torch.stack([3 + torch.randperm(4, generator=generator)[:2] for _ in range(count)])
        pairs = torch.stack([keys, torch.randint(8, 16, (count, 2), generator=generator)], dim=-1)
        asked = pairs[torch.arange(count), torch.randint(2, (count,), generator=generator)]
        return torch.cat([pairs.flatten(1), asked], dim=1)

    model = tiny_jrt(
        vocab_size=17, mask_token_id=16, num_hidden_layers=2, layer_types=["conv", "linear_attention"],
        num_attention_heads=2, feature_dim=8, initializer_range=0.1,
    )  # fmt: skip
    settings = {"max_steps": 200, "per_device_train_batch_size": 32, "learning_rate": 5e-3, "logging_steps": 20}
    trainer = Trainer(
        model=model,
        args=training_arguments(tmp_path, remove_unused_columns=False, **settings),
        train_dataset=[{"input_ids": row, "completion_mask": [0, 0, 0, 0, 0, 1]} for row in recalls(6400)],
        data_collator=JRTCollator.from_model_config(model.config, prefix_length="prompt", mlm_probability=0.05),
    )
    trainer.train()
    assert losses_of(trainer)[-1] < 0.5 * losses_of(trainer)[0]
    held_out = recalls(100)
    written = model.eval().generate(held_out[:, :-1], max_new_tokens=1, do_sample=False)
    assert (written[:, -1] == held_out[:, -1]).float().mean() > 0.9


@pytest.mark.parametrize("precision", [{}, {"bf16": True}, {"gradient_checkpointing": True}], ids=str)
def test_a_batch_is_learned_by_heart(precision, tmp_path):
    trainer = trainer_of(text_model(), tmp_path, rows=4, max_steps=40, learning_rate=1e-2, **precision)
    trainer.train()
    losses = losses_of(trainer)
    assert losses[0] > 5 and losses[-1] < 1
    assert all(parameter.dtype == torch.float32 for parameter in trainer.model.parameters())


def test_evaluation_loss_is_the_mean_of_its_batches(tmp_path):
    """A seed masks the same tokens every time."""
    trainer = trainer_of(text_model(), tmp_path, per_device_eval_batch_size=4)
    rows = [text_blocks()[i] for i in range(8)]
    found = [trainer.evaluate(rows)["eval_loss"] for _ in range(2)]
    with torch.no_grad():
        batches = [trainer.data_collator(rows[i : i + 4]) for i in (0, 4)]
        expected = sum(trainer.model(**batch).loss.item() for batch in batches) / 2
    assert found == [pytest.approx(expected, rel=1e-5)] * 2
    assert (batches[0]["input_ids"] == VOCABULARY).any()


def test_trainer_accumulates_exactly_what_has_equal_label_counts(tmp_path):
    """The gradients of the optimizer: 4 micro-batches of 1 against 1 of 4, each row with two masked tokens."""
    rows = tokens(4, 20) % 40 + 3
    rows[:, [1, 4]] = torch.arange(44, 52).view(4, 2)
    found = []
    for parts in (1, 4):
        model, seen = tiny_jrt().train(), {}

        class Recording(torch.optim.SGD):
            def step(self, closure=None, seen=seen, model=model):
                seen.update({name: p.grad.clone() for name, p in model.named_parameters()})

        settings = {"per_device_train_batch_size": 4 // parts, "gradient_accumulation_steps": parts}
        collator = JRTCollator.from_model_config(
            model.config, mlm_probability=1.0, unmasked_token_ids=range(44), padding_side="left"
        )
        trainer = Trainer(
            model=model,
            args=training_arguments(
                tmp_path, max_steps=1, max_grad_norm=0.0, train_sampling_strategy="sequential", **settings
            ),
            train_dataset=[{"input_ids": row} for row in rows],
            data_collator=collator,
            optimizers=(Recording(model.parameters(), lr=0.0), None),
        )
        trainer.train()
        found.append((seen, losses_of(trainer)[0]))
    batch = collator([{"input_ids": row} for row in rows])
    assert (batch["input_ids"] == model.config.mask_token_id).sum(dim=1).tolist() == [2] * 4
    loss, expected = gradients(model, [batch])
    for seen, logged in found:
        assert logged == pytest.approx(loss, rel=1e-4)
        assert_same(seen, expected)


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_checkpointing_changes_no_gradient(reentrant):
    model = text_model()
    rows = [{"input_ids": text_blocks().blocks[i, :n]} for i, n in enumerate((48, 30, 41))]
    batch = JRTCollator.from_model_config(model.config, seed=1, padding_side="left")(rows)
    loss, plain = gradients(model, [batch])
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    again, checkpointed = gradients(model, [batch])
    assert again == pytest.approx(loss, rel=1e-6)
    assert all(gradient.abs().max() > 0 for gradient in plain.values())
    assert_same(checkpointed, plain)


def test_resumed_training_is_exact(tmp_path):
    settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "gradient_accumulation_steps": 2}
    whole = trainer_of(text_model(), tmp_path, rows=20, **settings)
    whole.train()
    resumed = trainer_of(text_model(seed=5), tmp_path, rows=20, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "trainer" / "checkpoint-3"))
    assert losses_of(resumed) == losses_of(whole)
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], tensor), name
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "trainer" / "checkpoint-6")
    assert torch.equal(logits_of(loaded), logits_of(whole.model))


def test_a_loss_outside_of_the_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match="would read labels that the prefix has seen; leave `label_smoothing_factor`"):
        trainer_of(text_model(), tmp_path, max_steps=1, label_smoothing_factor=0.1).train()


@pytest.mark.parametrize("collator", [None, DataCollatorForLanguageModeling(text_tokenizer(), mlm=False)], ids=type)
def test_plain_labels_train_what_lies_behind_the_prefix(collator, tmp_path):
    model = text_model(mask_token_id=None)
    trainer = trainer_of(model, tmp_path, collator=collator, max_steps=8)
    batch = next(iter(trainer.get_train_dataloader()))
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], prefix_length=PREFIX).logits[:, PREFIX - 1 : -1]
        expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["input_ids"][:, PREFIX:].flatten())
        assert trainer.compute_loss(model, batch).item() == pytest.approx(expected.item(), rel=1e-5)
    trainer.train()
    assert losses_of(trainer)[-1] < losses_of(trainer)[0]


@pytest.mark.parametrize(
    "modules", [["q_proj", "k_proj", "v_proj", "o_proj", "prefix_k_proj", "prefix_v_proj"], "all-linear"], ids=str
)
def test_lora_trains_saves_and_merges(modules, tmp_path):
    text_model().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    lora = LoraConfig(r=4, target_modules=modules, task_type="CAUSAL_LM", init_lora_weights=False)
    model = get_peft_model(base, lora)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer_of(model, tmp_path, learning_rate=1e-2).train()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if "lora_" in name}
    assert any("prefix_v_proj" in name for name in moved) and any("self_attn.q_proj" in name for name in moved)

    model.save_pretrained(tmp_path / "adapter")
    fresh = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert not torch.allclose(logits_of(fresh), logits_of(model))
    again = PeftModel.from_pretrained(fresh, tmp_path / "adapter")
    torch.testing.assert_close(logits_of(again), logits_of(model), rtol=1e-5, atol=1e-5)
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits_of(merged), logits_of(again), rtol=1e-4, atol=1e-4)
