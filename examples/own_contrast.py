"""A vector of your own from a few contrasting instructions, calibrated, used and saved."""

import mlxsteer

contrast = mlxsteer.ContrastSet.from_dict(
    {
        "name": "rural",
        "description": "Farm life, against city life.",
        "labels": {"positive": "country", "negative": "city"},
        "combine": "append",
        "questions": ["What is a good weekend?", "Describe a morning.", "What makes a good home?"],
        "positive": ["Answer like a farmer.", "Think of fields, barns and animals."],
        "negative": ["Answer like an office worker.", "Think of streets, shops and traffic."],
        "held_out": ["What should I do today?", "What do you hear outside?"],
        "metric": {"name": "regex_rate", "pattern": r"\b(farm|field|animal|barn|garden)\w*"},
    }
)

model = mlxsteer.load("demo")
rural = model.calibrate(model.extract(contrast, pairs=6), questions=contrast.held_out)
print(model.plan(rural * 4).explain())
print(model.generate("What should I do today?", steer=rural * 4, max_tokens=80))
print("saved to", rural.save("rural.safetensors"))
