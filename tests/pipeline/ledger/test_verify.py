"""`segue verify`: each way in which a folder can be spoilt is told, by file."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from commands import segue

from segue.pipeline.ledger.columns import result_schema, result_table
from segue.pipeline.ledger.completeness import write_success
from segue.pipeline.ledger.manifest import Manifest
from segue.pipeline.ledger.shards import FOOTER_KEY, PROTOCOL, ShardFooter, commit_shard, serialize_shard
from segue.pipeline.ledger.units import UnitSpec, serialize_unit
from segue.pipeline.ledger.verify import Damage, Verification, verify
from segue.pipeline.storage.folder import LocalStore
from segue.workers.rows.params import SamplingParams

NUM_SHARDS, ROWS = 3, 40


def output_of(folder: Path, *, name: str = "job", shards: int = NUM_SHARDS) -> Manifest:
    """The folder of a job of three units, of which some are answered; with all, it is finished."""
    store = LocalStore(folder)
    units = []
    for ordinal in range(NUM_SHARDS):
        unit_id, content = serialize_unit(pa.table({"n": list(range(ordinal, ordinal + ROWS))}), name)
        units.append(UnitSpec(ordinal, unit_id, ROWS, ROWS, ROWS))
        store.create(units[-1].unit_name, content)
    manifest = Manifest(PROTOCOL, name, "2026-01-02", {"task": "generate", "name": name}, {}, tuple(units), {})
    store.create("_job/manifest.json", manifest.to_bytes())
    for unit in units[:shards]:
        rows = [{"src_path": "a", "src_row": n, "generated_text": f"{name} {n}", "error": None} for n in range(ROWS)]
        table = result_table(
            result_schema(pa.schema([]), SamplingParams()), pa.table({"": [0] * ROWS}).select([]), rows
        )
        footer = ShardFooter(PROTOCOL, manifest.fingerprint, unit.unit_id, ROWS, {}, 0, 0, 0)
        commit_shard(store, unit, serialize_shard(table, footer), manifest.fingerprint)
    if shards == NUM_SHARDS:
        write_success(store, manifest)
    return manifest


@pytest.fixture
def finished(tmp_path: Path) -> tuple[Path, Path]:
    """A finished folder, and its second shard."""
    manifest = output_of(tmp_path / "out")
    return tmp_path / "out", tmp_path / "out" / manifest.units[1].shard_name


def only_damage(found: Verification) -> Damage:
    assert (found.status, found.exit_code) == ("damaged", 5)
    (damage,) = found.damages
    return damage


def test_folder_as_it_was_left_is_sound(finished):
    found = verify(str(finished[0]))
    assert (found.status, found.exit_code, found.rows, found.shards) == ("sound", 0, NUM_SHARDS * ROWS, NUM_SHARDS)


def test_every_flipped_byte_is_found(finished):
    folder, shard = finished
    content = shard.read_bytes()
    for place in range(0, len(content), 37):
        shard.write_bytes(content[:place] + bytes([content[place] ^ 0x10]) + content[place + 1 :])
        damage = only_damage(verify(str(folder)))
        assert damage.kind in ("changed", "of another job"), place  # a byte of the footer may be one of its names
        assert damage.path == str(shard)


def test_flipped_byte_that_reads_as_another_answer_is_found_before_the_job_is_finished(tmp_path):
    """Only the pages' checksums can tell."""
    manifest = output_of(tmp_path, shards=1)
    shard = tmp_path / manifest.units[0].shard_name
    content, wanted = shard.read_bytes(), pq.read_table(shard)
    for place in range(len(content) // 2):
        shard.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        try:
            if not pq.read_table(shard).equals(wanted):
                break
        except (OSError, ValueError):  # zstd or Parquet noticed by itself
            continue
    else:
        pytest.fail("no byte of this shard can be flipped unnoticed")
    damage = only_damage(verify(str(tmp_path)))
    assert (damage.kind, damage.path) == ("changed", str(shard))


@pytest.mark.parametrize(("times", "status"), [(2, "sound"), (3, "damaged")])
def test_byte_that_flips_on_the_way_is_no_damage_of_the_file(finished, monkeypatch, times, status):
    folder, shard = finished
    read, left = LocalStore.read, [times]

    def flipping(store: LocalStore, name: str) -> bytes:
        content = read(store, name)
        if name != shard.name or not left[0]:
            return content
        left[0] -= 1
        return content[:40] + bytes([content[40] ^ 1]) + content[41:]

    monkeypatch.setattr(LocalStore, "read", flipping)
    assert verify(str(folder)).status == status


def test_shard_that_was_cut_is_found(finished):
    folder, shard = finished
    shard.write_bytes(shard.read_bytes()[:-100])
    assert only_damage(verify(str(folder))).kind == "truncated"


def test_missing_and_foreign_files_are_found(finished):
    folder, shard = finished
    shard.rename(folder / "part-stranger.parquet")
    found = verify(str(folder))
    assert {(damage.kind, Path(damage.path).name) for damage in found.damages} == {
        ("missing", shard.name),
        ("foreign", "part-stranger.parquet"),
    }
    assert found.rows == 2 * ROWS


def test_shard_of_another_job_is_found_whatever_its_name(finished, tmp_path):
    folder, shard = finished
    other = output_of(tmp_path / "other", name="other")
    shard.write_bytes((tmp_path / "other" / other.units[1].shard_name).read_bytes())
    damage = only_damage(verify(str(folder)))
    assert (damage.kind, damage.path) == ("of another job", str(shard))


def test_shard_written_again_with_other_rows_is_found(finished):
    folder, shard = finished
    table = pq.read_table(shard)
    footer = pq.read_metadata(shard).metadata[FOOTER_KEY]
    pq.write_table(table.slice(1).slice(0, ROWS).replace_schema_metadata({FOOTER_KEY: footer}), shard)
    assert only_damage(verify(str(folder))).path == str(shard)


@pytest.mark.parametrize("text", ["done", "[]", '{"fingerprint": "f", "shards": [{"name": "a"}]}', '{"shards": 3}'])
def test_success_that_is_no_success_is_found(finished, text):
    folder, _ = finished
    (folder / "_SUCCESS").write_text(text)
    damage = only_damage(verify(str(folder)))
    assert (damage.kind, damage.path) == ("changed", str(folder / "_SUCCESS"))


def test_success_that_leaves_a_shard_out_is_found(finished):
    folder, shard = finished
    success = json.loads((folder / "_SUCCESS").read_bytes())
    success["shards"] = [each for each in success["shards"] if each["name"] != shard.name]
    (folder / "_SUCCESS").write_text(json.dumps(success))
    assert only_damage(verify(str(folder))).detail == f"does not list {shard.name}"


def test_unfinished_folder_is_incomplete_and_its_plan_is_looked_at(tmp_path):
    manifest = output_of(tmp_path, shards=1)
    found = verify(str(tmp_path))
    assert (found.status, found.exit_code, found.missing, found.rows) == ("incomplete", 3, NUM_SHARDS - 1, ROWS)
    (tmp_path / manifest.units[2].unit_name).unlink()
    assert only_damage(verify(str(tmp_path))).kind == "plan"


def test_command_names_the_file_and_says_so_with_its_exit_code(finished):
    folder, shard = finished
    assert segue("verify", folder, "--json")[0] == 0
    shard.unlink()
    code, out, err = segue("verify", folder)
    assert code == 5
    assert f"missing: {shard}: gone" in out + err
    assert json.loads(out.splitlines()[-1])["damages"][0]["kind"] == "missing"
    assert segue("verify", folder.parent)[0] == 2
