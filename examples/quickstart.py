"""One question, three ways: plain, terse, verbose. Runs on the demo model as it stands."""

import mlxsteer

model = mlxsteer.load("demo")
question = "Why do databases use indexes?"
for steer in (None, "terse:3", "terse:-3"):
    answer = model.generate(question, steer=steer, max_tokens=120)
    print(f"--- {steer or 'not steered'}: {len(answer.split())} words\n{answer}\n")
