"""Task files for `lm_eval --include_path`: the recall tasks of JRT-Prompt."""
