"""Trainer, PEFT and distillation on real text; accumulated and checkpointed gradients, routers included."""

import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from real_text import save_source, source_config, text_blocks, training_arguments
from transformers import AutoModelForCausalLM, LlamaForCausalLM, Trainer

from varidepth import MoDConfig, MoDForCausalLM, MoRConfig, MoRForCausalLM
from varidepth.conversion.convert import convert
from varidepth.training.distillation import DistillationTrainer
from varidepth.training.time_limit import TimeLimitCallback


EXPERT = {"capacities": [1.0, 0.5], "aux_loss_coef": 0.1, "router_z_loss_coef": 0.01}
# the product of means of the balancing loss belongs to a whole batch: no sum over micro-batches can equal it
TOKEN = {"routing": "token_choice", "balancing": "loss_free", "balancing_update_rate": 0.0, "router_z_loss_coef": 0.01}
MOD = {"capacity": 0.5, "aux_loss_coef": 0.1, "router_z_loss_coef": 0.01}
MODES = {
    "expert": EXPERT,
    "expert-shared": {**EXPERT, "kv_mode": "shared"},
    "expert-sequence": {**EXPERT, "sharing": "middle_sequence", "capacities": [0.8, 0.4]},
    "expert-predictor": {**EXPERT, "inference_rule": "predictor"},
    "token": TOKEN,
    "token-shared": {**TOKEN, "kv_mode": "shared"},
    "mod": MOD,
    "mod-attention-predictor": {**MOD, "routing_unit": "attention", "inference_rule": "predictor"},
    "mod-mlp-masked": {**MOD, "routing_unit": "mlp", "training_path": "masked", "gate": "sigmoid"},
}
LENGTHS = (20, 6, 13, 9)


@pytest.fixture(params=MODES.values(), ids=MODES)
def model(request):
    return build(**request.param)


def build(**fields) -> MoRForCausalLM | MoDForCausalLM:
    torch.manual_seed(0)
    if "capacity" in fields:
        built = MoDForCausalLM(MoDConfig.from_backbone(source_config(), **fields))
    else:
        built = MoRForCausalLM(MoRConfig.from_backbone(source_config(), num_recursions=2, **fields))
    with torch.no_grad():
        for router in built.model.routers.parameters():
            router.normal_(std=0.5)
    return built.train()


def ragged_batch() -> dict[str, torch.Tensor]:
    """Real text, right-padded to rows of different length."""
    ids = text_blocks().blocks[: len(LENGTHS), : max(LENGTHS)].clone()
    mask = torch.tensor([[int(i < n) for i in range(max(LENGTHS))] for n in LENGTHS])
    ids[mask == 0] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def gradients(model, batches, items=None):
    """Loss and gradients summed over micro-batches."""
    model.zero_grad()
    total = 0.0
    for batch in batches:
        loss = model(**batch, num_items_in_batch=items).loss
        loss.backward()
        total += loss.item()
    return total, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def rows_of(batch):
    return [{name: value[row : row + 1, :n] for name, value in batch.items()} for row, n in enumerate(LENGTHS)]


def assert_same_gradients(found, expected, bound=1e-5):
    assert found.keys() == expected.keys()
    routers = [name for name in expected if "router" in name]
    assert routers and all(expected[name].abs().max() > 0 for name in routers)
    for name, gradient in expected.items():
        error = (found[name] - gradient).norm() / gradient.norm().clamp(min=1e-8)
        assert error <= bound, f"{name}: relative error {error:.1e}"


def test_accumulated_gradients_are_those_of_one_batch(model):
    """4 micro-batches of 1 against 1 of 4, of different lengths, padded and not."""
    batch = ragged_batch()
    items = batch["labels"][:, 1:].ne(-100).sum()
    loss, whole = gradients(model, [batch], items)
    split_loss, split = gradients(model, rows_of(batch), items)
    assert split_loss == pytest.approx(loss, rel=1e-5)
    assert_same_gradients(split, whole)


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_checkpointing_changes_no_gradient(model, reentrant):
    batch = ragged_batch()
    loss, plain = gradients(model, [batch])
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    beside = (
        getattr(model.config, "kv_mode", "") == "shared" or getattr(model.config, "routing_unit", "block") != "block"
    )
    if reentrant and beside:
        # shared keys and values, and the gates of parts, reach the layers beside their inputs
        with pytest.raises(ValueError, match="use_reentrant"):
            gradients(model, [batch])
        return
    again, checkpointed = gradients(model, [batch])
    assert again == pytest.approx(loss, rel=1e-6)
    assert_same_gradients(checkpointed, plain)


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """A converted checkpoint with half of the capacity in its second recursion, and its source."""
    folder = tmp_path_factory.mktemp("converted")
    source = save_source(folder / "source")
    convert(source, folder / "mor", num_recursions=2, quiet=True)
    return source, folder / "mor"


@pytest.fixture(scope="module")
def mod_checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mod")
    build(**MOD, gate="one_plus_tanh").save_pretrained(folder)
    return folder


@pytest.fixture(params=["mor", "mod"])
def checkpoint(request, converted, mod_checkpoint):
    return converted[1] if request.param == "mor" else mod_checkpoint


BLOCKED = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "varidepth":
            raise ModuleNotFoundError("varidepth is blocked in this process")

sys.meta_path.insert(0, Blocked())
import torch
from transformers import AutoModelForCausalLM
from peft import AutoPeftModelForCausalLM

folder, kind, output = sys.argv[1:]
auto = AutoPeftModelForCausalLM if kind == "adapter" else AutoModelForCausalLM
model = auto.from_pretrained(folder, trust_remote_code=True).eval()
ids = torch.load(output)
with torch.no_grad():
    logits = model(input_ids=ids).logits
torch.save({"logits": logits, "tokens": model.generate(input_ids=ids[:1], max_new_tokens=8, do_sample=False)}, output)
"""


def check_reload_without_varidepth(folder, kind, model, tmp_path):
    """Logits and tokens in a process that cannot import varidepth."""
    ids = text_blocks().blocks[:2, :24].clone()
    exchange = tmp_path / "exchange.pt"
    torch.save(ids, exchange)
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED, str(folder), kind, str(exchange)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = torch.load(exchange)
    assert torch.equal(found["logits"], logits_of(model))
    expected = model.eval().generate(input_ids=ids[:1], max_new_tokens=8, do_sample=False)
    assert torch.equal(found["tokens"], expected)


def logits_of(model):
    with torch.no_grad():
        return model.eval()(input_ids=text_blocks().blocks[:2, :24]).logits


def test_trainer_trains_saves_and_loads(checkpoint, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer = Trainer(model=model, args=training_arguments(tmp_path, max_steps=8), train_dataset=text_blocks())
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    unmoved = [name for name, p in model.named_parameters() if torch.equal(p, before[name])]
    # the first recursion holds every token: nothing is decided there, and its router learns no membership
    assert not unmoved

    trainer.save_model(str(tmp_path / "trained"))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "trained")
    assert torch.equal(logits_of(again), logits_of(model))
    check_reload_without_varidepth(tmp_path / "trained", "model", model, tmp_path)


def test_lora_with_trained_routers(checkpoint, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(checkpoint)
    lora = LoraConfig(
        r=4,
        target_modules=["q_proj", "v_proj"],
        modules_to_save=["routers"],
        task_type="CAUSAL_LM",
        init_lora_weights=False,
    )
    model = get_peft_model(base, lora)
    assert any("routers" in name for name, p in model.named_parameters() if p.requires_grad)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    trainer = Trainer(model=model, args=training_arguments(tmp_path, learning_rate=1e-2), train_dataset=text_blocks())
    trainer.train()
    moved = {name for name, p in model.named_parameters() if p.requires_grad and not torch.equal(p, before[name])}
    assert any("routers" in name for name in moved) and any("lora_A" in name for name in moved)

    model.save_pretrained(tmp_path / "adapter")
    assert not list((tmp_path / "adapter").glob("modeling_*.py"))
    fresh = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(checkpoint), tmp_path / "adapter")
    assert torch.equal(logits_of(fresh), logits_of(model))
    check_reload_without_varidepth(tmp_path / "adapter", "adapter", model, tmp_path)

    merged = model.merge_and_unload()
    torch.testing.assert_close(logits_of(merged), logits_of(fresh), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["plain", "distillation", "distillation-lora"])
def test_trainer_accumulates_exactly(kind, tmp_path):
    """The gradients that the optimizer sees, through the whole trainer: 4 micro-batches of 1 against 1 of 4."""
    found = []
    for accumulation in (1, 4):
        model = build(**EXPERT)
        if kind == "distillation-lora":
            model = get_peft_model(
                model, LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["routers"], init_lora_weights=True)
            )
            torch.manual_seed(1)
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if "lora_B" in name:
                        parameter.normal_(std=0.1)
        seen = {}

        class Recording(torch.optim.SGD):
            def step(self, closure=None, seen=seen, model=model):
                seen.update({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})

        args = training_arguments(
            tmp_path, max_steps=1, per_device_train_batch_size=4 // accumulation, max_grad_norm=0.0,
            gradient_accumulation_steps=accumulation, train_sampling_strategy="sequential",
        )  # fmt: skip
        rows = [{name: value[0] for name, value in row.items()} for row in rows_of(ragged_batch())]
        extra = {}
        cls = Trainer
        if kind != "plain":
            torch.manual_seed(5)
            cls = DistillationTrainer
            extra = {"teacher": LlamaForCausalLM(source_config()), "distillation_weight": 0.6, "chunk": 7}
        optimizer = Recording([p for p in model.parameters() if p.requires_grad], lr=0.0)
        cls(
            model=model, args=args, train_dataset=rows, data_collator=pad_rows, optimizers=(optimizer, None), **extra
        ).train()
        found.append(seen)
    assert_same_gradients(found[1], found[0])


@pytest.mark.parametrize("mode", ["expert", "mod"])
def test_label_smoothing_still_trains_the_routers(mode, tmp_path):
    """Trainer then makes the loss outside of the model, which sees no labels."""
    batch = ragged_batch()
    known = {name: batch[name] for name in ("input_ids", "attention_mask")}
    model = build(**MODES[mode])
    Trainer(model=model, args=training_arguments(tmp_path, label_smoothing_factor=0.1)).compute_loss(
        model, batch
    ).backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    labels, model = ragged_batch()["labels"][:, 1:], build(**MODES[mode])
    model.router_loss_scale.outside = 0.0
    log_probabilities = model(**known).logits[:, :-1].log_softmax(-1)[labels != -100]
    right = log_probabilities.gather(1, labels[labels != -100][:, None])
    (-0.9 * right.mean() - 0.1 * log_probabilities.mean()).backward()
    model.model(**known, adds_router_loss=True).aux_loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert_same_gradients(found, expected)


def pad_rows(rows):
    length = max(len(row["input_ids"]) for row in rows)
    fill = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    return {
        name: torch.stack(
            [torch.nn.functional.pad(row[name], (0, length - len(row[name])), value=value) for row in rows]
        )
        for name, value in fill.items()
    }


def test_distillation_loss_is_its_definition(tmp_path):
    """Against whole logits of both models, router loss included; the student's own forward is back afterwards."""
    student = build(**EXPERT)
    torch.manual_seed(5)
    teacher = LlamaForCausalLM(source_config()).eval()
    trainer = DistillationTrainer(
        model=student,
        teacher=teacher,
        args=training_arguments(tmp_path),
        distillation_weight=0.7,
        temperature=2.0,
        chunk=5,
    )
    batch = ragged_batch()
    loss, outputs = trainer.compute_loss(student, dict(batch), return_outputs=True)
    with torch.no_grad():
        whole = student(**batch)
        known = batch["labels"][:, 1:] != -100
        q = whole.logits[:, :-1][known]
        p = teacher(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1][known]
    kl = torch.nn.functional.kl_div(
        (q / 2).log_softmax(-1), (p / 2).log_softmax(-1), reduction="batchmean", log_target=True
    )
    ce = torch.nn.functional.cross_entropy(q, batch["labels"][:, 1:][known])
    expected = 0.3 * ce + 0.7 * 4 * kl + whole.aux_loss
    assert whole.aux_loss > 0
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(outputs.aux_loss, whole.aux_loss)
    assert "forward" not in vars(student)


@pytest.mark.parametrize("average", [True, False])
def test_logged_parts_have_the_scale_of_the_loss(average, tmp_path, monkeypatch):
    """With several processes too, of which each sees a part of the items that all of them divide by."""
    monkeypatch.setattr("accelerate.Accelerator.num_processes", 3)
    student = build(**EXPERT)
    torch.manual_seed(5)
    trainer = DistillationTrainer(
        model=student,
        teacher=LlamaForCausalLM(source_config()),
        args=training_arguments(tmp_path, average_tokens_across_devices=average),
        distillation_weight=0.7,
    )
    loss = trainer.compute_loss(student, ragged_batch(), num_items_in_batch=torch.tensor(500)).item()
    logs = {"loss": loss}
    trainer.log(logs)
    assert loss == pytest.approx(0.3 * logs["ce"] + 0.7 * logs["kl"] + logs["router_loss"], rel=1e-4)


def test_distillation_moves_the_student_towards_the_teacher(converted, tmp_path):
    source, folder = converted
    student = AutoModelForCausalLM.from_pretrained(folder)
    teacher = AutoModelForCausalLM.from_pretrained(source)
    trainer = DistillationTrainer(
        model=student,
        teacher=teacher,
        args=training_arguments(tmp_path, max_steps=12, per_device_train_batch_size=8),
        train_dataset=text_blocks(),
        eval_dataset=torch.utils.data.Subset(text_blocks(), range(4)),
    )
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "kl" in entry]
    assert logs[-1]["kl"] < logs[0]["kl"] and {"ce", "router_loss"} <= logs[0].keys()
    assert logs[0]["loss"] == pytest.approx(logs[0]["kl"] + logs[0]["router_loss"], rel=1e-3)
    assert trainer.evaluate()["eval_loss"] > 0
    assert not any(p.requires_grad for p in teacher.parameters())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"distillation_weight": 1.5}, "from 0 to 1"),
        ({"temperature": 0.0}, "above 0"),
        ({"chunk": 0}, "at least 1"),
        ({"teacher": source_config(vocab_size=500)}, "vocabulary of 500"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor"),
    ],
)
def test_distillation_refuses(fields, message, tmp_path):
    fields = dict(fields)
    args = training_arguments(tmp_path, label_smoothing_factor=fields.pop("label_smoothing_factor", 0.0))
    teacher = LlamaForCausalLM(fields.pop("teacher", source_config()))
    with pytest.raises(ValueError, match=message):
        DistillationTrainer(model=build(**EXPERT), teacher=teacher, args=args, **fields)


def test_time_limit_stops_in_time(tmp_path, capsys):
    import time

    model = build(**EXPERT)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    limit = TimeLimitCallback(minutes=4 / 60)
    limit.tokens_per_step = 4 * 48
    trainer = Trainer(
        model=model,
        args=training_arguments(tmp_path, max_steps=1_000_000),
        train_dataset=text_blocks(),
        optimizers=(optimizer, limit.schedule(optimizer)),
    )
    limit.attach(trainer)
    begin = time.monotonic()
    trainer.train()
    assert limit.steps == trainer.state.global_step >= 1
    assert time.monotonic() - begin < 30 and limit.fraction > 0.5
    shown = capsys.readouterr().err
    assert "tokens" in shown and "loss" in shown and "left" in shown
    with pytest.raises(ValueError, match="above 0"):
        TimeLimitCallback(minutes=0)
