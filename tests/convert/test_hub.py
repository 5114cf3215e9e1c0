"""A Hub repo as source, against a stand-in server on this machine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from unittest.mock import Mock

import pytest

from mlxsteer.convert import hub as hub_module
from mlxsteer.convert import space
from mlxsteer.convert.errors import ConvertError
from mlxsteer.convert.hub import HubSource
from mlxsteer.convert.journal import WORK_DIR
from mlxsteer.convert.plan import make_plan
from mlxsteer.convert.progress import SILENT
from mlxsteer.convert.recipes import RECIPES
from mlxsteer.convert.run import Result, convert
from tests.convert import synthetic
from tests.convert.conftest import run
from tests.convert.stand_in import COMMIT, StandIn, serve

REPO = "owner/model"


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthetic.write(tmp_path_factory.mktemp("repo") / "model", synthetic.small_config())


@pytest.fixture
def hub(weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    import huggingface_hub
    from huggingface_hub import constants, file_download

    with serve(weights) as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(file_download, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 10_000)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True, raising=False)
        huggingface_hub.close_session()
        yield server
        huggingface_hub.close_session()


def convert_repo(out: Path, keep_source: bool = False) -> Result:
    source = HubSource(REPO, None, None if keep_source else out / WORK_DIR / "download")
    plan = make_plan(source.checkpoint, RECIPES["lossless"])
    return convert(source, plan, out, keep_source=keep_source)


def weight_bytes(folder: Path) -> list[bytes]:
    return [p.read_bytes() for p in sorted(folder.glob("model-*.safetensors"))]


def test_a_repo_converts_as_the_folder_does_and_leaves_no_download(
    hub: StandIn, weights: Path, tmp_path: Path
) -> None:
    convert_repo(tmp_path / "out")
    run(weights, tmp_path / "local")
    assert weight_bytes(tmp_path / "out") == weight_bytes(tmp_path / "local")
    assert not (tmp_path / "out" / WORK_DIR).exists()
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
    assert f"source revision: {COMMIT}" in (tmp_path / "out" / "README.md").read_text()


def test_the_draft_block_is_never_downloaded(hub: StandIn, tmp_path: Path) -> None:
    convert_repo(tmp_path / "out")
    assert hub.sent["model-00005-of-00006.safetensors"]
    assert not hub.sent["model-00006-of-00006.safetensors"]


def test_only_one_source_shard_is_on_disk_at_a_time(
    hub: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[int] = []
    real = HubSource.fetch

    def fetch(self: HubSource, shard: str, progress: object) -> None:
        real(self, shard, SILENT)
        held.append(len(list((tmp_path / "out" / WORK_DIR).rglob("*.safetensors"))))

    monkeypatch.setattr(HubSource, "fetch", fetch)
    convert_repo(tmp_path / "out")
    assert held == [1] * 5


@pytest.mark.parametrize("point", ["write_shard", "check_written"])
def test_a_download_is_kept_until_what_was_made_of_it_is_verified(
    hub: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    failure = Mock(side_effect=ConvertError("not what was written"))
    monkeypatch.setattr(f"mlxsteer.convert.run.{point}", failure)
    with pytest.raises(ConvertError, match="not what was written"):
        convert_repo(tmp_path / "out")
    names = [p.name for p in (tmp_path / "out").rglob("*.safetensors")]
    assert names == ["model-00001-of-00006.safetensors"]  # the download: nothing was named
    assert (tmp_path / "out" / WORK_DIR / "download" / names[0]).is_file()


def test_kept_sources_go_to_the_hub_cache_and_are_used_from_there(
    hub: StandIn, tmp_path: Path
) -> None:
    convert_repo(tmp_path / "out", keep_source=True)
    cached = {p.name for p in (tmp_path / "cache").rglob("snapshots/*/*.safetensors")}
    assert len(cached) == 5
    before = sum(hub.sent.values())
    convert_repo(tmp_path / "again")
    assert sum(hub.sent.values()) == before
    assert {p.name for p in (tmp_path / "cache").rglob("snapshots/*/*.safetensors")} == cached


def test_a_network_cut_inside_a_shard_is_taken_up_where_it_stopped(
    hub: StandIn, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = "model-00003-of-00006.safetensors"
    hub.cuts[shard] = [50_000, 0, 100_000]
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)
    convert_repo(tmp_path / "out")
    assert hub.sent[shard] == size(weights, 3)
    run(weights, tmp_path / "local")
    assert weight_bytes(tmp_path / "out") == weight_bytes(tmp_path / "local")


@pytest.mark.parametrize("xet", [False, True])
def test_a_network_that_stays_away_loses_at_most_one_shard(
    hub: StandIn, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, xet: bool
) -> None:
    """Over plain HTTP the next run asks for the rest alone; with Xet's client for the whole."""
    shard = "model-00003-of-00006.safetensors"
    hub.cuts[shard] = [50_000, *([0] * 10)]
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)
    monkeypatch.setattr(hub_module, "_has_xet", lambda: xet)
    with pytest.raises(ConvertError, match="run the same command"):
        convert_repo(tmp_path / "out")
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) == 2
    hub.cuts.clear()
    assert convert_repo(tmp_path / "out").resumed == 2
    assert hub.sent["model-00002-of-00006.safetensors"] == size(weights, 2)
    assert hub.sent[shard] == size(weights, 3) + (50_000 if xet else 0)
    run(weights, tmp_path / "local")
    assert weight_bytes(tmp_path / "out") == weight_bytes(tmp_path / "local")


def test_a_partial_download_that_was_damaged_is_dropped_and_fetched_anew(
    hub: StandIn, weights: Path, tmp_path: Path
) -> None:
    """As a power cut leaves it: of the right length, but zeros."""
    name = "model-00001-of-00006.safetensors"
    folder = tmp_path / "out" / WORK_DIR / "download"
    folder.mkdir(parents=True)
    (folder / f"{name}.part").write_bytes(bytes(1000))
    with pytest.raises(ConvertError, match="does not have the sha256"):
        convert_repo(tmp_path / "out")
    convert_repo(tmp_path / "out")
    run(weights, tmp_path / "local")
    assert weight_bytes(tmp_path / "out") == weight_bytes(tmp_path / "local")


def test_what_a_killed_download_left_is_swept(hub: StandIn, tmp_path: Path) -> None:
    source = HubSource(REPO, None, tmp_path / "download")
    notes = tmp_path / "download" / ".cache" / "huggingface" / "download"
    notes.mkdir(parents=True)
    (notes / "x.incomplete").write_bytes(b"half")
    source.fetch("model-00001-of-00006.safetensors", SILENT)
    assert not (notes / "x.incomplete").exists()


def size(folder: Path, number: int) -> int:
    return (folder / f"model-{number:05d}-of-00006.safetensors").stat().st_size


def test_a_shard_with_another_hash_than_published_is_refused_and_dropped(
    hub: StandIn, tmp_path: Path
) -> None:
    shard = "model-00002-of-00006.safetensors"
    hub.wrong_hash.add(shard)
    with pytest.raises(ConvertError, match="does not have the sha256"):
        convert_repo(tmp_path / "out")
    assert not list((tmp_path / "out" / WORK_DIR).rglob(shard))
    hub.wrong_hash.clear()
    convert_repo(tmp_path / "out")


def test_disk_need_counts_one_shard_or_all(hub: StandIn, tmp_path: Path) -> None:
    source = HubSource(REPO, None, tmp_path)
    plan = make_plan(source.checkpoint, RECIPES["lossless"])
    files = [source.checkpoint.shards[name].nbytes for name in plan.last_use]
    one = space.disk_need(plan, set(), downloads=True, keep_source=False)
    every = space.disk_need(plan, set(), downloads=True, keep_source=True)
    assert one.download == max(files)
    assert every.download == sum(files)
    done = {shard.filename for shard in plan.shards[:3]}
    assert space.disk_need(plan, done, True, False).result < one.result


def test_an_unknown_repo_says_what_to_check(hub: StandIn, tmp_path: Path) -> None:
    with pytest.raises(ConvertError, match="owner/other"):
        HubSource("owner/other", None, tmp_path)


def test_reasons_are_one_line() -> None:
    message = hub_module.reason(REPO, RuntimeError("first\nsecond"))
    assert "first" in message
    assert "\n" not in message
