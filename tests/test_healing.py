"""Healing: states drawn to the teacher's, routing after depth, layers drawn together before they are one."""

import copy

import pytest
import torch
from real_text import save_source, source_config, text_blocks, training_arguments
from tiny_families import vanilla_of
from transformers import AutoModelForCausalLM, LlamaForCausalLM, TrainerCallback

from varidepth import MoDConfig, MoRConfig, MoRForCausalLM
from varidepth.conversion.convert import convert
from varidepth.training.distillation import DistillationTrainer
from varidepth.training.healing import CapacityAnnealing, HealingTrainer, relative_groups
from varidepth.training.hidden_matching import hidden_distance, matched_states
from varidepth.training.progressive_sharing import ProgressiveSharing, load_shared
from varidepth.training.schedules import Ramp, value_at


@pytest.fixture(scope="module")
def source_folder(tmp_path_factory):
    return save_source(tmp_path_factory.mktemp("healing") / "source")


@pytest.fixture
def source(source_folder):
    return LlamaForCausalLM.from_pretrained(source_folder)


@pytest.fixture(scope="module")
def converted(source_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("healing") / "mor"
    convert(source_folder, folder, num_recursions=2, quiet=True)
    return folder


def config(**fields):
    return MoRConfig.from_backbone(source_config(), num_recursions=2, **fields)


def test_states_are_compared_at_the_boundaries_of_the_recursions():
    student, teacher = config(), source_config()
    assert matched_states(student, teacher) == [(1, 1, None), (3, 3, 0), (5, 5, 1)]
    assert matched_states(config(sharing="middle_sequence"), teacher) == [
        (1, 1, None),
        *((i, i, i - 2) for i in range(2, 6)),
    ]
    assert [pair[0] for pair in matched_states(student, teacher, "all")] == [1, 2, 3, 4, 5]
    deeper = source_config(num_hidden_layers=12)
    assert [pair[1] for pair in matched_states(student, deeper)] == [2, 6, 10]
    mod = MoDConfig.from_backbone(source_config(), capacity=0.5)
    assert {entry for entry, _, number in matched_states(mod, teacher) if number is not None} <= {
        slot + 1 for p in mod.routed_passes for slot in p.slots
    }
    with pytest.raises(ValueError, match="must be one of 'boundaries', 'all'"):
        matched_states(student, teacher, "some")


def test_distance_is_relative_to_each_token_and_leaves_out_who_did_not_enter():
    torch.manual_seed(0)
    student, teacher = (tuple(torch.randn(2, 5, 8) for _ in range(3)) for _ in range(2))
    mask = torch.rand(2, 5, 1) < 0.5
    found = hidden_distance(student, teacher, [(1, 1, None), (2, 2, 0)], mask)
    for row in range(2):
        for t in range(5):
            parts = [
                float(((student[i][row, t] - teacher[i][row, t]) ** 2).sum() / (teacher[i][row, t] ** 2).sum())
                for i in (1, 2)
            ]
            expected = (parts[0] + (parts[1] if mask[row, t, 0] else 0.0)) / 2
            assert float(found[row, t]) == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ValueError, match="8 values and the teacher's 4"):
        hidden_distance(student, tuple(s[..., :4] for s in teacher), [(1, 1, None)])


def test_schedules():
    ramp = Ramp(10.0, 2.0, begin=0.25, end=0.75)
    assert [ramp(p) for p in (0, 0.25, 0.5, 0.75, 1)] == [10, 10, pytest.approx(6.0), 2, 2]
    assert value_at(3, 0.5) == 3.0 and value_at(ramp, 1.0) == 2.0
    with pytest.raises(ValueError, match="0 <= begin <= end <= 1"):
        Ramp(1, 0, 0.7, 0.2)


def test_healing_draws_the_states_to_the_teachers(converted, source, tmp_path):
    found = {}
    for weight in (0.0, 30.0):
        model = AutoModelForCausalLM.from_pretrained(converted)
        model.config.capacities = [1.0, 1.0]
        trainer = HealingTrainer(
            model=model, teacher=copy.deepcopy(source), args=training_arguments(tmp_path, max_steps=8),
            train_dataset=text_blocks(), hidden_weight=weight,
        )  # fmt: skip
        trainer.train()
        found[weight] = trainer.state.log_history
        with torch.no_grad():
            ids = text_blocks().blocks[-4:]
            states = [m.model(ids, output_hidden_states=True).hidden_states for m in (model.eval(), source)]
            found[weight, "distance"] = float(
                hidden_distance(*states, matched_states(model.config, source.config)).mean()
            )
    assert "hidden" not in found[0.0][0]
    logs = [entry for entry in found[30.0] if "hidden" in entry]
    assert logs[-1]["hidden"] < logs[0]["hidden"]
    assert found[30.0, "distance"] < found[0.0, "distance"]
    # the logged loss is the whole of it
    assert logs[0]["loss"] == pytest.approx(logs[0]["kl"] + 30 * logs[0]["hidden"] + logs[0]["router_loss"], rel=1e-3)


def test_accumulated_hidden_distance_is_that_of_one_batch(converted, source, tmp_path):
    found = []
    for accumulation in (1, 4):
        model = AutoModelForCausalLM.from_pretrained(converted)
        seen = {}

        def keep(optimizer, args, kwargs, model=model, seen=seen):
            seen.update({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})

        args = training_arguments(
            tmp_path, max_steps=1, max_grad_norm=0.0, gradient_accumulation_steps=accumulation,
            per_device_train_batch_size=4 // accumulation,
        )  # fmt: skip
        trainer = HealingTrainer(model=model, teacher=copy.deepcopy(source), args=args, train_dataset=text_blocks())
        trainer.create_optimizer().register_step_pre_hook(keep)
        trainer.train()
        found.append(seen)
    for name, gradient in found[0].items():
        assert (found[1][name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-9, name


def test_weights_of_a_schedule_follow_the_steps(converted, source, tmp_path):
    trainer = HealingTrainer(
        model=AutoModelForCausalLM.from_pretrained(converted), teacher=source, train_dataset=text_blocks(),
        args=training_arguments(tmp_path, max_steps=4), hidden_weight=Ramp(8.0, 0.0, 0.0, 0.5),
        distillation_weight=Ramp(1.0, 0.5),
    )  # fmt: skip
    trainer.train()
    logs = trainer.state.log_history
    assert ["hidden" in entry for entry in logs[:4]] == [True, True, False, False]


def test_every_parameter_moves_by_the_same_share(source):
    groups = relative_groups(source, 1e-2)
    assert {p for group in groups for p in group["params"]} == set(source.parameters())
    for group in groups:
        values = torch.cat([p.detach().flatten() for p in group["params"]])
        assert group["lr"] == pytest.approx(1e-2 * float(values.square().mean().sqrt()), rel=1e-4)
    queries = [layer.self_attn.q_proj.weight for layer in source.model.layers]
    assert any(list(map(id, group["params"])) == list(map(id, queries)) for group in groups)
    for weight in queries:
        weight.data.zero_()
    assert min(group["lr"] for group in relative_groups(source, 1e-2)) > 0


@pytest.mark.parametrize("kind", ["mor", "mod"])
def test_routing_comes_after_depth(kind, source_folder, source, tmp_path):
    fields = {"num_recursions": 2} if kind == "mor" else {"capacity": 0.5, "routing_unit": "attention"}
    convert(source_folder, tmp_path / kind, to=kind, quiet=True, **fields)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / kind)
    wanted = list(model.config.capacities)
    trainer = HealingTrainer(
        model=model, teacher=source, args=training_arguments(tmp_path, max_steps=10), train_dataset=text_blocks()
    )
    sample = text_blocks().blocks[:8].split(4)
    annealing = CapacityAnnealing(sample, begin=0.5, end=0.8)
    annealing.attach(trainer)
    seen = []
    model.register_forward_pre_hook(lambda m, args, kwargs: seen.append(sum(m.config.capacities)), with_kwargs=True)
    routers = model.model.routers.weight.detach().clone()
    trainer.train()
    training = seen[-10:] if kind == "mor" else [s for s in seen if s]
    assert training[0] == len(wanted) and training[-1] < len(wanted)
    assert sum(model.config.capacities) == pytest.approx(sum(annealing.wanted))
    assert not torch.equal(model.model.routers.weight, routers)
    with torch.no_grad():
        depth = model.eval()(text_blocks().blocks[:8], output_routing=True).routing_mask.float().mean()
    assert depth < 1


def test_started_routers_move_by_a_share_of_their_new_size(converted, source, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(converted)
    args = training_arguments(tmp_path, max_steps=8, learning_rate=1e-3, lr_scheduler_type="constant")
    trainer = HealingTrainer(model=model, teacher=source, args=args, train_dataset=text_blocks())
    CapacityAnnealing(text_blocks().blocks[:8].split(4), begin=0.5, end=0.5).attach(trainer)
    found = []
    weights = model.model.routers.weight, model.model.layers[0].mlp.up_proj.weight

    def measure():
        now = [w.detach().clone() for w in weights]
        rates = [g["lr"] for w in weights for g in trainer.optimizer.param_groups if any(p is w for p in g["params"])]
        found.append((now, rates))

    trainer.add_callback(AfterStep(measure))
    trainer.train()
    for number in range(2):
        size = float(found[4][0][number].square().mean().sqrt())
        # the first step with new weights moves each of them by about its rate
        assert found[4][1][number] == pytest.approx(1e-3 * size, rel=0.3)
        moved = (found[5][0][number] - found[4][0][number]).abs().max()
        assert 0 < moved < 3e-3 * size
    assert found[3][1][1] == found[4][1][1] and found[3][1][0] != found[4][1][0]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"gating": "weighted"}, "router_bias False"),
        ({"inference_rule": "predictor", "router_bias": True}, "only 'threshold'"),
    ],
)
def test_routers_that_cannot_be_started_learn_from_where_they_are(fields, said, source, tmp_path):
    torch.manual_seed(0)
    model = MoRForCausalLM(config(**fields))
    wanted = list(model.config.capacities)
    args = training_arguments(tmp_path, max_steps=4)
    trainer = HealingTrainer(model=model, teacher=source, args=args, train_dataset=text_blocks())
    annealing = CapacityAnnealing(text_blocks().blocks[:4].split(4))
    annealing.attach(trainer)
    assert said in annealing.not_started
    trainer.train()
    assert model.config.capacities == wanted and annealing.started


def test_what_anneals_itself_or_has_no_capacity_is_refused(source, tmp_path):
    for fields, said in (({"routing": "none"}, "has capacities to anneal"), ({"capacity_warmup_steps": 3}, "itself")):
        args = training_arguments(tmp_path, max_steps=1)
        trainer = HealingTrainer(
            model=MoRForCausalLM(config(**fields)), teacher=source, args=args, train_dataset=text_blocks()
        )
        with pytest.raises(ValueError, match=said):
            CapacityAnnealing([]).attach(trainer)
    with pytest.raises(ValueError, match="drive the states apart"):
        HealingTrainer(
            model=MoRForCausalLM(config()), teacher=source, args=training_arguments(tmp_path), hidden_weight=-1.0
        )
    for given in ({"weight_decay": 0.1}, {}):
        options = {} if given else {"optimizer_cls_and_kwargs": (torch.optim.SGD, {})}
        with pytest.raises(ValueError, match="would be ignored"):
            HealingTrainer(
                model=MoRForCausalLM(config()), teacher=source, args=training_arguments(tmp_path, **given), **options
            )


def test_layers_drawn_together_end_as_one(converted, source, tmp_path):
    shared = AutoModelForCausalLM.from_pretrained(converted)
    unrolled = copy.deepcopy(source)
    trainer = DistillationTrainer(
        model=unrolled, teacher=source, args=training_arguments(tmp_path, max_steps=10), train_dataset=text_blocks()
    )
    ProgressiveSharing(shared.config.physical_layers, end=0.7).attach(trainer)
    layers = unrolled.model.layers
    begin = (layers[1].mlp.up_proj.weight - layers[3].mlp.up_proj.weight).detach().norm()
    other = MoRForCausalLM(config(recursion_rank=2, routing="none"))
    with pytest.raises(ValueError, match="The models differ in model.layers"):
        load_shared(other, vanilla_of(other))
    with pytest.raises(ValueError, match=r"Layer 3 differs in .* from the layer that it is to be one with"):
        load_shared(shared, unrolled)
    distances = []

    def measure():
        distances.append(float((layers[1].mlp.up_proj.weight - layers[3].mlp.up_proj.weight).detach().norm() / begin))

    trainer.add_callback(AfterStep(measure))
    trainer.train()
    assert 0.7 < distances[0] < 1 and all(a >= b for a, b in zip(distances, distances[1:], strict=False))
    assert distances[6:] == [0.0] * 4
    load_shared(shared, unrolled)
    shared.config.capacities = [1.0, 1.0]
    ids = text_blocks().blocks[:2]
    with torch.no_grad():
        assert torch.equal(shared.eval()(ids).logits, unrolled.eval()(ids).logits)


def test_sharing_that_does_not_fit_is_refused(source, tmp_path):
    with pytest.raises(ValueError, match="0 <= begin < end <= 1"):
        ProgressiveSharing([0, 1], begin=0.5, end=0.5)
    trainer = DistillationTrainer(model=copy.deepcopy(source), teacher=source, args=training_arguments(tmp_path))
    with pytest.raises(ValueError, match="2 numbers for 6 layers"):
        ProgressiveSharing([0, 1]).attach(trainer)


def test_layers_are_one_when_a_clock_ends_the_training(source, tmp_path):
    unrolled = copy.deepcopy(source)
    trainer = DistillationTrainer(
        model=unrolled, teacher=source, args=training_arguments(tmp_path, max_steps=5), train_dataset=text_blocks(),
        clock=lambda: 0.5,
    )  # fmt: skip
    ProgressiveSharing(config().physical_layers, end=1.0).attach(trainer)
    trainer.train()
    for first, second in zip(
        unrolled.model.layers[1].parameters(), unrolled.model.layers[3].parameters(), strict=True
    ):
        assert torch.equal(first, second)


class AfterStep(TrainerCallback):
    def __init__(self, call):
        self.call = call

    def on_step_end(self, args, state, control, **kwargs):
        self.call()
