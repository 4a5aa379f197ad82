"""Mixture-of-Depths (MoD, arXiv 2404.02258).

Identical to the backbone's vanilla model except: each routed layer, or its attention or its MLP alone, is passed by
only some tokens; the others stay on the residual stream. A router scores the tokens at the layer's input; in training
the top-k of a row enter, otherwise those that a causal rule lets in. Tokens that stay out cost nothing and store
nothing, and nobody attends to them in that layer.
"""

import torch
from transformers.generation import GenerationMixin

from ..configuration.configuration_mod import MoDConfig
from ..configuration.routed_config import RoutedPass
from .decoder_backbone import family_of
from .expert_choice import UNSET_THRESHOLD, ExpertChoice
from .generation_guard import RoutedGenerationGuard
from .heads import CausalLMHead, RoutedClassificationHead
from .layer_runner import LayerGroup
from .module_mixins import RoutedPart, route_part
from .remote_code import register_class_names
from .routed_model import RoutedForward, RoutedModel, RoutedPreTrainedModel
from .token_routing import activate, apply_gate, uniform_noise


class MoDPreTrainedModel(RoutedPreTrainedModel):
    config: MoDConfig


class DepthRouting(RoutedForward):
    """One forward pass through dense and routed layers."""

    def run(self, hidden_states: torch.Tensor) -> torch.Tensor:
        config = self.config
        self.choice = ExpertChoice(
            self.model,
            self.context,
            self.trace,
            self.losses,
            self.step,
            always_first=config.always_route_first,
            multiple=config.capacity_multiple,
        )
        self.gate, self.alpha = config.gate, config.router_alpha
        self.runner.recorder.state(hidden_states)
        *dense_before, dense_after = self.model.dense_groups
        for router, (dense, routed_pass) in enumerate(zip(dense_before, self.passes, strict=True)):
            if dense.layers:
                hidden_states = self.runner.run_dense(dense, hidden_states)
            hidden_states = self._run_routed(router, routed_pass, hidden_states)
        return self.runner.run_dense(dense_after, hidden_states)

    def _run_routed(self, router: int, routed_pass: RoutedPass, hidden_states: torch.Tensor) -> torch.Tensor:
        """x + g f(x) for the tokens that enter, x for the others (paper, equation 1)."""
        config = self.config
        gate, active = self._decide(router, routed_pass, hidden_states)
        self.trace.enter(router, active)
        group = self.model.routed_groups[router]
        training = self.model.training and config.training_path == "masked"
        masked = (self.context.is_static or training) and not routed_pass.always
        if masked:
            # zero for tokens that stay out, with the gate's gradient in training
            gate = active.float() if gate is None else torch.where(active, gate, gate - gate.detach())
        selection = None if masked or routed_pass.always else self.context.select(active)
        if routed_pass.unit != "block":
            part = RoutedPart(
                routed_pass.unit, gate, None if routed_pass.always else active, selection, computes_all=masked
            )
            return self.runner.run_part(group, hidden_states, part)

        def combine(output: torch.Tensor, pick) -> torch.Tensor:
            return output if gate is None else apply_gate("interpolate", pick(hidden_states), output, pick(gate))

        if routed_pass.always:
            return self.runner.run_dense(group, hidden_states, combine)
        if masked:
            return self.runner.run_masked(group, hidden_states, active, combine)
        if selection is None:
            self.runner.skip(1, hidden_states)
            return hidden_states
        return self.runner.run_selected(group, hidden_states, selection, combine)

    def _decide(
        self, router: int, routed_pass: RoutedPass, hidden_states: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Gates, fp32, `None` where all are 1, and who enters, both of shape `(batch, seq_len)`."""
        valid = self.context.valid
        if self.config.routing == "expert_choice":
            logits, active = self.choice.decide(router, routed_pass, hidden_states, valid)
            if self.gate == "straight_through" and not torch.is_grad_enabled():
                return None, active
            return activate(logits, self.gate, self.alpha), active
        if routed_pass.always:
            return None, valid
        if self.model.training:
            noise = torch.randn(valid.shape, device=valid.device)
            return None, self.choice.top_k(routed_pass, noise, valid)
        active = valid & (uniform_noise(self.context.position_ids, router) < routed_pass.share)
        return None, active if self.choice.forced is None else active | self.choice.forced


def _group(*layers: int) -> LayerGroup:
    return LayerGroup(layers, layers)


class MoDModel(RoutedModel, MoDPreTrainedModel):
    forward_class = DepthRouting
    built_fields = (
        "backbone", "num_hidden_layers", "routed_layers", "routing", "routing_unit", "router_bias",
        "capacity_warmup_steps", "predictor_hidden_size", "num_noop_experts",
    )  # fmt: skip
    editable_fields = (
        "capacity", "capacity_multiple", "gate", "router_alpha", "router_thresholds", "inference_rule", "ema_decay",
        "always_route_first", "training_path", "aux_loss_coef", "router_z_loss_coef", "compute", "compute_curve",
    )  # fmt: skip

    def __init__(self, config: MoDConfig):
        super().__init__(config)
        depth = config.num_hidden_layers
        self._begin_build(config, {layer: layer for layer in range(depth)})
        starts, ends = [0, *(layer + 1 for layer in config.routed_layers)], [*config.routed_layers, depth]
        self.dense_groups = [_group(*range(start, end)) for start, end in zip(starts, ends, strict=True)]
        self.routed_groups = [_group(layer) for layer in config.routed_layers]
        if config.num_routers:
            self._build_routers(1, 0, config.predictor_hidden_size or 0)
            if config.inference_rule == "ema_threshold":
                self._keep("threshold_ema", torch.empty(config.num_routers, dtype=torch.float32), UNSET_THRESHOLD)
        if config.routing_unit != "block":
            for layer in config.routed_layers:
                route_part(
                    self.layers[layer], config.routing_unit, family_of(config).norm_after.get(config.routing_unit)
                )
        self._end_build()


class MoDForCausalLM(RoutedGenerationGuard, CausalLMHead, MoDPreTrainedModel, GenerationMixin):
    def __init__(self, config: MoDConfig):
        super().__init__(config)
        self._build_head(MoDModel(config))


class MoDForSequenceClassification(RoutedClassificationHead, MoDPreTrainedModel):
    def __init__(self, config: MoDConfig):
        super().__init__(config)
        self._build_head(MoDModel(config))


MoDPreTrainedModel.remote_classes = {
    "AutoConfig": MoDConfig,
    "AutoModel": MoDModel,
    "AutoModelForCausalLM": MoDForCausalLM,
    "AutoModelForSequenceClassification": MoDForSequenceClassification,
}
register_class_names("mod", MoDPreTrainedModel.remote_classes)
