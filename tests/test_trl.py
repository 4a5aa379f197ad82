"""SFT, DPO and GRPO of TRL as they are: routers get the gradient of one large batch, packed documents stay apart."""

from contextlib import nullcontext

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from real_text import SHORT_TRAINING, VOCABULARY, text_blocks, text_tokenizer
from test_training import MODES, assert_same_gradients, build
from tiny_jrt import tiny_jrt
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from varidepth import MoDConfig, MoDForCausalLM
from varidepth.training.jrt_collator import JRTCollator
from varidepth.training.trainer_adapter import adapt_trainer


pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
# weights of the router losses that a wrong scale could not hide behind
HEAVY = {"aux_loss_coef": 0.5, "router_z_loss_coef": 0.1}
KINDS = {
    "mor": {"capacities": [1.0, 0.5], **HEAVY},
    "mor-token": {**MODES["token"], "router_z_loss_coef": 0.1},
    "mor-predictor": {"capacities": [1.0, 0.5], "inference_rule": "predictor", **HEAVY},
    "mod": {"capacity": 0.5, **HEAVY},
}
LENGTHS = (20, 6, 13, 9)
PROMPT = 4
CONFIGS = {SFTTrainer: SFTConfig, DPOTrainer: DPOConfig, GRPOTrainer: GRPOConfig}


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def documents() -> list[list[int]]:
    return [text_blocks().blocks[row, :length].tolist() for row, length in enumerate(LENGTHS)]


def rows_for(cls, copies: int = 1) -> Dataset:
    """The documents: as they are, as a chosen completion with a rejected one, or the begin of each as a prompt."""
    ids = documents() * copies
    if cls is SFTTrainer:
        return Dataset.from_dict({"input_ids": ids})
    tokenizer = text_tokenizer()
    prompts = [tokenizer.decode(row[:PROMPT]) for row in ids]
    if cls is GRPOTrainer:
        return Dataset.from_dict({"prompt": prompts})
    completions = {"chosen": [row[PROMPT:] for row in ids], "rejected": [row[PROMPT:][::-1] for row in ids]}
    texts = {name: [tokenizer.decode(row) for row in rows] for name, rows in completions.items()}
    return Dataset.from_dict({"prompt": prompts, **texts})


def trainer_of(cls, model, folder, dataset=None, trainer_fields=None, **settings):
    """A trainer whose optimizer only records the gradients that it sees, in `trainer.seen`."""
    common = {
        "output_dir": str(folder / "trl"),
        **SHORT_TRAINING,
        "max_steps": 1,
        "bf16": False,
        "gradient_checkpointing": False,
        "max_grad_norm": 0.0,
        "train_sampling_strategy": "sequential",
    }
    if cls is GRPOTrainer:
        common |= {"num_generations": 2, "max_completion_length": 6}
    fields = {"reward_funcs": some_reward} if cls is GRPOTrainer else {}
    fields |= trainer_fields or {}
    dataset = rows_for(cls) if dataset is None else dataset
    args = CONFIGS[cls](**{**common, **settings})
    return cls(model=model, args=args, train_dataset=dataset, processing_class=text_tokenizer(), **fields)


def some_reward(completion_ids, **kwargs) -> list[float]:
    """Differs between completions, so that there is something to learn."""
    return [float(sum(ids) % 7) for ids in completion_ids]


def no_reward(completion_ids, **kwargs) -> list[float]:
    return [0.0] * len(completion_ids)


def recorded_gradients(trainer) -> dict[str, torch.Tensor]:
    """Trains one step whose optimizer changes nothing."""
    seen = {}
    model = trainer.model

    class Recording(torch.optim.SGD):
        def step(self, closure=None):
            seen.update({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})

    trainer.optimizer = Recording([p for p in model.parameters() if p.requires_grad], lr=0.0)
    trainer.train()
    return seen


@pytest.fixture
def folder(tmp_path):
    """A function that saves a model, as TRL loads its reference from where the model came from."""

    def save(kind: str):
        build(**KINDS[kind]).save_pretrained(tmp_path / kind)
        return AutoModelForCausalLM.from_pretrained(tmp_path / kind)

    return save


@pytest.mark.parametrize("kind", KINDS)
def test_sft_has_the_gradients_of_trainer(kind, tmp_path):
    """Rows of different length, in one batch and in four, against `Trainer`, whose loss the model makes."""
    rows = [{"input_ids": ids, "labels": ids, "attention_mask": [1] * len(ids)} for ids in documents()]
    length = max(LENGTHS)

    def pad(batch):
        fill = {"input_ids": 0, "labels": -100, "attention_mask": 0}
        return {n: torch.tensor([row[n] + [v] * (length - len(row[n])) for row in batch]) for n, v in fill.items()}

    args = TrainingArguments(
        str(tmp_path), max_steps=1, per_device_train_batch_size=4, max_grad_norm=0.0, use_cpu=True, save_strategy="no",
        report_to="none", disable_tqdm=True, train_sampling_strategy="sequential",
    )  # fmt: skip
    expected = recorded_gradients(Trainer(build(**KINDS[kind]), args, train_dataset=rows, data_collator=pad))
    for parts in (1, 4):
        settings = {"per_device_train_batch_size": 4 // parts, "gradient_accumulation_steps": parts}
        trainer = adapt_trainer(trainer_of(SFTTrainer, build(**KINDS[kind]), tmp_path, **settings))
        assert_same_gradients(recorded_gradients(trainer), expected)


def test_sft_over_processes_undoes_their_mean(tmp_path, monkeypatch):
    """The items are those of all processes, so that the loss of each is multiplied by their number: routers' too."""
    expected = recorded_gradients(adapt_trainer(trainer_of(SFTTrainer, build(**KINDS["mor"]), tmp_path)))
    monkeypatch.setattr("accelerate.Accelerator.num_processes", 3)
    found = recorded_gradients(adapt_trainer(trainer_of(SFTTrainer, build(**KINDS["mor"]), tmp_path)))
    assert_same_gradients({name: gradient / 3 for name, gradient in found.items()}, expected)


@pytest.mark.parametrize("kind", ["mor", "mod"])
def test_dpo_takes_the_mean_over_its_parts(kind, folder, tmp_path):
    """Four accumulated pairs against the mean of the gradients of each alone; scaled as fp16 training does, too."""
    alone = trainer_of(
        DPOTrainer, folder(kind), tmp_path, rows_for(DPOTrainer), per_device_train_batch_size=1, max_steps=4
    )
    steps = []

    class Recording(torch.optim.SGD):
        def step(self, closure=None):
            steps.append({n: p.grad.clone() for n, p in alone.model.named_parameters() if p.grad is not None})

    alone.optimizer = Recording(alone.model.parameters(), lr=0.0)
    adapt_trainer(alone).train()
    expected = {name: sum(step[name] for step in steps) / 4 for name in steps[0]}
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=1024.0)):
        settings = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
        together = adapt_trainer(trainer_of(DPOTrainer, folder(kind), tmp_path, rows_for(DPOTrainer), **settings))
        together.accelerator.scaler = scaler
        assert_same_gradients(recorded_gradients(together), expected)


def test_grpo_takes_the_mean_over_its_parts(folder, tmp_path):
    """Without a reward nothing but the router loss has a gradient: that of each part, divided by their number."""
    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3}
    trainer = trainer_of(GRPOTrainer, folder("mor"), tmp_path, trainer_fields={"reward_funcs": no_reward}, **settings)
    adapt_trainer(trainer)
    parts = []

    def note(module, args, kwargs):
        if module.training and torch.is_grad_enabled():
            labels = kwargs["labels"][:, 1:].ne(-100).sum()
            parts.append(({n: kwargs[n].clone() for n in ("input_ids", "attention_mask")}, labels))

    hook = trainer.model.register_forward_pre_hook(note, with_kwargs=True)
    found = recorded_gradients(trainer)
    hook.remove()
    assert len(parts) == 3
    model = trainer.model.train()
    model.zero_grad()
    for inputs, labels in parts:
        aux_loss = model.model(**inputs, num_items_in_batch=labels, adds_router_loss=True).aux_loss
        (aux_loss / 3).backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    found = {name: gradient for name, gradient in found.items() if gradient.any()}
    assert_same_gradients(found, expected)


@pytest.mark.parametrize("lora", [False, True], ids=["whole", "lora"])
@pytest.mark.parametrize("kind", ["mor", "mor-token", "mod"])
def test_dpo_begins_at_its_reference(kind, lora, folder, tmp_path):
    """A reference is read in evaluation mode; routed by another rule than the policy it would be another model."""
    peft = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], modules_to_save=["routers"]) if lora else None
    trainer = trainer_of(DPOTrainer, folder(kind), tmp_path, trainer_fields={"peft_config": peft})
    adapt_trainer(trainer).train()
    # -log sigmoid(0)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(0.693147, abs=1e-5)
    assert not lora or trainer.ref_model is None


def test_a_pass_without_gradient_moves_no_state(tmp_path):
    model = build(capacity=0.5, inference_rule="ema_threshold", capacity_warmup_steps=10)
    adapt_trainer(trainer_of(SFTTrainer, model, tmp_path))
    state = {name: value.clone() for name, value in model.model.named_buffers()}
    with torch.no_grad():
        model.train()(text_blocks().blocks[:2])
    assert all(torch.equal(value, state[name]) for name, value in model.model.named_buffers())
    model(text_blocks().blocks[:2])
    assert int(model.model.routing_step) == 1 and not torch.equal(model.model.threshold_ema, state["threshold_ema"])


@pytest.mark.parametrize("packing", [{"packing": True, "max_length": sum(LENGTHS)}, {"padding_free": True}], ids=str)
@pytest.mark.parametrize("kind", [*KINDS, "mod-first"])
def test_packed_documents_are_as_if_alone(kind, packing, tmp_path):
    """Loss and gradients of one row with all documents, against a batch of them: capacity is counted by document."""
    fields = KINDS.get(kind) or {**KINDS["mod"], "always_route_first": 2, "routing_unit": "attention"}
    found, losses = [], []
    for settings in ({}, {"max_length": None, **packing}):
        trainer = adapt_trainer(trainer_of(SFTTrainer, build(**fields), tmp_path, **settings))
        shapes = []
        hook = trainer.model.model.register_forward_pre_hook(
            lambda module, args, kwargs, shapes=shapes: shapes.append(tuple(kwargs["input_ids"].shape)),
            with_kwargs=True,
        )
        found.append(recorded_gradients(trainer))
        hook.remove()
        losses.append(trainer.state.log_history[0]["loss"])
        assert shapes == [(1, sum(LENGTHS)) if settings else (4, max(LENGTHS))]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert_same_gradients(found[1], found[0])


@pytest.mark.parametrize("cls", CONFIGS)
@pytest.mark.parametrize("kind", ["mor", "mod"])
def test_real_steps(cls, kind, folder, tmp_path):
    """Everything moves, routers too; generation in between looks at no later token; what was saved loads."""
    model = folder(kind)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    settings = {"beta": 0.1} if cls is GRPOTrainer else {}
    trainer = trainer_of(
        cls, model, tmp_path, rows_for(cls, copies=4), max_steps=3, gradient_accumulation_steps=2, **settings
    )
    modes = set()
    hook = model.model.register_forward_hook(
        lambda module, args, output: modes.add((module.training, torch.is_grad_enabled()))
    )
    adapt_trainer(trainer).train()
    hook.remove()
    assert modes == {(True, True), (False, False)} if cls is GRPOTrainer else {(True, True)}
    assert not [name for name, p in model.named_parameters() if torch.equal(p, before[name])]
    trainer.save_model(str(tmp_path / "trained"))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "trained")
    ids = text_blocks().blocks[:1, :8]
    written = [one.eval().generate(ids, max_new_tokens=4, do_sample=False) for one in (model, again)]
    assert torch.equal(*written)


def test_lora_of_sft_trains_the_routers(tmp_path):
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], modules_to_save=["routers"])
    trainer = trainer_of(SFTTrainer, build(**KINDS["mor"]), tmp_path, trainer_fields={"peft_config": lora})
    seen = recorded_gradients(adapt_trainer(trainer))
    assert all("lora_" in name or "routers" in name for name in seen)
    whole = recorded_gradients(adapt_trainer(trainer_of(SFTTrainer, build(**KINDS["mor"]), tmp_path)))
    (router,) = (gradient for name, gradient in seen.items() if "routers" in name)
    torch.testing.assert_close(router, whole["model.routers.weight"], rtol=1e-4, atol=1e-7)


def test_experts_keep_their_balancing_loss(tmp_path):
    """TRL would ask the model for logits of its experts, one for each token, and balance them itself."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 4, "num_attention_heads": 4}
    sizes["num_key_value_heads"] = 2
    experts = {"num_local_experts": 4, "output_router_logits": True, "router_aux_loss_coef": 0.5}
    tokens = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    model = MoDForCausalLM(MoDConfig(backbone="mixtral", capacity=0.5, **sizes, **experts, **tokens)).train()
    trainer = adapt_trainer(trainer_of(SFTTrainer, model, tmp_path))
    found = recorded_gradients(trainer)
    ids = torch.tensor([ids + [0] * (max(LENGTHS) - len(ids)) for ids in documents()])
    mask = torch.tensor([[1] * n + [0] * (max(LENGTHS) - n) for n in LENGTHS])
    model.zero_grad()
    model(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss.backward()
    assert_same_gradients(found, {n: p.grad for n, p in model.named_parameters() if p.grad is not None})


def prompted() -> Dataset:
    ids = documents()
    masks = [[0] * PROMPT + [1] * (len(row) - PROMPT) for row in ids]
    return Dataset.from_dict({"input_ids": ids, "completion_mask": masks})


def jrt_model(**fields):
    return tiny_jrt(vocab_size=VOCABULARY + 1, mask_token_id=VOCABULARY, **fields)


def test_sft_of_jrt_reads_the_prompt_first(tmp_path):
    trainer = trainer_of(SFTTrainer, jrt_model(prefix_length=16), tmp_path, prompted(), completion_only_loss=True)
    found = recorded_gradients(trainer)
    ids = torch.tensor([ids + [0] * (max(LENGTHS) - len(ids)) for ids in documents()])
    mask = torch.tensor([[1] * n + [0] * (max(LENGTHS) - n) for n in LENGTHS])
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :PROMPT] = -100
    model = jrt_model(prefix_length=16).train()
    loss = model(ids, attention_mask=mask, labels=labels, prefix_length=PROMPT).loss
    loss.backward()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(loss.item(), rel=1e-5)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("dataset", "settings", "message"),
    [
        (lambda: rows_for(SFTTrainer), {}, "give rows of `prompt` and `completion`"),
        (prompted, {"completion_only_loss": True, "label_smoothing_factor": 0.1}, "leave `label_smoothing_factor`"),
        (
            prompted,
            {"completion_only_loss": True, "packing": True, "max_length": sum(LENGTHS)},
            "give each document a row of its own",
        ),
    ],
)
def test_sft_of_jrt_refuses(dataset, settings, message, tmp_path):
    trainer = trainer_of(SFTTrainer, jrt_model(prefix_length=16), tmp_path, dataset(), **settings)
    with pytest.raises(ValueError, match=message):
        trainer.train()


def test_a_prefix_of_the_collator_must_end_before_the_labels(tmp_path):
    model = jrt_model(prefix_length=16)
    for collator, refused in (
        (JRTCollator.from_model_config(model.config, mlm_probability=0.5), True),
        (JRTCollator(mask_token_id=None, prefix_length="prompt"), False),
    ):
        trainer = trainer_of(SFTTrainer, model, tmp_path, prompted(), {"data_collator": collator})
        with pytest.raises(ValueError, match="some lie in the prefix") if refused else nullcontext():
            trainer.train()


@pytest.mark.parametrize("cls", [DPOTrainer, GRPOTrainer])
def test_jrt_learns_preferences_and_rewards(cls, tmp_path):
    jrt_model(prefix_length=16).save_pretrained(tmp_path / "jrt")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "jrt")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer = adapt_trainer(trainer_of(cls, model, tmp_path, rows_for(cls), max_steps=2))
    trainer.train()
    if cls is DPOTrainer:
        assert trainer.state.log_history[0]["loss"] == pytest.approx(0.693147, abs=1e-5)
    assert not [name for name, p in model.named_parameters() if torch.equal(p, before[name])]
