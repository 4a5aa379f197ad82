"""Prompts that repeat their context (JRT-Prompt), their batches and their pipeline."""
