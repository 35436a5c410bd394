"""lm-eval over compressed caches: a model, and tasks."""
