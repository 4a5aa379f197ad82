"""What a model cannot divide among processes, said before it is divided."""

from collections.abc import Mapping
from typing import Any

from transformers.configuration_utils import PreTrainedConfig


class TensorParallelChecks:
    """Mixed into a model that `from_pretrained(distributed_config=...)` may divide by tensor parallelism."""

    @classmethod
    def maybe_distribute_model(cls, model: Any, distributed_config: Any, *args: Any) -> Any:
        size = getattr(distributed_config, "tp_size", None) or 1
        given = getattr(distributed_config, "tp_plan", None)
        if size > 1:
            check_tensor_parallel(model.config, size, {**model.tp_plan, **(given if isinstance(given, dict) else {})})
        return super().maybe_distribute_model(model, distributed_config, *args)


def check_tensor_parallel(config: PreTrainedConfig, size: int, plan: Mapping[str, str] | None = None) -> None:
    """Raises a `ValueError` if `size` processes cannot share the layers of this configuration.

    Args:
        config: of the model.
        size: number of processes.
        plan: styles of transformers by module name; by default those of the configuration.
    """
    if size == 1:
        return
    instead = "use FSDP (`fsdp_size`), which divides them too"
    if getattr(config, "recursion_rank", 0):
        raise ValueError(
            f"`tp_size` is {size}, but the low-rank differences of each recursion (`recursion_rank` is "
            f"{config.recursion_rank}) cannot be divided; {instead}."
        )
    rules = config.base_model_tp_plan if plan is None else plan
    if getattr(config, "recursion_norms", False) and "replicated_with_grad_allreduce" in rules.values():
        raise ValueError(
            f"`tp_size` is {size}, but the norms of queries and keys of each recursion (`recursion_norms`) would each "
            f"learn from a part of the heads; {instead}."
        )
    divided = {rule.rpartition(".")[2] for rule, style in rules.items() if style == "colwise"}
    for projection, field in (("q_proj", "num_attention_heads"), ("k_proj", "num_key_value_heads")):
        heads = getattr(config, field)
        if projection in divided and heads % size:
            raise ValueError(
                f"`tp_size` is {size}, but `{field}` is {heads} and heads cannot be divided; use a size that divides "
                "them, or FSDP (`fsdp_size`)."
            )
