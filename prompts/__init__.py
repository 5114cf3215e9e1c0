"""Contrast sets: one YAML file per trait. Data only; `mlxsteer.contrast` reads it."""
