"""Mixture-of-Recursions (MoR, arXiv 2507.10524).

Identical to the backbone's vanilla model except: the layers between prelude and coda form recursive blocks that are
applied up to `num_recursions` times; a router decides per token how deep it goes; the tokens of a recursion are
gathered into a compact batch, and its KV cache slots hold only them.

Different from the official code: selection outside training is causal, pads never compete or enter, the router's
losses do not grow with gradient accumulation, and key and value projections are really skipped when they are shared.
"""

import torch
from torch import nn
from transformers.generation import GenerationMixin

from ..configuration.backbone_config import first_uses
from ..configuration.configuration_mor import ROUTER_TYPES, MoRConfig, RecursiveBlock
from .depth_cache import SharedKeyValues
from .expert_choice import ExpertChoice
from .generation_guard import RoutedGenerationGuard
from .heads import CausalLMHead, RoutedClassificationHead
from .layer_runner import Combine, LayerGroup, Pick
from .module_mixins import share_key_values
from .process_ranks import sum_over_ranks
from .recursion_parameters import RecursionAdapter, vary_by_recursion
from .remote_code import register_class_names
from .routed_model import RoutedForward, RoutedModel, RoutedPreTrainedModel
from .router_loss import balancing_loss, z_loss
from .token_routing import Selection, activate, apply_gate


class MoRPreTrainedModel(RoutedPreTrainedModel):
    config: MoRConfig

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, RecursionAdapter):
            module.reset_parameters(self.config.initializer_range)
        else:
            super()._init_weights(module)


def _layer_groups(block: RecursiveBlock, config: MoRConfig) -> list[LayerGroup]:
    """The layers and cache slots of each recursion of a block."""
    groups = []
    for r in range(config.num_recursions):
        start = block.start + r * len(block.layers)
        slots = tuple(range(start, start + len(block.layers)))
        groups.append(LayerGroup(block.layers, slots, r, {"recursion": r} if config.varies_by_recursion else {}))
    return groups


class Recursion(RoutedForward):
    """One forward pass through prelude, recursive blocks and coda."""

    def run(self, hidden_states: torch.Tensor) -> torch.Tensor:
        config = self.config
        prelude = tuple(range(config.prelude_layers))
        coda = range(config.coda_layers)
        self.runner.recorder.state(hidden_states)
        hidden_states = self.runner.run_dense(LayerGroup(prelude, prelude), hidden_states)
        run_block = self._token_choice if config.routing == "token_choice" else self._expert_choice
        if config.routing == "expert_choice":
            self.choice = ExpertChoice(self.model, self.context, self.trace, self.losses, self.step)
        for number, block in enumerate(self.model.blocks):
            hidden_states = run_block(number, block, hidden_states)
        first_layer = config.num_physical_layers - config.coda_layers
        first_slot = config.num_hidden_layers - config.coda_layers
        group = LayerGroup(tuple(first_layer + i for i in coda), tuple(first_slot + i for i in coda))
        return self.runner.run_dense(group, hidden_states)

    def _expert_choice(self, number: int, block: list[LayerGroup], hidden_states: torch.Tensor) -> torch.Tensor:
        """Recursions with hierarchical filtering: only tokens that entered one compete for the next (section 2.2.1).

        `routing="none"` is the case without routers.
        """
        config = self.config
        shared = self._new_shared()
        active = self.context.valid
        selection: Selection | None = None
        for r, group in enumerate(block):
            combine: Combine | None = None
            if config.routing == "expert_choice":
                router = number * len(block) + r
                logits, active = self.choice.decide(router, self.passes[router], hidden_states, active, selection)
                gate = activate(logits, config.router_activation, config.router_alpha)
                combine = self._gated_by(hidden_states, gate)
            ended, selection, hidden_states = self._recur(number, group, active, hidden_states, combine, shared)
            if ended:
                self.runner.skip(sum(len(skipped.slots) for skipped in block[r:]), hidden_states)
                break
        return hidden_states

    def _token_choice(self, number: int, block: list[LayerGroup], hidden_states: torch.Tensor) -> torch.Tensor:
        """Every token chooses its depth at the block's entry and is gated once, where it leaves (section 2.2.1).

        As in the official code, the states in between are not gated (equation 2.2 of the paper gates each).
        """
        config, valid = self.config, self.context.valid
        entry = hidden_states
        logits = self.model.routers(entry, number).to(entry.device)
        self.trace.record(number, logits, valid)
        probabilities = activate(logits, config.router_activation, 1.0)
        loss_free = config.balancing == "loss_free"
        choice = (probabilities + self.model.balancing_bias[number] if loss_free else probabilities).argmax(dim=-1)
        gate = config.router_alpha * probabilities.gather(-1, choice.unsqueeze(-1)).squeeze(-1)
        if self.model.training:
            self.losses.add(z_loss(logits), valid, config.router_z_loss_coef)
            if loss_free:
                self._move_balancing_bias(number, choice)
            else:
                self.losses.add(balancing_loss(probabilities, choice, valid), valid, config.balancing_coef)
        shared = self._new_shared()
        leave = self._gated_by(entry, gate)
        for r, group in enumerate(block):
            here = (choice == r).unsqueeze(-1)

            def combine(update: torch.Tensor, pick: Pick, here: torch.Tensor = here) -> torch.Tensor:
                return torch.where(pick(here), leave(update, pick), update)

            ended, _, hidden_states = self._recur(number, group, valid & (choice >= r), hidden_states, combine, shared)
            if ended:
                self.runner.skip(sum(len(skipped.slots) for skipped in block[r:]), hidden_states)
                break
        return hidden_states

    def _recur(
        self,
        number: int,
        group: LayerGroup,
        active: torch.Tensor,
        hidden_states: torch.Tensor,
        combine: Combine | None,
        shared: SharedKeyValues | None,
    ) -> tuple[bool, Selection | None, torch.Tensor]:
        """Applies one recursion of block `number` to the active tokens.

        Returns:
            Whether no token entered, so that the block ends; the selection, `None` where all tokens were computed; and
            the new stream.
        """
        selection = None
        number = number * self.config.num_recursions + group.recursion
        if self.passes[number].always:
            hidden_states = self.runner.run_dense(group, hidden_states, combine, shared)
        elif self.context.is_static:
            hidden_states = self.runner.run_masked(
                group, hidden_states, active, _kept_where_inactive(active, hidden_states, combine), shared
            )
        else:
            selection = self.context.select(active)
            if selection is None:
                return True, None, hidden_states
            hidden_states = self.runner.run_selected(group, hidden_states, selection, combine, shared)
        self.trace.enter(number, active)
        return False, selection, hidden_states

    def _gated_by(self, residual: torch.Tensor, gate: torch.Tensor) -> Combine:
        gating = self.config.gating
        return lambda update, pick: apply_gate(gating, pick(residual), update, pick(gate))

    def _new_shared(self) -> SharedKeyValues | None:
        return SharedKeyValues(self.runner.cache) if self.config.kv_mode == "shared" else None

    @torch.no_grad()
    def _move_balancing_bias(self, number: int, choice: torch.Tensor) -> None:
        """b_i += u sign(mean load - load_i), over all ranks (paper, section 3.2; loss-free balancing)."""
        load = torch.bincount(choice[self.context.valid], minlength=self.config.num_recursions).float()
        load = sum_over_ranks(load)
        bias = self.model.balancing_bias[number]
        bias.add_(self.config.balancing_update_rate * (load.mean() - load).sign())


def _kept_where_inactive(active: torch.Tensor, hidden_states: torch.Tensor, combine: Combine) -> Combine:
    def keep(update: torch.Tensor, pick: Pick) -> torch.Tensor:
        return torch.where(active.unsqueeze(-1), combine(update, pick).to(hidden_states.dtype), hidden_states)

    return keep


class MoRModel(RoutedModel, MoRPreTrainedModel):
    forward_class = Recursion
    built_fields = (
        "backbone", "num_hidden_layers", "num_recursions", "sharing", "prelude_layers", "coda_layers", "routing",
        "router_type", "router_bias", "balancing", "kv_mode", "capacity_warmup_steps", "recursion_rank",
        "recursion_norms",
    )  # fmt: skip
    editable_fields = (
        "capacities", "router_thresholds", "inference_rule", "gating", "router_activation", "router_alpha",
        "aux_loss_coef", "router_z_loss_coef", "balancing_coef", "balancing_update_rate", "compute", "compute_curve",
    )  # fmt: skip

    def __init__(self, config: MoRConfig):
        super().__init__(config)
        self._begin_build(config, first_uses(config.physical_layers))
        self.blocks = [_layer_groups(block, config) for block in config.recursive_blocks]
        if config.routing != "none":
            inner_size = ROUTER_TYPES[config.router_type] * config.hidden_size
            outputs = 1 if config.routing == "expert_choice" else config.num_recursions
            self._build_routers(outputs, inner_size, inner_size)
        if config.routing == "token_choice" and config.balancing == "loss_free":
            shape = len(self.blocks), config.num_recursions
            self._keep("balancing_bias", torch.empty(shape, dtype=torch.float32), 0)
        recursive_layers = [self.layers[layer] for block in config.recursive_blocks for layer in block.layers]
        shares_kv = config.kv_mode == "shared"
        if config.varies_by_recursion:
            vary_by_recursion(
                self.layers,
                recursive_layers,
                config.num_recursions,
                rank=config.recursion_rank,
                norms=config.recursion_norms,
                reads_shared_kv=shares_kv,
            )
        if shares_kv:
            share_key_values(recursive_layers)
        self._end_build()


class MoRForCausalLM(RoutedGenerationGuard, CausalLMHead, MoRPreTrainedModel, GenerationMixin):
    def __init__(self, config: MoRConfig):
        super().__init__(config)
        self._build_head(MoRModel(config))


class MoRForSequenceClassification(RoutedClassificationHead, MoRPreTrainedModel):
    def __init__(self, config: MoRConfig):
        super().__init__(config)
        self._build_head(MoRModel(config))


MoRPreTrainedModel.remote_classes = {
    "AutoConfig": MoRConfig,
    "AutoModel": MoRModel,
    "AutoModelForCausalLM": MoRForCausalLM,
    "AutoModelForSequenceClassification": MoRForSequenceClassification,
}
register_class_names("mor", MoRPreTrainedModel.remote_classes)
