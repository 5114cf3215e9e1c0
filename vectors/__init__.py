"""Ready vectors, `<model>/<name>.safetensors`. Data only; `mlxsteer.library` finds it."""
