"""What every run of this package checks first, and callbacks that a checkpoint says nothing of."""

from types import SimpleNamespace

import pytest
from tiny_families import tiny_mor

from varidepth.cli.checkpoint_loading import load_teacher
from varidepth.conversion.errors import ConversionError
from varidepth.training import precision
from varidepth.training.healing import CapacityAnnealing
from varidepth.training.run_setup import hold_precision, refuse_several_gpus, refuse_sharding, world_size
from varidepth.training.time_limit import TimeLimitCallback


def test_several_gpus_in_one_process_are_refused():
    refuse_several_gpus(SimpleNamespace(n_gpu=1))
    with pytest.raises(ValueError, match="2 GPUs in one process would copy the model"):
        refuse_several_gpus(SimpleNamespace(n_gpu=2))


@pytest.mark.parametrize(("flag", "engine"), [("USE_FSDP", "FSDP"), ("USE_DEEPSPEED", "DeepSpeed")])
def test_engines_that_divide_weights_are_refused(flag, engine, monkeypatch):
    for other in ("USE_FSDP", "USE_DEEPSPEED"):
        monkeypatch.delenv(f"ACCELERATE_{other}", raising=False)
    refuse_sharding("Healing")
    monkeypatch.setenv(f"ACCELERATE_{flag}", "true")
    with pytest.raises(ValueError, match=f"Healing reads and sets whole weights, which {engine} divides"):
        refuse_sharding("Healing")


def test_arguments_alone_name_the_precision():
    args = hold_precision(SimpleNamespace(bf16=True, mixed_precision="no"))
    assert args.mixed_precision == "bf16"
    assert hold_precision(SimpleNamespace(bf16=False, mixed_precision="fp16")).mixed_precision == "no"


@pytest.mark.parametrize(("bfloat16", "faster"), [(1.0, True), (3.0, False)])
def test_the_faster_type_is_chosen(bfloat16, faster, monkeypatch):
    monkeypatch.setattr(precision.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(precision.torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr(precision, "_seconds", lambda dtype: bfloat16 if dtype == precision.torch.bfloat16 else 2.0)
    assert precision.bfloat16_is_faster() is faster


def test_processes_are_counted_by_the_launcher(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert world_size() == 1
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert world_size() == 3


@pytest.mark.parametrize(
    ("callback", "said"),
    [
        (CapacityAnnealing([]), "does not say whether its routers were started"),
        (TimeLimitCallback(1.0), "does not say how long its training took"),
    ],
)
def test_a_checkpoint_of_another_kind_of_run_is_refused(callback, said):
    with pytest.raises(ValueError, match=f"checkpoint of step 7 {said}"):
        callback.restore(None, 7)


def test_a_teacher_is_vanilla(tmp_path):
    tiny_mor().save_pretrained(tmp_path / "mor")
    with pytest.raises(ConversionError, match="is a MoR already"):
        load_teacher(tmp_path / "mor")
