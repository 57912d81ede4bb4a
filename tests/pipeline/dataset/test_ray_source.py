"""Rows of files as read tasks: each once, whatever the row groups, with Ray and without."""

import block_reader
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray.cloudpickle
import ray.data
from block_reader import Blocks
from parquet_files import typed_table, write_numbered

from segue.pipeline.dataset import blocks, ray_source
from segue.pipeline.dataset.files import cut_rows, discover
from segue.pipeline.dataset.ray_source import RowSource

ray.cloudpickle.register_pickle_by_value(block_reader)  # Ray's workers do not find the modules of the tests
COLUMNS = pa.schema({"body": pa.string()})


def rows_of(source: RowSource) -> list[tuple[str, int, str]]:
    """What the read tasks give when they are called one after the other, without Ray."""
    blocks = [block for task in source.get_read_tasks(200) for block in task()]
    table = pa.concat_tables(blocks)  # fails if blocks differ in schema
    bodies = [row["body"] for row in table.column("input").to_pylist()]
    return list(zip(table.column("src_path").to_pylist(), table.column("src_row").to_pylist(), bodies, strict=True))


@pytest.mark.parametrize("bounds", [(0, None), (0, 0), (0, 1), (0, 7), (3, 12), (12, 13), (5, 19), (23, 1000)])
def test_source_rows_and_provenance_do_not_depend_on_row_groups(tmp_path, bounds):
    expected = [(f"{stem}.parquet", i, f"{stem}-{i}") for stem in ("a", "b") for i in range(12)][slice(*bounds)]
    for row_group_size in (1, 2, 5, 12, 100):
        folder = tmp_path / str(row_group_size)
        for stem in ("a", "b"):
            write_numbered(folder / f"{stem}.parquet", 12, row_group_size=row_group_size)
        files = discover([str(folder)])
        rows = cut_rows([range(file.num_rows) for file in files], *bounds)
        assert rows_of(RowSource(files, Blocks(COLUMNS), rows)) == expected
        if expected:
            scattered = [np.array(numbers[::2], np.int64) for numbers in rows]
            wanted = [row for row in expected if row[1] in scattered["ab".index(row[0][0])]]
            assert rows_of(RowSource(files, Blocks(COLUMNS), scattered)) == wanted


def test_source_large_row_group_comes_in_several_blocks(tmp_path):
    write_numbered(tmp_path / "a.parquet", 120_000)
    (task,) = RowSource(discover([str(tmp_path)]), Blocks(COLUMNS)).get_read_tasks(1)
    blocks = list(task())
    assert [block.num_rows for block in blocks] == [50_000, 50_000, 20_000]
    assert [block.column("src_row")[0].as_py() for block in blocks] == [0, 50_000, 100_000]


def test_source_of_many_small_files_has_few_tasks_of_one_block_each(tmp_path):
    names = [f"f{n:03}" for n in range(200)]
    for name in names:
        write_numbered(tmp_path / f"{name}.parquet", 2)
    source = RowSource(discover([str(tmp_path)]), Blocks(COLUMNS))
    assert len(source.get_read_tasks(1)) == 4
    assert all(len(list(task())) == 1 for task in source.get_read_tasks(1))
    assert rows_of(source) == [(f"{name}.parquet", n, f"{name}-{n}") for name in names for n in range(2)]


def test_source_of_large_pieces_has_a_task_for_each(tmp_path, monkeypatch):
    write_numbered(tmp_path / "a.parquet", 12, row_group_size=4)
    for module in (blocks, ray_source):
        monkeypatch.setattr(module, "TASK_BYTES", 1)
    files = discover([str(tmp_path)])
    pieces = [(files[0], each, range(each.start, each.stop)) for each in blocks.row_ranges(files[0], 0, 12, 1)]
    assert len(pieces) == len(ray_source._tasks(pieces)) == 3


def test_source_of_no_rows_gives_an_empty_block_with_the_schema(tmp_path):
    write_numbered(tmp_path / "a.parquet", 0)
    (task,) = RowSource(discover([str(tmp_path)]), Blocks(COLUMNS)).get_read_tasks(1)
    (block,) = task()
    assert block.num_rows == 0
    assert block.schema.names == ["src_path", "src_row", "input"]


@pytest.mark.filterwarnings("ignore")  # Ray's own
def test_source_under_ray_gives_every_row_once_with_its_types(tmp_path, local_ray):
    tables = [typed_table("pq"), typed_table("qs"), typed_table("tp")]
    for table, stem, size in zip(tables, ("a", "b", "sub/c"), (1, 2, 5), strict=True):
        (tmp_path / stem).parent.mkdir(exist_ok=True)
        pq.write_table(table, tmp_path / f"{stem}.parquet", row_group_size=size)
    files = discover([str(tmp_path)])
    dataset = ray.data.read_datasource(RowSource(files, Blocks(files[0].schema), cut_rows([range(5)] * 3, 0, 14)))
    # A batch over blocks of several files: dictionaries and nulls must survive being put together.
    dataset = dataset.map_batches(lambda batch: batch, batch_size=None, batch_format="pyarrow").repartition(2)
    batches = list(dataset.iter_batches(batch_size=14, batch_format="pyarrow"))
    rows = pa.concat_tables(batches).sort_by([("src_path", "ascending"), ("src_row", "ascending")])
    expected = [(f"{stem}.parquet", i) for stem in ("a", "b", "sub/c") for i in range(5)][:14]
    assert list(zip(rows["src_path"].to_pylist(), rows["src_row"].to_pylist(), strict=True)) == expected
    assert rows["input"].type == pa.struct(list(tables[0].schema))
    assert rows["input"].to_pylist() == [row for table in tables for row in table.to_pylist()][:14]
