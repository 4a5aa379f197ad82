"""Stand-in for the common config values that `ConfigTester` sets and reads back; the sdist does not carry them.

Values differ from the defaults of `PreTrainedConfig`, so that a value that is dropped on the way shows.
"""

from transformers import PreTrainedConfig


_candidates = {
    "return_dict": False,
    "output_hidden_states": True,
    "output_attentions": True,
    "dtype": "float16",
    "chunk_size_feed_forward": 3,
    "architectures": ["SomeModel"],
    "id2label": {0: "no", 1: "yes"},
    "label2id": {"no": 0, "yes": 1},
    "problem_type": "single_label_classification",
}
_common = PreTrainedConfig()
config_common_kwargs = {key: value for key, value in _candidates.items() if hasattr(_common, key)}
