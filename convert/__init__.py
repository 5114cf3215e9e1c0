"""Official DeepSeek-V4-Flash weights to MLX: lossless or small, streamed, resumable, checked.

    from mlxsteer.convert.open_source import open_source
    from mlxsteer.convert.plan import make_plan
    from mlxsteer.convert.recipe_file import load_recipe
    from mlxsteer.convert.run import convert

Imports point one way: `headers`, `layout`, `formats`, `recipes` are data; `plan` and `sizes` are
arithmetic on them; `sources` and `hub` give files; `reader`, `decode`, `quantise`, `produce`,
`shard_file` turn them into shards; `run` does it all, with `journal`, `space` and `finish`.
`verify`, `collect` and `upload` stand beside it.
"""
