"""Vectors are values: scale, negate, add and compare them, and look inside a forward pass."""

import numpy as np

import mlxsteer

model = mlxsteer.load("demo")
terse, formal = model.extract("terse", pairs=16), model.extract("formal", pairs=16)
mix = 2 * terse - formal
print(f"cosine of terse and formal: {terse @ formal:.2f}; of the mix with terse: {mix @ terse:.2f}")
print(model.plan(mix).explain())

tokens = model.render("What is gravity?")
states = model.capture(tokens, sites=["residual"])["residual"]  # [layers, tokens, width]
layer = terse.layers[-1]
reading = np.array(states[layer, -1]) @ terse.directions[layer]
print(f"the last prompt token reads {reading:.1f} along terse at layer {layer}")
change = np.array(model.logits(tokens, steer=terse * 3)[-1] - model.logits(tokens)[-1])
print(f"terse:3 moves the next token's logits by up to {np.abs(change).max():.2f}")
