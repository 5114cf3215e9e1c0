"""A vector of your own from a few contrasting instructions, calibrated, used and saved."""

import mlxsteer

contrast = mlxsteer.ContrastSet.from_dict(
    {
        "name": "thrilled",
        "description": "Thrilled by everything, against bored by everything.",
        "labels": {"positive": "thrilled", "negative": "bored"},
        "combine": "append",
        "questions": ["What is a good weekend?", "Describe a morning.", "What makes a good home?"],
        "positive": ["Sound thrilled and amazed!", "Answer as on the best day of your life!"],
        "negative": ["Sound tired and bored.", "Answer as if nothing could interest you."],
        "held_out": ["What should I do today?", "What do you hear outside?"],
        "metric": {"name": "regex_rate", "pattern": "!"},
    }
)

model = mlxsteer.load("demo")
thrilled = model.calibrate(model.extract(contrast, pairs=6), questions=contrast.held_out)
print(model.plan(thrilled * 3).explain())
for strength in (3, -3):
    answer = model.generate("What should I do today?", steer=thrilled * strength, max_tokens=60)
    print(f"--- {strength:+}\n{answer}")
print("saved to", thrilled.save("thrilled.safetensors"))
