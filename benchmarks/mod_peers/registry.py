"""Which implementations there are, which adapters run them, and what could not be run."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Implementation:
    """One repository.

    Attributes:
        repository: owner and name on GitHub; empty for this project.
        adapters: `module:class` under `adapters`, one column each.
        needs_folder: it is imported from a checkout, not from an installed package.
    """

    repository: str
    adapters: tuple[str, ...]
    needs_folder: bool = True


IMPLEMENTATIONS: dict[str, Implementation] = {
    "astramind": Implementation("astramind-ai/Mixture-of-depths", ("astramind:Astramind",)),
    "router-tuning": Implementation(
        "CASE-Lab-UMD/Router-Tuning-Mixture-of-Depths",
        ("router_tuning:RouterTuning", "router_tuning:RouterTuningToken"),
    ),
    "mindskip": Implementation("Shwai-He/Router-Tuning", ("mindskip:MindSkip",)),
    "sramshetty": Implementation("sramshetty/mixture-of-depths", ("sramshetty:Sramshetty",)),
    "llm-baselines": Implementation("epfml/llm-baselines", ("gpt:LlmBaselines",)),
    "nanomod": Implementation("EduardoPach/nanoMoD", ("gpt:NanoMod",)),
    "soft-routers": Implementation("NijatZeynalov/mixture-of-depths-routers-llama", ("soft_routers:SoftRouters",)),
    "kyegomez": Implementation("kyegomez/Mixture-of-Depths", ("single_layer:Kyegomez",)),
    "mixture-ai": Implementation("Mixture-AI/Mixture-of-Depths", ("single_layer:MixtureAI",)),
    "infini": Implementation("dingo-actual/infini-transformer", ("infini:Infini",)),
    "paulilioaica": Implementation("paulilioaica/Mixture-Of-Depths", ("toy:Paulilioaica",)),
    "codedestructor56": Implementation(
        "Codedestructor56/Mixture-Of-Depths-with-Decoder-only-architecture", ("toy:Codedestructor",)
    ),
    "varidepth": Implementation("", ("varidepth_mod:Varidepth",), needs_folder=False),
}

# repository, commit, why it has no column
NOT_RUN: tuple[tuple[str, str, str], ...] = (
    (
        "dtunai/Mixture-of-Depths-Jax",
        "6ff2b57043ad3a50e432739688cecbe9a86e8cb8",
        "its only block uses `Attention`, `FeedForward` and `RMSNorm`, which no file of it defines",
    ),
)
