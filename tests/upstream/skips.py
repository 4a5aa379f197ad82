"""The one table of tests of transformers' own suite that our models do not pass, with the reason of each.

`EXPECTED_FAILURES` are tests that run and are allowed to fail; an entry whose test passes is reported as stale.
`SELF_SKIPS` are the reasons for which a test skips itself; one that matches none is reported, so that a test cannot
fall silent.
"""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Entry:
    """One expected failure.

    modes: names of the modes it holds for, () for all. below: first transformers version, as (5, 22), where it no
    longer holds. run: False for a test that would hang or disturb others. flaky: it may pass by chance and is then
    not stale.
    """

    reason: str
    modes: tuple[str, ...] = ()
    below: tuple[int, int] | None = None
    run: bool = True
    flaky: bool = False


MOR_MODES = ("plain", "expert_threshold", "expert_predictor", "expert_shared_kv", "relaxed", "token_choice")
MOD_MODES = ("mod_attention", "mod_block")
JRT_MODES = ("jrt_prefix", "jrt_causal", "jrt_recurrent")

# The multi-process cases take minutes per mode. These modes stand for all: routed cache with routers, layers with a
# mixed-in class, whose key and value projections are switched off, and recurrent layers.
DISTRIBUTED_MODES = ("expert_threshold", "expert_shared_kv", "jrt_prefix")

# Test name (a parameterised test without its suffix counts for all) -> entry.
EXPECTED_FAILURES: dict[str, Entry] = {
    "test_num_layers_is_small": Entry(
        "at most 2 layers are allowed; prelude, two recursions of one shared layer and coda are 4",
        modes=MOR_MODES,
    ),
    "test_training_gradient_checkpointing_use_reentrant_true": Entry(
        "refused with a remedy: reentrant checkpointing cannot carry the gradient of shared keys and values, of the "
        "gate of a part of a layer",
        modes=("expert_shared_kv", "mod_attention"),
    ),
    "test_eager_matches_batched_and_grouped_inference": Entry(
        "the class can have experts (MoDE, see tests/test_mod_experts.py), the backbone of these modes has none",
        modes=MOD_MODES,
    ),
    "test_bc_cache_name_forward": Entry(
        "`past_key_values` gives no warning, as it is what `generate` passes below transformers 5.24; both names are "
        "tested in tests/test_cache_naming.py",
        modes=MOR_MODES + MOD_MODES + JRT_MODES,
    ),
    "test_attention_outputs": Entry(
        "attention weights are those of the sliding-window layers, not one for each layer",
        modes=("jrt_prefix", "jrt_causal"),
    ),
    "test_training_overfit": Entry(
        "generates from one token, but the tokens of the prefix in training are read, not learned",
        modes=("jrt_prefix", "jrt_recurrent"),
        flaky=True,
    ),
    "test_model_rope_scaling_from_config": Entry("no layer of this mode has positions", modes=("jrt_recurrent",)),
}

# Regular expression on the reason that the test gives -> why it does not concern us.
SELF_SKIPS: dict[str, str] = {
    r"is not in `self.pipeline_model_mapping`": "pipeline of another kind of model",
    r"`run_pipeline_test` is currently not implemented": "pipeline of another kind of model",
    r"test requires (Timm|PyTesseract|av)$": "pipeline of another kind of model",
    r"test requires (multiple )?(an )?accelerator|test requires MPS": "needs an accelerator",
    r"[Tt]est requires (the )?(Flash Attention|kernels|deepspeed|torchao)": "needs a package for accelerators",
    r"Need at least \d+ FSDP workers": "needs more processor cores",
    r"Not a prioritized model for now": "transformers 5.18 to 5.22 run it only for files with its copyright line",
    r"No usage of the `capture_outputs` decorator": "outputs are recorded by the model itself",
    r"Cannot capture hidden states": "outputs are recorded by the model itself",
    r"test is slow": "marked slow by transformers",
    r"[Nn]ot (a )?composite|No subconfigs so|composite model": "models made of several models",
    r"sequence-to-sequence language modeling head": "encoder-decoder models",
    r"no sparse experts|[Nn]ot an MoE model|does not support grouped_mm": "mixture-of-experts models",
    r"`output_router_logits` in its config": "mixture-of-experts models",
    r"expert.parallel plan": "mixture-of-experts models",
    r"No conversion found": "checkpoints that are renamed on load",
    r"_keep_in_fp32_modules": "models that keep modules in fp32",
    r"does not have position embeddings": "models with learned positions",
    r"does not have partial rope|no axial RoPE": "other kinds of rotary embedding",
    r"does not support sliding window": "models with a sliding window",
    r"does not support SDPA$": "models made of several models",
    r"[Dd]oes not (output|support) attentions$": "layers without attention weights",
    r"does not support output_attentions": "sdpa returns no attention weights",
    r"Feature chunking": "models with feed-forward chunking",
}


def mode_of(test_class: str) -> str:
    """`MoRTokenChoiceTest` -> `token_choice`; `MoDBlockTest` -> `mod_block`; `VanillaTest` -> `vanilla`."""
    name = test_class.removeprefix("MoR").replace("MoD", "Mod").replace("JRT", "Jrt").removesuffix("Test")
    return re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()


def find(test_class: str, test: str, version: str) -> Entry | None:
    """The entry for a test under the given transformers version, if the table has one."""
    major_minor = tuple(int(part) for part in version.split(".")[:2])
    for name, entry in EXPECTED_FAILURES.items():
        named = test == name or re.fullmatch(re.escape(name) + r"_\d.*", test) is not None
        concerned = not entry.modes or mode_of(test_class) in entry.modes
        if named and concerned and (entry.below is None or major_minor < entry.below):
            return entry
    return None


def is_left_out(test_class: str, test: str) -> bool:
    """Whether the test starts processes in a mode that the default run leaves out."""
    starts_processes = re.match(r"test_(fsdp2|hsdp|tp_(forward|backward|generation))", test) is not None
    return starts_processes and mode_of(test_class) not in DISTRIBUTED_MODES


def self_skip(reason: str) -> str | None:
    """Why a test that skipped itself with this reason does not concern us, None if the table does not know it."""
    return next((why for pattern, why in SELF_SKIPS.items() if re.search(pattern, reason)), None)
