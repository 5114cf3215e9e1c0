"""Claims about `mlxsteer vectors`, run through the command line as users run it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import click
import huggingface_hub
import numpy as np
import pytest
from click.testing import CliRunner, Result
from huggingface_hub import errors
from safetensors.numpy import save_file

from mlxsteer import hubvectors
from mlxsteer.cli import main
from mlxsteer.cli.vectors import command
from mlxsteer.errors import MlxsteerError, VectorError
from mlxsteer.formats import export_file
from mlxsteer.vector import Calibration, SteeringVector

D, LAYERS, MODEL = 16, 6, "tiny"
NORMS = np.linspace(10, 60, LAYERS).astype(np.float32)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch) -> Path:
    """An empty home, cache and working folder, so that no test sees the user's vectors."""
    monkeypatch.setenv("MLXSTEER_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("MLXSTEER_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "home"


def run(*words: str, exits: int = 0) -> Result:
    result = CliRunner().invoke(main, ["vectors", *words], catch_exceptions=False)
    assert result.exit_code == exits, result.output
    return result


def refused(*words: str, exits: int = 1) -> str:
    """The one line that the command refuses with."""
    result = run(*words, exits=exits)
    assert result.stdout == ""
    lines = result.stderr.strip().splitlines()
    assert lines[-1].startswith("Error: ")
    return lines[-1]


def direction(seed: int) -> np.ndarray:
    raw = np.random.default_rng(seed).normal(size=D).astype(np.float32)
    return raw / np.linalg.norm(raw)


def keep(home: Path, name: str, seed: int = 0, **fields) -> SteeringVector:
    """A vector among the user's for the model."""
    rows = {layer: direction(10 * seed + layer) for layer in (2, 3)}
    vector = SteeringVector(name, rows, LAYERS, **{"residual_norm": NORMS} | fields)
    vector.save(home / "vectors" / MODEL / f"{name}.safetensors")
    return vector


def kept(home: Path, name: str) -> SteeringVector:
    return SteeringVector.load(home / "vectors" / MODEL / f"{name}.safetensors")


def test_every_command_has_help_with_one_example() -> None:
    assert set(command.commands) == {
        *(
            "list",
            "show",
            "compare",
            "lens",
            "explain",
            "import",
            "export",
            "combine",
            "push",
            "pull",
        ),
    }
    for name in command.commands:
        text = run(name, "--help").stdout
        assert text.count("mlxsteer vectors") >= 1
        assert re.search(rf"Examples?:\n    mlxsteer vectors {name}", text)


def test_list_shows_the_vectors_of_a_model(home: Path) -> None:
    keep(home, "terse", calibration=Calibration(0.4, 0.25))
    keep(home, "formal", 1)
    table = run("list", "--model", MODEL).stdout.splitlines()
    assert table[0].split()[:3] == ["name", "op", "site"]
    assert [line.split()[0] for line in table[1:]] == ["formal", "terse"]
    assert "2-3 of 6" in table[2]
    assert "0.25" in table[2]
    found = json.loads(run("list", "--model", MODEL, "--json").stdout)
    assert found["model"] == MODEL
    assert [row["delta_plus"] for row in found["vectors"]] == [None, 0.4]


def test_list_survives_a_damaged_file_and_says_which(home: Path) -> None:
    keep(home, "terse")
    (home / "vectors" / MODEL / "broken.safetensors").write_bytes(b"nothing")
    result = run("list", "--model", MODEL)
    assert "terse" in result.stdout
    assert "broken" in result.stderr
    assert "broken" not in result.stdout


def test_list_of_nothing_says_what_to_type() -> None:
    result = run("list", "--model", "nobody")
    assert result.stdout == ""
    assert "mlxsteer extract terse --model nobody" in result.stderr


def test_show_takes_a_name_a_file_and_a_foreign_file(home: Path, tmp_path: Path) -> None:
    vector = keep(home, "terse", about={"positive_label": "brief"})
    vector.save(tmp_path / "copy.safetensors")
    export_file(vector, tmp_path / "copy.gguf", warn=print)
    for what in ("terse", "./copy.safetensors", "copy.gguf"):
        facts = json.loads(run("show", what, "--model", MODEL, "--json").stdout)
        assert facts["layers"] == [2, 3]
        assert (facts["op"], facts["d_model"], facts["n_layers"]) == ("add", D, LAYERS)
    assert "positive_label  brief" in run("show", "terse", "--model", MODEL).stdout
    assert "Did you mean 'terse'" in refused("show", "ters", "--model", MODEL)


def test_import_keeps_a_foreign_vector_and_never_replaces_unasked(home, tmp_path: Path) -> None:
    arrays = {layer: 3 * direction(layer) for layer in (1, 4)}
    source = SteeringVector.from_arrays(arrays, n_layers=LAYERS)
    export_file(source, tmp_path / "x.gguf", warn=print)
    result = run("import", "x.gguf", "--name", "brief", "--model", MODEL)
    assert Path(result.stdout.strip()) == home / "vectors" / MODEL / "brief.safetensors"
    assert "--steer brief:1r" in result.stderr
    assert kept(home, "brief") @ source == pytest.approx(1)

    run("import", "x.gguf", "--name", "late", "--model", MODEL, "--gguf-base", "generator")
    assert kept(home, "late").layers == (0, 3)
    assert "--force" in refused("import", "x.gguf", "--name", "late", "--model", MODEL)
    assert kept(home, "late").layers == (0, 3)
    run("import", "x.gguf", "--name", "late", "--model", MODEL, "--force", "--layers", "4")
    assert kept(home, "late").layers == (4,)


def test_import_of_bare_arrays_takes_op_site_and_layers(home: Path, tmp_path: Path) -> None:
    save_file({f"layer.{k}": direction(k) for k in range(4)}, tmp_path / "x.safetensors")
    words = ("import", "x.safetensors", "--model", MODEL)
    assert "--op add --site residual --layers" in refused(*words, exits=2)
    options = ("--op", "project", "--site", "ffn_out", "--layers", "1-2", "--n-layers", "6")
    result = run(*words, *options)
    assert "--steer x:1" in result.stderr
    vector = kept(home, "x")
    assert (vector.op, vector.site, vector.layers, vector.n_layers) == (
        *("project", "ffn_out", (1, 2), 6),
    )
    assert "is no layer" in refused(*words, *options[:4], "--layers", "a-b", exits=2)


def test_import_refuses_a_vector_of_another_width_than_the_model(tmp_path: Path) -> None:
    folder = tmp_path / "models" / "wide"
    folder.mkdir(parents=True)
    config = {"model_type": "llama", "hidden_size": 32, "num_hidden_layers": 6}
    (folder / "config.json").write_text(json.dumps(config))
    export_file(SteeringVector.from_arrays({2: direction(0)}), tmp_path / "x.gguf", warn=print)
    line = refused("import", "x.gguf", "--model", str(folder))
    assert "has width 16" in line
    assert "wide has width 32" in line


@pytest.mark.parametrize(
    ("content", "name", "says"),
    [
        (b"\x80\x04\x95", "x.gguf", "pickle"),
        (b"GGUF\x03\0\0\0", "x.gguf", "damaged, cut short"),
        (b"", "x.npz", "--op add --site residual"),
        (b"\0" * 10, "x.f32", "ffn_out"),
        (b"hello", "x.txt", "of no known format"),
        (None, "none.gguf", "There is no file"),
    ],
)
def test_a_bad_file_is_one_line_and_no_traceback(tmp_path, content, name: str, says: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    exits = 2 if "--op" in says else 1
    assert says in refused("import", name, "--model", MODEL, exits=exits)


def test_export_writes_each_format_and_reads_back(home: Path, tmp_path: Path) -> None:
    keep(home, "terse", calibration=Calibration(0.4, 0.2))
    keep(home, "calm", 1, op="project", site="ffn_out", residual_norm=None)
    model = ("--model", MODEL)
    assert run("export", "terse", "t.gguf", *model, "--strength", "3").stdout == "t.gguf\n"
    assert run("export", "calm", "c.f32", *model).stdout == "c.f32\nc.json\n"
    run("export", "calm", "c.gguf", *model, "--format", "glp")
    run("export", "terse", "t.safetensors", *model)
    expected = kept(home, "terse").lengths(3, "", None)
    shown = run("show", "t.gguf", *model, "--json").stdout
    assert json.loads(shown)["layers"] == [2, 3]
    from mlxsteer.formats import import_file

    back = import_file(tmp_path / "t.gguf")
    np.testing.assert_allclose(back.lengths(1, "r", None), expected, rtol=1e-5)
    assert "--format glp" in refused("export", "calm", "d.gguf", *model)
    assert "--force" in refused("export", "terse", "t.gguf", *model)
    assert "names no format" in refused("export", "terse", "t.bin", *model, exits=2)
    run("export", "terse", "t.gguf", *model, "--force")


@pytest.mark.parametrize(
    "terms",
    ["2*terse - formal", "terse:2, formal:-1", "terse*2 - 1.0 * formal", '2*"terse" - formal'],
)
def test_combine_adds_shifts(home: Path, terms: str) -> None:
    a, b = keep(home, "terse"), keep(home, "formal", 1)
    result = run("combine", terms, "mix", "--model", MODEL)
    assert Path(result.stdout.strip()) == home / "vectors" / MODEL / "mix.safetensors"
    mix = kept(home, "mix")
    assert mix.name == "mix"

    def shift(v: SteeringVector, layer: int, amount: float = 1) -> np.ndarray:
        return v.lengths(amount, "", None)[layer] * v.directions[layer]

    for layer in (2, 3):
        expected = shift(a, layer, 2) + shift(b, layer, -1)
        np.testing.assert_allclose(shift(mix, layer), expected, rtol=1e-4, atol=1e-5)


def test_combine_refuses_what_is_no_sum(home: Path) -> None:
    keep(home, "terse")
    keep(home, "calm", 1, op="project")
    for terms, says, exits in (
        ("terse:1d, terse", "no unit", 2),
        ("terse@all, terse", "no unit", 2),
        ("", "nothing to combine", 2),
        ("2*terse + -0.5*calm", "unclear at character 8", 2),
        ("2 terse + calm", "unclear at character 1", 2),
        ("2*terse - terse*2", "cancel", 1),
        ("terse + calm", "op is add and project", 1),
        ("terse - nobody", "no vector or contrast set called 'nobody'", 1),
    ):
        assert says in refused("combine", terms, "mix", "--model", MODEL, exits=exits)
    run("combine", "2*terse", "out.safetensors", "--model", MODEL)
    assert "there already" in refused("combine", "terse", "out.safetensors", "--model", MODEL)


# --- the Hub ------------------------------------------------------------------------------------


class FakeHub:
    """What a Hub repo holds: {path in repo: bytes}."""

    def __init__(self, folder: Path):
        self.folder, self.files, self.repos = folder, {}, []

    def create_repo(self, repo: str, **options) -> None:
        self.repos.append((repo, options))

    def upload_file(self, *, path_or_fileobj: bytes, path_in_repo: str, **_options) -> None:
        self.files[path_in_repo] = path_or_fileobj

    def list_repo_files(self, repo: str, **_options) -> list[str]:
        return list(self.files)

    def download(self, repo: str, file: str, **_options) -> str:
        if file not in self.files:
            raise errors.EntryNotFoundError(f"no {file}")
        path = self.folder / file.replace("/", "_")
        path.write_bytes(self.files[file])
        return str(path)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch) -> FakeHub:
    fake = FakeHub(tmp_path)
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: fake)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fake.download)
    return fake


def test_a_vector_pushed_is_the_vector_pulled(home: Path, hub: FakeHub) -> None:
    vector = keep(home, "terse", calibration=Calibration(0.4, 0.2))
    result = run("push", "terse", "me/mine", "--model", MODEL, "--private")
    assert result.stdout == "me/mine:terse\n"
    assert hub.repos == [("me/mine", {"private": True, "exist_ok": True})]
    assert list(hub.files) == ["tiny/terse.safetensors"]
    run("pull", "me/mine:terse", "--name", "theirs", "--model", MODEL)
    assert kept(home, "theirs") @ vector == pytest.approx(1)
    assert kept(home, "theirs").calibration == vector.calibration
    assert "--force" in refused("pull", "me/mine:terse", "--name", "theirs", "--model", MODEL)


def test_a_file_at_the_top_of_a_repo_is_found_too(home: Path, hub: FakeHub) -> None:
    keep(home, "terse")
    path = home / "vectors" / MODEL / "terse.safetensors"
    hub.files = {"terse.safetensors": path.read_bytes()}
    assert SteeringVector.load(hubvectors.pull("me/mine", "terse", "other")).layers == (2, 3)


def test_pull_names_what_the_repo_has(hub: FakeHub) -> None:
    hub.files = {"tiny/terse.safetensors": b"", "README.md": b""}
    line = refused("pull", "me/mine:ters", "--model", MODEL)
    assert "no vector 'ters' for tiny. Did you mean 'terse'? It has tiny/terse." in line
    assert "Type owner/repo:name" in refused("pull", "me/mine", "--model", MODEL, exits=2)
    assert "names no vector" in refused("pull", "me/mine:../x", "--model", MODEL, exits=2)


def test_what_is_pulled_is_checked_like_any_file(home: Path, hub: FakeHub) -> None:
    hub.files = {"tiny/terse.safetensors": b"\x80\x04\x95 not a vector"}
    assert "pickle" in refused("pull", "me/mine:terse", "--model", MODEL)
    assert not (home / "vectors" / MODEL / "terse.safetensors").exists()


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (errors.LocalEntryNotFoundError("offline"), "cannot be reached"),
        (OSError("Connection reset\nby peer"), "Connection reset"),
        (RuntimeError(), "RuntimeError"),
    ],
)
def test_a_failed_transfer_is_one_line(home, hub, monkeypatch, error, says: str) -> None:
    def fail(*_args, **_options):
        raise error

    keep(home, "terse")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    monkeypatch.setattr(hub, "upload_file", fail)
    assert says in refused("pull", "me/mine:other", "--model", MODEL)
    assert says in refused("push", "terse", "me/mine", "--model", MODEL)


def test_hub_names_are_checked_before_anything_is_sent(home: Path, hub: FakeHub) -> None:
    vector = keep(home, "terse")
    for repo, name in (("mine", None), ("me/mine", "a/b"), ("me/mine", "../a")):
        with pytest.raises(MlxsteerError, match="names no vector"):
            hubvectors.push(vector, repo, MODEL, name=name)
    assert hub.repos == []
    with pytest.raises(VectorError):
        hubvectors.pull("me/mine", "none", MODEL)


def test_show_prints_the_verdict_and_its_lines():
    from mlxsteer.cli.facts import show
    from mlxsteer.statistics import Interval
    from mlxsteer.verdict import Measured, checks, sentence

    up = Interval(2, 1, 3)
    measured = Measured(3, up, 0.5, 0.1, 1.0, 1.2, 0.9, 0, 1.0)
    found = checks(measured)
    row = {"amount": "+3", "metric": 4.0, "words": 20.0, "ended": 1.0, "distinct2": 0.9}
    evaluation = {
        "sentence": sentence(found),
        "strength": 3.0,
        "n_questions": 16,
        "metric": "words",
        "direction": "down",
        "checks": [vars(check) for check in found],
        "rows": [{**row, "perplexity": None}],
    }

    @click.command()
    def command() -> None:
        show({"name": "x", "eval": evaluation})

    lines = CliRunner().invoke(command).stdout.splitlines()
    assert "Evaluated: does not work: fails moved the wrong way" in "\n".join(lines)
    assert [line.split() for line in lines if line.startswith("FAIL")] == [
        ["FAIL", "moved", "the", "wrong", "way", "50%", "≤", "25%"]
    ]
    assert lines[-1].split() == ["+3", "4", "20", "1", "0.9", "-"]
