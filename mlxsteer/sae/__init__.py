"""Sparse autoencoders: dictionaries of features on a model's states, trained here or elsewhere.

`dictionary` is the arithmetic, `folder` the files, `shelf` their names; `corpus`, `chats` and
`activations` make the data, `objective`, `train`, `checkpoint` and `splice` learn and judge.
"""
