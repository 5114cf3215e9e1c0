"""The limits of a vector: the last coherent dose before the first that is not, for each sign."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from mlxsteer import library, trials
from mlxsteer.calibrate import DOSES as DEFAULT_DOSES
from mlxsteer.calibrate import Guard, calibrate, held_out_of
from mlxsteer.cli import main
from mlxsteer.contrast import ContrastSet
from mlxsteer.errors import UsageError, VectorError
from mlxsteer.model import Model
from mlxsteer.trials import Arm
from mlxsteer.vector import DEFAULT_DELTA, SteeringVector
from tests.tiny_models import HIDDEN

Curve = Callable[[float], dict[str, float]]
FINE: dict[str, float] = {"words": 30.0, "distinct2": 0.9, "perplexity": 2.0}
# Not the defaults, which are a matter of measurement.
DOSES = (0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0, 1.3)
GUARD = Guard(perplexity_ratio=3.0, distinct2_ratio=0.5, words=2.0)
ASKED: dict[str, Any] = {"doses": DOSES, "guard": GUARD, "show_progress": False}


pytestmark = pytest.mark.usefixtures("own_folders")


def push(name: str = "push", **fields: Any) -> SteeringVector:
    arrays = {layer: np.random.default_rng(layer).normal(size=HIDDEN) for layer in (1, 2)}
    return SteeringVector.from_arrays(arrays, name=name, n_layers=4, **fields)


def answering(monkeypatch: pytest.MonkeyPatch, curve: Curve) -> list[dict[str, Any]]:
    """Every trial from now on follows `curve`: dose to figures. Returns the calls made."""
    calls: list[dict[str, Any]] = []

    def run(model: Any, questions: Any, steerings: Any, metric: Any, **options: Any) -> list[Arm]:
        calls.append({"questions": questions, "steerings": steerings, **options})
        arms = []
        for dose, _ in steerings:
            figures = FINE | curve(dose)
            arms.append(Arm(amount=dose, metric=figures["words"], ended=1.0, **figures))
        return arms

    monkeypatch.setattr(trials, "run", run)
    return calls


def breaks(plus: float, minus: float, **how: float) -> Curve:
    """Coherent below `plus` and above `-minus`; elsewhere the figures `how`."""
    figures = how or {"perplexity": 100.0}
    return lambda dose: figures if dose >= plus or dose <= -minus else {}


def limits(model: Model, **options: Any) -> tuple[float, float]:
    found = calibrate(model, push(), **ASKED | options).calibration
    assert found is not None
    return found.delta_plus, found.delta_minus


def test_each_sign_has_the_last_coherent_dose_before_its_own_first_failure(tiny, monkeypatch):
    answering(monkeypatch, breaks(plus=0.4, minus=0.8))
    assert limits(tiny) == (0.3, 0.6)


def test_doses_that_recover_beyond_a_failure_do_not_count(tiny, monkeypatch):
    answering(monkeypatch, lambda dose: {"perplexity": 100.0} if 0.25 < dose < 0.5 else {})
    assert limits(tiny) == (0.25, max(DOSES))


@pytest.mark.parametrize(
    "sign_of_failure", [{"perplexity": 6.1}, {"distinct2": 0.4}, {"words": 1.9}]
)
def test_each_part_of_the_guard_alone_ends_coherence(tiny, monkeypatch, sign_of_failure):
    answering(monkeypatch, breaks(plus=0.5, minus=0.2, **sign_of_failure))
    assert limits(tiny) == (0.4, 0.15)


def test_the_guards_bounds_are_the_callers(tiny, monkeypatch):
    answering(monkeypatch, breaks(plus=0.5, minus=0.2, perplexity=7.0))
    assert limits(tiny, guard=replace(GUARD, perplexity_ratio=4)) == (max(DOSES), max(DOSES))


def test_no_answer_at_all_is_not_coherent(tiny, monkeypatch):
    answering(monkeypatch, breaks(plus=0.3, minus=0.3, perplexity=float("inf")))
    assert limits(tiny) == (0.25, 0.25)


@pytest.mark.parametrize(("plus", "minus", "dose"), [(0.0, 9, r"\+0.1"), (9, 0.05, "-0.1")])
def test_a_vector_that_breaks_at_its_smallest_dose_is_refused(tiny, monkeypatch, plus, minus, dose):
    answering(monkeypatch, lambda d: breaks(plus, minus)(d) if d else {})
    with pytest.raises(VectorError, match=f"'push' breaks the output at its smallest dose .{dose}"):
        limits(tiny)


def test_strength_five_is_then_the_limit_of_its_sign(tiny, monkeypatch):
    answering(monkeypatch, breaks(plus=0.4, minus=0.8))
    vector = calibrate(tiny, push(), **ASKED)
    for text, dose in (("5", 0.3), ("-5", -0.6), ("1", 0.06), ("-2.5", -0.3)):
        [term] = tiny.plan([(vector, text)]).terms
        assert term.dose == pytest.approx(dose)
    [term] = tiny.plan(-vector * 5).terms
    assert term.dose == pytest.approx(0.6)


def test_a_few_doses_and_the_unsteered_run_are_one_call(tiny, monkeypatch):
    calls = answering(monkeypatch, breaks(plus=0.4, minus=0.4))
    calibrate(tiny, push(), doses=(0.2, 0.1), max_tokens=17, show_progress=False)
    [call] = calls
    assert [dose for dose, _ in call["steerings"]] == [0.0, -0.1, -0.2, 0.1, 0.2]
    assert [plan.terms[0].dose for _, plan in call["steerings"][1:]] == [-0.1, -0.2, 0.1, 0.2]
    assert not call["steerings"][0][1]
    assert call["max_tokens"] == 17


def test_a_sign_that_failed_is_not_taken_further(tiny, monkeypatch):
    calls = answering(monkeypatch, breaks(plus=0.2, minus=0.6))
    calibrate(tiny, push(), **ASKED)
    doses = [[dose for dose, _ in call["steerings"]] for call in calls]
    assert max(doses[0]) == 0.25
    assert all(dose < 0 for call in doses[1:] for dose in call)
    assert min(min(call) for call in doses) == -0.6


def test_a_multiple_is_calibrated_as_the_vector_itself(tiny, monkeypatch):
    calls = answering(monkeypatch, breaks(plus=0.4, minus=0.4))
    vector = calibrate(tiny, 3 * push(), **ASKED)
    assert vector.gain == 1
    assert calls[0]["steerings"][-1][1].terms[0].dose == DOSES[3]


def test_questions_are_held_out_ones_unless_given(tiny, monkeypatch):
    calls = answering(monkeypatch, breaks(plus=0.4, minus=0.4))
    of_set = replace(push(), about={"contrast_set": "french"})
    calibrate(tiny, of_set, n_questions=3, show_progress=False)
    assert calls[0]["questions"] == list(ContrastSet.load("french").held_out[:3])
    own = [f"w{index}" for index in range(12)]
    calibrate(tiny, of_set, questions=own, show_progress=False)
    assert calls[-1]["questions"] == own
    unknown = replace(of_set, about={"contrast_set": "not-here"})
    assert held_out_of(unknown) == held_out_of(replace(of_set, about={"contrast_set": "terse"}))


def test_what_has_no_limit_or_no_dose_is_refused(tiny):
    with pytest.raises(UsageError, match="'push' is a projection"):
        calibrate(tiny, push(op="project"))
    for doses in ((), (0.1, 0.0), (-0.1,)):
        with pytest.raises(UsageError, match="Doses to try must be above 0"):
            calibrate(tiny, push(), doses=doses)


def test_a_vector_of_another_architecture_is_refused_unless_forced(tiny, monkeypatch):
    answering(monkeypatch, breaks(plus=0.4, minus=0.4))
    foreign = push(model={"architecture": "gemma2"})
    with pytest.raises(VectorError, match="was made on a gemma2 model"):
        calibrate(tiny, foreign, show_progress=False)
    assert calibrate(tiny, foreign, force=True, show_progress=False).calibration is not None


def test_how_it_was_found_travels_in_the_file(tiny, monkeypatch, tmp_path):
    answering(monkeypatch, breaks(plus=0.4, minus=0.8, perplexity=float("inf")))
    vector = calibrate(tiny, push(), **ASKED)
    read_back = SteeringVector.load(vector.save(tmp_path / "v.safetensors")).calibration
    assert read_back is not None
    assert (read_back.delta_plus, read_back.delta_minus) == (0.3, 0.6)
    assert read_back.guard["perplexity_ratio"] == 3.0
    assert [row["amount"] for row in read_back.curve] == sorted(
        [0.0, *DOSES[:8], *(-dose for dose in DOSES)]
    )
    json.dumps([dict(row) for row in read_back.curve], allow_nan=False)


def test_it_runs_for_real_on_a_tiny_model(tiny):
    loose = Guard(perplexity_ratio=1e9, distinct2_ratio=0, words=0)
    vector = calibrate(
        tiny,
        push(),
        questions=["w1 w2", "w3"],
        doses=(0.05, 0.1),
        max_tokens=8,
        guard=loose,
        show_progress=False,
    )
    assert vector.calibration is not None
    assert vector.calibration.delta_plus == 0.1
    assert len(vector.calibration.curve) == 5


# --- the command ----------------------------------------------------------------------------


def command(folder: Path, *arguments: str) -> Any:
    doses = [] if "--doses" in arguments else ["--doses", ",".join(map(str, DOSES))]
    return CliRunner().invoke(main, ["calibrate", *arguments, *doses, "--model", str(folder)])


def test_the_command_writes_the_limits_into_the_users_vector(folder, monkeypatch):
    answering(monkeypatch, breaks(plus=0.4, minus=0.8, perplexity=float("inf")))
    path = library.save(push(), "tiny")
    dry = command(folder, "push", "--dry-run")
    assert "nothing was written" in dry.stdout
    assert SteeringVector.load(path).calibration is None
    result = command(folder, "push")
    assert result.exit_code == 0, result.output
    assert "coherent up to dose 0.3 (strength 5) and 0.6 (strength -5)" in result.stdout
    assert SteeringVector.load(path).delta(1) == 0.3
    values = json.loads(command(folder, "push", "--json", "--doses", "0.1,0.3").stdout)
    assert (values["delta_plus"], values["delta_minus"]) == (0.3, 0.3)


def test_a_bundled_vector_is_copied_and_a_file_is_written_where_it_lies(
    folder, monkeypatch, tmp_path
):
    answering(monkeypatch, breaks(plus=0.4, minus=0.8, perplexity=float("inf")))
    monkeypatch.setattr(library, "bundled_dir", lambda key: tmp_path / "bundled" / key)
    bundled = push().save(tmp_path / "bundled/tiny/push.safetensors")
    assert command(folder, "push").exit_code == 0
    assert SteeringVector.load(bundled).calibration is None
    assert SteeringVector.load(library.user_dir("tiny") / "push.safetensors").delta(-1) == 0.6
    monkeypatch.setenv("HOME", str(tmp_path))
    push().save(tmp_path / "own.safetensors")
    assert command(folder, "~/own.safetensors").exit_code == 0
    assert SteeringVector.load(tmp_path / "own.safetensors").calibration is not None


def test_a_hub_vector_keeps_its_name_behind_the_colon(folder, monkeypatch, tmp_path):
    from mlxsteer import hubvectors

    answering(monkeypatch, breaks(plus=0.4, minus=0.8))
    pulled = push().save(tmp_path / "pulled.safetensors")
    monkeypatch.setattr(hubvectors, "pull", lambda repo, name, key: pulled)
    result = command(folder, "someone/vectors:nice")
    assert result.exit_code == 0, result.output
    assert (library.user_dir("tiny") / "nice.safetensors").is_file()


def test_the_default_doses_rise_and_can_hold_the_uncalibrated_limit():
    assert sorted(DEFAULT_DOSES) == list(DEFAULT_DOSES)
    assert min(DEFAULT_DOSES) < DEFAULT_DELTA < max(DEFAULT_DOSES)


def test_the_commands_defaults_are_the_guards():
    from mlxsteer.cli.calibrate import command as calibrate_command

    defaults = {option.name: option.default for option in calibrate_command.params}
    assert defaults["perplexity_ratio"] == Guard().perplexity_ratio
    assert defaults["distinct2_ratio"] == Guard().distinct2_ratio


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["nothing-like-it"], 1, "There is no vector or contrast set called 'nothing-like-it'"),
        (["push", "--doses", "a,b"], 2, "'a,b' is no list of doses"),
        (["push", "--doses", "0"], 2, "Doses to try must be above 0"),
        (["shipped"], 2, "is a projection"),
    ],
)
def test_the_commands_errors_are_one_message(folder, arguments, code, message):
    library.save(push(), "tiny")
    library.save(push(name="shipped", op="project"), "tiny")
    result = command(folder, *arguments)
    assert result.exit_code == code
    assert message in result.stderr
    assert "Traceback" not in result.output
