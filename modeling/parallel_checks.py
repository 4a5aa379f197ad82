"""What a model cannot divide among processes, said before it is divided."""

from typing import Any

from transformers.configuration_utils import PreTrainedConfig


class TensorParallelChecks:
    """Mixed into a model that `from_pretrained(distributed_config=...)` may divide by tensor parallelism."""

    def _resolve_parallel_plans(self, distributed_config: Any) -> Any:
        plans = super()._resolve_parallel_plans(distributed_config)
        check_tensor_parallel(self.config, distributed_config.tp_size or 1)
        return plans


def check_tensor_parallel(config: PreTrainedConfig, size: int) -> None:
    """Raises a `ValueError` if `size` processes cannot share the layers of this configuration."""
    if size == 1:
        return
    if getattr(config, "recursion_rank", 0):
        raise ValueError(
            f"`tp_size` is {size}, but the low-rank differences of each recursion (`recursion_rank` is "
            f"{config.recursion_rank}) cannot be divided; use FSDP (`fsdp_size`), which divides them too."
        )
    divided = {rule.rpartition(".")[2] for rule, style in config.base_model_tp_plan.items() if style == "colwise"}
    for projection, field in (("q_proj", "num_attention_heads"), ("k_proj", "num_key_value_heads")):
        heads = getattr(config, field)
        if projection in divided and heads % size:
            raise ValueError(
                f"`tp_size` is {size}, but `{field}` is {heads} and heads cannot be divided; use a size that divides "
                "them, or FSDP (`fsdp_size`)."
            )
