"""What Prometheus is told: names that the dashboard asks for, numbers that are the summary's."""

import json
import re
import urllib.request
from pathlib import Path
from typing import Any

import promql_parser
import pytest
from echo_jobs import wait_for, write_input, write_job
from local_cluster import LocalCluster, local_cluster
from prometheus_client.parser import text_string_to_metric_families

from segue.pipeline.processes.metrics import OF_ENGINES, OF_RUNS, Metric

DASHBOARD = Path(__file__).parents[3] / "infra" / "monitoring" / "grafana-segue.json"


def queries() -> list[str]:
    panels = json.loads(DASHBOARD.read_text())["panels"]
    return [target["expr"] for panel in panels for target in panel["targets"]]


def names_in(node: Any) -> list[str]:
    """Every metric that a parsed query asks for."""
    if isinstance(node, promql_parser.VectorSelector):
        return [node.name or ""]
    parts = [getattr(node, name, None) for name in ("expr", "lhs", "rhs", "vector_selector")]
    parts += getattr(node, "args", [])
    return [name for part in parts if part is not None for name in names_in(part)]


def exported(metric: Metric) -> str:
    """Its name in Prometheus."""
    return f"ray_{metric.name}" + ("_total" if metric.kind == "counter" else "")


@pytest.mark.parametrize("query", queries())
def test_dashboard_queries_ask_for_what_there_is(query):
    known = {exported(metric): metric for metric in (*OF_RUNS, *OF_ENGINES)}
    asked = names_in(promql_parser.parse(query.replace("$job", "any")))
    assert asked
    assert set(asked) == set(re.findall(r"\bray_\w+", query))
    assert set(asked) <= known.keys()
    grouped = {word.strip() for group in re.findall(r"by \(([^)]*)\)", query) for word in group.split(",")}
    tags = {"job_name", *(tag for name in asked for tag in known[name].tags)}
    assert grouped <= tags
    rates = re.findall(r"rate\((ray_\w+)", query)
    assert all(known[name].kind == "counter" for name in rates)


def test_dashboard_shows_every_metric():
    asked = " ".join(queries())
    assert [exported(metric) for metric in (*OF_RUNS, *OF_ENGINES) if exported(metric) not in asked] == []


def scraped(cluster: LocalCluster) -> dict[tuple[str, str], float]:
    """By exported name and the value of its own tag, summed over processes, of all nodes."""
    folder = Path((cluster.folder / "temp").read_text().strip())
    (told,) = json.loads((folder / "prom_metrics_service_discovery.json").read_text())
    found: dict[tuple[str, str], float] = {}
    for target in told["targets"]:
        with urllib.request.urlopen(f"http://{target}/metrics", timeout=30) as answer:
            text = answer.read().decode()
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if sample.labels.get("job_name", "").startswith("job-"):
                    key = (
                        sample.name,
                        sample.labels.get("code") or sample.labels.get("kind") or sample.labels.get("status", ""),
                    )
                    found[key] = found.get(key, 0.0) + sample.value
    return found


def of(found: dict[tuple[str, str], float], metric: Metric) -> dict[str, float]:
    return {tag: value for (name, tag), value in found.items() if name == exported(metric)}


@pytest.mark.long
def test_metrics_scraped_during_a_run_end_as_its_summary_says(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    from segue.pipeline.processes import metrics

    write_input(tmp_path, 90)
    pq.write_table(pa.table({"prompt": pa.array(["", None, "x" * 40])}), tmp_path / "in" / "c.parquet")
    path = write_job(
        tmp_path,
        model={"source": "echo:1"},
        output={"path": "out", "max_rows_per_file": 8, "columns": []},
        limits={"max_model_len": 200},
        workers={"units_in_flight": 1},
    )
    with local_cluster(tmp_path / "cluster", 1) as cluster:
        run = cluster.segue("submit", path, "--wait")
        during: dict[tuple[str, str], float] = {}

        def is_under_way() -> bool:
            during.update(scraped(cluster))
            return bool(of(during, metrics.ROWS) and of(during, metrics.STEPS))

        wait_for(is_under_way, run)
        out, err = run.communicate(timeout=200)
        assert run.returncode == 0, err
        summary = json.loads(out.splitlines()[-1])["result"]
        assert 0 < of(during, metrics.ROWS)[""] < summary["rows"]
        assert of(during, metrics.PLANNED_ROWS) == {"": 93}
        assert 0 < of(during, metrics.DONE_ROWS)[""] < 93
        assert of(during, metrics.STEPS)[""] > 0
        assert of(during, metrics.KV_CAPACITY) == {"": 0}  # echo has none

        def is_told() -> bool:
            return of(scraped(cluster), metrics.ROWS) == {"": summary["rows"]}

        wait_for(is_told)
        end = scraped(cluster)
    assert of(end, metrics.ERRORS) == summary["errors"] != {}
    assert of(end, metrics.TOKENS) == {
        "requested": summary["tokens_requested"],
        "computed": summary["tokens_computed"],
        "generated": summary["tokens_generated"],
    }
    assert of(end, metrics.UNITS) == {"committed": summary["shards"]}
