"""Distillation from a source model, text blocks and callbacks for the Trainer."""
